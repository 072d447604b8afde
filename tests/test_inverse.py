"""Inverse problems against posteriors in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import moments

import score_jax as sj
from score_jax import operators, timesteps
from score_jax.smc import _resample

SDE = sj.VP(t_min=1e-4)
A = jnp.array([[1.0, -0.5, 0.3], [0.2, 0.8, 0.7]])
NOISE_STD = 0.3


def forward(x):
    return x @ A.T


def gaussian(covariance):
    return sj.GaussianMixture(jnp.ones(1), jnp.array([[1.0, -1.0, 0.5]]), jnp.asarray(covariance)[None])


CORRELATED = [[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]]
# Those that are exact on a Gaussian, with enough iterations of conjugate gradients to solve its equations.
EXACT = {
    "mmps": (lambda *a: sj.mmps(*a, noise_std=NOISE_STD), CORRELATED),
    "mmps, no noise": (lambda *a: sj.mmps(*a, noise_std=0.0), CORRELATED),
    "pigdm": (lambda *a: sj.pigdm(*a, noise_std=NOISE_STD, data_std=0.7), 0.49 * np.eye(3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_on_a_gaussian(sde, name):
    """x_0 ~ N(m, C) makes x_0 | x_t Gaussian of a covariance V free of x_t, which both know:  sigma^2/alpha J  always,

    r^2 I for C = data_std^2 I.  So  y | x_t ~ N(A E[x_0 | x_t], noise_std^2 I + A V A^T)  and Eq. 2 is its gradient.
    """
    make, covariance = EXACT[name]
    prior = gaussian(covariance)
    noise_std = 1e-6 if "no noise" in name else NOISE_STD
    t = jnp.linspace(0.1, 0.9, 8)
    x = prior.sample(jax.random.key(0), 8)
    x = sj.perturb(sde, x, jax.random.normal(jax.random.key(1), x.shape), t)
    y = prior.measurement(A, NOISE_STD).sample(jax.random.key(2), 8)
    exact = jax.jit(jax.vmap(lambda x, y, t: prior.posterior(A, y, noise_std).score_fn(sde)(x[None], t)[0]))(x, y, t)
    estimate = jax.jit(make(sde, prior.score_fn(sde), y, forward))(x, t)
    # In units of 1/sigma, the size of scores; 1/alpha is what float32 loses where the signal has gone.
    unit = sde.sigma(t)[:, None] * jnp.minimum(1.0, sde.alpha(t)[:, None] * 10)
    np.testing.assert_allclose(estimate * unit, exact * unit, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_dps_is_the_gradient_of_its_likelihood(mixture, scale):
    score_fn, B, t = mixture.score_fn(SDE), A[:, :2], jnp.array(0.4)
    x, y = jax.random.normal(jax.random.key(0), (2, 6, 2))

    def log_likelihood(x, y):
        distance = jnp.linalg.norm(y - B @ sj.tweedie(SDE, score_fn, x[None], t)[0])
        if scale is None:
            return -(distance**2) / (2 * NOISE_STD**2)
        return -scale * SDE.alpha(t) / SDE.sigma(t) ** 2 * distance

    @jax.jit
    def both(x, y):
        estimate = sj.dps(SDE, score_fn, y, lambda x: x @ B.T, noise_std=NOISE_STD, scale=scale)(x, t)
        return estimate, score_fn(x, t) + jax.vmap(jax.grad(log_likelihood))(x, y)

    np.testing.assert_allclose(*both(x, y), rtol=1e-3, atol=1e-4)


def test_published_dps_moves_each_step_by_the_gradient_of_the_distance():
    """N(0, 1/2 I): the posterior mean is k x, k = alpha/2 / (alpha^2/2 + sigma^2), and grad |y - k A x| by hand.

    On an ancestral step it is `dps` with  scale = step_size / (alpha_s (1 - r)),  as the module says.
    """
    prior, t, s = sj.GaussianMixture(jnp.ones(1), jnp.zeros((1, 3)), 0.5 * jnp.eye(3)[None]), 0.6, 0.5
    score_fn, key, (t, s) = prior.score_fn(SDE), jax.random.key(1), jnp.array([t, s])
    x = jax.random.normal(jax.random.key(0), (6, 3))
    y = jax.random.normal(jax.random.key(2), (6, 2))
    plain = sj.ancestral(SDE, score_fn)
    k = 0.5 * SDE.alpha(t) / (0.5 * SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2)
    residual = y - k * forward(x)
    gradient = -k * (residual / jnp.linalg.norm(residual, axis=1, keepdims=True)) @ A
    expected = plain.step(key, x, t, s, ())[0] - 0.7 * gradient
    published = sj.dps_steps(SDE, score_fn, plain, y, forward, step_size=0.7).step(key, x, t, s, ())[0]
    np.testing.assert_allclose(published, expected, rtol=1e-4, atol=1e-5)
    scale = 0.7 / (SDE.alpha(s) * (1 - jnp.exp(SDE.log_snr(t) - SDE.log_snr(s))))
    guided = sj.ancestral(SDE, sj.dps(SDE, score_fn, y, forward, noise_std=0.0, scale=scale))
    np.testing.assert_allclose(guided.step(key, x, t, s, ())[0], expected, rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_converge_in_as_many_iterations_as_measurements():
    """Two measurements: two iterations are exact, one is not, and more change nothing."""
    prior, t = gaussian(CORRELATED), jnp.array(0.3)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    y = forward(prior.sample(jax.random.key(1), 4))

    def score(iterations):
        return sj.mmps(SDE, prior.score_fn(SDE), y, forward, noise_std=0.1, iterations=iterations)(x, t)

    one, two, many = map(jax.jit(score), (1, 2, 30))
    np.testing.assert_allclose(two, many, rtol=1e-3, atol=1e-3)
    assert float(jnp.abs(one - many).max()) > 0.1


GUIDED = {
    "dps": lambda *a: sj.dps(*a, noise_std=NOISE_STD),
    "dps, scale": lambda *a: sj.dps(*a, noise_std=0.0, scale=1.0),
    "pigdm": lambda *a: sj.pigdm(*a, noise_std=NOISE_STD),
    "mmps": lambda *a: sj.mmps(*a, noise_std=NOISE_STD),
}


@pytest.mark.parametrize("name", GUIDED)
def test_rows_are_independent_and_there_is_one_trace(mixture, name):
    traces = []

    @jax.jit
    def score(x, y, t):
        traces.append(name)
        return GUIDED[name](SDE, mixture.score_fn(SDE), y, lambda x: x @ A[:, :2].T)(x, t)

    x, y = jax.random.normal(jax.random.key(0), (2, 3, 2))
    t = jnp.array([0.2, 0.5, 0.8])
    first = score(x, y, t)
    others = score(x.at[1:].mul(30.0), y.at[1:].set(0.0), t.at[1:].set(0.4))
    np.testing.assert_allclose(first[0], others[0], rtol=1e-5)
    assert len(traces) == 1


def guided_samples(prior, A, y, make, sampler, n, num_steps):
    @jax.jit
    def draw(key):
        score = make(SDE, prior.score_fn(SDE), jnp.broadcast_to(y, (n, len(y))), lambda x: x @ A.T)
        key_prior, key = jax.random.split(key)
        x = sj.sample_prior(key_prior, SDE, (n, A.shape[1]))
        x = sj.sample(key, sampler(SDE, score), x, timesteps.log_snr(SDE, num_steps))
        return sj.tweedie(SDE, score, x, SDE.t_min)

    return draw(jax.random.key(0))


def test_samples_of_an_exact_score_have_the_posterior_s_law():
    """10,000 samples; 4.5 standard errors (false alarms below 1e-4) plus 1 % for the steps."""
    prior, y, n = gaussian(CORRELATED), jnp.array([1.0, 0.5]), 10_000
    x = guided_samples(prior, A, y, EXACT["mmps"][0], sj.dpm_solver_pp, n, 40)
    mean, cov = moments(prior.posterior(A, y, NOISE_STD))
    largest = float(cov.max())
    np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * np.sqrt(largest / n) + 0.01)
    np.testing.assert_allclose(jnp.cov(x.T), cov, atol=4.5 * largest * np.sqrt(2 / n) + 0.01)


# Relative errors of mean and covariance where the measurement tells the mode: the approximations' own.
QUALITY = {"dps": (0.35, 0.35), "pigdm": (0.2, 0.15), "mmps": (0.06, 0.12)}
B = jnp.array([[1.0, 0.4]])


@pytest.mark.parametrize("name", QUALITY)
def test_guided_samples_come_near_the_posterior_of_a_mixture(mixture, name):
    """4,000 samples, whose noise is 0.016 in the mean and about 0.03 in the covariance."""
    y = jnp.array([1.0])
    x = guided_samples(mixture, B, y, GUIDED[name], sj.ancestral, 4000, 100)
    mean, cov = moments(mixture.posterior(B, y, NOISE_STD))
    assert float(jnp.linalg.norm(x.mean(0) - mean) / jnp.sqrt(jnp.trace(cov))) < QUALITY[name][0]
    assert float(jnp.linalg.norm(jnp.cov(x.T) - cov) / jnp.linalg.norm(cov)) < QUALITY[name][1]


# Between the modes, where the approximations above are off by a third.
Y = jnp.array([0.3])


@pytest.fixture(scope="module")
def particles(mixture):
    """64 runs for each number of particles: means `[64, 2]`, covariances `[64, 2, 2]`, log evidences `[64]`."""

    def run(key, n):
        x = sj.sample_prior(jax.random.fold_in(key, 1), SDE, (n, 2))
        ts = timesteps.log_snr(SDE, 100)
        found = sj.twisted_smc(key, SDE, mixture.score_fn(SDE), Y, lambda x: x @ B.T, x, ts, noise_std=NOISE_STD)
        weights = jnp.exp(found.log_weights)
        mean = weights @ found.x
        centred = found.x - mean[None]
        return mean, jnp.einsum("n,nd,ne->de", weights, centred, centred), found.log_evidence

    keys = jax.random.split(jax.random.key(2), 64)
    return {n: jax.jit(jax.vmap(lambda k, n=n: run(k, n)))(keys) for n in (32, 1024)}


def test_particles_converge_to_the_posterior(mixture, particles):
    """Medians, as the weights have heavy tails: about 0.055 in the mean and 0.017 in the covariance with 32 particles.

    With 1,024 they are about 0.019 and 0.006; four groups of 64 runs differed by 0.005 and by 0.001.
    """
    errors = {}
    for n, found in particles.items():
        pairs = zip(found[:2], moments(mixture.posterior(B, Y, NOISE_STD)), strict=True)
        errors[n] = [float(jnp.median(jnp.abs(estimate - exact[None]))) for estimate, exact in pairs]
    for few, many, bound in zip(errors[32], errors[1024], (0.03, 0.01), strict=True):
        assert many < few / 2
        assert many < bound


def test_particles_estimate_the_evidence(mixture, particles):
    """The mean of p(y) over 64 runs, within 4.5 standard errors and 2 % for the steps."""
    exact = mixture.measurement(B, NOISE_STD).log_prob(Y)
    for found in particles.values():
        ratio = np.exp(found[2] - exact)
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / 8 + 0.02


def test_systematic_resampling():
    """Each particle is kept w n times, rounded up or down; the mean weight stays; even weights are left alone."""
    log_weights = 3.0 + 2 * jax.random.normal(jax.random.key(0), (200,))
    resample = jax.jit(_resample)
    new, chosen = resample(jax.random.key(1), log_weights, 0.9)
    share = 200 * jax.nn.softmax(log_weights)
    assert float(jnp.abs(jnp.bincount(chosen, length=200) - share).max()) < 1
    np.testing.assert_allclose(jax.nn.logsumexp(new), jax.nn.logsumexp(log_weights), rtol=1e-5)
    assert float(jnp.ptp(new)) == 0
    kept, order = resample(jax.random.key(1), 0.1 * log_weights, 0.5)
    np.testing.assert_array_equal(order, jnp.arange(200))
    np.testing.assert_array_equal(kept, 0.1 * log_weights)


OPERATORS = {
    "mask": operators.mask(jnp.arange(8).reshape(1, 8, 1, 1) < 4),
    "blur": operators.blur(1.5),
    "downsample": operators.downsample(2),
    "decolorize": operators.decolorize(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoints(name):
    """<A x, y> = <x, A^T y>, and A is linear and each image's own."""
    measure = jax.jit(OPERATORS[name])
    x, other = jax.random.normal(jax.random.key(0), (2, 2, 8, 6, 3))
    y = jax.random.normal(jax.random.key(1), measure(x).shape)
    (transposed,) = jax.linear_transpose(measure, x)(y)
    np.testing.assert_allclose(jnp.vdot(measure(x), y), jnp.vdot(x, transposed), rtol=1e-4)
    np.testing.assert_allclose(measure(x + 2 * other), measure(x) + 2 * measure(other), atol=1e-5)
    np.testing.assert_allclose(measure(x[1:]), measure(x)[1:], atol=1e-6)


