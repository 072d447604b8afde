"""Inpainting and colorization: the samplers of the prior, with what is known put in its place.

Where coordinates of x_0 are known without noise, the process is known there up to noise that can be drawn.  After each
step of any sampler to a time s (Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations", Appendix I.2)

    x_s <- alpha_s x_0 + sigma_s z    where x_0 is known.                   (1)

To color images, the same in an orthonormal basis of the channels whose first coordinate is the grey (Appendix I.3).

The steps of the rest see what is known through the noise only, and nothing makes up for it later: the law of the
samples is not quite the posterior's (Trippe et al. 2023, Section 3.2).  Correctors help, and so does resampling
(Lugmayr et al. 2022, "RePaint", Algorithm 1): from s back to t by the forward process, which leaves what is known and
the rest in step, and to s again, several times.  `inverse.mmps` is closer.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from score_jax.batches import as_floating
from score_jax.parameterization import tweedie
from score_jax.samplers.base import Sampler, State, sample
from score_jax.samplers.langevin import check_mask
from score_jax.samplers.stochastic import forward_kernel
from score_jax.sde import SDE, ScoreFn, perturb

__all__ = ["colorize", "inpaint", "inpainting"]


def inpainting(
    sde: SDE, sampler: Sampler, observed: Array, mask: Array, *, basis: Array | None = None, num_resamples: int = 1
) -> Sampler:
    """A sampler that keeps what is known: after each of its steps the noised observation is imposed (Eq. 1).

    To have it after a predictor and after a corrector, wrap each:
    `chain(inpainting(sde, predictor, ...), inpainting(sde, corrector, ...))`.  What a step does between its two times,
    of `adaptive_sde` or `picard` much, it does without the observation: their grids need as many times as others'.

    Args:
      sde: the process.
      sampler: of the prior.
      observed: data, `[batch, *event]`; what it holds outside the mask is ignored.
      mask: true where `observed` is known; in the shape of `observed`, or 1 along some of its axes.
      basis: an orthonormal matrix `[c, c]`: the mask is one of the coordinates `x @ basis`.
      num_resamples: how often each step of a predictor is taken, with the forward process in between (RePaint); not
        of a multistep one, whose history does not know of it.

    Raises:
      ValueError: if there is no step; when a run starts, if the mask or the data do not fit `x`.
    """
    if num_resamples < 1:
        raise ValueError(f"inpainting needs num_resamples >= 1, got {num_resamples}")
    observed = as_floating(observed, "observed")

    def init(x: Array, t: Array) -> State:
        check_mask(x, observed, mask)
        return sampler.init(x, t)

    def once(key: Array, x: Array, t: Array, s: Array, state: State) -> tuple[Array, State]:
        key_step, key_known = jax.random.split(key)
        x, state = sampler.step(key_step, x, t, s, state)
        noise = jax.random.normal(key_known, x.shape, x.dtype)
        return _replace(x, perturb(sde, observed, noise, s), mask, basis), state

    def step(key: Array, x: Array, t: Array, s: Array, state: State) -> tuple[Array, State]:
        def again(arrived: tuple[Array, State], k: Array) -> tuple[tuple[Array, State], None]:
            key_back, key_once = jax.random.split(k)
            a, b = forward_kernel(sde, s, t)
            back = a * arrived[0] + b * jax.random.normal(key_back, x.shape, x.dtype)
            return once(key_once, back, t, s, state), None

        arrived = once(key, x, t, s, state)
        if num_resamples == 1:
            return arrived
        return jax.lax.scan(again, arrived, jax.random.split(jax.random.fold_in(key, 2), num_resamples - 1))[0]

    return Sampler(init, step)


def inpaint(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    sampler: Sampler,
    x: Array,
    ts: Array,
    observed: Array,
    mask: Array,
    *,
    basis: Array | None = None,
    num_resamples: int = 1,
    denoise: bool = True,
) -> Array:
    """Samples that agree with what is known, by any sampler of the prior (Eq. 1).

    Args:
      key: a PRNG key.
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`.
      sampler: a sampler of it.
      x: the state at `ts[0]`, `[batch, *event]`; usually `sample_prior`.
      ts: `[n + 1]` decreasing times.
      observed: as in `inpainting`, and so `mask`, `basis` and `num_resamples`.
      mask: true where `observed` is known.
      denoise: end with the posterior mean at `ts[-1]`.

    Returns:
      Samples in the shape of `x`; the known part is `observed`, to the last bit unless there is a basis.

    Raises:
      ValueError: if the mask or the data do not fit `x`; else as `sample`.
    """
    x, observed = as_floating(x), as_floating(observed, "observed")
    check_mask(x, observed, mask)
    key_start, key_steps = jax.random.split(key)
    noise = jax.random.normal(key_start, x.shape, x.dtype)
    x = _replace(x, perturb(sde, observed, noise, ts[0]), mask, basis)
    sampler = inpainting(sde, sampler, observed, mask, basis=basis, num_resamples=num_resamples)
    x = sample(key_steps, sampler, x, ts)
    return _replace(tweedie(sde, score_fn, x, ts[-1]) if denoise else x, observed, mask, basis)


def colorize(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    sampler: Sampler,
    x: Array,
    ts: Array,
    grey: Array,
    *,
    denoise: bool = True,
) -> Array:
    """Images whose mean over the channels is given (Song et al. 2021, Appendix I.3).

    Args:
      key: a PRNG key.
      sde: the process.
      score_fn: as in `inpaint`, and so the rest.
      sampler: a sampler of it.
      x: the state at `ts[0]`, `[batch, h, w, c]`.
      ts: `[n + 1]` decreasing times.
      grey: `[batch, h, w, 1]`.
      denoise: end with the posterior mean at `ts[-1]`.

    Raises:
      ValueError: if `x` has one channel, or `grey` does not fit it.
    """
    channels = x.shape[-1]
    if channels < 2:
        raise ValueError(f"to color takes images of 2 channels or more, but x has shape {x.shape}")
    if grey.shape != (*x.shape[:-1], 1):
        raise ValueError(f"grey must have shape {(*x.shape[:-1], 1)}, but has {grey.shape}")
    mask = (jnp.arange(channels) == 0).reshape((1,) * (x.ndim - 1) + (channels,))
    observed = jnp.broadcast_to(grey, x.shape)
    return inpaint(key, sde, score_fn, sampler, x, ts, observed, mask, basis=_grey_basis(channels), denoise=denoise)


def _grey_basis(channels: int) -> Array:
    """Orthonormal, with the grey in the first column: the reflection of the first axis onto it."""
    difference = np.eye(channels)[0] - 1 / math.sqrt(channels)
    return jnp.asarray(np.eye(channels) - 2 * np.outer(difference, difference) / (difference @ difference), jnp.float32)


def _replace(x: Array, known: Array, mask: Array, basis: Array | None) -> Array:
    """`known` in the mask and `x` elsewhere, both in the coordinates of the basis."""
    if basis is None:
        return jnp.where(mask.astype(bool), known, x)
    # Accelerators round the factors of a product unless told.
    turn = functools.partial(jnp.matmul, precision="highest")
    return turn(jnp.where(mask.astype(bool), turn(known, basis), turn(x, basis)), basis.T)
