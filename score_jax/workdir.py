"""The directory of a run: its config, its metrics and where its files lie.

config.yaml  checkpoints/<step>/  metrics.jsonl  samples/{step,inpaint,...}_<N>.{png,npz}  report.html
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import yaml

from score_jax import disk
from score_jax.errors import UserError

__all__ = [
    "check_place",
    "open_workdir",
    "read_config",
    "record_changes",
    "shared",
    "sole_writer",
    "write_config",
]

# What may differ when a run goes on or is sampled from: none of it changes the steps already taken.
FREE = (
    "training.num_steps",
    "training.log_every",
    "training.checkpoint_every",
    "training.accumulate",
    "training.max_skipped",
    "training.distillation.teacher",
    "sampling",
    "evaluation",
    "editing",
    "data.dir",
    "mesh",
    "distributed",
)


# What may differ when training goes on and was told that it may: it changes the steps to come.
TUNED = ("training.learning_rate", "training.warmup_steps", "training.grad_clip", "training.decay")


def check_place(path: pathlib.Path) -> None:
    """Raise a `UserError` if there can be no directory of that name."""
    if there := next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), None):
        what = "a file" if there.exists() else "a link to nothing"
        raise UserError(f"{there} is {what}: choose another --workdir")


def open_workdir(path: pathlib.Path, config: dict[str, Any], *, retune: bool = False) -> None:
    """Make the directory of a run, or check that it is one of the same config.

    Args:
      path: the directory.
      config: the resolved config; in a new directory it is written to `config.yaml`.
      retune: whether the fields of `TUNED` may differ.

    Raises:
      UserError: if the directory holds a run of another config, or files that are no run's.
    """
    file = path / "config.yaml"
    if file.exists() and not _lost(path):
        for name, (old, new) in _differences(path, config).items():
            # A field younger than the run must be off, as it was then.
            free = (old is None and not new) or any(name == f or name.startswith(f + ".") for f in FREE)
            if not free and not (retune and name in TUNED):
                remedy = ", or go on with --retune" if name in TUNED else ""
                raise UserError(
                    f"{path} holds a run of another config: {name} is {old!r} there and {new!r} here; choose another "
                    f"--workdir, or give the same config{remedy}"
                )
    elif path.exists() and not file.exists() and any(p.name != "config.yaml.part" for p in path.iterdir()):
        raise UserError(f"{path} is not empty and has no config.yaml: choose another --workdir")
    else:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the directory {path}: {error.strerror}; choose another --workdir") from error
        write_config(path, config)
    (path / "samples").mkdir(exist_ok=True)


def _lost(path: pathlib.Path) -> bool:
    """Whether the record is damaged where nothing is trained yet: then it is written anew, which is said."""
    try:
        read_config(path)
    except UserError:
        if any((path / "checkpoints").glob("[0-9]*")):
            raise
        print(f"{path / 'config.yaml'} is damaged, and nothing is trained yet: it is written anew")
        return True
    return False


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The config of `config.yaml`.

    Raises:
      UserError: if it is damaged.
    """
    file = path / "config.yaml"
    try:
        return disk.read_yaml(file)
    except ValueError as error:
        raise UserError(
            f"{file}, the record of what was trained, is damaged ({error}): put back a copy; report.html shows it, too"
        ) from error


def _differences(path: pathlib.Path, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, and their values on record and in `config`; None where there is none."""
    old, new = (dict(_flat(json.loads(json.dumps(c)))) for c in (read_config(path), config))
    return {n: (old.get(n), new.get(n)) for n in sorted({*old, *new}) if old.get(n) != new.get(n)}


def record_changes(path: pathlib.Path, step: int, config: dict[str, Any]) -> None:
    """Add to `changes.jsonl` which fields of `TUNED` change after a step, from what is on record to those of `config`.

    A line is `{"step": N, "training.learning_rate": [old, new], ...}`.
    """
    if changes := {name: values for name, values in _differences(path, config).items() if name in TUNED}:
        file = path / "changes.jsonl"
        with disk.naming(file), file.open("a") as stream:
            stream.write(json.dumps({"step": step, **changes}) + "\n")


def write_config(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Write `config.yaml`: in a new directory, and again by training, whose record it is."""
    disk.replace(path / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))


@contextlib.contextmanager
def sole_writer(path: pathlib.Path, *, doing: str = "training") -> Iterator[None]:
    """While it lasts no other process may train in the directory, or do there what is named.

    Args:
      path: the directory.
      doing: `training` or `sampling`, neither of which keeps the other away.

    Raises:
      UserError: if one does.
    """
    with (path / {"training": ".lock", "sampling": ".lock_sampling"}[doing]).open("w") as file:
        try:
            import fcntl  # Windows has none.

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is in {doing} by another process: wait, or choose another --workdir") from error
        except (ImportError, OSError) as error:  # Not every file system of a cluster has locks.
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{path} cannot be locked ({reason}): see to it that no other process is {doing} there")
        yield


def shared(config: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """What must be the same in all processes of a run: all but where its data lie and which of them it is."""
    facts = {f"--{name}": value for name, value in flags.items()} | dict(_flat({"config": config}))
    own = {"config.data.dir", "config.distributed.coordinator", "config.distributed.process_id"}
    return {name: value for name, value in facts.items() if name not in own}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, named `a.b.c`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
