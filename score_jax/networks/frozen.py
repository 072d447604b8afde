"""Layers of image classifiers that are only ever applied, by PyTorch's names: a state dict is their parameters.

    batch normalisation with the statistics of its training:   y = weight (x - mean) / sqrt(var + 10^-3) + bias      (1)

Images are `[batch, h, w, c]` all the same, and kernels `[c_out, c_in, h, w]` as stored.  Products are taken in full
float32, which accelerators do not do unasked: published numbers were.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["BatchNorm", "Conv", "Dense", "DepthwiseConv", "resize"]

ones, zeros, normal = nn.initializers.ones, nn.initializers.zeros, nn.initializers.lecun_normal(1, 0)


class Conv(nn.Module):
    """A convolution without bias."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", normal, (self.features, x.shape[-1], *self.size))
        return jax.lax.conv_general_dilated(
            x,
            weight,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )


class DepthwiseConv(nn.Module):
    """A convolution of each channel with its own kernel, as the sum of the shifted images times its entries.

    On XLA's CPU backend the convolution by groups takes 5 to 18 times as long.
    """

    size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", normal, (x.shape[-1], 1, self.size, self.size))
        window, strides = (self.size, self.size), (self.stride, self.stride)
        pads = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, "SAME")
        height, width = (-(-n // self.stride) for n in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))

        def shifted(i: int, j: int) -> Array:
            rows = slice(i, i + self.stride * (height - 1) + 1, self.stride)
            columns = slice(j, j + self.stride * (width - 1) + 1, self.stride)
            return x[:, rows, columns] * weight[None, None, None, :, 0, i, j]

        return sum(shifted(i, j) for i in range(self.size) for j in range(self.size))  # type: ignore[return-value]


class BatchNorm(nn.Module):
    """Batch normalisation with fixed statistics (Eq. 1)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        names = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        weight, bias, mean, var = (self.param(name, init, x.shape[-1:]) for name, init in names.items())
        factor = weight * jax.lax.rsqrt(var + 1e-3)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class Dense(nn.Module):
    """A matrix, and a bias if there is one: `[batch, c_in]` to `[batch, features]`."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", normal, (self.features, x.shape[-1]))
        y = jnp.dot(x, weight.T, precision=jax.lax.Precision.HIGHEST)
        return y + self.param("bias", zeros, (self.features,))[None] if self.use_bias else y


def resize(images: Array, size: int) -> Array:
    """Images `[batch, h, w, c]` to `size` x `size`, bilinearly, between pixel centres and without smoothing."""
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, size, size, channels), "bilinear", antialias=False)
