"""Chains against exact moments where unadjusted Langevin is off; annealed importance sampling against exact log Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import score_jax as sj
from score_jax import mcmc

TARGETS = {"mala": 0.574, "hmc": 0.8, "nuts": 0.8}
MEAN = np.array([1.0, -2.0])
COVARIANCE = np.array([[1.0, 0.9], [0.9, 1.5]])
PRECISION = np.linalg.inv(COVARIANCE)
CHAINS, SAMPLES, WARMUP = 64, 1000, 400


def energy(x):
    centred = x - MEAN[None]
    return 0.5 * jnp.einsum("bi,ij,bj->b", centred, PRECISION, centred)


def pixels_energy(x):
    """Of `[batch, 4, 1, 1]`: the Gaussian; Gamma(2), NaN where that is 0; modes at -10 and 10."""
    gamma, modes = x[:, 2, 0, 0], x[:, 3, 0, 0]
    modes = jnp.logaddexp(-((modes - 10) ** 2) / 2, -((modes + 10) ** 2) / 2)
    return energy(x[:, :2, 0, 0]) + gamma - jnp.log(gamma) - modes


@pytest.fixture(scope="module")
def runs():
    """Each method on these four pixels, the Gaussian from starts three times too wide, half the chains in each mode."""
    x = 3 * jax.random.normal(jax.random.key(0), (CHAINS, 4, 1, 1))
    x = x.at[:, 2].set(2.0).at[:, 3].set(10.0).at[::2, 3].set(-10.0)
    options = dict(num_samples=SAMPLES, num_warmup=WARMUP)
    return {name: getattr(mcmc, name)(jax.random.key(1), pixels_energy, x, **options) for name in TARGETS}


def standard_errors(seen, expected):
    """Errors of the means of `[n, chains, k]`, by the spread of the chains, which are independent."""
    means = np.asarray(seen, np.float64).mean(axis=0)
    return (means.mean(axis=0) - expected) / (means.std(axis=0, ddof=1) / np.sqrt(len(means)))


def gaussian_errors(samples, covariance):
    """The two means and three covariances of `[n, chains, 2]`, in standard errors."""
    a, b = np.moveaxis(np.asarray(samples, np.float64) - MEAN, -1, 0)
    expected = [0, 0, covariance[0, 0], covariance[0, 1], covariance[1, 1]]
    return standard_errors(np.stack([a, b, a * a, a * b, b * b], axis=-1), expected)


def test_adjusted_chains_are_exact_where_unadjusted_langevin_is_biased(runs):
    """Mean and covariance of a correlated Gaussian of covariance C = P^-1.

    MALA, HMC and NUTS, 64,000 draws each: within 3 standard errors (15 comparisons: one key in 17 fails).
    x' = A x + sqrt(e) z with A = I - e P/2 has the covariance S = A S A + e I, solved by S = C (I - e P/4)^-1.
    40,000 independent chains: all 5 within the bound that one key in 1,000 fails, and more than 10 from C.
    """
    for name, chains in runs.items():
        assert np.all(np.abs(gaussian_errors(chains.samples[:, :, :2, 0, 0], COVARIANCE)) < 3), name
    e = 0.5
    a = np.eye(2) - e / 2 * PRECISION
    biased = COVARIANCE @ np.linalg.inv(np.eye(2) - e / 4 * PRECISION)
    np.testing.assert_allclose(biased, a @ biased @ a + e * np.eye(2))
    x = jnp.zeros((40_000, 2))
    x = sj.unadjusted_langevin(jax.random.key(1), sj.from_energy(energy), x, step_size=e, num_steps=100)[None]
    assert np.all(np.abs(gaussian_errors(x, biased)) < norm.isf(1e-3 / 5 / 2))
    assert np.all(np.abs(gaussian_errors(x, COVARIANCE)[[2, 4]]) > 10)


@pytest.mark.parametrize("name", TARGETS)
def test_gamma_law_where_the_energy_is_nan_elsewhere(runs, name):
    """Mean and variance 2, 64,000 draws: 3 standard errors (6 comparisons: one key in 42 fails)."""
    gamma = np.asarray(runs[name].samples[:, :, 2, 0, 0], np.float64)
    assert np.all(np.abs(standard_errors(np.stack([gamma, (gamma - 2) ** 2], axis=-1), [2, 2])) < 3)


@pytest.mark.parametrize("name", TARGETS)
def test_diagnostics(runs, name):
    """The chains' means spread as the effective sample size says: within 40 % (9 % expected, so one key in 10^5).

    No chain leaves its mode: in ranks the modes are the halves of a normal law, of variance 1 - 2/pi about
    +-sqrt(2/pi), and of 128 half chains R-hat^2 = 1 + 128/127 (2/pi) / (1 - 2/pi).
    """
    chains = runs[name]
    assert chains.samples.shape == (SAMPLES, CHAINS, 4, 1, 1)
    assert np.all(np.abs(chains.acceptance_rate - TARGETS[name]) < 0.1)
    assert abs(chains.acceptance_rate.mean() - TARGETS[name]) < 0.05
    # The mass matrix sees the variance within the modes, not between them; MALA is too slow for the third pixel's.
    np.testing.assert_allclose(chains.inverse_mass_matrix[jnp.array([0, 1, 3]), 0, 0], [1, 1.5, 1], rtol=0.2)
    r_hat, ess = chains.r_hat[:, 0, 0], chains.effective_sample_size[:, 0, 0]
    assert np.all(r_hat[:3] < 1.02)
    np.testing.assert_allclose(r_hat[3], np.sqrt(1 + 128 / 127 * 2 / (np.pi - 2)), rtol=0.01)
    spread = chains.samples[:, :, :2, 0, 0].mean(axis=0).std(axis=0, ddof=1)
    np.testing.assert_allclose(spread, np.sqrt(np.diag(COVARIANCE) * CHAINS / ess[:2]), rtol=0.4)
    # A chain that stays in its mode is worth about one draw.
    assert ess[3] < 2 * CHAINS


def test_sampling_does_not_repeat_the_keys_of_warm_up(runs):
    """Chains that get the same noise twice come close to where they were: the state after warm-up comes back.

    The correlation over 64 chains is below 0.5, 4 standard errors.
    """
    samples = runs["mala"].samples[:, :, 0, 0, 0]
    assert abs(np.corrcoef(samples[0], samples[WARMUP - 1])[0, 1]) < 0.5


@pytest.mark.parametrize("name", [*TARGETS, "annealed_importance_sampling"])
def test_a_second_key_traces_nothing(name):
    calls, x = [], jnp.zeros((3, 2))

    def counted(x):
        calls.append(x)
        return energy(x)

    @jax.jit
    def sample(key):
        if name in TARGETS:
            return getattr(mcmc, name)(key, counted, x, num_samples=4, num_warmup=4)
        return getattr(mcmc, name)(key, counted, x.shape, [0, 1])

    jax.eval_shape(sample, jax.random.key(0))
    traced = len(calls)
    jax.eval_shape(sample, jax.random.key(1))
    assert len(calls) == traced > 0


def test_log_z_and_weighted_mean_of_a_gaussian_with_honest_standard_errors():
    """Z = (2 pi)^(d/2) |P|^(-1/2) e^-3 and the mean: 4 standard errors (3 comparisons, one key in 5,000).

    20,000 particles make that of log Z 0.008.  The spread of the means of 400 groups of them is what it says: within
    15 % (4 % expected).  Short transitions keep weights and positions correlated: without weights the mean is off.
    """
    n, betas = 20_000, jnp.linspace(0, 1, 21)
    result = mcmc.annealed_importance_sampling(
        jax.random.key(0),
        lambda x: energy(x[:, :, 0]) + 3,
        (n, 2, 1),
        betas,
        scale=2.0,
        num_integration_steps=1,
    )
    exact = np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(COVARIANCE)[1] - 3
    assert abs(result.log_z - exact) < 4 * result.standard_error
    assert result.standard_error < 0.01
    w = np.exp(np.asarray(result.log_weights, np.float64) - exact)
    np.testing.assert_allclose(np.exp(result.log_z - exact), w.mean(), rtol=1e-4)
    np.testing.assert_allclose(w.reshape(400, 50).mean(axis=1).std() / 20, result.standard_error, rtol=0.15)
    centred = np.asarray(result.samples)[None, :, :, 0] - MEAN
    assert np.all(np.abs(standard_errors(w[None, :, None] * centred, 0)) < 4)
    assert np.all(np.abs(standard_errors(centred, 0)) > 8)
    # The pilots' step sizes serve the particles that carry the weights.
    np.testing.assert_allclose(result.acceptance_rate[10:], 0.65, atol=0.15)


def test_bad_input():
    key, x = jax.random.key(0), jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="num_samples must be at least 4, got 0"):
        mcmc.mala(key, energy, x, num_samples=0)
    with pytest.raises(ValueError, match="num_warmup must be at least 4, got 3"):
        mcmc.nuts(key, energy, x, num_samples=4, num_warmup=3)
    with pytest.raises(ValueError, match="num_integration_steps must be at least 1, got 0"):
        mcmc.hmc(key, energy, x, num_samples=4, num_integration_steps=0)
    with pytest.raises(ValueError, match=r"one number an example, \(3,\), but has \(3, 2\)"):
        mcmc.hmc(key, lambda x: x**2, x, num_samples=4)
    with pytest.raises(ValueError, match=r"not finite at the start of chains \[1\]"):
        mcmc.nuts(key, energy, x.at[1, 0].set(jnp.inf), num_samples=4)
    with pytest.raises(ValueError, match=r"one number an example, \(3,\), but has \(\)"):
        mcmc.annealed_importance_sampling(key, jnp.sum, (3, 2), [0, 1])
    for betas in [1.0, 0.0], [0.5, 1.0], [0.0, 0.5], [0.0, 0.5, 0.5, 1.0], [1.0], 1.0:
        with pytest.raises(ValueError, match="betas must be a vector increasing from 0 to 1"):
            mcmc.annealed_importance_sampling(key, energy, (3, 2), betas)
