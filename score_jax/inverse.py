"""Inverse problems: data from a measurement, with the score as the prior.

Of  y = A x_0 + noise_std n,  n ~ N(0, I),  the posterior follows the same reverse equations as the prior, with

    grad log p(x_t | y) = score(x_t, t) + grad log p(y | x_t).              (1)

The last term is an integral over p(x_0 | x_t).  With a Gaussian in its place, of the mean m = E[x_0 | x_t] (Tweedie;
`parameterization`, Eq. 3) and a covariance V, both from the score, and J = dm/dx_t,

    grad log p(y | x_t) = J^T A^T (noise_std^2 I + A V A^T)^-1 (y - A m),   (2)

    V = 0                                                      DPS (Chung et al. 2023, Theorem 1),          (3)
    V = r^2 I,  1/r^2 = 1/data_std^2 + alpha^2/sigma^2         PiGDM (Song et al. 2023, Eqs. 7 and 8),      (4)
    V = sigma^2/alpha J, the covariance of p(x_0 | x_t)        MMPS (Rozet et al. 2024, Eqs. 10 to 12).     (5)

Eq. 2 takes V for constant.  Where the data are Gaussian of covariance C it is, and p(x_0 | x_t) is Gaussian: MMPS is
exact, and so is PiGDM for C = data_std^2 I.

DPS has in practice a step size in place of 1/noise_std^2.  It may move the posterior mean, by

    -scale grad |y - A m|,  which adds  -scale alpha/sigma^2 grad |y - A m|  to the score,                  (6)

or, as published (Algorithm 1 there), the state after each step from t to s of a sampler of the prior:

    x_s <- x_s - step_size grad_{x_t} |y - A m(x_t, t)|.                                                    (7)

Data in a range have their posterior means in it, too.  An estimate need not: where the noise is large a network's J is
neither symmetric nor positive (the data are x_t times 1/alpha, and so are its errors), the solution of Eq. 2 may be of
any size, and from where it puts x_t the network knows no way back.  `bounds` clips

    E[x_0 | x_t, y] = (x_t + sigma^2 grad log p(x_t | y)) / alpha            (8)

to the range, at every evaluation; where it is inside already, nothing changes.

On a step of ancestral sampling (6) acts as (7) with  step_size = scale alpha_s (1 - r),  r = SNR_t / SNR_s: the more
steps, the less does each move, where (7) as often moves as far.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.parameterization import tweedie
from score_jax.samplers.base import Sampler, State
from score_jax.sde import SDE, ScoreFn, dot, expand, square

__all__ = ["dps", "dps_steps", "mmps", "pigdm"]

Forward = Callable[[Array], Array]
Bounds = tuple[float, float] | None


def dps(
    sde: SDE,
    score_fn: ScoreFn,
    y: Array,
    forward: Forward,
    *,
    noise_std: float | Array,
    scale: float | None = None,
    bounds: Bounds = None,
) -> ScoreFn:
    """The posterior's score by diffusion posterior sampling (Chung et al. 2023): Eqs. 2 and 3, or 6.

    Eq. 3 is stiff where noise_std is far below sigma: it takes steps that change sigma^2 by less than noise_std^2.

    Args:
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`.
      y: measurements, `[batch, *measurement]`.
      forward: A as a function of a batch, `[batch, *event]` to the shape of `y`, rows independent; one that is not
        linear is replaced by its derivative at the posterior mean.
      noise_std: the standard deviation of the noise in `y`.
      scale: that of Eq. 6, which does not look at noise_std; None for Eq. 3.  The published step size is another,
        see `dps_steps`.
      bounds: `(low, high)`, the range of the data, to which Eq. 8 is clipped; None for data without one.

    Raises:
      ValueError: if noise_std is negative, or zero without a scale; when called, if `y` does not fit.
    """
    _check_noise(noise_std)
    if scale is None and isinstance(noise_std, int | float) and noise_std == 0:
        raise ValueError("dps divides by noise_std^2, which is 0: give it a scale instead")

    def posterior_score(x: Array, t: Array) -> Array:
        at = _linearize(sde, score_fn, y, forward, x, t)
        if scale is None:
            return at.score + at.pull_back(at.transpose(at.residual / noise_std**2))
        return at.score + scale * expand(sde.alpha(t) / sde.sigma(t) ** 2, x) * _descent(at)

    return _within(sde, posterior_score, bounds)


def dps_steps(
    sde: SDE, score_fn: ScoreFn, sampler: Sampler, y: Array, forward: Forward, *, step_size: float | Array
) -> Sampler:
    """Diffusion posterior sampling as published (Chung et al. 2023, Algorithm 1): Eq. 7, after a sampler of the prior.

    Args:
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`.
      sampler: of the prior; published, `ancestral` with 1,000 steps.
      y: as in `dps`, and so `forward`.
      forward: A.
      step_size: of Eq. 7, zeta' of the published code.

    Raises:
      ValueError: when it steps, if `y` does not fit.
    """

    def step(key: Array, x: Array, t: Array, s: Array, state: State) -> tuple[Array, State]:
        moved, state = sampler.step(key, x, t, s, state)
        return moved + step_size * _descent(_linearize(sde, score_fn, y, forward, x, t)), state

    return Sampler(sampler.init, step)


def _descent(at: "_Linearized") -> Array:
    """-grad |y - A m|."""
    size = jnp.sqrt(jnp.maximum(square(at.residual), jnp.finfo(at.score.dtype).tiny))
    return at.pull_back(at.transpose(at.residual / expand(size, at.residual)))


def pigdm(
    sde: SDE,
    score_fn: ScoreFn,
    y: Array,
    forward: Forward,
    *,
    noise_std: float | Array,
    data_std: float | Array = 1.0,
    iterations: int = 5,
    bounds: Bounds = None,
) -> ScoreFn:
    """The posterior's score by pseudoinverse guidance (Song et al. 2023): Eqs. 2 and 4.

    Args:
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`.
      y: as in `dps`, and so `forward`.
      forward: A.
      noise_std: the standard deviation of the noise in `y`; may be 0.
      data_std: that of the data, in each coordinate.
      iterations: of conjugate gradients on Eq. 2; one is enough where A A^T is the identity, and for a mask, whose
        A A^T is diag(mask), where y is 0 where it hides.
      bounds: `(low, high)`, the range of the data, to which Eq. 8 is clipped; None for data without one.

    Raises:
      ValueError: if noise_std is negative; when called, if `y` does not fit.
    """

    def covariance(v: Array, push: Forward, t: Array) -> Array:
        return expand(posterior_variance(sde, t, data_std), v) * v

    return _within(sde, _moment_matching(sde, score_fn, y, forward, noise_std, covariance, iterations), bounds)


def mmps(
    sde: SDE,
    score_fn: ScoreFn,
    y: Array,
    forward: Forward,
    *,
    noise_std: float | Array,
    iterations: int = 2,
    bounds: Bounds = None,
) -> ScoreFn:
    """The posterior's score by moment matching (Rozet et al. 2024): Eqs. 2 and 5.

    Each iteration costs a Jacobian-vector product of the score, the last step a vector-Jacobian product; the solution
    is not differentiated.  The Jacobian of an exact score is symmetric and J positive; a network's is neither where the
    noise is large, and without `bounds` a few of its samples diverge, the more the more iterations there are.

    Args:
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`.
      y: as in `dps`, and so `forward`.
      forward: A.
      noise_std: the standard deviation of the noise in `y`; may be 0.
      iterations: of conjugate gradients on Eq. 2.
      bounds: `(low, high)`, the range of the data, to which Eq. 8 is clipped; None for data without one.

    Raises:
      ValueError: if noise_std is negative; when called, if `y` does not fit.
    """

    def covariance(v: Array, push: Forward, t: Array) -> Array:
        return expand(sde.sigma(t) ** 2 / sde.alpha(t), v) * push(v)

    return _within(sde, _moment_matching(sde, score_fn, y, forward, noise_std, covariance, iterations), bounds)


def _moment_matching(
    sde: SDE,
    score_fn: ScoreFn,
    y: Array,
    forward: Forward,
    noise_std: float | Array,
    covariance: Callable[[Array, Forward, Array], Array],
    iterations: int,
) -> ScoreFn:
    """Eq. 2 for V v = `covariance(v, push, t)`, with `push` the product with J."""
    _check_noise(noise_std)

    def posterior_score(x: Array, t: Array) -> Array:
        at = _linearize(sde, score_fn, y, forward, x, t)

        def product(v: Array) -> Array:
            return noise_std**2 * v + at.forward(covariance(at.transpose(v), at.push, t))

        return at.score + at.pull_back(at.transpose(_solve(product, at.residual, iterations, noise_std**2)))

    return posterior_score


def _within(sde: SDE, score_fn: ScoreFn, bounds: Bounds) -> ScoreFn:
    """The score whose posterior mean (Eq. 8) is clipped to the bounds, if there are any."""
    if bounds is None:
        return score_fn
    low, high = bounds

    def bounded(x: Array, t: Array) -> Array:
        score = score_fn(x, t)
        mean = tweedie(sde, lambda x, t: score, x, t)
        clipped = (expand(sde.alpha(t), x) * jnp.clip(mean, low, high) - x) / expand(sde.sigma(t) ** 2, x)
        return jnp.where((low <= mean) & (mean <= high), score, clipped)

    return bounded


def posterior_variance(sde: SDE, t: Array, data_std: float | Array) -> Array:
    """r^2 of Eq. 4, in the shape of `t`."""
    return data_std**2 / (1 + data_std**2 * jnp.exp(sde.log_snr(t)))


class _Linearized(NamedTuple):
    """What Eq. 2 is made of: the prior's score, y - A m, A, A^T, J and J^T."""

    score: Array
    residual: Array
    forward: Forward
    transpose: Forward
    push: Forward
    pull_back: Forward


