"""Times: those drawn in training, and the grids that samplers walk.

Training estimates an integral over time, L = E_t h(t) with t uniform in [t_min, t_max],
by draws from a density q(t) relative to the uniform one, each weighted by 1/q(t):

    L = E_{t ~ q} [h(t) / q(t)].                                            (1)

For the likelihood weighting, h(t) = g^2/sigma^2 times a nearly constant function, so the
variance is least with q proportional to g^2/sigma^2 = -lambda_t' (Song et al. 2021, "Maximum
Likelihood Training of Score-Based Diffusion Models", Section 4.2; lambda_t is the log
signal-to-noise ratio): draws are uniform in lambda_t,

    q(t) = -lambda_t' (t_max - t_min) / (lambda_{t_min} - lambda_{t_max}).  (2)

A grid of n steps is `[n + 1]` times, decreasing from t_max to t_min, both included.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.sde import SDE

__all__ = [
    "draw_importance",
    "draw_stratified",
    "draw_uniform",
    "karras",
    "log_snr",
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
    return sde.t_min + (sde.t_max - sde.t_min) * _lattice(key, n), jnp.ones(n)


def draw_importance(key: Array, sde: SDE, n: int) -> tuple[Array, Array]:
    """Times uniform in the log signal-to-noise ratio (Eq. 2), for the likelihood weighting.

    Returns:
      `(t [n], weight [n])` with the weight 1/q of Eq. 1.
    """
    first, last = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
    t = time_of_log_snr(sde, first + (last - first) * _lattice(key, n))
    slope = (sde.diffusion(t) / sde.sigma(t)) ** 2
    return t, (first - last) / (slope * (sde.t_max - sde.t_min))


def _lattice(key: Array, n: int) -> Array:
    """`[n]` points in [0, 1), a regular lattice moved by one uniform offset."""
    return (jnp.arange(n) + jax.random.uniform(key)) / n


def time_of_log_snr(sde: SDE, value: ArrayLike) -> Array:
    """The time at which the log signal-to-noise ratio has a value, by bisection.

    Args:
      sde: the process.
      value: any shape; clipped to the process's own range.

    Returns:
      Times in [t_min, t_max], in the shape of `value`.
    """
    value = jnp.asarray(value)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        noisy = sde.log_snr(middle) < value
        return jnp.where(noisy, low, middle), jnp.where(noisy, middle, high)

    bounds = jnp.full_like(value, sde.t_min), jnp.full_like(value, sde.t_max)
    # 40 halvings end below the spacing of float32 numbers everywhere in the interval.
    low, high = jax.lax.fori_loop(0, 40, halve, bounds)
    return 0.5 * (low + high)


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


def _fractions(n: int) -> Array:
    """`[n + 1]` numbers from 0 to 1."""
    if n < 1:
        raise ValueError(f"a sampling grid needs at least 1 step, got {n}")
    return jnp.linspace(0.0, 1.0, n + 1)


def _with_ends(sde: SDE, ts: Array) -> Array:
    """The grid with its ends set to t_max and t_min, free of rounding."""
    return ts.at[0].set(sde.t_max).at[-1].set(sde.t_min)
