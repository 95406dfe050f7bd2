"""A `.beton` is what FFCV reads; whatever else a file holds is refused, never read past its end."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import (
    Written,
    cycled,
    feed_of,
    refused,
    take,
    write,
    write_beton,
)

from ensdistill.data import beton_file
from ensdistill.data.beton_file import page_bytes_for, read_index, write_arrays
from ensdistill.data.ffcv_guards import kept_thread_counts
from ensdistill.data.image_files import Stored
from ensdistill.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_ffcv_reads_what_was_written(tmp_path: Path) -> None:
    """Through FFCV's own loader, over more than one page of memory."""
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 300, 301, 1), dtype=np.uint8)
    labels = rng.integers(0, 5, 37)
    path = tmp_path / "a.beton"
    write_arrays(path, images, labels, (300, 301, 1), lambda: None)
    assert path.stat().st_size > 2 * beton_file.MIN_PAGE_BYTES
    decoders = {"image": [NDArrayDecoder()], "label": [IntDecoder()]}
    with kept_thread_counts():
        order = OrderOption.SEQUENTIAL
        loader = Loader(str(path), batch_size=10, num_workers=1, order=order, drop_last=False, pipelines=decoders)
        batches = [(image.copy(), label.copy()) for image, label in loader]
    assert np.array_equal(np.concatenate([image for image, _ in batches]), images)
    assert np.array_equal(np.concatenate([label for _, label in batches])[:, 0], labels)


def test_an_image_no_page_holds() -> None:
    assert page_bytes_for(1) == page_bytes_for(1 << 21) == 1 << 21
    assert page_bytes_for((1 << 21) + 1) == 1 << 22
    refused(lambda: page_bytes_for((1 << 31) + 1), "an image of 2147483649 bytes", "make it smaller")


def test_this_is_the_form_of_a_files_values() -> None:
    """The prediction of space rests on it."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, get_metadata_type

    assert ALLOC_TABLE_TYPE.itemsize == beton_file.TABLE_BYTES == 3 * ctypes.sizeof(ctypes.c_uint64)
    assert get_metadata_type([RGBImageField(), IntField()]).itemsize <= beton_file.SAMPLE_BYTES


def test_a_truncated_file_is_refused(arrays: Written, jpeg: Written, tmp_path: Path) -> None:
    for written in (arrays, jpeg):
        content = written.path.read_bytes()
        table = int.from_bytes(content[16:24], "little")
        for length in (30, 1500, 2200, 5000, table - 1, table, table + 5, len(content) - 24, len(content) - 1):
            path = tmp_path / "cut.beton"
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match=r"cut\.beton: .*(truncated|damaged).*write it again"):
                read_index(path)


def test_no_single_damaged_byte_of_the_description_crashes(jpeg: Written, tmp_path: Path) -> None:
    """Whatever a byte says, the file is read or refused: no traceback, no access outside of it."""
    content = jpeg.path.read_bytes()
    rng = np.random.default_rng(9)
    end = 24 + 2 * 1048 + 19 * 32
    table = int.from_bytes(content[16:24], "little")
    places = [*range(24), *rng.integers(24, end, 40), *rng.integers(24 + 2 * 1048, end, 40), *range(table, table + 48)]
    refused = 0
    path = tmp_path / "flipped.beton"
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            take(feed_of(Written(path, [], jpeg.labels), crop="center", image_size=5, num_workers=1))
        except UserError:
            refused += 1
    assert 50 < refused < len(places)


def test_other_files_are_refused(arrays: Written, tmp_path: Path) -> None:
    content = arrays.path.read_bytes()
    path = tmp_path / "x.beton"
    for bad, message in [
        (b"", "0 bytes are no .beton file"),
        (b"\x02\x00\x02\x00" + b"not a beton file, but long enough for a header", "not a .beton file"),
        (b"\x03" + content[1:], "not a .beton file"),
        (content[:8] + bytes(8) + content[16:], "holds no images"),
        (content[:16] + bytes(8) + content[24:], "writing was interrupted"),
        (content[:24] + b"\xff" + content[25:], "field 'pixels' is of a type that FFCV does not have"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"x.beton: .*{message}"):
            read_index(path)
    with pytest.raises(UserError, match=r"gone\.beton: no such file"):
        read_index(tmp_path / "gone.beton")
    with pytest.raises(UserError, match="cannot be read"):
        read_index(tmp_path)


def test_fields_are_found_or_refused(folder: Path) -> None:
    from ffcv.fields import FloatField, IntField, NDArrayField

    images = list(np.random.default_rng(4).integers(0, 256, (4, 3, 5, 2), dtype=np.uint8))
    pixels, floats = NDArrayField(np.dtype(np.uint8), (3, 5, 2)), NDArrayField(np.dtype(np.float32), (3, 5, 2))
    flat = NDArrayField(np.dtype(np.uint8), (30,))

    named = write(folder / "named.beton", images, {"x": pixels, "weight": IntField(), "label": IntField()})
    assert read_index(named.path).label_field == "label" and read_index(named.path).image_field == "x"
    extra = write(folder / "extra.beton", images, {"x": pixels, "y": IntField(), "weight": FloatField()})
    assert np.array_equal(torch.cat([y for _, y in take(feed_of(extra, shuffle=False))]).numpy(), extra.labels)
    for name, fields, message in [
        ("two", {"x": pixels, "a": IntField(), "b": IntField()}, "2 fields could be the labels"),
        ("none", {"x": pixels, "a": FloatField()}, "0 fields could be the labels, expected one IntField"),
        (
            "flat",
            {"x": flat, "a": IntField()},
            "0 fields could be the images.*the file has x: NDArrayField, a: IntField",
        ),
    ]:
        with pytest.raises(UserError, match=f"{name}.beton: {message}"):
            read_index(write(folder / f"{name}.beton", images, fields).path)
    wide = write(folder / "float.beton", [i.astype(np.float32) for i in images], {"x": floats, "a": IntField()})
    with pytest.raises(UserError, match="0 fields could be the images"):
        read_index(wide.path)


def test_a_jpeg_that_claims_very_many_pixels_is_refused(tmp_path: Path) -> None:
    beton_file.write_images(tmp_path / "a.beton", [Stored(b"jpeg", 60_000, 60_000)], np.array([0]), lambda: None)
    refused(lambda: read_index(tmp_path / "a.beton"), "a.beton: image 0 has more than 134,217,728 pixels")


def test_writing_takes_no_memory_that_processes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's /dev/shm may be too small for a large data set's labels, which ends a process by SIGBUS."""

    def no_room(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device: /dev/shm")

    import ffcv.memory_allocator
    import ffcv.writer

    monkeypatch.setattr(ffcv.writer.shared_memory, "SharedMemory", no_room)
    monkeypatch.setattr(ffcv.memory_allocator, "Value", no_room)
    write_beton(tmp_path / "a.beton", cycled(7))
    assert beton_file.read_index(tmp_path / "a.beton").labels_N.tolist() == cycled(7).tolist()
    assert ffcv.memory_allocator.Value is no_room  # FFCV's own writer has its own again
