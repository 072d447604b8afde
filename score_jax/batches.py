"""Arithmetic of batches, `[batch, *event]`: each example by itself."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "as_batch",
    "as_floating",
    "as_precise",
    "as_time",
    "call_score",
    "check_shape",
    "dot",
    "expand",
    "square",
]


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


def as_floating(x: ArrayLike, name: str = "x") -> Array:
    """`x` in single precision at least: half precision is too coarse for times and for small steps.

    Raises:
      ValueError: if `x` is not floating point.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}: scale images first, to [-1, 1] say")
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def as_batch(x: ArrayLike, name: str = "x") -> Array:
    """`as_floating`, of a batch: for what is summed over each example.

    Raises:
      ValueError: if `x` is not floating point, or has no batch axis before those of the event.
    """
    x = as_floating(x, name)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must be [batch, *event] with at least 2 axes, but has shape {x.shape}: one example is x[None]"
        )
    return x


def as_time(t: ArrayLike) -> Array:
    """A time as a floating-point array, of single precision at least; Python's numbers stay weakly typed."""
    t = jnp.asarray(float(t) if isinstance(t, int) else t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        return t.astype(float)
    return t.astype(jnp.float32) if t.dtype.itemsize < 4 else t


def check_shape(value: Array, x: Array, what: str = "a score", hint: str = "") -> Array:
    """The value, unless its shape is not that of `x`, which would broadcast to a wrong result.

    Raises:
      ValueError: with both shapes, what has them, and then the hint.
    """
    if jnp.shape(value) != x.shape:
        raise ValueError(f"{what} must have the shape of x, {x.shape}, but has {jnp.shape(value)}{hint}")
    return value


def call_score(fn: Callable[[Array, Array], Array], x: Array, t: ArrayLike, what: str = "a score") -> Array:
    """`fn(x, t)`, a score or a network, in the shape of `x`.

    Raises:
      ValueError: if its shape is another, as it is where a function takes (t, x).
    """
    return check_shape(fn(x, as_time(t)), x, what, ": it is called with (x, t), in this order")


def dot(a: Array, b: Array) -> Array:
    """The inner product of each example: two `[batch, *event]` to `[batch]`."""
    return jnp.sum(a * b, axis=range(1, a.ndim))


def square(a: Array) -> Array:
    """The squared norm of each example: `[batch, *event]` to `[batch]`."""
    return dot(a, a)
