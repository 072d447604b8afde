"""A time-conditioned classifier of noisy images, for guidance (Dhariwal & Nichol 2021, Section 4).

The way down of a U-Net, the mean over the last feature map's pixels, and one dense layer.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.layers import Embedding, GroupNorm, default_init
from score_jax.networks.unet import way_down

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """The logits of the classes of an image, `[batch, height, width, channels]` to `[batch, num_classes]`.

    Attributes:
      features: channels at the full resolution.
      multipliers: as in `UNet`, and so the rest.
      num_classes: the number of classes.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_at: Sequence[int] = (16,)
    dropout: float = 0.0
    embedding: str = "positional"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]`, the value that the network is conditioned on.
          y: for the signature's sake: the class is what it finds.
          train: whether dropout is active.

        Raises:
          ValueError: if the image cannot be halved often enough.
        """
        emb = Embedding(self.features, self.embedding)(cond, None)
        h = way_down(self, x, emb, train)[-1]
        h = jnp.mean(nn.silu(GroupNorm()(h)), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=default_init())(h)
