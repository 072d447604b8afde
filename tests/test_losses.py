"""Denoising score matching against the Fisher divergence it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj

N = 40_000


@pytest.mark.parametrize("weight", [sj.variance_weighting, sj.likelihood_weighting])
def test_excess_loss_is_the_fisher_divergence(sde, mixture, weight):
    """L(s) - L(score) = w/2 E |s - score|^2 (Vincent 2011): 40,000 draws, 4 standard errors, false alarms 1e-4.

    The same key gives both losses the same noise, which takes most of the variance away.
    """
    t = jnp.array(0.3)
    x0 = mixture.sample(jax.random.key(0), N)
    exact = mixture.score_fn(sde)
    shift = 0.3 / sde.sigma(t)

    def wrong(x, t):
        return 1.2 * exact(x, t) + shift

    def loss(score_fn):
        return sj.denoising_score_matching(jax.random.key(1), sde, score_fn, x0, t, weight=weight)

    excess = loss(wrong) - loss(exact)
    x_t = mixture.marginal(sde, t).sample(jax.random.key(2), N)
    fisher = 0.5 * weight(sde, t) * jnp.sum((wrong(x_t, t) - exact(x_t, t)) ** 2, axis=1)
    error = jnp.sqrt(excess.var() / N + fisher.var() / N)
    assert abs(excess.mean() - fisher.mean()) < 4 * error
    assert excess.mean() > 20 * error  # The test has the power to see a wrong sign or factor.


def test_variance_weighting_is_the_regression_of_noise():
    """With a zero score the loss is |eps|^2 / 2, d/2 in the mean: 4 standard errors of 40,000 draws."""
    x0 = jnp.zeros((N, 2, 3))
    loss = sj.denoising_score_matching(jax.random.key(0), sj.VP(), lambda x, t: jnp.zeros_like(x), x0, jnp.full(N, 0.2))
    assert loss.shape == (N,)
    assert abs(float(loss.mean()) - 3) < 4 * np.sqrt(3 / N)


def test_edm_weighting_is_that_of_the_posterior_mean(any_sde):
    """lambda/2 |D - x_0|^2 with D = 0.3 x_t, example by example."""
    sde, key, t, x0 = any_sde, jax.random.key(0), jnp.array([0.1, 0.5, 0.9]), jnp.arange(6.0).reshape(3, 2)
    score_fn = sj.from_denoiser(sde, lambda x, t: 0.3 * x)

    def weight(sde, t):
        return sj.edm_weighting(sde, t, sigma_data=0.7)

    loss = sj.denoising_score_matching(key, sde, score_fn, x0, t, weight=weight)
    s = sde.sigma(t) / sde.alpha(t)
    d = 0.3 * sj.perturb(sde, x0, jax.random.normal(key, x0.shape), t)
    exact = (s**2 + 0.49) / (0.7 * s) ** 2 * jnp.sum((d - x0) ** 2, axis=1) / 2
    np.testing.assert_allclose(loss, exact, rtol=2e-3)


def test_edm_begins_with_the_same_loss_at_every_level():
    """A network that is zero: |D - x_0|^2 is c_out^2 a dimension, and the loss, of 2 dimensions, 1 with variance 1.

    40,000 draws at each of 4 levels: 4.5 standard errors, false alarms below 1e-4.
    """
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (N, 2))
    score_fn = sj.preconditioned(sj.EDM(), lambda x, cond: jnp.zeros_like(x))
    for t in (0.01, 0.3, 2.0, 80.0):
        loss = sj.denoising_score_matching(jax.random.key(1), sj.EDM(), score_fn, x0, t, weight=sj.edm_weighting)
        assert abs(loss.mean() - 1) < 4.5 / np.sqrt(N)


def test_likelihood_weighting_is_g_squared(sde):
    x0, t = jnp.ones((4, 2)), jnp.full(4, 0.5)
    losses = [
        sj.denoising_score_matching(jax.random.key(0), sde, lambda x, t: -x, x0, t, weight=w)
        for w in (sj.variance_weighting, sj.likelihood_weighting)
    ]
    np.testing.assert_allclose(losses[1] / losses[0], (sde.diffusion(t) / sde.sigma(t)) ** 2, rtol=1e-5)


# --- the family of score matching: every objective has the gradient of the Fisher divergence ---

SIGMA = 0.5
SIGMAS = jnp.array([1.0, 0.5, 0.25])


def model(params):
    """A mixture whose weights, means and scale of the covariances are off."""
    logits, means, log_scale = params
    covariances = jnp.exp(log_scale) * jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]])
    return sj.GaussianMixture(jax.nn.softmax(logits), means, covariances)


PARAMS = (jnp.array([0.3, 0.0]), jnp.array([[1.2, 0.6], [-1.3, -1.2]]), jnp.array(0.3))
NOISE = sj.VE(sigma_min=0.01, sigma_max=100.0)  # Only its marginals: alpha is one.


def at_level(params, sigma):
    """The model's score after noise of standard deviation sigma is added."""
    t = sj.timesteps.time_of_log_snr(NOISE, -2 * jnp.log(sigma))
    return lambda x: model(params).score_fn(NOISE)(x, t)


