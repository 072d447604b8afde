"""Traces against the Jacobian itself, and the estimators' variance against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj

D = 6
MATRIX = jax.random.normal(jax.random.key(0), (D, D))


def field(x):
    """Rows independent, Jacobians different at every row and not symmetric."""
    return jnp.tanh(x @ MATRIX) + x**2


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (7, D))


@pytest.fixture(scope="module")
def jacobian(x):
    return jax.vmap(jax.jacfwd(lambda row: field(row[None])[0]))(x)


def test_exact_is_the_trace_of_the_jacobian(x, jacobian):
    value, divergence = jax.jit(lambda x: sj.exact_divergence(field, x))(x)
    np.testing.assert_array_equal(value, jax.jit(field)(x))
    np.testing.assert_allclose(divergence, np.trace(jacobian, axis1=1, axis2=2), rtol=1e-5)


def test_exact_on_images_larger_than_a_chunk():
    """A diagonal field of 5 x 5 x 3 pixels, more than are pushed through at once."""
    scale = jnp.arange(75.0).reshape(1, 5, 5, 3)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    divergence = sj.exact_divergence(lambda x: scale * x**2, x)[1]
    np.testing.assert_allclose(divergence, jnp.sum(2 * scale * x, axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian", "sphere"])
def test_hutchinson_is_unbiased_with_the_variance_of_theory(x, jacobian, probe):
    """5,000 probes, 7 examples: 4.5 standard errors (false alarms 5e-5), variance within 10 % (2 % each expected)."""
    n = 5000
    value, mean, error = sj.hutchinson_divergence(
        jax.random.key(2), field, x, num_probes=n, probe=probe, standard_error=True
    )
    trace = np.trace(jacobian, axis1=1, axis2=2)
    np.testing.assert_array_equal(value, field(x))
    assert np.all(np.abs(mean - trace) < 4.5 * error)
    symmetric = 0.5 * (jacobian + jnp.swapaxes(jacobian, 1, 2))
    square = 2 * jnp.sum(symmetric**2, axis=(1, 2))
    expected = {
        "gaussian": square,
        "rademacher": square - 2 * jnp.sum(jnp.einsum("bii->bi", symmetric) ** 2, axis=1),
        "sphere": D / (D + 2) * (square - 2 / D * trace**2),
    }[probe]
    np.testing.assert_allclose(error**2 * n, expected, rtol=0.1)


def test_hutch_pp_is_unbiased_and_exact_with_enough_probes(x, jacobian):
    """2,000 keys, 4.5 standard errors (false alarms 5e-5); the sketch spans the space with 3 d probes."""
    trace = np.trace(jacobian, axis1=1, axis2=2)
    keys = jax.random.split(jax.random.key(3), 2000)
    _, estimates, errors = jax.vmap(lambda k: sj.hutch_pp_divergence(k, field, x, num_probes=6))(keys)
    assert np.all(np.abs(estimates.mean(axis=0) - trace) < 4.5 * estimates.std(axis=0) / np.sqrt(2000))
    # The standard errors that it reports are those that it has.
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(errors**2, axis=0)), estimates.std(axis=0), rtol=0.15)
    _, exact, error = sj.hutch_pp_divergence(jax.random.key(4), field, x, num_probes=3 * D)
    np.testing.assert_allclose(exact, trace, rtol=1e-4)
    np.testing.assert_allclose(error, 0, atol=1e-5)


def test_hutch_pp_beats_hutchinson_on_a_low_rank_jacobian():
    """30 dimensions, eigenvalues falling as 1/i^2: less than a tenth of the variance at 12 products."""
    scale = 100.0 / jnp.arange(1, 31) ** 2
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (30, 30)))[0]
    x = jnp.zeros((1, 30))
    keys = jax.random.split(jax.random.key(1), 500)

    def linear(x):
        return x @ (q * scale[None]) @ q.T

    plain = jax.vmap(lambda k: sj.hutchinson_divergence(k, linear, x, num_probes=12)[1])(keys)
    sketched = jax.vmap(lambda k: sj.hutch_pp_divergence(k, linear, x, num_probes=12)[1])(keys)
    assert sketched.var() < 0.1 * plain.var()


def test_bad_numbers_of_probes(x):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        sj.hutchinson_divergence(key, field, x, num_probes=0)
    with pytest.raises(ValueError, match="at least 2"):
        sj.hutchinson_divergence(key, field, x, standard_error=True)
    with pytest.raises(ValueError, match="multiple of 3"):
        sj.hutch_pp_divergence(key, field, x, num_probes=4)
    with pytest.raises(ValueError, match="unknown probe 'uniform'"):
        sj.hutchinson_divergence(key, field, x, probe="uniform")
