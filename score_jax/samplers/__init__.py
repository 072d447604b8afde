"""Samplers: see `base` for the contract."""

from score_jax.samplers.base import Sampler, chain, sample
from score_jax.samplers.deterministic import ddim, euler, heun
from score_jax.samplers.langevin import langevin_corrector
from score_jax.samplers.stochastic import ancestral, euler_maruyama

__all__ = [
    "Sampler",
    "ancestral",
    "chain",
    "ddim",
    "euler",
    "euler_maruyama",
    "heun",
    "langevin_corrector",
    "sample",
]
