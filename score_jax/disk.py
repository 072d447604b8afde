"""Small files that are whole or not there, and what the system says of those that cannot be read or written."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import yaml

from score_jax.errors import UserError

__all__ = ["naming", "read_json", "read_yaml", "replace", "told", "writing"]

# What a person can do about an error of the system.
HELP = {
    "free some space, and the same command goes on": ("ENOSPC", "EDQUOT", "EFBIG"),
    "see to the permissions": ("EACCES", "EPERM", "EROFS"),
    "move it away, or choose another directory": ("ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG", "ENOTEMPTY"),
    "was it deleted while this ran?": ("ENOENT", "ESTALE"),
    "the disk or the network fails": ("EIO", "ENXIO", "ENODEV", "ETIMEDOUT"),
}
HELP_BY_NUMBER = {getattr(errno, name): text for text, names in HELP.items() for name in names if hasattr(errno, name)}


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[BinaryIO]:
    """A stream to write a file by, such that a kill or a power cut leaves the old file or the new one.

    Raises:
      OSError: if it cannot be written, with its name, which the system does not always tell.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with naming(file), part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
        _sync_directory(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # The first error counts.
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(file: pathlib.Path) -> Iterator[None]:
    """Errors of the system meanwhile tell the file's name, which a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(file)
        raise


def _sync_directory(path: pathlib.Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no directories.
        return
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    except OSError as error:  # Some network file systems do not do it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(directory)


def replace(file: pathlib.Path, text: str) -> None:
    """Write a text as `writing` does."""
    with writing(file) as stream:
        stream.write(text.encode())


def read_json(file: pathlib.Path) -> Any:
    """What a JSON file holds.

    Raises:
      ValueError: if that is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_yaml(file: pathlib.Path) -> dict[str, Any]:
    """The fields that a YAML file holds.

    Raises:
      ValueError: if it holds no fields, in one line.
    """
    try:
        # Through JSON: neither dates nor cycles, and names that are words.
        content = json.loads(json.dumps(yaml.safe_load(file.read_bytes())))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).replace('"<byte string>", ', "").split())[:150]) from error
    if not isinstance(content, dict):
        raise ValueError("it is empty" if content is None else "it does not hold fields")
    return content


def told(error: OSError, path: pathlib.Path) -> UserError:
    """The one line about an error of the system.

    Args:
      error: raised by it; what only looks like one, as Pillow's, has no number and is raised again.
      path: which directory was worked on, if the error does not name a file.
    """
    if not error.errno:
        raise error
    if isinstance(error, BrokenPipeError):
        return UserError("who reads what is printed here has ended; what was finished is saved")
    name = path if error.filename is None else os.fsdecode(error.filename)
    hint = f" ({HELP_BY_NUMBER[error.errno]})" if error.errno in HELP_BY_NUMBER else ""
    return UserError(f"cannot read or write {name}: {error.strerror}{hint}")
