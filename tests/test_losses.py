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


def test_likelihood_weighting_is_g_squared(sde):
    x0, t = jnp.ones((4, 2)), jnp.full(4, 0.5)
    losses = [
        sj.denoising_score_matching(jax.random.key(0), sde, lambda x, t: -x, x0, t, weight=w)
        for w in (sj.variance_weighting, sj.likelihood_weighting)
    ]
    np.testing.assert_allclose(losses[1] / losses[0], (sde.diffusion(t) / sde.sigma(t)) ** 2, rtol=1e-5)
