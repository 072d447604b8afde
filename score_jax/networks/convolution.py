"""3x3 convolutions in half the multiplications, for CPUs (Toom 1963, Cook 1966; Winograd 1980; Lavin & Gray 2016).

Along the height a convolution is the product of two polynomials, of the image's rows and of the kernel's three, which
six values determine: four rows y of the result are

    y = A [(G g) * (B d)]                                                                (Lavin & Gray 2016, Eq. 13)

with the kernel's rows g, the six rows d of the image that y depends on, and * a convolution along the width.  Six
convolutions in place of twelve; A, B and G evaluate at 0, 1, -1, 2, -2 and infinity, and back.  In float32 the result
is within some 4e-6 of the largest value, where the direct sum is within 1e-6.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["convolve"]

A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, *, lhs_dilation: Any, rhs_dilation: Any, **options
) -> Array:
    """`jax.lax.conv_general_dilated` as `nn.Conv` calls it, by fours of rows where that is faster.

    That is on CPU (libraries of accelerators choose by themselves), in float32, and with so many pixels and channels
    that the sums cost much less than they save: each has dozens of kernels to be compiled.
    """
    _, height, _, channels = x.shape
    plain = padding == "SAME" and {*strides, *lhs_dilation, *rhs_dilation} == {1} and kernel.shape[:2] == (3, 3)
    large = height >= 16 and channels * kernel.shape[-1] >= 2**15 and kernel.shape[2] == channels
    if plain and large and height % 4 == 0 and x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return by_fours(x, kernel)
    options |= {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


@jax.jit  # Traced once a shape: networks have dozens of each.
def by_fours(x: Array, kernel: Array) -> Array:
    """`[batch, h, w, c]` with h divisible by 4, and `[3, 3, c, features]`, to `[batch, h, w, features]`."""
    batch, height, width, channels = x.shape
    fours = x.reshape(batch, height // 4, 4, width, channels)
    rows = [row.squeeze(2) for row in jax.lax.split(fours, (1, 1, 1, 1), axis=2)]
    zero, keep = jnp.zeros((), x.dtype), (0, 0, 0)
    above = jax.lax.pad(rows[-1], zero, (keep, (1, -1, 0), keep, keep))
    below = jax.lax.pad(rows[0], zero, (keep, (-1, 1, 0), keep, keep))
    taps = jax.lax.split(kernel, (1, 1, 1), axis=0)
    products = [
        jax.lax.conv_general_dilated(d, g, (1, 1), ((0, 0), (1, 1)), dimension_numbers=DIMENSIONS)
        for d, g in zip(_combine(B, [above, *rows, below]), _combine(G, taps), strict=True)
    ]
    return jnp.stack(_combine(A, products), axis=2).reshape(batch, height, width, -1)


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array]) -> list[Array]:
    terms = ([c * a for c, a in zip(row, arrays, strict=True) if c] for row in matrix)
    return [functools.reduce(jnp.add, row) for row in terms]
