"""Samplers: see `base` for the contract."""

from score_jax.samplers.base import Sampler, chain, sample
from score_jax.samplers.deterministic import ddim, euler, heun
from score_jax.samplers.langevin import (
    annealed_langevin,
    annealed_langevin_corrector,
    inpaint_langevin,
    langevin_corrector,
    unadjusted_langevin,
)
from score_jax.samplers.multistep import deis, dpm_solver_pp, unipc
from score_jax.samplers.stochastic import ancestral, euler_maruyama

__all__ = [
    "Sampler",
    "ancestral",
    "annealed_langevin",
    "annealed_langevin_corrector",
    "chain",
    "ddim",
    "deis",
    "dpm_solver_pp",
    "euler",
    "euler_maruyama",
    "heun",
    "inpaint_langevin",
    "langevin_corrector",
    "sample",
    "unadjusted_langevin",
    "unipc",
]
