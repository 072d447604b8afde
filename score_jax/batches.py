"""Arithmetic of batches, `[batch, *event]`: each example by itself."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["as_precise", "dot", "expand", "square"]


def expand(t: ArrayLike, x: Array) -> Array:
    """Reshape a scalar or per-example value so that it broadcasts against a batch.

    Args:
      t: scalar or `[batch]`.
      x: `[batch, *event]`.

    Returns:
      `t` as a scalar or as `[batch, 1, ...]` with the rank of `x`.

    Raises:
      ValueError: if `t` is neither a scalar nor one value an example.
    """
    t = jnp.asarray(t)
    if t.ndim == 0:
        return t
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be a scalar or have shape {x.shape[:1]}, one value an example, but has {t.shape}")
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def as_precise(t: ArrayLike | Sequence[float], x: Array) -> Array:
    """`t` in the precision of `x`, float32 at least: with `jax_enable_x64` numbers are float64 where data are not."""
    return jnp.asarray(t, jnp.result_type(x, jnp.float32))


def dot(a: Array, b: Array) -> Array:
    """The inner product of each example: two `[batch, *event]` to `[batch]`."""
    return jnp.sum(a * b, axis=range(1, a.ndim))


def square(a: Array) -> Array:
    """The squared norm of each example: `[batch, *event]` to `[batch]`."""
    return dot(a, a)
