"""Score matching: objectives whose minimiser is the score.

All stand for the Fisher divergence  J(s) = 1/2 E || s(x) - grad log p(x) ||^2,  which needs the very
score that is sought.  Integration by parts removes it (Hyvarinen 2005, Theorem 1): up to a constant,

    J(s) = E[ tr(ds/dx) + 1/2 |s|^2 ].                                      (1)

With random directions v, E[v v^T] = I, the trace costs one Jacobian-vector product (Song et al. 2019,
"Sliced Score Matching", Eqs. 7 and 8), here plain and variance-reduced,

    J(s) = E[ v^T (ds/dx) v + 1/2 (v^T s)^2 ]  =  E[ v^T (ds/dx) v + 1/2 |s|^2 ],    (2)

or, by central differences, two evaluations and no derivative (Pang et al. 2020, "Efficient Learning of
Generative Models via Finite-Difference Score Matching"): with s+ = s(x + h v) and s- = s(x - h v),

    J(s) = E[ v^T (s+ - s-) / (2 h) + 1/8 |s+ + s-|^2 ] + O(h^2).           (3)

Noise removes the trace altogether.  Denoising score matching (Vincent 2011, Eq. 11; over a continuum of
levels, Song et al. 2021, Eq. 7): with x_t = alpha x_0 + sigma eps,

    L(t) = w(t)/2 E || s(x_t, t) - grad log p(x_t | x_0) ||^2
         = w(t)/2 E || s(x_t, t) + eps/sigma ||^2,                          (4)

which differs from the Fisher divergence  w(t)/2 E || s - grad log p_t ||^2  by a constant.
The weight w(t) = sigma^2 makes (4) the plain regression of eps (Ho et al. 2020); w(t) = g^2 bounds
the negative log-likelihood (Song et al. 2021, "Maximum Likelihood Training of Score-Based Diffusion
Models", Theorem 1).

The classifier that guides a score (`score_jax.guidance`) is fitted to noisy inputs, too (Dhariwal & Nichol 2021,
Section 4): the true log p(y | x_t) minimises

    E[ -log p(y | x_t) ].                                                   (5)

An unconditional score is `fn(x)`.  Every loss is one number an example, `[batch]`, in single precision at least.  Data
that are not floating point or have no batch axis, and a score that has not the shape of x, are a `ValueError`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_batch, as_floating, as_time, call_score, check_shape, dot, expand, square
from score_jax.divergence import Field, check_number, draw_probes, exact_divergence
from score_jax.sde import SDE, ScoreFn, perturb

__all__ = [
    "cross_entropy",
    "denoising_score_matching",
    "edm_weighting",
    "exact_score_matching",
    "finite_difference_score_matching",
    "likelihood_weighting",
    "ncsn_score_matching",
    "perturbed_sliced_score_matching",
    "sliced_score_matching",
    "variance_weighting",
    "vincent_score_matching",
]


def exact_score_matching(fn: Field, x: Array) -> Array:
    """Hyvarinen's objective (Eq. 1), one Jacobian-vector product a dimension.

    Args:
      fn: the score, a vector field on batches, rows independent.
      x: data, `[batch, *event]`.

    Returns:
      `[batch]`.
    """
    score, divergence = exact_divergence(fn, x)
    return divergence + 0.5 * square(score)


def sliced_score_matching(
    key: Array,
    fn: Field,
    x: Array,
    *,
    num_projections: int = 1,
    variance_reduced: bool = True,
    projection: str = "rademacher",
) -> Array:
    """The sliced objective (Eq. 2), one Jacobian-vector product a projection.

    Args:
      key: a PRNG key for the projections.
      fn: the score, a vector field on batches, rows independent.
      x: data, `[batch, *event]`.
      num_projections: random directions averaged over, each example with its own.
      variance_reduced: |s|^2 in place of its projection (the second form of Eq. 2).
      projection: `rademacher`, `gaussian`, or `sphere`, of radius sqrt(d).

    Returns:
      `[batch]`.

    Raises:
      ValueError: for fewer than 1 projection, or an unknown law of them.
    """

    x = as_batch(x)

    def along(v: Array) -> Array:
        score, tangent = jax.jvp(fn, (x,), (v,))
        check_shape(score, x)
        return dot(v, tangent) + 0.5 * (square(score) if variance_reduced else dot(v, score) ** 2)

    return _mean_over_projections(key, along, x, num_projections, projection)


def finite_difference_score_matching(
    key: Array,
    fn: Field,
    x: Array,
    *,
    num_projections: int = 1,
    step: float = 0.01,
    projection: str = "rademacher",
) -> Array:
    """The sliced objective by central differences (Eq. 3): two evaluations a projection, no derivative.

    Args:
      key: a PRNG key for the projections.
      fn: the score, a vector field on batches, rows independent.
      x: data, `[batch, *event]`.
      num_projections: random directions averaged over, each example with its own.
      step: h of Eq. 3, in units of x; the bias grows as its square, the rounding error as its inverse.
      projection: `rademacher`, `gaussian`, or `sphere`, of radius sqrt(d).

    Returns:
      `[batch]`.

    Raises:
      ValueError: for fewer than 1 projection, an unknown law of them, or a step that is not positive.
    """
    if step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    x = as_batch(x)

    def along(v: Array) -> Array:
        ahead, behind = check_shape(fn(x + step * v), x), fn(x - step * v)
        return dot(v, ahead - behind) / (2 * step) + square(ahead + behind) / 8

    return _mean_over_projections(key, along, x, num_projections, projection)


def _mean_over_projections(
    key: Array, along: Callable[[Array], Array], x: Array, num_projections: int, projection: str
) -> Array:
    """The mean of `along(v) [batch]` over random directions v in the shape of `x`."""
    check_number("num_projections", num_projections)
    keys = jax.random.split(key, num_projections)
    return jnp.mean(jax.vmap(lambda k: along(draw_probes(k, x.shape, projection, x.dtype)))(keys), axis=0)


def vincent_score_matching(key: Array, fn: Field, x: Array, *, sigma: float | Array) -> Array:
    """Denoising at one noise level (Vincent 2011, Eq. 11): the score of the data plus N(0, sigma^2 I).

    1/2 |fn(x + sigma eps) + eps/sigma|^2.

    Args:
      key: a PRNG key for the noise.
      fn: the score, a vector field on batches.
      x: data, `[batch, *event]`.
      sigma: the noise's standard deviation, a scalar or `[batch]`.

    Returns:
      `[batch]`.
    """
    x = as_batch(x)
    noise = jax.random.normal(key, x.shape, x.dtype)
    wide = expand(sigma, x)
    return 0.5 * square(wide * check_shape(fn(x + wide * noise), x) + noise) / sigma**2


def ncsn_score_matching(key: Array, score_fn: ScoreFn, x: Array, sigmas: ArrayLike) -> Array:
    """NCSN's objective: denoising at a level drawn for each example, weighted by sigma^2 (Song & Ermon 2019, Eq. 6).

    1/2 |sigma score_fn(x + sigma eps, sigma) + eps|^2.

    Args:
      key: a PRNG key for the levels and the noise.
      score_fn: `score_fn(x, sigma)`, with sigma `[batch]`.
      x: data, `[batch, *event]`.
      sigmas: the ladder of noise levels, `[num_levels]`.

    Returns:
      `[batch]`.
    """
    x, (key_level, key_noise) = as_batch(x), jax.random.split(key)
    sigma = jax.random.choice(key_level, jnp.asarray(sigmas), (len(x),))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    wide = expand(sigma, x)
    return 0.5 * square(wide * call_score(score_fn, x + wide * noise, sigma) + noise)


def variance_weighting(sde: SDE, t: ArrayLike) -> Array:
    """w(t) = sigma_t^2: every noise level counts alike (Song & Ermon 2019, Section 4.2)."""
    return sde.sigma(t) ** 2


def likelihood_weighting(sde: SDE, t: ArrayLike) -> Array:
    """w(t) = g(t)^2: the objective bounds the negative log-likelihood."""
    return sde.diffusion(t) ** 2


def edm_weighting(sde: SDE, t: ArrayLike, *, sigma_data: float = 0.5) -> Array:
    """EDM's weighting of the posterior mean D: the loss (Eq. 4) is  lambda/2 |D - x_0|^2 (Karras et al. 2022, Table 1).

    With the noise level s = sigma/alpha,  lambda = (s^2 + sigma_data^2) / (s sigma_data)^2:  a preconditioned network
    that is zero, as it begins, has the same loss at every level, 1/2 a dimension of data of that standard deviation.
    """
    # The score is (alpha D - x) / sigma^2, hence w = lambda sigma^2 s^2.
    return sde.sigma(t) ** 2 * (1 + jnp.exp(-sde.log_snr(t)) / sigma_data**2)


def denoising_score_matching(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x0: Array,
    t: ArrayLike,
    *,
    weight: Callable[[SDE, ArrayLike], Array] = variance_weighting,
) -> Array:
    """The denoising objective (Eq. 4) of each example: half a sum over dimensions.

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
    x0 = as_batch(x0, "x0")
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    sigma = sde.sigma(t)
    # Scaled by sigma, so that nothing of the size 1/sigma is ever squared.
    score = call_score(score_fn, perturb(sde, x0, noise, t), t)
    residual = expand(sigma, x0) * score + noise
    return 0.5 * (weight(sde, t) / sigma**2) * square(residual)


