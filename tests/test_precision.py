"""The core where JAX computes in float64: data of single precision stay what they are."""

import core_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj
from score_jax import timesteps

# What carries data from step to step. Elsewhere float64 times make float64 results, as they do in JAX.
CARRIED = ("inverse", "ode", "samplers", "smc")


@pytest.mark.parametrize("module", core_cases.CASES)
def test_every_function_takes_single_precision_with_x64(module, monkeypatch):
    """Traced only, with times of double precision; the numbers of `ode_solve` and `mcmc` are of any type."""
    with jax.enable_x64(True):
        monkeypatch.setattr(core_cases, "TS", jnp.asarray(np.asarray(core_cases.TS, np.float64)))
        x = jnp.ones((4, 2), jnp.float32)
        for name, case in core_cases.CASES[module].items():
            found = jax.tree.leaves(jax.eval_shape(case, jax.random.key(0), x))
            if module in CARRIED or name in ("chain_elbo", "inpainting", "log_prob"):
                assert all(a.dtype != np.float64 for a in found), name


@pytest.mark.parametrize("module", core_cases.CASES)
def test_every_function_works_where_types_are_not_promoted(module):
    """But for the chains, whose diagnostics are blackjax's."""
    x = jnp.ones((4, 2))
    with jax.numpy_dtype_promotion("strict"):
        for name in core_cases.CASES[module].keys() - {"hmc", "mala", "nuts"}:
            jax.eval_shape(core_cases.CASES[module][name], jax.random.key(0), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_samples_are_of_single_precision_at_least(dtype):
    """Half precision is too coarse for times."""
    with jax.enable_x64(dtype == "float64"):
        sampler, ts = sj.ddim(sj.VP(), lambda x, t: -x), timesteps.log_snr(sj.VP(), 10)
        samples = sj.sample(jax.random.key(0), sampler, jnp.ones((2, 3), dtype), ts)
        assert samples.dtype == jnp.promote_types(dtype, jnp.float32)
