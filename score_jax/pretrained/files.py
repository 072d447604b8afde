"""The weights of a model of diffusers: one file or shards, safetensors or PyTorch's, in any variant."""

import itertools
import pathlib
import re

import numpy as np

from score_jax.errors import short
from score_jax.tensors import read_json, read_safetensors, read_torch

__all__ = ["SUFFIXES", "WEIGHTS", "find", "listed", "model_of", "read_weights"]

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SUFFIXES = (".safetensors", ".bin")


def model_of(path: pathlib.Path) -> pathlib.Path:
    """The directory of a model, from its own, that of a pipeline with it, or a file of its weights."""
    if not path.is_dir():
        return path.parent
    return path / "unet" if (path / "unet").is_dir() else path


def listed(directory: pathlib.Path) -> str:
    """What a directory holds, as the end of a message."""
    names = sorted(itertools.islice((p.name for p in directory.iterdir()), 1000))
    return f"{directory} holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}"


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
