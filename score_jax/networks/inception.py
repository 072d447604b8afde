"""Inception-v3 as the published evaluations use it: TensorFlow's network of 2015, in the layout of pytorch-fid.

The architecture is that of Szegedy et al. 2016, and differs from what is trained elsewhere under the name: there are
1,008 classes, averages over 3x3 pixels leave out what lies beyond the border, the very last one is a maximum, and there
is no auxiliary classifier.  A block is named by the grid that it works on: 5 at 35x35, 6 at 17x17, 7 at 8x8 pixels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_jax.networks.frozen import BatchNorm, Conv, Dense, resize

__all__ = ["Features", "Inception"]


class Features(NamedTuple):
    """What a network sees in images.

    Attributes:
      pool: `[batch, d]`, the last features, their means over the pixels.
      logits: `[batch, classes]`.
      spatial: `[batch, d]`, features that keep their places, where a network has them.
    """

    pool: Array
    logits: Array
    spatial: Array | None = None


class Unit(nn.Module):
    """A convolution, batch normalisation and a ReLU."""

    features: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, (self.height, self.width), self.stride, self.padding, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


average = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
maximum = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
halve = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
HALVING = (3, 3, 2, "VALID")


def _a(features: int) -> list[list]:
    return [
        [("branch1x1", 64)],
        [("branch5x5_1", 48), ("branch5x5_2", 64, 5, 5)],
        [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)],
        [average, ("branch_pool", features)],
    ]


def _b() -> list[list]:
    return [
        [("branch3x3", 384, *HALVING)],
        [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, *HALVING)],
        [halve],
    ]


def _c(features: int) -> list[list]:
    tall, wide = (features, 7, 1), (features, 1, 7)
    return [
        [("branch1x1", 192)],
        [("branch7x7_1", features), ("branch7x7_2", *wide), ("branch7x7_3", 192, 7, 1)],
        [
            ("branch7x7dbl_1", features),
            *[("branch7x7dbl_2", *tall), ("branch7x7dbl_3", *wide), ("branch7x7dbl_4", *tall)],
            ("branch7x7dbl_5", 192, 1, 7),
        ],
        [average, ("branch_pool", 192)],
    ]


def _d() -> list[list]:
    return [
        [("branch3x3_1", 192), ("branch3x3_2", 320, *HALVING)],
        [
            *[("branch7x7x3_1", 192), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1)],
            ("branch7x7x3_4", 192, *HALVING),
        ],
        [halve],
    ]


def _e(pool: Callable) -> list[list]:
    def fork(name: str) -> list[list]:
        return [[(f"{name}a", 384, 1, 3)], [(f"{name}b", 384, 3, 1)]]

    return [
        [("branch1x1", 320)],
        [("branch3x3_1", 384), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 3), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192)],
    ]


BLOCKS = {
    **{"Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64)},
    **{"Mixed_6a": _b(), "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192)},
    **{"Mixed_7a": _d(), "Mixed_7b": _e(average), "Mixed_7c": _e(maximum)},
}


class Block(nn.Module):
    """The branches of a block, side by side: of each its steps, a unit's name and arguments, a pool, or a fork."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def side_by_side(x: Array, branches: list[list]) -> Array:
            return jnp.concatenate([functools.reduce(apply, branch, x) for branch in branches], axis=-1)

        def apply(x: Array, step: Any) -> Array:
            if isinstance(step, tuple):
                return Unit(*step[1:], name=step[0])(x)
            return step(x) if callable(step) else side_by_side(x, step)

        return side_by_side(x, BLOCKS[str(self.name)])


class Inception(nn.Module):
    """Inception-v3: images to features.

    Called with uint8 images `[batch, h, w, 3]`; they are resized to 299x299 pixels and scaled to [-1, 1] as pytorch-fid
    does it; TensorFlow's graph resizes between corners and scales by (x - 128) / 128, which moves FID in the second
    decimal.  The result is a `Features`:

    * `pool`, 2,048 numbers: of FID (Heusel et al. 2017), KID, precision and recall;
    * `spatial`, 7 x 17 x 17 = 2,023 numbers: of sFID (Nash et al. 2021), the first seven channels of the block
      Mixed_6d, which are its 1x1 branch's, TensorFlow's `mixed_6/conv`;
    * `logits`, 1,008 numbers: of the Inception score (Salimans et al. 2016), without the classifier's bias, as there.
    """

    @nn.compact
    def __call__(self, images: Array) -> Features:
        x = 2 * resize(images.astype(jnp.float32) / 255, 299) - 1
        x = Unit(32, *HALVING, name="Conv2d_1a_3x3")(x)
        x = Unit(32, 3, 3, padding="VALID", name="Conv2d_2a_3x3")(x)
        x = halve(Unit(64, 3, 3, name="Conv2d_2b_3x3")(x))
        x = Unit(80, name="Conv2d_3b_1x1")(x)
        x = halve(Unit(192, 3, 3, padding="VALID", name="Conv2d_4a_3x3")(x))
        spatial = x
        for name in BLOCKS:
            x = Block(name=name)(x)
            spatial = x[..., :7] if name == "Mixed_6d" else spatial
        pool = x.mean(axis=(1, 2))
        return Features(pool, Dense(1008, use_bias=False, name="fc")(pool), spatial.reshape(len(x), -1))
