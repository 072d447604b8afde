"""The directory of a run: its config, its metrics and where its files lie.

config.yaml  checkpoints/<step>/  metrics.jsonl  samples/{step,inpaint,...}_<N>.{png,npz}  report.html
"""

import contextlib
import fcntl
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml
from tensorboardX import SummaryWriter
from tqdm import tqdm

from score_jax import data, report
from score_jax.errors import UserError

__all__ = ["MetricLog", "open_workdir", "save_edits", "save_samples", "sole_writer", "termination"]

# What may differ when a run goes on or is sampled from: none of it changes the steps already taken.
FREE = (
    "training.num_steps",
    "training.log_every",
    "training.checkpoint_every",
    "sampling",
    "evaluation",
    "editing",
    "data.dir",
)


def open_workdir(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Make the directory of a run, or check that it is one of the same config.

    Args:
      path: the directory.
      config: the resolved config; it is written to `config.yaml`.

    Raises:
      UserError: if the directory holds a run of another config, or files that are no run's.
    """
    plain = json.loads(json.dumps(config))
    file = path / "config.yaml"
    if file.exists():
        old, new = dict(_flat(yaml.safe_load(file.read_text()))), dict(_flat(plain))
        for name in sorted({*old, *new}):
            # A field younger than the run must be off, as it was then.
            young = name not in old and not new[name]
            free = young or any(name == f or name.startswith(f + ".") for f in FREE)
            if not free and old.get(name) != new.get(name):
                raise UserError(
                    f"{path} holds a run of another config: {name} is {old.get(name)!r} there and {new.get(name)!r} "
                    "here; choose another --workdir, or give the same config"
                )
    elif path.exists() and any(path.iterdir()):
        raise UserError(f"{path} is not empty and has no config.yaml: choose another --workdir")
    (path / "samples").mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(plain, sort_keys=False))


@contextlib.contextmanager
def sole_writer(path: pathlib.Path) -> Iterator[None]:
    """While it lasts no other process may train in the directory.

    Raises:
      UserError: if one does.
    """
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is in training by another process: wait, or choose another --workdir") from error
        yield


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Tells whether the process was asked to end (SIGTERM, as schedulers do), which does not end it meanwhile."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # Signals are the main thread's.
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class MetricLog:
    """Metrics of a training run: to `metrics.jsonl`, to TensorBoard, and to the terminal.

    A terminal shows a progress bar; anything else gets a line each time.
    """

    def __init__(self, path: pathlib.Path, *, start: int, num_steps: int):
        self._file = path / "metrics.jsonl"
        # A killed run may have logged steps after its last checkpoint; they are taken again.
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        self._file.write_text("".join(line + "\n" for line in kept))
        self._events = SummaryWriter(str(path), purge_step=start + 1)
        self._bar = tqdm(total=num_steps, initial=start, unit="step", disable=not sys.stderr.isatty())
        self._num_steps = num_steps

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
        self._bar.set_postfix(loss=f"{metrics['loss']:.4g}")
        if self._bar.disable:
            rate = metrics["steps_per_second"]
            left = (self._num_steps - step) / rate
            print(
                f"step {step}/{self._num_steps}  loss {metrics['loss']:.4g}  {rate:.1f} steps/s  {left:.0f} s left",
                flush=True,
            )


def save_samples(path: pathlib.Path, step: int, samples: np.ndarray, *, centered: bool) -> pathlib.Path:
    """Write `samples/step_<N>.npz` (`arr_0`, images as uint8) and `.png`; returns the picture's path."""
    stored = data.to_uint8(samples, centered=centered) if samples.ndim == 4 else samples
    stem = path / "samples" / f"step_{step}"
    np.savez_compressed(stem.with_suffix(".npz"), stored)
    report.save_picture(stem.with_suffix(".png"), stored)
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
