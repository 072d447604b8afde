"""Samplers that follow the reverse SDE, fresh noise at every step.

For a step from t to s < t, let  r = exp(lambda_t - lambda_s) < 1  be the ratio of their
signal-to-noise ratios.  Given x_0 the process is Gaussian at s, too (Ho et al. 2020, Eqs. 6
and 7; Kingma et al. 2021, Eq. 25), and with x_0 replaced by its posterior mean

    x_s | x_t ~ N((alpha_s / alpha_t) (x_t + (1 - r) sigma_t^2 score(x_t, t)),
                  sigma_s^2 (1 - r) I).                                     (1)

Forwards, the step from s to t is exactly

    x_t = x_s + (a - 1) x_s + b z,   a = alpha_t / alpha_s,   b^2 = sigma_t^2 - a^2 sigma_s^2 = sigma_t^2 (1 - r).   (2)

The adaptive method (Jolicoeur-Martineau et al. 2021, Algorithm 1) takes an Euler-Maruyama step of size h to x', a
second one of the same noise whose drift and diffusion are those at its end, and goes on from the mean x'' of the two
if its distance from x',

    E^2 = mean over dimensions of ((x'' - x') / max(atol, rtol |x'|, rtol |p|))^2,           (3)

with p the x' of the last step that was accepted, is at most 1; the next h is  0.9 h E^-0.9.  A rejected step says
something about its noise: drawn anew, as published, the noise of the steps that are accepted is no longer normal,
which in few dimensions shows.  Here the path of the noise is fixed beforehand, refined where it is asked for by
Brownian bridges (Gaines & Lyons 1997),

    W((u + v)/2) ~ N((W(u) + W(v)) / 2, (v - u) / 4),                       (4)

with the log signal-to-noise ratio for a clock.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_batch, call_score, expand, square
from score_jax.samplers.base import Sampler, no_state, root
from score_jax.samplers.deterministic import ddim, heun
from score_jax.sde import SDE, ScoreFn, reverse_drift
from score_jax.timesteps import time_of_log_snr

__all__ = ["adaptive_sde", "ancestral", "consistency", "ddpm", "euler_maruyama", "reverse_diffusion", "stochastic_heun"]


def euler_maruyama(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Euler-Maruyama on the reverse SDE: weak order 1.

    x_s = x_t - (t - s) (f x_t - g^2 score) + g sqrt(t - s) z   (Song et al. 2021, Appendix D).
    """

    def step(key, x, t, s, state):
        return _euler(sde, score_fn, x, x, t, t - s, jax.random.normal(key, x.shape, x.dtype)), state

    return Sampler(no_state, step)


