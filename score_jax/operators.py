"""Measurements of images, for inverse problems: each function returns a linear function of a batch `[n, h, w, c]`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_precise

__all__ = ["blur", "decolorize", "downsample", "mask"]

Operator = Callable[[Array], Array]


def mask(known: Array) -> Operator:
    """Zero where `known` is false; `known` in the shape of a batch, or 1 along some of its axes.

    A measurement y should be 0 there, too: noise in it is a residual that no image explains.
    """
    return lambda x: jnp.where(known.astype(bool), x, 0.0)


def blur(std: float = 1.0) -> Operator:
    """A Gaussian of standard deviation `std`, in pixels, over each channel; at the edges, of what lies inside.

    Raises:
      ValueError: if `std` is not positive.
    """
    if std <= 0:
        raise ValueError(f"blur needs std > 0, got {std}")

    def along(x: Array, axis: int) -> Array:
        place = as_precise(jnp.arange(x.shape[axis]), x)
        return jax.nn.softmax(-0.5 * ((place[:, None] - place[None, :]) / std) ** 2, axis=1)

    return lambda x: jnp.einsum("ai,bj,nijc->nabc", along(x, 1), along(x, 2), x, precision=jax.lax.Precision.HIGHEST)


def downsample(factor: int = 2) -> Operator:
    """The mean over squares of `factor` pixels a side: `[n, h, w, c]` to `[n, h/factor, w/factor, c]`.

    Raises:
      ValueError: if `factor` is not positive; when called, if it does not divide the images' height and width.
    """
    if factor < 1:
        raise ValueError(f"downsample needs a factor of at least 1, got {factor}")

    def pool(x: Array) -> Array:
        n, h, w, c = x.shape
        if h % factor or w % factor:
            raise ValueError(f"downsample by {factor} needs height and width divisible by it, got {h} x {w}")
        return x.reshape(n, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))

    return pool


def decolorize() -> Operator:
    """The mean over the channels: `[n, h, w, c]` to `[n, h, w, 1]`."""
    return lambda x: x.mean(axis=-1, keepdims=True)
