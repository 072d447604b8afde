"""Files of tensors: what is written is read, and a file that is broken or hostile is an error and nothing else."""

import json
import pathlib
import pickle

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.faults import PASSED, checkpoints
from benchmarks.faults.checkpoints import STORAGE, archive, call, legacy, mapping, npz, several, tensor, text
from score_jax import pickles, pytorch, tensors

RNG = np.random.default_rng(0)


@pytest.fixture(params=[archive, legacy])
def write(request, tmp_path):
    """Writes a torch file of a pickle and its storages; returns the path."""

    def to_file(tree, storages=None):
        path = tmp_path / "model.pth"
        path.write_bytes(request.param(tree, storages or {"0": STORAGE}))
        return path

    return to_file


def fails(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        pytorch.read_torch(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_reads_tensors_in_their_containers(write):
    half = np.arange(4).astype(jnp.bfloat16)
    tree = mapping(
        whole=tensor((3, 4), (4, 1)),
        transposed=tensor((4, 3), (1, 4)),
        part=tensor((2,), (2,), offset=7),
        none=tensor((0, 5), (5, 1)),
        scalar=tensor((), (), offset=11),
        rest=several(tensor((4,), (1,), kind="BFloat16", size=4, key="1"), 7, text("seven")),
        ordered=b"ccollections\nOrderedDict\n)R",
        parameter=b"ctorch._utils\n_rebuild_parameter\n" + several(tensor((1,), (1,), offset=5), b"I01\n", b"}") + b"R",
    )
    read = pytorch.read_torch(write(tree + b".", {"0": STORAGE, "1": half}))
    grid = STORAGE.reshape(3, 4)
    np.testing.assert_array_equal(read["whole"], grid)
    np.testing.assert_array_equal(read["transposed"], grid.T)
    np.testing.assert_array_equal(read["part"], [7, 9])
    assert read["none"].shape == (0, 5)
    assert read["scalar"] == 11
    assert read["rest"][0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(read["rest"][0].astype(int), np.arange(4))
    assert read["rest"][1:] == (7, "seven")
    assert read["ordered"] == {}
    assert read["parameter"] == 5
    assert np.shares_memory(read["whole"], read["transposed"])


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_runs_nothing(write, tmp_path, protocol):
    target = tmp_path / "made"
    evil = pickle.dumps({"model": Touch(target)}, protocol)
    pickle.loads(evil)
    assert target.exists()  # So it would have been.
    target.unlink()
    fails(write(evil), "it names '(pathlib|builtins|__builtin__)[^']*', which is neither a tensor")
    assert not target.exists()


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR", "names 'builtins.eval'"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "names 'torch._utils._rebuild_tensor_v2.__globals__'"),
        (b"cscore_jax.tensors\nos\n", "names 'score_jax.tensors.os'"),
        (tensor((13,), (1,)), "outside the storage '0'"),
        (tensor((4, 3), (1, 5)), "outside"),
        (tensor((3,), (-1,), offset=5), "outside"),
        (tensor((3,), (1,), offset=-1), "outside"),
        (tensor((-3,), (1,)), "outside"),
        (tensor((3,), (1,), size=10**15), "cut short"),
        (tensor((3,), (1,), size=-1), "PyTorch file"),
        (tensor((3,), (1,), size=11), "48 bytes where 44 are expected"),
        (several(tensor((3,), (1,)), tensor((3,), (1,), kind="Int")), "'0' is read in two ways"),
        (tensor((3,), (1,), key="../data.pkl"), r"\.\./data.pkl|its storages are not"),
        (tensor((3,), (1,), kind="Object"), "names 'torch.ObjectStorage'"),
        # Setting the state of an array could make its bytes pointers.
        (tensor((3,), (1,)) + several(1, several(3), text("O"), b"I00\n", text("x")) + b"b", "PyTorch file"),
        (b"ctorch\nFloatStorage\n)R", "PyTorch file"),
        (b"", "PyTorch file"),
    ],
)
def test_hostile_and_broken_pickles(write, tree, match):
    fails(write(tree + b"."), match)


def test_a_file_that_is_cut_short(write):
    path = write(tensor((3, 4), (4, 1)) + b".")
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        fails(path, "PyTorch file")


@pytest.mark.parametrize("reader", checkpoints.READERS)
def test_hostile_files_are_told(reader, tmp_path):
    """Those of the benchmark of faults that take no seconds; there each has a process with little memory."""
    failed = []
    for i, case in enumerate(case for case in checkpoints.cases() if case.reader == reader and not case.heavy):
        (tmp_path / str(i)).mkdir()
        trial = checkpoints.read(case, case.write(tmp_path / str(i)))
        failed += [trial] * (trial.verdict not in PASSED)
    assert not failed
    assert not checkpoints.CANARY.exists()


def test_a_pickle_has_a_bounded_number_of_opcodes(write, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_OPCODES", 1000)
    one = tensor((1,), (1,))
    assert pytorch.read_torch(write(several(b"](" + b"N" * 900 + b"e", one) + b"."))[0] == [None] * 900
    fails(write(several(b"](" + b"N" * 1000 + b"e", one) + b"."), "more than 1,000 opcodes")


def test_the_calls_of_a_pickle_take_only_so_much(write, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_PASSED", 100)
    pairs = b"](" + several(1, 2) + several(3, 4) + b"e\x85"
    tree = several(tensor((1,), (1,)), checkpoints.often("collections.OrderedDict", pairs, 49))
    assert pytorch.read_torch(write(tree + b"."))[1][2:] == ({1: 2, 3: 4},) * 49
    fails(write(checkpoints.often("collections.OrderedDict", pairs, 51) + b"."), "more than 100 letters and items")


def test_msgpack_as_flax_writes_it(tmp_path):
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(0.5), "c": 1 + 2j, "d": {"e": "text", "f": np.array(3)}}
    (tmp_path / "checkpoint").write_bytes(flax.serialization.to_bytes(tree))
    read = tensors.read_msgpack(tmp_path / "checkpoint")
    np.testing.assert_array_equal(read.pop("a"), tree.pop("a"))
    assert read == tree


def test_tensors_share_bytes_only_so_often(write):
    """One expanded by strides of zero is read, as long as its elements stay few."""
    np.testing.assert_array_equal(pytorch.read_torch(write(tensor((5, 12), (0, 1)) + b".")), np.tile(STORAGE, (5, 1)))
    fails(write(tensor((10**12,), (0,)) + b"."), "share their bytes more than 16 times")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_numbers_of_numpy(write, module):
    """Those of both protocols: bytes as they are, and as text in latin-1."""
    dtype = call("numpy.dtype", text("f8"), b"I00\n", b"I01\n")
    dtype += several(3, text("<"), b"N", b"N", b"N", -1, -1, 0) + b"b"
    raw = np.float64(-0.7).tobytes()
    for data in (b"C\x08" + raw, call("_codecs.encode", text(raw.decode("latin-1")), text("latin1"))):
        number = call(f"{module}.multiarray.scalar", dtype, data)
        read = pytorch.read_torch(write(several(number, tensor((1,), (1,))) + b"."))[0]
        assert isinstance(read, np.float64)
        assert read == -0.7


TOKENS = [
    *(
        b"(",
        b")",
        b"]",
        b"}",
        b"N",
        b"K\x01",
        b"t",
        b"\x85",
        b"\x86",
        b"e",
        b"a",
        b"s",
        b"u",
        b"R",
        b"b",
        b"Q",
        b"0",
        b"2",
    ),
    *(
        b"q\x00",
        b"h\x00",
        b"\x94",
        b"\x93",
        b"l",
        b"d",
        b"\x81",
        text("0"),
        text("storage"),
        text("cpu"),
        STORAGE.tobytes(),
    ),
    *(f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() for name in pickles.PLAIN),
    *(
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        tensor((3, 4), (4, 1)),
        several(3),
        several(1),
    ),
]
FUZZED = {
    "torch": [archive(mapping(a=tensor((3, 4), (4, 1))) + b"."), legacy(mapping(a=tensor((3, 4), (4, 1))) + b".")],
    "safetensors": [checkpoints.safe({"a": checkpoints.entry()})],
    "msgpack": [flax.serialization.msgpack_serialize({"params_ema": {"a": {"kernel": STORAGE, "bias": STORAGE[0]}}})],
    "statistics": [npz(mu=np.zeros(3), sigma=np.eye(3), n=5)],
}


@given(st.data())
@settings(max_examples=400, deadline=10_000, derandomize=True, database=None)
def test_readers_answer_any_file(tmp_path_factory, data):
    """Right files with a few bytes replaced, put in and taken out, and programs of a pickle's opcodes."""
    reader = data.draw(st.sampled_from([*FUZZED, "program"]))
    if reader == "program":
        program = b"".join(data.draw(st.lists(st.sampled_from(TOKENS), max_size=30)))
        content, reader = data.draw(st.sampled_from([archive, legacy]))(program + b"."), "torch"
    else:
        content = data.draw(st.sampled_from(FUZZED[reader]))
        for _ in range(data.draw(st.integers(1, 4))):
            start, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 4))
            content = content[:start] + data.draw(st.binary(max_size=4)) + content[start + length :]
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    case = checkpoints.Case("fuzzed", reader, lambda path: path, right=True)
    # To read a changed file is right, too; to fail with anything but a line is not.
    assert checkpoints.read(case, path).verdict in ("right", "silent")


