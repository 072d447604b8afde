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


def test_a_score_of_double_precision_is_followed_in_that_of_the_data():
    with jax.enable_x64(True):
        x = jnp.ones((4, 2), jnp.float32)

        def double(x, t):
            return -x.astype(jnp.float64)

        for divergence in ("exact", "hutchinson"):
            found = sj.log_prob(jax.random.key(0), sj.VP(), double, x, divergence=divergence)
            assert (found.log_prob.dtype, found.latent.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(sj.ode_sample(sj.VP(), double, x), x, rtol=1e-4)
        np.testing.assert_allclose(found.log_prob, -0.5 * 2 - np.log(2 * np.pi), rtol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "x64"), [("bfloat16", False), ("float32", False), ("float64", False), ("float64", True)]
)
def test_results_are_of_single_precision_at_least(dtype, x64):
    """Half precision is too coarse for times; arrays of numpy, too, and without a warning."""
    with jax.enable_x64(x64):
        sde, key, x = sj.VP(), jax.random.key(0), np.ones((2, 3), jnp.dtype(dtype))

        def score_fn(x, t):
            return -x

        samples = sj.sample(key, sj.ddim(sde, score_fn), x, timesteps.log_snr(sde, 10))
        found = samples, sj.ode_sample(sde, score_fn, x), sj.log_prob(key, sde, score_fn, x).log_prob
        assert {a.dtype for a in found} == {np.dtype("float64" if x64 else "float32")}