def _linearize(sde: SDE, score_fn: ScoreFn, y: Array, forward: Forward, x: Array, t: Array) -> _Linearized:
    def denoise(x: Array) -> tuple[Array, Array]:
        score = score_fn(x, t)
        return tweedie(sde, lambda x, t: score, x, t), score

    # Forward products, where they will do: on CPUs XLA's backward convolutions are slow inside a scan.
    mean, push, score = jax.linearize(denoise, x, has_aux=True)
    pull_back = jax.linear_transpose(push, x)
    predicted, linear = jax.linearize(forward, mean)
    check_measurement(y, predicted)
    transpose = jax.linear_transpose(linear, mean)
    return _Linearized(score, y - predicted, linear, lambda v: transpose(v)[0], push, lambda v: pull_back(v)[0])


def check_measurement(y: Array, predicted: Array) -> None:
    """Raise a `ValueError` unless a measurement has the shape of what `forward` returns."""
    if y.shape != predicted.shape:
        raise ValueError(f"y must have the shape of forward(x), {predicted.shape}, but has {y.shape}")


def _check_noise(noise_std: float | Array) -> None:
    if isinstance(noise_std, int | float) and noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}")


def _solve(product: Forward, b: Array, iterations: int, floor: float | Array) -> Array:
    """Conjugate gradients from zero for `product(v) = b`, each example a system of its own.

    An example stops where its residual has vanished, or where v . product(v) is clearly below floor |v|^2, the
    noise's part: the covariance of an inexact score need not be positive.
    """
    tolerance = 1e-12 * square(b)

    def body(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, residual, direction = carry
        image, before = product(direction), square(residual)
        curvature = dot(direction, image)
        going = (curvature > 0.5 * floor * square(direction)) & (before > tolerance)
        step = expand(jnp.where(going, before / jnp.where(going, curvature, 1.0), 0.0), b)
        v, residual = v + step * direction, residual - step * image
        turn = expand(jnp.where(going, square(residual) / jnp.where(going, before, 1.0), 0.0), b)
        return v, residual, residual + turn * direction

    return jax.lax.fori_loop(0, iterations, body, (jnp.zeros_like(b), b, b))[0]