def test_operators_do_what_they_say():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_allclose(OPERATORS["downsample"](x)[:, 1, 2], x[:, 2:4, 4:6].mean(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(OPERATORS["decolorize"](x)[..., 0], x.mean(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(OPERATORS["mask"](x)[:, :4], x[:, :4])
    assert not OPERATORS["mask"](x)[:, 4:].any()
    np.testing.assert_allclose(OPERATORS["blur"](jnp.ones((1, 8, 8, 1))), 1.0, rtol=1e-5)
    spot = operators.blur(1.5)(jnp.zeros((1, 31, 31, 1)).at[0, 15, 15].set(1.0))[0, :, :, 0]
    place = jnp.arange(31.0) - 15
    for along in (spot.sum(axis=0), spot.sum(axis=1)):
        np.testing.assert_allclose(along @ place**2, 1.5**2, rtol=1e-3)
    with pytest.raises(ValueError, match="divisible by it, got 8 x 8"):
        operators.downsample(3)(x)
    with pytest.raises(ValueError, match="std > 0"):
        operators.blur(0.0)


@pytest.mark.parametrize("name", GUIDED)
def test_bounds_of_the_posterior_mean(name):
    """Wide ones change nothing, bit for bit; narrow ones clip E[x_0 | x_t, y], however wrong the score is."""
    make = {"dps": sj.dps, "dps, scale": functools.partial(sj.dps, scale=1.0), "pigdm": sj.pigdm, "mmps": sj.mmps}[name]
    prior, t = gaussian(CORRELATED), jnp.array([0.1, 0.5, 0.999])
    x, y = jax.random.normal(jax.random.key(0), (3, 3)), jax.random.normal(jax.random.key(1), (3, 2))

    @jax.jit
    def both(skew):
        def score_fn(x, t):
            return prior.score_fn(SDE)(x, t) + x @ skew  # Its Jacobian is not symmetric, J not positive.

        def mean(bounds):
            score = make(SDE, score_fn, y, forward, noise_std=NOISE_STD, bounds=bounds)
            return score(x, t), sj.tweedie(SDE, score, x, t)

        return mean(None), mean((-1e30, 1e30)), mean((-1.0, 1.0))

    (plain, free), (wide, _), (_, clipped) = both(1e3 * jax.random.normal(jax.random.key(2), (3, 3)))
    np.testing.assert_array_equal(plain, wide)
    assert float(jnp.abs(free).max()) > 100
    np.testing.assert_allclose(clipped, jnp.clip(free, -1, 1), atol=0.02)  # x / alpha is 150 at t = 1, in float32.


def test_wrong_arguments_are_named(mixture):
    score_fn, x = mixture.score_fn(SDE), jnp.zeros((3, 2))
    for make in (sj.dps, sj.pigdm, sj.mmps):
        with pytest.raises(ValueError, match=r"y must have the shape of forward\(x\), \(3, 1\), but has \(3, 2\)"):
            make(SDE, score_fn, x, lambda x: x @ B.T, noise_std=0.1)(x, 0.5)
        with pytest.raises(ValueError, match="noise_std must not be negative"):
            make(SDE, score_fn, x, lambda x: x, noise_std=-0.1)
    with pytest.raises(ValueError, match="give it a scale"):
        sj.dps(SDE, score_fn, x, lambda x: x, noise_std=0.0)
    ts = timesteps.log_snr(SDE, 2)
    with pytest.raises(ValueError, match=r"y must have the shape of forward\(x\), \(1, 1\), but has \(1, 3\)"):
        sj.twisted_smc(jax.random.key(0), SDE, score_fn, jnp.zeros(3), lambda x: x @ B.T, x, ts, noise_std=0.1)
    with pytest.raises(ValueError, match="the number of particles must be at least 1, got 0"):
        sj.twisted_smc(jax.random.key(0), SDE, score_fn, Y, lambda x: x @ B.T, x[:0], ts, noise_std=0.1)
    with pytest.raises(ValueError, match="noise_std > 0"):
        sj.twisted_smc(jax.random.key(0), SDE, score_fn, Y, lambda x: x @ B.T, x, ts, noise_std=0.0)
