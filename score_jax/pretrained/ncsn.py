"""NCSN and NCSNv2 by the names of their authors' PyTorch releases."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from score_jax.networks import NCSN, NCSNv2
from score_jax.pretrained.base import Pretrained, fill, images, named, with_score
from score_jax.sde import VE
from score_jax.timesteps import level_of_time

__all__ = ["from_ncsn"]

# The deepest of the releases has 6; each more is traced, before its tensors are looked at.
MOST_STAGES = 8


def from_ncsn(params: Mapping[str, Any]) -> Pretrained:
    """NCSN and NCSNv2 as their authors released them (Song & Ermon 2019, 2020).

    Args:
      params: the PyTorch state by its names, `begin_conv.weight` and so on, with or without the prefixes `module.` and
        `_orig_mod.`; convolutions OIHW.  NCSNv2 is told from NCSN by its tensor `sigmas`; NCSN's ladder is the
        published one, from 1 to 0.01.

    Returns:
      The score of VE at the nearest of the ladder's levels; data in [0, 1].

    Raises:
      ValueError: if a tensor is missing, left over or of the wrong shape, naming it.
    """
    tensors = named(params)
    sigmas = tensors.pop("sigmas", None)
    # The stages of a deeper network are numbered 1, 2, 3, 31, 4, 5: in the order of the strings.
    stages = sorted({name.split(".")[0][3:] for name in tensors if re.match(r"res\d+\.", name)})
    numbers = {stage: str(i + 1) for i, stage in enumerate(stages)}
    if not 0 < len(stages) <= MOST_STAGES:
        raise ValueError(f"the tensors have {len(stages)} stages res1, res2, ...: these are not those of an NCSN")

    def channels(name: str) -> int:
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing: these are not the parameters of an NCSN")
        if not tensors[name].ndim or not len(tensors[name]):
            raise ValueError(f"the tensor {name!r} has the shape {tensors[name].shape}")
        return len(tensors[name])

    features = channels("begin_conv.weight")
    widths = [channels(f"res{stage}.1.conv2.weight") for stage in stages]
    if any(width % features for width in widths):
        raise ValueError(f"the stages have {widths} channels, which are no multiples of the first layer's {features}")
    multipliers = tuple(width // features for width in widths)
    if sigmas is None:
        levels = channels("normalizer.embed.weight")
        network: nn.Module = NCSN(features, multipliers, levels)
        sde = VE(sigma_min=0.01, sigma_max=1.0)
    else:
        if sigmas.ndim != 1 or len(sigmas) < 2 or not 0 < sigmas[-1] < sigmas[0] < np.inf:
            raise ValueError(
                f"the tensor 'sigmas', of shape {sigmas.shape}, must hold geometrically spaced, decreasing noise levels"
            )
        levels, sigma_max, sigma_min = len(sigmas), float(sigmas[0]), float(sigmas[-1])
        if not np.allclose(sigmas, np.geomspace(sigma_max, sigma_min, levels), rtol=1e-4):
            raise ValueError("the tensor 'sigmas' must hold geometrically spaced, decreasing noise levels")
        network = NCSNv2(features, multipliers, levels, sigma_min, sigma_max)
        sde = VE(sigma_min=sigma_min, sigma_max=sigma_max)

    def ours(name: str) -> str:
        name = re.sub(r"^(res|refine)(\d+)", lambda m: f"{m[1]}{numbers.get(m[2], m[2])}", name)
        return re.sub("weight$", "kernel", re.sub("embed.weight$", "embed.embedding", name))

    first = tensors["begin_conv.weight"]
    if first.ndim != 4:
        raise ValueError(f"the tensor 'begin_conv.weight' has the shape {first.shape}, not that of a convolution")
    tensors = {name: value.transpose(2, 3, 1, 0) if value.ndim == 4 else value for name, value in tensors.items()}
    condition = functools.partial(level_of_time, sde, num_levels=levels)
    return with_score(network, fill(network, images(32, 32, first.shape[1]), tensors, ours), sde, condition)
