"""Checkpoints through Orbax: the training state and the position in the data, whole or not at all.

Orbax writes a step into a temporary directory and renames it when it is complete, so a run
killed while it saves leaves the steps before it and nothing that could be taken for a step.
Arrays that are divided over devices are written and read part by part, each process its own; they
are read into the places that the caller names, however many devices they were written from.
"""

import contextlib
import itertools
import pathlib
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
    manager = ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))
    try:
        yield manager
        with _told(manager):
            manager.wait_until_finished()
    except BaseException:
        if jax.process_count() == 1:  # Of several, the others would have to close theirs, too.
            manager.close()
        raise
    manager.close()


def save(manager: ocp.CheckpointManager, step: int, state: Any, data_state: dict[str, Any]) -> None:
    """Save a pytree of arrays and the JSON-like state of a data iterator under a step.

    Raises:
      UserError: if this step, or one before that was still on its way, cannot be written: the disk is full, say.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
    with _told(manager):
        manager.save(step, args=items)


@contextlib.contextmanager
def _told(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Of many kinds, by what failed and in which thread.
        reason = " ".join(str(error).split())[-200:]  # What the system said comes last.
        raise UserError(
            f"cannot save a checkpoint in {manager.directory}, those before it are as they were: {reason}"
        ) from error


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
