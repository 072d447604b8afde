"""NCSN++ and DDPM++, the networks of score-based generative modelling through SDEs (Song et al. 2021, Appendix H).

A U-Net like DDPM's in which, each an option here,

- BigGAN's residual blocks change the resolution, or DDPM's with convolutions between them;
- changes of resolution are filtered by taps (FIR), so that they do not alias;
- residual sums are divided by sqrt(2);
- a pyramid of the smaller and smaller input joins the way down (`progressive_input`), and a pyramid of outputs grows
  on the way up (`progressive`), each by addition of images (`..._skip`) or of features (`residual`);
- the output is divided by the noise level, f(x, sigma) / sigma, so that the network's own scale is one.

DDPM++ is BigGAN's blocks without filters and pyramids; NCSN++ has filters and a residual input pyramid, and is told
log(sigma) by random Fourier features.  DDPM as the same release has it: `resample='conv', rescale=False, groups=32`; it
differs from Ho et al.'s (`UNet`) in that on the way up only the last block of a resolution is followed by attention.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.embeddings import Embedding
from score_jax.networks.layers import GroupNorm, Resample, cast, check_sizes, conv, join, resample
from score_jax.networks.unet import UNet

__all__ = ["NCSNpp"]


class NCSNpp(UNet):
    """NCSN++, whose output has the shape of its input, `[batch, height, width, channels]`.

    Attributes: those of `UNet`, of which these differ, and

      attention_at: image heights at which there is attention: after every block down, after the last one up.
      embedding: `positional` for a time up to about 1,000 or the index of a level, `gaussian_fourier` for sigma,
        `none` for a network that is not told.
      resample: `block` for BigGAN's residual blocks, `conv` for DDPM's.
      progressive: the pyramid of outputs: `none`, `output_skip`, `residual`.
      progressive_input: the pyramid of inputs: `none`, `input_skip`, `residual`.
      combine: how `input_skip` joins: `sum` or `cat`.
      scale_by_sigma: whether the output is divided by sigma.
      num_levels: L of a ladder whose level i is sigma_max (sigma_min / sigma_max)^(i / (L - 1)), where `cond` is i and
        the output is divided by that; otherwise 0, and `cond` is what it is divided by.
      sigma_min: the smallest level of the ladder.
      sigma_max: the largest.
      centered: whether the input is in [-1, 1]; otherwise it is in [0, 1], which the network maps to that.
    """

    num_blocks: int = 4
    resample: str = "block"
    progressive: str = "none"
    progressive_input: str = "none"
    combine: str = "sum"
    scale_by_sigma: bool = False
    num_levels: int = 0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    centered: bool = True

    @nn.compact
    def __call__(
        self, x: Array, cond: Array, y: Array | None = None, augmentation: Array | None = None, *, train: bool = False
    ) -> Array:
        """Apply the network; arguments as of `UNet`.

        Raises:
          ValueError: if the image cannot be halved often enough, or a field names what there is not.
        """
        self.check(x)
        sizes = self.features, self.embedding, self.num_classes, self.num_augmentations
        cond = jnp.broadcast_to(cond, x.shape[:1])
        emb = None if self.embedding == "none" else Embedding(*sizes)(cond, y, augmentation)
        skips = self.way_down(x if self.centered else 2 * x - 1, emb, train)
        h = self.step(skips[-1], emb, train, attend=True)
        h = self.step(h, emb, train, attend=False)
        pyramid: Array | None = None
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.num_blocks + 1):
                last = i == self.num_blocks and h.shape[1] in self.attention_at
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.step(h, emb, train, features=multiplier * self.features, attend=last)
            h, pyramid = self.grow(h, pyramid, x.shape[-1])
            if level:
                h = self.change(h, emb, train, up=True)
        h = self.output(h, x.shape[-1]) if pyramid is None or self.progressive == "residual" else pyramid
        return self.scaled(h.astype(jnp.float32), cond)

    def check(self, x: Array) -> None:
        super().check(x)
        check_sizes(self, (), ("num_levels",))
        for field, choices in (
            ("progressive", ("none", "output_skip", "residual")),
            ("progressive_input", ("none", "input_skip", "residual")),
            ("combine", ("sum", "cat")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"NCSNpp: unknown {field} {getattr(self, field)!r}; there are {', '.join(choices)}")

    def way_down(self, x: Array, emb: Array | None, train: bool) -> list[Array]:
        """The feature maps of the first convolution, of every block and of every change of resolution."""
        pyramid = cast(x, self.dtype)
        maps = [conv(pyramid, self.features)]
        for level, multiplier in enumerate(self.multipliers):
            if level:
                h = self.change(maps[-1], emb, train, up=False)
                if self.progressive_input == "input_skip":
                    pyramid = resample(pyramid, up=False, taps=self.taps)
                    h = Combine(self.combine)(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = join(Resample(False, h.shape[-1], self.taps)(pyramid), h, self.rescale)
                maps.append(h)
            for _ in range(self.num_blocks):
                maps.append(self.step(maps[-1], emb, train, features=multiplier * self.features))
        return maps

    def grow(self, h: Array, pyramid: Array | None, channels: int) -> tuple[Array, Array | None]:
        """The features and the pyramid of outputs after a resolution."""
        if self.progressive == "output_skip":
            below = 0.0 if pyramid is None else resample(pyramid, up=True, taps=self.taps)
            return h, below + self.output(h, channels)
        if self.progressive == "residual":
            if pyramid is None:
                return h, conv(nn.silu(GroupNorm(self.groups, self.epsilon)(h)), h.shape[-1])
            h = join(Resample(True, h.shape[-1], self.taps)(pyramid), h, self.rescale)
            return h, h
        return h, None

    def output(self, h: Array, channels: int) -> Array:
        return conv(nn.silu(GroupNorm(self.groups, self.epsilon)(h)), channels, scale=0.0)

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
