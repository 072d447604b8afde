"""Files of tensors: PyTorch's, read without PyTorch and without running what a pickle may name, and safetensors.

A PyTorch file is a pickle that refers to storages, the raw bytes of tensors, which lie beside it: since 2020 in a zip
archive, before in a row behind it.  A pickle can call any function by its name; the reader here knows two functions
that make tensors, the names of storages and one container, and refuses every other name before it is looked up.

A safetensors file is the length of a header as a little-endian 64-bit integer, the header, a JSON object of
{name: {dtype, shape, data_offsets}}, and the tensors' bytes, which the offsets divide without gaps.
"""

import collections
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp  # It gives numpy bfloat16.
import numpy as np

__all__ = ["read_safetensors", "read_torch", "write_safetensors"]

SAFETENSORS = {
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}
STORAGES = {
    f"torch.{name}Storage": SAFETENSORS[dtype]
    for name, dtype in {
        **{"Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL"},
        **{"Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64"},
    }.items()
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain containers, and nothing else; `storages` are to be filled afterwards.

    What it hands to the pickle can do no harm there: a storage is known by its key, a kind of storage by its name.
    """

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, np.ndarray] = {}
        self._left = size

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in STORAGES:
            return full
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        if full not in known:
            raise pickle.UnpicklingError(f"it names {full!r}, which is neither a tensor nor a plain container")
        return known[full]

    def persistent_load(self, pid: Any) -> str:
        _, kind, key, _, size, *view = pid
        if view and view[0] is not None:
            raise pickle.UnpicklingError(f"the storage {key!r} is part of another")
        dtype = STORAGES[kind]
        if key not in self.storages:
            self._left -= size * dtype.itemsize
            if self._left < 0:
                raise pickle.UnpicklingError("it is cut short")
            self.storages[key] = np.empty(size, dtype)
        elif (self.storages[key].dtype, self.storages[key].size) != (dtype, size):
            raise pickle.UnpicklingError(f"the storage {key!r} is read in two ways")
        return key

    def _tensor(self, key: str, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
        storage = self.storages[key]
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and last >= storage.size):
            raise pickle.UnpicklingError(f"a tensor reaches outside the storage {key!r}")
        steps = [s * storage.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(storage[min(offset, storage.size) :], shape, steps)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data


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
            file.seek(0)
            return _read_archive(file) if archived else _read_legacy(file)
        except Exception as error:  # Broken pickles raise exceptions of every kind.
            raise ValueError(f"cannot read {os.fspath(path)} as a PyTorch file: {error}") from error


def _read_archive(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its archive is compressed")
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if re.fullmatch("[^/]*/data.pkl", n)]
        if len(roots) != 1:
            raise ValueError("its archive has no data.pkl")
        root = roots[0]
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        unpickler = _Unpickler(archive.open(root + "data.pkl"), _size(file))  # type: ignore[arg-type]
        tree = unpickler.load()
        for key, storage in unpickler.storages.items():
            with archive.open(f"{root}data/{key}") as record:
                _fill(storage, record, archive.getinfo(record.name).file_size)  # type: ignore[arg-type]
    return tree


def _read_legacy(file: BinaryIO) -> Any:
    size = _size(file)

    def load() -> tuple[Any, dict[str, np.ndarray]]:
        unpickler = _Unpickler(file, size)
        return unpickler.load(), unpickler.storages

    try:
        magic = load()[0]
    except Exception:
        magic = None
    if magic != LEGACY_MAGIC:
        raise ValueError("it does not begin as one")
    (protocol, _), (system, _) = load(), load()
    if protocol != 1001 or not system["little_endian"]:
        raise ValueError(f"its protocol is {protocol}, its system {system}")
    tree, storages = load()
    keys, _ = load()
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        _fill(storages[key], file, int.from_bytes(file.read(8), "little") * storages[key].itemsize)
    return tree


def _fill(storage: np.ndarray, file: BinaryIO, size: int) -> None:
    if size != storage.nbytes:
        raise ValueError(f"a storage has {size} bytes where {storage.nbytes} are expected")
    if file.readinto(storage.view(np.uint8)) != size:  # type: ignore[attr-defined]
        raise ValueError("it is cut short")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by their names, as read-only arrays.

    Raises:
      ValueError: in one line, if the file is cut short, or its header is not JSON, or gives a tensor an unknown
        dtype, or bytes that are not there, too few or too many, or another's.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), _size(file) - 8
        if length > rest:
            raise ValueError(f"{name} is cut short, or no safetensors file: its header would be {length} bytes long")
        header, data = file.read(length), file.read()
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        fields = {n: (e["dtype"], [*map(int, e["shape"])], *map(int, e["data_offsets"])) for n, e in entries.items()}
    except Exception as error:  # Any JSON may be there.
        raise ValueError(f"{name} is no safetensors file: {error!r} in its header") from error
    tensors, end = {}, 0
    for tensor, (dtype, shape, start, stop) in sorted(fields.items(), key=lambda item: item[1][2:]):
        if dtype not in SAFETENSORS:
            raise ValueError(f"{name}: the tensor {tensor!r} has the unknown dtype {dtype!r}")
        size = math.prod(shape) * SAFETENSORS[dtype].itemsize
        if min(shape, default=0) < 0 or start != end or stop - start != size or stop > len(data):
            raise ValueError(
                f"{name}: the tensor {tensor!r}, {dtype} {shape}, has the bytes {start} to {stop} of {len(data)} "
                f"where {end} to {end + size} are expected"
            )
        tensors[tensor] = np.ndarray(shape, SAFETENSORS[dtype], buffer=data, offset=start)
        end = stop
    if end != len(data):
        raise ValueError(f"{name} has {len(data) - end} bytes more than its tensors")
    return tensors


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by their names as a safetensors file, and strings beside them.

    Raises:
      ValueError: if an array's dtype has no name there.
    """
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    # The widest first, so that each begins at a multiple of its width.
    arrays = dict(sorted(((n, np.asarray(x)) for n, x in tensors.items()), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, x in arrays.items():
        if x.dtype not in names:
            raise ValueError(f"the tensor {name!r} has the dtype {x.dtype}, which safetensors do not know")
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": (end, end + x.nbytes)}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(x.tobytes())
