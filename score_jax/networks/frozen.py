"""Layers of image classifiers that are only ever applied, by PyTorch's names: a state dict is their parameters.

    batch normalisation with the statistics of its training:   y = weight (x - mean) / sqrt(var + 10^-3) + bias      (1)

Images are `[batch, h, w, c]` all the same, and kernels `[c_out, c_in, h, w]` as stored.  Products are taken in full
float32, which accelerators do not do unasked: published numbers were.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

__all__ = ["BatchNorm", "Conv", "Dense", "DepthwiseConv", "from_state", "resize"]

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
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(
            x, weight, strides, self.padding, dimension_numbers=("NHWC", "OIHW", "NHWC")
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


def from_state(network: nn.Module, tensors: Mapping[str, np.ndarray], *, unused: tuple[str, ...] = ()) -> Any:
    """The parameters of a network of these layers from a PyTorch state by its names.

    Args:
      network: called with images.
      tensors: the state; counters of batches do not matter.
      unused: names of tensors that the network has no use for.

    Raises:
      ValueError: if a tensor is missing, left over or of the wrong shape, naming it.
    """
    rest = {n: x for n, x in tensors.items() if n not in unused and not n.endswith("num_batches_tracked")}
    template = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))["params"]
    params = {}
    for path, leaf in traverse_util.flatten_dict(template).items():
        name = ".".join(path)
        if name not in rest:
            raise ValueError(f"the tensor {name!r} of shape {leaf.shape} is missing")
        value = np.asarray(rest.pop(name))
        if value.shape != leaf.shape:
            raise ValueError(f"the tensor {name!r} has shape {value.shape} where {leaf.shape} is expected")
        params[path] = jnp.asarray(value, leaf.dtype)
    if rest:
        raise ValueError(f"the tensor {min(rest)!r} has no place in {type(network).__name__}")
    return {"params": traverse_util.unflatten_dict(params)}