def conditional(params):
    return lambda x, sigma: at_level(params, sigma)(x)


SDE = sj.VP()
TIME = jnp.array(0.2)


def gradients(loss, keys, x):
    """Per-example gradients, `[n, number of parameters]`, of `loss(key, params, x [1, 2]) -> [1]`."""

    @jax.jit
    def each(keys, x):
        grad = jax.vmap(jax.grad(lambda p, k, row: loss(k, p, row[None])[0]), (None, 0, 0))(PARAMS, keys, x)
        return jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(grad)], axis=1)

    return np.asarray(each(keys, x))


def fisher(model_score, true_score, weight=1.0):
    return lambda key, params, x: 0.5 * weight * jnp.sum((model_score(params, x) - true_score(x)) ** 2, axis=1)


OBJECTIVES = {
    "exact": lambda k, p, x: sj.exact_score_matching(model(p).score, x),
    "sliced": lambda k, p, x: sj.sliced_score_matching(k, model(p).score, x, variance_reduced=False),
    "sliced_gaussian": lambda k, p, x: sj.sliced_score_matching(
        k, model(p).score, x, variance_reduced=False, projection="gaussian"
    ),
    "sliced_sphere": lambda k, p, x: sj.sliced_score_matching(k, model(p).score, x, projection="sphere"),
    "sliced_two": lambda k, p, x: sj.sliced_score_matching(k, model(p).score, x, num_projections=2),
    "finite_difference": lambda k, p, x: sj.finite_difference_score_matching(k, model(p).score, x),
    "vincent": lambda k, p, x: sj.vincent_score_matching(k, at_level(p, SIGMA), x, sigma=SIGMA),
    "ncsn": lambda k, p, x: sj.ncsn_score_matching(k, conditional(p), x, SIGMAS),
    "denoising": lambda k, p, x: sj.denoising_score_matching(k, SDE, model(p).score_fn(SDE), x, TIME),
    "perturbed_sliced": lambda k, p, x: sj.perturbed_sliced_score_matching(k, SDE, model(p).score_fn(SDE), x, TIME),
}


