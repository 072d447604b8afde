"""The files of a model of diffusers: its config, and its weights in one file or shards, of any kind and variant."""

import itertools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from score_jax.pytorch import read_torch
from score_jax.tensors import read_json, read_safetensors, short

__all__ = ["CHAIN", "MOST_CHANNELS", "SUFFIXES", "WEIGHTS", "find", "number", "read_config", "read_weights"]

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SUFFIXES = (".safetensors", ".bin")
# The numbers of a model and of a scheduler: the kind, the least, the most, and the library's default.  The most is
# beyond any published network, since one is traced, and its chain and images are made, before its tensors are read.
NUMBERS: dict[str, tuple[type, float, float, Any]] = {
    "sample_size": (int, 1, 2048, None),
    "in_channels": (int, 1, 1024, None),
    "layers_per_block": (int, 1, 8, 2),
    "norm_num_groups": (int, 1, 2**16, 32),
    "attention_head_dim": (int, 1, 2**16, 8),
    "dropout": (float, 0, 0.99, 0.0),
    "freq_shift": (int, 0, 1, 0),
    "downsample_padding": (int, 0, 1, 1),
    "norm_eps": (float, 1e-12, 1, 1e-5),
}
CHAIN: dict[str, tuple[type, float, float, Any]] = {
    "num_train_timesteps": (int, 1, 100_000, 1000),
    "beta_start": (float, 1e-12, 1, 1e-4),
    "beta_end": (float, 1e-12, 1, 0.02),
}
MOST_LEVELS, MOST_CHANNELS = 8, 2**16


def model_of(path: pathlib.Path) -> pathlib.Path:
    """The directory of a model, from its own, that of a pipeline with it, or a file of its weights."""
    if not path.is_dir():
        return path.parent
    return path / "unet" if (path / "unet").is_dir() else path


def listed(directory: pathlib.Path) -> str:
    """What a directory holds, as the end of a message."""
    names = sorted(itertools.islice((p.name for p in directory.iterdir()), 1000))
    return f"{directory} holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}"


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The settings of a model, see `load_diffusers` for its path: numbers within `NUMBERS`, and those of each level."""
    file = model_of(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, which says what the network is: {listed(file.parent)}")
    config = read_json(file)
    one_head = "attention_head_dim" in config and config["attention_head_dim"] is None
    for field, bounds in NUMBERS.items():
        if field != "attention_head_dim" or not one_head:
            number(file, config, field, bounds)
    for field, kind in (("block_out_channels", int), ("down_block_types", str), ("up_block_types", str)):
        values = config.get(field)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise ValueError(f"{file}: {field} must be a list of {kind.__name__}, got {short(values)}")
        if not 1 <= len(values) <= MOST_LEVELS or len(values) != len(config["block_out_channels"]):
            raise ValueError(f"{file}: {field} must name each of 1 to {MOST_LEVELS} levels, got {short(values)}")
    return config


def number(
    file: pathlib.Path | None, config: Mapping[str, Any], field: str, bounds: tuple[type, float, float, Any]
) -> Any:
    kind, least, most, default = bounds
    value = config.get(field, default)
    if type(value) not in (int, kind) or not least <= value <= most:
        raise ValueError(f"{file}: {field} must be {kind.__name__} from {least} to {most}, got {short(value)}")
    return value


def find(path: pathlib.Path) -> pathlib.Path:
    """The file of a model's weights, or the index of its shards; that of full precision where there are several.

    Args:
      path: of the file, or of a directory, see `model_of`.

    Raises:
      ValueError: if there is none, or a choice between variants such as `fp16`, listing what the directory holds.
    """
    if not path.is_dir():
        return path
    directory = model_of(path)
    plain = [f"{STEM}{suffix}{index}" for suffix in SUFFIXES for index in ("", ".index.json")]
    for name in plain:
        if (directory / name).is_file():
            return directory / name
    pattern = rf"{STEM}\.(\w+)(\.safetensors|\.bin)|{STEM}(\.safetensors|\.bin)\.index\.(\w+)\.json"
    variants = [p for p in sorted(directory.iterdir(), reverse=True) if re.fullmatch(pattern, p.name)]
    if not variants:
        raise ValueError(f"there is no {WEIGHTS}, .bin, or index of shards: {listed(directory)}")
    if len({re.sub(r"\.(safetensors|bin|index|json)", "", p.name) for p in variants}) > 1:
        raise ValueError(f"name the file of the variant that you want: {listed(directory)}")
    return variants[0]  # Of `.safetensors` and `.bin` the first.


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file of weights, or of the shards of an index, by their names.

    Raises:
      ValueError: if a file is broken; if an index names a file outside its directory, or tensors that the shards do
        not have.
    """
    if path.suffix != ".json":
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"{path} holds no tensors by their names, but a {type(tensors).__name__}")
        return tensors
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path}: weight_map does not give the file of each tensor")
    tensors = {}
    for file in sorted(set(places.values())):
        if not re.fullmatch(rf"[\w.-]+({'|'.join(map(re.escape, SUFFIXES))})", file):
            raise ValueError(f"{path}: weight_map names {short(file)}, which is no file of weights beside it")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}: the shard {file} is missing: {listed(path.parent)}")
        shard = read_weights(path.parent / file)
        for name in shard.keys() ^ {name for name, place in places.items() if place == file}:
            raise ValueError(f"{path}: weight_map and {file} differ in the tensor {short(name)}")
        tensors |= shard
    return tensors