def perturbed_sliced_score_matching(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x0: Array,
    t: ArrayLike,
    *,
    weight: Callable[[SDE, ArrayLike], Array] = variance_weighting,
    num_projections: int = 1,
    variance_reduced: bool = True,
    projection: str = "rademacher",
) -> Array:
    """Sliced score matching (Eq. 2) of the law of x_t, weighted: w(t) times Eq. 2 at x_t.

    What denoising needs, a perturbation whose own score is known, it does not need (Song et al.
    2021, Appendix B).

    Args:
      key: a PRNG key for the noise and the projections.
      sde: the process.
      score_fn: `score_fn(x, t)`, in the shape of `x`.
      x0: data, `[batch, *event]`.
      t: scalar or `[batch]`.
      weight: `weight(sde, t)`, in the shape of `t`.
      num_projections: as in `sliced_score_matching`, and so the rest.

    Returns:
      `[batch]`.

    Raises:
      ValueError: as `sliced_score_matching` does.
    """
    key_noise, key_projection = jax.random.split(key)
    x0, t = as_batch(x0, "x0"), as_time(t)
    loss = sliced_score_matching(
        key_projection,
        lambda x: call_score(score_fn, x, t),
        perturb(sde, x0, jax.random.normal(key_noise, x0.shape, x0.dtype), t),
        num_projections=num_projections,
        variance_reduced=variance_reduced,
        projection=projection,
    )
    return weight(sde, t) * loss


def cross_entropy(
    key: Array, sde: SDE, log_likelihood: Callable[[Array, Array], Array], x0: Array, t: ArrayLike
) -> Array:
    """The cross-entropy of a classifier of noisy inputs (Eq. 5), in nats.

    Args:
      key: a PRNG key for the noise.
      sde: the process.
      log_likelihood: `log_likelihood(x, t) -> [batch]`, log p(y | x_t = x); it closes over the labels y.
      x0: data, `[batch, *event]`.
      t: scalar or `[batch]`.

    Returns:
      `[batch]`.
    """
    x0, t = as_floating(x0, "x0"), as_time(t)
    return -log_likelihood(perturb(sde, x0, jax.random.normal(key, x0.shape, x0.dtype), t), t)
