"""A time-conditioned U-Net for images, in the manner of DDPM (Ho et al. 2020, Appendix B).

Residual blocks of group normalisation, SiLU and 3x3 convolutions at each resolution, the
conditioning added between the two convolutions; attention where the image is small; skips
from the way down concatenated on the way up; pooling and repetition between resolutions, with
no convolution of their own, since a residual block follows.  Residual sums are divided by sqrt(2), which
keeps their variance (Song et al. 2021, Appendix H), and the last convolution starts at zero.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.layers import (
    Attention,
    Embedding,
    GroupNorm,
    conv3x3,
    default_init,
    upsample,
)

__all__ = ["UNet"]


class ResidualBlock(nn.Module):
    """Two convolutions and a skip: `[batch, h, w, c]` to `[batch, h, w, features]`."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        h = conv3x3(self.features)(nn.silu(GroupNorm()(x)))
        h = h + nn.Dense(self.features, kernel_init=default_init())(emb)[:, None, None, :]
        h = nn.silu(GroupNorm()(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.features, scale=0.0)(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=default_init())(x)
        return (x + h) / math.sqrt(2)


def way_down(network: Any, x: Array, emb: Array, train: bool) -> list[Array]:
    """The feature maps of the first convolution, of every block and of every pooling, in their order.

    Args:
      network: a module, inside its `__call__`, with the attributes of `UNet`.
      x: `[batch, height, width, channels]`.
      emb: `[batch, size]`, what the network knows beside `x`.
      train: whether dropout is active.

    Raises:
      ValueError: if the image cannot be halved often enough.
    """
    halvings = len(network.multipliers) - 1
    if x.ndim != 4 or any(size % 2**halvings for size in x.shape[1:3]):
        raise ValueError(
            f"a U-Net of {len(network.multipliers)} resolutions needs images [batch, h, w, c] with h and w "
            f"divisible by {2**halvings}, got {list(x.shape)}: resize the images or shorten `multipliers`"
        )
    maps = [conv3x3(network.features)(x)]
    for level, multiplier in enumerate(network.multipliers):
        if level:
            maps.append(nn.avg_pool(maps[-1], (2, 2), strides=(2, 2)))
        for _ in range(network.num_blocks):
            maps.append(block(network, maps[-1], multiplier * network.features, emb, train))
    return maps


def block(network: Any, h: Array, features: int, emb: Array, train: bool) -> Array:
    """A residual block of a network like `UNet`, and attention at the heights where it has it."""
    h = ResidualBlock(features, network.dropout)(h, emb, train)
    return Attention()(h) if h.shape[1] in network.attention_at else h


class UNet(nn.Module):
    """A U-Net whose output has the shape of its input, `[batch, height, width, channels]`.

    Attributes:
      features: channels at the full resolution.
      multipliers: the factor on `features` at each resolution; each after the first halves the image.
      num_blocks: residual blocks at each resolution on the way down; one more on the way up.
      attention_at: image heights at which every block is followed by attention.
      dropout: the dropout rate inside residual blocks, active with `train=True` and `rngs={'dropout': key}`.
      embedding: `positional` where `cond` is a time up to about 1,000, `fourier` where it is a noise level.
      num_classes: the number of classes; 0 for an unconditional network.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_at: Sequence[int] = (16,)
    dropout: float = 0.0
    embedding: str = "positional"
    num_classes: int = 0

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: Array | None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]`, the value that the network is conditioned on.
          y: `[batch]` integer labels, where `num_classes` is set; that number itself for no class.
          train: whether dropout is active.

        Raises:
          ValueError: if the image cannot be halved often enough.
        """
        emb = Embedding(self.features, self.embedding, self.num_classes)(cond, y)
        skips = way_down(self, x, emb, train)
        h = skips[-1]
        h = ResidualBlock(h.shape[-1], self.dropout)(h, emb, train)
        h = Attention()(h)
        h = ResidualBlock(h.shape[-1], self.dropout)(h, emb, train)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(self, h, multiplier * self.features, emb, train)
            if level:
                h = upsample(h)
        return conv3x3(x.shape[-1], scale=0.0)(nn.silu(GroupNorm()(h)))
