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
    model = _told(pretrained.load_diffusers, path)
    network, betas = model.network, np.asarray(model.sde.betas)
    default = np.asarray(DDPM().betas)
    if betas.shape != default.shape or not np.allclose(betas, default, rtol=1e-4):
        raise UserError(
            f"--pretrained: {path} has a chain other than the default of DDPM, which a config cannot name: use "
            "score_jax.pretrained.load_diffusers in Python"
        )
    config = copy.deepcopy(config)
    fields = [f.name for f in dataclasses.fields(networks.UNet) if f.name not in ("parent", "name")]
    config.network = {"name": "UNet"} | {name: getattr(network, name) for name in fields}
    config.sde = {"name": "DDPM"}
    config.conditioning = "step"
    config.parameterization = {"name": diffusers.process_of(path)[1].__name__}
    config.data.image_size = diffusers.image_size_of(path)
    config.data.centered = True
    print(f"{path}: a UNet on DDPM's chain, for images of {config.data.image_size} pixels")
    return config


def load_params(path: pathlib.Path, network: nn.Module, shape: tuple[int, ...]) -> Any:
    """The parameters of a network for images `[h, w, c]`.

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
    # The releases save a list: the state of the network, that of the optimiser, and more.
    content = _told(tensors.read_torch, path)
    model = _told(pretrained.from_ncsn, content[0] if isinstance(content, list | tuple) else content)
    if model.network != network:
        raise UserError(f"--pretrained: {path} holds {_fields(model.network)}, the config names {_fields(network)}")
    return model.params


def unread(config: ConfigDict, error: UserError) -> data.Dataset:
    """A data set that is not there, of which its shape is known: what needs its images ends in the error."""

    def read(_: np.ndarray) -> Any:
        raise error

    if not config.data.image_size:
        raise error
    return data.Dataset(0, (config.data.image_size, config.data.image_size, 3), read)


def export(
    config: ConfigDict, network: nn.Module, params: Any, sde: SDE, image_size: int, directory: pathlib.Path
) -> None:
    """Write a pipeline of diffusers.

    Raises:
      UserError: for what diffusers does not have, in one line.
    """
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


def _fields(network: nn.Module) -> str:
    return " ".join(repr(network).split())
