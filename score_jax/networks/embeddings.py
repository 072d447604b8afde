"""What a network knows beside its input, as a vector: waves of the conditioning value, and the class."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from score_jax.networks.layers import default_init, dense

__all__ = ["Embedding", "fourier", "positional", "transformer"]


def positional(cond: Array, size: int) -> Array:
    """Sines and cosines of geometrically spaced frequencies (Ho et al. 2020): `[batch]` to `[batch, size]`.

    The frequencies run from 1 down to 1/10,000, for a conditioning value between 0 and about 1,000.
    """
    half = size // 2
    return _waves(cond, jnp.exp(-math.log(10_000) * jnp.arange(half) / max(half - 1, 1)))


def transformer(cond: Array, size: int) -> Array:
    """As `positional`, but the last frequency is one step above 1/10,000, as Vaswani et al. have it."""
    half = size // 2
    return _waves(cond, jnp.exp(-math.log(10_000) * jnp.arange(half) / half))


def fourier(cond: Array, size: int) -> Array:
    """Sines and cosines of log(cond), for a positive noise level: `[batch]` to `[batch, size]`.

    The wavelengths run geometrically from 64, longer than any ladder of noise levels, down to 1/2.
    """
    half = size // 2
    return _waves(
        jnp.log(cond),
        2 * math.pi / 64 * jnp.exp(math.log(128) * jnp.arange(half) / max(half - 1, 1)),
    )


def _waves(value: Array, frequencies: Array) -> Array:
    angles = value[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Embedding(nn.Module):
    """What a network knows beside its input: the conditioning value and, if any, the class; after an activation.

        silu(W_2 silu(W_1 waves(cond)) + class)

    as ADM and DiT have it (Dhariwal & Nichol 2021; Peebles & Xie 2023).  The label `num_classes` stands for no class:
    what a network learns where labels are dropped, and the unconditional score of classifier-free guidance (Ho &
    Salimans 2022, Algorithm 1).

    Attributes:
      features: the size of the waves; the embedding has four times as many.
      kind: `positional` or `transformer` for a time between 0 and about 1,000; for a noise level `fourier`, or, with
        random frequencies and twice as many waves, `gaussian_fourier`, as published with NCSN++.
      num_classes: the number of classes; 0 for an unconditional network.
      num_augmentations: the length of a vector that says how training images were augmented (Karras et al. 2022,
        Appendix F.2); 0 for none.
    """

    features: int
    kind: str = "positional"
    num_classes: int = 0
    num_augmentations: int = 0

    @nn.compact
    def __call__(self, cond: Array, y: Array | None, augmentation: Array | None = None) -> Array:
        if y is not None and not self.num_classes:
            raise ValueError("labels y for a network without classes: set num_classes")
        if augmentation is not None and not self.num_augmentations:
            raise ValueError("an augmentation for a network that knows none: set num_augmentations")
        waves = {
            "positional": positional,
            "transformer": transformer,
            "fourier": fourier,
            "gaussian_fourier": self.gaussian_fourier,
        }
        if self.kind not in waves:
            raise ValueError(f"unknown embedding {self.kind!r}; there are {', '.join(waves)}")
        emb = waves[self.kind](cond, self.features)
        if self.num_augmentations:
            if augmentation is None:
                augmentation = jnp.zeros((len(cond), self.num_augmentations))
            emb = emb + nn.Dense(self.features, use_bias=False, kernel_init=default_init(), name="augment")(
                augmentation
            )
        emb = dense(nn.silu(dense(emb, 4 * self.features)), 4 * self.features)
        if self.num_classes and y is None:
            raise ValueError(f"a network of {self.num_classes} classes needs labels y, [batch] integers")
        if y is not None:
            emb = emb + nn.Embed(self.num_classes + 1, 4 * self.features)(y)
        return nn.silu(emb)

    def gaussian_fourier(self, cond: Array, size: int) -> Array:
        # The published standard deviation; training does not change the frequencies.
        frequencies = self.param("frequencies", nn.initializers.normal(16.0), (size,))
        return _waves(jnp.log(cond), 2 * math.pi * jax.lax.stop_gradient(frequencies))
