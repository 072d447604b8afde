"""Layers that several networks share: normalisation, residual blocks, attention, changes of resolution.

They compute in the precision of their input, with parameters in float32: a network chooses by casting what it passes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer, variance_scaling

from score_jax.networks.convolution import convolve

__all__ = [
    "Attention",
    "GroupNorm",
    "Resample",
    "ResidualBlock",
    "cast",
    "check_halvings",
    "check_sizes",
    "conv",
    "default_init",
    "dense",
    "dropout",
    "fir",
    "join",
    "resample",
]


def default_init(scale: float = 1.0) -> Initializer:
    """DDPM's initialiser, uniform with variance scale / fan_avg; a scale of 0 gives zeros."""
    return variance_scaling(scale, "fan_avg", "uniform") if scale else nn.initializers.zeros


def dense(x: Array, features: int, *, scale: float = 1.0) -> Array:
    """A dense layer over the last axis, with DDPM's initialiser."""
    return nn.Dense(features, dtype=x.dtype, kernel_init=default_init(scale))(x)


def conv(x: Array, features: int, *, size: int = 3, scale: float = 1.0, **options) -> Array:
    """A convolution that keeps the image's size, with DDPM's initialiser; `options` of `nn.Conv`."""
    options |= {"dtype": x.dtype, "kernel_init": default_init(scale), "conv_general_dilated": convolve}
    return nn.Conv(features, (size, size), **options)(x)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018).

    y = scale (x - m) / sqrt(E[x^2] - m^2 + epsilon) + bias, the moments m = E[x] and E[x^2] taken over a group.
    The moments of a group are means of its channels' moments, so the image is read once for
    those and once for one multiplication and addition a channel: on CPU 2 to 5 times faster than
    `nn.GroupNorm`, which reduces over a reshaped image.

    Attributes:
      groups: how many; 0 for at most 32 of at least 4 channels each.
      epsilon: added to the variance.
    """

    groups: int = 0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        groups = self.groups or math.gcd(channels, min(max(channels // 4, 1), 32))
        if channels % groups:
            raise ValueError(f"group normalisation: {channels} channels do not divide into {groups} groups")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return _group_norm(x, scale, bias, groups, self.epsilon)


@functools.partial(jax.jit, static_argnums=(3, 4))  # Traced once a shape: networks normalise a hundred times.
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> Array:
    channels = x.shape[-1]

    def per_group(moment: Array) -> Array:
        mean = moment.reshape(-1, groups, channels // groups).mean(axis=2)
        return jnp.repeat(mean, channels // groups, axis=1)

    wide = settled(x).astype(jnp.float32)
    mean = per_group(wide.mean(axis=(1, 2)))
    square = per_group((wide**2).mean(axis=(1, 2)))
    factor = scale[None] * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0.0) + epsilon)
    offset = bias[None] - mean * factor
    return settled_derivative((wide * factor[:, None, None, :] + offset[:, None, None, :]).astype(x.dtype))


@functools.partial(jax.jit, static_argnums=2)  # Traced once a shape.
def dropout(x: Array, key: Array, rate: float) -> Array:
    """0 with the probability `rate`, otherwise x / (1 - rate) (Srivastava et al. 2014), by element.

    An element is kept where a hash of its position and the key is above the rate: h(h(i + k_1) + k_2), h a bijection of
    the 32-bit integers (Wellons 2018, "lowbias32").  It is computed in passing wherever the mask is needed; drawn by
    JAX's own generator the masks took a sixth of the time of DDPM++'s gradient on CPU, and as much of its compilation.

    Raises:
      ValueError: unless 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: the rate must be at least 0 and less than 1, got {rate}")
    bits = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    for word in jax.random.key_data(key):
        bits = bits + word
        bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
        bits = bits ^ bits >> 16
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1 - rate), 0)


class ResidualBlock(nn.Module):
    """Two convolutions and a skip: `[batch, h, w, c]` to `[batch, h, w, features]`, or another height and width.

    Of Ho et al. 2020; with `resample` of Brock et al. 2019 ("BigGAN"), where the skip has a 1x1 convolution then; with
    `adaptive` of Dhariwal & Nichol 2021, where it has one only if the channels differ.

    Attributes:
      features: channels of the output.
      dropout: the rate, before the second convolution.
      resample: changes the resolution, of the skip and before the first convolution.
      rescale: divides the sum by sqrt(2), which keeps its variance (Song et al. 2021, Appendix H).
      adaptive: the embedding scales and shifts the second normalisation; otherwise it is added before that.
      groups: of the normalisations, as in `GroupNorm`, and so `epsilon`.
    """

    features: int
    dropout: float = 0.0
    resample: Callable[[Array], Array] | None = None
    rescale: bool = True
    adaptive: bool = False
    groups: int = 0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, emb: Array | None, train: bool) -> Array:
        h = nn.silu(GroupNorm(self.groups, self.epsilon)(x))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = conv(h, self.features)
        norm = GroupNorm(self.groups, self.epsilon)
        if emb is None:
            h = norm(h)
        else:
            known = dense(emb.astype(x.dtype), (1 + self.adaptive) * self.features)[:, None, None, :]
            if self.adaptive:
                scale, shift = jnp.split(known, 2, axis=-1)
                h = norm(h) * (1 + scale) + shift
            else:
                h = norm(h + known)
        h = nn.silu(h)
        if train and self.dropout:
            h = dropout(h, self.make_rng("dropout"), self.dropout)
        h = conv(h, self.features, scale=0.0)
        if x.shape[-1] != self.features or (self.resample and not self.adaptive):
            x = dense(x, self.features)
        return join(x, h, self.rescale)


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input (Ho et al. 2020): `[batch, h, w, c]` to the same.

    Attributes:
      heads: their number.
      rescale: as in `ResidualBlock`.
      groups: as in `GroupNorm`, and so `epsilon`.
    """

    heads: int = 1
    rescale: bool = True
    groups: int = 0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, self.epsilon)(x).reshape(batch, height * width, channels)
        if channels % self.heads:
            raise ValueError(f"attention: {channels} channels do not divide into {self.heads} heads")
        split = batch, height * width, self.heads, channels // self.heads
        q, k, v = (dense(h, channels).reshape(split) for _ in range(3))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return join(x, dense(h, channels, scale=0.0), self.rescale)


def join(x: Array, h: Array, rescale: bool) -> Array:
    """x + h; rescaled, as in `ResidualBlock`."""
    return settled((x + h) / math.sqrt(2) if rescale else x + h)


def settled(x: Array) -> Array:
    """x, computed once: XLA's CPU backend would else do so wherever it is used, back along all residual sums.

    `train.tune_cpu` has the barrier kept; other backends weigh this by themselves.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


