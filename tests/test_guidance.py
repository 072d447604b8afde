"""Guidance and composition against the closed forms of Gaussians and their mixtures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj
from score_jax import timesteps

N = 20_000
TOLERANCE = dict(rtol=1e-3, atol=1e-3)


def component(mixture, k):
    """One component of a mixture, as a mixture of one."""
    return sj.GaussianMixture(jnp.ones(1), mixture.means[k : k + 1], mixture.covariances[k : k + 1])


def gaussian(mean, variance):
    """N(mean, variance I) in two dimensions."""
    return sj.GaussianMixture(jnp.ones(1), jnp.asarray(mean)[None], variance * jnp.eye(2)[None])


def log_density(mixture, sde):
    """log p_t(x), for one time an example."""
    return lambda x, t: jax.vmap(lambda x, t: mixture.marginal(sde, t).log_prob(x))(x, jnp.broadcast_to(t, x.shape[:1]))


@pytest.fixture(scope="module")
def points():
    """64 points around the modes, at times from 0.05 to 1."""
    return 1.5 * jax.random.normal(jax.random.key(0), (64, 2)), jnp.linspace(0.05, 1.0, 64)


def test_exact_classifier_gives_the_component_s_score(sde, mixture, points):
    """By Bayes' rule, log p(k | x_t) = log w_k + log p_k(x_t) - log p(x_t); each row with a label of its own.

    At scale w the score is (1 - w) times the mixture's and w times the component's.
    """
    x, t = points
    labels = jnp.arange(64) % 2
    parts = [component(mixture, k) for k in (0, 1)]

    def log_likelihood(x, t):
        joint = jnp.stack([jnp.log(w) + log_density(p, sde)(x, t) for w, p in zip(mixture.weights, parts, strict=True)])
        return jax.nn.log_softmax(joint, axis=0)[labels, jnp.arange(len(x))]

    @jax.jit
    def scores(scale):
        guided = sj.classifier_guidance(mixture.score_fn(sde), log_likelihood, scale=scale)
        own = jnp.where(labels[:, None] == 0, *(p.score_fn(sde)(x, t) for p in parts))
        return guided(x, t), mixture.score_fn(sde)(x, t), own

    for scale in (1.0, 3.0):
        guided, whole, own = scores(scale)
        np.testing.assert_allclose(guided, (1 - scale) * whole + scale * own, **TOLERANCE)


def test_scale_0_is_unconditional_and_scale_1_conditional(mixture, points):
    sde = sj.VP()
    conditional, unconditional = component(mixture, 0).score_fn(sde), mixture.score_fn(sde)

    def guided(scale):
        return sj.classifier_free_guidance(conditional, unconditional, scale=scale)(*points)

    np.testing.assert_array_equal(guided(1.0), conditional(*points))
    np.testing.assert_allclose(guided(0.0), unconditional(*points), **TOLERANCE)
    np.testing.assert_array_equal(guided(2.5), sj.autoguidance(conditional, unconditional, scale=2.5)(*points))


def test_guided_gaussians_of_equal_variance_have_a_mean_further_out(points):
    """N(m, v)^w N(n, v)^(1 - w) is N(w m + (1 - w) n, v), at every noise level."""
    sde = sj.VP()
    m, n, w = np.array([1.0, 0.5]), np.array([0.2, -0.3]), 3.0
    conditional, unconditional = (gaussian(mean, 0.4).score_fn(sde) for mean in (m, n))
    guided = sj.classifier_free_guidance(conditional, unconditional, scale=w)
    np.testing.assert_allclose(guided(*points), gaussian(w * m + (1 - w) * n, 0.4).score_fn(sde)(*points), **TOLERANCE)


def test_guided_samples_have_the_law():
    """20,000 samples towards N(m, 0.4), m = (1, 0.5), away from N(n, 0.4), n = (0.2, -0.3): N(w m + (1 - w) n, 0.4).

    At scale w = 1 that is the conditional law.  Bounds: 4.5 standard errors (10 comparisons, false alarms below 1e-4)
    plus 0.005 for the discretisation.
    """
    sde, m, n = sj.VP(), np.array([1.0, 0.5], np.float32), np.array([0.2, -0.3], np.float32)

    @jax.jit
    def draw(key, scale):
        score_fn = sj.classifier_free_guidance(
            *(gaussian(mean, 0.4).score_fn(sde) for mean in (m, n)), scale=scale, interval=(0.0, 1.0)
        )
        key_start, key = jax.random.split(key)
        x = gaussian(scale * m + (1 - scale) * n, 0.4).marginal(sde, sde.t_max).sample(key_start, N)
        return sj.sample(key, sj.heun(sde, score_fn), x, timesteps.karras(sde, 50))

    for scale, expected in ((1.0, m), (3.0, [2.6, 2.1])):
        x = draw(jax.random.key(0), scale)
        np.testing.assert_allclose(x.mean(0), expected, atol=4.5 * np.sqrt(0.4 / N) + 0.005)
        np.testing.assert_allclose(jnp.cov(x.T), 0.4 * np.eye(2), atol=4.5 * 0.4 * np.sqrt(2 / N) + 0.005)


def test_guidance_acts_within_its_interval_only(mixture):
    """At single times and at one time an example; outside, the unconditional score is not even evaluated."""
    sde = sj.EDM()
    conditional, unconditional = component(mixture, 0).score_fn(sde), mixture.score_fn(sde)
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return unconditional(x, t)

    everywhere = sj.classifier_free_guidance(conditional, unconditional, scale=2.0)
    within = jax.jit(sj.classifier_free_guidance(conditional, counted, scale=2.0, interval=(0.5, 2.0)))
    x = jax.random.normal(jax.random.key(0), (5, 2))
    t = jnp.array([0.49, 0.5, 1.0, 2.0, 2.01])
    expected = jnp.where(jnp.array([0, 1, 1, 1, 0], bool)[:, None], everywhere(x, t), conditional(x, t))
    np.testing.assert_allclose(within(x, t), expected, rtol=1e-5)
    for i, time in enumerate(t):
        jax.effects_barrier()
        calls.clear()
        np.testing.assert_allclose(within(x, time)[i], expected[i], rtol=1e-5)
        jax.effects_barrier()
        assert bool(calls) == (i in (1, 2, 3))


def test_interval_of_a_noise_level_on_another_process():
    """What the docstring says: EDM's level sigma is, on VP, the time at which sigma/alpha is that."""
    sde = sj.VP()
    t = timesteps.time_of_log_snr(sde, -2 * jnp.log(1.6))
    np.testing.assert_allclose(sde.sigma(t) / sde.alpha(t), 1.6, rtol=1e-3)


