"""The pickles of CIFAR's Python archives, read without executing anything.

A pickle is a program for a stack machine that may call any function. This reader runs that machine with an allow-list:
dicts, lists, tuples, strings, integers, booleans, None, and the one call sequence with which numpy stores an array of
uint8. Every other operation, and every other name, is refused. Written from the descriptions in `pickletools`.
"""

from __future__ import annotations

import math
import pickletools
from enum import Enum, auto
from typing import Any

import numpy as np

from ensdistill.runtime.errors import UserError


class _Name(Enum):
    """The names that a pickle may use; none is ever looked up."""

    RECONSTRUCT = auto()
    NDARRAY = auto()
    DTYPE = auto()


_NAMES = {
    "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
}
_CONSTANTS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class _EmptyArray:
    """An array between its construction and the BUILD that gives it shape and values."""


class _Uint8:
    """The one dtype that is accepted."""


def load_plain_pickle(data: bytes, origin: str) -> Any:
    """The value of a pickle of plain data; strings of Python 2 become `str` through latin-1, arrays are uint8.

    Raises:
        UserError: the pickle is damaged, or asks for anything beyond plain data.
    """
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(data):
            machine.step(operation.name, argument)
        (value,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else "damaged"
        raise UserError(
            f"{origin}: not a pickle of plain data ({reason}); expected a file of CIFAR's archive for Python: "
            "download the archive again, or take the binary one"
        ) from error
    return value


class _Machine:
    """The stack machine: `stack` with marks in it, `memo` of values by number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do one operation. Raises ValueError for one that is refused, other errors where the stack does not fit it."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "LIST":
            stack.append(self._pop_to_mark())
        elif name == "DICT":
            items = self._pop_to_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self._pop_to_mark() if name == "TUPLE" else [stack.pop() for _ in range(int(name[-1]))][::-1]
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop_to_mark() if name == "APPENDS" else [stack.pop()]
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_to_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            qualified = argument if name == "GLOBAL" else " ".join([stack.pop(), stack.pop()][::-1])
            if qualified not in _NAMES:
                raise ValueError(f"it calls {qualified.replace(' ', '.')}")
            stack.append(_NAMES[qualified])
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._build(state)
        else:
            raise ValueError(f"it uses the operation {name}")

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"expected a {kind.__name__}")
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, _Uint8):
            return  # byte order and alignment mean nothing for one byte
        if not isinstance(target, _EmptyArray):
            raise ValueError("it sets the state of something else than an array")
        array = _array(state)
        self.stack[-1] = array
        for number, value in self.memo.items():
            if value is target:
                self.memo[number] = array


def _call(function: Any, arguments: Any) -> object:
    if function is _Name.RECONSTRUCT and type(arguments) is tuple and arguments[0] is _Name.NDARRAY:
        return _EmptyArray()
    if function is _Name.DTYPE and type(arguments) is tuple:
        if arguments[0] != "u1":
            raise ValueError(f"it holds an array of type {arguments[0]}, not of bytes")
        return _Uint8()
    raise ValueError("it calls something else than numpy's array reconstruction")


def _array(state: Any) -> np.ndarray:
    _, shape, dtype, is_fortran, values = state
    if not isinstance(dtype, _Uint8) or not isinstance(values, (str, bytes)) or type(shape) is not tuple:
        raise ValueError("the state of an array is not as numpy writes it")
    buffer = values.encode("latin-1") if isinstance(values, str) else values
    if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) != len(buffer):
        raise ValueError(f"an array of shape {shape} has {len(buffer)} bytes")
    return np.frombuffer(buffer, np.uint8).reshape(shape, order="F" if is_fortran else "C")