def explicit(name, mixture):
    """The Fisher divergence that an objective stands for, as a loss at points of the law it speaks of."""
    if name in ("denoising", "perturbed_sliced"):
        true = mixture.score_fn(SDE)
        return fisher(lambda p, x: model(p).score_fn(SDE)(x, TIME), lambda x: true(x, TIME), SDE.sigma(TIME) ** 2)
    if name == "vincent":
        true = mixture.score_fn(NOISE)
        t = sj.timesteps.time_of_log_snr(NOISE, -2 * jnp.log(SIGMA))
        return fisher(lambda p, x: at_level(p, SIGMA)(x), lambda x: true(x, t))
    if name == "ncsn":

        def loss(key, params, x):
            parts = []
            for sigma in SIGMAS:  # x arrives with unit noise in the last two columns.
                t = sj.timesteps.time_of_log_snr(NOISE, -2 * jnp.log(sigma))
                noisy = x[:, :2] + sigma * x[:, 2:]
                off = at_level(params, sigma)(noisy) - mixture.score_fn(NOISE)(noisy, t)
                parts.append(0.5 * sigma**2 * jnp.sum(off**2, axis=1))
            return sum(parts) / len(parts)

        return loss
    return fisher(lambda p, x: model(p).score(x), mixture.score)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mean_gradient_is_that_of_the_fisher_divergence(mixture, name):
    """20,000 examples, every parameter within 3 standard errors: 7 parameters, false alarms 2 % (keys are fixed)."""
    n = 20_000
    keys = jax.random.split(jax.random.key(1), n)
    x = mixture.sample(jax.random.key(3), n)
    got = gradients(OBJECTIVES[name], keys, x)
    points = x
    if name in ("denoising", "perturbed_sliced"):
        points = mixture.marginal(SDE, TIME).sample(jax.random.key(4), n)
    if name == "vincent":
        points = x + SIGMA * jax.random.normal(jax.random.key(4), x.shape)
    if name == "ncsn":
        points = jnp.concatenate([x, jax.random.normal(jax.random.key(4), x.shape)], axis=1)
    wanted = gradients(explicit(name, mixture), keys, points)
    paired = points is x  # At the same points the difference has the smaller error.
    variance = (got - wanted).var(axis=0) if paired else got.var(axis=0) + wanted.var(axis=0)
    error = np.sqrt(variance / n)
    assert np.all(np.abs(got.mean(axis=0) - wanted.mean(axis=0)) < 3 * error)
    assert np.abs(wanted.mean(axis=0) / error).max() > 10  # Power: a wrong sign or factor would be seen.


def test_variance_reduction_reduces_the_variance(mixture):
    """Of the gradient, summed over parameters: the ratio is above 1 with Gaussian projections, 20,000 examples."""
    keys, x = jax.random.split(jax.random.key(1), 20_000), mixture.sample(jax.random.key(2), 20_000)

    def spread(variance_reduced):
        def loss(k, p, x):
            return sj.sliced_score_matching(
                k, model(p).score, x, variance_reduced=variance_reduced, projection="gaussian"
            )

        return gradients(loss, keys, x).var(axis=0).sum()

    assert spread(False) / spread(True) > 1.2


def test_the_cost_of_a_projection_does_not_grow_with_the_dimension():
    """At 1,024 dimensions one projection takes at most 3 times the arithmetic of the forward pass."""
    d = 1024
    weights = [jnp.ones((d, 256)) / 256, jnp.ones((256, d)) / 256]

    def fn(x):
        return jnp.tanh(x @ weights[0]) @ weights[1]

    x = jnp.ones((4, d))

    def flops(f):
        return jax.jit(f).lower(x).compile().cost_analysis()["flops"]

    key = jax.random.key(0)
    assert flops(lambda x: sj.sliced_score_matching(key, fn, x)) < 3 * flops(fn)
    assert flops(lambda x: sj.finite_difference_score_matching(key, fn, x)) < 3 * flops(fn)


# --- unnormalised models of statistics, written as energies ---


def minimise(loss, params, *, num_steps, learning_rate):
    """Adam, full batch."""
    import optax

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optimizer.init(params)), None, num_steps)[0][0]

    return run(params)


def test_gaussian_precision_is_the_inverse_sample_covariance():
    """Hyvarinen 2005, Section 3.1: the minimiser is the sample covariance's inverse, in closed form, exactly."""
    x = jax.random.normal(jax.random.key(0), (500, 3)) @ jnp.array([[1.0, 0.4, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 0.6]])

    def loss(params):
        mean, precision = params

        def energy(x):
            centred = x - mean[None]
            return 0.5 * jnp.einsum("nd,de,ne->n", centred, precision, centred)

        return sj.exact_score_matching(sj.from_energy(energy), x).mean()

    mean, precision = minimise(loss, (jnp.zeros(3), jnp.eye(3)), num_steps=3000, learning_rate=0.05)
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=2e-3)
    symmetric = 0.5 * (precision + precision.T)
    np.testing.assert_allclose(symmetric, np.linalg.inv(np.cov(np.asarray(x).T, bias=True)), rtol=2e-2, atol=2e-2)


