"""PyTorch's files, read without PyTorch and without running what they hold.

Such a file is a pickle that refers to storages, the raw bytes of tensors, which lie beside it: since 2020 in a zip
archive, before in a row behind it.  See `pickles` for what the pickle may do; here are its names of tensors.
"""

import math
import mmap
import os
import re
import zipfile
from typing import Any, BinaryIO

import numpy as np

from score_jax import pickles
from score_jax.tensors import MOST_AXES, SAFETENSORS, file_size, one_line, open_zip, short

__all__ = ["read_torch"]

STORAGES = {
    f"torch.{name}Storage": SAFETENSORS[dtype]
    for name, dtype in {
        **{"Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL"},
        **{"Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64"},
    }.items()
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Times that tensors may show the bytes of a file, by sharing storages or by strides of zero.
MOST_SHARED = 16


class _Tensors:
    """What a pickle's names and references to storages stand for; `storages` are to be filled afterwards.

    What it hands to the pickle can do no harm there: a storage is known by its key, a kind of storage by its name.
    """

    def __init__(self, size: int):
        self.storages: dict[str, tuple[np.dtype, np.ndarray]] = {}
        self.names = pickles.PLAIN | {name: name for name in STORAGES}
        self.names |= {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        self._stored, self._shown = size, MOST_SHARED * size

    def storage(self, pid: Any) -> str:
        _, kind, key, _, size, *view = pid
        if view and view[0] is not None:
            raise ValueError(f"the storage {short(key)} is part of another")
        if type(kind) is not str or kind not in STORAGES or type(key) is not str or type(size) is not int or size < 0:
            raise ValueError("a storage has no kind, name or size")
        dtype = STORAGES[kind]
        if key not in self.storages:
            self._stored -= size * dtype.itemsize
            if self._stored < 0:
                raise ValueError("it is cut short")
            self.storages[key] = dtype, np.empty(size * dtype.itemsize, np.uint8)
        elif self.storages[key][0] != dtype or self.storages[key][1].size != size * dtype.itemsize:
            raise ValueError(f"the storage {short(key)} is read in two ways")
        return key

    def tensor(self, key: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        if type(key) is not str or key not in self.storages:
            raise ValueError("a tensor has no storage")
        dtype, data = self.storages[key]
        size, numbers = data.size // dtype.itemsize, (offset, *shape[:MOST_AXES], *strides[:MOST_AXES])
        if not len(shape) == len(strides) <= MOST_AXES or any(type(n) is not int for n in numbers):
            raise ValueError("a tensor's shape or strides are not such")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(numbers) < 0 or (0 not in shape and last >= size):
            raise ValueError(f"a tensor reaches outside the storage {short(key)}")
        self._shown -= math.prod(shape) * dtype.itemsize
        if self._shown < 0:
            raise ValueError(f"its tensors share their bytes more than {MOST_SHARED} times")
        steps = [s * dtype.itemsize for s in strides]
        return np.ndarray(shape, dtype, data, min(offset, size) * dtype.itemsize, steps)


def read_torch(path: str | os.PathLike) -> Any:
    """What `torch.save` wrote: tensors as arrays, in the dicts, lists and tuples that held them.

    Both formats are read, the zip archive and the older one.  The arrays of tensors that shared memory do so again.

    Args:
      path: a `.pt`, `.pth` or `.bin` file.

    Raises:
      ValueError: in one line, if the file is cut short, or holds anything but tensors, numbers, strings and plain
        containers; nothing that it names is ever imported or called.
    """
    with open(path, "rb") as file:
        try:
            archived = file.read(4) == b"PK\x03\x04"
            return _read_archive(file) if archived else _read_legacy(file)
        except Exception as error:  # Broken pickles raise exceptions of every kind.
            raise ValueError(f"cannot read {os.fspath(path)} as a PyTorch file: {one_line(error)}") from error


def _read_archive(file: BinaryIO) -> Any:
    with open_zip(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its archive is compressed")
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if re.fullmatch("[^/]*/data.pkl", n)]
        if len(roots) != 1:
            raise ValueError("its archive has no data.pkl")
        root = roots[0]
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        made = _Tensors(file_size(file))
        tree = pickles.load(archive.read(root + "data.pkl"), made.names, made.storage)
        for key, (_, data) in made.storages.items():
            with archive.open(f"{root}data/{key}") as record:
                _fill(data, record, archive.getinfo(record.name).file_size)  # type: ignore[arg-type]
    return tree


def _read_legacy(file: BinaryIO) -> Any:
    # Its reads end with the file, whatever lengths a pickle says.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        made = _Tensors(len(pages))
        try:
            magic = pickles.load(pages, made.names)  # type: ignore[arg-type]
        except Exception:
            magic = None
        if magic != LEGACY_MAGIC:
            raise ValueError("it does not begin as one")
        protocol, system = (pickles.load(pages, made.names) for _ in range(2))  # type: ignore[arg-type]
        if protocol != 1001 or type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError(f"its protocol is {short(protocol)}, its system {short(system)}")
        tree = pickles.load(pages, made.names, made.storage)  # type: ignore[arg-type]
        keys = pickles.load(pages, made.names)  # type: ignore[arg-type]
        file.seek(pages.tell())
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(made.storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        dtype, data = made.storages[key]
        _fill(data, file, int.from_bytes(file.read(8), "little") * dtype.itemsize)
    return tree


def _fill(data: np.ndarray, file: BinaryIO, size: int) -> None:
    if size != data.nbytes:
        raise ValueError(f"a storage has {size} bytes where {data.nbytes} are expected")
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise ValueError("it is cut short")
