"""Draws of times and sampling grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj
from score_jax import timesteps
from score_jax.sde import VE, VP

GRIDS = [timesteps.uniform, timesteps.quadratic, timesteps.karras, timesteps.log_snr]
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
    assert spread(jnp.sqrt(timesteps.quadratic(sde, 20))) < 1e-4
    assert spread(sde.log_snr(timesteps.log_snr(sde, 20))) < 1e-3
    assert spread(jnp.exp(-0.5 / 7 * sde.log_snr(timesteps.karras(sde, 20)))) < 1e-3
    assert spread(jnp.exp(-0.5 / 3 * sde.log_snr(timesteps.karras(sde, 20, rho=3.0)))) < 1e-3


def test_curvature_of_standard_normal_data():
    """Under VE the posterior mean is  z / sqrt(1 + exp(-2 l))  along a path: Eq. 3 in closed form, but for differences.

    64 paths share one shape, so their number does not matter.
    """
    sde = VE(sigma_min=0.01, sigma_max=20.0)
    x = sde.sigma(1.0) * jax.random.normal(jax.random.key(0), (64, 3))

    def score_fn(x, t):
        return -x / (1 + sde.sigma(t) ** 2)

    ts = timesteps.curvature(sde, score_fn, x, 8, num_points=400)
    ls = np.linspace(-np.log(20.0), -np.log(0.01), 20_001)
    mean = 1 / np.sqrt(1 + np.exp(-2 * ls))
    second = np.gradient(np.gradient(mean, ls), ls)
    density = np.cbrt(np.abs(second) / np.sqrt(1 + np.exp(-2 * ls)))
    reached = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    expected = np.interp(reached[-1] * np.linspace(0, 1, 9), reached, ls)
    np.testing.assert_allclose(-np.log(sde.sigma(ts)), expected, atol=0.06)
    # Where no path curves the points are equally spaced.
    straight = timesteps.curvature(sde, lambda x, t: jnp.zeros_like(x), x, 8, num_points=400)
    np.testing.assert_allclose(straight, timesteps.log_snr(sde, 8), atol=1e-3)
    with pytest.raises(ValueError, match=r"at least 2 paths, .* got 1"):
        timesteps.curvature(sde, score_fn, x[:1], 8)


def test_curvature_of_paths_that_do_not_differ_and_of_a_score_that_is_not_finite():
    """Errors; under `jit`, where there are none, the grid of paths that do not curve."""
    sde, same = VP(), jnp.ones((3, 2))

    def run(score_fn, x):
        return timesteps.curvature(sde, score_fn, x, 5, num_points=10)

    def wild(x, t):
        return jnp.where(t < 0.5, jnp.nan, -0.5 * x)

    with pytest.raises(ValueError, match=r"paths that differ, .* every example of x is the same"):
        run(lambda x, t: -0.5 * x, same)
    with pytest.raises(FloatingPointError, match=r"the score is not finite at t = 0\.\d+ on the paths from x"):
        run(wild, jnp.eye(3))
    for score_fn, x in ((lambda x, t: -0.5 * x, same), (wild, jnp.eye(3))):
        ts = jax.jit(lambda x, score_fn=score_fn: run(score_fn, x))(x)
        np.testing.assert_allclose(sde.log_snr(ts), sde.log_snr(timesteps.log_snr(sde, 5)), atol=0.05)


def test_a_learned_grid_is_better_than_those_that_know_nothing(mixture):
    """UniPC in 10 steps against an adaptive solution: the error of what it ends with, from 500 starts."""
    sde, score_fn = sj.VP(t_min=1e-3), mixture.score_fn(sj.VP())
    x = mixture.marginal(sde, sde.t_max).sample(jax.random.key(0), 500)
    exact = sj.ode_sample(sde, score_fn, x)
    run = jax.jit(lambda x, ts: sj.sample(jax.random.key(1), sj.unipc(sde, score_fn), x, ts))

    def error(ts):
        return float(jnp.sqrt(jnp.mean((run(x, ts) - exact) ** 2)))

    learned = error(timesteps.curvature(sde, score_fn, x[:64], 10))
    assert learned < 0.8 * min(
        error(grid(sde, 10)) for grid in (timesteps.uniform, timesteps.karras, timesteps.log_snr)
    )


def test_time_of_log_snr_inverts(sde):
    t = jnp.array([1e-5, 1e-4, 0.01, 0.5, 1.0])
    np.testing.assert_allclose(timesteps.time_of_log_snr(sde, sde.log_snr(t)), t, rtol=1e-3)


def test_time_of_log_snr_is_exact_in_double_precision(any_sde):
    """To the rounding of the signal-to-noise ratio; VP's grid against the root of its quadratic equation, to 1e-14."""
    with jax.enable_x64(True):
        t = jnp.geomspace(any_sde.t_min, any_sde.t_max, 50)
        value = any_sde.log_snr(t)
        found = timesteps.time_of_log_snr(any_sde, value)
        assert found.dtype == np.float64
        slope = jax.vmap(jax.grad(any_sde.log_snr))(t)
        np.testing.assert_array_less(np.abs(found - t), 1e-14 * t + 4e-15 * (1 + np.abs(value)) / np.abs(slope))
        if type(any_sde) is VP:
            ts = timesteps.log_snr(any_sde, 20)
            values = np.linspace(any_sde.log_snr(1.0), any_sde.log_snr(1e-5), 21)
            exact = (np.sqrt(0.1**2 + 2 * 19.9 * np.logaddexp(0, -values)) - 0.1) / 19.9
            np.testing.assert_allclose(ts, exact, atol=1e-14)


