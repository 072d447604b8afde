"""Between a run and published checkpoints: one as its start (`--pretrained`), and out again (`--mode=export`).

A directory is a model of diffusers, which says what the network and the process are, and so is a `.safetensors` or
`.bin` file with its `config.json`; any other file holds the tensors of the network that the config names: of the
score-SDE code, Flax or PyTorch, or of NCSN's and NCSNv2's releases.
"""

import copy
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from score_jax import data, networks, pretrained, pytorch
from score_jax.errors import UserError
from score_jax.pretrained import base, diffusers, files, score_sde
from score_jax.sde import DDPM, SDE
from score_jax.tensors import one_line

__all__ = ["adopt", "export", "load_params", "unread"]


def adopt(config: ConfigDict, path: pathlib.Path) -> ConfigDict:
    """The config, with what a model of diffusers says; for another file the config as it is.

    Raises:
      UserError: if there is nothing there, or for a network or a chain that a config cannot name.
    """
    if not os.path.exists(path):
        raise UserError(f"--pretrained: there is no {path}")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"--pretrained: {path} is neither a file nor a directory")
    if not _of_diffusers(path):
        return config
    if config.sde.name != "DDPM":
        raise UserError(f"--pretrained: {path} is on DDPM's chain, the config on {config.sde.name}: take ddpm_cifar")
    settings = _told(path, files.read_config)
    network = _told(path, lambda _: diffusers.network_of(settings))
    sde, adapter = _told(path, diffusers.process_of)
    weights = _told(path, files.find)
    betas, default = np.asarray(sde.betas), np.asarray(DDPM().betas)
    if betas.shape != default.shape or not np.allclose(betas, default, rtol=1e-4):
        raise UserError(
            f"--pretrained: {path} has a chain other than the default of DDPM, which a config cannot name: use "
            "score_jax.pretrained.load_diffusers in Python"
        )
    config = copy.deepcopy(config)
    fields = [f.name for f in dataclasses.fields(networks.UNet) if f.name not in ("parent", "name")]
    config.network = {"name": "UNet"} | {name: getattr(network, name) for name in fields}
    config.conditioning = "step"
    config.parameterization = {"name": adapter.__name__}
    config.data.image_size = settings["sample_size"]
    config.data.centered = True
    print(f"{weights}: a UNet on DDPM's chain, for images of {config.data.image_size} pixels")
    return config


def load_params(path: pathlib.Path, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """The parameters of a network for images `[h, w, c]`.

    A file has no settings: what no shape shows, `taps` and `rescale` and the process, is taken from the config.

    Raises:
      UserError: if the file is not a checkpoint of that network, naming the tensor that does not fit.
    """
    if _of_diffusers(path):
        model = _told(path, pretrained.load_diffusers)
        channels = model.params["params"]["Conv_0"]["kernel"].shape[2]
        if channels != shape[-1]:
            raise UserError(f"--pretrained: {path} is for images of {channels} channels, config.data has {shape[-1]}")
        return model.params
    if isinstance(network, networks.NCSNpp) or getattr(network, "score_sde", False):
        return _told(path, lambda path: score_sde.fill_params(network, shape, score_sde.read(path)))
    if not isinstance(network, networks.NCSN | networks.NCSNv2):
        raise UserError(f"--pretrained: no published file is of a {type(network).__name__}; a directory can be of one")
    # The releases save a list: the network, the optimiser, two counters, and NCSNv2's the average of what is trained.
    content = _told(path, pytorch.read_torch)
    parts = content if isinstance(content, list | tuple) else [content]
    network_tensors, average = (parts[i] if len(parts) > i else {} for i in (0, 4))
    state = _told(path, lambda _: base.named(network_tensors) | base.named(average))
    model = _told(path, lambda _: pretrained.from_ncsn(state))
    for field in ("features", "multipliers", "num_levels", "sigma_min", "sigma_max"):
        ours, theirs = (getattr(n, field, None) for n in (network, model.network))
        values = np.asarray(ours or 0), np.asarray(theirs or 0)
        same = values[0].shape == values[1].shape and np.allclose(*values, rtol=1e-4)
        if type(model.network) is not type(network) or not same:
            raise UserError(
                f"--pretrained: {path} is of a {type(model.network).__name__} with {field}={theirs}, the config "
                f"names a {type(network).__name__} with {ours}"
            )
    return model.params


def unread(config: ConfigDict, error: UserError) -> data.Dataset:
    """A data set that is not there, of which its shape is known: what needs its images ends in the error."""

    def read(_: np.ndarray) -> Any:
        raise error

    if not config.data.image_size:
        raise error
    shape, classes = (config.data.image_size, config.data.image_size, 3), config.network.get("num_classes", 0)
    return data.Dataset(0, shape, read, num_classes=classes)


def export(
    config: ConfigDict, network: nn.Module, params: Any, sde: SDE, image_size: int, directory: pathlib.Path
) -> None:
    """Write a pipeline of diffusers.

    Raises:
      UserError: for what diffusers does not have, in one line.
    """
    if not config.data.centered:
        raise UserError("--mode=export: diffusers has images in [-1, 1], this run config.data.centered=False")
    if config.parameterization.name != "from_noise" or config.conditioning != "step":
        raise UserError(
            "--mode=export writes networks with config.parameterization.name='from_noise' and config.conditioning="
            f"'step', this has {config.parameterization.name!r} and {config.conditioning!r}: see configs/ddpm_digits.py"
        )
    model = pretrained.Pretrained(network, params, sde, lambda x, t: x)
    try:
        pretrained.save_diffusers(directory, model, image_size)
    except ValueError as error:
        raise UserError(f"--mode=export: {error}") from error


def _of_diffusers(path: pathlib.Path) -> bool:
    return path.is_dir() or path.suffix in files.SUFFIXES


def _told(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Any:
    """What a reader makes of a file; its error is the user's, and names the file."""
    try:
        return read(path)
    except (ValueError, OSError) as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(f"--pretrained: {where}{one_line(error)}") from error