def test_independent_component_analysis():
    """Hyvarinen 2005, Section 3.2: logistic sources, a mixing matrix, recovered up to order and sign.

    An energy that is a sum over factors is a product of experts.  4,000 points.
    """
    mixing = jnp.array([[1.0, 0.6], [-0.4, 0.9]])
    x = jax.random.logistic(jax.random.key(0), (4000, 2)) @ mixing.T

    def loss(unmixing):
        return sj.exact_score_matching(
            sj.from_energy(lambda x: jnp.sum(2 * jnp.log(jnp.cosh(0.5 * x @ unmixing.T)), axis=1)), x
        ).mean()

    unmixing = minimise(loss, jnp.eye(2), num_steps=800, learning_rate=0.02)
    product = np.abs(np.asarray(unmixing @ mixing))
    np.testing.assert_allclose(product, np.eye(2)[np.argmax(product, axis=1)], atol=0.1)


TIMES = jnp.array([0.9, 0.5, 0.1])
DISTILLED = {
    "progressive": lambda k, fn, x: sj.progressive_distillation(k, SDE, fn, lambda x, t: -x, x, TIMES),
    "progressive's teacher": lambda k, fn, x: sj.progressive_distillation(k, SDE, lambda x, t: -x, fn, x, TIMES),
    "consistency": lambda k, fn, x: sj.consistency_training(k, SDE, fn, x, TIMES),
    "consistency's teacher": lambda k, fn, x: sj.consistency_distillation(k, SDE, lambda x, t: -x, fn, x, TIMES),
}
SCORE_LOSSES = {
    **{name: lambda k, fn, x, loss=loss: loss(k, lambda x, t: fn(x), x) for name, loss in DISTILLED.items()},
    "denoising": lambda k, fn, x: sj.denoising_score_matching(k, SDE, lambda x, t: fn(x), x, TIME),
    "perturbed": lambda k, fn, x: sj.perturbed_sliced_score_matching(k, SDE, lambda x, t: fn(x), x, TIME),
    "ncsn": lambda k, fn, x: sj.ncsn_score_matching(k, lambda x, sigma: fn(x), x, SIGMAS),
    "vincent": lambda k, fn, x: sj.vincent_score_matching(k, fn, x, sigma=SIGMA),
    "exact": lambda k, fn, x: sj.exact_score_matching(fn, x),
    "sliced": sj.sliced_score_matching,
    "finite_difference": sj.finite_difference_score_matching,
    "hutchinson": sj.hutchinson_divergence,
    "hutch_pp": sj.hutch_pp_divergence,
}


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_a_score_of_another_shape_is_an_error(name):
    """A network that returns `[n]`, `[1, 1]` or `[n, n]` for x `[n, 1]` would broadcast to a wrong loss."""
    for wrong in (lambda x: x[:, 0], lambda x: x[:1], lambda x: x * x[:, 0]):
        with (
            jax.numpy_rank_promotion("allow"),
            pytest.raises(ValueError, match=r"a score must have the shape of x, \(4, 1\), but has \("),
        ):
            SCORE_LOSSES[name](jax.random.key(0), wrong, jnp.ones((4, 1)))


def test_each_example_has_its_own_noise_level():
    """Vincent's loss of zero is |eps|^2 / (2 sigma^2), and of the score of N(0, sigma^2 I) at x = 0 it is zero."""
    x, sigma, key = jnp.zeros((4, 4)), jnp.arange(1.0, 5.0), jax.random.key(0)
    eps = jax.random.normal(key, x.shape)
    zero = sj.vincent_score_matching(key, jnp.zeros_like, x, sigma=sigma)
    np.testing.assert_allclose(zero, jnp.sum(eps**2, axis=1) / (2 * sigma**2), rtol=1e-5)
    exact = sj.vincent_score_matching(key, lambda x: -x / sigma[:, None] ** 2, x, sigma=sigma)
    np.testing.assert_allclose(exact, 0, atol=1e-5)


def test_bad_projections():
    key, x = jax.random.key(0), jnp.ones((2, 3))
    for loss in (sj.sliced_score_matching, sj.finite_difference_score_matching):
        with pytest.raises(ValueError, match="num_projections must be at least 1, got 0"):
            loss(key, lambda x: -x, x, num_projections=0)
        with pytest.raises(ValueError, match="unknown probe 'cube'"):
            loss(key, lambda x: -x, x, projection="cube")
    with pytest.raises(ValueError, match="step must be positive"):
        sj.finite_difference_score_matching(key, lambda x: -x, x, step=0)
