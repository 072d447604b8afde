"""DiT, a transformer for large accelerators (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

The image is cut into patches, each a token x with the sines and cosines of its place; blocks with what the network
knows, c, as adaptive layer normalisation (adaLN-zero),

    x <- x + a_1(c) attention((1 + g_1(c)) norm(x) + b_1(c)),                (1)
    x <- x + a_2(c) mlp((1 + g_2(c)) norm(x) + b_2(c)),                      (2)

where a, b and g are dense in c and start at zero, so that a fresh block is the identity.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from score_jax.networks.embeddings import Embedding, transformer
from score_jax.networks.layers import cast, check_sizes, dense

__all__ = ["DiT"]


class Block(nn.Module):
    """Eqs. 1 and 2: tokens `[batch, n, width]` to the same.

    Attributes:
      heads: of attention.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        batch, n, width = x.shape
        b_1, g_1, a_1, b_2, g_2, a_2 = jnp.split(dense(emb, 6 * width, scale=0.0)[:, None, :], 6, axis=-1)
        h = _norm(x) * (1 + g_1) + b_1
        q, k, v = (dense(h, width).reshape(batch, n, self.heads, width // self.heads) for _ in range(3))
        x = x + a_1 * dense(jax.nn.dot_product_attention(q, k, v).reshape(x.shape), width)
        h = _norm(x) * (1 + g_2) + b_2
        return x + a_2 * dense(nn.gelu(dense(h, 4 * width)), width)


def _norm(x: Array) -> Array:
    return nn.LayerNorm(1e-6, use_bias=False, use_scale=False, dtype=x.dtype)(x)


class DiT(nn.Module):
    """A transformer of patches, whose output has the shape of its input, `[batch, height, width, channels]`.

    `TENSOR_AXES` says how its parameters divide over devices: heads and hidden features, the axis by the path.

    The defaults are those of DiT-S/2; B, L and XL have width 768, 1024, 1152, depth 12, 24, 28, heads 12, 16, 16.

    Attributes:
      width: of a token.
      depth: the number of blocks.
      heads: of attention.
      patch: the height and width of a patch.
      embedding: `transformer` or `positional` where `cond` is a time up to about 1,000, `fourier` for a noise level.
      num_classes: the number of classes; 0 for an unconditional network.
      dtype: the precision of the computation; parameters and the output are float32.
      remat: whether blocks are computed again for the gradient: less memory, more time.
    """

    TENSOR_AXES: ClassVar[dict[str, int]] = {
        r"Block_\d+/Dense_[1235]/kernel": 1,
        r"Block_\d+/Dense_[1235]/bias": 0,
        r"Block_\d+/Dense_[46]/kernel": 0,
    }

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    embedding: str = "transformer"
    num_classes: int = 0
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: Array | None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]` or a scalar, the value that the network is conditioned on.
          y: `[batch]` integer labels, where `num_classes` is set; that number itself for no class.
          train: without effect: there is no dropout.

        Raises:
          ValueError: if the image does not divide into patches or the width into heads.
        """
        check_sizes(self, ("width", "depth", "heads", "patch"), ("num_classes",))
        if x.ndim != 4 or any(size % self.patch for size in x.shape[1:3]):
            raise ValueError(
                f"DiT needs images [batch, h, w, c] with h and w divisible by patch={self.patch}, got {list(x.shape)}"
            )
        if self.width % (4 * self.heads):
            raise ValueError(f"DiT needs a width divisible by 4 heads, got {self.width} and {self.heads} heads")
        cond = jnp.broadcast_to(cond, x.shape[:1])
        emb = Embedding(self.width // 4, self.embedding, self.num_classes)(cond, y)
        batch, height, width, channels = x.shape
        rows, columns = height // self.patch, width // self.patch
        patches = x.reshape(batch, rows, self.patch, columns, self.patch, channels).transpose(0, 1, 3, 2, 4, 5)
        h = dense(cast(patches.reshape(batch, rows * columns, -1), self.dtype), self.width)
        h, emb = h + self.places(rows, columns)[None], emb.astype(h.dtype)

        def apply(network: nn.Module, h: Array, emb: Array) -> Array:
            return Block(self.heads)(h, emb)

        for _ in range(self.depth):
            h = (nn.remat(apply) if self.remat else apply)(self, h, emb)
        shift, scale = jnp.split(dense(emb, 2 * self.width, scale=0.0)[:, None, :], 2, axis=-1)
        h = dense(_norm(h) * (1 + scale) + shift, self.patch**2 * channels, scale=0.0).astype(jnp.float32)
        h = h.reshape(batch, rows, columns, self.patch, self.patch, channels).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(x.shape)

    def places(self, rows: int, columns: int) -> Array:
        """Sines and cosines of the row in the first half of a token, of the column in the second."""
        row = jnp.repeat(transformer(jnp.arange(rows), self.width // 2), columns, axis=0)
        column = jnp.tile(transformer(jnp.arange(columns), self.width // 2), (rows, 1))
        return jnp.concatenate([row, column], axis=1).astype(self.dtype)
