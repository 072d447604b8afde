"""The noise-conditional score networks: NCSN and NCSNv2, RefineNets with one estimate for each of a ladder of levels.

A RefineNet (Lin et al. 2017) of dilated, pre-activation residual blocks: stages on the way down, of which the first
keeps the resolution, the last two widen the view by dilation and the others halve the image; on the way up, refine
blocks that each join a stage's output with what came from below,

    y = RCU(CRP(sum_i upsample(conv(RCU(x_i))))),                           (1)

of residual convolution units, RCU(x) = x + conv(elu(conv(elu(x)))), and chained residual pooling,

    CRP(x) = p_0 + p_1 + p_2,    p_0 = elu(x),  p_k = conv(pool(p_(k-1))).  (2)

Normalisation is instance norm++ (Song & Ermon 2019, Appendix A.1): instance normalisation forgets the mean m_k of
each channel, which is given back, normalised over channels by their mean M and standard deviation S,

    y_k = gamma_k [ (x_k - m_k) / s_k + alpha_k (m_k - M) / S ] + beta_k.   (3)

- NCSN (Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution"): gamma, alpha and
  beta belong to the noise level, and (3) stands before every convolution but the first and the shortcuts'; CRP pools
  by averages.
- NCSNv2 (Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", Technique 3): one
  network for all levels, told of them by a division alone, s(x, sigma_i) = f(x) / sigma_i, where
  sigma_i = sigma_max (sigma_min / sigma_max)^(i / (L - 1)); (3) in residual blocks and before the last convolution
  only; CRP pools by maxima.

The networks map an input in [0, 1] to [-1, 1], return the score, and are conditioned on a level's index: 0 is the
largest.  Submodules have the names of the authors' release.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import variance_scaling

from score_jax.networks.convolution import convolve
from score_jax.networks.layers import check_sizes

__all__ = ["NCSN", "NCSNv2"]

# PyTorch's initialiser of convolutions, and its epsilon of instance normalisation.
CONV_INIT = variance_scaling(1 / 3, "fan_in", "uniform")
EPSILON = 1e-5

Norm = Callable[..., Any]


class InstanceNormPlus(nn.Module):
    """Instance norm++ (Eq. 3): `[batch, h, w, c]` to the same.

    Attributes:
      num_levels: the levels that have parameters of their own; 0 for parameters that all levels share.
      ddof: 1 where S^2 is the unbiased variance over channels (PyTorch's), else 0.
    """

    num_levels: int = 0
    ddof: int = 1

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        channels = x.shape[-1]
        if self.num_levels:
            table = nn.Embed(self.num_levels, 3 * channels, embedding_init=_level_init, name="embed")
            gamma, alpha, beta = jnp.split(table(level), 3, axis=-1)
        else:
            gamma, alpha = (self.param(name, _near_one, (1, channels)) for name in ("gamma", "alpha"))
            beta = self.param("beta", nn.initializers.zeros, (1, channels))
        mean = x.mean(axis=(1, 2))
        variance = x.var(axis=(1, 2))
        spread = jnp.sqrt(mean.var(axis=1, keepdims=True, ddof=self.ddof) + EPSILON)
        across = (mean - mean.mean(axis=1, keepdims=True)) / spread
        # One multiplication and one addition a pixel.
        factor = gamma * jax.lax.rsqrt(variance + EPSILON)
        offset = gamma * alpha * across + beta - mean * factor
        return x * factor[:, None, None, :] + offset[:, None, None, :]


def _near_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def _level_init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """gamma and alpha near one, beta zero."""
    return _near_one(key, shape, dtype).at[:, 2 * shape[1] // 3 :].set(0)


def _conv(features: int, name: str, *, kernel: int = 3, dilation: int = 1, bias: bool = True) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        kernel_dilation=dilation,
        use_bias=bias,
        kernel_init=CONV_INIT,
        conv_general_dilated=convolve,
        name=name,
    )


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a skip: `[batch, h, w, c]` to `features`, the image halved or the view widened.

    Attributes:
      features: channels of the output.
      norm: the class of normalisation.
      first: whether the block opens a stage, and halves the image where there is no dilation.
      dilation: of the convolutions.
    """

    features: int
    norm: Norm
    first: bool
    dilation: int

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        halve = self.first and self.dilation == 1

        def out(h: Array, name: str, kernel: int) -> Array:
            if halve:
                return nn.avg_pool(_conv(self.features, f"{name}_conv", kernel=kernel)(h), (2, 2), (2, 2))
            return _conv(self.features, name, dilation=self.dilation)(h)

        h = nn.elu(self.norm(name="normalize1")(x, level))
        h = _conv(x.shape[-1] if self.first else self.features, "conv1", dilation=self.dilation)(h)
        h = out(nn.elu(self.norm(name="normalize2")(h, level)), "conv2", 3)
        return h + (out(x, "shortcut", 1) if self.first else x)


class RefineBlock(nn.Module):
    """Eq. 1: inputs of several resolutions, joined at that of the first.

    Attributes:
      features: channels of the output.
      norm: the class of normalisation that stands before each convolution.
      pool: the pooling of 5x5 pixels in CRP.
      align_corners: whether upsampling maps corner pixels to corner pixels.
      num_units: residual units after the pooling.
    """

    features: int
    norm: Norm
    pool: Callable[..., Array]
    align_corners: bool
    num_units: int

    @nn.compact
    def __call__(self, inputs: Sequence[Array], level: Array) -> Array:
        def normalised(h: Array, name: str) -> Array:
            return cast(Array, self.norm(name=name)(h, level))

        def units(h: Array, name: str, number: int) -> Array:
            for unit in range(1, number + 1):
                skip = h
                for part in (f"{name}_{unit}_1", f"{name}_{unit}_2"):
                    h = nn.elu(normalised(h, f"{part}_norm"))
                    h = _conv(h.shape[-1], f"{part}_conv", bias=False)(h)
                h = h + skip
            return h

        shape = inputs[0].shape[1:3]
        parts = [units(x, f"adapt_convs_{i}", 2) for i, x in enumerate(inputs)]
        if len(parts) > 1:
            for i, part in enumerate(parts):
                part = _conv(self.features, f"msf_convs_{i}")(normalised(part, f"msf_norms_{i}"))
                parts[i] = _resize(part, shape, align_corners=self.align_corners)
        h = path = nn.elu(sum(parts))
        for i in range(2):
            # 5x5 pixels, one axis after the other: 10 reads a pixel in place of 25.
            path = self.pool(normalised(path, f"crp_norms_{i}"), (5, 1), padding="SAME")
            path = self.pool(path, (1, 5), padding="SAME")
            path = _conv(self.features, f"crp_convs_{i}", bias=False)(path)
            h = h + path
        return units(h, "output_convs", self.num_units)


def _resize(x: Array, shape: Sequence[int], *, align_corners: bool) -> Array:
    """Bilinear upsampling, `[batch, h, w, c]` to `[batch, *shape, c]`."""
    if x.shape[1:3] == tuple(shape):
        return x
    if not align_corners:
        return jax.image.resize(x, (x.shape[0], *shape, x.shape[3]), "bilinear")

    def weights(size: int, new: int) -> Array:
        distance = jnp.linspace(0, size - 1, new)[:, None] - jnp.arange(size)[None, :]
        return jnp.maximum(1 - jnp.abs(distance), 0.0)

    return jnp.einsum("ph,qw,bhwc->bpqc", weights(x.shape[1], shape[0]), weights(x.shape[2], shape[1]), x)


def _refine_net(
    x: Array, level: Array, features: int, multipliers: Sequence[int], norm: Norm, refine: Callable[..., RefineBlock]
) -> Array:
    """What the networks share, to be called inside a compact method.

    `refine(own, above, **rest)` builds a block from the widths of its own stage and of the next one up, and the rest
    of its attributes.
    """
    halvings = len(multipliers) - 3
    if halvings < 0:
        raise ValueError(f"multipliers need one entry a stage, at least 3, got {tuple(multipliers)}")
    if x.ndim != 4 or any(size % 2**halvings for size in x.shape[1:3]):
        raise ValueError(
            f"a network of {len(multipliers)} stages needs images [batch, h, w, c] with h and w divisible by "
            f"{2**halvings}, got {list(x.shape)}: resize the images or shorten `multipliers`"
        )
    h = _conv(features, "begin_conv")(2 * x - 1)
    stages = []
    for i, multiplier in enumerate(multipliers):
        dilation = 2 ** max(0, i - halvings)
        for j in range(2):
            first = i > 0 and j == 0
            h = ResidualBlock(multiplier * features, norm, first, dilation, name=f"res{i + 1}_{j}")(h, level)
        stages.append(h)
    joined = [stages.pop()]
    for i in range(1, len(multipliers) + 1):
        own = joined[0].shape[-1]
        block = refine(own, stages[-1].shape[-1] if stages else own, num_units=1 if stages else 3, name=f"refine{i}")
        h = block(joined, level)
        joined = [stages.pop(), h] if stages else []
    return _conv(x.shape[-1], "end_conv")(nn.elu(norm(name="normalizer")(h, level)))


class NCSN(nn.Module):
    """The network of 2019: `[batch, height, width, channels]` in [0, 1] to the score, in the same shape.

    Attributes:
      features: channels at the full resolution.
      multipliers: the factor on `features` in each stage.  The first keeps the resolution, the last two widen the
        view by dilation, the others halve the image.
      num_levels: the number of noise levels.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_levels: int = 10

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: None = None, *, train: bool = False) -> Array:
        """Apply the network.

        Args:
          x: `[batch, height, width, channels]`.
          cond: `[batch]` or a scalar, the index of the noise level, 0 for the largest; rounded to an integer.
          y: for the signature's sake; the network knows no classes.
          train: for the signature's sake.

        Raises:
          ValueError: if the image cannot be halved often enough.
        """
        check_sizes(self, ("features", "multipliers", "num_levels"))
        norm = partial(InstanceNormPlus, num_levels=self.num_levels)

        def refine(own: int, above: int, **rest: Any) -> RefineBlock:
            return RefineBlock(above, norm, nn.avg_pool, True, **rest)

        return _refine_net(x, _index(cond, x), self.features, self.multipliers, norm, refine)


class NCSNv2(nn.Module):
    """The network of 2020: `[batch, height, width, channels]` in [0, 1] to the score, in the same shape.

    Attributes:
      features: channels at the full resolution.
      multipliers: as in `NCSN`.  Published for 32 and 64 pixels (1, 2, 2, 2); Deeper, for 96 and 128, (1, 2, 2, 4, 4);
        Deepest, for 256, (1, 2, 2, 2, 4, 4).
      num_levels: the number of noise levels, geometrically spaced.
      sigma_min: the smallest.
      sigma_max: the largest.
      score_sde: the form in which the code of Song et al. 2021 has it: refine blocks as wide as their own stage, not
        as the next one up; the plain variance in Eq. 3; upsampling that does not align corners.
    """

    features: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_levels: int = 232
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    score_sde: bool = False

    @nn.compact
    def __call__(self, x: Array, cond: Array, y: None = None, *, train: bool = False) -> Array:
        """As `NCSN`."""
        norm = partial(InstanceNormPlus, ddof=0 if self.score_sde else 1)

        def refine(own: int, above: int, **rest: Any) -> RefineBlock:
            return RefineBlock(own if self.score_sde else above, _no_norm, nn.max_pool, not self.score_sde, **rest)

        level = _index(cond, x)
        out = _refine_net(x, level, self.features, self.multipliers, norm, refine)
        sigma = self.sigma_max * (self.sigma_min / self.sigma_max) ** (level / (self.num_levels - 1))
        return out / sigma[:, None, None, None]


def _no_norm(*, name: str) -> Callable[[Array, Array], Array]:
    return lambda x, level: x


def _index(cond: Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.round(cond).astype(jnp.int32), x.shape[:1])
