"""The directory of a run: its config, its metrics and where its files lie.

config.yaml  checkpoints/<step>/  metrics.jsonl  samples/{step,inpaint,...}_<N>.{png,npz}  report.html
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml
from tensorboardX import SummaryWriter
from tqdm import tqdm

from score_jax import data, report
from score_jax.errors import UserError

__all__ = [
    "MetricLog",
    "SampleFile",
    "check_place",
    "flat",
    "open_workdir",
    "read_config",
    "record_changes",
    "save_edits",
    "save_samples",
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
    if file.exists():
        for name, (old, new) in _differences(path, config).items():
            # A field younger than the run must be off, as it was then.
            free = (old is None and not new) or any(name == f or name.startswith(f + ".") for f in FREE)
            if not free and not (retune and name in TUNED):
                remedy = ", or go on with --retune" if name in TUNED else ""
                raise UserError(
                    f"{path} holds a run of another config: {name} is {old!r} there and {new!r} here; choose another "
                    f"--workdir, or give the same config{remedy}"
                )
    elif path.exists() and any(p.name != "config.yaml.part" for p in path.iterdir()):
        raise UserError(f"{path} is not empty and has no config.yaml: choose another --workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}; choose another --workdir") from error
    if not file.exists():
        write_config(path, config)
    (path / "samples").mkdir(exist_ok=True)


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The config of `config.yaml`."""
    return yaml.safe_load((path / "config.yaml").read_text())


def _differences(path: pathlib.Path, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, and their values on record and in `config`; None where there is none."""
    old, new = (dict(flat(json.loads(json.dumps(c)))) for c in (read_config(path), config))
    return {n: (old.get(n), new.get(n)) for n in sorted({*old, *new}) if old.get(n) != new.get(n)}


def record_changes(path: pathlib.Path, step: int, config: dict[str, Any]) -> None:
    """Add to `changes.jsonl` which fields of `TUNED` change after a step, from what is on record to those of `config`.

    A line is `{"step": N, "training.learning_rate": [old, new], ...}`.
    """
    if changes := {name: values for name, values in _differences(path, config).items() if name in TUNED}:
        with (path / "changes.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **changes}) + "\n")


def write_config(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Write `config.yaml`: in a new directory, and again by training, whose record it is."""
    _replace(path / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))


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


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, named `a.b.c`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class MetricLog:
    """Metrics of a training run: to `metrics.jsonl`, to TensorBoard, and to the terminal.

    A terminal shows a progress bar; anything else gets a line each time.
    """

    def __init__(self, path: pathlib.Path, *, start: int, num_steps: int):
        self._num_steps = num_steps
        self._file = path / "metrics.jsonl"
        # A killed run may have logged steps after its last checkpoint; they are taken again.
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        _replace(self._file, "".join(line + "\n" for line in kept))
        self._events = SummaryWriter(str(path), purge_step=start + 1)
        self._bar = tqdm(total=num_steps, initial=start, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._events.close()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._bar.update(step - self._bar.n)
        loss = f"{metrics.get('loss', float('nan')):.4g}"  # None of the steps may have had one.
        self._bar.set_postfix(loss=loss)
        if self._bar.disable:
            rate, skipped = metrics["steps_per_second"], metrics["skipped"]
            left = (self._num_steps - step) / rate
            told = f"  {skipped} steps skipped: the gradient was not finite" if skipped else ""
            print(
                f"step {step}/{self._num_steps}  loss {loss}  {rate:.1f} steps/s  {left:.0f} s left{told}", flush=True
            )


class SampleFile:
    """An array of samples on disk, filled chunk by chunk, that a killed process leaves to the next one.

    Its files are `samples/partial.npy` and, saying of which samples it holds how many, `samples/partial.json`.
    """

    def __init__(self, path: pathlib.Path):
        self._array, self._progress = path / "samples/partial.npy", path / "samples/partial.json"

    def start(self, shape: tuple[int, ...], dtype: Any, what: dict[str, Any]) -> int:
        """Begin, unless the file holds such samples already; how many it does.

        Args:
          shape: of all samples.
          dtype: of them.
          what: all that tells these samples from others.
        """
        what = json.loads(json.dumps({"shape": shape, **what}))
        found = json.loads(self._progress.read_text()) if self._progress.exists() else {}
        if found.get("what") == what:
            print(f"going on after {found['done']} of {shape[0]} samples")
            return found["done"]
        self._progress.unlink(missing_ok=True)
        np.lib.format.open_memmap(self._array, "w+", dtype, shape).flush()
        _replace(self._progress, json.dumps({"what": what, "done": 0}))
        return 0

    def append(self, samples: np.ndarray) -> None:
        """Add samples."""
        progress, array = json.loads(self._progress.read_text()), np.load(self._array, mmap_mode="r+")
        end = progress["done"] + len(samples)
        array[progress["done"] : end] = samples
        array.flush()
        _replace(self._progress, json.dumps({**progress, "done": end}))

    def open(self) -> np.ndarray:
        """The array, read as it is needed."""
        return np.load(self._array, mmap_mode="r")

    def remove(self) -> None:
        """Delete the files."""
        self._progress.unlink()
        self._array.unlink()


def _replace(file: pathlib.Path, text: str) -> None:
    """Write a file such that a kill leaves the old one or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def save_samples(path: pathlib.Path, step: int, samples: np.ndarray) -> pathlib.Path:
    """Write `samples/step_<N>.npz` (`arr_0`, images as uint8) and `.png`; returns the picture's path."""
    stem = path / "samples" / f"step_{step}"
    np.savez_compressed(stem.with_suffix(".npz"), samples)
    report.save_picture(stem.with_suffix(".png"), samples)
    return stem.with_suffix(".png")


def save_edits(
    path: pathlib.Path, mode: str, step: int, images: dict[str, np.ndarray], *, centered: bool
) -> pathlib.Path:
    """Write `samples/<mode>_<N>.npz`, uint8 images by name, and `.png`, those of a row together; returns its path."""
    stored: dict[str, Any] = {name: data.to_uint8(x, centered=centered) for name, x in images.items()}
    stem = path / "samples" / f"{mode}_{step}"
    np.savez_compressed(stem.with_suffix(".npz"), **stored)
    report.side_by_side(stored).save(stem.with_suffix(".png"))
    return stem.with_suffix(".png")
