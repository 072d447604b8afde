"""Published checkpoints: from their tensors to a network of ours, its process and its score.

One function a family takes the tensors under the names that the family gave them and returns a `Pretrained`.  What
a checkpoint does not hold, its settings, is read off the shapes where they tell and is an argument where they do not.
A tensor that is missing, left over or of the wrong shape is a `ValueError` that names it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array

from score_jax.networks import NCSN, NCSNv2
from score_jax.sde import SDE, VE, ScoreFn
from score_jax.timesteps import level_of_time

__all__ = ["Pretrained", "from_ncsn", "from_score_sde"]


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      network: the Linen module.
      params: its parameters, what `network.apply` takes.
      sde: the process that it was trained on.
      score_fn: `score_fn(x, t)`, the score of the marginals of `sde`.
    """

    network: nn.Module
    params: Any
    sde: SDE
    score_fn: ScoreFn


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
    return _of_levels(network, _fill(network, channels_in, tensors, ours), sde, levels)


def from_score_sde(config: Mapping[str, Any], params: Mapping[str, Any]) -> Pretrained:
    """The networks of Song et al. 2021 as their Flax code has them.

    Args:
      config: the published fields, a `ConfigDict` or nested dicts.
      params: the parameter tree by its names, `Conv_0` and so on, numbered in order of creation.

    Returns:
      The network, its process, and the score; data in [-1, 1] where `config.data.centered`, else in [0, 1].

    Raises:
      ValueError: for an unknown network; if a tensor is missing, left over or of the wrong shape, naming it.
    """
    name = config["model"]["name"]
    families = {"ncsnv2_64": _ncsnv2, "ncsnv2_128": _ncsnv2, "ncsnv2_256": _ncsnv2}
    if name not in families:
        raise ValueError(f"config.model.name: unknown network {name!r}; there are {', '.join(families)}")
    tensors = traverse_util.flatten_dict(dict(params.get("params", params)), sep="/")
    return families[name](config, {name: np.asarray(value) for name, value in tensors.items()})


# Stages of NCSNv2, Deeper and Deepest.
MULTIPLIERS = {"ncsnv2_64": (1, 2, 2, 2), "ncsnv2_128": (1, 2, 2, 4, 4), "ncsnv2_256": (1, 2, 2, 2, 4, 4)}

# From numbers in order of creation to our names; a refine block has as many units before the junction as inputs.
NCSNV2_NAMES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"^Conv_0", "begin_conv"),
    (r"^Conv_1", "end_conv"),
    (r"^InstanceNorm2dPlus_0", "normalizer"),
    (r"^ResidualBlock_(\d+)", lambda m: f"res{int(m[1]) // 2 + 1}_{int(m[1]) % 2}"),
    (r"ConvMeanPool_0/Conv_0", "conv2_conv"),
    (r"ConvMeanPool_1/Conv_0", "shortcut_conv"),
    (r"^(res.*)/Conv_0", r"\1/conv1"),
    (r"^(res.*)/Conv_1", r"\1/conv2"),
    (r"^(res.*)/Conv_2", r"\1/shortcut"),
    (r"InstanceNorm2dPlus_(\d)", lambda m: f"normalize{int(m[1]) + 1}"),
    (r"RefineBlock_0/RCUBlock_1", "RefineBlock_0/output_convs"),
    (r"RCUBlock_2", "output_convs"),
    (r"RCUBlock", "adapt_convs"),
    (r"_convs(.*)/Conv_(\d+)", lambda m: f"_convs{m[1]}_{int(m[2]) // 2 + 1}_{int(m[2]) % 2 + 1}_conv"),
    (r"(CRP|MSF)Block_0/Conv", lambda m: f"{m[1].lower()}_convs"),
    (r"^RefineBlock_(\d+)", lambda m: f"refine{int(m[1]) + 1}"),
)


def _ncsnv2(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Pretrained:
    model = config["model"]
    levels, sigma_min, sigma_max = model["num_scales"], float(model["sigma_min"]), float(model["sigma_max"])
    network = NCSNv2(model["nf"], MULTIPLIERS[model["name"]], levels, sigma_min, sigma_max, score_sde=True)

    def ours(name: str) -> str:
        for pattern, new in NCSNV2_NAMES:
            name = re.sub(pattern, new, name)
        return name

    params = _fill(network, config["data"]["num_channels"], tensors, ours)
    return _of_levels(network, params, VE(sigma_min=sigma_min, sigma_max=sigma_max), levels)


def _of_levels(network: nn.Module, params: Any, sde: SDE, num_levels: int) -> Pretrained:
    """A network that knows the index of a level and returns the score."""

    def score_fn(x: Array, t: Array) -> Array:
        level = jnp.broadcast_to(level_of_time(sde, t, num_levels), x.shape[:1])
        return cast(Array, network.apply(params, x, level))

    return Pretrained(network, params, sde, score_fn)


def _fill(network: nn.Module, channels: int, tensors: Mapping[str, np.ndarray], ours: Callable[[str], str]) -> Any:
    """The network's parameters from tensors by their published names; `ours` translates a name.

    Separators and axes of length one do not matter.
    """

    def key(name: str) -> str:
        return re.sub(r"\W", "_", name)

    x = jnp.zeros((1, 32, 32, channels))
    template = traverse_util.flatten_dict(jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1))["params"])
    published = {key(ours(name)): name for name in tensors}
    params = {}
    for path, leaf in template.items():
        name = published.pop(key("/".join(path)), None)
        if name is None:
            raise ValueError(f"the checkpoint has no tensor for {'/'.join(path)}, of shape {leaf.shape}")
        value = tensors[name]
        if np.squeeze(value).shape != tuple(n for n in leaf.shape if n > 1):
            raise ValueError(f"the tensor {name!r} has shape {value.shape} where {leaf.shape} is expected")
        params[path] = jnp.asarray(value, leaf.dtype).reshape(leaf.shape)
    if published:
        raise ValueError(f"the checkpoint's tensor {min(published.values())!r} has no place in the network")
    return {"params": traverse_util.unflatten_dict(params)}