def test_thresholding_leaves_posterior_means_in_range_alone(any_sde):
    score_fn = gaussian([0.3, -0.5], 1e-4).score_fn(any_sde)
    x = jax.random.normal(jax.random.key(0), (32, 2))
    for t in (any_sde.t_min, 0.5 * any_sde.t_max):
        x_t = sj.perturb(any_sde, 0.01 * x + jnp.array([[0.3, -0.5]]), x, t)
        thresholded = sj.dynamic_thresholding(any_sde, score_fn)(x_t, t)
        np.testing.assert_array_equal(thresholded, score_fn(x_t, t))


def test_thresholding_clips_to_the_percentile_of_each_example_and_rescales(sde):
    """Two images of 100 pixels, both of posterior mean 0.02 i, i = 1 ... 100, the second doubled; and one in range.

    By linear interpolation the 90th percentile is 0.02 * 90.1 = 1.802, and twice that.
    """
    mean = jnp.stack([ramp := 0.02 * jnp.arange(1.0, 101.0), -2 * ramp, 0.4 * ramp]).reshape(3, 10, 10, 1)
    score_fn = sj.from_denoiser(sde, lambda x, t: mean)
    thresholded = sj.dynamic_thresholding(sde, score_fn, percentile=90.0)
    x, t = jax.random.normal(jax.random.key(0), mean.shape), jnp.full(3, 0.3)
    expected = np.asarray(mean).copy()
    expected[0] = np.minimum(expected[0] / 1.802, 1)
    expected[1] = np.maximum(expected[1] / 3.604, -1)
    np.testing.assert_allclose(sj.tweedie(sde, thresholded, x, t), expected, atol=1e-4)


def test_product_of_gaussians_is_a_gaussian_at_time_0_only():
    """Precisions add: the product of N(1, 0.5) and N(-1, 0.25) is N(-1/3, 1/6).

    At t > 0 the product of the noised ones has the precision sum 1/(alpha^2 v_i + sigma^2), as the docstring says,
    and the noised product another.
    """
    sde = sj.VP()
    first, second = gaussian([1.0, 1.0], 0.5), gaussian([-1.0, -1.0], 0.25)
    score_fn = sj.product_of_densities([first.score_fn(sde), second.score_fn(sde)])
    product = gaussian([-1 / 3, -1 / 3], 1 / 6)
    x = jax.random.normal(jax.random.key(0), (16, 2))
    np.testing.assert_allclose(score_fn(x, jnp.array(sde.t_min)), product.score(x), rtol=1e-3, atol=1e-3)
    t = jnp.array(0.3)
    a, variances = sde.alpha(t), [sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2 for v in (0.5, 0.25)]
    np.testing.assert_allclose(score_fn(x, t), -(x - a) / variances[0] - (x + a) / variances[1], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(score_fn(x, t) - product.score_fn(sde)(x, t)).max()) > 0.5


