"""Log densities against mixtures' own, estimates against their standard errors, bits against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import score_jax as sj
from score_jax import data, evaluate, timesteps


def random_mixture(d):
    """Three Gaussians with correlated covariances of eigenvalues from 0.01 to about 0.4."""
    rng = np.random.default_rng(d)
    roots = 0.3 * rng.standard_normal((3, d, d)) / np.sqrt(d)
    covariances = np.einsum("kde,kfe->kdf", roots, roots) + 0.01 * np.eye(d)
    means = rng.standard_normal((3, d))
    return sj.GaussianMixture(*(jnp.asarray(a, jnp.float32) for a in ([0.5, 0.3, 0.2], means, covariances)))


def draw(mixture, n):
    """Points `[n, d]` of a mixture, by numpy, which compiles nothing."""
    rng = np.random.default_rng(0)
    component = rng.choice(len(mixture.weights), n, p=np.asarray(mixture.weights, float) / np.sum(mixture.weights))
    roots = np.linalg.cholesky(mixture.covariances)[component]
    z = rng.standard_normal((n, mixture.means.shape[1]))
    return jnp.asarray(np.asarray(mixture.means)[component] + np.einsum("nde,ne->nd", roots, z), jnp.float32)


def prior_mismatch(sde, mixture, z):
    """What the nominal prior gives more than the law at t_max."""
    return sj.prior_log_prob(sde, z) - mixture.marginal(sde, sde.t_max).log_prob(z)


@pytest.mark.parametrize("d", [2, 8])
def test_exact_log_prob_is_the_density_at_t_min(sde, d):
    """To 1e-3 nats, once the difference between the nominal prior and the law at t_max is allowed for."""
    mixture = random_mixture(d)
    x = draw(mixture, 50)
    options = dict(divergence="exact", rtol=1e-6, atol=1e-6)
    result = sj.log_prob(jax.random.key(1), sde, mixture.score_fn(sde), x, **options)
    log_prob = result.log_prob - prior_mismatch(sde, mixture, result.latent)
    np.testing.assert_allclose(log_prob, mixture.marginal(sde, sde.t_min).log_prob(x), atol=1e-3)
    np.testing.assert_array_equal(result.standard_error, 0)
    assert result.num_evaluations > 20


def test_hutchinson_is_unbiased_and_its_errors_cover():
    """One point in 8 dimensions with 1,000 sets of 8 probes.

    The mean within 4.5 standard errors (false alarms 7e-6); 95 % intervals of Student's t cover in 93 to 97 %
    (expected 95 with a standard deviation of 0.7).
    """
    sde, mixture = sj.VP(), random_mixture(8)
    x = jnp.broadcast_to(draw(mixture, 1), (1000, 8))
    score_fn = mixture.score_fn(sde)
    result = sj.log_prob(jax.random.key(1), sde, score_fn, x, num_probes=8, rtol=1e-4, atol=1e-4)
    exact = mixture.marginal(sde, sde.t_min).log_prob(x[:1]) + prior_mismatch(sde, mixture, result.latent[:1])
    error = result.log_prob - exact
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / np.sqrt(1000)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(result.standard_error**2)), error.std(), rtol=0.1)
    covered = np.mean(np.abs(error) < stats.t.ppf(0.975, 7) * result.standard_error)
    assert 0.93 <= covered <= 0.97, covered


def test_standard_normal_images_bits_per_dimension_and_one_trace():
    """Nothing moves, and a multiple of the unit matrix has no variance; single estimates have no standard error."""
    sde, traces = sj.VP(), []

    def score_fn(x, t):
        traces.append(1)
        return -x

    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    x = (images + 0.5) / 128 - 1
    result = sj.log_prob(jax.random.key(1), sde, score_fn, x, probe="sphere")
    first = len(traces)
    density = stats.norm.logpdf(x).sum((1, 2, 3))
    np.testing.assert_allclose(result.latent, x, atol=1e-5)
    np.testing.assert_allclose(result.log_prob, density, atol=1e-3)
    assert jnp.isnan(result.standard_error).all()
    bits = sj.bits_per_dim(jax.random.key(2), sde, score_fn, images, centered=True, dequantized=True)
    np.testing.assert_allclose(bits.bits_per_dim, -(density / 16 + np.log(2 / 256)) / np.log(2), atol=2e-3)
    assert jnp.isnan(bits.standard_error).all()
    assert len(traces) == first


POINTS, REPEATS, DRAWS = 4, 250, 100


def test_elbo_of_the_exact_score_is_the_density_but_for_the_ends(sde):
    """4 points, 250 estimates of 100 draws each: means within 4.5 standard errors (false alarms 8e-5 in all), and
    the errors claimed are those made, within 12 % (2.2 % expected).

    The ends (Eq. 4 of the module) by 10,000 draws of far less variance.
    """
    mixture = random_mixture(2)
    points = draw(mixture, POINTS)
    x = jnp.repeat(points, REPEATS, axis=0)
    estimate = jax.jit(lambda key: sj.elbo(key, sde, mixture.score_fn(sde), x, num_draws=DRAWS))
    bound, error = (part.reshape(POINTS, REPEATS) for part in estimate(jax.random.key(1)))
    noise = np.random.default_rng(1).standard_normal((10_000, POINTS, 2), np.float32)
    low, high = (sde.alpha(t) * points[None] + sde.sigma(t) * noise for t in (sde.t_min, sde.t_max))
    start = mixture.marginal(sde, sde.t_min).log_prob(low)
    end = prior_mismatch(sde, mixture, high.reshape(-1, 2)).reshape(start.shape)
    exact = jnp.mean(start + end, axis=0) + 2 * jnp.log(sde.alpha(sde.t_min))
    assert np.all(np.abs(bound.mean(1) - exact) < 4.5 * bound.std(1) / np.sqrt(REPEATS)), (bound.mean(1), exact)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(error))), np.sqrt(np.mean(bound.var(1))), rtol=0.12)


@pytest.mark.parametrize(
    "sde", [sj.VP(), sj.DDPM(), sj.VE(sigma_min=0.01, sigma_max=20.0)], ids=lambda s: type(s).__name__
)
def test_elbo_of_a_chain_of_standard_normal_data(sde):
    """20,000 points of four dimensions; 4.5 standard errors, 2e-5 false alarms.

    The residual  alpha (alpha eps - sigma x_0) / (alpha^2 + sigma^2)  has mean square  d alpha^2 / (alpha^2 + sigma^2).
    """
    n, size = 20_000, 4
    ts = timesteps.log_snr(sde, 200)
    x = jax.random.normal(jax.random.key(0), (n, size))

    def score_fn(x, t):
        return -x / (sde.alpha(t) ** 2 + sde.sigma(t) ** 2)

    bound = np.asarray(jax.jit(lambda key: sj.chain_elbo(key, sde, score_fn, x, ts))(jax.random.key(1)), np.float64)
    snr = np.exp(np.asarray(sde.log_snr(ts), np.float64))
    # exp(l_s - l_t) - 1 times the residual's mean square is (snr_s - snr_t) / (1 + snr_t) a dimension.
    loss = 0.5 * size * np.sum((snr[1:] - snr[:-1]) / (1 + snr[:-1]))
    ends = -0.5 * size * (snr[0] + 1 + np.log(2 * np.pi) - np.log(snr[-1]))
    assert abs(bound.mean() - (ends - loss)) < 4.5 * bound.std() / np.sqrt(n)
    # It bounds the negative entropy, and 200 steps cost something.
    entropy = -0.5 * size * np.log(2 * np.pi * np.e)
    assert 0.01 < entropy - bound.mean() < 2


def test_a_wrong_score_costs_half_its_squared_error():
    """A score off by c/sigma lowers the mean bound by c^2 d/2 a unit of the log signal-to-noise ratio (Theorem 1).

    5,000 points, the same noise in both: 4.5 standard errors of the difference, 7e-6 false alarms.
    """
    sde, mixture, c = sj.VP(), random_mixture(2), 0.2
    x = draw(mixture, 5000)
    score_fn = mixture.score_fn(sde)

    def wrong(x, t):
        return score_fn(x, t) + c / sde.sigma(t)[:, None]

    def bound(fn):
        return sj.elbo(jax.random.key(1), sde, fn, x, num_draws=4)[0]

    loss = jax.jit(lambda: bound(score_fn) - bound(wrong))()
    expected = 0.5 * c**2 * 2 * (sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max))
    assert abs(float(loss.mean() - expected)) < 4.5 * float(loss.std()) / np.sqrt(len(x))
    assert float(loss.std()) / np.sqrt(len(x)) < 0.05 * expected


def gaussian_score(mean, std, x, t):
    """Pixels N(mean, std^2) under VP."""
    sde = sj.VP()
    alpha, sigma = sj.expand(sde.alpha(t), x), sj.expand(sde.sigma(t), x)
    return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dequantized", [False, True])
def test_probabilities_of_all_levels_sum_to_one_around_the_right_level(centered, dequantized):
    """All 256 images of one pixel, under a density whose mean is level 76 as training saw it (8 % wide in [0, 1]).

    Jensen's inequality costs 1/24 of the squared ratio of cell and width, 1e-4; a cell misplaced by half a level
    moves the mean by 0.5, and the noise of 16 repeats by 0.02.
    """
    mean = (76 + 0.5) / 256 if dequantized else 76 / 255
    mean, std = (2 * mean - 1, 0.16) if centered else (mean, 0.08)
    score_fn = jax.tree_util.Partial(gaussian_score, jnp.full((256, 1, 1, 1), mean), jnp.array(std))
    images = jnp.arange(256, dtype=jnp.uint8).reshape(256, 1, 1, 1)
    options = dict(centered=centered, dequantized=dequantized, num_repeats=16)
    result = sj.bits_per_dim(jax.random.key(0), sj.VP(), score_fn, images, **options)
    probability = 2.0**-result.bits_per_dim
    assert abs(float(probability.sum()) - 1) < 0.01
    assert abs(float(probability @ jnp.arange(256.0) / probability.sum()) - 76) < 0.1
    # The noise's part of log2 p is the slope's: (x - mean) / std^2 times a cell's standard deviation.
    cell = (2 if centered else 1) / (256 if dequantized else 255)
    x = cell * (jnp.arange(256.0) + (0.5 if dequantized else 0.0)) - (1 if centered else 0)
    expected = jnp.abs(x - mean) / std**2 * cell / np.sqrt(12 * 16) / np.log(2)
    far = np.asarray(jnp.abs(x - mean)) > 2 * std
    ratio = (result.standard_error / expected)[far]
    assert abs(float(ratio.mean()) - 1) < 0.1


def test_a_data_set_counts_each_image_once_under_its_own_label():
    """300 one-pixel images in batches of 256, against closed forms: the noise moves the mean by 0.003."""
    rng, means = np.random.default_rng(0), np.array([0.3, 0.7], np.float32)
    y = rng.integers(0, 2, 300)
    x = np.clip(np.round(255 * (means[y] + 0.08 * rng.standard_normal(300))), 0, 255).astype(np.uint8)
    dataset = data.Dataset(300, (1, 1, 1), lambda indices: (x[indices].reshape(-1, 1, 1, 1), y[indices]))

    def make_score_fn(labels):
        return jax.tree_util.Partial(gaussian_score, jnp.asarray(means)[labels].reshape(-1, 1, 1, 1), jnp.array(0.08))

    options = dict(centered=False, dequantized=False, divergence="hutchinson", num_probes=1, num_repeats=1)
    options |= dict(rtol=1e-5, atol=1e-5, solver="tsit5")
    key = jax.random.key(0)
    table = evaluate.likelihood(key, sj.VP(), make_score_fn, dataset, num_images=1000, batch_size=256, **options)
    exact = -np.log2(stats.norm(means[y], 0.08).pdf(x / 255) / 255)
    assert abs(table["bits_per_dim"] - exact.mean()) < 0.015
    np.testing.assert_allclose(table["standard_error"], exact.std(ddof=1) / np.sqrt(300), rtol=0.02)
    assert table["num_images"] == 300


def test_a_fitted_dequantizer_makes_the_bound_tighter():
    """One pixel, of either class N(mean, std^2) with std 0.2 of a cell: the exact bits from the cells' probabilities.

    Uniform noise misses the narrow densities, 0.2 of a cell below level 50 and above level 200, by more than a bit;
    noise that knows the image by less than a third of that.  Neither is below the truth.
    """
    sde, std, means = sj.VP(t_min=1e-7), 0.2 / 255, np.array([49.8, 200.2], np.float32) / 255
    y = np.arange(2000) % 2
    levels = np.array([50, 200], np.uint8)[y]
    dataset = data.Dataset(2000, (1, 1, 1), lambda indices: (levels[indices].reshape(-1, 1, 1, 1), y[indices]))
    cell = stats.norm(means[y], std).cdf
    exact = -np.log2(cell((levels + 0.5) / 255.0) - cell((levels - 0.5) / 255.0))

    def make_score_fn(y):
        return jax.tree_util.Partial(gaussian_score, jnp.asarray(means)[y].reshape(-1, 1, 1, 1), jnp.array(std))

    options = dict(centered=False, dequantized=False)
    fitted = evaluate.fit_dequantizer(
        jax.random.key(0), sde, make_score_fn, dataset, num_steps=300, batch_size=200, **options
    )
    gaps = []
    for dequantizer in (None, fitted):
        arguments = jax.random.key(1), sde, make_score_fn(y), jnp.asarray(levels.reshape(-1, 1, 1, 1))
        excess = sj.bits_per_dim(*arguments, dequantizer=dequantizer, **options).bits_per_dim - exact
        gaps.append(float(excess.mean()))
    assert gaps[0] > 1, gaps
    assert 0 < gaps[1] < gaps[0] / 3, gaps


def test_bad_input():
    key, sde, x = jax.random.key(0), sj.VP(), jnp.ones((2, 3))

    def score_fn(x, t):
        return -x

    with pytest.raises(ValueError, match="unknown divergence 'hutch': choose 'hutchinson' or 'exact'"):
        sj.log_prob(key, sde, score_fn, x, divergence="hutch")
    with pytest.raises(ValueError, match="unknown probe 'uniform'"):
        sj.log_prob(key, sde, score_fn, x, probe="uniform")
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        sj.log_prob(key, sde, score_fn, x, num_probes=0)
    with pytest.raises(ValueError, match="rtol must be positive"):
        sj.log_prob(key, sde, score_fn, x, rtol=-1e-5)
    with pytest.raises(ValueError, match="of uint8 images, but these are float32"):
        sj.bits_per_dim(key, sde, score_fn, x, centered=True, dequantized=False)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        sj.elbo(key, sde, score_fn, x, num_draws=0)