def test_time_of_log_snr_has_the_derivative_of_the_inverse(any_sde):
    """dt/dlambda = 1/lambda_t' = -sigma^2/g^2, off the knots of a table; zero where the value is clipped."""
    t = any_sde.t_min + (any_sde.t_max - any_sde.t_min) * jnp.array([0.01234, 0.4321, 0.9])
    slope = jax.jit(jax.vmap(jax.grad(lambda v: timesteps.time_of_log_snr(any_sde, v))))
    exact = -((any_sde.sigma(t) / any_sde.diffusion(t)) ** 2)
    np.testing.assert_allclose(slope(any_sde.log_snr(t)), exact, rtol=2e-3)
    outside = jnp.array([any_sde.log_snr(any_sde.t_max) - 1, any_sde.log_snr(any_sde.t_min) + 1, jnp.inf])
    np.testing.assert_array_equal(slope(outside), 0)


def test_time_of_log_snr_has_the_derivatives_of_closed_forms():
    """VP's time solves a quadratic equation, log alpha^2 = log sigmoid(lambda); EDM's is exp(-lambda/2)."""

    def closed_form(ends, value):
        slope, target = ends[1] - ends[0], -jax.nn.log_sigmoid(value)
        return (jnp.sqrt(ends[0] ** 2 + 2 * slope * target) - ends[0]) / slope

    def bisected(ends, value):
        return timesteps.time_of_log_snr(sj.VP(beta_min=ends[0], beta_max=ends[1]), value)

    ends = jnp.array([0.1, 20.0])
    for value in (-3.0, 0.5):
        got, exact = (jax.jacfwd(fn, (0, 1))(ends, value) for fn in (bisected, closed_form))
        for a, b in zip(got, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3)
    second = jax.grad(jax.grad(lambda v: timesteps.time_of_log_snr(sj.EDM(), v)))(0.0)
    np.testing.assert_allclose(second, 0.25, rtol=1e-5)
    # Clipped to t_max, the time moves with it.
    last = jax.grad(lambda end: timesteps.time_of_log_snr(sj.EDM(t_max=end), -100.0))(80.0)
    np.testing.assert_allclose(last, 1, rtol=1e-5)


def test_time_of_log_snr_of_an_integer_and_of_nan():
    times = timesteps.time_of_log_snr(sj.EDM(), jnp.array([jnp.nan, -1.0]))
    np.testing.assert_allclose(times, [np.nan, np.exp(0.5)], rtol=1e-5)
    np.testing.assert_allclose(timesteps.time_of_log_snr(sj.EDM(), -1), np.exp(0.5), rtol=1e-5)


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


def test_largest_distance_is_that_of_all_pairs():
    x = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 1), np.uint8)
    flat = x.reshape(50, -1).astype(float)
    expected = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(axis=2)).max()
    for block in (7, 50, 64):
        assert timesteps.largest_distance(x, block=block) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 examples"):
        timesteps.largest_distance(x[:1])


# Dimension, sigma_max, levels, Langevin steps a level and step size in the published notation (Song & Ermon 2020).
PUBLISHED = [
    (3 * 32**2, 50, 232, 5, 6.2e-6),
    (3 * 64**2, 90, 500, 5, 3.3e-6),
    (3 * 128**2, 190, 1086, 3, 1.8e-6),
    (3 * 256**2, 348, 2311, 3, 9e-7),
]


