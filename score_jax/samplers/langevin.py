"""Langevin dynamics: sampling from a law whose score is known.

    x <- x + e/2 score(x) + sqrt(e) z,    z ~ N(0, I)                       (1)

leaves the law of the score invariant as the step size e goes to 0 (Roberts & Tweedie 1996).  On a Gaussian of
precision P its own invariant covariance is  P^-1 (I - e P/4)^-1,  and it diverges where e P > 4.

Between modes that lie far apart (1) does not mix.  Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1)
walks down a ladder  sigma_1 > ... > sigma_L  of noise levels, taking steps (1) at each, of size

    e_i = step_size sigma_i^2 / sigma_L^2,                                  (2)

and ends with the posterior mean  x + sigma_L^2 score(x, sigma_L)  (Jolicoeur-Martineau et al. 2020).  The published
code of NCSN and NCSNv2, and the paper of the latter, write (1) with 2 e for e: their step sizes are half of these.

To inpaint (Song & Ermon 2019, Algorithm 2) the known part is set to data plus N(0, sigma_i^2) before every step.

As a corrector (1) repairs, at a fixed time, the law that a predictor's discretisation has bent (Song et al. 2021,
Section 4.2, Algorithms 4 and 5).  Its step is sized by a signal-to-noise ratio,

    e/2 = 2 (snr |z| / |score|)^2,    or annealed    e/2 = 2 (snr sigma)^2,  (3)

so that the published step size of NCSN is  2 snr^2 sigma_L^2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_batch, as_floating, call_score, check_shape, expand, square
from score_jax.divergence import Field
from score_jax.samplers.base import Sampler, check_finite, no_state, root
from score_jax.sde import SDE, ScoreFn

__all__ = [
    "annealed_langevin",
    "annealed_langevin_corrector",
    "inpaint_langevin",
    "langevin_corrector",
    "unadjusted_langevin",
]


def unadjusted_langevin(
    key: Array, fn: Field, x: Array, *, step_size: float | Array, num_steps: int, trajectory: bool = False
) -> Array:
    """Unadjusted Langevin dynamics (Eq. 1), as one `lax.scan`.

    Args:
      key: a PRNG key, split into one for each step.
      fn: the score.
      x: where the chains start, `[batch, *event]`.
      step_size: e of Eq. 1.
      num_steps: steps.
      trajectory: return every state instead of the last.

    Returns:
      The last states, in the shape of `x`; with `trajectory` all of them, `[num_steps + 1, batch, *event]`.

    Raises:
      FloatingPointError: if the states diverge, naming the step; under `jit` they are returned as they are.
    """

    x = as_floating(x)

    def body(x, k):
        x = _move(x, check_shape(fn(x), x), jax.random.normal(k, x.shape, x.dtype), step_size)
        return x, (jnp.isfinite(x).all(), x if trajectory else None)

    last, (finite, visited) = jax.lax.scan(body, x, jax.random.split(key, num_steps))
    check_finite(finite, "step", advice="take a smaller step_size")
    return jnp.concatenate([x[None], visited]) if trajectory else last


def annealed_langevin(
    key: Array,
    score_fn: ScoreFn,
    x: Array,
    sigmas: ArrayLike,
    *,
    step_size: float | Array,
    num_steps: int,
    denoise: bool = True,
    trajectory: bool = False,
) -> Array:
    """Annealed Langevin dynamics (Eqs. 1 and 2), as a `lax.scan` over levels of one over steps.

    Args:
      key: a PRNG key.
      score_fn: `score_fn(x, sigma)`, sigma a scalar.
      x: where the chains start, `[batch, *event]`; any broad law will do.
      sigmas: the ladder of noise levels, `[num_levels]`, decreasing.
      step_size: the step at the last level.
      num_steps: steps at each level.
      denoise: end with the posterior mean at the last level.
      trajectory: return the state after each level instead of the last.

    Returns:
      Samples in the shape of `x`; with `trajectory`, the start and the state after each level,
      `[num_levels + 1, batch, *event]`, of which `denoise` replaces the last.

    Raises:
      ValueError: if the sigmas are not positive and decreasing.
      FloatingPointError: if the states diverge, naming the level and the step; under `jit` they are returned as
        they are.
    """
    return _anneal(key, score_fn, x, sigmas, step_size, num_steps, denoise, trajectory, lambda k, x, sigma: x)


def inpaint_langevin(
    key: Array,
    score_fn: ScoreFn,
    x: Array,
    sigmas: ArrayLike,
    observed: Array,
    mask: Array,
    *,
    step_size: float | Array,
    num_steps: int,
    denoise: bool = True,
    trajectory: bool = False,
) -> Array:
    """Inpainting inside annealed Langevin dynamics (Song & Ermon 2019, Algorithm 2).

    Args:
      key: a PRNG key.
      score_fn: `score_fn(x, sigma)`, sigma a scalar.
      x: where the chains start, `[batch, *event]`.
      sigmas: the ladder of noise levels, `[num_levels]`, decreasing.
      observed: data, in the shape of `x`; what it holds outside the mask is ignored.
      mask: true where `observed` is known; in the shape of `x`, or 1 along some of its axes.
      step_size: as in `annealed_langevin`, and so the rest.

    Returns:
      As `annealed_langevin`; in the last state the known part is `observed`, to the last bit.

    Raises:
      ValueError: if the mask or the data do not fit `x`; else as `annealed_langevin`.
    """
    x, observed = as_floating(x), as_floating(observed, "observed")
    check_mask(x, observed, mask)
    known = mask.astype(bool)

    def impose(k: Array, x: Array, sigma: Array) -> Array:
        return jnp.where(known, observed + sigma * jax.random.normal(k, x.shape, x.dtype), x)

    states = _anneal(key, score_fn, x, sigmas, step_size, num_steps, denoise, trajectory, impose)
    if not trajectory:
        return jnp.where(known, observed, states)
    return states.at[-1].set(jnp.where(known, observed, states[-1]))


def check_mask(x: Array, observed: Array, mask: Array) -> None:
    """Raise a `ValueError` unless the data have the shape of `x`, and the mask too, or 1 along some of its axes."""
    if observed.shape != x.shape:
        raise ValueError(f"observed must have the shape of x, {x.shape}, but has {observed.shape}")
    if mask.ndim != x.ndim or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)):
        raise ValueError(f"mask must have the shape of x, {x.shape}, or 1 along some axes, but has {mask.shape}")


def _anneal(
    key: Array,
    score_fn: ScoreFn,
    x: Array,
    sigmas: ArrayLike,
    step_size: float | Array,
    num_steps: int,
    denoise: bool,
    trajectory: bool,
    impose: Callable[[Array, Array, Array], Array],
) -> Array:
    """Annealed Langevin with `impose(key, x, sigma)` before every step."""
    if not isinstance(sigmas, jax.core.Tracer):
        ladder = np.asarray(sigmas)  # In numpy: under `jit` even constants would be traced.
        if ladder.ndim != 1 or np.any(ladder <= 0) or np.any(np.diff(ladder) >= 0):
            raise ValueError(f"sigmas must be a vector of positive, decreasing noise levels, got {ladder}")
    x = as_floating(x)
    sigmas = jnp.asarray(sigmas, x.dtype)

    def level(x, inputs):
        k, sigma = inputs
        e = step_size * (sigma / sigmas[-1]) ** 2

        def body(x, k):
            key_known, key_step = jax.random.split(k)
            x = impose(key_known, x, sigma)
            x = _move(x, call_score(score_fn, x, sigma), jax.random.normal(key_step, x.shape, x.dtype), e)
            return x, jnp.isfinite(x).all()

        x, finite = jax.lax.scan(body, x, jax.random.split(k, num_steps))
        return x, (finite, x if trajectory else None)

    last, (finite, visited) = jax.lax.scan(level, x, (jax.random.split(key, len(sigmas)), sigmas))
    check_finite(finite, "level", "step", advice="take a smaller step_size")
    if denoise:
        last = last + sigmas[-1] ** 2 * call_score(score_fn, last, sigmas[-1])
    return jnp.concatenate([x[None], visited[:-1], last[None]]) if trajectory else last


def langevin_corrector(
    sde: SDE, score_fn: ScoreFn, *, snr: float = 0.16, num_steps: int = 1, batch_averaged: bool = False
) -> Sampler:
    """Langevin steps at time s, sized by the norms of score and noise (Eq. 3, left).

    The norms are those of each example by itself, so that a sample does not depend on its batch-mates.  Use it
    after a predictor, in `chain`.

    For many dimensions only: a step that depends on |score| leaves not p but p |score|^2 invariant,
    which is off by 2/d in the variance of a Gaussian.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      snr: the ratio of the score term's norm to the noise's.
      num_steps: Langevin steps in each call.
      batch_averaged: put the means of the norms over the batch for them, as the published code does: a sample then
        depends on its batch-mates.
    """

    def size(score: Array, z: Array, s: Array) -> Array:
        norms = jnp.sqrt(square(z)), root(square(score))
        noise, gradient = (jnp.mean(n) if batch_averaged else n for n in norms)
        # A score of 0, a fresh network's, says nothing of the size: the step waits.
        ratio = noise / jnp.where(gradient > 0, gradient, jnp.inf)
        return expand(4 * (snr * ratio) ** 2, z)

    return _corrector(score_fn, size, snr, num_steps)


def annealed_langevin_corrector(sde: SDE, score_fn: ScoreFn, *, snr: float = 0.16, num_steps: int = 1) -> Sampler:
    """Langevin steps at time s, sized by the noise level (Eq. 3, right): the law at s is left invariant.

    After a predictor, in `chain`; or by itself, with a grid that visits the levels (`timesteps.ladder`), where it
    is annealed Langevin dynamics with  step_size = 4 snr^2 sigma(t_min)^2.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      snr: half the root of the step size in units of the noise's variance.
      num_steps: Langevin steps in each call.
    """
    return _corrector(score_fn, lambda score, z, s: 4 * (snr * sde.sigma(s)) ** 2, snr, num_steps)


def _corrector(
    score_fn: ScoreFn, size: Callable[[Array, Array, Array], Array], snr: float | Array, num_steps: int
) -> Sampler:
    """Langevin steps at s of size `size(score, z, s)`, which `snr` is the unit of."""
    if num_steps < 0 or (isinstance(snr, int | float) and not snr >= 0):
        raise ValueError(f"a Langevin corrector needs snr >= 0 and num_steps >= 0, got {snr} and {num_steps}")

    def step(key, x, t, s, state):
        def once(x, k):
            score, z = call_score(score_fn, x, s), jax.random.normal(k, x.shape, x.dtype)
            return _move(x, score, z, size(score, z, s)), None

        return jax.lax.scan(once, as_batch(x), jax.random.split(key, num_steps))[0], state

    return Sampler(no_state, step)


def _move(x: Array, score: Array, z: Array, e: float | Array) -> Array:
    """Eq. 1."""
    return x + 0.5 * e * score + jnp.sqrt(e) * z
