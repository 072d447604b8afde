"""What the values of a config may be, checked before any work: numbers in bounds, and paths of this machine."""

import copy
import functools
import math
import os
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from score_jax.errors import UserError

__all__ = ["check_numbers", "expanded", "local_path"]


class Number(NamedTuple):
    """What a number may be.

    Attributes:
      kind: `int` for a whole one, `float` for any.
      least: the smallest.
      above: what it is larger than.
      below: what it is less than; infinity, where nothing else is told.
      infinite: whether it may be infinite nevertheless.
      words: what may stand in its place.
    """

    kind: type = float
    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    infinite: bool = False
    words: tuple[str | None, ...] = ()

    def allows(self, value: Any) -> bool:
        if value is None or isinstance(value, str):
            return value in self.words
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        ends = value < self.below or (self.infinite and value == math.inf)
        return value >= self.least and value > self.above and ends  # None of them holds for NaN.

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "less than": self.below}
        told = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
        kind = "a whole number" if self.kind is int else "a number" if self.infinite else "a finite number"
        return " or ".join([*map(repr, self.words), ", ".join([kind, " and ".join(told)]).removesuffix(", ")])


COUNT, NATURAL = Number(int, least=1), Number(int, least=0)
POSITIVE, SHARE = Number(above=0), Number(least=0, below=1)

NUMBERS = {
    "seed": Number(int, least=0, below=2**32),  # JAX would take the remainder, and two seeds be one.
    "num_levels": NATURAL,
    "mesh.data": Number(int, least=-1),
    "mesh.fsdp": Number(int, least=-1),
    "mesh.tensor": Number(int, least=-1),
    "distributed.num_processes": NATURAL,
    "distributed.process_id": NATURAL,
    "data.image_size": NATURAL._replace(words=(None,)),
    "data.crop": NATURAL._replace(words=(None,)),
    "training.num_steps": COUNT,
    "training.batch_size": COUNT,
    "training.learning_rate": Number(least=0),  # 0 measures the loss alone.
    "training.warmup_steps": NATURAL,
    "training.grad_clip": Number(above=0, infinite=True),
    "training.ema_decay": SHARE,
    "training.accumulate": COUNT,
    "training.max_skipped": NATURAL,
    "training.distillation.num_steps": NATURAL,
    "training.label_dropout": SHARE,
    "training.log_every": COUNT,
    "training.checkpoint_every": COUNT,
    "sampling.guidance.scale": Number(least=0),
    "sampling.num_steps": COUNT,
    "sampling.step_size": Number(least=0, words=("auto",)),
    "sampling.t_min": POSITIVE,
    "sampling.num_samples": COUNT,
    "sampling.batch_size": COUNT,
    "editing.noise_std": Number(least=0),
    "editing.num_between": NATURAL,
    "editing.temperature": POSITIVE,
    "evaluation.num_samples": Number(int, least=2),
    "evaluation.likelihood.num_probes": COUNT,
    "evaluation.likelihood.num_repeats": COUNT,
    "evaluation.likelihood.rtol": POSITIVE,
    "evaluation.likelihood.atol": POSITIVE,
    "evaluation.likelihood.dequantizer_steps": NATURAL,
}

PATHS = (
    "data.dir",
    "training.distillation.teacher",
    "sampling.guidance.classifier",
    "editing.images",
    "editing.mask",
    "evaluation.statistics",
)


def check_numbers(config: ConfigDict) -> None:
    """Raise a `UserError` at the first number of the config that cannot be right; one that is missing passes."""
    for field, number in NUMBERS.items():
        value = functools.reduce(lambda node, name: node.get(name, {}), field.split("."), config)
        if value != {} and not number.allows(value):
            raise UserError(f"config.{field} must be {number}, got {value!r}")


def expanded(config: ConfigDict) -> ConfigDict:
    """The config with `~` in its paths replaced by the home directory."""
    config = copy.deepcopy(config)
    for field in PATHS:
        *parts, name = field.split(".")
        node = functools.reduce(lambda node, part: node[part], parts, config)
        if node.get(name):
            node[name] = local_path(node[name], f"config.{field}")
    return config


def local_path(path: str | os.PathLike, field: str) -> str:
    """A path as a person writes it, with `~` for the home directory.

    Args:
      path: the path.
      field: the flag or the field of a config that it is from.

    Raises:
      UserError: for an address, `gs://...` say, and for the home directory of nobody.
    """
    path = os.fspath(path)
    if not path and field == "--workdir":
        raise UserError(f"{field} is empty: name a directory")
    if re.match(r"[A-Za-z][\w+.-]+:/", path):
        raise UserError(f"{field}: {path!r} is no path of this machine: mount it, and give the directory where it is")
    if (whole := os.path.expanduser(path)).startswith("~"):
        raise UserError(f"{field}: {path!r}: there is no such home directory; ./~ is a directory of that name")
    return whole
