"""Every source gives the images that were put in, in its documented splits; every mistake is named in one line."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ensdistill.data.sources import arrays, cifar, folders
from ensdistill.data.sources import base as source_types
from ensdistill.data.sources.base import BetonRows, Content, Source, Split, check_classes_present, hold_out
from ensdistill.data.sources.plain_pickle import load_plain_pickle
from ensdistill.data.sources.registry import SOURCES, open_source, recognise
from ensdistill.runtime.errors import UserError

NUM_TRAIN, NUM_VALID, NUM_TEST = 15, 5, 7  # of the small CIFARs and the small Fashion-MNIST; train includes valid


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def refused(act: Callable[[], object], *parts: str) -> None:
    """`act` raises a UserError of one line with all the parts."""
    with pytest.raises(UserError) as error:
        act()
    message = one_line(error)
    for part in parts:
        assert part in message, message


def content_of(name: str, path: Path | None = None) -> Content:
    return open_source(name, path).content


def pixels(split: Split) -> np.ndarray:
    assert isinstance(split.images, np.ndarray)
    return split.images


def files(split: Split) -> tuple[Path, ...]:
    assert isinstance(split.images, tuple)
    return split.images


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns_in_file_order() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    content = content_of("digits")
    assert {name: len(split.labels) for name, split in content.splits.items()} == {
        "train": 400,
        "valid": 397,
        "test": 1000,
    }
    images = np.concatenate([pixels(content.splits[name]) for name in ("train", "valid", "test")])
    labels = np.concatenate([content.splits[name].labels for name in ("train", "valid", "test")])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(np.rint(images[..., 0] * (16 / 255)), digits.images)
    assert images.max() == 255
    assert np.array_equal(labels, digits.target)
    assert content.class_names == tuple("0123456789")


def test_digits_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: open_source("digits", tmp_path), "come with scikit-learn", "leave --data out")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused(lambda: open_source("digits"), "scikit-learn is missing", "pip install scikit-learn")


# ---------------------------------------------------------------------------------------------------- Fashion-MNIST


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[np.ndarray]]:
    monkeypatch.setattr(arrays, "FASHION_MNIST_TRAIN", NUM_TRAIN - NUM_VALID)
    monkeypatch.setattr(arrays, "FASHION_MNIST_VALID", NUM_VALID)
    monkeypatch.setattr(arrays, "FASHION_MNIST_TEST", NUM_TEST)
    rng = np.random.default_rng(0)
    written = []
    for name, shape in zip(
        arrays.IDX_FILES, [(NUM_TRAIN, 5, 7), (NUM_TRAIN,), (NUM_TEST, 5, 7), (NUM_TEST,)], strict=True
    ):
        written.append(rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(written[-1])))
    return tmp_path, written


def test_fashion_mnist_reads_idx_files(fashion: tuple[Path, list[np.ndarray]]) -> None:
    folder, (images, labels, test_images, test_labels) = fashion
    plain = folder / arrays.IDX_FILES[3]  # files that were unpacked are read too
    plain.write_bytes(gzip.decompress((folder / f"{plain.name}.gz").read_bytes()))
    (folder / f"{plain.name}.gz").unlink()
    assert recognise(folder) == "fashion-mnist"
    splits = content_of("fashion-mnist", folder).splits
    assert np.array_equal(pixels(splits["train"])[..., 0], images[:-NUM_VALID])
    assert np.array_equal(pixels(splits["valid"])[..., 0], images[-NUM_VALID:])
    assert np.array_equal(pixels(splits["test"])[..., 0], test_images)
    assert np.array_equal(splits["valid"].labels, labels[-NUM_VALID:])
    assert np.array_equal(splits["test"].labels, test_labels)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), ("damaged or truncated", "download it again")),
        (lambda file: file.write_bytes(file.read_bytes()[:7]), ("damaged or truncated",)),
        (lambda file: file.write_bytes(b"not gzip at all"), ("damaged or truncated",)),
        (lambda file: file.write_bytes(gzip.compress(b"\0\0\x0d\x03")), ("not an idx file of bytes",)),
        (lambda file: file.write_bytes(gzip.compress(b"\0")), ("not an idx file of bytes",)),
        (
            lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones((15, 5, 7), np.uint8))[:-1])),
            ("expected 525",),
        ),
        (lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones((14, 5, 7), np.uint8)))), ("(14, 5, 7)", "15")),
        (lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones(15, np.uint8)))), ("(15,)", "3 axes")),
        (lambda file: file.unlink(), ("Fashion-MNIST is missing", "dataset-fashion-mnist", "--data")),
    ],
)
def test_fashion_mnist_mistakes(
    fashion: tuple[Path, list[np.ndarray]], damage: Callable[[Path], object], parts: tuple[str, ...]
) -> None:
    folder, _ = fashion
    damage(folder / f"{arrays.IDX_FILES[0]}.gz")
    refused(lambda: content_of("fashion-mnist", folder), "train-images-idx3-ubyte", *parts)


def test_labels_out_of_range_are_named(fashion: tuple[Path, list[np.ndarray]]) -> None:
    folder, (_, labels, _, _) = fashion
    labels[4] = 10
    (folder / f"{arrays.IDX_FILES[1]}.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    refused(lambda: content_of("fashion-mnist", folder), "label 10 of train image 4 is out of range", "0 to 9")


@pytest.mark.skipif(
    not arrays.FASHION_MNIST_FOLDER.is_dir(),
    reason=f"needs Debian's dataset-fashion-mnist in {arrays.FASHION_MNIST_FOLDER}",
)
def test_fashion_mnist_of_debian() -> None:
    content = content_of("fashion-mnist")
    shapes = {name: pixels(split).shape for name, split in content.splits.items()}
    assert shapes == {"train": (55_000, 28, 28, 1), "valid": (5_000, 28, 28, 1), "test": (10_000, 28, 28, 1)}
    labels = np.concatenate([content.splits[name].labels for name in ("train", "valid")])
    assert (np.bincount(labels) == 6_000).all() and (np.bincount(content.splits["test"].labels) == 1_000).all()
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert pixels(content.splits["train"]).mean() / 255 == pytest.approx(0.286, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ CIFAR


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


@pytest.fixture(params=["cifar10", "cifar100"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SmallCifar:
    small = SmallCifar(request.param)
    monkeypatch.setitem(cifar.LAYOUTS, request.param, small.layout)
    small.name = request.param  # type: ignore[attr-defined]
    return small


@pytest.mark.parametrize("place", ["archive", "folder of the archive", "extracted", "folder of extracted", "renamed"])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_in_every_form(small: SmallCifar, kind: str, place: str, tmp_path: Path) -> None:
    form: cifar.Form = getattr(small.layout, kind)
    contents = small.write(form)
    if place == "extracted" or place == "folder of extracted":
        unpack(tmp_path / form.folder, contents)
        path = tmp_path / form.folder if place == "extracted" else tmp_path
    else:
        file = "my-copy.tgz" if place == "renamed" else form.archive
        pack(tmp_path / file, form.folder, contents)
        path = tmp_path if place == "folder of the archive" else tmp_path / file
    name = small.name  # type: ignore[attr-defined]
    assert recognise(path) == name
    content = content_of(name, path)
    assert content.class_names == tuple(small.names)
    cuts = [NUM_TRAIN - NUM_VALID, NUM_TRAIN]
    for split, images, labels in zip(
        ("train", "valid", "test"), np.split(small.images, cuts), np.split(small.labels, cuts), strict=True
    ):
        assert np.array_equal(pixels(content.splits[split]), images)
        assert np.array_equal(content.splits[split].labels, labels)
        assert content.splits[split].labels.dtype == np.int64


def test_cifar_mistakes(small: SmallCifar, tmp_path: Path) -> None:
    layout, name = small.layout, small.name  # type: ignore[attr-defined]
    form = layout.binary
    md5 = form.md5
    refused(
        lambda: open_source(name),
        f"{layout.title} is missing: no folder was given",
        form.archive,
        md5,
        "Toronto",
        "--data",
    )
    refused(lambda: open_source(name, tmp_path), str(tmp_path), layout.python.archive, md5)
    contents = small.write(form)
    archive = tmp_path / form.archive
    pack(archive, form.folder, contents)
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-5], b"", b"neither gzip nor tar"):
        archive.write_bytes(damaged)
        refused(lambda: content_of(name, archive), str(archive), "damaged or truncated", md5)

    def broken(expected: tuple[str, ...], **changes: bytes | None) -> None:
        changed = {**contents, **{key: value for key, value in changes.items() if value is not None}}
        pack(archive, form.folder, {key: value for key, value in changed.items() if changes.get(key, b"") is not None})
        refused(lambda: content_of(name, archive), str(archive), *expected)

    first, record = form.train[0], layout.label_bytes + 3072
    broken((first, f"multiple of {record}", "truncated"), **{first: contents[first][:-1]})
    broken((first, "truncated"), **{first: b""})
    broken((first, f"expected {NUM_TRAIN}"), **{first: contents[first][:-record]})
    broken((form.test, f"expected {NUM_TEST}"), **{form.test: contents[form.test] + contents[form.test]})
    broken((form.test, "missing"), **{form.test: None})
    broken((form.names, f"3 class names; expected {layout.num_classes}"), **{form.names: b"a\nb\nc\n"})
    other = bytearray(contents[first])
    other[layout.label_bytes - 1] = layout.num_classes
    broken((f"label {layout.num_classes} of train image 0 is out of range",), **{first: bytes(other)})


def test_one_cifar_is_not_the_other(tmp_path: Path) -> None:
    small = SmallCifar("cifar100")
    form = small.layout.binary
    pack(tmp_path / form.archive, form.folder, small.write(form))
    refused(lambda: open_source("cifar10", tmp_path / form.archive), "CIFAR-10 is missing", "cifar-10-binary.tar.gz")


def test_cifar_pickles_of_another_form(small: SmallCifar, tmp_path: Path) -> None:
    layout, form, name = small.layout, small.layout.python, small.name  # type: ignore[attr-defined]
    contents = small.write(form)
    first = form.train[0]
    flat = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)

    def broken(batch: object, *expected: str, file: str = first) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        unpack(folder, {**contents, file: pickle.dumps(batch, protocol=4)})
        refused(lambda: content_of(name, folder), file, *expected)

    key = layout.label_key
    broken({"data": flat}, f"no entry '{key}'")
    broken([1, 2], "no entry 'data'", "pickled dict")
    broken({"data": [1], key: [1]}, "'data' is list", "(N, 3072)")
    broken({"data": flat[:, 1:], key: [1, 2, 3]}, "(3, 3071)")
    broken({"data": flat, key: [1, 2]}, f"'{key}' is not a list of 3 integers")
    broken({"data": flat, key: [1, 2, "3"]}, f"'{key}' is not a list of 3 integers")
    broken({layout.names_key: "abc"}, "no class names", file=form.names)


# ---------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_data_of_every_protocol(protocol: int) -> None:
    shared = ["shared", 1]
    value = {
        "list": [1, -1, 255, 256, 1 << 40, True, False, None, ()],
        "tuple": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "twice": [shared, shared],
        "text": "ünïcode",
        "empty": {"list": [], "dict": {}},
    }
    assert load_plain_pickle(pickle.dumps(value, protocol=protocol), "here") == value


def test_bytes_and_arrays() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    value = load_plain_pickle(
        pickle.dumps({b"a": array, b"f": np.asfortranarray(array), b"again": array}, protocol=3), "here"
    )
    assert set(value) == {b"a", b"f", b"again"}
    for read in value.values():
        assert read.dtype == np.uint8 and np.array_equal(read, array)


PYTHON2_ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for protocol in range(5):
        data = pickle.dumps({"data": Evil(trap)}, protocol=protocol)
        refused(partial(load_plain_pickle, data, "batch_1"), "batch_1", "it calls", "mkdir", "download")
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists()  # it would have been made


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (pickle.dumps([1.5]), "BINFLOAT"),
        (pickle.dumps({1, 2}), "EMPTY_SET"),
        (pickle.dumps(np.ones(3)), "it holds an array of type f8"),
        (pickle.dumps(np.ones(3, np.uint8), protocol=5), "it calls"),
        (pickle.dumps(np.array(["a", None], dtype=object)), "it holds an array of type O8"),
        (pickle.dumps(bytearray(b"abc"), protocol=4), "it calls"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "something else than numpy's array reconstruction"),
        (b"\x80\x02]K\x01b.", "sets the state of something else"),
        (PYTHON2_ARRAY + b"(K\x01K\x02\x85NNU\x01xtb.", "as numpy writes"),
        (python2_batch(np.ones((1, 3072), np.uint8), [1], b"k").replace(b"M\x00\x0c\x86", b"M\x01\x0c\x86"), "3073"),
        (pickle.dumps({"a": [1, 2]})[:-3], ""),
        (b"", ""),
        (b"garbage", ""),
        (b"\x80\x02e.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02}(K\x01e.", "damaged"),
        (b"\x80\x02}(K\x01u.", ""),
        (b"\x80\x02K\x01K\x02.", ""),
    ],
)  # fmt: skip
def test_other_pickles_are_refused(data: bytes, part: str) -> None:
    refused(lambda: load_plain_pickle(data, "batch_1"), "batch_1", "not a pickle of plain data", part)


# -------------------------------------------------------------------------------------------------------- .npy files


def write_npy(folder: Path, prefix: str, num: int, *, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (num, 5, 7, 3), dtype=np.uint8)
    labels = np.arange(num) % classes
    np.save(folder / f"{prefix}images.npy", images)
    np.save(folder / f"{prefix}labels.npy", labels.astype(np.int32))
    return images, labels


def test_npy_pair_is_split_class_by_class(tmp_path: Path) -> None:
    images, labels = write_npy(tmp_path, "", 63)
    for path in (tmp_path, tmp_path / "images.npy"):
        assert recognise(path) == "npy"
    content = content_of("npy", tmp_path)
    assert content.class_names == ("0", "1", "2")
    assert {name: len(split.labels) for name, split in content.splits.items()} == {"train": 54, "valid": 3, "test": 6}
    assert np.array_equal(pixels(content.splits["test"]), images[57:])
    assert np.array_equal(pixels(content.splits["valid"]), images[54:57])
    assert np.array_equal(pixels(content.splits["train"]), images[:54])
    assert np.array_equal(content.splits["test"].labels, labels[57:])
    assert "test split is the last 6" in content.note and "valid split is the last 3" in content.note


def test_npy_with_splits_of_their_own(tmp_path: Path) -> None:
    train, _ = write_npy(tmp_path, "train_", 30)
    valid, _ = write_npy(tmp_path, "val_", 6, seed=1)
    content = content_of("npy", tmp_path)  # what was set apart is the test split
    assert np.array_equal(pixels(content.splits["test"]), valid)
    assert np.array_equal(pixels(content.splits["valid"]), train[27:])
    assert "the valid images are the test split" in content.note
    test, _ = write_npy(tmp_path, "test_", 9, seed=2)
    content = content_of("npy", tmp_path)
    assert np.array_equal(pixels(content.splits["train"]), train)
    assert np.array_equal(pixels(content.splits["valid"]), valid)
    assert np.array_equal(pixels(content.splits["test"]), test)
    assert content.note == ""


def test_npy_of_grey_images(tmp_path: Path) -> None:
    images, _ = write_npy(tmp_path, "", 30)
    np.save(tmp_path / "images.npy", images[..., 0])
    assert pixels(content_of("npy", tmp_path).splits["train"]).shape == (24, 5, 7, 1)


def test_npy_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("npy"), "no folder was given", "images.npy and labels.npy")
    refused(lambda: open_source("npy", tmp_path), "no pair of .npy files", "train_images.npy")
    images, labels = write_npy(tmp_path, "", 30)
    images_file, labels_file = tmp_path / "images.npy", tmp_path / "labels.npy"

    def broken(images: np.ndarray, labels: np.ndarray, *parts: str) -> None:
        np.save(images_file, images)
        np.save(labels_file, labels)
        refused(lambda: content_of("npy", tmp_path), *parts)

    broken(images.astype(np.float32), labels, str(images_file), "float32", "uint8")
    broken(images.transpose(0, 3, 1, 2), labels, "(30, 3, 5, 7)", "move the channels to the end")
    broken(images[..., :2], labels, "(30, 5, 7, 2)", "C 1 or 3")
    broken(images[0, 0, 0], labels, "(3,)", "(N, H, W)")
    broken(images, labels[:-1], str(labels_file), "29 labels; expected 30")
    broken(images, labels.astype(np.float64), str(labels_file), "float64", "integer labels")
    broken(images, labels[:, None], str(labels_file), "(30, 1)", "(N,)")
    broken(images, labels + 1, "labels reach 3 but no training image has label 0", "without gaps")
    broken(images, labels * 2, "labels reach 4 but no training image has label 1")
    broken(images, labels * 10**12, "no training image has label 1")
    broken(images, labels - 1, "label -1 is negative")
    broken(images, labels * 0, "all labels are 0", "at least two classes")
    broken(images[:0], labels[:0], "no training image")
    broken(images, np.array([1, *[0] * 29]), "class 1 has too few images", "at least 3")
    np.save(labels_file, np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(lambda: content_of("npy", tmp_path), str(labels_file), "cannot be read", "numpy.save")
    np.save(labels_file, labels)
    whole = images_file.read_bytes()
    np.save(images_file, images)
    for damaged in (images_file.read_bytes()[:-5], whole[:20], b"", b"no numpy"):
        images_file.write_bytes(damaged)
        refused(lambda: content_of("npy", tmp_path), str(images_file), "cannot be read")
    with images_file.open("wb") as file:
        np.savez(file, images, labels)
    refused(lambda: content_of("npy", tmp_path), str(images_file), "holds several arrays")
    labels_file.unlink()
    refused(lambda: open_source("npy", tmp_path), str(images_file), "labels are missing", "labels.npy")


def test_npy_splits_must_agree(tmp_path: Path) -> None:
    write_npy(tmp_path, "train_", 30)
    images, _ = write_npy(tmp_path, "test_", 9)
    np.save(tmp_path / "test_images.npy", images[:, :4])
    refused(lambda: content_of("npy", tmp_path), "test_images.npy", "(4, 7, 3)", "(5, 7, 3)")


# ------------------------------------------------------------------------------------------------------ image files


def write_images(folder: Path, num: int, *, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num)
    for i in range(num):
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(folder / f"{i:03d}{suffix}")


def test_class_folders_alone_are_split(tmp_path: Path) -> None:
    for name, num in (("zebra", 21), ("ant", 5), ("mole", 3)):
        write_images(tmp_path / name, num)
    write_images(tmp_path / "ant" / "deeper", 1, suffix=".JPG")
    write_images(tmp_path / ".hidden", 1)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    assert recognise(tmp_path) == "folder"
    content = content_of("folder", tmp_path)
    assert content.class_names == ("ant", "mole", "zebra")
    relative = {name: [str(f.relative_to(tmp_path)) for f in files(split)] for name, split in content.splits.items()}
    assert relative["test"] == ["ant/deeper/000.JPG", "mole/002.png", "zebra/019.png", "zebra/020.png"]
    assert relative["valid"] == ["ant/004.png", "mole/001.png", "zebra/018.png"]
    assert relative["train"] == [
        *(f"ant/{i:03d}.png" for i in range(4)), "mole/000.png", *(f"zebra/{i:03d}.png" for i in range(18)),
    ]  # fmt: skip
    assert content.splits["test"].labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("valid", ["val", "valid"])
def test_folders_of_splits(tmp_path: Path, valid: str) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 4)
        write_images(tmp_path / valid / name, 2)
    assert recognise(tmp_path) == "folder"
    content = content_of("folder", tmp_path)  # without a test folder, what was set apart is the test split
    assert next(f.parts[-3:] for f in files(content.splits["test"])) == (valid, "a", "000.png")
    assert [f.parts[-3:] for f in files(content.splits["valid"])] == [
        ("train", "a", "003.png"),
        ("train", "b", "003.png"),
    ]
    assert len(files(content.splits["train"])) == 6
    write_images(tmp_path / "test" / "b", 3)  # a class that test lacks is no mistake
    content = content_of("folder", tmp_path)
    assert {name: len(split.labels) for name, split in content.splits.items()} == {"train": 8, "valid": 4, "test": 3}
    assert content.splits["test"].labels.tolist() == [1, 1, 1]


def test_folder_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("folder"), "no folder was given", "--data")
    refused(lambda: open_source("imagenet"), "ImageNet's folder with train/ and val/")
    refused(lambda: open_source("folder", tmp_path), str(tmp_path), "0 class folders; expected at least two")
    file = tmp_path / "file.txt"
    file.write_text("text")
    refused(lambda: open_source("folder", file), "no such folder")
    write_images(tmp_path / "val" / "cat", 3)
    refused(lambda: open_source("folder", tmp_path), "valid but no train/")
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 3)
    write_images(tmp_path / "val" / "dogs", 3)
    refused(lambda: open_source("folder", tmp_path), str(tmp_path / "val" / "dogs"), "did you mean 'dog'?")
    (tmp_path / "val" / "dogs").rename(tmp_path / "val" / "dog")
    open_source("folder", tmp_path)
    refused(lambda: open_source("imagenet", tmp_path), "2 class folders; expected ImageNet's 1000")
    (tmp_path / "train" / "empty").mkdir()
    refused(lambda: open_source("folder", tmp_path), str(tmp_path / "train" / "empty"), "no image", ".png")
    (tmp_path / "train" / "empty").rmdir()
    write_images(tmp_path / "train" / "rare", 1)
    refused(lambda: content_of("folder", tmp_path), "class 2 has too few images")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "TINY_IMAGENET_CLASSES", 3)
    monkeypatch.setattr(folders, "TINY_IMAGENET_TRAIN_PER_CLASS", 5)
    monkeypatch.setattr(folders, "TINY_IMAGENET_VALID_PER_CLASS", 2)
    monkeypatch.setattr(folders, "TINY_IMAGENET_TEST", 4)
    folder = tmp_path / "tiny-imagenet-200"
    for wnid in ("n03", "n01", "n02"):
        write_images(folder / "train" / wnid / "images", 5, suffix=".JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    write_images(folder / "val" / "images", 4, suffix=".JPEG")
    lines = [f"{i:03d}.JPEG\t{wnid}\t0\t1\t2\t3\n" for i, wnid in enumerate(["n02", "n01", "n03", "n02"])]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "words.txt").write_text("n01\tgoldfish\nn02\tnewt, eft\nn09\tother\n")
    return folder


def test_tiny_imagenet(tiny: Path) -> None:
    for path in (tiny, tiny.parent):
        assert recognise(path) == "tiny-imagenet"
        content = content_of("tiny-imagenet", path)
        assert content.class_names == ("goldfish", "newt, eft", "n03")
        assert content.image_shape == (64, 64, 3)
        assert [f.name for f in files(content.splits["train"])] == ["000.JPEG", "001.JPEG", "002.JPEG"] * 3
        assert [f.name for f in files(content.splits["valid"])] == ["003.JPEG", "004.JPEG"] * 3
        assert content.splits["valid"].labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert [f.name for f in files(content.splits["test"])] == [f"{i:03d}.JPEG" for i in range(4)]
        assert content.splits["test"].labels.tolist() == [1, 0, 2, 1]


def test_tiny_imagenet_mistakes(tiny: Path) -> None:
    refused(lambda: open_source("tiny-imagenet"), "Tiny ImageNet is missing", "tiny-imagenet-200.zip", "--data")
    refused(lambda: open_source("tiny-imagenet", tiny / "train"), str(tiny / "train"), "val/val_annotations.txt")
    annotations = tiny / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines + "9.JPEG\tn77\n")
    refused(lambda: open_source("tiny-imagenet", tiny), str(annotations), "line 5", "a class of train/")
    annotations.write_text(lines + "9.JPEG\tn01\n")
    refused(lambda: open_source("tiny-imagenet", tiny), "9.JPEG", "missing")
    annotations.write_text(lines + "000.JPEG\tn01\n")
    refused(lambda: open_source("tiny-imagenet", tiny), "5 images; expected 4")
    annotations.write_text(lines)
    (tiny / "train" / "n03" / "images" / "001.JPEG").unlink()
    refused(lambda: open_source("tiny-imagenet", tiny), "14 images of 3 classes; expected 15", "5 a class")


# ------------------------------------------------------------------------------------------------- names and checks


def test_unknown_names_and_places(tmp_path: Path) -> None:
    refused(lambda: open_source("cifar-10"), "no source 'cifar-10' (did you mean 'cifar10'?)", ", ".join(SOURCES))
    for act in (lambda: recognise(tmp_path / "no"), lambda: open_source("npy", tmp_path / "no")):
        refused(act, str(tmp_path / "no"), "no such file or folder", "expected a .beton file")
    refused(lambda: recognise(tmp_path), "no images that can be read", "class folders")
    for name, part in (("a.zip", "extract it"), ("a.tar.gz", "not one of CIFAR's"), ("a.txt", "no known kind")):
        (tmp_path / name).write_bytes(b"something")
        refused(partial(recognise, tmp_path / name), name, part)


def test_contents_are_checked() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 1), dtype=np.uint8)
    good = Split(images=images, labels=np.array([0, 1, 0, 1]), origin="here")

    def source(valid: Split) -> Source:
        content = Content(class_names=("a", "b"), splits={"train": good, "valid": valid, "test": good})
        return Source(name="npy", fingerprint="", read=lambda: content)

    right = source(good)
    assert right.num_classes == 2 and right.class_names == ("a", "b") and right.splits["valid"] is good
    refused(
        lambda: source(replace(good, images=images[:0], labels=good.labels[:0])).splits, "here", "valid split is empty"
    )
    refused(lambda: source(replace(good, labels=good.labels[:3])).splits, "4 images but 3 labels")
    refused(lambda: source(replace(good, labels=good.labels + 1)).splits, "label 2 of valid image 1", "0 to 1")
    refused(lambda: source(replace(good, labels=good.labels - 1)).splits, "label -1 of valid image 0")
    refused(lambda: source(replace(good, images=images.astype(np.int8))).splits, "int8", "uint8")


def test_hold_out_takes_the_end_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 25, 7]))
    rest, held = hold_out(labels, origin="here")
    assert sorted([*rest, *held]) == list(range(72))
    assert np.bincount(labels[held]).tolist() == [4, 2, 1]
    for k in range(3):
        assert max(rest[labels[rest] == k]) < min(held[labels[held] == k])
    monkeypatch.setattr(source_types, "MAX_HELD_OUT", 4)
    _, held = hold_out(labels, origin="here")
    assert np.bincount(labels[held]).tolist() == [2, 1, 1]


def test_classes_without_an_image_are_named() -> None:
    check_classes_present(np.array([2, 0, 1, 1]), 3, "here")
    refused(lambda: check_classes_present(np.array([0, 1, 1]), 3, "here"), "labels reach 2", "label 2")


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_npy(tmp_path, "", 30)
    before = open_source("npy", tmp_path).fingerprint
    assert open_source("npy", tmp_path).fingerprint == before
    stat = (tmp_path / "images.npy").stat()
    os.utime(tmp_path / "images.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source("npy", tmp_path).fingerprint != before


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    write_npy(tmp_path, "", 30)
    source = open_source("npy", tmp_path)
    (tmp_path / "images.npy").write_bytes(b"damaged")
    refused(lambda: source.content, "cannot be read")


def test_rows_of_a_file_cannot_be_taken_apart() -> None:
    split = Split(images=BetonRows(path=Path("a.beton"), indices=None), labels=np.array([0]), origin="a.beton")
    with pytest.raises(AssertionError):
        split.take(np.array([0]))
