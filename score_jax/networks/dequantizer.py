"""Variational dequantization: where in its cell an image is, drawn by a network that knows the image.

A logistic-normal law in each dimension (in place of the flow of Ho et al. 2019, "Flow++", Section 3.1), its mean m and
log scale s from a convolutional network of the image: with z = m + exp(s) eps, eps ~ N(0, I),

    u = sigmoid(z),   log q(u | image) = sum  log N(eps; 0, 1) - s - log u - log(1 - u).      (1)

It starts near the uniform law.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from score_jax.networks.layers import conv

__all__ = ["Dequantizer"]


class Dequantizer(nn.Module):
    """Noise in (0, 1) for images, and its log density: `apply(params, images, eps) -> (u, log_q [batch])`.

    Attributes:
      features: channels of the hidden layers.
      num_layers: hidden layers, 3x3 convolutions.
    """

    features: int = 32
    num_layers: int = 2

    @nn.compact
    def __call__(self, images: Array, eps: Array) -> tuple[Array, Array]:
        """Apply the network.

        Args:
          images: uint8 `[batch, h, w, c]`.
          eps: standard normal noise in the shape of the images.
        """
        h = images / 127.5 - 1
        for _ in range(self.num_layers):
            h = nn.silu(conv(h, self.features))
        mean, log_scale = jnp.split(conv(h, 2 * images.shape[-1], scale=0.0), 2, axis=-1)
        log_scale = log_scale + 0.5  # Of the logistic law, whose sigmoid is uniform, 1.6 is the nearest scale.
        z = mean + jnp.exp(log_scale) * eps
        log_q = -0.5 * (eps**2 + math.log(2 * math.pi)) - log_scale - jax.nn.log_sigmoid(z) - jax.nn.log_sigmoid(-z)
        return jax.nn.sigmoid(z), jnp.sum(log_q, axis=(1, 2, 3))
