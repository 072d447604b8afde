"""Score matching: objectives whose minimiser is the score.

Denoising score matching (Vincent 2011, Eq. 11; over a continuum of levels, Song et al.
2021, Eq. 7).  With x_t = alpha x_0 + sigma eps,

    L(t) = w(t)/2 E || s(x_t, t) - grad log p(x_t | x_0) ||^2
         = w(t)/2 E || s(x_t, t) + eps/sigma ||^2,                          (1)

which differs from the Fisher divergence  w(t)/2 E || s - grad log p_t ||^2  by a constant.
The weight w(t) = sigma^2 makes (1) the plain regression of eps (Ho et al. 2020);
w(t) = g^2 bounds the negative log-likelihood (Song et al. 2021, "Maximum Likelihood
Training of Score-Based Diffusion Models", Theorem 1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.sde import SDE, ScoreFn, expand, perturb

__all__ = ["denoising_score_matching", "likelihood_weighting", "variance_weighting"]


def variance_weighting(sde: SDE, t: ArrayLike) -> Array:
    """w(t) = sigma_t^2: every noise level counts alike (Song & Ermon 2019, Section 4.2)."""
    return sde.sigma(t) ** 2


def likelihood_weighting(sde: SDE, t: ArrayLike) -> Array:
    """w(t) = g(t)^2: the objective bounds the negative log-likelihood."""
    return sde.diffusion(t) ** 2


def denoising_score_matching(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x0: Array,
    t: ArrayLike,
    *,
    weight: Callable[[SDE, ArrayLike], Array] = variance_weighting,
) -> Array:
    """The denoising objective (Eq. 1) of each example: half a sum over dimensions.

    Args:
      key: a PRNG key for the noise.
      sde: the process.
      score_fn: `score_fn(x, t)`, in the shape of `x`.
      x0: data, `[batch, *event]`.
      t: scalar or `[batch]`.
      weight: `weight(sde, t)`, in the shape of `t`.

    Returns:
      `[batch]`.
    """
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    sigma = sde.sigma(t)
    # Scaled by sigma, so that nothing of the size 1/sigma is ever squared.
    residual = expand(sigma, x0) * score_fn(perturb(sde, x0, noise, t), jnp.asarray(t)) + noise
    return 0.5 * (weight(sde, t) / sigma**2) * jnp.sum(residual**2, axis=range(1, x0.ndim))
