"""Samplers that follow the probability-flow ODE: no noise but the first.

In the variables  y = x / alpha  and  l = sigma / alpha  the probability-flow ODE of every
process is the same (Karras et al. 2022, Eq. 4; Song et al. 2020, "Denoising Diffusion
Implicit Models", Eq. 14):

    dy / dl = eps(x, t) = -sigma_t score(x, t).                             (1)

The linear part of the drift is gone, so a step is exact wherever eps is constant.

A stretch of it can be solved for all times at once (Shih et al. 2023, "Parallel Sampling of Diffusion Models"): from
a guess of the path, Picard's iteration  y(l_j) <- y(l_0) + sum_{i<j} (l_{i+1} - l_i) eps(x_i, t_i)  evaluates the
network at all points in parallel, and after k iterations the first k of them are those of DDIM.
"""

import jax
import jax.numpy as jnp

from score_jax.batches import call_score
from score_jax.parameterization import tweedie
from score_jax.samplers.base import Sampler, no_state, root
from score_jax.sde import SDE, ScoreFn, perturb, probability_flow_drift
from score_jax.timesteps import time_of_log_snr

__all__ = ["ddim", "dpm_solver_pp_singlestep", "euler", "heun", "picard"]


def euler(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Euler's method on the probability-flow ODE in time: order 1."""

    def step(key, x, t, s, state):
        return x - (t - s) * probability_flow_drift(sde, score_fn, x, t), state

    return Sampler(no_state, step)


def ddim(sde: SDE, score_fn: ScoreFn, *, eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2020, Eqs. 12 and 16): order 1.

    x_s = alpha_s x_0 + sigma_s (sqrt(1 - v) eps + sqrt(v) z),  v = eta^2 (1 - SNR_t / SNR_s),  with eps and x_0 the
    predictions at t.  eta = 0 is Euler's method on Eq. 1; eta = 1 is ancestral sampling; between them the noise
    that a step adds has eta times the ancestral standard deviation.

    Raises:
      ValueError: if `eta` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs 0 <= eta <= 1, got {eta}")

    def step(key, x, t, s, state):
        eps = -sde.sigma(t) * call_score(score_fn, x, t)
        x0 = (x - sde.sigma(t) * eps) / sde.alpha(t)
        variance = -(eta**2) * jnp.expm1(sde.log_snr(t) - sde.log_snr(s))  # in units of sigma_s^2
        if eta:
            z = jax.random.normal(key, x.shape, x.dtype)
            eps = root(1 - variance) * eps + root(variance) * z
        return perturb(sde, x0, eps, s), state

    return Sampler(no_state, step)


def heun(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Heun's method on Eq. 1, two evaluations a step: order 2 (Karras et al. 2022, Algorithm 1).

    y_s = y_t + (l_s - l_t)/2 (eps(x_t, t) + eps(x, s)),  where x is where Euler's step arrives at s.
    """

    def step(key, x, t, s, state):
        alpha_t, alpha_s = sde.alpha(t), sde.alpha(s)
        y, dl = x / alpha_t, sde.sigma(s) / alpha_s - sde.sigma(t) / alpha_t
        slope = -sde.sigma(t) * call_score(score_fn, x, t)
        slope_s = -sde.sigma(s) * call_score(score_fn, alpha_s * (y + dl * slope), s)
        return alpha_s * (y + 0.5 * dl * (slope + slope_s)), state

    return Sampler(no_state, step)


def dpm_solver_pp_singlestep(sde: SDE, score_fn: ScoreFn, *, ratio: float = 0.5) -> Sampler:
    """DPM-Solver++(2S), two evaluations a step (Lu et al. 2022, "DPM-Solver++", Algorithm 1): order 2.

    x_s = alpha_s D + sigma_s (x_t - alpha_t D) / sigma_t,  D = (1 - 1/(2 r)) D_t + 1/(2 r) D_m,  where D_t and D_m are
    the posterior means at t and at the part r of the step in log(alpha/sigma), where the same with D_t for D leads.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      ratio: r.

    Raises:
      ValueError: if `ratio` is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"dpm_solver_pp_singlestep needs 0 < ratio <= 1, got {ratio}")

    def advance(x, t, s, data):
        return perturb(sde, data, (x - sde.alpha(t) * data) / sde.sigma(t), s)

    def step(key, x, t, s, state):
        middle = time_of_log_snr(sde, (1 - ratio) * sde.log_snr(t) + ratio * sde.log_snr(s))
        here = tweedie(sde, score_fn, x, t)
        there = tweedie(sde, score_fn, advance(x, t, middle, here), middle)
        return advance(x, t, s, here + (there - here) / (2 * ratio)), state

    return Sampler(no_state, step)


def picard(
    sde: SDE, score_fn: ScoreFn, *, num_points: int = 16, tolerance: float = 1e-3, max_iterations: int | None = None
) -> Sampler:
    """DDIM in parallel (ParaDiGMS, Shih et al. 2023, with blocks for its sliding window): order 1.

    One step from t to s takes `num_points` steps of DDIM, equally spaced in the log signal-to-noise ratio, all at
    once: for machines that evaluate a larger batch in the same time.  The score is mapped over a leading axis of
    `num_points`, which can be sharded.  The iteration has no fixed length: it cannot be differentiated backwards.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      num_points: DDIM's steps inside one step.
      tolerance: the iteration ends when no example of the batch moves by more, root mean square over dimensions and
        relative to its noise sigma: how many there are depends on the others.
      max_iterations: iterations after which it ends in any case; None for `num_points`, where it is exact.

    Raises:
      ValueError: if there is no point.
    """
    if num_points < 1:
        raise ValueError(f"picard needs num_points >= 1, got {num_points}")
    most = num_points if max_iterations is None else max_iterations

    def step(key, x, t, s, state):
        inner = time_of_log_snr(sde, jnp.linspace(sde.log_snr(t), sde.log_snr(s), num_points + 1))
        ts = inner.at[0].set(t).at[-1].set(s)
        wide = (-1,) + (1,) * x.ndim
        alpha, sigma = sde.alpha(ts).reshape(wide), sde.sigma(ts).reshape(wide)
        dl = jnp.diff(sigma / alpha, axis=0)

        def iterate(carry):
            path, _, count = carry
            eps = -sigma[:-1] * jax.vmap(lambda x, t: call_score(score_fn, x, t))(path[:-1], ts[:-1])
            y = jnp.concatenate([jnp.zeros_like(path[:1]), jnp.cumsum(dl * eps, axis=0)])
            new = alpha * (path[:1] / alpha[:1] + y)
            moved = ((new - path) / sigma) ** 2
            change = jnp.sqrt(jnp.max(jnp.mean(moved, axis=range(2, moved.ndim)), initial=0.0))
            return new, change, count + 1

        # The first guess: no noise is removed.
        start = jnp.broadcast_to(x[None], (num_points + 1, *x.shape)) * (alpha / alpha[:1])
        # Made from x, so that under `shard_map` it varies with the device, as the change will.
        carry = start, jnp.max(jnp.full_like(x, jnp.inf), initial=0.0), 0
        path, _, _ = jax.lax.while_loop(lambda c: (c[1] > tolerance) & (c[2] < most), iterate, carry)
        return path[-1], state

    return Sampler(no_state, step)
