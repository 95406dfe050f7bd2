"""Files of golden numbers: arrays of networks, batches, and what another implementation computed from them.

Their names are in tests/golden/README.md. Arrays are taken with the shape that they must have: one that does not fit
is refused by its name.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ensdistill.formats.flax import OfficialNetwork, wide_resnet_from_official
from ensdistill.runtime.errors import UserError

_MAX_BYTES = 1 << 30
"""Largest size of an unpacked golden file; the one in tests/golden has 4 million bytes."""


class Golden:
    """The arrays of a golden file; a missing one is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
                num_bytes = sum(member.file_size for member in archive.infolist())
                if num_bytes > _MAX_BYTES:
                    raise UserError(
                        f"{path}: unpacks to {num_bytes:,} bytes; expected a golden file of at most {_MAX_BYTES:,}"
                    )
                for member in archive.infolist():
                    with archive.open(member) as stream:
                        _check_header(stream, member)
                self.arrays = {name: file[name] for name in file.files}
        except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{path}: not a readable .npz of plain arrays ({reason}); expected a golden file"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UserError(
                f"{self.path}: the array {name} is missing; expected a golden file (tests/golden/README.md)"
            )
        array = self.arrays[name]
        if array.dtype.kind not in "biuf":
            raise UserError(f"{self.path}: {name} holds {array.dtype}; expected numbers")
        return array

    def shaped(self, name: str, shape: Sequence[int | None], why: str) -> np.ndarray:
        """Take the array `name`, of the given shape; None stands for any length.

        Raises:
            UserError: it is missing, or has another shape.
        """
        array = self[name]
        if not shape and array.size == 1:
            return array.reshape(())
        sides = zip(shape, array.shape, strict=False)
        if len(shape) != array.ndim or any(side not in (None, found) for side, found in sides):
            expected = ", ".join("any" if side is None else str(side) for side in shape)
            raise UserError(f"{self.path}: {name} has shape {array.shape}; expected ({expected}): {why}")
        return array

    def labels(self, name: str, shape: Sequence[int | None], num_classes: int, why: str) -> Tensor:
        """Take whole numbers in [0, K), as int64.

        Raises:
            UserError: they are missing, of another shape, or out of range.
        """
        array = self.shaped(name, shape, why)
        if array.dtype.kind not in "iu" or array.min(initial=0) < 0 or array.max(initial=0) >= num_classes:
            raise UserError(
                f"{self.path}: {name} holds {array.min()} to {array.max()} ({array.dtype}); expected whole numbers "
                f"from 0 to {num_classes - 1}"
            )
        return torch.from_numpy(array.astype(np.int64))

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, without it."""
        found = {name[len(prefix) + 1 :]: array for name, array in self.arrays.items() if name.startswith(prefix + "/")}
        if not found:
            raise UserError(
                f"{self.path}: no array is called {prefix}/…; expected a golden file (tests/golden/README.md)"
            )
        return found

    def network(self, prefix: str) -> OfficialNetwork:
        """The network under `prefix/params` and `prefix/batch_stats`."""
        return wide_resnet_from_official(
            self.below(f"{prefix}/params"), self.below(f"{prefix}/batch_stats"), where=f"{self.path}: {prefix}"
        )


def _check_header(stream: IO[bytes], member: zipfile.ZipInfo) -> None:
    """Raise a ValueError where an array is larger than the bytes that are there: room is made for all of it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} is an array of shape {shape} in {member.file_size:,} bytes")