def test_powers_of_a_product(points):
    """p^2 / p is p; and guidance is a product of powers w and 1 - w."""
    sde = sj.VP()
    score_fn, other = gaussian([1.0, 0.0], 0.3).score_fn(sde), gaussian([0.0, 1.0], 0.6).score_fn(sde)
    powers = sj.product_of_densities([score_fn, score_fn], weights=[2.0, -1.0])
    np.testing.assert_allclose(powers(*points), score_fn(*points), **TOLERANCE)
    product = sj.product_of_densities([score_fn, other], weights=[3.0, -2.0])
    guided = sj.classifier_free_guidance(score_fn, other, scale=3.0)
    np.testing.assert_allclose(product(*points), guided(*points), **TOLERANCE)


def test_mixture_of_densities_is_exact_at_every_time(mixture, points):
    """The mixture's components, put together again; weights need not sum to one."""
    sde = sj.VP()
    parts = [component(mixture, k) for k in (0, 1)]
    score_fn = sj.mixture_of_densities(
        [p.score_fn(sde) for p in parts], [log_density(p, sde) for p in parts], weights=[7.0, 3.0]
    )
    np.testing.assert_allclose(jax.jit(score_fn)(*points), mixture.score_fn(sde)(*points), **TOLERANCE)
    equal = sj.mixture_of_densities([p.score_fn(sde) for p in parts], [log_density(p, sde) for p in parts])
    even = dataclasses.replace(mixture, weights=jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(jax.jit(equal)(*points), even.score_fn(sde)(*points), **TOLERANCE)


def test_cross_entropy_of_the_exact_classifier_is_the_conditional_entropy():
    """Labels -1 and 1 are the data: p(y | x) = 1/(1 + exp(-2 y alpha x / sigma^2)); by quadrature over x given y = 1.

    100,000 draws, 4.5 standard errors: false alarms below 1e-5.
    """
    sde, t, n = sj.VP(), jnp.array(0.3), 100_000
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    y = jnp.where(jnp.arange(n) % 2, 1.0, -1.0)

    def log_likelihood(x, t):
        return jax.nn.log_sigmoid(2 * y * sde.alpha(t) * x[:, 0] / sde.sigma(t) ** 2)

    loss = np.asarray(sj.cross_entropy(jax.random.key(0), sde, log_likelihood, y[:, None], t))
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    entropy = np.log1p(np.exp(-2 * alpha * (alpha + sigma * nodes) / sigma**2)) @ weights / weights.sum()
    assert loss.shape == (n,)
    assert abs(loss.mean() - entropy) < 4.5 * loss.std() / np.sqrt(n)
    assert entropy > 20 * loss.std() / np.sqrt(n)


def test_guided_scores_of_images_compile_once():
    """Closed forms with a traced scale: towards 1 and away from 0 inside the interval, and towards small |x|^2."""
    traces = []

    @jax.jit
    def score(x, t, scale):
        traces.append(1)
        guided = sj.classifier_free_guidance(lambda x, t: 1 - x, lambda x, t: -x, scale=scale, interval=(0.2, 0.8))
        return sj.classifier_guidance(guided, lambda x, t: -jnp.sum(x**2, axis=(1, 2, 3)) / 2, scale=scale)(x, t)

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    for t, scale, mean in ((0.5, 2.0, 2.0), (0.9, 3.0, 1.0)):
        np.testing.assert_allclose(score(x, jnp.array(t), scale), mean - x - scale * x, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_bad_input(mixture):
    score_fn = mixture.score_fn(sj.VP())
    with pytest.raises(ValueError, match="t_low < t_high"):
        sj.classifier_free_guidance(score_fn, score_fn, scale=2.0, interval=(0.5, 0.1))
    with pytest.raises(ValueError, match="one number an example"):
        sj.classifier_guidance(score_fn, lambda x, t: x)(jnp.ones((3, 2)), jnp.array(0.5))
    with pytest.raises(ValueError, match="above 0 and at most 100"):
        sj.dynamic_thresholding(sj.VP(), score_fn, percentile=0.0)
    with pytest.raises(ValueError, match="one weight each, got 1 for 2"):
        sj.product_of_densities([score_fn, score_fn], weights=[1.0])
    with pytest.raises(ValueError, match="one weight each, got 0 for 0"):
        sj.product_of_densities([])
    with pytest.raises(ValueError, match="one log density a score, got 1 for 2"):
        sj.mixture_of_densities([score_fn, score_fn], [log_density(mixture, sj.VP())])
