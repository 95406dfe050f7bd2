"""What is written is what is read back, once, whole or not at all; every mistake is named in one line."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ensdistill.data import beton_file, image_files, pixel_stats
from ensdistill.data import prepare as beton
from ensdistill.data.beton_file import page_bytes_for, read_index, write_arrays
from ensdistill.data.dataset import DATASET_FILE, DataSet, load_dataset
from ensdistill.data.ffcv_guards import import_ffcv, kept_thread_counts
from ensdistill.data.pixel_stats import KNOWN_STATS, read_beton_images
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.arrays import FASHION_MNIST_FOLDER
from ensdistill.data.sources.base import BetonRows, Content, Source, Split
from ensdistill.data.sources.registry import open_source, recognise
from ensdistill.runtime.errors import UserError

COUNTS = {"train": 23, "valid": 4, "test": 9}
SPLITS = tuple(COUNTS)


@pytest.fixture(scope="session", autouse=True)
def ffcv() -> None:
    import_ffcv()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread, shared memory or temporary file survives, whether a test's writing succeeds or fails."""
    import ffcv.writer

    shared: list[str] = []

    def spy(*args: Any, **kwargs: Any) -> SharedMemory:
        memory = SharedMemory(*args, **kwargs)
        shared.append(memory.name)
        return memory

    monkeypatch.setattr(ffcv.writer.shared_memory, "SharedMemory", spy)
    yield
    assert multiprocessing.active_children() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")] == []
    assert [name for name in shared if Path("/dev/shm", name).exists()] == []
    assert [path for path in tmp_path.rglob("*.tmp")] == []


def refused(act: Callable[[], object], *parts: str) -> None:
    """`act` raises a UserError of one line with all the parts."""
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def array_source(
    shape: tuple[int, int, int] = (5, 7, 3), *, seed: int = 0, name: str = "npy", fingerprint: str = "1"
) -> Source:
    rng = np.random.default_rng(seed)
    splits = {
        split: Split(
            images=rng.integers(0, 256, (num, *shape), dtype=np.uint8), labels=rng.integers(0, 3, num), origin="here"
        )
        for split, num in COUNTS.items()
    }
    return Source(
        name=name,
        fingerprint=fingerprint,
        read=lambda: Content(class_names=("a", "b", "c"), splits=splits, note="a note"),
    )


