"""CIFAR-10 and CIFAR-100: the binary archives and the Python ones, packed or extracted.

Binary records are one or two label bytes (CIFAR-100: coarse, fine) and 3072 bytes of a 3×32×32 image. The Python
archives hold the same in pickles, which can do nothing here but make plain data and arrays of bytes
(`load_plain_pickle`). A file that is not the published one is used, and named. Train is the first 45,000 training
images, valid the last 5,000, test the 10,000 test images; CIFAR-100 has its 100 fine labels.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensdistill.data.sources.base import Content, Source, Split, first_line
from ensdistill.data.sources.content_hash import hash_named
from ensdistill.runtime.errors import UserError

IMAGE_BYTES = 3 * 32 * 32
MAX_MEMBER_BYTES = 1 << 28  # no file of the archives is larger; protects from archives that are something else
MAX_UNPACKED_BYTES = 1 << 30  # nor all of them together: an archive of a megabyte may unpack to a disk's worth


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the two forms of an archive."""

    archive: str
    """File name of the packed archive."""
    md5: str
    """Published checksum of the packed archive."""
    folder: str
    """Name of the folder that the archive extracts to."""
    train: tuple[str, ...]
    """Names of the files of training images, in order."""
    test: str
    """Name of the file of test images."""
    names: str
    """Name of the file of class names."""
    checksums: Mapping[str, str]
    """Published checksum `KIND:HEX` by name of a file of images: torchvision's of the Python form, MXNet's of the
    binary one."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that are read: training images, test images, class names."""
        return (*self.train, self.test, self.names)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Describes a data set's two archives: names of files and keys, numbers of images."""

    title: str
    """The data set's usual name."""
    num_classes: int
    """Number of classes, K."""
    binary: Form
    """Names of the binary archive and its files."""
    python: Form
    """Names of the archive of pickles and its files."""
    label_bytes: int
    """Label bytes before each binary image; the last one is used."""
    label_key: str
    """Key of the labels in a pickle."""
    names_key: str
    """Key of the class names in their pickle."""
    num_train: int = 50_000
    """Images in the training files, of which the last `num_valid` are the validation split."""
    num_valid: int = 5_000
    """Images in the validation split."""
    num_test: int = 10_000
    """Images in the test file."""


