"""Kinds of files that the program reads: a whole one of each, and the program's own way to read it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from corruption import Damage


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


def all_kinds() -> dict[str, Callable[[Path], Kind]]:
    """Every kind by name; each is made in a folder of its own when it is asked for."""
    import corruption_data
    import corruption_records
    import corruption_weights

    return {**corruption_data.KINDS, **corruption_weights.KINDS, **corruption_records.KINDS}
