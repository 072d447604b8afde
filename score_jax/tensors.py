"""Files of tensors: safetensors, Flax's msgpack, numpy's `.npz`, and the JSON that comes with them.

Whatever a file holds, a reader returns its tensors or raises a `ValueError` of one line, soon and in a small multiple
of the file's size; it runs nothing.

A safetensors file is the length of a header as a little-endian 64-bit integer, the header, a JSON object of
{name: {dtype, shape, data_offsets}}, and the tensors' bytes, which the offsets divide without gaps.
"""

import json
import math
import os
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import flax.serialization
import jax.numpy as jnp  # It gives numpy bfloat16.
import msgpack
import numpy as np

__all__ = [
    "MOST_AXES",
    "SAFETENSORS",
    "file_size",
    "one_line",
    "open_zip",
    "read_json",
    "read_msgpack",
    "read_npz",
    "read_safetensors",
    "short",
    "write_safetensors",
]

SAFETENSORS = {
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}
# Limits that no checkpoint comes near, so that a small file cannot ask for hours or all memory.
MOST_AXES = 32
# Bytes of JSON, and of an archive's directory, which is slower to read: a tensor takes about 100 of them.
MOST_HEADER, MOST_DIRECTORY = 2**24, 2**22
# Times that a compressed archive may grow; statistics and weights hardly compress at all.
MOST_UNPACKED = 32
# Dicts and lists of a msgpack file: a dict of four tensors for each layer.
MOST_CONTAINERS = 2**18


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 2


def short(value: object) -> str:
    """`repr`, cut to a part of a line: what a file holds may be long, or shared so often that it never ends."""
    return _SHORT.repr(value)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 500 characters."""
    text = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else repr(error)
    return " ".join(text[:500].split())


def file_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """An archive whose directory is short, and whose members have different names and are no longer than the file."""
    size = file_size(file)
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[5] > MOST_DIRECTORY:
        raise ValueError("the directory of its archive is too long")
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("its archive has two members of one name")
    if any(info.compress_size > size for info in archive.infolist()):
        raise ValueError("it is cut short")
    return archive


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by their names.

    Raises:
      ValueError: in one line, if the file is none, or is cut short, or holds Python objects, which are not made, or
        grows to more than `MOST_UNPACKED` times its size.
    """
    with open(path, "rb") as file:
        try:
            with open_zip(file) as archive:
                infos = archive.infolist()
            known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if any(info.compress_type not in known or info.flag_bits & 1 for info in infos):
                raise ValueError("it is encrypted, or compressed in another way than numpy's")
            if sum(info.file_size for info in infos) > max(MOST_UNPACKED * file_size(file), MOST_HEADER):
                raise ValueError(f"it grows to more than {MOST_UNPACKED} times its size")
            file.seek(0)
            with np.load(file) as arrays:
                found = dict(arrays)
        except Exception as error:  # Broken archives raise exceptions of every kind.
            raise ValueError(f"cannot read {os.fspath(path)} as .npz: {one_line(error)}") from error
    if any(not isinstance(x, np.ndarray) for x in found.values()):
        raise ValueError(f"{os.fspath(path)} has members that are no arrays")
    return found


def read_msgpack(path: str | os.PathLike) -> Any:
    """What `flax.serialization.to_bytes` wrote.

    Raises:
      ValueError: in one line, if the file is cut short or is none, or holds more than `MOST_CONTAINERS` containers.
    """
    with open(path, "rb") as file:
        data = file.read()
    left = MOST_CONTAINERS

    def count(_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it has more than {MOST_CONTAINERS:,} containers")

    def nested(*_: Any) -> None:
        raise ValueError("an array holds an array")  # Each level would be a frame of C, and a copy of what is inside.

    def look(data: bytes, inside: Callable = nested) -> None:
        # Every value must be there before room is made for as many as a container says it has.
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        unpacker.feed(data)
        unpacker.skip()
        hooks = {"object_hook": count, "list_hook": count, "ext_hook": inside}
        msgpack.unpackb(data, strict_map_key=False, raw=True, **hooks)

    try:
        look(data, lambda _, inner: look(inner))
        return flax.serialization.msgpack_restore(data)
    except Exception as error:  # msgpack's own, of many kinds, whatever the bytes.
        raise ValueError(f"{os.fspath(path)}: not a checkpoint, or truncated ({one_line(error)})") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: in one line, if the file is none, names a field twice, or has more than `MOST_HEADER` bytes.
    """
    with open(path, "rb") as file:
        text = file.read(MOST_HEADER + 1)
    return _object(text, os.fspath(path))


def _object(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field stands there twice")
        return dict(pairs)

    if len(text) > MOST_HEADER:
        raise ValueError(f"{where}: more than {MOST_HEADER} bytes of JSON")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by their names, as read-only arrays.

    Raises:
      ValueError: in one line, if the file is cut short, or its header is not JSON, or gives a tensor an unknown
        dtype, or bytes that are not there, too few or too many, or another's.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), file_size(file) - 8
        if length > rest:
            raise ValueError(f"{name} is cut short, or no safetensors file: its header would be {length} bytes long")
        header = _object(file.read(min(length, MOST_HEADER + 1)), f"{name} is no safetensors file: its header")
        data = file.read()
    header.pop("__metadata__", None)
    entries = [(tensor, *_entry(f"{name}: the tensor {short(tensor)}", e)) for tensor, e in header.items()]
    tensors, end = {}, 0
    for tensor, dtype, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
        size = math.prod(shape) * dtype.itemsize
        if start != end or stop - start != size or stop > len(data):
            raise ValueError(
                f"{name}: the tensor {short(tensor)}, {dtype} {shape}, has the bytes {start} to {stop} of {len(data)} "
                f"where {end} to {end + size} are expected"
            )
        tensors[tensor] = np.ndarray(shape, dtype, buffer=data, offset=start)
        end = stop
    if end != len(data):
        raise ValueError(f"{name} has {len(data) - end} bytes more than its tensors")
    return tensors


def _entry(where: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """The dtype, the shape and the bytes of an entry of a header."""
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise ValueError(f"{where} has no dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or kind not in SAFETENSORS:
        raise ValueError(f"{where} has the unknown dtype {short(kind)}")
    numbers = [*shape, *offsets] if type(shape) is type(offsets) is list else [None]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) > MOST_AXES or len(offsets) != 2:
        raise ValueError(f"{where} has the shape {short(shape)} and the data_offsets {short(offsets)}")
    if math.prod(n or 1 for n in shape) >= 2**60:  # Numpy has no such array, even if it is empty.
        raise ValueError(f"{where} has the shape {short(shape)}")
    return SAFETENSORS[kind], shape, offsets[0], offsets[1]


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
