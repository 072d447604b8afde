"""Langevin dynamics on an unbalanced mixture, with annealing and without; test_mcmc has its stationary law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj

PRECISION = jnp.array([[2.0, 0.6], [0.6, 1.0]])
SIGMAS = jnp.geomspace(20.0, 1.0, 10)


def gaussian_score(x):
    return -x @ PRECISION


def modes():
    """Weights 0.8 and 0.2 at (5, 5) and (-5, -5), unit covariances."""
    return sj.GaussianMixture(
        jnp.array([0.8, 0.2]), jnp.array([[5.0, 5.0], [-5.0, -5.0]]), jnp.stack([jnp.eye(2), jnp.eye(2)])
    )


def conditional(mixture):
    """`score_fn(x, sigma)` of the mixture after noise."""

    def score_fn(x, sigma):
        noisy = mixture.covariances + sigma**2 * jnp.eye(2)[None]
        return sj.GaussianMixture(mixture.weights, mixture.means, noisy).score(x)

    return score_fn


def uniform_start(n):
    return jax.random.uniform(jax.random.key(0), (n, 2), minval=-8.0, maxval=8.0)


def test_annealed_langevin_recovers_the_weights_where_plain_langevin_does_not():
    """10,000 samples: within 0.02 (5 standard errors of the count), plain Langevin off by more than 0.2."""
    mixture, x = modes(), uniform_start(10_000)
    annealed = jax.jit(
        lambda k: sj.annealed_langevin(k, conditional(mixture), x, SIGMAS, step_size=0.1, num_steps=100)
    )(jax.random.key(1))
    plain = jax.jit(lambda k: sj.unadjusted_langevin(k, mixture.score, x, step_size=0.1, num_steps=1000))(
        jax.random.key(1)
    )
    assert abs(np.mean(annealed.sum(axis=1) > 0) - 0.8) < 0.02
    assert abs(np.mean(plain.sum(axis=1) > 0) - 0.8) > 0.2


def test_denoising_is_the_posterior_mean_and_the_trajectory_ends_with_it():
    x, score_fn = uniform_start(16), conditional(modes())

    def run(**options):
        return sj.annealed_langevin(jax.random.key(1), score_fn, x, SIGMAS, step_size=0.1, num_steps=2, **options)

    noisy, path = run(denoise=False), run(trajectory=True)
    expected = noisy + SIGMAS[-1] ** 2 * score_fn(noisy, SIGMAS[-1])
    assert path.shape == (11, 16, 2)
    np.testing.assert_array_equal(path[0], x)
    np.testing.assert_allclose(path[-1], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(), expected, rtol=1e-5, atol=1e-5)


def test_inpainting_keeps_what_is_known_and_samples_the_rest():
    """The first coordinate known to be -5.1 puts the second at N(-5, 1): 4,000 chains, 0.1 (6 standard errors)."""
    n, score_fn = 4000, conditional(modes())
    observed = jnp.full((n, 2), jnp.array(-5.1)).at[:, 1].set(jnp.nan)
    mask = jnp.array([[True, False]])
    ladder = jnp.geomspace(20.0, 0.1, 15)
    x = jax.jit(
        lambda k: sj.inpaint_langevin(
            k, score_fn, uniform_start(n), ladder, observed, mask, step_size=0.002, num_steps=60
        )
    )(jax.random.key(2))
    np.testing.assert_array_equal(x[:, 0], observed[:, 0])
    assert abs(float(x[:, 1].mean()) + 5) < 0.1
    assert abs(float(x[:, 1].std()) - 1) < 0.1


def test_the_annealed_corrector_leaves_the_law_invariant(sde, mixture):
    """From the exact marginal, 20 steps of a small size: first and second moments of 20,000 draws.

    Within 4.5 standard errors (false alarms 3e-5) and 0.5 % for the bias of a step that is not infinitely small.
    """
    t, n = jnp.array(0.4), 20_000
    law = mixture.marginal(sde, t)
    corrector = sj.annealed_langevin_corrector(sde, mixture.score_fn(sde), snr=0.1, num_steps=20)
    before = law.sample(jax.random.key(0), n)
    after = jax.jit(lambda x: corrector.step(jax.random.key(1), x, t, t, ())[0])(before)
    fresh = law.sample(jax.random.key(2), n)
    for power in (1, 2):
        a, b = after**power, fresh**power
        error = jnp.sqrt((a.var(axis=0) + b.var(axis=0)) / n)
        assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4.5 * error + 0.005 * jnp.abs(b.mean(axis=0)))


def test_steps_have_their_stated_sizes(sde):
    """Without a score the steps only add variance, e of Eq. 1 at each: 20,000 numbers, 4.5 standard errors."""

    def check(x, variance):
        assert abs(float(x.var()) / float(variance) - 1) < 4.5 * np.sqrt(2 / x.size)

    key, x, t = jax.random.key(0), jnp.zeros((10_000, 2)), jnp.array(0.4)
    ladder = jnp.array([4.0, 2.0, 1.0, 0.5])
    check(sj.unadjusted_langevin(key, jnp.zeros_like, x, step_size=0.3, num_steps=5), 5 * 0.3)
    annealed = sj.annealed_langevin(key, lambda x, sigma: jnp.zeros_like(x), x, ladder, step_size=0.3, num_steps=5)
    check(annealed, 5 * 0.3 * jnp.sum((ladder / ladder[-1]) ** 2))
    corrector = sj.annealed_langevin_corrector(sde, lambda x, t: jnp.zeros_like(x), snr=0.2, num_steps=5)
    check(corrector.step(key, x, t, t, ())[0], 5 * 4 * 0.2**2 * sde.sigma(t) ** 2)


@pytest.mark.parametrize("batch_averaged", [False, True])
def test_where_there_is_no_score_a_step_sized_by_it_waits(batch_averaged):
    """A fresh network's is 0 everywhere; its derivative is finite, too."""
    x, t = jnp.ones((3, 2)), jnp.array(0.4)

    def end(scale):
        corrector = sj.langevin_corrector(sj.VP(), lambda x, t: scale * x, batch_averaged=batch_averaged)
        return corrector.step(jax.random.key(0), x, t, t, ())[0]

    np.testing.assert_array_equal(end(0.0), x)
    assert np.isfinite(jax.grad(lambda scale: end(scale).sum())(0.0))
    row = sj.langevin_corrector(sj.VP(), lambda x, t: x * jnp.array([[0.0], [1.0], [1.0]]))
    moved = row.step(jax.random.key(0), x, t, t, ())[0] != x
    np.testing.assert_array_equal(moved.all(axis=1), [False, True, True])


