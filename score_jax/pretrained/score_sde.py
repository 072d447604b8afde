"""The score-SDE family (Song et al. 2021) by the names and settings of its Flax and PyTorch releases.

Networks are numbered in order of creation, `ResnetBlockBigGANpp_3` in Flax by class and `all_modules.7` in PyTorch
all together; blocks have the same insides in both.  The process comes from `config.training`:

    vesde        VE(sigma_min, sigma_max),  score = out,  conditioned on sigma(t) or, discrete, on the index of a level
    vpsde        VP(beta_min, beta_max),    score = -out / sigma(t),  conditioned on 999 t
    vpsde, discrete    DDPM's chain of N steps with betas from beta_min / N to beta_max / N,  conditioned on N t - 1
    subvpsde     SubVP(beta_min, beta_max), score = -out / sigma(t),  conditioned on 999 t
"""

import functools
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array

from score_jax.networks import NCSNpp, NCSNv2
from score_jax.parameterization import from_noise, from_score
from score_jax.pretrained.base import Pretrained, fill, images, named, with_score
from score_jax.pytorch import read_torch
from score_jax.sde import DDPM, SDE, VE, VP, ScoreFn, SubVP
from score_jax.tensors import one_line, read_msgpack
from score_jax.timesteps import level_of_time

__all__ = ["from_score_sde", "load_score_sde"]


def from_score_sde(config: Mapping[str, Any], params: Mapping[str, Any]) -> Pretrained:
    """The networks of Song et al. 2021 as their Flax code has them: NCSN++, DDPM++, DDPM, NCSNv2.

    Args:
      config: the published fields, a `ConfigDict` or nested dicts.
      params: the parameter tree by its names, `Conv_0` and so on, numbered in order of creation.

    Returns:
      The network, its process, and the score; data in [-1, 1] where `config.data.centered`, else in [0, 1].

    Raises:
      ValueError: for an unknown network or setting; if a tensor is missing, left over or of the wrong shape, naming it.
    """
    return _build(config, _flat(params))