def test_other_archives_are_no_torch_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=STORAGE)
    fails(tmp_path / "a.npz", "no data.pkl")
    np.savez_compressed(tmp_path / "b.npz", x=STORAGE)
    fails(tmp_path / "b.npz", "compressed")
    with pytest.raises(FileNotFoundError):
        pytorch.read_torch(tmp_path / "c.pth")


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_itself(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    saved = {str(kind): (10 * torch.rand(3, 4)).to(kind).T for kind in kinds}
    saved["model"] = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = pytorch.read_torch(tmp_path / "a.pth")
    assert list(read.pop("model")) == list(saved.pop("model"))
    for name, value in saved.items():
        assert str(read[name].dtype) == name.removeprefix("torch.")
        np.testing.assert_array_equal(read[name].astype(np.float64), value.double().numpy())


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {name: (10 * RNG.random((2, 3))).astype(dtype) for name, dtype in tensors.SAFETENSORS.items()}
    arrays |= {"none": np.zeros((0, 4), np.float32), "scalar": np.float32(3), "transposed": np.eye(2, 3, 1).T}
    tensors.write_safetensors(path, arrays, {"format": "ours"})
    read = tensors.read_safetensors(path)
    assert set(read) == set(arrays)
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype
        assert read[name].flags.aligned
        np.testing.assert_array_equal(read[name], value)
    with pytest.raises(ValueError, match="'z' has the dtype complex128"):
        tensors.write_safetensors(path, {"z": np.array(1j)})


def test_safetensors_is_the_published_layout(tmp_path):
    """A file put together from the format's description."""
    header = json.dumps({"__metadata__": {"a": "b"}, "x": {"dtype": "I16", "shape": [3], "data_offsets": [0, 6]}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\x01\x00\x02\x00\xff\xff")
    np.testing.assert_array_equal(tensors.read_safetensors(path)["x"], [1, 2, -1])


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"x": ("F32", [2], [0, 8])}, "has 4 bytes more"),
        ({"x": ("F32", [3], [0, 12]), "y": ("F32", [1], [8, 12])}, "'y'.* 8 to 12 of 12 where 12 to 16"),
        ({"x": ("F32", [2], [4, 12])}, "'x'"),
        ({"x": ("F32", [4], [0, 16])}, "'x'.*0 to 16 of 12"),
        ({"x": ("F32", [2], [0, 12])}, "'x'.*where 0 to 8"),
        ({"x": ("F32", [-1, -3], [0, 12])}, "'x'"),
        ({"x": ("F32", [3], [12, 0])}, "'x'"),
        ({"x": ("F4", [3], [0, 12])}, "'x' has the unknown dtype 'F4'"),
        ([1], "its header: not a JSON object"),
        ({"x": 3}, "'x' has no dtype, shape and data_offsets"),
    ],
)
def test_broken_safetensors(tmp_path, header, match):
    if isinstance(header, dict) and header["x"] != 3:
        keys = ("dtype", "shape", "data_offsets")
        header = {name: dict(zip(keys, entry, strict=True)) for name, entry in header.items()}
    raw, path = json.dumps(header).encode(), tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(12))
    with pytest.raises(ValueError, match=match) as caught:
        tensors.read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_safetensors_cut_short(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors.write_safetensors(path, {"x": STORAGE})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            tensors.read_safetensors(path)
