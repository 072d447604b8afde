"""Distillation: networks that follow the probability flow in a few large steps.

In the variables  y = x / alpha  and  l = sigma / alpha  the flow is  dy/dl = eps(x, t) = -sigma score(x, t)  on every
process (`samplers.deterministic`, Eq. 1), and DDIM's step from t to s,

    y_s = y_t + (l_s - l_t) eps(x_t, t),                                    (1)

is exact only where eps does not change on the way.  A network is distilled when Eq. 1 holds for a jump all the same:
when its eps(x_t, t) is the mean slope of the flow up to where it ends,

    eps(x_t, t) = (y_s - y_t) / (l_s - l_t).                                (2)

It is given as a score, -eps/sigma, like any other, and learned by the loss of denoising score matching
(`losses`, Eq. 4) with Eq. 2 in the place of the noise.  In every method a jump is made of two, by way of the time m,
and its slope is the mean of theirs,

    r eps_1 + (1 - r) eps_2,    r = (l_m - l_t) / (l_s - l_t),              (3)

where the difference of y_s and y_t would be one of rounding if the levels are close.  What the two are, tells the
methods apart:

- progressive distillation: two steps of a teacher (Salimans & Ho 2022, Algorithm 2), so that the student takes one
  step for two, and is a teacher itself;
- consistency: a short one, and the student's own from there to the last time (Song et al. 2023), so that one jump
  from any time ends there.  The short one is on the teacher's path (distillation, Algorithm 2), or, without a teacher,
  on the straight line from the data through the noise (training, Algorithm 3), which has the flow for its mean: its
  slope is the noise.  The second is the student's as it is, not an average of before (Song & Dhariwal 2023,
  "Improved Techniques for Training Consistency Models", Section 3.2).

The weighting by the variance would be a bad one: where there is most noise, and the longest jump begins, eps hardly
tells what image it leads to.

Students of the first kind are sampled by `ddim` on the student's grid, of the second by `samplers.consistency`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_batch, as_precise, call_score, expand, square
from score_jax.losses import edm_weighting
from score_jax.sde import SDE, ScoreFn, perturb

__all__ = ["consistency_distillation", "consistency_training", "progressive_distillation"]

Weight = Callable[[SDE, ArrayLike], Array]


def progressive_distillation(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    teacher: ScoreFn,
    x0: Array,
    ts: Array | Sequence[float],
    *,
    weight: Weight = edm_weighting,
) -> Array:
    """The loss of a student that takes one step of DDIM where its teacher takes two (Salimans & Ho 2022, Algorithm 2).

    Args:
      key: a PRNG key for the noise and, for each example, the step.
      sde: the process.
      score_fn: the student, `score_fn(x, t)`, which usually starts as a copy of the teacher.
      teacher: a score.
      x0: data, `[batch, *event]`.
      ts: the teacher's grid, `[2 n + 1]` decreasing times; the student's is `ts[::2]`.
      weight: `weight(sde, t)`, in the shape of `t`; of the error of the posterior mean `edm_weighting` is
        SNR + 1/sigma_data^2, the published "SNR + 1" where the data have variance 1.

    Returns:
      `[batch]`.

    Raises:
      ValueError: if the number of steps of `ts` is not even.
    """
    if len(ts) < 3 or len(ts) % 2 == 0:
        raise ValueError(f"progressive distillation needs a grid of an even number of steps, got {len(ts) - 1}")
    x0 = as_batch(x0, "x0")
    ts, (key_step, key_noise) = as_precise(ts, x0), jax.random.split(key)
    i = 2 * jax.random.randint(key_step, x0.shape[:1], 0, len(ts) // 2)
    t, middle, s = ts[i], ts[i + 1], ts[i + 2]
    x = perturb(sde, x0, jax.random.normal(key_noise, x0.shape, x0.dtype), t)
    first = _slope(sde, teacher, x, t)
    second = _slope(sde, teacher, _advance(sde, x, first, t, middle), middle)
    return _regression(sde, score_fn, x, _mean(sde, first, second, t, middle, s), t, weight)


def consistency_distillation(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    teacher: ScoreFn,
    x0: Array,
    ts: Array | Sequence[float],
    *,
    weight: Weight = edm_weighting,
) -> Array:
    """The loss of a student whose jumps from two points of a teacher's path end alike (Song et al. 2023, Algorithm 2).

    The second point is one step of Heun's method below the first; the jump from there is not differentiated.

    Args:
      key: as in `progressive_distillation`, and so all others, but for
      ts: `[n + 1]` decreasing times; jumps end at the last.

    Returns:
      `[batch]`.
    """

    def heun(x: Array, noise: Array, t: Array, middle: Array) -> Array:
        slope = _slope(sde, teacher, x, t)
        return 0.5 * (slope + _slope(sde, teacher, _advance(sde, x, slope, t, middle), middle))

    return _consistency(key, sde, score_fn, x0, ts, heun, weight)


def consistency_training(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x0: Array,
    ts: Array | Sequence[float],
    *,
    weight: Weight = edm_weighting,
) -> Array:
    """`consistency_distillation` without a teacher (Song et al. 2023, Algorithm 3), which is right for many steps only.

    Args:
      key: as there, and so all others.

    Returns:
      `[batch]`.
    """
    return _consistency(key, sde, score_fn, x0, ts, lambda x, noise, t, middle: noise, weight)


def _consistency(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x0: Array,
    ts: Array | Sequence[float],
    short: Callable[..., Array],
    weight: Weight,
) -> Array:
    x0 = as_batch(x0, "x0")
    ts, (key_step, key_noise) = as_precise(ts, x0), jax.random.split(key)
    i = jax.random.randint(key_step, x0.shape[:1], 0, len(ts) - 1)
    t, middle, noise = ts[i], ts[i + 1], jax.random.normal(key_noise, x0.shape, x0.dtype)
    x = perturb(sde, x0, noise, t)
    first = short(x, noise, t, middle)
    second = jax.lax.stop_gradient(_slope(sde, score_fn, _advance(sde, x, first, t, middle), middle))
    return _regression(sde, score_fn, x, _mean(sde, first, second, t, middle, ts[-1]), t, weight)


def _slope(sde: SDE, score_fn: ScoreFn, x: Array, t: Array) -> Array:
    return -expand(sde.sigma(t), x) * call_score(score_fn, x, t)


def _length(sde: SDE, t: Array, s: Array) -> Array:
    return jnp.exp(-0.5 * sde.log_snr(s)) - jnp.exp(-0.5 * sde.log_snr(t))


def _advance(sde: SDE, x: Array, slope: Array, t: Array, s: Array) -> Array:
    """Eq. 1."""
    return expand(sde.alpha(s), x) * (x / expand(sde.alpha(t), x) + expand(_length(sde, t, s), x) * slope)


def _mean(sde: SDE, first: Array, second: Array, t: Array, middle: Array, s: Array) -> Array:
    """Eq. 3."""
    r = expand(_length(sde, t, middle) / _length(sde, t, s), first)
    return r * first + (1 - r) * second


def _regression(sde: SDE, score_fn: ScoreFn, x: Array, slope: Array, t: Array, weight: Weight) -> Array:
    """w(t) / (2 sigma^2) |eps - slope|^2."""
    return 0.5 * (weight(sde, t) / sde.sigma(t) ** 2) * square(_slope(sde, score_fn, x, t) - slope)
