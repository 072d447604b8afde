"""NCSN++ and DDPM++, the networks of score-based generative modelling through SDEs (Song et al. 2021, Appendix H).

A U-Net like DDPM's in which, each an option here,

- BigGAN's residual blocks change the resolution, or DDPM's with convolutions between them;
- changes of resolution are filtered by taps (FIR), so that they do not alias;
- residual sums are divided by sqrt(2);
- a pyramid of the smaller and smaller input joins the way down (`progressive_input`), and a pyramid of outputs grows
  on the way up (`progressive`), each by addition of images (`..._skip`) or of features (`residual`);
- the output is divided by the noise level, f(x, sigma) / sigma, so that the network's own scale is one.

DDPM++ is BigGAN's blocks without filters and pyramids; NCSN++ has filters and a residual input pyramid, and is told
log(sigma) by random Fourier features.  DDPM as the same release has it: `block='ddpm', rescale=False, groups=32`; it
differs from Ho et al.'s (`UNet`) in that on the way up only the last block of a resolution is followed by attention.
"""

import functools
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
    Resample,
    ResidualBlock,
    cast,
    check_halvings,
    conv,
    join,
    resample,
)

__all__ = ["NCSNpp"]


class NCSNpp(nn.Module):
    """NCSN++, whose output has the shape of its input, `[batch, height, width, channels]`.

    Attributes:
      features: channels at the full resolution.
      multipliers: the factor on `features` at each resolution; each after the first halves the image.
      num_blocks: residual blocks at each resolution on the way down; one more on the way up.
      attention_at: image heights at which there is attention: after every block down, after the last one up.
      dropout: the dropout rate inside residual blocks, active with `train=True` and `rngs={'dropout': key}`.
      embedding: `positional` for a time up to about 1,000 or the index of a level, `gaussian_fourier` for sigma,
        `none` for a network that is not told.
      num_classes: the number of classes; 0 for an unconditional network.
      block: `biggan` or `ddpm`.
      taps: of the filter at changes of resolution, `(1, 3, 3, 1)` as published; empty for means and repetition.
      progressive: the pyramid of outputs: `none`, `output_skip`, `residual`.
      progressive_input: the pyramid of inputs: `none`, `input_skip`, `residual`.
      combine: how `input_skip` joins: `sum` or `cat`.
      rescale: whether residual sums are divided by sqrt(2).
      scale_by_sigma: whether the output is divided by sigma.
      num_levels: of a ladder from `sigma_max` down to `sigma_min`, where `cond` is the index of a level and the
        output is divided by sigma; otherwise 0, and `cond` is what it is divided by.
      sigma_min: the smallest level of the ladder.
      sigma_max: the largest.
      centered: whether the input is in [-1, 1]; otherwise it is in [0, 1], which the network maps to that.
      groups: of the normalisations; 0 for at most 32 of at least 4 channels each.
      dtype: the precision of the computation; parameters and the output are float32.
      remat: whether blocks are computed again for the gradient: less memory, more time.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 4
    attention_at: Sequence[int] = (16,)
    dropout: float = 0.0
    embedding: str = "positional"
    num_classes: int = 0
    block: str = "biggan"
    taps: Sequence[float] = ()
    progressive: str = "none"
    progressive_input: str = "none"
    combine: str = "sum"
    rescale: bool = True
    scale_by_sigma: bool = False
    num_levels: int = 0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    centered: bool = True
    groups: int = 0
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: Array | None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]`, the value that the network is conditioned on.
          y: `[batch]` integer labels, where `num_classes` is set; that number itself for no class.
          train: whether dropout is active.

        Raises:
          ValueError: if the image cannot be halved often enough, or a field names what there is not.
        """
        self.check(x)
        told = self.embedding != "none"
        emb = Embedding(self.features, self.embedding, self.num_classes)(cond, y) if told else None
        step = functools.partial(self.step, emb=emb, train=train)
        skips = self.way_down(cast(x if self.centered else 2 * x - 1, self.dtype), step)
        h = step(step(skips[-1], attend=True))
        pyramid: Array | None = None
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.num_blocks + 1):
                last = i == self.num_blocks and h.shape[1] in self.attention_at
                h = step(jnp.concatenate([h, skips.pop()], axis=-1), features=multiplier * self.features, attend=last)
            h, pyramid = self.grow(h, pyramid, x.shape[-1])
            if level:
                h = self.change(h, step, up=True)
        h = self.output(h, x.shape[-1]) if pyramid is None or self.progressive == "residual" else pyramid
        return self.scaled(h.astype(jnp.float32), cond)

    def check(self, x: Array) -> None:
        check_halvings(x, len(self.multipliers) - 1)
        for field, choices in (
            ("block", ("biggan", "ddpm")),
            ("progressive", ("none", "output_skip", "residual")),
            ("progressive_input", ("none", "input_skip", "residual")),
            ("combine", ("sum", "cat")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"NCSNpp: unknown {field} {getattr(self, field)!r}; there are {', '.join(choices)}")

    def way_down(self, x: Array, step: Any) -> list[Array]:
        """The feature maps of the first convolution, of every block and of every change of resolution."""
        maps, pyramid = [conv(x, self.features)], x
        for level, multiplier in enumerate(self.multipliers):
            if level:
                h = self.change(maps[-1], step, up=False)
                if self.progressive_input == "input_skip":
                    pyramid = resample(pyramid, up=False, taps=self.taps)
                    h = Combine(self.combine)(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = join(Resample(False, h.shape[-1], self.taps)(pyramid), h, self.rescale)
                maps.append(h)
            for _ in range(self.num_blocks):
                attend = maps[-1].shape[1] in self.attention_at
                maps.append(step(maps[-1], features=multiplier * self.features, attend=attend))
        return maps

    def grow(self, h: Array, pyramid: Array | None, channels: int) -> tuple[Array, Array | None]:
        """The features and the pyramid of outputs after a resolution."""
        if self.progressive == "output_skip":
            below = 0.0 if pyramid is None else resample(pyramid, up=True, taps=self.taps)
            return h, below + self.output(h, channels)
        if self.progressive == "residual":
            if pyramid is None:
                return h, conv(nn.silu(GroupNorm(self.groups)(h)), h.shape[-1])
            h = join(Resample(True, h.shape[-1], self.taps)(pyramid), h, self.rescale)
            return h, h
        return h, None

    def output(self, h: Array, channels: int) -> Array:
        return conv(nn.silu(GroupNorm(self.groups)(h)), channels, scale=0.0)

    def step(
        self, h: Array, emb: Array | None, train: bool, *, features: int = 0, attend: bool = False, change: Any = None
    ) -> Array:
        """A residual block, of as many channels or `features`, and perhaps attention."""

        def apply(network: nn.Module, h: Array, emb: Array | None) -> Array:
            settings: dict[str, Any] = {"rescale": self.rescale, "groups": self.groups}
            h = ResidualBlock(features or h.shape[-1], self.dropout, change, **settings)(h, emb, train)
            return Attention(**settings)(h) if attend else h

        return (nn.remat(apply) if self.remat else apply)(self, h, emb)

    def change(self, h: Array, step: Any, *, up: bool) -> Array:
        """Half or twice the height and width."""
        if self.block == "biggan":
            return step(h, change=functools.partial(resample, up=up, taps=self.taps))
        return Resample(up, h.shape[-1], self.taps)(h)

    def scaled(self, h: Array, cond: Array) -> Array:
        if not self.scale_by_sigma:
            return h
        if self.num_levels:
            ratio = math.log(self.sigma_min / self.sigma_max) / (self.num_levels - 1)
            cond = self.sigma_max * jnp.exp(ratio * cond)
        return h / cond[:, None, None, None]


class Combine(nn.Module):
    """An image's channels joined to feature maps `[batch, h, w, c]`, by sum or concatenation."""

    method: str

    @nn.compact
    def __call__(self, image: Array, h: Array) -> Array:
        image = conv(image, h.shape[-1], size=1)
        return image + h if self.method == "sum" else jnp.concatenate([image, h], axis=-1)