@pytest.mark.parametrize(("dimension", "sigma_max", "levels", "num_steps", "step_size"), PUBLISHED)
def test_ncsnv2_scales_are_the_published_ones(dimension, sigma_max, levels, num_steps, step_size):
    """The paper rounds: the number of levels within 6 %, the step size to its two digits."""
    ratio = timesteps.level_ratio(dimension)
    assert 1 + np.log(sigma_max / 0.01) / np.log(ratio) == pytest.approx(levels, rel=0.06)
    ratio = (sigma_max / 0.01) ** (1 / (levels - 1))
    assert timesteps.langevin_step_size(0.01, ratio, num_steps) / 2 == pytest.approx(step_size, rel=0.02)


def test_langevin_step_size_keeps_the_variance_of_a_level():
    """The recursion v <- (1 - e/2)^2 v + e of a unit Gaussian, from r^2 to nearly 1 after num_steps."""
    ratio, num_steps = 1.04, 5
    e = timesteps.langevin_step_size(1.0, ratio, num_steps)
    nearby = [abs(_after(e * f, ratio, num_steps) - 1) for f in (0.98, 1.02)]
    assert abs(_after(e, ratio, num_steps) - 1) < min(nearby)


def _after(e, ratio, num_steps):
    v = ratio**2
    for _ in range(num_steps):
        v = (1 - e / 2) ** 2 * v + e
    return v


def test_draws_of_levels_are_uniform_over_the_ladder():
    """5,000 draws of 5 levels: each within 4.5 standard errors of its share, false alarms below 1e-4."""
    sde, n = VE(sigma_min=0.01, sigma_max=100.0), 5000
    t, weight = timesteps.draw_levels(jax.random.key(0), sde, n, num_levels=5)
    levels = np.asarray(timesteps.level_of_time(sde, t, 5))
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    np.testing.assert_allclose(sde.sigma(t), 100 * 1e-4 ** (levels.round() / 4), rtol=1e-3)
    counts = np.bincount(levels.round().astype(int), minlength=5)
    assert np.all(np.abs(counts / n - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / n))
    assert (weight == 1).all()


def test_lognormal_draws_have_the_law_of_edm(sde):
    """4,000 levels in the range: mean and standard deviation within 4.5 standard errors, false alarms below 1e-4."""
    n = 4000
    t, weight = jax.jit(lambda k: timesteps.draw_lognormal(k, sde, n, mean=-0.5, std=0.3))(jax.random.key(0))
    level = np.asarray(-0.5 * sde.log_snr(t))
    assert abs(level.mean() + 0.5) < 4.5 * 0.3 / np.sqrt(n)
    assert abs(level.std() - 0.3) < 4.5 * 0.3 / np.sqrt(2 * n)
    assert (weight == 1).all()
    # By default the published law, of whose levels 0.5 has the quantile (log 0.5 + 1.2) / 1.2; beyond the ends none is.
    share = np.mean(np.asarray(timesteps.draw_lognormal(jax.random.key(1), sj.EDM(), n)[0]) < 0.5)
    assert abs(share - 0.6636) < 4.5 * np.sqrt(0.6636 * 0.3364 / n)
    ends = timesteps.draw_lognormal(jax.random.key(2), sj.EDM(), 64, std=100.0)[0]
    np.testing.assert_allclose([ends.min(), ends.max()], [0.002, 80], rtol=1e-6)


def test_draws_of_steps_are_uniform_over_the_chain():
    """4,000 draws of 4 steps, the process an argument: within 4.5 standard errors, false alarms below 1e-4."""
    draw = jax.jit(timesteps.draw_steps, static_argnums=2)
    t, weight = draw(jax.random.key(0), sj.DDPM(betas=jnp.full(4, 0.1), t_min=0.25), 4000)
    counts = np.bincount(np.asarray(4 * t).astype(int), minlength=5)
    assert counts[0] == 0
    assert np.all(np.abs(counts[1:] / 4000 - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 4000))
    assert (weight == 1).all()


def test_ladder_ends_its_steps_at_geometric_levels():
    sde = VE(sigma_min=0.01, sigma_max=10.0)
    ts = timesteps.ladder(sde, 7)
    assert ts.shape == (8,)
    np.testing.assert_allclose(sde.sigma(ts[1:]), np.geomspace(10, 0.01, 7), rtol=1e-3)
    for bad in (lambda: timesteps.ladder(sde, 1), lambda: timesteps.level_ratio(2)):
        with pytest.raises(ValueError, match=r"at least 2 levels|from 5 dimensions"):
            bad()
    with pytest.raises(ValueError, match="ratio > 1"):
        timesteps.langevin_step_size(0.01, 1.0, 5)
