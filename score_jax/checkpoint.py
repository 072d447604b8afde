"""Checkpoints through Orbax: the training state and the position in the data, whole or not at all.

Orbax writes a step into a temporary directory and renames it when it is complete, so a run
killed while it saves leaves the steps before it and nothing that could be taken for a step.
Arrays that are divided over devices are written and read part by part, each process its own; they
are read into the places that the caller names, however many devices they were written from.
"""

import contextlib
import functools
import itertools
import logging
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from score_jax.errors import UserError

__all__ = ["open_manager", "restore", "restore_newest", "save"]


@contextlib.contextmanager
def open_manager(directory: pathlib.Path, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """A manager of `directory/<step>/`, saving in the background and keeping the newest `keep` steps.

    Raises:
      UserError: at the end, if a step could not be saved.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    _silence()
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
    try:
        yield manager
    except BaseException as error:
        # Of several processes, the others would have to close theirs, too.
        failed = _close(manager) if jax.process_count() == 1 else None
        if failed and str(failed) != str(error):  # What ended the run is told; that it cost a checkpoint, beside it.
            print(failed)
        raise
    if failed := _close(manager):
        raise failed


def _close(manager: ocp.CheckpointManager) -> UserError | None:
    """Wait for the last save, and close; the error, if it failed."""
    failed = None
    for _ in range(2):  # Where the save failed, the first only says so.
        try:
            manager.close()
            break
        except Exception as error:
            failed = failed or _told(manager, error)
    return failed


@functools.cache
def _silence() -> None:
    """Of a save that fails Orbax's threads print hundreds of lines; its error comes by `wait_until_finished`, too.

    Some are printed when the process ends, so it is for good.
    """

    def needed(record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        places = [record.pathname, record.getMessage(), *(f.filename for f in traceback.extract_tb(record.exc_info[2]))]
        return not any("orbax" in place for place in places)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(needed)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # Of writes that end after the one that failed.
            before(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")  # Of those that did not begin.


def save(manager: ocp.CheckpointManager, step: int, state: Any, data_state: dict[str, Any]) -> None:
    """Save a pytree of arrays and the JSON-like state of a data iterator under a step.

    Raises:
      UserError: if this step, or one before that was still on its way, cannot be written: the disk is full, say.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
    try:
        manager.save(step, args=items)
    except Exception as error:
        raise _told(manager, error) from error


def _told(manager: ocp.CheckpointManager, error: Exception) -> UserError:
    """The line about a save that failed: errors are of many kinds, by what failed and in which thread."""
    text = " ".join(str(error).split())
    # What the system said comes last: in TensorStore's words, or in Python's.
    found = re.search(r"([^:]+) \[os_error_code", text) or re.search(r"\[Errno \d+\] (.+)", text)
    reason = found[1].strip() if found else text[-200:]
    told = UserError(f"cannot save a checkpoint in {manager.directory}, those before it are as they were: {reason}")
    told.__cause__ = error
    return told


def restore_newest(
    manager: ocp.CheckpointManager, like: Any, *, set_aside: bool = True
) -> tuple[int, Any, dict[str, Any]] | None:
    """Read the newest step that can be read; damaged ones are passed over, and that is printed.

    Args:
      manager: of the directory.
      like: as in `restore`.
      set_aside: whether to give damaged ones another name, as who trains may, and who reads beside a run may not.

    Returns:
      The step and what `restore` gives, or None if there is none.

    Raises:
      UserError: if there are steps and none can be read.
    """
    damaged: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        why: Exception = ValueError("another process cannot read it")
        found = None
        try:
            found = step, *restore(manager, step, like)
        except Exception as error:  # Orbax's, of many kinds, by what is damaged.
            why = error
        if not np.all(multihost_utils.process_allgather(np.array(found is not None))) or not found:
            damaged[step] = why
            continue
        for bad, why in damaged.items():
            if set_aside and jax.process_index() == 0:
                path = pathlib.Path(manager.directory) / str(bad)
                names = (path.with_name(f"{bad}.damaged{k or ''}") for k in itertools.count())
                path.rename(next(name for name in names if not name.exists()))
            reason, done = str(why).splitlines()[0], "set aside" if set_aside else "passed over"
            print(f"the checkpoint of step {bad} is damaged ({reason}): {done}, going back to step {step}")
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        manager.reload()
        return found
    for step, why in damaged.items():  # The newest.
        where = pathlib.Path(manager.directory) / str(step)
        raise UserError(f"the checkpoint of step {step} in {where} cannot be read, nor any before: {why}") from why
    return None


def restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read a step back.

    Args:
      manager: of the directory.
      step: a step that it holds.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the structure that was saved; their shardings say where the
        arrays shall lie.

    Returns:
      The state, and the state of the data iterator.
    """
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    item = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
    )
    return item["state"], item["data"]
