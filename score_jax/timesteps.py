"""Times: those drawn in training, and the grids that samplers walk.

Training estimates an integral over time, L = E_t h(t) with t uniform in [t_min, t_max],
by draws from a density q(t) relative to the uniform one, each weighted by 1/q(t):

    L = E_{t ~ q} [h(t) / q(t)].                                            (1)

For the likelihood weighting, h(t) = g^2/sigma^2 times a nearly constant function, so the
variance is least with q proportional to g^2/sigma^2 = -lambda_t' (Song et al. 2021, "Maximum
Likelihood Training of Score-Based Diffusion Models", Section 4.2; lambda_t is the log
signal-to-noise ratio): draws are uniform in lambda_t,

    q(t) = -lambda_t' (t_max - t_min) / (lambda_{t_min} - lambda_{t_max}).  (2)

A grid of n steps is `[n + 1]` times, decreasing from t_max to t_min, both included.  With the half log
signal-to-noise ratio l and the posterior mean D, a step of length h of a solver of order k that takes D for a
polynomial in l (`samplers.multistep`) errs by about  alpha |D^(k)| h^(k+1),  in units of x_t's spread s;
n steps err least together where each errs alike, with a density of points

    rho(l) ~ (alpha |D^(k)(l)| / s)^(1/(k+1)).                              (3)

The noise scales of NCSNv2 are in `scales`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_batch, as_precise, as_time
from score_jax.parameterization import tweedie
from score_jax.scales import langevin_step_size, largest_distance, level_ratio
from score_jax.sde import DDPM, SDE, ScoreFn, perturb

__all__ = [
    "curvature",
    "draw_importance",
    "draw_levels",
    "draw_lognormal",
    "draw_steps",
    "draw_stratified",
    "draw_uniform",
    "karras",
    "ladder",
    "langevin_step_size",
    "largest_distance",
    "level_of_time",
    "level_ratio",
    "log_snr",
    "quadratic",
    "time_of_log_snr",
    "uniform",
]


def draw_uniform(key: Array, sde: SDE, n: int) -> tuple[Array, Array]:
    """Independent uniform times: `(t [n], weight [n])`, the weight 1/q of Eq. 1 being one."""
    return jax.random.uniform(key, (n,), minval=sde.t_min, maxval=sde.t_max), jnp.ones(n)


def draw_stratified(key: Array, sde: SDE, n: int) -> tuple[Array, Array]:
    """Uniform times, one in each n-th of the interval (Kingma et al. 2021, Appendix I.1).

    One offset shared by a lattice of n points: each time is uniform, and their mean
    has far less variance than that of independent draws.

    Returns:
      `(t [n], weight [n])`, the weight 1/q of Eq. 1 being one.
    """
    return sde.t_min + (sde.t_max - sde.t_min) * lattice(key, n), jnp.ones(n)


def draw_importance(key: Array, sde: SDE, n: int) -> tuple[Array, Array]:
    """Times uniform in the log signal-to-noise ratio (Eq. 2), for the likelihood weighting.

    Returns:
      `(t [n], weight [n])` with the weight 1/q of Eq. 1.
    """
    first, last = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
    t = time_of_log_snr(sde, first + (last - first) * lattice(key, n))
    slope = (sde.diffusion(t) / sde.sigma(t)) ** 2
    return t, (first - last) / (slope * (sde.t_max - sde.t_min))


def draw_levels(key: Array, sde: SDE, n: int, *, num_levels: int) -> tuple[Array, Array]:
    """Independent draws from the times of a ladder of noise levels, as NCSN trains (Song & Ermon 2019, Eq. 6).

    Level i of L, of which 0 has the most noise, stands at t_max (1 - i / (L - 1)), the last at t_min.

    Returns:
      `(t [n], weight [n])`, the weight being one.

    Raises:
      ValueError: for fewer than 2 levels.
    """
    _check_levels(num_levels)
    level = jax.random.randint(key, (n,), 0, num_levels)
    return jnp.maximum(sde.t_max * (1 - level / (num_levels - 1)), sde.t_min), jnp.ones(n)


def draw_lognormal(key: Array, sde: SDE, n: int, *, mean: float = -1.2, std: float = 1.2) -> tuple[Array, Array]:
    """Independent noise levels, log(sigma/alpha) ~ N(mean, std^2), as EDM trains (Karras et al. 2022, Table 1).

    Levels outside the process's range are moved to its ends.  With `losses.edm_weighting` it is EDM's objective.

    Returns:
      `(t [n], weight [n])`, the weight being one: the law is a part of the objective.
    """
    return time_of_log_snr(sde, -2 * (mean + std * jax.random.normal(key, (n,)))), jnp.ones(n)


def draw_steps(key: Array, sde: DDPM, n: int) -> tuple[Array, Array]:
    """Independent draws from the times k/N of a chain of N steps, k = 1 ... N, as DDPM trains (Ho et al. 2020).

    Returns:
      `(t [n], weight [n])`, the weight being one.

    Raises:
      ValueError: for a process that is no chain.
    """
    if not isinstance(sde, DDPM):
        raise ValueError(f"draw_steps is for the chain of DDPM, not for {type(sde).__name__}")
    steps = jnp.shape(sde.betas)[0]
    return (1 + jax.random.randint(key, (n,), 0, steps)) / steps, jnp.ones(n)


def level_of_time(sde: SDE, t: ArrayLike, num_levels: int) -> Array:
    """The level of a ladder (see `draw_levels`) at a time, in the shape of `t`; between levels, a fraction."""
    _check_levels(num_levels)
    return (num_levels - 1) * (1 - as_time(t) / sde.t_max)


def _check_levels(number: int) -> None:
    if number < 2:
        raise ValueError(f"a ladder needs at least 2 levels, got {number}")


def lattice(key: Array, n: int) -> Array:
    """`[n]` points in [0, 1), a regular lattice moved by one uniform offset."""
    return (jnp.arange(n, dtype=float) + jax.random.uniform(key)) / n


def time_of_log_snr(sde: SDE, value: ArrayLike) -> Array:
    """The time at which the log signal-to-noise ratio has a value, by bisection.

    Its derivatives are those of the implicit function,  dt/dvalue = 1 / lambda_t'  and, for a parameter p of the
    process,  dt/dp = -(d lambda_t / dp) / lambda_t'.

    Args:
      sde: the process.
      value: any shape; clipped to the process's own range, where the derivative in it is zero.

    Returns:
      Times in [t_min, t_max], in the shape of `value`; NaN where that is NaN.
    """
    value = as_time(value)
    within = jnp.clip(value, sde.log_snr(sde.t_max), sde.log_snr(sde.t_min))

    def bisect(_, middle: Array) -> Array:
        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            noisy = sde.log_snr(middle) < value
            return jnp.where(noisy, low, middle), jnp.where(noisy, middle, high)

        bounds = jnp.full_like(value, sde.t_min), jnp.full_like(value, sde.t_max)
        # As many halvings as end below the spacing of numbers near t_min: 40 in single, 75 in double precision.
        low, high = jax.lax.fori_loop(0, 40 if value.dtype == jnp.float32 else 75, halve, bounds)
        return jnp.where(jnp.isnan(value), value, 0.5 * (low + high))

    return jax.lax.custom_root(
        lambda t: (sde.log_snr(t) - within).astype(t.dtype),
        value,
        bisect,
        # Each time has its own equation: the linear map is a product with its value at one.
        lambda slope, y: y / slope(jnp.ones_like(y)),
    )


def uniform(sde: SDE, n: int) -> Array:
    """`[n + 1]` equally spaced times."""
    return _with_ends(sde, sde.t_max + (sde.t_min - sde.t_max) * _fractions(n))


def karras(sde: SDE, n: int, rho: float = 7.0) -> Array:
    """`[n + 1]` times at which (sigma/alpha)^(1/rho) is equally spaced (Karras et al. 2022, Eq. 5).

    The ends are the process's own; a larger rho places more steps at low noise.
    """
    root_max = jnp.exp(-0.5 / rho * sde.log_snr(sde.t_max))
    root_min = jnp.exp(-0.5 / rho * sde.log_snr(sde.t_min))
    level = root_max + (root_min - root_max) * _fractions(n)
    return _with_ends(sde, time_of_log_snr(sde, -2 * rho * jnp.log(level)))


def log_snr(sde: SDE, n: int) -> Array:
    """`[n + 1]` times at which log(alpha^2/sigma^2) is equally spaced (Lu et al. 2022, Section 3.3)."""
    first, last = sde.log_snr(sde.t_max), sde.log_snr(sde.t_min)
    return _with_ends(sde, time_of_log_snr(sde, first + (last - first) * _fractions(n)))


def quadratic(sde: SDE, n: int) -> Array:
    """`[n + 1]` times whose roots are equally spaced (Song et al. 2020, DDIM, Appendix D.2)."""
    first, last = jnp.sqrt(sde.t_max), jnp.sqrt(sde.t_min)
    return _with_ends(sde, (first + (last - first) * _fractions(n)) ** 2)


def curvature(sde: SDE, score_fn: ScoreFn, x: Array, n: int, *, order: int = 2, num_points: int = 100) -> Array:
    """`[n + 1]` times learned from the score's own curvature along its paths (Eq. 3), once for a network.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`; it is evaluated `num_points` times on x.
      x: where some paths start at t_max, at least 2, `[batch, *event]`; a few images do.
      n: steps.
      order: k, of the solver.
      num_points: DDIM steps along the paths.

    Raises:
      ValueError: for an order below 1, fewer points than twice the order, or fewer than 2 paths; outside `jit`, if they
        all start at one point.
      FloatingPointError: if the score is not finite along the paths.  Under `jit` neither is an error: the times are
        equally spaced in the log signal-to-noise ratio, as where nothing curves.
    """
    x = as_batch(x)
    if len(x) < 2:
        raise ValueError(f"curvature needs at least 2 paths, whose spread is its unit, got {len(x)}")
    if order < 1 or num_points < 2 * order:
        raise ValueError(f"curvature needs order >= 1 and num_points >= 2 order, got {order} and {num_points}")
    ts = as_precise(log_snr(sde, num_points), x)
    ls = 0.5 * jnp.linspace(sde.log_snr(sde.t_max), sde.log_snr(sde.t_min), num_points + 1)

    def ddim(x: Array, times: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        t, s = times
        mean = tweedie(sde, score_fn, x, t)
        eps = (x - sde.alpha(t) * mean) / sde.sigma(t)
        return perturb(sde, mean, eps, s), (mean, jnp.sqrt(jnp.mean(jnp.var(x, axis=0))))

    _, (means, spread) = jax.lax.scan(ddim, x, (ts[:-1], ts[1:]))
    derivative = jnp.diff(means, order, axis=0).reshape(num_points - order, -1) / (ls[1] - ls[0]) ** order
    at = jnp.arange(len(derivative)) + order // 2
    error = sde.alpha(ts)[at] * jnp.sqrt(jnp.mean(derivative**2, axis=1)) / spread[at]
    _check_paths(spread, jnp.isfinite(means).all(axis=range(1, means.ndim)), ts)
    density = error ** (1 / (order + 1))
    density = jnp.where(jnp.isfinite(density).all(), density, 0.0)
    # Where nothing curves the points still need to be somewhere.
    density = jnp.interp(ls, ls[at], density / jnp.maximum(jnp.max(density), 1e-6) + 1e-3)
    reached = jnp.concatenate([jnp.zeros(1), jnp.cumsum(0.5 * (density[1:] + density[:-1]))])
    return _with_ends(sde, time_of_log_snr(sde, 2 * jnp.interp(reached[-1] * _fractions(n), reached, ls)))


def _check_paths(spread: Array, finite: Array, ts: Array) -> None:
    """Raise unless paths differ, by their spread at each time, and their means are finite; traced values pass."""
    if isinstance(spread, jax.core.Tracer):
        return
    if not finite.all():
        raise FloatingPointError(f"the score is not finite at t = {ts[jnp.argmin(finite)]:.3g} on the paths from x")
    if not spread.all():
        raise ValueError(
            "curvature needs paths that differ, whose spread is its unit, but every example of x is the same"
        )


def ladder(sde: SDE, n: int) -> Array:
    """`[n + 1]` times, t_max twice and then equally spaced: a corrector, which acts where a step ends, visits n levels.

    On VE they are the n geometrically spaced noise levels of NCSN.

    Raises:
      ValueError: for fewer than 2 levels.
    """
    _check_levels(n)
    return jnp.concatenate([jnp.array([sde.t_max]), uniform(sde, n - 1)])


def _fractions(n: int) -> Array:
    """`[n + 1]` numbers from 0 to 1."""
    if n < 1:
        raise ValueError(f"a sampling grid needs at least 1 step, got {n}")
    return jnp.linspace(0.0, 1.0, n + 1)


def _with_ends(sde: SDE, ts: Array) -> Array:
    """The grid with its ends set to t_max and t_min, free of rounding."""
    return ts.at[0].set(sde.t_max).at[-1].set(sde.t_min)
