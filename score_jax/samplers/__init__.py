"""Samplers: see `base` for the contract."""

from score_jax.samplers import base, deterministic, langevin, multistep, stochastic
from score_jax.samplers.base import *  # noqa: F403
from score_jax.samplers.deterministic import *  # noqa: F403
from score_jax.samplers.langevin import *  # noqa: F403
from score_jax.samplers.multistep import *  # noqa: F403
from score_jax.samplers.stochastic import *  # noqa: F403

__all__ = [
    *base.__all__,
    *deterministic.__all__,
    *langevin.__all__,
    *multistep.__all__,
    *stochastic.__all__,
]