@jax.custom_jvp
def settled_derivative(x: Array) -> Array:
    """x, with its derivative computed once: three reductions and a product of a normalisation's gradient use that."""
    return x


@settled_derivative.defjvp
def _settle(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], settled(tangents[0])


def cast(x: Array, dtype: str) -> Array:
    """The array in the precision that a network computes in; a `ValueError` for an unknown one."""
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(known)}")
    return x.astype(dtype)


def check_halvings(x: Array, halvings: int) -> None:
    """Raise a `ValueError` unless `x` is `[batch, h, w, c]` with h and w that can be halved so often."""
    if x.ndim != 4 or any(size % 2**halvings for size in x.shape[1:3]):
        raise ValueError(
            f"a network of {halvings + 1} resolutions needs images [batch, h, w, c] with h and w "
            f"divisible by {2**halvings}, got {list(x.shape)}: resize the images or shorten `multipliers`"
        )


def check_sizes(network: nn.Module, positive: Sequence[str], natural: Sequence[str] = ()) -> None:
    """Raise a `ValueError` at a field, whole numbers, that is less than 1 (`positive`) or less than 0 (`natural`)."""
    for name in (*positive, *natural):
        value, least = getattr(network, name), int(name in positive)
        sizes = value if isinstance(value, list | tuple) else [value]
        if not sizes or any(not isinstance(size, int | np.integer) or size < least for size in sizes):
            raise ValueError(f"{type(network).__name__} needs {name} of at least {least}, got {value!r}")


def fir(
    x: Array, taps: Sequence[float], pad: tuple[int, int], *, up: int = 1, down: int = 1, gain: float = 1.0
) -> Array:
    """A separable filter between changes of rate, along height and width (Karras et al. 2019, StyleGAN).

    up - 1 zeros after every pixel, `pad` zeros before and after, convolution with the taps scaled to the sum `gain`,
    every `down`-th pixel of that.  A sum of shifted slices: on CPU faster than a convolution by channels.
    """
    kernel = gain * np.asarray(taps[::-1], float) / np.sum(taps)
    for axis in (1, 2):
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (pad[0], pad[1] + up - 1, up - 1)
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        span = (x.shape[axis] - len(kernel)) // down * down + 1
        parts = (jax.lax.slice_in_dim(x, k, k + span, down, axis) for k in range(len(kernel)))
        x = functools.reduce(jnp.add, (float(tap) * part for tap, part in zip(kernel, parts, strict=True)))
    return x


def resample(x: Array, *, up: bool, taps: Sequence[float] = ()) -> Array:
    """Twice or half the height and width, `[batch, h, w, c]`: by repetition and means, or the filter of some taps."""
    n = len(taps)
    if taps and up:
        return fir(x, taps, ((n + 1) // 2, (n - 2) // 2), up=2, gain=2.0)
    if taps:
        return fir(x, taps, ((n - 1) // 2, (n - 2) // 2), down=2)
    if not up:
        return nn.avg_pool(x, (2, 2), strides=(2, 2))
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Resample(nn.Module):
    """`resample` and a 3x3 convolution, in one: `[batch, h, w, c]` to `[batch, 2h, 2w, features]` or half.

    With taps the convolution is between the change of rate and the filter (Karras et al. 2020, StyleGAN2); half
    without taps is a convolution of stride 2, padded as TensorFlow does, behind the image only, or as PyTorch.

    Attributes:
      up: twice, otherwise half.
      features: channels of the output.
      taps: of the filter, `(1, 3, 3, 1)` as published; empty for none.
      symmetric: whether the convolution of stride 2 is padded on both sides.
    """

    up: bool
    features: int
    taps: Sequence[float] = ()
    symmetric: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.taps and self.up:
            return conv(resample(x, up=True), self.features)
        if not self.taps:
            return conv(x, self.features, strides=2, padding=1 if self.symmetric else "SAME")
        n = len(self.taps)
        if not self.up:
            x = fir(x, self.taps, ((n + 1) // 2, n // 2))
            return conv(x, self.features, strides=2, padding="VALID")
        x = conv(x, self.features, padding=2, input_dilation=(2, 2))
        return fir(x, self.taps, ((n - 1) // 2, (n - 2) // 2), gain=2.0)
