"""Samplers that follow the reverse SDE, fresh noise at every step.

For a step from t to s < t, let  r = exp(lambda_t - lambda_s) < 1  be the ratio of their
signal-to-noise ratios.  Given x_0 the process is Gaussian at s, too (Ho et al. 2020, Eqs. 6
and 7; Kingma et al. 2021, Eq. 25), and with x_0 replaced by its posterior mean

    x_s | x_t ~ N((alpha_s / alpha_t) (x_t + (1 - r) sigma_t^2 score(x_t, t)),
                  sigma_s^2 (1 - r) I).                                     (1)
"""

import jax
import jax.numpy as jnp

from score_jax.samplers.base import Sampler, no_state
from score_jax.sde import SDE, ScoreFn, reverse_drift

__all__ = ["ancestral", "euler_maruyama"]


def euler_maruyama(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Euler-Maruyama on the reverse SDE: weak order 1.

    x_s = x_t - (t - s) (f x_t - g^2 score) + g sqrt(t - s) z   (Song et al. 2021, Appendix D).
    """

    def step(key, x, t, s, state):
        z = jax.random.normal(key, x.shape, x.dtype)
        x = x - (t - s) * reverse_drift(sde, score_fn, x, t) + sde.diffusion(t) * jnp.sqrt(t - s) * z
        return x, state

    return Sampler(no_state, step)


def ancestral(sde: SDE, score_fn: ScoreFn) -> Sampler:
    """Ancestral sampling through the Gaussian posterior of x_s (Eq. 1): weak order 1.

    DDPM's sampler (Ho et al. 2020, Algorithm 2, with the posterior variance) on VP, and its
    counterpart on VE (Song et al. 2021, Eq. 47).
    """

    def step(key, x, t, s, state):
        one_minus_r = -jnp.expm1(sde.log_snr(t) - sde.log_snr(s))
        mean = (sde.alpha(s) / sde.alpha(t)) * (x + one_minus_r * sde.sigma(t) ** 2 * score_fn(x, t))
        z = jax.random.normal(key, x.shape, x.dtype)
        return mean + sde.sigma(s) * jnp.sqrt(one_minus_r) * z, state

    return Sampler(no_state, step)
