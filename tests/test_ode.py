"""The adaptive probability flow against its closed form on Gaussians, and its law on a mixture."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PROCESSES, mode_share, moments

import score_jax as sj
from score_jax.ode import SOLVERS, integrate

N = 10_000
GAUSSIAN = sj.GaussianMixture(jnp.ones(1), jnp.array([[1.0, -0.5, 0.0]]), jnp.diag(jnp.array([0.3, 0.05, 2.0]))[None])


@pytest.fixture(scope="module")
def x():
    z = np.random.default_rng(0).standard_normal((100, 3))
    return jnp.asarray(np.asarray(GAUSSIAN.means) + np.sqrt([0.3, 0.05, 2.0]) * z, jnp.float32)


def transport(sde, x, t, s):
    """The probability flow of a Gaussian: each coordinate keeps its distance to the mean in standard deviations."""
    start, end = GAUSSIAN.marginal(sde, t), GAUSSIAN.marginal(sde, s)
    ratio = jnp.sqrt(jnp.diag(end.covariances[0]) / jnp.diag(start.covariances[0]))
    return end.means + ratio[None] * (x - start.means)


@pytest.mark.parametrize(("solver", "process"), list(zip(SOLVERS, PROCESSES, strict=True)))
def test_solvers_are_accurate_count_their_evaluations_and_compile_once(solver, process, x):
    """Against the closed form; the second call, the other way and to another tolerance, traces nothing."""
    sde, times, traces = PROCESSES[process], [], []

    def score_fn(x, t):
        traces.append(1)
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return GAUSSIAN.score_fn(sde)(x, t)

    y, num_evaluations = sj.ode_solve(sde, score_fn, x, 0.05, 0.7, rtol=1e-6, atol=1e-6, solver=solver)
    jax.effects_barrier()
    np.testing.assert_allclose(y, transport(sde, x, 0.05, 0.7), atol=2e-5)
    assert num_evaluations == len(times)
    assert min(times) == pytest.approx(0.05)
    assert max(times) <= 0.7 + 1e-6
    first = len(traces)
    back, _ = sj.ode_solve(sde, score_fn, y, 0.7, 0.05, solver=solver)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert len(traces) == first


def test_spherical_keeps_to_the_circle():
    """Of unit vectors at an angle theta the point at weight w is at w theta from the first; equal codes stay."""
    angle, weight = 2.0, np.array([0.0, 0.25, 1.0])
    a, b = (
        jnp.broadcast_to(jnp.array([1.0, 0.0]), (3, 2)),
        jnp.broadcast_to(jnp.array([np.cos(angle), np.sin(angle)]), (3, 2)),
    )
    expected = np.stack([np.cos(weight * angle), np.sin(weight * angle)], axis=1)
    np.testing.assert_allclose(sj.spherical(a, b, weight), expected, atol=1e-6)
    np.testing.assert_allclose(sj.spherical(3 * a, 3 * a, 0.3), 3 * a, rtol=1e-6)


def test_decoding_gives_the_law_at_t_min_and_encoding_inverts_it(sde, mixture):
    """From the exact marginal at t_max to t_min, back to t_max and to t_min again, within 1e-3.

    Mean, covariance and mode weight of 10,000 samples within 4.5 standard errors: false alarms below 1e-4.
    """
    score_fn = mixture.score_fn(sde)
    x = sj.ode_sample(sde, score_fn, mixture.marginal(sde, sde.t_max).sample(jax.random.key(0), N))
    law = mixture.marginal(sde, sde.t_min)
    mean, cov = moments(law)
    se = float(jnp.sqrt(cov.max() / N))
    np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * se)
    np.testing.assert_allclose(jnp.cov(x.T), cov, atol=4.5 * float(cov.max()) * np.sqrt(2 / N))
    share = mode_share(law, x)
    assert abs(float(share.mean()) - 0.7) < 4.5 * np.sqrt(0.21 / N)
    near = x[np.asarray(share) > 0.5]
    np.testing.assert_allclose(jnp.cov(near.T), law.covariances[0], atol=4.5 * 0.3 * np.sqrt(2 / (0.7 * N)))
    np.testing.assert_allclose(sj.ode_sample(sde, score_fn, sj.ode_encode(sde, score_fn, x)), x, atol=1e-3)


def oscillate(t, y, frequencies):
    return frequencies * jnp.cos(frequencies * t)


def test_a_batch_does_not_hide_its_hardest_example():
    """sin(w t) with w = 40 among 2,000 of w = 1: a norm averaged over the batch would allow it 40 times the error."""
    frequencies = jnp.ones((2001, 1)).at[1000].set(40.0)
    options = dict(rtol=1e-5, atol=1e-5, solver="tsit5", max_steps=1000)
    y, _ = integrate(oscillate, frequencies, jnp.zeros((2001, 1)), 0.0, 2.0, **options)
    np.testing.assert_allclose(y, jnp.sin(2 * frequencies), atol=1e-4)


def test_gradients_flow_through(x):
    """The derivative of the flow of a Gaussian by its start is the ratio of standard deviations."""
    sde = sj.VP()
    score_fn = GAUSSIAN.score_fn(sde)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(sj.ode_solve(sde, score_fn, x, 0.1, 0.5, max_steps=16)[0])))(x[:2])
    exact = jax.grad(lambda x: jnp.sum(transport(sde, x, 0.1, 0.5)))(x[:2])
    np.testing.assert_allclose(slope, exact, rtol=1e-4)


def test_stopping_early_is_an_error_that_says_where_and_nan_under_jit():
    def score_fn(x, t):
        return jnp.where(t > 0.5, jnp.nan, -0.5 * x)

    def encode(x, max_steps=100):
        return sj.ode_encode(sj.VP(), score_fn, x, max_steps=max_steps)

    x = jnp.ones((2, 3))
    with pytest.raises(sj.SolverError, match=r"no step that works at t = 0\.5: are x and the score finite there\?$"):
        encode(x)
    assert jnp.isnan(jax.jit(encode)(x)).all()
    with pytest.raises(sj.SolverError, match=r"max_steps=3 at t = 0\.\d+: loosen rtol and atol, or raise max_steps$"):
        encode(x, max_steps=3)


def test_an_empty_batch_stays_empty(x):
    assert sj.ode_sample(sj.VP(), lambda x, t: -x, x[:0]).shape == (0, 3)
    assert sj.log_prob(jax.random.key(0), sj.VP(), lambda x, t: -x, x[:0]).log_prob.shape == (0,)


def test_bad_input(x):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            sj.ode_sample(sj.VP(), lambda x, t: -x, x, **{name: 0.0})
    with pytest.raises(ValueError, match="unknown solver 'rk45': choose one of 'tsit5', 'dopri5', 'dopri8'"):
        sj.ode_sample(sj.VP(), lambda x, t: -x, x, solver="rk45")


def test_diffrax_is_imported_at_its_first_use():
    code = (
        "import sys, score_jax as sj; assert 'diffrax' not in sys.modules; sj.log_prob; assert 'diffrax' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'ode_sampel'"):
        sj.ode_sampel  # noqa: B018
