"""The divergence of a vector field, by Jacobian-vector products.

With J the Jacobian of the field at one example and e_i the unit vectors,

    div = tr J = sum_i e_i^T J e_i,                                         (1)
        = E[v^T J v],    E[v v^T] = I,                                      (2)

the second being Hutchinson's estimator (1990), whose variance for symmetric J is  2 |J|_F^2  with Gaussian
probes and  2 (|J|_F^2 - sum_i J_ii^2)  with Rademacher ones.  Hutch++ (Meyer et al. 2021, Algorithm 1) takes the
trace on the range Q of a sketch J S exactly and estimates only what is left,

    tr J = tr(Q^T J Q) + E[w^T J w],    w = (I - Q Q^T) v.                  (3)

One `jvp` gives the field and J v together, and J itself is never formed.  The rows of a batch are
independent, so one product with a batch of probes serves every example.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_batch, check_shape, dot

__all__ = ["exact_divergence", "hutch_pp_divergence", "hutchinson_divergence"]

Field = Callable[[Array], Array]

# Unit vectors that the exact trace pushes through the network at once: enough to keep a
# device busy, few enough that the memory does not grow with the dimension.
CHUNK = 64


def exact_divergence(fn: Field, x: Array) -> tuple[Array, Array]:
    """The exact trace (Eq. 1), at the cost of one Jacobian-vector product a dimension.

    Args:
      fn: a vector field on batches, rows independent.
      x: `[batch, *event]`.

    Returns:
      `(fn(x), divergence [batch])`.

    Raises:
      ValueError: if the field has not the shape of `x`.
    """
    x = as_batch(x)
    value, push = jax.linearize(fn, x)
    check_shape(value, x)
    size = math.prod(x.shape[1:])

    def diagonal(i: Array) -> Array:
        e = jnp.zeros_like(x).reshape(len(x), size).at[:, i].set(1.0)
        return push(e.reshape(x.shape)).reshape(e.shape)[:, i]

    chunk = min(size, CHUNK) if len(x) else None  # `lax.map` divides by the size of what it makes.
    return value, jnp.sum(jax.lax.map(diagonal, jnp.arange(size), batch_size=chunk), axis=0)


def draw_probes(key: Array, shape: tuple[int, ...], probe: str, dtype: jnp.dtype) -> Array:
    """Random directions v with E[v v^T] = I.

    Args:
      key: a PRNG key.
      shape: `[..., batch, *event]`; the leading axes beside the batch are the caller's.
      probe: `rademacher`, `gaussian`, or `sphere` (uniform on the sphere of radius sqrt(d); for `[batch, *event]`).
      dtype: of the result.

    Raises:
      ValueError: if `probe` is none of these.
    """
    if probe == "rademacher":
        return jax.random.rademacher(key, shape, dtype)
    v = jax.random.normal(key, shape, dtype)
    if probe == "gaussian":
        return v
    if probe == "sphere":
        return v / jnp.sqrt(jnp.mean(v**2, axis=range(1, v.ndim), keepdims=True))
    raise ValueError(f"unknown probe {probe!r}: choose 'rademacher', 'gaussian' or 'sphere'")


def hutchinson_divergence(
    key: Array,
    fn: Field,
    x: Array,
    *,
    num_probes: int = 1,
    probe: str = "rademacher",
    standard_error: bool = False,
) -> tuple[Array, ...]:
    """The trace from random probes (Eq. 2).

    Args:
      key: a PRNG key.
      fn: a vector field on batches, rows independent.
      x: `[batch, *event]`.
      num_probes: probes to average over.
      probe: the law of the probes, see `draw_probes`.
      standard_error: return also the standard error of the average, from the spread of the probes.

    Returns:
      `(fn(x), divergence [batch])`, and with `standard_error` its standard error `[batch]`.

    Raises:
      ValueError: for fewer than 1 probe, or fewer than 2 where a standard error is asked for; if the field has not the
        shape of `x`.
    """
    check_number("num_probes", num_probes, least=2 if standard_error else 1)
    keys, x = jax.random.split(key, num_probes), as_batch(x)
    value, estimates = probe_divergence(fn, x, jax.vmap(lambda k: draw_probes(k, x.shape, probe, x.dtype))(keys))
    mean = jnp.mean(estimates, axis=0)
    return (value, mean, error_of_mean(estimates)) if standard_error else (value, mean)


def probe_divergence(fn: Field, x: Array, probes: Array) -> tuple[Array, Array]:
    """`(fn(x), v^T J v [num_probes, batch])` for given probes, `[num_probes, batch, *event]`."""

    def along(v: Array) -> tuple[Array, Array]:
        value, tangent = jax.jvp(fn, (x,), (v,))
        check_shape(value, x)
        return value, dot(v, tangent)

    # The field's value does not depend on the probe, so vmap computes it once.
    return jax.vmap(along, out_axes=(None, 0))(probes)


def hutch_pp_divergence(key: Array, fn: Field, x: Array, *, num_probes: int = 3) -> tuple[Array, Array, Array]:
    """The trace by Hutch++ (Eq. 3): variance falling as 1/num_probes^2 where Hutchinson's falls as 1/num_probes.

    Args:
      key: a PRNG key.
      fn: a vector field on batches, rows independent.
      x: `[batch, *event]`.
      num_probes: Jacobian-vector products in all, a multiple of 3: a third each for the sketch, the exact
        part and the rest.

    Returns:
      `(fn(x), divergence [batch], standard_error [batch])`; the error is that of the estimated rest: zero
      where the sketch spans the whole space, and NaN with 3 probes, which leave the rest one sample.

    Raises:
      ValueError: if `num_probes` is not a positive multiple of 3, or the field has not the shape of `x`.
    """
    if num_probes < 3 or num_probes % 3:
        raise ValueError(f"num_probes must be a positive multiple of 3, got {num_probes}")
    x = as_batch(x)
    batch, size = len(x), math.prod(x.shape[1:])
    third = num_probes // 3
    value, push = jax.linearize(fn, x)
    check_shape(value, x)

    def product(vectors: Array) -> Array:
        """J applied to each of `[third, batch, size]`."""
        return jax.vmap(lambda v: push(v.reshape(x.shape)).reshape(batch, size))(vectors)

    key_sketch, key_rest = jax.random.split(key)
    rank = min(third, size)
    sketch = product(draw_probes(key_sketch, (rank, batch, size), "rademacher", x.dtype))
    q = jnp.linalg.qr(jnp.moveaxis(sketch, 0, -1))[0]  # [batch, size, rank]
    q_rows = jnp.moveaxis(q, -1, 0)
    exact = jnp.sum(q_rows * product(q_rows), axis=(0, 2))
    v = draw_probes(key_rest, (third, batch, size), "rademacher", x.dtype)
    w = v - jnp.einsum("bdr,ber,nbe->nbd", q, q, v)
    rest = jnp.sum(w * product(w), axis=2)
    return value, exact + jnp.mean(rest, axis=0), error_of_mean(rest)


def error_of_mean(estimates: Array) -> Array:
    """The standard error of the mean over the first axis: NaN for a single estimate."""
    return jnp.std(estimates, axis=0, ddof=1) / math.sqrt(len(estimates))


def check_number(name: str, number: int, *, least: int = 1) -> None:
    """Raise unless a number of probes is large enough."""
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