def read_back(dataset: DataSet, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    stored = dataset.splits[split]
    rows = stored.indices if stored.indices is not None else range(stored.num_images)
    return list(read_beton_images(stored.path, rows)), read_index(stored.path).labels_N[list(rows)]


# ----------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (33, 31, 3)])
def test_arrays_come_back(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    source = array_source(shape)
    dataset = prepare(source, tmp_path / "new" / "folder")
    assert dataset.image_shape == shape
    assert dataset.num_classes == 3 and dataset.class_names == ("a", "b", "c")
    assert dataset.num_channels == shape[2]
    assert (dataset.image_field, dataset.label_field) == ("image", "label")
    assert dataset.note == "a note"
    assert dataset.counts == COUNTS and dataset.indices == dict.fromkeys(SPLITS)
    assert dataset.paths == {name: tmp_path / "new" / "folder" / f"{name}.beton" for name in SPLITS}
    for name in SPLITS:
        images, labels = read_back(dataset, name)
        assert np.array_equal(np.stack(images), source.splits[name].images)  # type: ignore[arg-type]
        assert np.array_equal(labels, source.splits[name].labels)


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


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepare(array_source(), tmp_path / name) for name in ("a", "b"))
    for name in SPLITS:
        assert first.splits[name].checksum == second.splits[name].checksum
        assert first.splits[name].checksum.startswith("sha256:")
    other = prepare(array_source(seed=1), tmp_path / "c")
    assert other.splits["train"].checksum != first.splits["train"].checksum


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    first = prepare(array_source(), tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    source = replace(array_source(), read=lambda: pytest.fail("the source was read again"))
    assert prepare(source, tmp_path) == first == load_dataset(tmp_path, verify=True)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.parametrize("what", ["source changed", "other image size", "file missing", "file cut", "json damaged"])
def test_what_does_not_fit_is_written_again(tmp_path: Path, what: str) -> None:
    shape = (6, 6, 3)
    prepare(array_source(shape), tmp_path)
    source, size = array_source(shape, seed=1), None
    if what == "source changed":
        source = array_source(shape, seed=1, fingerprint="2")
    elif what == "other image size":
        size = 6
    elif what == "file missing":
        (tmp_path / "valid.beton").unlink()
    elif what == "file cut":
        (tmp_path / "valid.beton").write_bytes(b"cut")
    else:
        (tmp_path / DATASET_FILE).write_text('{"format": 1}')
    dataset = prepare(source, tmp_path, image_size=size)
    assert np.array_equal(np.stack(read_back(dataset, "valid")[0]), source.splits["valid"].images)  # type: ignore[arg-type]


def test_progress_counts_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton, "PROGRESS_EVERY", 10)
    seen: list[tuple[int, int]] = []
    prepare(array_source(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 36), (20, 36), (30, 36), (36, 36)]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prepare(open_source("digits"), tmp_path).counts == {"train": 400, "valid": 397, "test": 1000}
    assert capfd.readouterr() == ("", "")


def test_ffcv_is_imported_late() -> None:
    script = (
        "import sys, ensdistill.data.prepare, ensdistill.data.sources.registry; "
        "print('ffcv' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.is_dir(), reason=f"needs Debian's dataset-fashion-mnist in {FASHION_MNIST_FOLDER}"
)
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    source = open_source("fashion-mnist")
    dataset = prepare(source, tmp_path)
    assert dataset.counts == {"train": 55_000, "valid": 5_000, "test": 10_000}
    assert dataset.pixel_mean == pytest.approx((0.286,), abs=1e-3) and dataset.pixel_std == pytest.approx(
        (0.353,), abs=1e-3
    )
    rows = [0, 777, 9_999]
    images = source.splits["test"].images
    assert isinstance(images, np.ndarray)
    assert np.array_equal(np.stack(list(read_beton_images(tmp_path / "test.beton", rows))), images[rows])


# ------------------------------------------------------------------------------------------------------ dataset.json


def test_a_prepared_folder_can_be_moved(tmp_path: Path) -> None:
    dataset = prepare(array_source(), tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = load_dataset(tmp_path / "after", verify=True)
    assert moved.paths["test"] == tmp_path / "after" / "test.beton"
    assert replace(moved, splits={}) == replace(dataset, splits={})


def test_dataset_mistakes(tmp_path: Path) -> None:
    refused(lambda: load_dataset(tmp_path), str(tmp_path / DATASET_FILE), "missing", "prepare it first")
    prepare(array_source(), tmp_path)
    file, valid = tmp_path / DATASET_FILE, tmp_path / "valid.beton"
    fields = json.loads(file.read_text())
    for damaged in (
        "",
        "[]",
        "{}",
        '{"format": 1}',
        json.dumps({**fields, "extra": 1}),
        json.dumps({**fields, "splits": {}}),
    ):
        file.write_text(damaged)
        refused(lambda: load_dataset(tmp_path), str(file), "damaged", "prepare the data again")
    file.write_text(json.dumps({**fields, "format": 7}))
    refused(lambda: load_dataset(tmp_path), "of format 7; expected 1")
    file.write_text(json.dumps(fields))
    content = bytearray(valid.read_bytes())
    content[-1] ^= 1
    valid.write_bytes(content)
    load_dataset(tmp_path)
    refused(lambda: load_dataset(tmp_path, verify=True), str(valid), "changed since it was prepared")
    valid.write_bytes(content[:-1])
    refused(lambda: load_dataset(tmp_path), str(valid), f"{len(content) - 1} bytes; expected {len(content)}")
    valid.unlink()
    refused(lambda: load_dataset(tmp_path), str(valid), "missing")


# ------------------------------------------------------------------------------------------------------- pixel stats


def test_pixel_stats_of_arrays_are_exact(tmp_path: Path) -> None:
    source = array_source((5, 7, 3))
    dataset = prepare(source, tmp_path)
    values = np.asarray(source.splits["train"].images, np.float64) / 255
    assert dataset.pixel_mean == pytest.approx(values.mean(axis=(0, 1, 2)), rel=1e-12)
    assert dataset.pixel_std == pytest.approx(values.std(axis=(0, 1, 2)), rel=1e-12)


def test_pixel_stats_of_known_data_are_the_published_ones(tmp_path: Path) -> None:
    dataset = prepare(array_source(name="cifar100"), tmp_path)
    assert dataset.pixel_mean == (0.5072, 0.4866, 0.4410) and dataset.pixel_std == (0.2673, 0.2564, 0.2760)
    assert set(KNOWN_STATS) == {"cifar10", "cifar100", "imagenet", "tiny-imagenet"}


def test_images_of_one_value_are_refused(tmp_path: Path) -> None:
    source = array_source()
    images = source.splits["train"].images
    assert isinstance(images, np.ndarray)
    images[..., 1] = 9
    refused(lambda: prepare(source, tmp_path), "here", "channel 1", "one value everywhere")


# --------------------------------------------------------------------------------------- what can go wrong in writing


def test_too_little_space_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    folder = tmp_path / "new"
    refused(lambda: prepare(array_source(), folder), str(folder), "3 MB are free", "choose another folder")
    assert not folder.exists()


def test_prediction_of_space_is_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[int] = []
    predict = beton_file.predict_bytes

    def spy(*args: Any, **kwargs: Any) -> int:
        predicted.append(predict(*args, **kwargs))
        return predicted[-1]

    monkeypatch.setattr(beton, "predict_bytes", spy)
    dataset = prepare(array_source((91, 90, 3)), tmp_path)
    for split, bytes_predicted in zip(dataset.splits.values(), predicted, strict=True):
        assert split.num_bytes <= bytes_predicted <= 3 * split.num_bytes


class FullDisk:
    """A file that takes `room` bytes, then does what a full disk does."""

    def __init__(self, file: Any, room: int, *, silently: bool) -> None:
        self.file, self.room, self.silently = file, room, silently

    def write(self, data: bytes) -> int:
        if len(data) > self.room and not self.silently:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("silently", [False, True])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silently: bool) -> None:
    from ffcv.memory_allocator import MemoryAllocator

    before = prepare(array_source(), tmp_path)
    enter = MemoryAllocator.__enter__

    def enter_full(self: Any) -> None:
        enter(self)
        self.fp = FullDisk(self.fp, 100, silently=silently)

    monkeypatch.setattr(MemoryAllocator, "__enter__", enter_full)
    source = array_source(seed=1, fingerprint="2")
    refused(
        lambda: prepare(source, tmp_path), "bytes were written; free space" if silently else "no space left on the disk"
    )
    monkeypatch.undo()
    assert load_dataset(tmp_path, verify=True) == before  # what was there is still whole


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    refused(lambda: prepare(array_source(), tmp_path / "file"), str(tmp_path / "file"), "cannot be written")


def test_an_image_no_page_holds() -> None:
    assert page_bytes_for(1) == page_bytes_for(1 << 21) == 1 << 21
    assert page_bytes_for((1 << 21) + 1) == 1 << 22
    refused(lambda: page_bytes_for((1 << 31) + 1), "an image of 2147483649 bytes", "make it smaller")


def test_image_size_of_arrays_must_be_theirs(tmp_path: Path) -> None:
    refused(
        lambda: prepare(array_source((5, 7, 3)), tmp_path, image_size=5), "here", "5x7 pixels", "image size 5 was asked"
    )
    assert prepare(array_source((6, 6, 3)), tmp_path, image_size=6).image_shape == (6, 6, 3)


# ------------------------------------------------------------------------------------------------------ image files


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth picture, which JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_class_folders(folder: Path, sizes: list[tuple[int, int]], suffix: str) -> None:
    """Two classes with one image of each size, and a small training set's worth of splits."""
    for split in ("train", "valid", "test"):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i, (height, width) in enumerate(sizes):
                picture(height, width, 10 * i + label).save(folder / split / name / f"{i}{suffix}")


def distance(image: np.ndarray, other: Image.Image) -> float:
    return float(np.abs(image.astype(float) - np.asarray(other.convert("RGB"), float)).mean())


def test_small_images_of_one_size_are_kept_exactly(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(12, 12)] * 3, ".png")
    for size in (None, 12):
        dataset = prepare(open_source("folder", tmp_path / "in"), tmp_path / f"out{size}", image_size=size)
        assert dataset.image_shape == (12, 12, 3) and dataset.num_channels == 3
        images, labels = read_back(dataset, "valid")
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        for i, image in enumerate(images):
            assert np.array_equal(image, np.asarray(picture(12, 12, 10 * (i % 3) + i // 3)))
    assert prepare(open_source("folder", tmp_path / "in"), tmp_path / "other", image_size=32).image_shape is None


@pytest.mark.parametrize("num_workers", [1, 3])
def test_large_images_become_jpegs_of_limited_size(tmp_path: Path, num_workers: int) -> None:
    sizes = [(40, 50), (61, 33), (200, 103)]
    write_class_folders(tmp_path / "in", sizes, ".png")
    source = open_source("folder", tmp_path / "in")
    dataset = prepare(source, tmp_path / "out", image_size=35, num_workers=num_workers)  # shorter side at most 40
    assert dataset.image_shape is None
    index = read_index(dataset.paths["train"])
    assert index.is_jpeg_N.all()
    expected = [(40, 50), (61, 33), (78, 40)]
    assert list(zip(index.heights_N.tolist(), index.widths_N.tolist(), strict=True)) == expected * 2
    images, labels = read_back(dataset, "train")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i, image in enumerate(images):
        height, width = expected[i % 3]
        original = picture(*sizes[i % 3], 10 * (i % 3) + i // 3)
        assert image.shape == (height, width, 3)
        assert distance(image, original.resize((width, height), Image.Resampling.BICUBIC)) < 2


def test_workers_change_nothing(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(40, 50), (61, 33), (200, 103)], ".png")
    source = open_source("folder", tmp_path / "in")
    one, three = (prepare(source, tmp_path / str(n), image_size=35, num_workers=n) for n in (1, 3))
    assert [split.checksum for split in one.splits.values()] == [split.checksum for split in three.splits.values()]


def test_ffcv_decodes_the_jpegs(tmp_path: Path) -> None:
    """Kept bytes, RGB and grey, and encoded ones give FFCV's decoder the pixels that PIL gives."""
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader

    write_class_folders(tmp_path / "in", [(100, 97)], ".jpg")
    picture(98, 99, 5).convert("L").save(tmp_path / "in" / "train" / "cat" / "1.jpg")
    picture(101, 120, 6).save(tmp_path / "in" / "train" / "cat" / "2.png")
    dataset = prepare(open_source("folder", tmp_path / "in"), tmp_path / "out")
    reader, index = Reader(str(dataset.paths["train"])), read_index(dataset.paths["train"])
    data = np.fromfile(dataset.paths["train"], np.uint8)
    expected = list(read_beton_images(dataset.paths["train"], range(4)))
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    for i in range(4):
        offset, height, width = reader.metadata["f0"]["data_ptr"][i], int(index.heights_N[i]), int(index.widths_N[i])
        decoded = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        jpeg = data[offset : offset + sizes[offset]].copy()
        imdecode(jpeg, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
        assert distance(decoded, Image.fromarray(expected[i])) < 1
    first = (tmp_path / "in" / "train" / "cat" / "0.jpg").read_bytes()
    assert first in data.tobytes()


def test_which_jpegs_keep_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    upright = picture(60, 90, 1)
    upright.save(file, quality=95)
    jpeg = image_files.read_jpeg(file, max_short_side=60)
    assert jpeg == (file.read_bytes(), 60, 90)
    smaller = image_files.read_jpeg(file, max_short_side=59)
    assert (smaller.height, smaller.width) == (59, 88)
    exif = Image.Exif()
    exif[image_files.ORIENTATION_TAG] = 6  # the camera lay on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(file, quality=95, exif=exif)
    assert image_files.image_size(file) == (60, 90)
    turned = image_files.read_jpeg(file, max_short_side=60)
    assert (turned.height, turned.width) == (60, 90) and turned.data != file.read_bytes()
    decoded = decode(turned)
    assert decoded.getexif().get(image_files.ORIENTATION_TAG) is None
    assert distance(np.asarray(decoded), upright) < 2
    assert distance(image_files.read_rgb(file), upright) < 2
    upright.convert("CMYK").save(file)
    assert distance(np.asarray(decode(image_files.read_jpeg(file, max_short_side=60))), upright) < 4
    upright.convert("P").save(tmp_path / "p.png")
    upright.convert("RGBA").save(tmp_path / "rgba.png")
    for name in ("p.png", "rgba.png"):
        assert decode(image_files.read_jpeg(tmp_path / name, max_short_side=60)).mode == "RGB"


def decode(jpeg: image_files.Jpeg) -> Image.Image:
    import io

    image = Image.open(io.BytesIO(jpeg.data))
    assert (image.height, image.width) == (jpeg.height, jpeg.width)
    return image


def test_a_jpeg_larger_than_a_page_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    picture(60, 90, 1).save(file, quality=100)
    monkeypatch.setattr(image_files, "MAX_JPEG_BYTES", file.stat().st_size - 1)
    assert len(image_files.read_jpeg(file, max_short_side=60).data) < file.stat().st_size


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("size", [(150, 140), (20, 20)])
def test_a_damaged_image_is_named(tmp_path: Path, size: tuple[int, int], num_workers: int) -> None:
    write_class_folders(tmp_path / "in", [size] * 40, ".png")
    damaged = tmp_path / "in" / "test" / "dog" / "37.png"
    whole = damaged.read_bytes()
    source = open_source("folder", tmp_path / "in")
    for content in (whole[: len(whole) * 2 // 3], whole[:20], b"", b"text"):
        damaged.write_bytes(content)
        refused(
            lambda: prepare(source, tmp_path / "out", num_workers=num_workers),
            str(damaged),
            "cannot be read",
            "replace or remove it",
        )
    assert not (tmp_path / "out" / DATASET_FILE).exists() and not (tmp_path / "out" / "test.beton").exists()


def test_a_truncated_jpeg_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    picture(60, 90, 1).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    refused(lambda: image_files.read_jpeg(file, max_short_side=60), str(file), "cannot be read", "truncated")


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 20), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for read in (image_files.read_rgb, image_files.image_size):
        refused(lambda read=read: read(tmp_path / "deep.png"), "deep.png", "more than 8 bits", "convert it")  # type: ignore[misc]


def test_an_image_of_another_size_than_all_are_said_to_have(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(20, 20), (20, 21)], ".png")
    source = open_source("folder", tmp_path / "in")
    content = replace(source.content, image_shape=(20, 20, 3))
    known = Source(name="tiny-imagenet", fingerprint="1", read=lambda: content)
    refused(lambda: prepare(known, tmp_path / "out"), "1.png", "20x21 pixels; expected 20x20")
    refused(lambda: prepare(known, tmp_path / "out", image_size=32), "20x20 pixels, image size 32")


def test_pixel_stats_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "in", [(20, 20)] * 4, ".png")
    source = open_source("folder", tmp_path / "in")
    values = np.stack([np.asarray(picture(20, 20, 10 * i + label), float) / 255 for label in (0, 1) for i in range(4)])
    mean, std = pixel_stats.pixel_stats("folder", source.splits["train"], 2)
    assert mean == pytest.approx(values.mean(axis=(0, 1, 2))) and std == pytest.approx(values.std(axis=(0, 1, 2)))
    monkeypatch.setattr(pixel_stats, "MAX_MEASURED", 3)  # the first, a middle one and the last
    mean, _ = pixel_stats.pixel_stats("folder", source.splits["train"], 2)
    assert mean == pytest.approx(values[[0, 3, 7]].mean(axis=(0, 1, 2)))


def test_pixel_stats_of_rows_of_a_file(tmp_path: Path) -> None:
    images = write_beton(tmp_path / "a.beton", mixed(20))
    rows = BetonRows(path=tmp_path / "a.beton", indices=range(3, 20, 2))
    mean, _ = pixel_stats.pixel_stats("beton", Split(images=rows, labels=mixed(20)[3::2], origin="a"), 1)
    assert mean == pytest.approx(images[3::2].mean(axis=(0, 1, 2)) / 255)


def test_a_failing_consumer_ends_the_threads() -> None:
    results = image_files.parallel_map(lambda i: i * i, range(1000), 3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- existing files


def write_beton(
    path: Path, labels: np.ndarray, *, shape: tuple[int, int, int] = (5, 7, 3), seed: int = 0
) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    write_arrays(path, images, labels, shape, lambda: None)
    return images


def write_rgb_beton(path: Path, images: list[np.ndarray], names: tuple[str, str] = ("pixels", "class")) -> None:
    """As people have them: FFCV's own writer, other names of fields, raw and compressed images mixed."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    fields = {names[0]: RGBImageField(write_mode="proportion"), names[1]: IntField()}
    writer = DatasetWriter(str(path), fields, page_size=1 << 21)
    writer.num_samples = len(images)
    writer.prepare()
    metadata = np.zeros(len(images), writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, 1 << 21)
    with allocator:
        for i, image in enumerate(images):
            handle_sample((image, i % 2), i, metadata.dtype.names, metadata, allocator, fields)
    writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
    writer.finalize(allocator.allocations)
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()


def mixed(num: int, classes: int = 3) -> np.ndarray:
    return np.arange(num) % classes


@pytest.mark.parametrize("suffix", [".beton", ".ffcv"])
def test_three_files_are_used_in_place(tmp_path: Path, suffix: str) -> None:
    given = tmp_path / "given"
    images = {
        split: write_beton(given / f"my_{word}_8x8{suffix}", mixed(COUNTS[split]), seed=i)
        for i, (split, word) in enumerate({"train": "train", "valid": "val", "test": "test"}.items())
    }
    assert recognise(given) == "beton"
    source = open_source("beton", given)
    dataset = prepare(source, tmp_path / "out", image_size=None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [DATASET_FILE]
    assert dataset.paths == {
        s: given / f"my_{w}_8x8{suffix}" for s, w in zip(SPLITS, ("train", "val", "test"), strict=True)
    }
    assert dataset.counts == COUNTS and dataset.indices == dict.fromkeys(SPLITS) and dataset.note == ""
    assert dataset.image_shape == (5, 7, 3) and dataset.num_classes == 3
    values = images["train"] / 255
    assert dataset.pixel_mean == pytest.approx(values.mean(axis=(0, 1, 2)))
    assert dataset.pixel_std == pytest.approx(values.std(axis=(0, 1, 2)))
    assert (
        prepare(open_source("beton", given), tmp_path / "out") == dataset == load_dataset(tmp_path / "out", verify=True)
    )
    os.utime(dataset.paths["test"])
    refused(lambda: load_dataset(tmp_path / "out", verify=True), str(dataset.paths["test"]), "changed")
    assert prepare(open_source("beton", given), tmp_path / "out") != dataset


def test_one_file_is_split_by_rows(tmp_path: Path) -> None:
    file = tmp_path / "lone.beton"
    images = write_beton(file, mixed(63))
    assert recognise(file) == recognise(tmp_path) == "beton"
    for path in (file, tmp_path):
        dataset = prepare(open_source("beton", path), tmp_path / "out")
        assert dataset.indices == {"train": range(51), "valid": range(51, 57), "test": range(57, 63)}
        assert dataset.counts == {"train": 51, "valid": 6, "test": 6}
        assert set(dataset.paths.values()) == {file}
        assert "last two times 6 rows of lone.beton" in dataset.note
        read, labels = read_back(dataset, "valid")
        assert np.array_equal(read, images[51:57]) and labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert load_dataset(tmp_path / "out") == dataset
    assert dataset.pixel_mean == pytest.approx((images[:51] / 255).mean(axis=(0, 1, 2)))


@pytest.mark.parametrize("word", ["val", "test"])
def test_two_files(tmp_path: Path, word: str) -> None:
    write_beton(tmp_path / "train.beton", mixed(43))
    write_beton(tmp_path / f"{word}.beton", mixed(9), seed=1)
    dataset = prepare(open_source("beton", tmp_path), tmp_path / "out")
    assert dataset.indices == {"train": range(39), "valid": range(39, 43), "test": None}
    assert dataset.paths["test"] == tmp_path / f"{word}.beton" and dataset.counts["test"] == 9
    assert f"test is {word}.beton" in dataset.note
    write_beton(tmp_path / "train.beton", np.sort(mixed(43)))  # by class: the last tenth is one class
    dataset = prepare(open_source("beton", tmp_path), tmp_path / "out")
    assert dataset.indices == {"train": None, "valid": range(0, 9, 2), "test": range(1, 9, 2)}
    assert dataset.counts == {"train": 43, "valid": 5, "test": 4}
    assert "even and the odd rows" in dataset.note
    assert read_back(dataset, "test")[1].tolist() == [1, 0, 2, 1]
    assert load_dataset(tmp_path / "out") == dataset


def test_rgb_files_of_ffcvs_own_writer(tmp_path: Path) -> None:
    small = [np.asarray(picture(12, 12, i)) for i in range(40)]
    write_rgb_beton(tmp_path / "small.beton", small)
    index = read_index(tmp_path / "small.beton")
    assert 0 < index.is_jpeg_N.sum() < 40
    dataset = prepare(open_source("beton", tmp_path / "small.beton"), tmp_path / "a")
    assert dataset.image_shape == (12, 12, 3)
    assert (dataset.image_field, dataset.label_field) == ("pixels", "class")
    assert dataset.pixel_mean == pytest.approx(np.mean(small[:32], axis=(0, 1, 2)) / 255, abs=0.005)
    assert prepare(open_source("beton", tmp_path / "small.beton"), tmp_path / "b", image_size=8).image_shape is None
    write_rgb_beton(tmp_path / "large.beton", [np.asarray(picture(100, 97 + i % 3, i)) for i in range(40)])
    assert prepare(open_source("beton", tmp_path / "large.beton"), tmp_path / "c").image_shape is None


def test_damaged_jpegs_in_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    jpegs = [image_files.Jpeg(b"no jpeg", 12, 12)] * 20
    beton_file.write_jpegs(path, jpegs, mixed(20, 2), lambda: None)
    refused(lambda: prepare(open_source("beton", path), tmp_path / "out"), str(path), "image 0 is damaged")


def test_beton_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("beton"), "no file was given", "train.beton", "--data")
    refused(lambda: open_source("beton", tmp_path), "no .beton file of training images", "train.beton")
    given, out = tmp_path / "given", tmp_path / "out"
    train, test = given / "train.beton", given / "test.beton"

    def broken(*parts: str, image_size: int | None = None) -> None:
        refused(lambda: prepare(open_source("beton", given), out, image_size=image_size), *parts)

    write_beton(train, mixed(63) + 1)
    broken(str(train), "labels reach 3 but no training image has label 0")
    write_beton(train, mixed(63) - 1)
    broken(str(train), "label -1 is negative")
    write_beton(train, np.sort(mixed(63)))
    broken(str(train), "sorted by class", "valid.beton and test.beton")
    write_beton(train, mixed(6))
    broken(str(train), "sorted by class, or too few")
    write_beton(train, mixed(63))
    broken("5x7 pixels, image size 5 was asked for", image_size=5)
    write_beton(test, mixed(9), shape=(5, 6, 3))
    broken("(5, 7, 3)", "the same in every file")
    write_beton(test, mixed(9), shape=(5, 7, 1))
    broken(str(test), "1-channel images in 'image' (an array)", "expected 3-channel", "train.beton")
    write_beton(test, mixed(9))
    whole = test.read_bytes()
    for damaged in (whole[:-11], whole[:3000], whole[:10], b"", bytes(5000)):
        test.write_bytes(damaged)
        broken(str(test))
    write_beton(test, mixed(9) - 1)
    broken(str(test), "label -1 of test image 0 is out of range")
    write_beton(given / "my_test.beton", mixed(9))
    refused(lambda: open_source("beton", given), "both my_test.beton and test.beton are test", "expected one")


def test_files_with_other_channels_are_refused(tmp_path: Path) -> None:
    write_beton(tmp_path / "a.beton", mixed(63), shape=(3, 5, 7))
    refused(lambda: prepare(open_source("beton", tmp_path / "a.beton"), tmp_path / "out"), "(3, 5, 7)", "C 1 or 3")


def test_this_is_the_form_of_a_files_values() -> None:
    """The prediction of space rests on it."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, get_metadata_type

    assert ALLOC_TABLE_TYPE.itemsize == beton_file.TABLE_BYTES == 3 * ctypes.sizeof(ctypes.c_uint64)
    assert get_metadata_type([RGBImageField(), IntField()]).itemsize <= beton_file.SAMPLE_BYTES
