"""The metrics of a training run: to `metrics.jsonl`, to TensorBoard, and to the terminal."""

import errno
import functools
import json
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from score_jax import disk

__all__ = ["MetricLog", "read_metrics"]


def read_metrics(file: pathlib.Path) -> tuple[list[dict[str, float]], int]:
    """The rows of `metrics.jsonl`, and how many lines are damaged.

    A last line without an end is neither: who writes it has not done so yet, or was killed.
    """
    *lines, _ = file.read_bytes().split(b"\n") if file.exists() else [b""]
    rows = [row for line in lines if (row := _row(line))]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
    return row if whole and type(row.get("step")) is int else None


class Events:
    """TensorBoard's event file, written by the thread that calls: neither a queue that fills nor a thread that dies."""

    def __init__(self, path: pathlib.Path, *, purge_step: int):
        self._file = path / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self.write(file_version="brain.Event:2")
        purge = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.write(step=purge_step, session_log=purge)  # TensorBoard forgets what it has of later steps.

    def write(self, **fields: Any) -> None:
        """Append an `Event` of TensorFlow's proto as a record: length, its checksum, content, its checksum."""
        content = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        parts = length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content))
        with disk.naming(self._file), self._file.open("ab") as file:
            file.write(b"".join(parts))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step by their names."""
        rows = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.write(step=step, summary=summary_pb2.Summary(value=rows))


class MetricLog:
    """Metrics of a training run: to `metrics.jsonl`, to TensorBoard, and to the terminal.

    A terminal shows a progress bar; anything else gets a line each time.
    """

    def __init__(self, path: pathlib.Path, *, start: int, num_steps: int):
        self._num_steps = num_steps
        self._file = path / "metrics.jsonl"
        # A killed run may have logged steps after its last checkpoint; they are taken again.
        rows, damaged = read_metrics(self._file)
        if damaged:
            print(f"{self._file}: {damaged} damaged lines are left out")
        disk.replace(self._file, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start))
        self._events: Events | None = None
        self._write_events(lambda: setattr(self, "_events", Events(path, purge_step=start + 1)))
        self._bar = tqdm(total=num_steps, initial=start, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        with disk.naming(self._file), self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._events:
            self._write_events(functools.partial(self._events.scalars, step, metrics))
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

    def _write_events(self, write: Callable[[], object]) -> None:
        """Do it; if that alone fails, training goes on without TensorBoard.  A full disk is full for the rest, too."""
        try:
            write()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._events = None
            print(f"training goes on without TensorBoard's events: {error.filename}: {error.strerror}")
