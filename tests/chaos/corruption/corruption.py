"""Kinds of files that the program reads, and damage to them.

Damage is what disks, networks and editors do to bytes, and what somebody who means harm writes. Every function takes a
whole file and a generator, and gives other bytes: the same ones for the same generator. Those in `DAMAGE` know nothing
of the format; the others write files that are whole in form (checksums that fit, valid JSON) and say something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ensdistill.runtime.files import require_digest, with_digest

Rng = np.random.Generator
Damage = Callable[[bytes, Rng], bytes]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input."""

    files: Mapping[str, bytes]
    """A whole input: content by place in a folder."""
    damaged: tuple[str, ...]
    """The files that are damaged, one at a time."""
    read: Callable[[Path], Any]
    """Read the input in a folder as a command does, and return everything that comes of it. Its errors are the
    command's: what is no `UserError` is a traceback to the user."""
    has_digest: bool
    """True where damaged bytes must be noticed: they are compared with a checksum, or with what a run is given."""
    forged: tuple[Damage, ...] = ()
    """Writers of files that are whole in form and say something else; no checksum can notice them."""


class SetAside(Exception):
    """Raised by `Kind.read` where the program said in a line that a file is damaged, and went on without it."""


def fingerprint(value: Any) -> str:
    """Hash arrays, tensors, numbers and texts in containers, bit by bit."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, msgspec.Struct):
        _add(digest, {name: getattr(value, name) for name in value.__struct_fields__})
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, bytes):
        digest.update(value)
    else:
        digest.update(f"{type(value).__name__} {value!r}\n".encode(errors="backslashreplace"))


_HUGE = (0xFF, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def _place(data: bytes, rng: Rng, near: int = 512) -> int:
    """Choose a byte: of the head, the tail, what is not zero, or any. Files have megabytes of padding."""
    where, size = rng.random(), max(1, len(data))
    if where < 0.25:
        return int(rng.integers(min(near, size)))
    if where < 0.4:
        return size - 1 - int(rng.integers(min(near, size)))
    if where < 0.8:
        used = np.flatnonzero(np.frombuffer(data, np.uint8))
        if len(used):
            return int(rng.choice(used))
    return int(rng.integers(size))


def _block(data: bytes, rng: Rng) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + int(rng.choice((1, 4, 16, 64, 512, 4096))))


def _with(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def flipped_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.choice((1, 1, 2, 8)))):
        if changed:
            changed[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def other_bytes(data: bytes, rng: Rng) -> bytes:
    start, end = _block(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def truncated(data: bytes, rng: Rng) -> bytes:
    return data[: _place(data, rng)]


def zeroed(data: bytes, rng: Rng) -> bytes:
    start, end = _block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def doubled(data: bytes, rng: Rng) -> bytes:
    start, end = _block(data, rng)
    return data[:end] + data[start:end] + data[end:]


def lost(data: bytes, rng: Rng) -> bytes:
    start, end = _block(data, rng)
    return data[:start] + data[end:]


def swapped(data: bytes, rng: Rng) -> bytes:
    (a, b), (c, d) = sorted((_block(data, rng), _block(data, rng)))
    return data if c < b else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def appended(data: bytes, rng: Rng) -> bytes:
    junk = rng.bytes(int(rng.choice((1, 24, 1000, 70_000))))
    return data + (junk if rng.random() < 0.7 else bytes(len(junk)))


def huge_number(data: bytes, rng: Rng) -> bytes:
    """Write a number that no file means, as binary headers have it, or digits among digits."""
    start = _place(data, rng)
    value = int(rng.choice(np.array(_HUGE, dtype=np.uint64)))
    size = int(rng.choice((2, 4, 8)))
    number = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little" if rng.random() < 0.7 else "big")
    return _with(data, start - start % size, number)


def random_bytes(data: bytes, rng: Rng) -> bytes:
    keep = int(rng.choice((0, 2, 4, 8, 16, 128)))
    return data[:keep] + rng.bytes(int(rng.choice((1, 16, 300, 5000))))


def empty(data: bytes, rng: Rng) -> bytes:
    return b""


DAMAGE: tuple[Damage, ...] = (
    flipped_bits, flipped_bits, other_bytes, truncated, zeroed, doubled, lost, swapped, appended, huge_number,
    huge_number, random_bytes, empty,
)  # fmt: skip

# ---- JSON -----------------------------------------------------------------------------------------------------------

_DEEP = 100_000
JSON_VALUES = (
    "null", "true", "false", "0", "1", "-1", "1.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity",
    "1" + "0" * 18, "1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 5000, '""', '"x"', '" "', '"1"', r'"\ud800"',
    r'"\u0000"', r'"a\nb"', '"../../x"', '"' + "x" * 70_000 + '"', "[]", "[[]]", "[null]", "[0, 1, 2]", '["a"]', "{}",
    '{"a": 1}', "[" * _DEEP + "]" * _DEEP, '{"a":' * 2000 + "1" + "}" * 2000,
)  # fmt: skip
"""Values of every type, and numbers, texts and depths that no program writes."""
_MARK = "<the value>"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _changed(value: Any, path: tuple[Any, ...], act: Callable[[Any, Any], None]) -> Any:
    """Let `act` change the container of the place `path` of `value`, by its last key."""
    holder = [value]
    target: Any = holder
    for key in (0, *path[:-1]) if path else ():
        target = target[key]
    act(target, path[-1] if path else 0)
    return holder[0]


def other_json(data: bytes, rng: Rng) -> bytes:
    """Valid JSON with another value at some place, a field fewer, more, or of another name; or other text around it."""
    value = json.loads(data)
    if rng.random() < 0.1:
        return _other_text(data, rng)
    places = _places(value)
    path = places[int(rng.integers(len(places)))]
    new = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]

    def act(holder: Any, key: Any) -> None:
        change = rng.random()
        if change < 0.75 or not isinstance(holder, dict):
            holder[key] = _MARK
        elif change < 0.85:
            del holder[key]
        else:
            holder[f"{key}x"] = holder.pop(key) if change < 0.93 else _MARK

    return json.dumps(_changed(value, path, act)).replace(f'"{_MARK}"', new).encode()


def _other_text(data: bytes, rng: Rng) -> bytes:
    text = data.decode()
    kinds = (
        b"\xef\xbb\xbf" + data, text.encode("utf-16"), data.replace(b"a", b"\xff"), data + data, b"[" * _DEEP,
        b"[" + data + b"]", b"// x\n" + data, data.replace(b":", b"="), data.replace(b"\n", b"\0\n"),
    )  # fmt: skip
    return kinds[int(rng.integers(len(kinds)))]


def other_json_line(data: bytes, rng: Rng) -> bytes:
    """The same for one of the lines of a file."""
    lines = data.splitlines()
    i = int(rng.integers(len(lines)))
    lines[i] = other_json(lines[i], rng)
    return b"\n".join(lines) + b"\n"


def signed_json(data: bytes, rng: Rng) -> bytes:
    """Other JSON, with the hash of just that where it can have one."""
    changed = other_json(json.dumps(require_digest(json.loads(data))).encode(), rng)
    try:
        return json.dumps(with_digest(json.loads(changed))).encode()
    except (ValueError, TypeError, RecursionError):
        return changed


# ---- NumPy ----------------------------------------------------------------------------------------------------------

_DTYPES = ("|b1", "<f2", "<f4", "<f8", ">f4", "|i1", ">i2", "<i8", "<u8", "<c8", "|O", "|V3", "<U2", "|S3", "<M8[s]")


def other_array(data: bytes, rng: Rng) -> bytes:
    """A .npy of another type, another shape, with odd numbers, or with the header of a far larger file."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    change = int(rng.integers(6))
    if change == 0:
        kind = _DTYPES[int(rng.integers(len(_DTYPES)))]
        return _npy(repr(kind), False, array.shape, rng.bytes(array.size * np.dtype(kind).itemsize))
    if change == 1:
        shapes = ((), (array.size,), (1, *array.shape), (0, *array.shape[1:]), array.shape[::-1], (*array.shape, 1))
        return _npy(repr(array.dtype.str), False, shapes[int(rng.integers(len(shapes)))], array.tobytes())
    if change == 2:
        sides = list(array.shape) or [1]
        sides[int(rng.integers(len(sides)))] = (-1, 1 << 20, 1 << 33, 1 << 62, 1 << 63)[int(rng.integers(5))]
        return _npy(repr(array.dtype.str), bool(rng.integers(2)), tuple(sides), array.tobytes())
    if change == 3:
        heads = (
            "[('a', 'u1')]",
            "'<x9'",
            "None",
            "['u1']",
            "'u1, u1'",
            "{'names': ['a'], 'formats': ['O']}",
            "'|u1'*9",
        )
        return _npy(heads[int(rng.integers(len(heads)))], False, array.shape, array.tobytes())
    if change == 4:
        buffer = io.BytesIO()
        np.save(buffer, np.asfortranarray(array) if rng.random() < 0.5 else array[::-1])
        return buffer.getvalue()
    odd = array.copy().reshape(-1)
    values = (np.nan, np.inf, 1e30, -1.0) if odd.dtype.kind == "f" else (0, 1, 7, 127)
    odd[rng.integers(odd.size, size=3)] = values[int(rng.integers(len(values)))]
    buffer = io.BytesIO()
    np.save(buffer, odd.reshape(array.shape))
    return buffer.getvalue()


