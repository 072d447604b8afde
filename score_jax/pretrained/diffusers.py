"""The U-Nets of the diffusers library, in and out: directories of `UNet2DModel`, the DDPM family.

A directory of a model holds `config.json` and its weights, see `files`; that of a pipeline holds one as `unet` beside
`scheduler/scheduler_config.json`, which gives the process: the chain of DDPM with N steps, step k of which, from 0, is
the time t = (k + 1) / N and conditions the network.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from score_jax.networks import UNet
from score_jax.parameterization import from_denoiser, from_noise, from_velocity
from score_jax.pretrained.base import Pretrained, fill, images, named, with_score
from score_jax.pretrained.files import CHAIN, MOST_CHANNELS, WEIGHTS, find, number, read_config, read_weights
from score_jax.sde import DDPM
from score_jax.tensors import read_json, short, write_safetensors

__all__ = ["load_diffusers", "save_diffusers"]

PREDICTIONS = {"epsilon": from_noise, "sample": from_denoiser, "v_prediction": from_velocity}

# What a model may not differ in, by the library's defaults.
FIXED = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
INSIDE = {
    "ResidualBlock": {
        "GroupNorm_0": "norm1",
        "Conv_0": "conv1",
        "Dense_0": "time_emb_proj",
        "GroupNorm_1": "norm2",
        "Conv_1": "conv2",
        "Dense_1": "conv_shortcut",
    },
    "Attention": {
        "GroupNorm_0": "group_norm",
        "Dense_0": "to_q",
        "Dense_1": "to_k",
        "Dense_2": "to_v",
        "Dense_3": "to_out.0",
    },
    "Resample": {"Conv_0": "conv"},
}
# Names of attention before the library's version 0.17.
DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_diffusers(path: str | pathlib.Path) -> Pretrained:
    """A `UNet2DModel` of the DDPM family.

    Args:
      path: the directory of the model or of a pipeline with it, or the file of the weights, beside which lies
        `config.json`; a scheduler is looked for in the pipeline, and without one the chain is the published 1,000
        steps with betas from 0.0001 to 0.02.

    Raises:
      ValueError: for a setting that `UNet` does not have; for a file that is truncated; if a tensor is missing, left
        over or of the wrong shape, naming it; if there are no weights.
      FileNotFoundError: if there is no `config.json`.
    """
    path = pathlib.Path(path)
    config = read_config(path)
    network = network_of(config)
    sde, adapter = process_of(path)
    steps = len(np.asarray(sde.betas))
    names = {theirs: ours for ours, theirs in _names(network, config["sample_size"]).items()}

    def ours(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{names.get(module, module)}/{leaf}"

    tensors = {}
    for name, value in named(read_weights(find(path))).items():
        old = "|".join(DEPRECATED)
        name = re.sub(rf"(attentions\.\d+)\.({old})\.", lambda m: f"{m[1]}.{DEPRECATED[m[2]]}.", name)
        if name.endswith(".weight"):
            name = f"{name.removesuffix('weight')}{'scale' if value.ndim == 1 else 'kernel'}"
        tensors[name] = value.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim, range(value.ndim)))
    first = "time_embedding.linear_1.kernel"
    if config.get("flip_sin_to_cos", True) and first in tensors and tensors[first].ndim:
        tensors[first] = np.roll(tensors[first], len(tensors[first]) // 2, axis=0)
    size = config["sample_size"]
    params = fill(network, images(size, size, config["in_channels"]), tensors, ours)
    return with_score(network, params, sde, lambda t: steps * t - 1, adapter)


def save_diffusers(directory: str | pathlib.Path, model: Pretrained, image_size: int) -> None:
    """Write a network of DDPM's form as a pipeline that diffusers loads: `DDPMPipeline.from_pretrained(directory)`.

    Args:
      directory: made if need be: `model_index.json`, `unet/`, `scheduler/`.
      model: a `UNet` that predicts the noise and is conditioned on the step of a `DDPM` process, N t - 1.
      image_size: the height and width of its images.

    Raises:
      ValueError: for a network or a process that diffusers' does not have, saying what is in the way.
    """
    network, sde = model.network, model.sde
    if type(network) is not UNet or not isinstance(sde, DDPM):
        raise ValueError(
            f"diffusers' UNet2DModel is a UNet on a DDPM process, not {type(network).__name__} on {type(sde).__name__}"
        )
    wanted = {"rescale": False, "num_classes": 0, "num_augmentations": 0, "taps": ()}
    for field, value in wanted.items():
        if getattr(network, field) != value:
            raise ValueError(f"diffusers' UNet2DModel has {field}={value!r}, this UNet {getattr(network, field)!r}")
    if network.resample not in ("conv", "conv_symmetric") or network.embedding not in ("positional", "transformer"):
        raise ValueError(
            "diffusers' UNet2DModel has resample='conv' and embedding='positional', "
            f"this UNet {network.resample!r} and {network.embedding!r}"
        )
    if not network.groups:
        raise ValueError("diffusers' UNet2DModel has one number of groups for all normalisations: set UNet's `groups`")
    flat = traverse_util.flatten_dict(model.params["params"], sep="/")
    names, tensors = _names(network, image_size), {}
    for path, value in flat.items():
        module, leaf = path.rsplit("/", 1)
        array = np.asarray(value)
        if leaf == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
            if names[module].endswith("conv_shortcut"):
                array = array[:, :, None, None]
        tensors[f"{names[module]}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(array)
    channels = flat["Conv_0/kernel"].shape[2]
    directory = pathlib.Path(directory)
    _write(
        directory / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
    )
    _write(directory / "unet" / "config.json", _config(network, image_size, channels))
    _write(directory / "scheduler" / "scheduler_config.json", _scheduler(sde))
    write_safetensors(directory / "unet" / WEIGHTS, tensors)


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def network_of(config: Mapping[str, Any]) -> UNet:
    """The network of a model's settings."""
    adaptive, groups = config.get("resnet_time_scale_shift") == "scale_shift", config.get("norm_num_groups", 32)
    # Without a number of its own, attention in the middle has the others' normalisation or, if adaptive, none.
    if config.get("attn_norm_num_groups") not in ((groups,) if adaptive else (groups, None)):
        raise ValueError(
            f"config.json: attn_norm_num_groups: only norm_num_groups, {groups}, is known, got "
            f"{config.get('attn_norm_num_groups')!r}"
        )
    for field, value in FIXED.items():
        if config.get(field, value) != value:
            raise ValueError(f"config.json: {field}: only {value!r} is known, got {short(config[field])}")
    if (shift := config.get("resnet_time_scale_shift", "default")) not in ("default", "scale_shift"):
        raise ValueError(
            f"config.json: resnet_time_scale_shift: 'default' and 'scale_shift' are known, got {short(shift)}"
        )
    down, up = config["down_block_types"], config["up_block_types"]
    attends = [kind == "AttnDownBlock2D" for kind in down]
    mirrored = ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    if not set(down) <= {"DownBlock2D", "AttnDownBlock2D"} or list(up) != mirrored:
        raise ValueError(
            "config.json: down_block_types and up_block_types must mirror each other, got "
            f"{short(down)} and {short(up)}"
        )
    features, *_ = channels = config["block_out_channels"]
    heads, size = config.get("attention_head_dim", 8) or 0, config["sample_size"]
    _check_channels(channels, [*attends[:-1], True], groups, heads)
    if size % 2 ** (len(channels) - 1):
        raise ValueError(f"config.json: sample_size, {size}, cannot be halved {len(channels) - 1} times")
    return UNet(
        features,
        tuple(c // features for c in channels),
        config.get("layers_per_block", 2),
        tuple(size // 2**level for level, attend in enumerate(attends) if attend),
        config.get("dropout", 0.0),
        "positional" if config.get("freq_shift", 0) else "transformer",
        resample="conv_symmetric" if config.get("downsample_padding", 1) else "conv",
        rescale=False,
        adaptive=adaptive,
        head_channels=heads,
        groups=groups,
        epsilon=config.get("norm_eps", 1e-5),
    )


def _check_channels(channels: list[int], attended: list[bool], groups: int, heads: int) -> None:
    if not all(0 < c <= MOST_CHANNELS and c % channels[0] == 0 for c in channels):
        raise ValueError(
            f"config.json: block_out_channels must be positive multiples of the first, got {short(channels)}"
        )
    split = [c for c, attend in zip(channels, attended, strict=True) if attend and heads]
    if any(c % groups for c in channels) or any(c % heads for c in split):
        raise ValueError(
            f"config.json: block_out_channels must be multiples of norm_num_groups, {groups}, and with attention of "
            f"attention_head_dim, {heads or None}, got {short(channels)}"
        )


def _config(network: UNet, image_size: int, channels: int) -> dict[str, Any]:
    attends = [image_size // 2**level in network.attention_at for level in range(len(network.multipliers))]
    return FIXED | {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [m * network.features for m in network.multipliers],
        "layers_per_block": network.num_blocks,
        "down_block_types": [("AttnDownBlock2D" if attend else "DownBlock2D") for attend in attends],
        "up_block_types": [("AttnUpBlock2D" if attend else "UpBlock2D") for attend in reversed(attends)],
        "dropout": network.dropout,
        "flip_sin_to_cos": False,
        "freq_shift": int(network.embedding == "positional"),
        "downsample_padding": int(network.resample == "conv_symmetric"),
        "resnet_time_scale_shift": "scale_shift" if network.adaptive else "default",
        "attention_head_dim": network.head_channels or None,
        "norm_num_groups": network.groups,
        "attn_norm_num_groups": network.groups,
        "norm_eps": network.epsilon,
    }


def _names(network: UNet, image_size: int) -> dict[str, str]:
    """Modules by our names, numbered in order of creation, and by theirs, by level."""
    levels, blocks = len(network.multipliers), network.num_blocks
    attends = [image_size // 2**level in network.attention_at for level in range(levels)]
    residual, attention, change = [], [], []
    for i in range(levels):
        residual += [f"down_blocks.{i}.resnets.{j}" for j in range(blocks)]
        attention += [f"down_blocks.{i}.attentions.{j}" for j in range(blocks) if attends[i]]
        change += [f"down_blocks.{i}.downsamplers.0"] * (i < levels - 1)
    residual += ["mid_block.resnets.0", "mid_block.resnets.1"]
    attention += ["mid_block.attentions.0"]
    for i, attend in enumerate(reversed(attends)):
        residual += [f"up_blocks.{i}.resnets.{j}" for j in range(blocks + 1)]
        attention += [f"up_blocks.{i}.attentions.{j}" for j in range(blocks + 1) if attend]
        change += [f"up_blocks.{i}.upsamplers.0"] * (i < levels - 1)
    names = {
        "Conv_0": "conv_in",
        "Embedding_0/Dense_0": "time_embedding.linear_1",
        "Embedding_0/Dense_1": "time_embedding.linear_2",
        "GroupNorm_0": "conv_norm_out",
        "Conv_1": "conv_out",
    }
    for kind, modules in (("ResidualBlock", residual), ("Attention", attention), ("Resample", change)):
        for k, module in enumerate(modules):
            names |= {f"{kind}_{k}/{ours}": f"{module}.{theirs}" for ours, theirs in INSIDE[kind].items()}
    return names


def process_of(path: pathlib.Path) -> tuple[DDPM, Any]:
    """The chain and what the network predicts, of the scheduler in a pipeline or beside a model."""
    directory = path if path.is_dir() else path.parent
    names = "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json", "scheduler_config.json"
    file = next((directory / name for name in names if (directory / name).exists()), None)
    config: dict[str, Any] = read_json(file) if file else {"beta_schedule": "linear"}
    if not config.keys() & {"beta_schedule", "trained_betas"} or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file}: {short(config.get('_class_name'))} is not DDPM's chain of betas, or rescales them")
    steps, first, last = (number(file, config, field, bounds) for field, bounds in CHAIN.items())
    schedules = {
        "linear": lambda: np.linspace(first, last, steps),
        "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, steps) ** 2,
        "squaredcos_cap_v2": lambda: _cosine(steps),
    }
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    for field, value, known in (("beta_schedule", schedule, schedules), ("prediction_type", prediction, PREDICTIONS)):
        if type(value) is not str or value not in known:
            raise ValueError(f"{file}: {field}: {short(value)} is unknown; there are {', '.join(known)}")
    trained = config.get("trained_betas")
    if trained is not None:
        numbers = isinstance(trained, list) and all(type(beta) in (int, float) and 0 < beta < 1 for beta in trained)
        if not numbers or len(trained) != steps:
            raise ValueError(
                f"{file}: trained_betas must be num_train_timesteps={steps} numbers between 0 and 1, got "
                f"{short(trained)}"
            )
    betas = schedules[schedule]() if trained is None else np.asarray(trained)
    return DDPM(betas=betas.astype(np.float32), t_min=1 / steps), PREDICTIONS[prediction]


def _cosine(steps: int) -> np.ndarray:
    """beta_k = min(1 - a_k / a_(k-1), 0.999),  a_k = cos^2(pi/2 (k/N + 0.008) / 1.008)  (Nichol & Dhariwal 2021)."""
    alpha_squared = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_squared[1:] / alpha_squared[:-1], 0.999)


def _scheduler(sde: DDPM) -> dict[str, Any]:
    betas = np.asarray(sde.betas, np.float64)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
