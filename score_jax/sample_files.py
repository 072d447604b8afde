"""The files of samples: those under way, which a killed process leaves to the next one, and those that are done."""

import contextlib
import io
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from score_jax import data, disk, provenance, report

__all__ = ["SampleFile", "save_edits", "save_samples"]


class SampleFile:
    """An array of samples on disk, filled chunk by chunk, that a killed process leaves to the next one.

    Its files are `samples/partial.npy` and, saying of which samples it holds how many, `samples/partial.json`.
    """

    def __init__(self, path: pathlib.Path):
        self._array, self._progress = path / "samples/partial.npy", path / "samples/partial.json"

    def start(self, shape: tuple[int, ...], dtype: Any, what: dict[str, Any]) -> int:
        """Begin, unless the files hold such samples already; how many they do.

        Args:
          shape: of all samples.
          dtype: of them.
          what: all that tells these samples from others.
        """
        self._what = json.loads(json.dumps({"shape": shape, **what}))
        header, dtype = io.BytesIO(), np.dtype(dtype)
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self._done, self._size, self._checksum = 0, header.tell(), zlib.crc32(header.getvalue())
        try:
            if self._resume(dtype.itemsize * math.prod(shape[1:])):
                print(f"going on after {self._done} of {shape[0]} samples")
                return self._done
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(f"starting the samples again: {self._progress} or .npy is damaged ({str(error).splitlines()[0]})")
        self._progress.unlink(missing_ok=True)
        with disk.writing(self._array) as file:
            file.write(header.getvalue())
        self._record()
        return 0

    def _resume(self, row: int) -> bool:
        """Go on after what the files hold, if it is of these samples; `row` is the bytes of one."""
        if not self._progress.exists():
            return False
        progress = disk.read_json(self._progress)
        if progress["what"] != self._what:
            return False
        size = left = self._size + progress["done"] * row
        checksum = 0
        with self._array.open("rb") as file:
            while left and (part := file.read(min(left, 2**24))):
                left, checksum = left - len(part), zlib.crc32(part, checksum)
        if left or checksum != progress["crc32"]:
            raise ValueError("they do not fit together")
        self._done, self._size, self._checksum = progress["done"], size, checksum
        return True

    def _record(self) -> None:
        progress = {"what": self._what, "done": self._done, "crc32": self._checksum}
        disk.replace(self._progress, json.dumps(progress))

    def append(self, samples: np.ndarray) -> None:
        """Add samples."""
        content = np.ascontiguousarray(samples).tobytes()
        # Written, not mapped: where the disk is full that is an error, not a signal that ends the process.
        with disk.naming(self._array), self._array.open("r+b") as file:
            file.seek(self._size)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._done, self._size = self._done + len(samples), self._size + len(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self._record()

    def open(self) -> np.ndarray:
        """The array, read as it is needed."""
        return np.load(self._array, mmap_mode="r")

    def remove(self) -> None:
        """Delete the files."""
        self._progress.unlink()
        self._array.unlink()


def save_samples(path: pathlib.Path, step: int, samples: np.ndarray, made: dict[str, Any]) -> pathlib.Path:
    """Write `samples/step_<N>.npz` (`arr_0`, images as uint8; `made`, JSON) and `.png`; returns the picture's path.

    Samples of that step that something else made are kept: they become `step_<N>_<sampler>_<steps>_<hash>`.

    Args:
      path: the workdir.
      step: of the checkpoint.
      samples: `[n, ...]`.
      made: what made them, of `provenance.of_samples`.
    """
    made = {"samples": len(samples), **made}
    text = json.dumps(made)
    with _newest(path / "samples" / f"step_{step}", made) as (npz, png):
        with disk.writing(npz) as file:
            np.savez_compressed(file, samples, made=np.array(text))
        with disk.writing(png) as file:
            report.save_picture(file, samples, made=text)
    return png


@contextlib.contextmanager
def _newest(stem: pathlib.Path, made: dict[str, Any]) -> Iterator[list[pathlib.Path]]:
    """Where to write what is newest, `.npz` and `.png`; what something else made there before gets another name."""

    def kept(made: dict[str, Any], file: pathlib.Path) -> pathlib.Path:
        return stem.with_name(f"{stem.name}_{provenance.variant(made)}{file.suffix}")

    files = [stem.with_suffix(suffix) for suffix in (".npz", ".png")]
    before = _made(files[1])
    for file in files:
        if before not in (None, made):
            with contextlib.suppress(FileNotFoundError):
                file.rename(kept(before, file))
    yield files
    for file in files:
        kept(made, file).unlink(missing_ok=True)  # It was made anew.


def _made(picture: pathlib.Path) -> dict[str, Any] | None:
    """What made a picture; None if it does not say."""
    try:
        with Image.open(picture) as image:
            image.load()
            made = json.loads(image.info[report.MADE])
    except (OSError, ValueError, KeyError, SyntaxError):
        return None  # There is none, or it is damaged, or older than that.
    return made if isinstance(made, dict) else None


def save_edits(
    path: pathlib.Path,
    mode: str,
    step: int,
    images: dict[str, np.ndarray],
    *,
    centered: bool,
    made: dict[str, Any],
) -> pathlib.Path:
    """Write `samples/<mode>_<N>.npz`, uint8 images by name, and `.png`, those of a row together; returns its path.

    As in `save_samples` nothing is lost that was made in another way.
    """
    stored: dict[str, Any] = {name: data.to_uint8(x, centered=centered) for name, x in images.items()}
    text = json.dumps(made)
    with _newest(path / "samples" / f"{mode}_{step}", made) as (npz, png):
        with disk.writing(npz) as file:
            np.savez_compressed(file, **stored)
        with disk.writing(png) as file:
            report.save_png(file, report.side_by_side(stored), made=text)
    return png
