"""Convolutions by fours of rows: against the sum that a convolution is, and where `nn.Conv` takes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_jax.networks import convolution


@pytest.mark.parametrize("height", [4, 12])
def test_convolution_by_fours_and_its_derivatives_are_those_of_the_sum(height):
    shapes = (2, height, 5, 3), (3, 3, 3, 4)
    x, kernel, dx, dkernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([*shapes, *shapes]))

    def both(fn):
        out, tangent = jax.jvp(fn, (x, kernel), (dx, dkernel))
        return out, tangent, *jax.vjp(fn, x, kernel)[1](tangent)

    def summed(x, kernel):
        wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = (wide[:, i : i + height, j : j + 5] @ kernel[i, j] for i in range(3) for j in range(3))
        return sum(parts)

    for value, expected in zip(jax.jit(lambda: both(convolution.by_fours))(), both(summed), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [{}, {"strides": 2}, {"padding": 1}, {"kernel_dilation": 2}, {"input_dilation": (2, 2), "padding": 2}],
    ids=str,
)
def test_large_convolutions_of_layers_are_those_of_flax(options):
    x = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 64, 512))
    plain = nn.Conv(512, (3, 3), use_bias=False, **options)
    ours = plain.clone(conv_general_dilated=convolution.convolve)
    calls = str(jax.make_jaxpr(ours.apply)({"params": {"kernel": kernel}}, x))
    out, expected = (net.apply({"params": {"kernel": kernel}}, x) for net in (ours, plain))
    np.testing.assert_allclose(out, expected, atol=1e-5 * jnp.abs(expected).max())
    assert ("by_fours" in calls) == (not options)
