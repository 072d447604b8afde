"""Every parameterization, fed with its exact target on a mixture, must give the exact score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj
from score_jax.networks import MLP


def posterior_mean(mixture, sde, x, t):
    """E[x_0 | x_t] of a mixture by conditioning each Gaussian (no Tweedie): `x [d]`, scalar t."""
    a, s = sde.alpha(t), sde.sigma(t)
    joint, means = [], []
    for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
        marginal = a**2 * c + s**2 * jnp.eye(len(m))
        joint.append(jnp.log(w) + jax.scipy.stats.multivariate_normal.logpdf(x, a * m, marginal))
        means.append(m + a * c @ jnp.linalg.solve(marginal, x - a * m))
    return jax.nn.softmax(jnp.stack(joint)) @ jnp.stack(means)


def targets(mixture, sde, x, t):
    """The exact predictions of x_0, the noise, the velocity and the flow, `alpha' x_0 + sigma' eps` in the mean."""
    x0 = jax.vmap(lambda x, t: posterior_mean(mixture, sde, x, t))(x, t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    eps = (x - alpha * x0) / sigma
    rates = [jax.vmap(jax.grad(scale))(t)[:, None] for scale in (sde.alpha, sde.sigma)]
    return x0, eps, alpha * eps - sigma * x0, rates[0] * x0 + rates[1] * eps


@pytest.fixture
def points(sde, mixture):
    t = jnp.linspace(0.1, 0.9, 8)
    x0 = mixture.sample(jax.random.key(0), 8)
    return sj.perturb(sde, x0, jax.random.normal(jax.random.key(1), x0.shape), t), t


PREDICTIONS = [sj.from_denoiser, sj.from_noise, sj.from_velocity, sj.from_flow]


@pytest.mark.parametrize(("which", "adapter"), enumerate(PREDICTIONS))
def test_exact_predictions_give_the_exact_score(sde, mixture, points, adapter, which):
    score_fn = adapter(sde, lambda x, t: targets(mixture, sde, x, t)[which])
    exact = mixture.score_fn(sde)(*points)
    np.testing.assert_allclose(score_fn(*points), exact, rtol=2e-3, atol=2e-3)


def test_flow_matching_is_the_regression_of_the_path_s_velocity(any_sde):
    """Example by example, on every process: on RectifiedFlow the target is eps - x_0."""
    key, t, x0 = jax.random.key(0), jnp.array([0.2, 0.5, 0.8]), jnp.arange(6.0).reshape(3, 2)
    sde, eps = any_sde, jax.random.normal(key, x0.shape)
    rates = [jax.vmap(jax.grad(scale))(t)[:, None] for scale in (sde.alpha, sde.sigma)]
    target = eps - x0 if isinstance(sde, sj.RectifiedFlow) else rates[0] * x0 + rates[1] * eps
    score_fn = sj.from_flow(sde, lambda x, t: 0.3 * x)
    loss = sj.denoising_score_matching(key, sde, score_fn, x0, t, weight=lambda sde, t: sde.diffusion(t) ** 4 / 4)
    exact = 0.5 * jnp.sum((0.3 * sj.perturb(sde, x0, eps, t) - target) ** 2, axis=1)
    np.testing.assert_allclose(loss, exact, rtol=2e-3)


def test_preconditioning_inverts_to_the_exact_score(sde, mixture, points):
    """The network's exact target is (D - c_skip y) / c_out (Karras et al. 2022, Eq. 8)."""
    x, t = points
    level = sde.sigma(t) / sde.alpha(t)
    seen = {}

    def network(inputs, cond):
        seen["inputs"], seen["cond"] = inputs, cond
        skip, out = 0.25 / (level**2 + 0.25), level * 0.5 / jnp.sqrt(level**2 + 0.25)
        x0, y = targets(mixture, sde, x, t)[0], x / sde.alpha(t)[:, None]
        return (x0 - skip[:, None] * y) / out[:, None]

    score = sj.preconditioned(sde, network, sigma_data=0.5)(x, t)
    np.testing.assert_allclose(score, mixture.score_fn(sde)(x, t), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(seen["cond"], jnp.log(level) / 4, rtol=1e-4, atol=1e-5)
    expected = (x / sde.alpha(t)[:, None]) / jnp.sqrt(level**2 + 0.25)[:, None]
    np.testing.assert_allclose(seen["inputs"], expected, rtol=1e-4)


ADAPTERS = [sj.from_noise, sj.from_score, sj.from_denoiser, sj.from_velocity, sj.from_flow, sj.preconditioned]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_network_takes_one_time_an_example_and_one_for_all(adapter):
    """Losses draw a time for each example, samplers have one for all."""
    sde, network, x = sj.VP(), MLP(features=8, num_blocks=1), jnp.linspace(-1, 1, 6).reshape(3, 2)
    params = network.init(jax.random.key(0), x, jnp.ones(3))
    # The last layer starts at zero, and a network that is zero has no time to mistake.
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    score_fn = adapter(sde, lambda x, t: network.apply(params, x, 999 * t))
    np.testing.assert_array_equal(score_fn(x, jnp.array(0.3)), score_fn(x, jnp.full(3, 0.3)))
    assert np.abs(score_fn(x, jnp.array(0.3)) - score_fn(x, jnp.array(0.31))).max() > 1e-4
    assert sj.tweedie(sde, score_fn, x, 0.3).shape == x.shape
    ts = sj.timesteps.uniform(sde, 2)
    assert jnp.isfinite(sj.sample(jax.random.key(1), sj.ancestral(sde, score_fn), x, ts)).all()


def test_tweedie_is_the_posterior_mean(sde, mixture, points):
    x0 = targets(mixture, sde, *points)[0]
    np.testing.assert_allclose(sj.tweedie(sde, mixture.score_fn(sde), *points), x0, rtol=1e-3, atol=1e-3)


def test_energy_is_the_score_s_potential(sde, mixture, points):
    x, t = points
    score_fn = sj.from_energy(lambda x, t: -jax.vmap(lambda x, t: mixture.marginal(sde, t).log_prob(x))(x, t))
    np.testing.assert_allclose(score_fn(x, t), mixture.score_fn(sde)(x, t), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        sj.from_energy(lambda x: -mixture.log_prob(x))(x), mixture.score(x), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="one number an example"):
        sj.from_energy(lambda x: 0.5 * x**2)(x)


def test_tweedie_covariance_is_the_posterior_covariance(sde, points):
    """One Gaussian: Cov[x_0 | x_t] = (C^-1 + alpha^2/sigma^2 I)^-1, whatever x_t."""
    x, t = points
    covariance = jnp.array([[0.3, 0.1], [0.1, 0.2]])
    gaussian = sj.GaussianMixture(jnp.ones(1), jnp.array([[1.0, -1.0]]), covariance[None])
    v = jax.random.normal(jax.random.key(2), x.shape)
    mean, product = sj.tweedie_covariance(sde, gaussian.score_fn(sde), x, t, v)
    np.testing.assert_allclose(mean, sj.tweedie(sde, gaussian.score_fn(sde), x, t), rtol=1e-5)
    snr = jnp.exp(sde.log_snr(t))[:, None, None]
    exact = jnp.linalg.inv(jnp.linalg.inv(covariance)[None] + snr * jnp.eye(2)[None])
    np.testing.assert_allclose(product, jnp.einsum("nde,ne->nd", exact, v), rtol=2e-3, atol=1e-4)
