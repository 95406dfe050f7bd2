"""CIFAR archives of a few images, in both forms."""

from __future__ import annotations

import io
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from ensdistill.data.sources import cifar

NUM_TRAIN, NUM_VALID, NUM_TEST = 15, 5, 7  # images of the small CIFARs; train includes valid


def short_string(text: bytes) -> bytes:
    """A str of Python 2: SHORT_BINSTRING where it fits, BINSTRING otherwise."""
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def python2_batch(flat: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    """A batch as Python 2 pickled it with protocol 2, dtype and array state as numpy wrote them then."""
    dtype = (
        b"cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87q\x08Rq\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"M" + struct.pack("<H", flat.shape[0]) + b"M" + struct.pack("<H", flat.shape[1]) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85U\x01b\x87Rq\x06"
        + b"(K\x01" + shape + dtype + b"\x89" + short_string(flat.tobytes()) + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}q\x01("
        + short_string(b"batch_label") + short_string(b"training batch 1 of 5")
        + short_string(b"data") + array
        + short_string(label_key) + numbers
        + b"u."
    )  # fmt: skip


def protocol0_names(key: bytes, names: list[str]) -> bytes:
    """A dict with one list of names, as Python 2 pickled it with protocol 0."""
    items = b"".join(b"S'" + name.encode() + b"'\np" + str(i + 4).encode() + b"\na" for i, name in enumerate(names))
    return b"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'" + key + b"'\np3\n(lp99\n" + items + b"s."


class SmallCifar:
    """The files of a small CIFAR in both forms, and what is in them."""

    def __init__(self, name: str) -> None:
        self.layout = replace(cifar.LAYOUTS[name], num_train=NUM_TRAIN, num_valid=NUM_VALID, num_test=NUM_TEST)
        rng = np.random.default_rng(7)
        self.images = rng.integers(0, 256, (NUM_TRAIN + NUM_TEST, 32, 32, 3), dtype=np.uint8)
        self.labels = rng.integers(0, self.layout.num_classes, NUM_TRAIN + NUM_TEST)
        self.names = [f"class_{i}" for i in range(self.layout.num_classes)]

    def write(self, form: cifar.Form) -> dict[str, bytes]:
        layout = self.layout
        pieces = [*np.split(np.arange(NUM_TRAIN), len(form.train)), np.arange(NUM_TRAIN, NUM_TRAIN + NUM_TEST)]
        flat = self.images.transpose(0, 3, 1, 2).reshape(len(self.images), -1)
        written = {}
        for file, rows in zip((*form.train, form.test), pieces, strict=True):
            if form is layout.binary:
                coarse = np.full((len(rows), layout.label_bytes - 1), 255, np.uint8)
                written[file] = np.hstack([coarse, self.labels[rows, None].astype(np.uint8), flat[rows]]).tobytes()
            else:
                written[file] = python2_batch(flat[rows], self.labels[rows].tolist(), layout.label_key.encode())
        is_binary = form is layout.binary
        names = "\n".join(self.names) + "\n\n" if is_binary else protocol0_names(layout.names_key.encode(), self.names)
        written[form.names] = names.encode() if isinstance(names, str) else names
        return written

    def other_test(self, form: cifar.Form) -> bytes:
        """The test file with one pixel that is another."""
        data = bytearray(self.write(form)[form.test])
        data[data.index(self.images[NUM_TRAIN].transpose(2, 0, 1).tobytes())] ^= 1
        return bytes(data)


def pack(path: Path, folder: str, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def unpack(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
