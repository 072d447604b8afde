"""Pickles of plain values, read without `pickle`, which can call any function by its name.

Names are not the only danger.  Tuples that refer to each other are hashed in exponential time as the key of a dict, a
memo's index or a string's length takes as much memory as it says, and an array takes the state that it is given.  So
`pickletools` divides the file into opcodes, and a machine of our own makes dicts, lists, tuples, strings and numbers
of them.  It calls only the functions that it was given.
"""

import functools
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from score_jax.tensors import short

__all__ = ["PLAIN", "load"]

# Of one pickle: the value takes up to 300 bytes and a few microseconds for each.  A thousand tensors with their
# averages and the optimiser's moments are 0.1 million.
MOST_OPCODES = 1_000_000
# Of an integer: arithmetic with millions of digits takes minutes.  The magic number of PyTorch's files has 77.
MOST_BITS = 128
# Of a call or a reference, so that one long tuple is not copied for each of them; tensors take 7.
MOST_ARGUMENTS = 16
# Letters and items that all calls are passed, which they copy: one long list may be passed again and again.
MOST_PASSED = 2_000_000

VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}


def load(file: bytes | BinaryIO, names: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of a pickle.

    Args:
      file: its bytes, or a file that stands at its beginning, and stands at its end afterwards.
      names: what stands for each name that the pickle may use, `module.name`: functions, which it may call with any
        arguments, or values.
      persistent: what stands for a reference to something outside.

    Raises:
      ValueError: for a name or an opcode that is not known, for a key that is neither a string nor an integer of 64
        bits, and for more than `MOST_OPCODES`, `MOST_ARGUMENTS` or `MOST_PASSED` allow.
      Exception: of any other kind, if it is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    take = functools.partial(_take, stack, marks)
    passed = 0
    for count, (opcode, value, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
        if count == MOST_OPCODES:
            raise ValueError(f"it has more than {MOST_OPCODES:,} opcodes")
        name = opcode.name
        if name in VALUES:
            if type(value) is int and value.bit_length() > MOST_BITS:
                raise ValueError(f"it holds an integer of {value.bit_length()} bits")
            stack.append(value)
        elif name in GETS:
            stack.append(memo[_key(value)])
        elif name in PUTS:
            memo[_key(value)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in MAKES:
            number, make = MAKES[name]
            stack.append(make(take(number)))
        elif name in CHANGES:
            number, change = CHANGES[name]
            values = take(number)
            change(stack[-1], values)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_find(names, str(value).split(" ", 1) if name == "GLOBAL" else take(2)))
        elif name == "REDUCE":
            function, arguments = _call(take(2))
            passed = _checked(passed + sum(len(x) for x in arguments if type(x) in (str, list)))
            stack.append(function(*arguments))
        elif name == "BINPERSID" and persistent:
            stack.append(persistent(_reference(stack.pop())))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}, which plain values do not need")
    raise ValueError("it has no end")


def _checked(passed: int) -> int:
    """How much calls took so far, if it is not too much."""
    if passed > MOST_PASSED:
        raise ValueError(f"its calls take more than {MOST_PASSED:,} letters and items")
    return passed


def _reference(value: Any) -> tuple[Any, ...]:
    """What refers to something outside."""
    if type(value) is not tuple or len(value) > MOST_ARGUMENTS:
        raise ValueError("a reference is no short tuple")
    return value


def _take(stack: list[Any], marks: list[int], number: int | None) -> list[Any]:
    """Some values off the stack, or those above the last mark."""
    start = marks.pop() if number is None else len(stack) - number
    if start < 0:
        raise ValueError("it takes values that are not there")
    values = stack[start:]
    del stack[start:]
    return values


def _key(key: Any) -> Any:
    # Wider integers can be chosen so that all hashes agree; those of strings cannot.
    if type(key) is str or (type(key) is int and -(2**63) <= key < 2**64):
        return key
    raise ValueError(f"a key is {short(key)}, neither a string nor an integer of 64 bits")


def _set(target: Any, items: list[Any]) -> dict[Any, Any]:
    if type(target) is not dict:
        raise ValueError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value
    return target


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError(f"it appends to a {type(target).__name__}")
    target += items


def _find(names: Mapping[str, Any], parts: list[Any]) -> Any:
    if not all(type(part) is str for part in parts):
        raise ValueError("a name is no string")
    full = ".".join(parts)
    if full not in names:
        raise ValueError(f"it names {short(full)}, which is neither a tensor nor a plain container")
    return names[full]


def _call(values: list[Any]) -> tuple[Callable, tuple]:
    function, arguments = values
    if not callable(function) or type(arguments) is not tuple:
        raise ValueError(f"it calls a {type(function).__name__}")
    if len(arguments) > MOST_ARGUMENTS:
        raise ValueError(f"it calls a function with {len(arguments):,} arguments")
    return function, arguments


def _build(target: Any, values: list[Any]) -> None:
    """The state of a dict, its attributes, is dropped; that of a dtype is only looked at."""
    state = values[0]
    if isinstance(target, np.dtype):
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("it holds numbers that are not little-endian")
    elif type(target) is not dict:
        raise ValueError(f"it sets the state of a {type(target).__name__}")


# What takes how many values off the stack, None for those above the last mark, and makes one of them.
MAKES: dict[str, tuple[int | None, Callable[[list[Any]], Any]]] = {
    **{
        "EMPTY_TUPLE": (0, tuple),
        "TUPLE1": (1, tuple),
        "TUPLE2": (2, tuple),
        "TUPLE3": (3, tuple),
        "TUPLE": (None, tuple),
    },
    **{"EMPTY_LIST": (0, list), "LIST": (None, list), "EMPTY_DICT": (0, dict)},
    "DICT": (None, lambda items: _set({}, items)),
}
# What changes the value below.
CHANGES: dict[str, tuple[int | None, Callable[[Any, list[Any]], Any]]] = {
    **{"APPEND": (1, _extend), "APPENDS": (None, _extend), "SETITEM": (2, _set), "SETITEMS": (None, _set)},
    "BUILD": (1, _build),
}


def _ordered(items: Any = None) -> dict[Any, Any]:
    """A dict from a list of pairs, as Python 2 wrote it, or an empty one."""
    if not isinstance(items, list | None) or not all(type(p) in (list, tuple) and len(p) == 2 for p in items or ()):
        raise ValueError("an OrderedDict is not made of pairs")
    return _set({}, [x for pair in items or () for x in pair])


def _encode(text: Any, encoding: Any = None) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not written as latin-1")
    return text.encode("latin-1")


DTYPES = {
    name: np.dtype(f"<{name}") for name in ("b1", "f2", "f4", "f8", *(f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8)))
}


def _dtype(name: Any, *_: Any) -> np.dtype:
    if type(name) is not str or name not in DTYPES:
        raise ValueError(f"a number has the dtype {short(name)}")
    return DTYPES[name]


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a number of numpy is not its bytes")
    return np.frombuffer(data, dtype)[0]


# Plain containers, and the numbers of numpy before and since version 2.
PLAIN: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
}
