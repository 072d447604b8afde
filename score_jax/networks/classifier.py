"""A time-conditioned classifier of noisy images, for guidance (Dhariwal & Nichol 2021, Section 4).

The way down of a U-Net, the mean over the last feature map's pixels, and one dense layer.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.embeddings import Embedding
from score_jax.networks.layers import GroupNorm, check_sizes, dense
from score_jax.networks.unet import UNet

__all__ = ["Classifier"]


class Classifier(UNet):
    """The logits of the classes of an image, `[batch, height, width, channels]` to `[batch, num_classes]`.

    Its attributes are those of `UNet`.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(
        self, x: Array, cond: Array, y: Array | None = None, augmentation: Array | None = None, *, train: bool = False
    ) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]` or a scalar, the value that the network is conditioned on.
          y: without effect: the class is what it finds.
          augmentation: without effect.
          train: whether dropout is active.

        Raises:
          ValueError: if the image cannot be halved often enough.
        """
        self.check(x)
        check_sizes(self, ("num_classes",))
        cond = jnp.broadcast_to(cond, x.shape[:1])
        h = self.way_down(x, Embedding(self.features, self.embedding)(cond, None), train)[-1]
        h = jnp.mean(nn.silu(GroupNorm(self.groups, self.epsilon)(h)), axis=(1, 2)).astype(jnp.float32)
        return dense(h, self.num_classes)
