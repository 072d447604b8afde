"""EfficientNet-Lite0: a small classifier of ImageNet without squeeze-and-excitation (Tan & Le 2019; the Lite variant).

Its blocks are those of MobileNetV2 (Sandler et al. 2018): to more channels, a depthwise convolution, to few channels,
and around it all the identity where the shapes agree; min(max(x, 0), 6) follows every normalisation but the last.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.frozen import BatchNorm, Conv, Dense, DepthwiseConv, resize
from score_jax.networks.inception import Features

__all__ = ["EfficientNetLite0"]

# Of a stage: blocks, size of the kernel, stride of the first block, expansion, features.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Block(nn.Module):
    """Expand, convolve each channel, project."""

    size: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        if self.expansion > 1:
            h = nn.relu6(BatchNorm(name="_bn0")(Conv(self.expansion * x.shape[-1], name="_expand_conv")(h)))
        h = nn.relu6(BatchNorm(name="_bn1")(DepthwiseConv(self.size, self.stride, name="_depthwise_conv")(h)))
        h = BatchNorm(name="_bn2")(Conv(self.features, name="_project_conv")(h))
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: uint8 images `[batch, h, w, 3]`, resized to 224x224, to 1,280 features and 1,000 logits."""

    @nn.compact
    def __call__(self, images: Array) -> Features:
        x = (resize(images.astype(jnp.float32), 224) - 127) / 128
        x = nn.relu6(BatchNorm(name="_bn0")(Conv(32, (3, 3), 2, name="_conv_stem")(x)))
        blocks = [(size, stride if i == 0 else 1, *rest) for n, size, stride, *rest in STAGES for i in range(n)]
        for i, block in enumerate(blocks):
            x = Block(*block, name=f"_blocks.{i}")(x)
        x = nn.relu6(BatchNorm(name="_bn1")(Conv(1280, name="_conv_head")(x)))
        pool = x.mean(axis=(1, 2))
        return Features(pool, Dense(1000, name="_fc")(pool))