CIFAR10 = Layout(
    title="CIFAR-10",
    num_classes=10,
    binary=Form(
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        checksums={
            "data_batch_1.bin": "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628",
            "test_batch.bin": "sha1:67eb016db431130d61cd03c7ad570b013799c88c",
        },
    ),
    python=Form(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        checksums={
            "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
            "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
            "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "md5:40351d587109b95175f43aff81a1287e",
        },
    ),
    label_bytes=1,
    label_key="labels",
    names_key="label_names",
)
CIFAR100 = Layout(
    title="CIFAR-100",
    num_classes=100,
    binary=Form(
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        checksums={
            "train.bin": "sha1:e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
            "test.bin": "sha1:8fb6623e830365ff53cf14adec797474f5478006",
        },
    ),
    python=Form(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        names="meta",
        checksums={
            "train": "md5:16019d7e3df5f24257cddd939b257f8d",
            "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
    label_bytes=2,
    label_key="fine_labels",
    names_key="fine_label_names",
)
LAYOUTS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_cifar(name: str, path: Path | None) -> Source:
    """The source `cifar10` or `cifar100` at `path`: an archive, its extracted folder, or a folder that holds either.

    Raises:
        UserError: it is not there; when it is read: damaged, truncated or another data set.
    """
    layout = LAYOUTS[name]
    found = find_cifar(layout, path) if path is not None else None
    if found is None:
        form = layout.binary
        where = f"{path} holds neither {form.archive} nor {layout.python.archive}" if path else "no folder was given"
        raise UserError(
            f"{layout.title} is missing: {where}, nor one of them extracted; download {form.archive} (md5 {form.md5}) "
            "from the CIFAR page of the University of Toronto and pass its place with --data"
        )
    place, form = found
    files = [place] if place.is_file() else [place / file for file in form.files if (place / file).is_file()]
    return Source(
        name=name,
        fingerprint=lambda: hash_named(files),
        read=lambda: _read(layout, form, place),
    )


def find_cifar(layout: Layout, path: Path) -> tuple[Path, Form] | None:
    """The archive file or the folder of extracted files that lies at `path`, and its form; None where there is none.

    A file is taken by its name alone where that is an archive's own, by what it holds otherwise.
    """
    forms = (layout.binary, layout.python)
    if path.is_file():
        if not tarfile_name(path):
            return None
        named = [form for form in forms if path.name == form.archive]
        return (path, named[0]) if named else _find_in_archive(path, forms)
    for form in forms:
        for folder in (path, path / form.folder):
            if (folder / form.train[0]).is_file() and (folder / form.test).is_file():
                return folder, form
        if (path / form.archive).is_file():
            return path / form.archive, form
    return None


def tarfile_name(path: Path) -> bool:
    """Tell whether a file has the name of a packed archive."""
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


_TOO_LARGE = f"unpacks to more than {MAX_UNPACKED_BYTES:,} bytes"


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if member.offset_data + member.size > MAX_UNPACKED_BYTES:  # before what it holds is unpacked to be skipped
            raise tarfile.TarError(_TOO_LARGE)
        yield member


def _find_in_archive(path: Path, forms: Sequence[Form]) -> tuple[Path, Form] | None:
    try:
        with tarfile.open(path) as archive:
            for member in _members(archive):
                parent, name = Path(member.name).parent.name, Path(member.name).name
                for form in forms:
                    if parent == form.folder and name in form.files:
                        return path, form
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        return None  # the caller says what was expected here
    return None


def _read(layout: Layout, form: Form, place: Path) -> Content:
    contents = _read_archive(place, form) if place.is_file() else _read_folder(place, form)
    for file in form.files:
        if file not in contents:
            raise UserError(
                f"{place}: {file} is missing; expected all of {', '.join(form.files)}: download {form.archive} again"
            )
    is_binary = form is layout.binary
    parse = _parse_binary if is_binary else _parse_pickle
    batches = [parse(layout, contents[file], f"{place}: {file}") for file in (*form.train, form.test)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
    test_images, test_labels = batches[-1]
    for count, expected, files in (
        (
            len(labels),
            layout.num_train,
            f"{form.train[0]} to {form.train[-1]}" if len(form.train) > 1 else form.train[0],
        ),
        (len(test_labels), layout.num_test, form.test),
    ):
        if count != expected:
            raise UserError(f"{place}: {files}: {count} images; expected {expected}: download {form.archive} again")
    names = _parse_names(layout, form, contents[form.names], place, is_binary=is_binary)
    cut = layout.num_train - layout.num_valid
    parts = {
        "train": (images[:cut], labels[:cut]),
        "valid": (images[cut:], labels[cut:]),
        "test": (test_images, test_labels),
    }
    splits = {name: Split(images=x_NHWC, labels=y_N, origin=str(place)) for name, (x_NHWC, y_N) in parts.items()}
    return Content(class_names=names, splits=splits, note=_unpublished(form, contents, place))


def _unpublished(form: Form, contents: Mapping[str, bytes], place: Path) -> str:
    """Say which files of images are not the published ones: one line, or none."""
    changed = [
        f"{file} ({found}, published {published})"
        for file, published in form.checksums.items()
        if (found := _checksum(contents[file], published.partition(":")[0])) != published
    ]
    if not changed:
        return ""
    return (
        f"{place}: NOT the published data: {', '.join(changed)}. They are used as they are; unless somebody changed "
        f"them on purpose they are damaged: download {form.archive} again"
    )


def _checksum(data: bytes, kind: str) -> str:
    return f"{kind}:{hashlib.new(kind, data, usedforsecurity=False).hexdigest()}"


def _read_archive(place: Path, form: Form) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(place) as archive:
            for member in _members(archive):
                name = Path(member.name).name
                if name in form.files and member.isfile() and member.size <= MAX_MEMBER_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
            assert archive.fileobj is not None
            for _ in range(MAX_UNPACKED_BYTES >> 20):  # past the last member, so that gzip compares its checksum
                if not archive.fileobj.read(1 << 20):
                    break
            else:
                raise tarfile.TarError(_TOO_LARGE)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{place}: damaged or truncated ({first_line(error)}); expected {form.archive} with md5 {form.md5}: "
            "download it again"
        ) from error
    return contents


def _read_folder(place: Path, form: Form) -> dict[str, bytes]:
    contents = {}
    for file in form.files:
        path = place / file
        if path.is_file():
            if path.stat().st_size > MAX_MEMBER_BYTES:
                raise UserError(
                    f"{path}: {path.stat().st_size:,} bytes; expected at most {MAX_MEMBER_BYTES:,}: "
                    f"download {form.archive} again"
                )
            contents[file] = path.read_bytes()
    return contents


def _parse_binary(layout: Layout, data: bytes, origin: str) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + IMAGE_BYTES
    if len(data) % record or not data:
        raise UserError(
            f"{origin}: {len(data)} bytes; expected a multiple of {record} bytes: the file is truncated, download again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return _to_nhwc(records[:, layout.label_bytes :]), records[:, layout.label_bytes - 1].astype(np.int64)


def _parse_pickle(layout: Layout, data: bytes, origin: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_plain_pickle(data, origin)
    images, labels = _entry(batch, "data", origin), _entry(batch, layout.label_key, origin)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != IMAGE_BYTES:
        found = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise UserError(f"{origin}: 'data' is {found}; expected an array of shape (N, {IMAGE_BYTES}): download again")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(type(k) is int for k in labels):
        raise UserError(f"{origin}: '{layout.label_key}' is not a list of {len(images)} integers: download again")
    return _to_nhwc(images), np.array(labels, np.int64)


def _entry(value: object, key: str, origin: str) -> object:
    for candidate in (key, key.encode()):
        if isinstance(value, dict) and candidate in value:
            return value[candidate]
    raise UserError(
        f"{origin}: no entry '{key}'; expected a pickled dict of CIFAR's archive for Python: download again"
    )


def _parse_names(layout: Layout, form: Form, data: bytes, place: Path, *, is_binary: bool) -> tuple[str, ...]:
    origin = f"{place}: {form.names}"
    names = (
        data.decode("latin-1").split()
        if is_binary
        else _entry(load_plain_pickle(data, origin), layout.names_key, origin)
    )
    if not isinstance(names, list) or len(names) != layout.num_classes:
        found = len(names) if isinstance(names, list) else "no"
        raise UserError(f"{origin}: {found} class names; expected {layout.num_classes}: download {form.archive} again")
    return tuple(name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names)


def _to_nhwc(flat: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


_NUMPY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
"""The names that a pickled array of bytes uses; none is ever looked up."""
_OPERATIONS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "LONG1", "BININT", "BININT1",
    "BININT2", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES", "BYTEARRAY8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "LIST", "DICT", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET",
    "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
})  # fmt: skip
"""Operations of `pickletools` that make plain data, and those with which numpy builds an array."""
_MAX_MEMO = 1 << 20
"""Largest number of a memo entry: pickle allocates all entries below it. CIFAR-100 has some 50,000."""


def load_plain_pickle(data: bytes, origin: str) -> Any:
    """Read a pickle of plain data; strings of Python 2 become `str` through latin-1, arrays are uint8.

    A pickle is a program that may call any function. Here it can call stand-ins of three of numpy's names and nothing
    else, and no operation takes more memory than the pickle has bytes, which `genops` compares with every length.

    Raises:
        UserError: the pickle is damaged, or asks for anything beyond plain data.
    """
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name not in _OPERATIONS:
                raise ValueError(f"it uses the operation {operation.name}")
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > _MAX_MEMO:
                raise ValueError(f"it numbers a value {argument}")
        return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else "damaged"
        raise UserError(
            f"{origin}: not a pickle of plain data ({reason}); expected a file of CIFAR's archive for Python: "
            "download the archive again, or take the binary one"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Gives a pickle stand-ins for numpy's names, and no other name."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _NUMPY_NAMES:
            raise ValueError(f"it calls {module}.{name}")
        return _StandIn(name)


class _StandIn:
    """Stands in for numpy's `_reconstruct`, `ndarray` and `dtype`, and for the dtype `u1`."""

    __slots__ = ("name",)  # no attribute that a pickle could set

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> object:
        if self.name == "dtype":
            if arguments[0] != "u1":
                raise ValueError(f"it holds an array of type {arguments[0]}, not of bytes")
            return _StandIn("u1")
        if self.name == "_reconstruct" and isinstance(arguments[0], _StandIn) and arguments[0].name == "ndarray":
            return np.ndarray.__new__(_PickledArray, 0, np.uint8)
        raise ValueError("it calls something else than numpy's array reconstruction")

    def __setstate__(self, state: object) -> None:
        if self.name != "u1":  # byte order and alignment mean nothing for one byte
            raise ValueError("it sets the state of something else than an array")


class _PickledArray(np.ndarray):
    """Takes shape and values from a pickle, after they were checked."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, values = state
        is_bytes = isinstance(dtype, _StandIn) and dtype.name == "u1" and isinstance(values, (str, bytes))
        if not is_bytes or type(shape) is not tuple:
            raise ValueError("the state of an array is not as numpy writes it")
        buffer = values.encode("latin-1") if isinstance(values, str) else values
        if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) != len(buffer):
            raise ValueError(f"an array of shape {shape} has {len(buffer)} bytes")
        super().__setstate__((1, shape, np.dtype(np.uint8), bool(is_fortran), buffer))  # type: ignore[arg-type]
