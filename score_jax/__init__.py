"""Score-based generative modelling in JAX: learn the score, and do everything with it."""

import importlib
from typing import Any

from score_jax import (
    analytic,
    distillation,
    divergence,
    guidance,
    inverse,
    losses,
    operators,
    parameterization,
    replacement,
    samplers,
    sde,
    smc,
    timesteps,
)
from score_jax.analytic import *  # noqa: F403
from score_jax.distillation import *  # noqa: F403
from score_jax.divergence import *  # noqa: F403
from score_jax.guidance import *  # noqa: F403
from score_jax.inverse import *  # noqa: F403
from score_jax.losses import *  # noqa: F403
from score_jax.parameterization import *  # noqa: F403
from score_jax.replacement import *  # noqa: F403
from score_jax.samplers import *  # noqa: F403
from score_jax.sde import *  # noqa: F403
from score_jax.smc import *  # noqa: F403

__version__ = "0.1.0"

# What needs diffrax, which takes as long to import as all the rest, is imported at its first use.
LAZY = {
    "ode": ("SolverError", "ode_encode", "ode_sample", "ode_solve", "spherical"),
    "likelihood": ("BitsPerDim", "LogProb", "bits_per_dim", "chain_elbo", "elbo", "log_prob", "place_in_cells"),
}

__all__ = [
    "operators",
    "timesteps",
    *analytic.__all__,
    *distillation.__all__,
    *divergence.__all__,
    *guidance.__all__,
    *inverse.__all__,
    *losses.__all__,
    *parameterization.__all__,
    *replacement.__all__,
    *samplers.__all__,
    *sde.__all__,
    *smc.__all__,
    *(name for names in LAZY.values() for name in names),
]


def __getattr__(name: str) -> Any:
    for module, names in LAZY.items():
        if name == module or name in names:
            loaded = importlib.import_module(f"score_jax.{module}")
            return loaded if name == module else getattr(loaded, name)
    raise AttributeError(f"module 'score_jax' has no attribute {name!r}")