def test_trajectory_of_unadjusted_langevin_is_its_every_state():
    def run(num_steps, **options):
        return sj.unadjusted_langevin(
            jax.random.key(0), gaussian_score, jnp.ones((3, 2)), step_size=0.1, num_steps=num_steps, **options
        )

    path = run(4, trajectory=True)
    assert path.shape == (5, 3, 2)
    np.testing.assert_array_equal(path[0], 1)
    np.testing.assert_allclose(path[-1], run(4), rtol=1e-6)


def test_mistakes_are_named():
    key, x, score_fn = jax.random.key(0), jnp.ones((4, 2)), conditional(modes())
    options = dict(step_size=0.1, num_steps=2)
    for sigmas in ([1.0, 2.0], [1.0, 0.0], [[1.0]]):
        with pytest.raises(ValueError, match="positive, decreasing"):
            sj.annealed_langevin(key, score_fn, x, jnp.array(sigmas), **options)
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \(4, 2\)"):
        sj.inpaint_langevin(key, score_fn, x, SIGMAS, x, jnp.ones((3, 2)), **options)
    with pytest.raises(FloatingPointError, match=r"after level 1 of 10, step \d+ of 200: take a smaller step_size"):
        sj.annealed_langevin(key, lambda x, sigma: -x, x, SIGMAS, step_size=100.0, num_steps=200)
    with pytest.raises(FloatingPointError, match=r"after step \d+ of 300"):
        sj.unadjusted_langevin(key, gaussian_score, x, step_size=100.0, num_steps=300)
