"""Checkpoints, weights and statistics that are broken, hostile or of something else, for every reader of them.

Each file is read in a process of its own, which may take 10 s of a processor, and 2 GB beside 16 times the file's size;
the pickles try to make a file, which must not be there afterwards.  Some are given to `run.py --pretrained`, too.
"""

import io
import json
import multiprocessing
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

from benchmarks import faults
from score_jax import adopt, features, networks, pytorch, tensors
from score_jax.pretrained import score_sde

SECONDS, MEMORY, LONGEST = 10, 2 * 2**30, 1000
DATA = faults.ROOT / "tests" / "data"
CANARY = pathlib.Path(tempfile.gettempdir()) / f"score_jax_canary_{os.getpid()}"
STORAGE = np.arange(12, dtype=np.float32)


class Case(NamedTuple):
    """A file: who reads it, what writes it into a directory, whether it can be read right, whether that is long."""

    name: str
    reader: str
    write: Callable[[pathlib.Path], pathlib.Path]
    right: bool = False
    heavy: bool = False


def _network(path: pathlib.Path, network: Any) -> Any:
    return adopt.load_params(path, network, (16, 16, 3))


VP = networks.NCSNpp(8, (1, 2), 1, (8,), combine="sum", resample="block")
TOY = features.Extractor("toy", lambda x: x)
READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    "torch": pytorch.read_torch,
    "safetensors": tensors.read_safetensors,
    "msgpack": score_sde.read,
    "score-SDE": lambda path: _network(path, VP),
    "NCSN": lambda path: _network(path, networks.NCSNv2(8, (1, 1, 1, 1), 20, 0.01, 1.0)),
    "diffusers": lambda path: _network(path, networks.UNet()),
    "statistics": lambda path: features.Seen.load(path, TOY),
    "inception": lambda path: features.inception(str(path)),
}

# Pickles, put together by their opcodes.


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def several(*items: Any) -> bytes:
    """A tuple of pickles, in which an integer stands for itself."""
    return b"(" + b"".join(b"I%d\n" % i if isinstance(i, int) else i for i in items) + b"t"


def call(name: str, *items: Any) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + several(*items) + b"R"


def tensor(shape: Any, strides: Any, *, offset: int = 0, kind: str = "Float", size: int = 12, key: str = "0") -> bytes:
    storage = several(text("storage"), f"ctorch\n{kind}Storage\n".encode(), text(key), text("cpu"), size) + b"Q"
    arguments = (x if isinstance(x, bytes) else several(*x) for x in (shape, strides))
    return call("torch._utils._rebuild_tensor_v2", storage, offset, *arguments, b"I00\n", b"}")


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def archive(tree: bytes, storages: dict[str, np.ndarray] | None = None, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        members = {f"data/{key}": s.tobytes() for key, s in (storages or {"0": STORAGE}).items()}
        for name, content in ({"data.pkl": tree, "byteorder": b"little"} | members | more).items():
            z.writestr(f"model/{name}", content)
    return file.getvalue()


def legacy(tree: bytes, storages: dict[str, np.ndarray] | None = None) -> bytes:
    storages = storages or {"0": STORAGE}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(x, 2) for x in (pytorch.LEGACY_MAGIC, 1001, system))
    sized = [s.size.to_bytes(8, "little") + s.tobytes() for s in storages.values()]
    return head + tree + pickle.dumps(list(storages), 2) + b"".join(sized)


class Touch:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (CANARY,)


