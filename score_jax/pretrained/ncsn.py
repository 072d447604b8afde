"""NCSN and NCSNv2 by the names of their authors' PyTorch releases."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from score_jax.networks import NCSN, NCSNv2
from score_jax.pretrained.base import Pretrained, fill, images, with_score
from score_jax.sde import VE
from score_jax.timesteps import level_of_time

__all__ = ["from_ncsn"]


def from_ncsn(params: Mapping[str, Any]) -> Pretrained:
    """NCSN and NCSNv2 as their authors released them (Song & Ermon 2019, 2020).

    Args:
      params: the PyTorch state by its names, `begin_conv.weight` and so on, with or without the prefix `module.`;
        convolutions OIHW.  NCSNv2 is told from NCSN by its tensor `sigmas`; NCSN's ladder is the published one,
        from 1 to 0.01.

    Returns:
      The score of VE at the nearest of the ladder's levels; data in [0, 1].

    Raises:
      ValueError: if a tensor is missing, left over or of the wrong shape, naming it.
    """
    tensors = {name.removeprefix("module."): np.asarray(value) for name, value in params.items()}
    sigmas = tensors.pop("sigmas", None)
    # The stages of a deeper network are numbered 1, 2, 3, 31, 4, 5: in the order of the strings.
    stages = sorted({name.split(".")[0][3:] for name in tensors if re.match(r"res\d+\.", name)})

    def channels(name: str) -> int:
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing: these are not the parameters of an NCSN")
        return len(tensors[name])

    features = channels("begin_conv.weight")
    multipliers = tuple(channels(f"res{stage}.1.conv2.weight") // features for stage in stages)
    if sigmas is None:
        levels = channels("normalizer.embed.weight")
        network: nn.Module = NCSN(features, multipliers, levels)
        sde = VE(sigma_min=0.01, sigma_max=1.0)
    else:
        levels, sigma_max, sigma_min = len(sigmas), float(sigmas[0]), float(sigmas[-1])
        if not np.allclose(sigmas, np.geomspace(sigma_max, sigma_min, levels), rtol=1e-4):
            raise ValueError("the tensor 'sigmas' must hold geometrically spaced, decreasing noise levels")
        network = NCSNv2(features, multipliers, levels, sigma_min, sigma_max)
        sde = VE(sigma_min=sigma_min, sigma_max=sigma_max)

    def ours(name: str) -> str:
        name = re.sub(r"^(res|refine)(\d+)", lambda m: f"{m[1]}{stages.index(m[2]) + 1}", name)
        return re.sub("weight$", "kernel", re.sub("embed.weight$", "embed.embedding", name))

    channels_in = tensors["begin_conv.weight"].shape[1]
    tensors = {name: value.transpose(2, 3, 1, 0) if value.ndim == 4 else value for name, value in tensors.items()}
    condition = functools.partial(level_of_time, sde, num_levels=levels)
    return with_score(network, fill(network, images(32, 32, channels_in), tensors, ours), sde, condition)