def reverse_diffusion(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """The reverse of the forward chain's own step (Song et al. 2021, Eq. 46, with Eq. 2): weak order 1.

    x_s = (2 - a) x_t + b^2 score + b z.
    """

    def step(key, x, t, s, state):
        a, b = forward_kernel(sde, s, t)
        return (2 - a) * x + b**2 * call_score(score_fn, x, t) + b * jax.random.normal(key, x.shape, x.dtype), state

    return Sampler(no_state, step)


def ancestral(sde: SDE, score_fn: ScoreFn, *, variance: str = "posterior") -> Sampler:
    """Ancestral sampling through the Gaussian posterior of x_s (Eq. 1): weak order 1.

    DDPM's sampler (Ho et al. 2020, Algorithm 2) on VP, and its counterpart on VE (Song et al. 2021, Eq. 47).

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      variance: of the noise: `posterior`, that of Eq. 1, right for data at one point; or `forward`, b^2 of Eq. 2, right
        for data of the prior's law.

    Raises:
      ValueError: for another `variance`.
    """
    if variance not in ("posterior", "forward"):
        raise ValueError(f"ancestral needs variance 'posterior' or 'forward', got {variance!r}")

    def step(key, x, t, s, state):
        ratio, gain, std = ancestral_kernel(sde, t, s)
        if variance == "forward":
            std = forward_kernel(sde, s, t)[1]
        z = jax.random.normal(key, x.shape, x.dtype)
        return ratio * x + gain * call_score(score_fn, x, t) + std * z, state

    return Sampler(no_state, step)


def ddpm(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """DDPM's sampler as published on CIFAR-10 (Ho et al. 2020): `ancestral` with the noise of the chain, beta_k."""
    return ancestral(sde, score_fn, variance="forward")


def consistency(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """The sampler of a consistency model (Song et al. 2023, Algorithm 1): one step is enough, more are for quality.

    A step jumps to t_min, as DDIM would, and goes up to s again with fresh noise (Eq. 2).  For the networks of
    `score_jax.distillation` alone, whose jumps follow the flow; of any other network a jump is the posterior mean.
    """
    jump = ddim(sde, score_fn)

    def step(key, x, t, s, state):
        t_min = jnp.minimum(s, sde.t_min)  # No constant: compiled, its signal-to-noise ratio would differ by rounding.
        end, _ = jump.step(key, x, t, t_min, ())
        a, b = forward_kernel(sde, t_min, s)
        return a * end + b * jax.random.normal(key, x.shape, x.dtype), state

    return Sampler(no_state, step)


def ancestral_kernel(sde: SDE, t: Array, s: Array) -> tuple[Array, Array, Array]:
    """Eq. 1 as  x_s ~ N(ratio x_t + gain score, std^2 I):  `(ratio, gain, std)`, scalars; std is 0 for t = s."""
    ratio, one_minus_r = sde.alpha(s) / sde.alpha(t), -jnp.expm1(sde.log_snr(t) - sde.log_snr(s))
    return ratio, ratio * one_minus_r * sde.sigma(t) ** 2, sde.sigma(s) * root(one_minus_r)


def forward_kernel(sde: SDE, s: Array, t: Array) -> tuple[Array, Array]:
    """`(a, b)` of Eq. 2."""
    return sde.alpha(t) / sde.alpha(s), sde.sigma(t) * root(-jnp.expm1(sde.log_snr(t) - sde.log_snr(s)))


def stochastic_heun(
    sde: SDE,
    score_fn: ScoreFn,
    *,
    churn: float = 0.4,
    noise_min: float = 0.0,
    noise_max: float = math.inf,
    noise_scale: float = 1.0,
) -> Sampler:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): noise is added, then Heun's step removes more.

    In x / alpha, whose noise level is l = sigma / alpha, a step first goes up to (1 + churn) l, at the time u, but not
    beyond t_max:  x_u = a x_t + noise_scale b z  with a and b of the step from t to u (Eq. 2).

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      churn: how much noise a step adds, relative to the level: S_churn / N of the paper, at most sqrt(2) - 1 there.
      noise_min: the smallest l at which noise is added (S_tmin).
      noise_max: the largest (S_tmax).
      noise_scale: the standard deviation of the noise (S_noise); a little above 1 makes up for a network that
        removes too much.

    Raises:
      ValueError: if `churn` is negative.
    """
    if churn < 0:
        raise ValueError(f"stochastic_heun needs churn >= 0, got {churn}")
    solver = heun(sde, score_fn)

    def step(key, x, t, s, state):
        key_noise, key = jax.random.split(key)
        level = sde.sigma(t) / sde.alpha(t)
        above = time_of_log_snr(sde, sde.log_snr(t) - 2 * math.log1p(churn))
        # Where hardly any noise is added, rounding may leave `above` below.
        higher = (t < sde.t_max) & (sde.log_snr(above) < sde.log_snr(t))
        up = jnp.where((level >= noise_min) & (level <= noise_max) & higher, above, t)
        a, b = forward_kernel(sde, t, up)
        z = jax.random.normal(key_noise, x.shape, x.dtype)
        return solver.step(key, a * x + noise_scale * b * z, up, s, state)

    return Sampler(no_state, step)


def adaptive_sde(
    sde: SDE, score_fn: ScoreFn, *, rtol: float = 0.02, atol: float = 0.0078, max_steps: int = 10_000
) -> Sampler:
    """The reverse SDE with adaptive steps (Eq. 3), two evaluations each; every example has its own.

    From one time of the grid to the next it takes as many steps as the tolerances ask for: `[t_max, t_min]` will do
    for a grid.  Its loop has no fixed length: it cannot be differentiated backwards.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`, with t `[batch]`.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step, in the units of the data; by default 1/256 of the range [-1, 1].
      max_steps: steps, rejected ones included, between two times of the grid, after which the states are NaN.

    Raises:
      ValueError: if a tolerance is not positive.
    """
    if rtol <= 0 or atol <= 0:
        raise ValueError(f"adaptive_sde needs positive tolerances, got rtol={rtol} and atol={atol}")

    def init(x: Array, t: Array) -> Array:
        # As published 0.01, but no further than the signal-to-noise ratio rises by a tenth: where the process is stiff
        # a longer one may be accepted by chance.
        tenth = t - time_of_log_snr(sde, sde.log_snr(t) + 0.1)
        return jnp.full_like(square(as_batch(x)), jnp.minimum(0.01 * (sde.t_max - sde.t_min), tenth))

    def attempt(path: Callable[[Array], tuple[Array, Array]], s: Array, carry: Any) -> Any:
        x, previous, t, noise, h, count = carry
        left = t - s
        arrived = jnp.where(h < left, t - h, s)
        (u, w), (v, w_arrived) = noise, path(arrived)
        z = (w_arrived - w) / expand(jnp.sqrt(jnp.maximum(v - u, 1e-12)), x)
        first = _euler(sde, score_fn, x, x, t, t - arrived, z)
        second = 0.5 * (first + _euler(sde, score_fn, x, first, arrived, t - arrived, z))
        scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(first), jnp.abs(previous)))
        error = jnp.sqrt(square((second - first) / scale) / math.prod(x.shape[1:]))
        # An error that is not a number ends the example: its state says so.
        accept = ~(error > 1) & (left > 0)
        new, old = (second, first, arrived, (v, w_arrived)), (x, previous, t, noise)
        moved = jax.tree.map(lambda a, b: jnp.where(expand(accept, a), a, b), new, old)
        wanted = 0.9 * (t - arrived) * jnp.maximum(error, 1e-6) ** -0.9
        h = jnp.where(left > 0, jnp.where(jnp.isfinite(wanted), wanted, left), h)
        return *moved, h, count + 1

    def step(key, x, t, s, state):
        keys = jax.random.split(key, len(x))
        first, last = sde.log_snr(t), sde.log_snr(s)

        def path(time: Array) -> tuple[Array, Array]:
            u = (sde.log_snr(time) - first) / (last - first)
            return u, jax.vmap(_brownian)(keys, u, x)

        def going(carry: Any) -> Array:
            return jnp.any(carry[2] > s) & (carry[5] < max_steps)

        each = square(x)  # Numbers made from x vary with the device as x does, under `shard_map`.
        start = x, x, jnp.full_like(each, t), (jnp.zeros_like(each), jnp.zeros_like(x)), state, 0
        x, _, t, _, h, _ = jax.lax.while_loop(going, lambda carry: attempt(path, s, carry), start)
        return jnp.where(expand(t != s, x), jnp.nan, x), h

    return Sampler(init, step)


def _euler(sde: SDE, score_fn: ScoreFn, x: Array, where: Array, t: Array, h: Array, z: Array) -> Array:
    """Euler-Maruyama of size h from x with the coefficients at (where, t); t and h are scalars or `[batch]`."""
    noise = expand(sde.diffusion(t) * root(h), x) * z
    return x - expand(h, x) * reverse_drift(sde, score_fn, where, t) + noise


def _brownian(key: Array, u: Array, like: Array) -> Array:
    """W(u), u in [0, 1], of the Brownian path of a key, in the shape of `like` (Eq. 4, 16 halvings)."""
    key_end, key = jax.random.split(key)

    def halve(level: int, carry: Any) -> Any:
        key, left, w_left, w_right = carry
        key, key_left, key_right = jax.random.split(key, 3)
        width = 0.5**level
        w = 0.5 * (w_left + w_right + jnp.sqrt(width) * jax.random.normal(key, like.shape, like.dtype))
        right = u >= left + 0.5 * width
        return (
            jnp.where(right, key_right, key_left),
            jnp.where(right, left + 0.5 * width, left),
            jnp.where(right, w, w_left),
            jnp.where(right, w_right, w),
        )

    start = key, jnp.zeros_like(u), jnp.zeros_like(like), jax.random.normal(key_end, like.shape, like.dtype)
    _, left, w_left, w_right = jax.lax.fori_loop(0, 16, halve, start)
    return w_left + (u - left) * 2.0**16 * (w_right - w_left)
