"""A time-conditioned residual network for vectors."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.embeddings import Embedding
from score_jax.networks.layers import check_sizes

__all__ = ["MLP"]


class MLP(nn.Module):
    """Residual blocks of two dense layers, the conditioning added between them.

    Attributes:
      features: the width.
      num_blocks: the number of residual blocks.
      embedding: `positional` where `cond` is a time up to about 1,000, `fourier` where it is a noise level.
      num_classes: the number of classes; 0 for an unconditional network.
    """

    features: int = 128
    num_blocks: int = 3
    embedding: str = "positional"
    num_classes: int = 0

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: Array | None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, d]`.
          cond: `[batch]` or a scalar, the value that the network is conditioned on.
          y: `[batch]` integer labels, where `num_classes` is set; that number itself for no class.
          train: without effect: there is no dropout.

        Returns:
          `[batch, d]`.
        """
        check_sizes(self, ("features", "num_blocks"), ("num_classes",))
        cond = jnp.broadcast_to(cond, x.shape[:1])
        emb = Embedding(self.features // 2, self.embedding, self.num_classes)(cond, y)
        h = nn.Dense(self.features)(x)
        for _ in range(self.num_blocks):
            r = nn.Dense(self.features)(nn.silu(h)) + nn.Dense(self.features)(emb)
            h = h + nn.Dense(self.features)(nn.silu(r))
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(nn.silu(h))
