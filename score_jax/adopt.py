"""Between a run and published checkpoints: one as its start (`--pretrained`), and out again (`--mode=export`).

A directory is a model of diffusers, which says what the network and the process are; a file holds the tensors of the
network that the config names: of the score-SDE code, Flax or PyTorch, or of NCSN's and NCSNv2's releases.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from score_jax import data, networks, pretrained, tensors
from score_jax.errors import UserError
from score_jax.pretrained import diffusers, score_sde
from score_jax.sde import DDPM, SDE

__all__ = ["adopt", "export", "load_params", "unread"]


def adopt(config: ConfigDict, path: pathlib.Path) -> ConfigDict:
    """The config, with what a directory of diffusers says; for a file the config as it is.

    Raises:
      UserError: if there is nothing there, or for a network or a chain that a config cannot name.
    """
    if not path.exists():
        raise UserError(f"--pretrained: there is no {path}")
    if not path.is_dir():
        return config
    if config.sde.name != "DDPM":
        raise UserError(f"--pretrained: {path} is on DDPM's chain, the config on {config.sde.name}: take ddpm_cifar")
    settings = _told(diffusers.read_config, path)
    network = _told(diffusers.network_of, settings)
    sde, adapter = _told(diffusers.process_of, path)
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
    print(f"{path}: a UNet on DDPM's chain, for images of {config.data.image_size} pixels")
    return config


def load_params(path: pathlib.Path, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """The parameters of a network for images `[h, w, c]`.

    A file has no settings: what no shape shows, `taps` and `rescale` and the process, is taken from the config.

    Raises:
      UserError: if the file is not a checkpoint of that network, naming the tensor that does not fit.
    """
    if path.is_dir():
        model = _told(pretrained.load_diffusers, path)
        channels = model.params["params"]["Conv_0"]["kernel"].shape[2]
        if channels != shape[-1]:
            raise UserError(f"--pretrained: {path} is for images of {channels} channels, config.data has {shape[-1]}")
        return model.params
    if isinstance(network, networks.NCSNpp) or getattr(network, "score_sde", False):
        return _told(lambda: score_sde.fill_params(network, shape, score_sde.read(path)))
    if not isinstance(network, networks.NCSN | networks.NCSNv2):
        raise UserError(f"--pretrained: no published file is of a {type(network).__name__}; a directory can be of one")
    # The releases save a list: the network, the optimiser, two counters, and NCSNv2's the average of what is trained.
    content = _told(tensors.read_torch, path)
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list | tuple) or not all(isinstance(c, dict) for c in (*content[:1], *content[4:])):
        raise UserError(f"--pretrained: {path} holds no tensors by their names")
    if not content:
        raise UserError(f"--pretrained: {path} is empty")
    state = {name.removeprefix("module."): value for name, value in content[0].items()}
    model = _told(pretrained.from_ncsn, state | (content[4] if len(content) > 4 else {}))
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
    _told(pretrained.save_diffusers, directory, model, image_size)


def _told(fn: Callable, *args: Any) -> Any:
    """What the function returns; its `ValueError` is the user's."""
    try:
        return fn(*args)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