def nested(levels: int) -> bytes:
    """A tuple of two tuples, which are one, and so on: its hash takes 2^levels steps."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def often(name: str, arguments: bytes, times: int) -> bytes:
    """A tuple of calls that pass one tuple of arguments, from the memo."""
    module, _, function = name.rpartition(".")
    head = f"(c{module}\n{function}\nq\0".encode() + arguments + b"q\x01"
    return head + b"h\0h\x01R" * times + b"t"


OK = tensor((3, 4), (4, 1))
COLLIDING = b"}(" + b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(1, 60_000))
PICKLES: dict[str, bytes] = {
    **{f"a call, protocol {protocol}": pickle.dumps({"model": Touch()}, protocol)[:-1] for protocol in range(6)},
    "eval": call("builtins.eval", text("open('/tmp/x', 'w')")),
    "getattr": call("builtins.getattr", b"cscore_jax.tensors\nos\n", text("system")),
    "an attribute of a known function": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
    "a name with a dot through STACK_GLOBAL": text("torch._utils") + text("_rebuild_tensor_v2.__call__") + b"\x93",
    "a name that is a number": b"K\x01K\x02\x93",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(cbuiltins\nlist\no",
    "an extension code": b"\x82\x01",
    "a reference by PERSID": b"Pabc\n",
    "BUILD of a tensor": OK + several(1, several(3), text("O"), b"I00\n", text("x")) + b"b",
    "BUILD of a number": b"K\x01}b",
    "BUILD with slots": mapping() + several(b"}", mapping(__class__=text("x"))) + b"b" + b"K\x01}b",
    "a call of a string": b"X\x01\x00\x00\x00a)R",
    "a call with a list": b"ccollections\nOrderedDict\n]R",
    "a storage called": b"ctorch\nFloatStorage\n)R",
    "items of a tensor": OK + b"K\x00K\x01s",
    "items appended to a dict": b"}K\x01a",
    "items appended to a tensor": OK + b"K\x01a",
    "a tuple as a key": b"}" + b"K\x01\x85" + b"Ns",
    "nested tuples as a key": b"}" + nested(200) + b"Ns",
    "nested tuples as a key of an OrderedDict": call("collections.OrderedDict", b"](" + several(nested(200), 1) + b"e"),
    "nested tuples as a storage": call("torch._utils._rebuild_tensor_v2", nested(200), 0, b")", b")", b"I00\n", b"}"),
    "nested tuples as a storage's key": several(
        text("storage"), b"ctorch\nFloatStorage\n", nested(200), text("cpu"), 12
    )
    + b"Q",
    "a float as a key": b"}G" + bytes(8) + b"Ns",
    "integers of one hash": COLLIDING + b"u",
    "a set": b"\x8f(K\x01\x90",
    "a frozenset of nested tuples": b"(" + nested(200) + b"\x91",
    "a memo's index of 4 billion": b"}r\xff\xff\xff\xff" + b"K\x01K\x01K\x01s",
    "a memo's index of 40 digits": b"}p" + b"9" * 40 + b"\n",
    "a memo's index that is not there": b"h\x07",
    "a string of 4 GB": b"X\xff\xff\xff\xffabc",
    "a string of 2^62 bytes": b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
    "a bytearray of 2^62": b"\x96" + struct.pack("<Q", 2**62) + b"abc",
    "an integer of 2 GB": b"\x8b\xff\xff\xff\x7fabc",
    "an integer of -1 bytes": b"\x8b\xff\xff\xff\xffabc",
    "an integer of 8 million bits": b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6,
    "an integer of a million digits": b"I" + b"9" * 10**6 + b"\n",
    "a frame of 2^62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"h\x07",
    "protocol 255": b"\x80\xffh\x07",
    "a buffer": b"\x97",
    "an unknown opcode": b"\xfe",
    "an empty stack": b"0",
    "a value that is not there": b"s",
    "no mark": b"K\x01t",
    "an OrderedDict of an endless thing": call("collections.OrderedDict", call("itertools.count")),
    "an OrderedDict of a tensor": call("collections.OrderedDict", OK),
    "an OrderedDict of numbers": call("collections.OrderedDict", b"](K\x01K\x02e"),
    "a tensor outside its storage": tensor((13,), (1,)),
    "a tensor before its storage": tensor((3,), (1,), offset=-1),
    "a negative stride": tensor((3,), (-1,), offset=5),
    "a negative shape": tensor((-3,), (1,)),
    "10^12 elements of stride 0": tensor((10**12,), (0,)),
    "10^12 elements that overlap": tensor((7,) + (10**6,) * 2, (1, 0, 0)),
    "a hundred axes": tensor((1,) * 100, (1,) * 100),
    "a shape of large numbers": tensor((0, 2**100, 2**100), (1, 1, 1)),
    "a shape of strings": tensor(several(text("a")), several(1)),
    "a shape that is a string": tensor(text("ab"), text("ab")),
    "a shape of nested tuples": tensor(nested(100), nested(100)),
    "an offset that is a list": tensor((3,), (1,)).replace(b"I0\n(", b"](", 1),
    "a storage of 10^15": tensor((3,), (1,), size=10**15),
    "a storage of 2^100": tensor((3,), (1,), size=2**100),
    "a storage of -1": tensor((3,), (1,), size=-1),
    "a storage of other size": tensor((3,), (1,), size=11),
    "a storage of objects": tensor((3,), (1,), kind="Object"),
    "a storage of two kinds": several(OK, tensor((3,), (1,), kind="Int")),
    "a storage outside the archive": tensor((3,), (1,), key="../../../etc/passwd"),
    "a storage that is the pickle": tensor((3,), (1,), key="../data.pkl"),
    "a reference to a number": b"K\x01Q",
    "a numpy scalar of objects": call(
        "numpy.core.multiarray.scalar", call("numpy.dtype", text("O8"), 0, 1), b"C\x08" + bytes(8)
    ),
    "a numpy scalar cut short": call(
        "numpy._core.multiarray.scalar", call("numpy.dtype", text("f8"), 0, 1), b"C\x04" + bytes(4)
    ),
    "a big-endian number": call(
        "numpy._core.multiarray.scalar",
        call("numpy.dtype", text("f8"), 0, 1) + several(3, text(">"), b"N", b"N", b"N", -1, -1, 0) + b"b",
        b"C\x08" + bytes(8),
    ),
    "a megabyte encoded 3,000 times": often("_codecs.encode", several(text("a" * 10**6), text("latin1")), 3000),
    "a call with 100 arguments": call("torch._utils._rebuild_parameter", *[0] * 100),
    "a reference of 100 parts": several(
        text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), 12, *[b"N"] * 95
    )
    + b"Q",
    "bytes by another codec": call("_codecs.encode", text("7z"), text("zlib")),
}
# They take seconds.
HEAVY: dict[str, bytes] = {
    "deep lists": b"]" * 500_000 + b"a" * 499_999 + b"K\x01K\x01s",
    "deep tuples": b")" + b"\x85" * 500_000 + b"K\x01s",
    "deep tuples as a key": b"})" + b"\x85" * 1_000_000 + b"Ns",
    "three million empty dicts": b"}" * 3_000_000,
    "three million marks": b"(" * 3_000_000,
    "two million tensors": OK + b"".join([b"q\x00", b"(", b"h\x00" * 2_500_000, b"t"]),
    "calls from the memo": b"ccollections\nOrderedDict\nq\x00" + b"h\x00)R" * 1_000_000,
    "a million axes": tensor(b"(" + b"K\x01" * 10**6 + b"t", b"(" + b"K\x01" * 10**6 + b"t"),
    "an OrderedDict of 100,000 pairs, 300 times": often(
        "collections.OrderedDict",
        b"](" + b"".join(b"J" + struct.pack("<i", k) + b"N\x86" for k in range(100_000)) + b"e\x85",
        300,
    ),
    "500,000 arguments, 6,000 times": often("torch._utils._rebuild_parameter", b"(" + b"N" * 500_000 + b"t", 6000),
    "a reference of 400,000 parts, 1,000 times": b"("
    + several(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), 12, b"N" * 400_000)
    + b"q\0"
    + b"h\0Q" * 1000
    + b"t",
}


def _file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(directory: pathlib.Path) -> pathlib.Path:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content())
        return directory / name

    return write


def _pickles() -> Iterator[Case]:
    for name, tree in (PICKLES | HEAVY).items():
        for form in (archive, legacy):
            yield Case(f"{form.__name__}: {name}", "torch", _file("a.pth", form(tree + b".")), heavy=name in HEAVY)
    for name, content in {
        "no STOP": archive(b"}"),
        "nothing": b"",
        "zeros": bytes(1000),
        "four letters": b"PK\x03\x04",
        "no storage": archive(OK + b".")[:-400],
        "two pickles": _zipped({"a/data.pkl": b"N.", "b/data.pkl": b"N."}),
        "one member twice": archive(OK + b".").replace(b"byteorder", b"data.pkl\0"),
        "big-endian": archive(OK + b".", byteorder=b"big"),
        "compressed": _zipped({"model/data.pkl": b"N."}, zipfile.ZIP_DEFLATED),
        "a zip bomb": lambda: _zipped({"model/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED),
        "an archive of 200,000 members": lambda: _zipped({f"model/{k}": b"" for k in range(200_000)}),
        "a member of 2^31 bytes": archive(OK + b".").replace(struct.pack("<II", 48, 48), struct.pack("<II", 2**31, 48)),
        "another program's magic": b"\x80\x02\x8a\x0a" + bytes(10) + b".",
        "a system of tuples": pickle.dumps(pytorch.LEGACY_MAGIC, 2) + b"M\xe9\x03." + nested(60) + b".",
        "a big-endian system": legacy(OK + b".").replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "keys of tuples": legacy(OK + b".").replace(pickle.dumps(["0"], 2), b"](" + nested(60) * 2 + b"e."),
        "a storage of 2^63": legacy(OK + b".").replace(struct.pack("<Q", 12), struct.pack("<Q", 2**63)),
    }.items():
        yield Case(f"a file of {name}", "torch", _file("a.pth", content), heavy=callable(content))
    for form in (archive, legacy):
        yield Case(f"{form.__name__}: right", "torch", _file("a.pth", form(mapping(a=OK) + b".")), right=True)


def _zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return file.getvalue()


def safe(header: Any, data: bytes = bytes(12)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: Any = (3,), offsets: Any = (0, 12), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _safetensors() -> Iterator[Case]:
    right = json.dumps(entry()).encode()
    for name, content in {
        "nothing": b"",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 60 MB": lambda: safe(b'{"a":[' + b"[]," * (2 * 10**7) + b"[]]}"),
        "a deep header": lambda: safe(b"[" * 10**6 + b"]" * 10**6),
        "a deep tensor": lambda: safe(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
        "an integer of a million digits": lambda: safe(b'{"a":' + b"9" * 10**6 + b"}"),
        "a tensor twice": safe(b'{"a":' + right + b',"a":' + right + b"}"),
        "no JSON": safe(b"{{"),
        "a list": safe([]),
        "no UTF-8": safe(b'{"\xff": 1}'),
        "a number for a tensor": safe({"a": 3}),
        "no offsets": safe({"a": {"dtype": "F32", "shape": [3]}}),
        "an unknown dtype": safe({"a": entry(dtype="F4")}),
        "a list as dtype": safe({"a": entry(dtype=["F32"])}),
        "a shape that is a string": safe({"a": entry(shape="3")}),
        "a shape of fractions": safe({"a": entry(shape=[3.5])}),
        "a shape of truths": safe({"a": entry(shape=[True], offsets=[0, 4])}, bytes(4)),
        "a negative shape": safe({"a": entry(shape=[-3, -1])}),
        "a shape of 100 axes": safe({"a": entry(shape=[3] + 99 * [1])}),
        "a shape of 10^5 large axes": safe({"a": entry(shape=[2**62] * 10**5)}),
        "an empty shape of large axes": safe({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b""),
        "three offsets": safe({"a": entry(offsets=[0, 12, 12])}),
        "offsets beyond the file": safe({"a": entry(shape=[10**9], offsets=[0, 4 * 10**9])}),
        "offsets that overlap": safe({"a": entry(), "b": entry()}),
        "offsets that are null": safe({"a": entry(offsets=None)}),
        "bytes left over": safe({"a": entry()}, bytes(20)),
    }.items():
        yield Case(f"safetensors: {name}", "safetensors", _file("a.safetensors", content), heavy=callable(content))
    yield Case("safetensors: right", "safetensors", _file("a.safetensors", safe({"a": entry()})), right=True)


def _ext(shape: Any, dtype: Any, data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def _msgpack() -> Iterator[Case]:
    whole = (DATA / "ddpmpp_vp.checkpoint").read_bytes()
    deep: Any = 1
    for _ in range(900):
        deep = {"a": deep}
    arrays = b"\x01"
    for _ in range(250):
        arrays = msgpack.packb(msgpack.ExtType(1, arrays))
    for name, content in {
        "nothing": b"",
        "a list": msgpack.packb([1, 2]),
        "no params_ema": msgpack.packb({"params": {}}),
        **{
            f"params_ema that is {value!r}"[:60]: msgpack.packb({"params_ema": value})
            for value in (3, "abc", [1, 2], None, True, b"ab", {1: 2}, {"a": "b"}, {"a": [1]}, {"params": 3})
        },
        "deep": msgpack.packb({"params_ema": deep}),
        "deeper": b"\x91" * 10**6 + b"\x01",
        "lists of 2^32": b"\xdd\xff\xff\xff\xff" * 10**6,
        "lists as long as the file": lambda: (b"\xdd" + struct.pack(">I", 5 * 10**6)) * 10**6,
        "ten million dicts": lambda: b"\xdd" + struct.pack(">I", 10**7) + b"\x80" * 10**7,
        "an array of ten million dicts": lambda: msgpack.packb(
            {"params_ema": {"a": msgpack.ExtType(1, b"\xdd" + struct.pack(">I", 10**7) + b"\x80" * 10**7)}}
        ),
        "bytes of 2^32": b"\xc6\xff\xff\xff\xffabc",
        "an array of objects": msgpack.packb({"params_ema": {"a": _ext((1,), "O", bytes(8))}}),
        "an array of no dtype": msgpack.packb({"params_ema": {"a": _ext((1,), "nothing", bytes(8))}}),
        "an array of strings": msgpack.packb({"params_ema": {"a": _ext((2,), "S4", bytes(8))}}),
        "an array of large shape": msgpack.packb({"params_ema": {"a": _ext((10**12,), "float32", bytes(8))}}),
        "an array of an odd shape": msgpack.packb({"params_ema": {"a": _ext("ab", "float32", bytes(8))}}),
        "arrays in arrays": arrays,
        "an array of nothing": msgpack.packb({"params_ema": {"a": msgpack.ExtType(1, b"")}}),
        "an unknown extension": msgpack.packb({"params_ema": {"a": msgpack.ExtType(9, b"ab")}}),
        "a chunk of nothing": msgpack.packb({"params_ema": {"a": {"__msgpack_chunked_array__": True}}}),
        "a map whose key is a list": b"\x81\x91\x01\x01",
        "more behind it": whole + b"\x01",
        "half": whole[: len(whole) // 2],
        "a name of a million letters": msgpack.packb(
            {"params_ema": {"ResnetBlock" + "_" * 10**6: _ext((1,), "float32", bytes(4))}}
        ),
    }.items():
        yield Case(f"msgpack: {name}", "score-SDE", _file("checkpoint_1", content), heavy=callable(content))
    yield Case("msgpack: right", "score-SDE", _file("checkpoint_1", whole), right=True)


def _states() -> Iterator[Case]:
    number, one = b"K\x07", tensor((1,), (1,))
    for name, tree in {
        "a list": b"](K\x01K\x02e",
        "a string": text("abc"),
        "a number": number,
        "a tensor": OK,
        "nothing": b"N",
        "an empty dict": b"}",
        "an empty list": b"]",
        "model alone": mapping(model=b"}"),
        "numbers for parts": mapping(model=number, ema=number),
        "strings for tensors": mapping(model=mapping(a=text("b")), ema=mapping(shadow_params=b"](" + text("c") + b"e")),
        "lists for tensors": mapping(model=mapping(a=b"]"), ema=mapping(shadow_params=b"](]e")),
        "a tensor of no place": mapping(model=mapping(a=one), ema=mapping(shadow_params=b"](" + one + b"e")),
        "an average of other length": mapping(model=mapping(a=one), ema=mapping(shadow_params=b"]")),
        "a name with 5,000 digits": mapping(
            model=b"}" + text(f"all_modules.{'9' * 5000}.weight") + one + b"s",
            ema=mapping(shadow_params=b"](" + one + b"e"),
        ),
        "numbers as names": b"}K\x01" + one + b"s",
        "a first layer of no channels": b"}" + text("begin_conv.weight") + tensor((0, 3, 3, 3), (1, 1, 1, 1)) + b"s",
        "a first layer that is a number": b"}" + text("begin_conv.weight") + tensor((), ()) + b"s",
        "a hundred stages": b"}(" + b"".join(text(f"res{k}.1.conv2.weight") + one for k in range(100)) + b"u",
        "scales that are a number": mapping(
            sigmas=tensor((), ()), **{"begin_conv.weight": one, "res1.1.conv2.weight": one}
        ),
        "scales that are not finite": mapping(
            sigmas=tensor((2,), (0,)), **{"begin_conv.weight": one, "res1.1.conv2.weight": one}
        ),
    }.items():
        for reader in ("score-SDE", "NCSN", "inception"):
            # A dict of tensors is held against all of Inception, which takes a second to trace.
            heavy = reader == "inception" and tree.startswith(b"}")
            yield Case(f"{reader}: {name}", reader, _file("a.pth", archive(tree + b".")), heavy=heavy)


def _diffusers() -> Iterator[Case]:
    source = DATA / "diffusers_ddpm"
    right = json.loads((source / "config.json").read_text())

    def model(change: Any, scheduler: Any = None, **files: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
        def write(directory: pathlib.Path) -> pathlib.Path:
            shutil.copytree(source, directory / "unet")
            raw = change if isinstance(change, bytes) else json.dumps(right | change).encode()
            (directory / "unet/config.json").write_bytes(raw)
            if scheduler is not None:
                (directory / "scheduler").mkdir()
                (directory / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
            for name, content in files.items():
                (directory / "unet/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
                (directory / "unet" / name).write_bytes(content)
            return directory

        return write

    wrong: dict[str, list[Any]] = {
        "block_out_channels": [[0, 0], [-8, 16], [16], [], "ab", None, [16, "32"], [16, 2**40], [2] * 100, [16, 31], 3],
        "layers_per_block": [10**6, 0, -1, "2", None, 1.5, True, [1], 10**30],
        "sample_size": [10**9, 0, -16, "16", None, [16, 16], 17, 16.0],
        "in_channels": [10**9, 0, "3", None, 4],
        "norm_num_groups": [0, -1, None, "8", 7, 10**12],
        "attention_head_dim": [0, -1, 7, "8", 10**12],
        "norm_eps": [float("nan"), -1, "1", None],
        "dropout": [float("nan"), -1, 1, "0"],
        "freq_shift": [2, "0", 0.5, None],
        "downsample_padding": [2, "1", None],
        "act_fn": [[], {}, "gelu", None],
        "resnet_time_scale_shift": ["spatial", [], None],
        "down_block_types": [
            None,
            [],
            ["DownBlock2D"],
            [[], []],
            ["DownBlock2D", 3],
            "ab",
            ["CrossAttnDownBlock2D"] * 2,
        ],
        "up_block_types": [None, [], [["UpBlock2D"]] * 2, ["UpBlock2D"] * 2],
        "attn_norm_num_groups": [[], 3, "8"],
        "_class_name": [None, "UNet2DConditionModel", []],
    }
    for field, values in wrong.items():
        for value in values:
            yield Case(f"diffusers: {field}={value!r}"[:80], "diffusers", model({field: value}))
    chains: list[dict[str, Any]] = [
        *({"num_train_timesteps": n} for n in (10**12, 0, -1, "1000", None, 1.5)),
        *({"beta_end": b} for b in (float("nan"), 2, -1, "0.02", None)),
        *({"trained_betas": b} for b in ([], [0.1], "ab", 3, [[0.1]], ["a"] * 1000, [float("nan")] * 1000, [2] * 1000)),
        *({"beta_schedule": s} for s in (None, [], "sigmoid")),
        *({"prediction_type": p} for p in (None, [], "flow")),
    ]
    for chain in chains:
        scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"} | chain
        yield Case(f"diffusers: {chain}"[:80], "diffusers", model({}, scheduler))
    weights = "diffusion_pytorch_model"

    def index(places: Any) -> dict[str, bytes]:
        return {f"{weights}.safetensors.index.json": json.dumps({"weight_map": places}).encode()}

    files: dict[str, dict[str, bytes]] = {
        "no weights": {"nothing.txt": b""},
        "weights of Flax": {f"{weights}.msgpack": b""},
        "two variants": {f"{weights}.fp16.safetensors": b"", f"{weights}.non_ema.safetensors": b""},
        "weights that are empty": {f"{weights}.safetensors": b""},
        "weights that call": {f"{weights}.bin": archive(pickle.dumps(Touch(), 2))},
        "weights that are a list": {f"{weights}.bin": archive(b"].")},
        "an index outside": index({"a": "../../../../etc/passwd"}),
        "an index above": index({"a": "../a.safetensors"}),
        "an index to itself": index({"a": f"{weights}.safetensors.index.json"}),
        "an index of no shards": index({}),
        "an index of missing shards": index({"a": "a.safetensors"}),
        "an index of numbers": index({"a": 3}),
        "an index that is a list": index([1]),
        "an index of other tensors": index({"b": "a.safetensors"}) | {"a.safetensors": safe({"a": entry()})},
    }
    for name, content in files.items():
        yield Case(f"diffusers: {name}", "diffusers", model({}, **content))
    for name, raw in {
        "deep JSON": b"[" * 10**6,
        "deep objects": b'{"a":' * 10**5,
        "20 MB of JSON": b'{"a": "' + b"a" * (20 * 10**6) + b'"}',
        "a field twice": json.dumps(right).encode()[:-1] + b', "act_fn": "silu"}',
        "a list": b"[]",
        "no JSON": b"\xff\xfe",
        "nothing": b"",
    }.items():
        yield Case(f"diffusers: a config of {name}", "diffusers", model(raw))
    yield Case("diffusers: right", "diffusers", model({}), right=True)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy(header: bytes, data: bytes = bytes(16)) -> bytes:
    """Statistics whose `mu` has a header of its own."""
    raw = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data
    return _zipped({"mu.npy": member, "sigma.npy": member})


def _statistics() -> Iterator[Case]:
    mu, sigma = np.zeros(3), np.eye(3)
    nan = np.array([0, np.nan, 0])
    contents: dict[str, Any] = {
        f"n={n!r}": npz(mu=mu, sigma=sigma, n=n) for n in (-1, 1.5, np.nan, np.inf, [1, 2], "ab", True, b"1", 1j)
    }
    arrays: dict[str, dict[str, Any]] = {
        "NaN in mu": {"mu": nan},
        "infinity in sigma": {"sigma": np.full((3, 3), np.inf)},
        "a sigma of another size": {"sigma": np.eye(4)},
        "a sigma that is a vector": {"sigma": np.ones(3)},
        "a sigma that is not symmetric": {"sigma": np.triu(np.ones((3, 3)))},
        "a negative variance": {"sigma": -sigma},
        "a mu that is a matrix": {"mu": np.zeros((1, 3))},
        "a mu of strings": {"mu": np.array(["a", "b", "c"])},
        "a mu of complex numbers": {"mu": mu + 1j},
        "a mu of nothing": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "mu_s alone": {"mu_s": mu},
        "sigma_s alone": {"sigma_s": sigma},
        "NaN in mu_s": {"mu_s": nan, "sigma_s": sigma},
        "another extractor": {"features": "inception"},
        "two extractors": {"features": ["toy", "toy"]},
        "objects": {"mu": np.array([Touch(), 1, 2], object)},
        "objects elsewhere": {"more": np.array([Touch()], object)},
    }
    contents |= {name: npz(**({"mu": mu, "sigma": sigma} | more)) for name, more in arrays.items()}
    whole = npz(mu=mu, sigma=sigma, n=5)
    contents |= {
        "nothing": b"",
        "no archive": b"abc",
        "one array": pickle.dumps(mu),
        "a call": pickle.dumps(Touch()),
        "half": whole[:-50],
        "no sigma": npz(mu=mu),
        "a zip bomb": lambda: _zipped({"mu.npy": bytes(10**8)}, zipfile.ZIP_DEFLATED),
        "a bomb of bzip2": lambda: _zipped({"mu.npy": bytes(10**8)}, zipfile.ZIP_BZIP2),
        "a member of text": _zipped({"mu": b"abc", "sigma": b"abc"}),
        "10^15 numbers": _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}"),
        "10^9 numbers": _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,)}"),
        "10^12 numbers of no size": _npy(b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,)}"),
        "a negative shape": _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"),
        "a header that is deep": _npy(b"(" * 5000),
        "a header that calls": _npy(b"{'descr': __import__('os'), 'fortran_order': False, 'shape': (2,)}"),
        "a dtype of nothing": _npy(b"{'descr': 'nothing', 'fortran_order': False, 'shape': (2,)}"),
        "80,000 members": lambda: _zipped({f"{k}.npy": b"" for k in range(80_000)}),
        "200,000 members": lambda: _zipped({f"{k}.npy": b"" for k in range(200_000)}),
    }
    for name, content in contents.items():
        yield Case(f"statistics: {name}", "statistics", _file("a.npz", content), heavy=callable(content))
    yield Case("statistics: right", "statistics", _file("a.npz", whole), right=True)
    for name, content in {"one array of strings": npz(a=["b"]), "half": whole[:-50]}.items():
        yield Case(f"inception.npz: {name}", "inception", _file("a.npz", content))
    yield Case("inception.safetensors: half", "inception", _file("a.safetensors", safe({"a": entry()})[:-3]))


def cases() -> Iterator[Case]:
    """Every file."""
    for part in (_pickles, _safetensors, _msgpack, _states, _diffusers, _statistics):
        yield from part()


def read(case: Case, path: pathlib.Path) -> faults.Trial:
    """What a reader says of a file, in this process."""
    try:
        READERS[case.reader](path)
    except ValueError as error:
        line = str(error)
        if "\n" in line or len(line) > LONGEST:
            return faults.Trial(case.name, "wordy", f"{len(line)} letters")
        return faults.Trial(case.name, "silent" if case.right else "told", line)
    except BaseException as error:
        return faults.Trial(case.name, "traceback", f"{type(error).__name__}: {error}"[:200])
    return faults.Trial(case.name, "right" if case.right else "silent", "it was read")


def _limited(case: Case, path: pathlib.Path, size: int, pipe: Any) -> None:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 16 * size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    pipe.send(read(case, path))


def try_case(case: Case) -> faults.Trial:
    """Read a file in a process of its own: 'hang' if time ends it, 'traceback' if it dies, 'silent' if the file ran."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        path = case.write(pathlib.Path(directory))
        size = sum(p.stat().st_size for p in pathlib.Path(directory).rglob("*") if p.is_file())
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_limited, args=(case, path, size, theirs))
        child.start()
        theirs.close()
        try:
            # Other processes may keep it waiting; what takes no time of a processor must end, too.
            trial = ours.recv() if ours.poll(12 * SECONDS) else faults.Trial(case.name, "hang", "it waits")
        except EOFError:
            child.join()
            timed = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            told = f"more than {SECONDS} s" if timed else f"it ended with {child.exitcode}"
            trial = faults.Trial(case.name, "hang" if timed else "traceback", told)
        child.kill()
        child.join()
    if CANARY.exists():
        CANARY.unlink()
        return faults.Trial(case.name, "silent", "the file ran code")
    return trial


