"""A time-conditioned U-Net for images: DDPM's (Ho et al. 2020, Appendix B) and what became of it.

Residual blocks of group normalisation, SiLU and 3x3 convolutions at each resolution, told of the conditioning
between the two convolutions; attention where the image is small; skips from the way down concatenated on the way up.
The last convolution starts at zero.  Three forms, by their fields:

- as it is, for few pixels: residual sums are divided by sqrt(2), which keeps their variance (Song et al. 2021,
  Appendix H), and between resolutions there is no convolution of its own, since a residual block follows;
- DDPM: `resample='conv', rescale=False, groups=32`;
- ADM's blocks (Dhariwal & Nichol 2021), which EDM takes over (Karras et al. 2022): `resample='block', rescale=False,
  groups=32, adaptive=True, head_channels=64`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.embeddings import Embedding
from score_jax.networks.layers import (
    Attention,
    GroupNorm,
    Resample,
    ResidualBlock,
    cast,
    check_halvings,
    check_sizes,
    conv,
    resample,
)

__all__ = ["UNet"]


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
      num_augmentations: the length of a vector that says how training images were augmented; 0 for none.
      resample: between resolutions: `pool` for means and repetition, `conv` for convolutions (`conv_symmetric` as
        PyTorch pads them, see `layers.Resample`), `block` for a residual block that does it.
      taps: of the filter at changes of resolution, `(1, 3, 3, 1)` as published with NCSN++; empty for none.
      rescale: whether residual sums are divided by sqrt(2).
      adaptive: whether the conditioning scales and shifts a normalisation (adaptive group norm).
      head_channels: channels of an attention head; 0 for one head.
      groups: of the normalisations; 0 for at most 32 of at least 4 channels each.
      epsilon: of the normalisations.
      dtype: the precision of the computation; parameters and the output are float32.
      remat: whether blocks are computed again for the gradient: less memory, more time.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_at: Sequence[int] = (16,)
    dropout: float = 0.0
    embedding: str = "positional"
    num_classes: int = 0
    num_augmentations: int = 0
    resample: str = "pool"
    taps: Sequence[float] = ()
    rescale: bool = True
    adaptive: bool = False
    head_channels: int = 0
    groups: int = 0
    epsilon: float = 1e-6
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, cond: Array, y: Array | None = None, augmentation: Array | None = None, *, train: bool = False
    ) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]` or a scalar, the value that the network is conditioned on.
          y: `[batch]` integer labels, where `num_classes` is set; that number itself for no class.
          augmentation: `[batch, num_augmentations]`; none is the same as zeros.
          train: whether dropout is active.

        Raises:
          ValueError: if the image cannot be halved often enough, or a field cannot be right.
        """
        self.check(x)
        sizes = self.features, self.embedding, self.num_classes, self.num_augmentations
        cond = jnp.broadcast_to(cond, x.shape[:1])
        emb = Embedding(*sizes)(cond, y, augmentation)
        skips = self.way_down(x, emb, train)
        h = self.step(skips[-1], emb, train, attend=True)
        h = self.step(h, emb, train, attend=False)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.step(h, emb, train, features=multiplier * self.features)
            if level:
                h = self.change(h, emb, train, up=True)
        return conv(nn.silu(GroupNorm(self.groups, self.epsilon)(h)), x.shape[-1], scale=0.0).astype(jnp.float32)

    def check(self, x: Array) -> None:
        """Raise a `ValueError` at a field that cannot be right, or cannot be with images of this size."""
        check_sizes(
            self,
            ("features", "multipliers", "num_blocks"),
            ("num_classes", "num_augmentations", "head_channels", "groups"),
        )
        check_halvings(x, len(self.multipliers) - 1)

    def way_down(self, x: Array, emb: Array, train: bool) -> list[Array]:
        """The feature maps of the first convolution, of every block and of every change of resolution."""
        maps = [conv(cast(x, self.dtype), self.features)]
        for level, multiplier in enumerate(self.multipliers):
            if level:
                maps.append(self.change(maps[-1], emb, train, up=False))
            for _ in range(self.num_blocks):
                maps.append(self.step(maps[-1], emb, train, features=multiplier * self.features))
        return maps

    def step(
        self,
        h: Array,
        emb: Array | None,
        train: bool,
        *,
        features: int = 0,
        attend: bool | None = None,
        change: Any = None,
    ) -> Array:
        """A residual block, of as many channels or `features`, and attention where it is due or as `attend` says."""
        if attend is None:
            attend = h.shape[1] in self.attention_at

        def apply(network: nn.Module, h: Array, emb: Array | None) -> Array:
            settings: dict[str, Any] = {"rescale": self.rescale, "groups": self.groups, "epsilon": self.epsilon}
            block = ResidualBlock(features or h.shape[-1], self.dropout, change, adaptive=self.adaptive, **settings)
            h = block(h, emb, train)
            heads = max(h.shape[-1] // (self.head_channels or h.shape[-1]), 1)
            return Attention(heads, **settings)(h) if attend else h

        return (nn.remat(apply) if self.remat else apply)(self, h, emb)

    def change(self, h: Array, emb: Array | None, train: bool, *, up: bool) -> Array:
        """Half or twice the height and width."""
        if self.resample == "block":
            return self.step(h, emb, train, attend=False, change=functools.partial(resample, up=up, taps=self.taps))
        if self.resample in ("conv", "conv_symmetric"):
            return Resample(up, h.shape[-1], self.taps, symmetric=self.resample == "conv_symmetric")(h)
        if self.resample == "pool":
            return resample(h, up=up, taps=self.taps)
        raise ValueError(
            f"{type(self).__name__}: unknown resample {self.resample!r}; there are pool, conv, conv_symmetric, block"
        )
