"""Samplers that follow the probability-flow ODE: no noise but the first.

In the variables  y = x / alpha  and  l = sigma / alpha  the probability-flow ODE of every
process is the same (Karras et al. 2022, Eq. 4; Song et al. 2020, "Denoising Diffusion
Implicit Models", Eq. 14):

    dy / dl = eps(x, t) = -sigma_t score(x, t).                             (1)

The linear part of the drift is gone, so a step is exact wherever eps is constant.
"""

import jax
import jax.numpy as jnp

from score_jax.samplers.base import Sampler, no_state
from score_jax.sde import SDE, ScoreFn, probability_flow_drift

__all__ = ["ddim", "euler", "heun"]


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
        eps = -sde.sigma(t) * score_fn(x, t)
        x0 = (x - sde.sigma(t) * eps) / sde.alpha(t)
        variance = -(eta**2) * jnp.expm1(sde.log_snr(t) - sde.log_snr(s))  # in units of sigma_s^2
        if eta:
            z = jax.random.normal(key, x.shape, x.dtype)
            eps = jnp.sqrt(1 - variance) * eps + jnp.sqrt(variance) * z
        return sde.alpha(s) * x0 + sde.sigma(s) * eps, state

    return Sampler(no_state, step)


def heun(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Heun's method on Eq. 1, two evaluations a step: order 2 (Karras et al. 2022, Algorithm 1).

    y_s = y_t + (l_s - l_t)/2 (eps(x_t, t) + eps(x, s)),  where x is where Euler's step arrives at s.
    """

    def step(key, x, t, s, state):
        alpha_t, alpha_s = sde.alpha(t), sde.alpha(s)
        y, dl = x / alpha_t, sde.sigma(s) / alpha_s - sde.sigma(t) / alpha_t
        slope = -sde.sigma(t) * score_fn(x, t)
        slope_s = -sde.sigma(s) * score_fn(alpha_s * (y + dl * slope), s)
        return alpha_s * (y + 0.5 * dl * (slope + slope_s)), state

    return Sampler(no_state, step)
