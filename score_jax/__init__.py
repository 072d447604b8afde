"""Score-based generative modelling in JAX: learn the score, and do everything with it."""

from score_jax import analytic, divergence, losses, parameterization, samplers, sde, timesteps
from score_jax.analytic import *  # noqa: F403
from score_jax.divergence import *  # noqa: F403
from score_jax.losses import *  # noqa: F403
from score_jax.parameterization import *  # noqa: F403
from score_jax.samplers import *  # noqa: F403
from score_jax.sde import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "timesteps",
    *analytic.__all__,
    *divergence.__all__,
    *losses.__all__,
    *parameterization.__all__,
    *samplers.__all__,
    *sde.__all__,
]
