"""Inpainting and colorization: what is known stays, and the rest follows it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj
from score_jax import timesteps

SDE = sj.VP(t_min=1e-3)
MASK = jnp.array([[True, False]])


def inpaint(prior, make, observed, *, sde=SDE, num_steps=100, **options):
    @jax.jit
    def draw(key):
        key_prior, key = jax.random.split(key)
        score_fn, x = prior.score_fn(sde), sj.sample_prior(key_prior, sde, observed.shape)
        ts = timesteps.log_snr(sde, num_steps)
        return sj.inpaint(key, sde, score_fn, make(sde, score_fn), x, ts, observed, MASK, **options)

    return draw(jax.random.key(0))


SAMPLERS = {"ancestral": sj.ancestral, "heun": sj.heun, "dpm_solver_pp": sj.dpm_solver_pp, "unipc": sj.unipc}


@pytest.mark.parametrize("name", SAMPLERS)
def test_independent_coordinates_are_independent(name):
    """The known coordinate to the last bit; the other, of which it tells nothing, has its own law.

    4,000 samples; 4.5 standard errors (false alarms below 1e-4 over all cases) plus 2 % for the steps.
    """
    prior = sj.GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[[0.3, 0.0], [0.0, 0.6]]]))
    observed = jnp.broadcast_to(jnp.array([0.123456789, 9.0]), (4000, 2))
    x = inpaint(prior, SAMPLERS[name], observed)
    np.testing.assert_array_equal(x[:, 0], observed[:, 0])
    assert abs(float(x[:, 1].mean()) + 1) < 4.5 * np.sqrt(0.6 / 4000) + 0.02
    assert abs(float(x[:, 1].var()) - 0.6) < 4.5 * 0.6 * np.sqrt(2 / 4000) + 0.02


@pytest.mark.parametrize(("predictor", "num_steps"), [(sj.ancestral, 100), (sj.unipc, 200)])
def test_the_rest_follows_what_is_known(predictor, num_steps):
    """Correlation 0.9: with ten Langevin steps after each, the conditional law N(0.9 x, 0.19); without, a worse one."""
    prior = sj.GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.array([[[1.0, 0.9], [0.9, 1.0]]]))
    observed = jnp.ones((4000, 2))

    def wrapped(sde, score_fn):
        corrector = sj.annealed_langevin_corrector(sde, score_fn, snr=0.2)
        return sj.chain(predictor(sde, score_fn), *[sj.inpainting(sde, corrector, observed, MASK)] * 10)

    plain, chained = (inpaint(prior, make, observed, num_steps=num_steps)[:, 1] for make in (predictor, wrapped))
    errors = [abs(float(x.mean()) - 0.9) for x in (plain, chained)]
    assert errors[1] < 0.05 < errors[0]
    assert abs(float(chained.var()) - 0.19) < 0.08


def test_resampling_brings_the_rest_to_the_conditional_law():
    """Correlation 0.9: N(0.9, 0.19), of which one pass has less than 0.7 and more than 0.25; ten, 0.9 and 0.19.

    4,000 samples, 4.5 standard errors (false alarms below 1e-4 in all) and 0.02 for the steps.
    """
    prior = sj.GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.array([[[1.0, 0.9], [0.9, 1.0]]]))
    once, often = (inpaint(prior, sj.ancestral, jnp.ones((4000, 2)), num_resamples=n)[:, 1] for n in (1, 10))
    assert float(once.mean()) < 0.7
    assert float(once.var()) > 0.25
    assert abs(float(often.mean()) - 0.9) < 4.5 * np.sqrt(0.19 / 4000) + 0.02
    assert abs(float(often.var()) - 0.19) < 4.5 * 0.19 * np.sqrt(2 / 4000) + 0.02


@pytest.mark.parametrize("denoise", [True, False])
def test_the_unknown_part_is_denoised(denoise):
    """Data at one point: the last step leaves it there; only without it is there noise, of sigma(t_min) = 0.01."""
    prior = sj.GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), 1e-12 * jnp.eye(2)[None])
    x = inpaint(prior, sj.ancestral, jnp.full((1000, 2), 0.5), denoise=denoise)
    sigma = float(SDE.sigma(SDE.t_min))
    spread = float(x[:, 1].std())
    assert spread < 1e-5 if denoise else 0.8 * sigma < spread < 1.2 * sigma


def test_colors_follow_the_grey():
    """Pixels are dark red or light cyan: the grey, -2/3 or 2/3, tells which; it is kept up to rounding."""
    colors = jnp.array([[0.0, -1.0, -1.0], [0.0, 1.0, 1.0]])
    pixel = sj.GaussianMixture(jnp.array([0.5, 0.5]), colors, jnp.stack([1e-3 * jnp.eye(3)] * 2))

    def score_fn(x, t):
        return pixel.score_fn(SDE)(x.reshape(-1, 3), t).reshape(x.shape)

    grey = jnp.where(jnp.arange(400).reshape(4, 10, 10, 1) % 2 == 0, -2 / 3, 2 / 3)

    @jax.jit
    def draw(key):
        corrector = sj.annealed_langevin_corrector(SDE, score_fn, snr=0.2, num_steps=3)
        sampler = sj.chain(sj.ancestral(SDE, score_fn), corrector)
        x = sj.sample_prior(jax.random.key(1), SDE, (4, 10, 10, 3))
        return sj.colorize(key, SDE, score_fn, sampler, x, timesteps.log_snr(SDE, 100), grey)

    x = draw(jax.random.key(0))
    np.testing.assert_allclose(x.mean(axis=-1, keepdims=True), grey, atol=1e-5)
    right = jnp.linalg.norm(x - jnp.where(grey < 0, colors[0], colors[1]), axis=-1) < 0.3
    assert float(right.mean()) > 0.9


def test_wrong_shapes_are_named():
    score_fn, ts, x = lambda x, t: -x, timesteps.log_snr(SDE, 2), jnp.zeros((3, 2))
    key, sampler = jax.random.key(0), sj.ddim(SDE, score_fn)
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \(3, 2\), or 1 along some axes"):
        sj.inpaint(key, SDE, score_fn, sampler, x, ts, x, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"observed must have the shape of x, \(3, 2\)"):
        sj.sample(key, sj.inpainting(SDE, sampler, x[:2], MASK), x, ts)
    with pytest.raises(ValueError, match="num_resamples >= 1, got 0"):
        sj.inpainting(SDE, sampler, x, MASK, num_resamples=0)
    images = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="2 channels or more"):
        sj.colorize(key, SDE, score_fn, sampler, images, ts, images)
    with pytest.raises(ValueError, match=r"grey must have shape \(2, 4, 4, 1\), but has \(2, 4, 4, 2\)"):
        sj.colorize(key, SDE, score_fn, sampler, jnp.zeros((2, 4, 4, 3)), ts, jnp.zeros((2, 4, 4, 2)))
