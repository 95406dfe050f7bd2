"""CIFAR in every form gives its images, and no pickle runs anything."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    content_of,
    pixels,
    refused,
)
from small_cifar import NUM_TEST, NUM_TRAIN, NUM_VALID, SmallCifar, pack, python2_batch, unpack

from ensdistill.data.sources import cifar
from ensdistill.data.sources.cifar import load_plain_pickle
from ensdistill.data.sources.registry import open_source, recognise


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


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_files_that_are_not_the_published_ones_are_named(
    small: SmallCifar, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, form = small.name, getattr(small.layout, kind)  # type: ignore[attr-defined]
    contents = small.write(form)
    pack(tmp_path / form.archive, form.folder, contents)
    note = content_of(name, tmp_path).note
    assert f"{form.archive}: NOT the published data: {form.train[0]} (" in note and form.test in note
    assert form.checksums.keys() == {*form.train, form.test}
    published = {file: f"sha1:{hashlib.sha1(contents[file]).hexdigest()}" for file in form.checksums}
    monkeypatch.setitem(cifar.LAYOUTS, name, replace(small.layout, **{kind: replace(form, checksums=published)}))
    assert content_of(name, tmp_path).note == ""
    pack(tmp_path / form.archive, form.folder, contents | {form.test: small.other_test(form)})
    note = content_of(name, tmp_path).note
    assert f"published data: {form.test} (sha1:" in note and form.train[0] not in note and "download" in note


@pytest.mark.parametrize("place", ["member", "tail"])
def test_an_archive_that_unpacks_without_end_is_refused_before_it_does(
    small: SmallCifar, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "MAX_UNPACKED_BYTES", 8 << 20)
    form, name = small.layout.binary, small.name  # type: ignore[attr-defined]
    contents = small.write(form) | ({"bomb": bytes(9 << 20)} if place == "member" else {})
    pack(tmp_path / form.archive, form.folder, contents)
    if place == "tail":
        with (tmp_path / form.archive).open("ab") as file:
            file.write(gzip.compress(bytes(9 << 20)))
    refused(lambda: content_of(name, tmp_path), form.archive, "unpacks to more than", "download it again")


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


def test_files_that_are_too_large_are_not_read(
    small: SmallCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, name = small.layout.binary, small.name  # type: ignore[attr-defined]
    unpack(tmp_path / form.folder, small.write(form))
    with (tmp_path / form.folder / form.test).open("ab") as file:
        file.truncate(cifar.MAX_MEMBER_BYTES + 1)  # takes no room on the disk
    refused(lambda: content_of(name, tmp_path), form.test, "268,435,457 bytes; expected at most 268,435,456")


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
        unpack(folder, {**contents, file: batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=4)})
        refused(lambda: content_of(name, folder), file, *expected)

    key = layout.label_key
    broken({"data": flat}, f"no entry '{key}'")
    broken([1, 2], "no entry 'data'", "pickled dict")
    broken(b"\x80\x02K\x01K\x02.", "no entry 'data'")
    broken({"data": [1], key: [1]}, "'data' is list", "(N, 3072)")
    broken({"data": flat[:, 1:], key: [1, 2, 3]}, "(3, 3071)")
    broken({"data": flat, key: [1, 2]}, f"'{key}' is not a list of 3 integers")
    broken({"data": flat, key: [1, 2, "3"]}, f"'{key}' is not a list of 3 integers")
    broken({layout.names_key: "abc"}, "no class names", file=form.names)


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
        (b"\x80\x02]K\x01b.", "damaged"),
        (b"\x80\x02cnumpy\ndtype\n}b.", "sets the state of something else than an array"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "NEWOBJ"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "numbers a value 2147483647"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "expected 1099511627776 bytes"),
        (PYTHON2_ARRAY + b"(K\x01K\x02\x85NNU\x01xtb.", "as numpy writes"),
        (python2_batch(np.ones((1, 3072), np.uint8), [1], b"k").replace(b"M\x00\x0c\x86", b"M\x01\x0c\x86"), "3073"),
        (pickle.dumps({"a": [1, 2]})[:-3], ""),
        (b"", ""),
        (b"garbage", ""),
        (b"\x80\x02e.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02}(K\x01e.", "damaged"),
        (b"\x80\x02}(K\x01u.", ""),
    ],
)  # fmt: skip
def test_other_pickles_are_refused(data: bytes, part: str) -> None:
    refused(lambda: load_plain_pickle(data, "batch_1"), "batch_1", "not a pickle of plain data", part)