COMMANDS = {
    "score-SDE": ["--config=configs/vp_cifar.py"],
    "NCSN": ["--config=configs/ncsnv2_cifar.py"],
    "diffusers": ["--config=configs/ddpm_cifar.py"],
}


def _commands() -> Iterator[faults.Trial]:
    """A few of them as a user would meet them."""
    chosen = {
        *(
            "msgpack: params_ema that is 3",
            "msgpack: half",
            "score-SDE: a list",
            "NCSN: a string",
            "NCSN: a hundred stages",
        ),
        *("diffusers: block_out_channels=[0, 0]", "diffusers: layers_per_block=1000000", "diffusers: no weights"),
        *("diffusers: {'num_train_timesteps': 1000000000000}", "diffusers: an index outside"),
        *("diffusers: weights that call", "diffusers: a config of deep JSON"),
    }
    for case in cases():
        if case.name in chosen:
            with tempfile.TemporaryDirectory() as directory:
                path = case.write(pathlib.Path(directory))
                arguments = [
                    *COMMANDS[case.reader],
                    "--mode=sample",
                    f"--pretrained={path}",
                    f"--workdir={directory}/run",
                ]
                verdict, detail = faults.verdict(faults.run(["run.py", *arguments], seconds=120.0))
            yield faults.Trial(f"run.py: {case.name}", "silent" if verdict == "right" else verdict, detail)


def trials() -> Iterator[faults.Trial]:
    """Each file read in a process, and some given to `run.py`."""
    yield from map(try_case, cases())
    yield from _commands()
