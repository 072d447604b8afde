"""The oracle itself, against scipy and against its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mode_share, moments
from scipy.stats import multivariate_normal

import score_jax as sj


def test_density_equals_scipy(mixture):
    x = mixture.sample(jax.random.key(0), 50)
    parts = zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    expected = np.log(sum(float(w) * multivariate_normal(m, c).pdf(x) for w, m, c in parts))
    np.testing.assert_allclose(mixture.log_prob(x), expected, rtol=1e-4, atol=1e-5)


def test_score_is_the_gradient(mixture):
    x = 3 * jax.random.normal(jax.random.key(0), (50, 2))
    np.testing.assert_allclose(mixture.score(x), jax.vmap(jax.grad(mixture.log_prob))(x), rtol=1e-4, atol=1e-4)


def test_draws_have_the_law(mixture):
    """100,000 draws; bounds at 5 standard errors, false alarms below 1e-5."""
    n = 100_000
    x = mixture.sample(jax.random.key(0), n)
    mean, cov = moments(mixture)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * float(jnp.sqrt(cov.max() / n)))
    np.testing.assert_allclose(jnp.cov(x.T), cov, atol=5 * float(cov.max()) * np.sqrt(2 / n))
    assert abs(float(mode_share(mixture, x).mean()) - 0.7) < 5 * np.sqrt(0.21 / n)


def test_score_fn_is_the_marginals_score(sde, mixture):
    t = jnp.linspace(0.05, 1.0, 5)
    x = 2 * jax.random.normal(jax.random.key(0), (5, 2))
    expected = jnp.stack([mixture.marginal(sde, ti).score(xi) for ti, xi in zip(t, x, strict=True)])
    np.testing.assert_allclose(mixture.score_fn(sde)(x, t), expected, rtol=1e-4, atol=1e-5)


def test_marginal_moments(sde, mixture):
    mean, cov = moments(mixture)
    mean_t, cov_t = moments(mixture.marginal(sde, 0.3))
    np.testing.assert_allclose(mean_t, sde.alpha(0.3) * mean, rtol=1e-5)
    np.testing.assert_allclose(cov_t, sde.alpha(0.3) ** 2 * cov + sde.sigma(0.3) ** 2 * jnp.eye(2), rtol=1e-5)


@pytest.mark.parametrize("c", [1.0, 0.1])
def test_equal_eigenvalues_have_derivatives(sde, c):
    """N(0, c I): with v = alpha^2 c + sigma^2 the log density is  -|x|^2/(2 v) - log(2 pi v)  and the score  -x/v.

    In time, and in the covariance E along any symmetric direction:  d(-x/v)/dE = E x / v^2  at alpha = 1, sigma = 0.
    """
    t, x, d = jnp.array(0.3), jnp.array([1.0, -0.5]), jnp.array([[0.3, 0.7], [0.7, -0.2]])
    mixture = sj.GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), c * jnp.eye(2)[None])

    def variance(t):
        return sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2

    def density(t):
        return -jnp.sum(x**2) / (2 * variance(t)) - jnp.log(2 * np.pi * variance(t))

    def derivatives(fn):
        rate = jax.jacfwd(fn)
        return jnp.stack([fn(t), rate(t), jax.jacfwd(rate)(t)])

    got = jax.jit(lambda: derivatives(lambda t: mixture.marginal(sde, t).log_prob(x)))()
    np.testing.assert_allclose(got, derivatives(density), rtol=1e-4, atol=1e-5)
    exact = derivatives(lambda t: -x / variance(t))
    for score in (lambda t: mixture.marginal(sde, t).score(x), lambda t: mixture.score_fn(sde)(x[None], t)[0]):
        np.testing.assert_allclose(jax.jit(lambda s=score: derivatives(s))(), exact, rtol=1e-4, atol=1e-5)

    def at(h):
        return sj.GaussianMixture(mixture.weights, mixture.means, mixture.covariances + h * d[None])

    a, v = sde.alpha(t), variance(t)
    for score, exact in (
        (lambda h: at(h).score(x), d @ x / c**2),
        (lambda h: at(h).score_fn(sde)(x[None], t)[0], a**2 * d @ x / v**2),
    ):
        np.testing.assert_allclose(jax.jit(jax.jacrev(score))(0.0), exact, rtol=1e-4)
    slope = jax.grad(lambda h: at(h).log_prob(x))(0.0)
    np.testing.assert_allclose(slope, 0.5 * (x @ d @ x / c**2 - jnp.trace(d) / c), rtol=1e-4)


def test_components_that_share_eigenvalues_have_the_derivatives_of_finite_differences():
    """Two components, whose posterior probabilities depend on the covariances, too, by the determinant."""
    d = jnp.array([[[0.3, 0.7], [0.7, -0.2]], [[-0.1, 0.2], [0.2, 0.6]]])
    x, t, sde = jnp.array([[0.3, -0.2]]), jnp.array(0.2), sj.VP()

    @jax.jit
    def score(h):
        covariances = jnp.broadcast_to(jnp.eye(2), (2, 2, 2)) + h * d
        return sj.GaussianMixture([0.7, 0.3], [[1.0, 0.5], [-1.0, -1.0]], covariances).score_fn(sde)(x, t)

    differences = (score(0.02) - score(-0.02)) / 0.04
    np.testing.assert_allclose(jax.jacfwd(score)(0.0), differences, rtol=2e-3)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"weights \[k\]"):
        sj.GaussianMixture([0.5, 0.5], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])


def test_the_posterior_is_bayes_rule(mixture):
    """At points of the plane, and its evidence against a sum over a grid of the plane."""
    A, y, noise_std = jnp.array([[1.0, 0.5], [-0.3, 2.0], [0.0, 1.0]]), jnp.array([0.4, -0.2, 0.3]), 0.5
    side = jnp.linspace(-6.0, 6.0, 301)
    x = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    likelihood = multivariate_normal(y, noise_std**2 * np.eye(3)).logpdf(np.asarray(x @ A.T))
    joint = jax.jit(mixture.log_prob)(x) + likelihood
    evidence = jax.nn.logsumexp(joint) + 2 * jnp.log(side[1] - side[0])
    np.testing.assert_allclose(mixture.measurement(A, noise_std).log_prob(y), evidence, atol=1e-4)
    posterior = jax.jit(mixture.posterior)(A, y, noise_std)
    near = joint > joint.max() - 10
    np.testing.assert_allclose(jax.jit(posterior.log_prob)(x)[near], (joint - evidence)[near], atol=2e-3)
    np.testing.assert_allclose(posterior.weights.sum(), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match=r"A must have shape \(3, 2\)"):
        mixture.posterior(A[:2], y, noise_std)
