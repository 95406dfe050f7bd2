"""What is odd about splits and no error: images that are in two of them, classes that one of them lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from ensdistill.data.dataset import StoredSplit
from ensdistill.runtime.errors import first_names

HEAD_BYTES = 4096
"""Images of which so many first bytes differ are not compared further: of a large data set not all is read again."""


def split_notes(splits: Mapping[str, StoredSplit], class_names: Sequence[str]) -> str:
    """Say, in one line or none, which images of prepared splits are in two of them and which classes one lacks."""
    from ensdistill.data.beton_file import bytes_of_images, read_index  # loads numba, which takes a second

    indexes = {path: read_index(path) for path in {split.path for split in splits.values()}}
    stored = {path: bytes_of_images(index) for path, index in indexes.items()}
    rows = {
        name: np.arange(split.num_images) if split.indices is None else np.asarray(split.indices)
        for name, split in splits.items()
    }
    notes = []
    for name, split in splits.items():
        lacking = np.setdiff1d(np.arange(len(class_names)), indexes[split.path].labels_N[rows[name]])
        if len(lacking):
            names = first_names([f"'{class_names[k]}'" for k in lacking])
            notes.append(f"{name} has no image of {len(lacking)} of {len(class_names)} classes ({names})")
    heads = {name: _hashes(stored[split.path], rows[name], HEAD_BYTES) for name, split in splits.items()}
    for first, second in combinations(splits, 2):
        common = np.intersect1d(heads[first], heads[second])
        at, again_at = (np.flatnonzero(np.isin(heads[name], common)) for name in (first, second))
        one_N = _hashes(stored[splits[first].path], rows[first][at])
        other_N = _hashes(stored[splits[second].path], rows[second][again_at])
        is_twice_N = np.isin(other_N, one_N)
        if is_twice_N.any():
            k = int(np.argmax(is_twice_N))
            notes.append(
                f"{is_twice_N.sum():,} of {len(rows[second]):,} {second} images are in {first} too, byte for byte "
                f"({second} image {again_at[k]} is {first} image {at[int(np.argmax(one_N == other_N[k]))]})"
            )
    return "; ".join(notes)


def _hashes(stored: Callable[[int], np.ndarray], rows: np.ndarray, num_bytes: int | None = None) -> np.ndarray:
    """Hash the first bytes of images, and how many they have in all; returns uint64 (N,)."""
    digests = bytearray()
    for row in rows.tolist():
        data = stored(row)
        salt = len(data).to_bytes(8, "little")
        digests += hashlib.blake2b(data[:num_bytes].tobytes(), digest_size=8, salt=salt).digest()
    return np.frombuffer(bytes(digests), np.uint64)
