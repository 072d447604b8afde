"""Draws of times and sampling grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_jax import timesteps
from score_jax.sde import VP

GRIDS = [timesteps.uniform, timesteps.karras, timesteps.log_snr]
DRAWS = [timesteps.draw_uniform, timesteps.draw_stratified, timesteps.draw_importance]


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_decrease_from_end_to_end(sde, grid):
    ts = grid(sde, 40)
    assert ts.shape == (41,)
    assert (jnp.diff(ts) < 0).all()
    assert ts[0] == jnp.float32(sde.t_max)
    assert ts[-1] == jnp.float32(sde.t_min)
    with pytest.raises(ValueError, match="at least 1 step"):
        grid(sde, 0)


def test_grids_are_equally_spaced_in_their_variable(sde):
    def spread(values):
        steps = np.diff(np.asarray(values, np.float64))
        return steps.std() / abs(steps.mean())

    assert spread(timesteps.uniform(sde, 20)) < 1e-4
    assert spread(sde.log_snr(timesteps.log_snr(sde, 20))) < 1e-3
    assert spread(jnp.exp(-0.5 / 7 * sde.log_snr(timesteps.karras(sde, 20)))) < 1e-3
    assert spread(jnp.exp(-0.5 / 3 * sde.log_snr(timesteps.karras(sde, 20, rho=3.0)))) < 1e-3


def test_time_of_log_snr_inverts(sde):
    t = jnp.array([1e-5, 1e-4, 0.01, 0.5, 1.0])
    np.testing.assert_allclose(timesteps.time_of_log_snr(sde, sde.log_snr(t)), t, rtol=1e-3)


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_unbiased(sde, draw):
    """E[t^2 weight] over uniform time is 1/3: 200 batches of 256, 4.5 standard errors, false alarms below 1e-5."""
    t, weight = jax.vmap(lambda k: draw(k, sde, 256))(jax.random.split(jax.random.key(0), 200))
    assert (t >= 0.99 * sde.t_min).all()
    assert (t <= sde.t_max).all()
    means = jnp.mean(weight * t**2, axis=1)
    error = means.std() / np.sqrt(len(means)) + 1e-4
    assert abs(means.mean() - 1 / 3) < 4.5 * error


def test_stratification_lowers_the_variance():
    keys = jax.random.split(jax.random.key(0), 100)
    spread = [float(jnp.std(jax.vmap(lambda k, d=d: d(k, VP(), 64)[0].mean())(keys))) for d in DRAWS[:2]]
    assert spread[1] < 0.2 * spread[0]


def test_importance_draws_make_the_likelihood_weighting_flat(sde):
    """g^2/sigma^2 times the weight is one constant, -(change of log SNR) over the length of the interval."""
    t, weight = timesteps.draw_importance(jax.random.key(0), sde, 64)
    value = weight * (sde.diffusion(t) / sde.sigma(t)) ** 2
    length = sde.t_max - sde.t_min
    np.testing.assert_allclose(value, (sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max)) / length, rtol=1e-3)