def _npy(descr: str, is_fortran: bool, shape: tuple[int, ...], values: bytes) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': {is_fortran}, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + values


# ---- archives, whose checksums are made anew ------------------------------------------------------------------------


def inside_zip(damage: Mapping[str, tuple[Damage, ...]]) -> Damage:
    """Damage one part of a zip archive, by the ending of its name, and write the archive anew."""

    def changed(data: bytes, rng: Rng) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {part.filename: archive.read(part) for part in archive.infolist()}
        name = list(parts)[int(rng.integers(len(parts)))]
        acts = next((some for ending, some in damage.items() if name.endswith(ending)), DAMAGE)
        parts[name] = acts[int(rng.integers(len(acts)))](parts[name], rng)
        if rng.random() < 0.1:
            del parts[name]
        buffer = io.BytesIO()
        is_packed = rng.random() < 0.2
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED) as archive:
            for part, content in parts.items():
                archive.writestr(part, content)
        return buffer.getvalue()

    return changed


def zip_that_claims(data: bytes, rng: Rng) -> bytes:
    """A zip archive whose tables say that a part is huge."""
    changed = bytearray(data)
    entries = [found.start() for found in re.finditer(rb"PK\x01\x02", data)]
    at = entries[int(rng.integers(len(entries)))]
    size = int(rng.choice([1 << 28, 1 << 31, (1 << 32) - 2]))
    for offset in (20, 24) if rng.random() < 0.5 else (24,):  # packed, unpacked
        changed[at + offset : at + offset + 4] = struct.pack("<I", size)
    return bytes(changed)