def load_score_sde(path: str | pathlib.Path, config: Mapping[str, Any]) -> Pretrained:
    """A checkpoint file of Song et al. 2021: their Flax msgpack or their PyTorch `.pth`; the averaged parameters.

    Args:
      path: the file; which of the two it is, its first bytes tell.
      config: as in `from_score_sde`.

    Raises:
      ValueError: if the file is truncated or not such a checkpoint, and as in `from_score_sde`.
    """
    return _build(config, read(pathlib.Path(path)))


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The averaged parameters in a file of either release, by their names in Flax, levels divided by `/`."""
    with path.open("rb") as file:
        pickled = file.read(1) in (b"P", b"\x80")  # An archive, or the pickles of the older form.
    if pickled:
        return _torch_names(path, read_torch(path))
    state = read_msgpack(path)
    if not isinstance(state, dict) or "params_ema" not in state:
        raise ValueError(f"{path}: no 'params_ema', which a checkpoint of the score-SDE code has")
    if not isinstance(state["params_ema"], dict):
        raise ValueError(f"{path}: 'params_ema' is no dict of parameters, but a {type(state['params_ema']).__name__}")
    return _flat(state["params_ema"])


def _flat(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tree = params.get("params", params)
    if not isinstance(tree, Mapping):
        raise ValueError(f"'params' is no dict of parameters, but a {type(tree).__name__}")
    try:
        return named(traverse_util.flatten_dict(_plain(tree), sep="/"))
    except (RecursionError, TypeError) as error:
        raise ValueError(f"these are no nested dicts of parameters: {one_line(error)}") from error


def _plain(tree: Any) -> Any:
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def _build(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Pretrained:
    try:
        network, process, data = network_of(config), process_of(config), config["data"]
        shape = data["image_size"], data["image_size"], data.get("num_channels", 3)
    except KeyError as error:
        raise ValueError(f"config lacks the published field {error}") from error
    return with_score(network, fill_params(network, shape, tensors), *process)


def fill_params(network: nn.Module, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray]) -> Any:
    """The parameters of an `NCSNpp` or `NCSNv2` for images `[h, w, c]` from tensors by their names in Flax."""
    num_down = sum(bool(re.match(r"Downsample_\d+/.*(W|weight|kernel)$", name)) for name in tensors)
    table = NCSNPP_NAMES if isinstance(network, NCSNpp) else NCSNV2_NAMES

    def ours(name: str) -> str:
        name = re.sub(r"^(Down|Up)sample_(\d+)", lambda m: f"Resample_{int(m[2]) + num_down * (m[1] == 'Up')}", name)
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        return name

    return fill(network, images(*shape), tensors, ours)


# What all published networks of NCSNpp have; ours knows nothing else.
FIXED = {
    "nonlinearity": "swish",
    "normalization": "GroupNorm",
    "resamp_with_conv": True,
    "attention_type": "ddpm",
    "conv_size": 3,
}

# Kinds of residual blocks, by how they change the resolution.
BLOCKS = {"biggan": "block", "ddpm": "conv"}

# From numbers in order of creation to our names.
NCSNPP_NAMES: tuple[tuple[str, str], ...] = (
    (r"^Dense", "Embedding_0/Dense"),
    (r"^GaussianFourierProjection_0/W", "Embedding_0/frequencies"),
    (r"^ResnetBlock\w+?_(\d+)/(NIN_0|Conv_2)", r"ResidualBlock_\1/Dense_1"),
    (r"^ResnetBlock\w+?_(\d+)/", r"ResidualBlock_\1/"),
    (r"^AttnBlock\w*?_(\d+)/NIN", r"Attention_\1/Dense"),
    (r"^AttnBlock\w*?_", "Attention_"),
    (r"Conv2d_0", "Conv_0"),
    (r"/(W|weight)$", "/kernel"),
    (r"/b$", "/bias"),
)


def network_of(config: Mapping[str, Any]) -> NCSNpp | NCSNv2:
    """The network of published settings."""
    model = config["model"]
    name = model["name"]
    if name in MULTIPLIERS:
        ends = float(model["sigma_min"]), float(model["sigma_max"])
        return NCSNv2(model["nf"], MULTIPLIERS[name], model["num_scales"], *ends, score_sde=True)
    if name not in ("ncsnpp", "ddpm"):
        raise ValueError(
            f"config.model.name: unknown network {name!r}; there are ncsnpp, ddpm, {', '.join(MULTIPLIERS)}"
        )
    for field, value in FIXED.items():
        if model.get(field, value) != value:
            raise ValueError(f"config.model.{field}: only {value!r} is known, got {model[field]!r}")
    ddpm = model["name"] == "ddpm"
    fourier = model["embedding_type"] == "fourier" and not ddpm
    options: dict[str, Any] = {"resample": "conv", "rescale": False, "groups": 32}
    ladder: dict[str, Any] = {}
    if model["scale_by_sigma"] and not fourier:
        ladder = {"num_levels": model["num_scales"], "sigma_max": float(model["sigma_max"])}
        ladder["sigma_min"] = model.get("sigma_min", 0.01)
    if not ddpm:
        if model["resblock_type"] not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"config.model.resblock_type: unknown {model['resblock_type']!r}; there are {known}")
        options = {
            "resample": BLOCKS[model["resblock_type"]],
            "rescale": model["skip_rescale"],
            "taps": tuple(model["fir_kernel"]) if model["fir"] else (),
            "progressive": model["progressive"],
            "progressive_input": model["progressive_input"],
            "combine": model["progressive_combine"],
        }
    return NCSNpp(
        model.get("nf", 128),
        tuple(model["ch_mult"]),
        model["num_res_blocks"],
        tuple(model["attn_resolutions"]),
        model["dropout"],
        ("gaussian_fourier" if fourier else "positional") if model.get("conditional", True) else "none",
        scale_by_sigma=model["scale_by_sigma"],
        centered=config["data"]["centered"],
        **ladder,
        **options,
    )


def process_of(config: Mapping[str, Any]) -> tuple[SDE, Callable[[Array], Array], Callable[..., ScoreFn]]:
    """The process of published settings, the value that conditions the network at t, and what the network predicts."""
    model, training = config["model"], config["training"]
    number, ends = model["num_scales"], (model.get("beta_min", 0.1), model.get("beta_max", 20.0))
    kind = training["sde"].lower()
    if kind == "vesde":
        ve = VE(sigma_min=model.get("sigma_min", 0.01), sigma_max=model["sigma_max"])
        index = functools.partial(level_of_time, ve, num_levels=number)
        return ve, ve.sigma if training["continuous"] else index, from_score
    if kind == "vpsde" and not training["continuous"]:
        betas = np.linspace(ends[0] / number, ends[1] / number, number, dtype=np.float32)
        return DDPM(betas=betas, t_min=1 / number), lambda t: number * t - 1, from_noise
    processes = {"vpsde": VP, "subvpsde": SubVP}
    if kind not in processes:
        raise ValueError(f"config.training.sde: unknown process {kind!r}; there are vesde, vpsde, subvpsde")
    return processes[kind](*ends), lambda t: 999 * t, from_noise


def _torch_names(path: pathlib.Path, checkpoint: Any) -> dict[str, np.ndarray]:
    """The averaged tensors of a PyTorch checkpoint by their Flax names, convolutions HWIO."""
    ema = checkpoint.get("ema") if isinstance(checkpoint, dict) else None
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or "model" not in checkpoint:
        raise ValueError(f"{path}: no 'model' and 'ema' with 'shadow_params', which a checkpoint has")
    tensors = named(checkpoint["model"])
    tensors.pop("sigmas", None)
    # The average holds what is trained, in the model's order: not the frequencies of the Fourier features.
    trained = [name for name in tensors if not re.fullmatch(r"all_modules\.\d+\.W", name)]
    if len(trained) != len(shadow):
        raise ValueError(f"{path}: {len(shadow)} averaged tensors for {len(trained)} parameters")
    tensors |= named(dict(zip(trained, shadow, strict=True)))

    modules: dict[int, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"{path}: the tensor {name!r} has no place in the network")
        modules.setdefault(int(match[1]), {})[match[2]] = value
    renamed, counts = {}, Counter[str]()
    for _, module in sorted(modules.items()):
        kind = _kind(module)
        for name, value in module.items():
            leaf = re.sub("weight$", "scale", name) if value.ndim == 1 else name
            axes = {"weight": {2: (1, 0), 4: (2, 3, 1, 0)}}.get(name.split(".")[-1], {}).get(value.ndim)
            renamed[f"{kind}_{counts[kind]}/{leaf.replace('.', '/')}"] = value.transpose(axes) if axes else value
        counts[kind] += 1
    return renamed


def _kind(module: Mapping[str, np.ndarray]) -> str:
    """The class of a numbered module, by its tensors; changes of resolution are one class, in order of creation."""
    if "W" in module:
        return "GaussianFourierProjection"
    for tensor, kind in (("NIN_3.W", "AttnBlock"), ("GroupNorm_1.weight", "ResnetBlockpp")):
        if tensor in module:
            return kind
    if "weight" in module:
        return {1: "GroupNorm", 2: "Dense"}.get(module["weight"].ndim, "Conv")
    return "Combine" if all(value.shape[2:] == (1, 1) for value in module.values() if value.ndim == 4) else "Downsample"


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
