"""Every function of the core on data of any precision, integers, empty batches and a score called wrongly."""

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


# Pointwise formulas, which follow JAX's promotion; and what is for grids or images alone.
POINTWISE = ("sde", "parameterization", "guidance", "inverse", "operators")
GRIDS = ("karras", "ladder", "log_snr", "quadratic", "uniform")


@pytest.mark.parametrize("module", sorted(core_cases.CASES.keys() - POINTWISE))
def test_every_function_computes_in_single_precision_on_half(module):
    x = jnp.ones((4, 2), jnp.bfloat16)
    for name in core_cases.CASES[module].keys() - GRIDS:
        found = jax.tree.leaves(jax.eval_shape(core_cases.CASES[module][name], jax.random.key(0), x))
        assert all(a.dtype in (np.float32, np.int32) for a in found), name


def test_half_precision_starts_lose_nothing_on_the_way():
    """Small steps of Langevin dynamics vanish in a bfloat16 state, whose noise is coarse: 7.325 for a mean of 7.239."""
    x, key = jnp.full((8, 2), 7.25, jnp.bfloat16), jax.random.key(0)
    ladder = jnp.array([1.0, 0.1])
    for run in (
        lambda x: sj.unadjusted_langevin(key, lambda x: 7.24 - x, x, step_size=1e-3, num_steps=20),
        lambda x: sj.annealed_langevin(key, core_cases.by_sigma, x, ladder, step_size=1e-3, num_steps=5),
        lambda x: sj.chain_elbo(key, core_cases.SDE, core_cases.SCORE, x, core_cases.TS),
    ):
        np.testing.assert_array_equal(run(x), run(x.astype(jnp.float32)))


@pytest.mark.parametrize("module", sorted(core_cases.CASES.keys() - {"smc"}))
def test_every_function_passes_an_empty_batch_or_says_why_not(module):
    x, empty = jnp.ones((4, 2)), jnp.ones((0, 2))
    for name in core_cases.CASES[module].keys() - GRIDS:
        case = core_cases.CASES[module][name]
        if module == "mcmc" or name == "curvature":
            with pytest.raises(ValueError, match=r"must be at least 1, got 0|at least 2 paths, .* got 0"):
                case(jax.random.key(0), empty)
            continue
        full, none = (jax.tree.leaves(jax.eval_shape(case, jax.random.key(0), x)) for x in (x, empty))
        shapes = {tuple(0 if n == 4 else n for n in a.shape) for a in full}
        assert shapes == {tuple(0 if n == 4 else n for n in a.shape) for a in none}, name


def test_an_exact_divergence_of_an_empty_batch():
    empty = jnp.ones((0, 2))
    assert sj.log_prob(jax.random.key(0), sj.VP(), lambda x, t: -x, empty, divergence="exact").log_prob.shape == (0,)


SUMMED = {
    "divergence": ("exact_divergence", "hutch_pp_divergence", "hutchinson_divergence"),
    "losses": [n for n in core_cases.CASES["losses"] if n.endswith("score_matching")],
    "distillation": list(core_cases.CASES["distillation"]),
    "samplers": ("adaptive_sde", "langevin_corrector"),
    "likelihood": ("chain_elbo", "elbo", "log_prob"),
    "ode": ("spherical",),
    "sde": ("prior_log_prob",),
}
FLOATING = {
    "samplers": ("annealed_langevin", "ddim", "inpaint_langevin", "unadjusted_langevin"),
    "ode": ("ode_encode", "ode_sample"),
    "losses": ("cross_entropy",),
    "timesteps": ("curvature",),
    "replacement": ("inpaint",),
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in SUMMED.items() for n in names])
def test_one_example_without_a_batch_axis_is_named(module, name):
    with pytest.raises(ValueError, match=r"must be \[batch, \*event\] with at least 2 axes, but has shape \(4,\)"):
        core_cases.CASES[module][name](jax.random.key(0), jnp.ones(4))


@pytest.mark.parametrize(("module", "name"), [(m, n) for part in (SUMMED, FLOATING) for m in part for n in part[m]])
def test_images_that_are_not_scaled_are_named(module, name):
    with pytest.raises(ValueError, match="must be floating point, got uint8: scale images first"):
        core_cases.CASES[module][name](jax.random.key(0), jnp.ones((4, 2), jnp.uint8))


@pytest.mark.parametrize("module", core_cases.CASES)
def test_a_score_that_takes_the_time_first_is_an_error_everywhere(module, monkeypatch):
    called = []

    def swapped(t, x):
        called.append(x)
        return -x

    for name in ("SCORE", "color_score", "by_sigma"):
        monkeypatch.setattr(core_cases, name, swapped)
    for name, case in core_cases.CASES[module].items():
        called.clear()
        try:
            jax.eval_shape(case, jax.random.key(0), jnp.ones((4, 2)))
        except ValueError as error:
            assert "a score must have the shape of x" in str(error), name  # noqa: PT017
        else:
            assert not called, name


def test_a_network_that_takes_the_time_first_is_an_error_in_every_adapter():
    for name in ("from_denoiser", "from_flow", "from_noise", "from_velocity", "preconditioned"):
        with pytest.raises(ValueError, match=r"shape of x, \(4, 2\), but has \(4,\): it is called with \(x, t\)"):
            getattr(sj, name)(sj.VP(), lambda t, x: -x)(jnp.ones((4, 2)), jnp.full(4, 0.5))


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
