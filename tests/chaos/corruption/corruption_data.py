"""Kinds of images: `.beton`, arrays, archives, folders of pictures, and what a prepared folder says of itself."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from corruption import DAMAGE, Damage, Kind, Rng, other_array, signed_json
from data_sets import array_source, cycled, picture, smooth_images, write, write_beton
from small_cifar import SmallCifar, pack

from ensdistill.data.dataset import DataSet, load_dataset
from ensdistill.data.feed import Feed
from ensdistill.data.prepare import prepare
from ensdistill.data.sources import arrays, cifar, folders
from ensdistill.data.sources.registry import open_source, recognise

SIZE = 24
"""Side in pixels that pictures of many sizes are cut to."""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _fed(data: DataSet) -> Any:
    """What a network would be fed, with everything that is said of it."""
    images = {}
    for name, split in data.splits.items():
        varies = data.image_shape is None
        feed = Feed(
            split.path, indices=split.indices, batch_size=4, seed=0, shuffle=False, drop_last=False,
            image_size=SIZE if varies else None, crop="center" if varies else "none", cache="none",
        )  # fmt: skip
        with feed:
            images[name] = feed.all_images()
    facts = (data.name, data.class_names, data.image_shape, data.pixel_mean, data.pixel_std, data.image_field)
    return images, facts, data.label_field


def _prepared(place: str, *, size: int | None = None) -> Callable[[Path], Any]:
    """Read the data at `place` as `--data` does: recognised, written to a .beton, fed."""

    def read(folder: Path) -> Any:
        path = folder / place if place else folder
        source = open_source(recognise(path), path)
        return _fed(prepare(source, folder.parent / "out", image_size=size, one_size=size is None))

    return read


def _content(place: str) -> Callable[[Path], Any]:
    """Read the arrays at `place`, before they are written."""

    def read(folder: Path) -> Any:
        content = open_source(recognise(folder / place), folder / place).content
        splits = {name: (split.images, split.labels) for name, split in content.splits.items()}
        return splits, content.class_names

    return read


def beton_of_arrays(folder: Path) -> Kind:
    for seed, (name, num) in enumerate({"train": 12, "valid": 4, "test": 5}.items()):
        write_beton(folder / "betons" / f"{name}.beton", cycled(num), seed=seed)
    files = _files(folder)
    return Kind(files=files, damaged=tuple(files), read=_prepared("betons"), has_digest=False)


def beton_of_jpegs(folder: Path) -> Kind:
    from ffcv.fields import IntField, RGBImageField

    fields = {"image": RGBImageField("jpg", jpeg_quality=95), "label": IntField()}
    (folder / "betons").mkdir()
    for name, num in {"train": 9, "valid": 4, "test": 5}.items():
        sizes = [(25 + 3 * i, 37 - 2 * i) for i in range(num)]
        write(folder / "betons" / f"{name}.beton", smooth_images(sizes), fields, labels=cycled(num))
    files = _files(folder)
    return Kind(files=files, damaged=tuple(files), read=_prepared("betons", size=SIZE), has_digest=False)


def prepared_beton(folder: Path) -> Kind:
    prepare(array_source(), folder / "data")
    files = _files(folder)
    betons = tuple(name for name in files if name.endswith(".beton"))
    return Kind(files=files, damaged=betons, read=lambda at: _fed(load_dataset(at / "data")), has_digest=True)


def dataset_json(folder: Path) -> Kind:
    kind = prepared_beton(folder)
    return replace(kind, damaged=("data/dataset.json",), forged=(signed_json,))


# ---- arrays and archives --------------------------------------------------------------------------------------------


def npy_pair(folder: Path) -> Kind:
    rng = np.random.default_rng(0)
    for split, num in {"train": 40, "test": 9}.items():
        np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (num, 5, 7, 3), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", cycled(num))
    files = _files(folder)
    return Kind(files=files, damaged=tuple(files), read=_content(""), has_digest=False, forged=(other_array,))


def _gzipped(damage: tuple[Damage, ...]) -> Damage:
    """Damage what is packed, and pack it again."""

    def inside_gzip(data: bytes, rng: Rng) -> bytes:
        return gzip.compress(damage[int(rng.integers(len(damage)))](gzip.decompress(data), rng), 1)

    return inside_gzip


def _two_members(data: bytes, rng: Rng) -> bytes:
    return data + gzip.compress(rng.bytes(9))


def _bomb(data: bytes, rng: Rng) -> bytes:
    """Three hundred megabytes of nothing behind the first bytes."""
    whole = gzip.decompress(data)
    return gzip.compress(whole[: int(rng.choice((16, len(whole))))], 1) + _NOTHING * 30


_NOTHING = gzip.compress(bytes(10_000_000))


def _idx(values: np.ndarray) -> bytes:
    head = b"\0\0\x08" + bytes([values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    return head + values.tobytes()


def _fashion_mnist(folder: Path, suffix: str) -> Kind:
    arrays.FASHION_MNIST_TRAIN, arrays.FASHION_MNIST_VALID, arrays.FASHION_MNIST_TEST = 20, 5, 10
    rng = np.random.default_rng(1)
    files = {}
    for name, num in zip(arrays.IDX_FILES, (25, 25, 10, 10), strict=True):
        values = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8) if "images" in name else cycled(num, 10)
        data = _idx(values.astype(np.uint8))
        files[f"idx/{name}{suffix}"] = gzip.compress(data, 6) if suffix else data
    forged = (_gzipped(DAMAGE), _gzipped(DAMAGE), _two_members, _bomb) if suffix else ()
    return Kind(files=files, damaged=tuple(files), read=_content("idx"), has_digest=bool(suffix), forged=forged)


def _cifar_contents(form: str) -> tuple[SmallCifar, cifar.Form, dict[str, bytes]]:
    small = SmallCifar("cifar100")
    cifar.LAYOUTS["cifar100"] = small.layout
    found: cifar.Form = getattr(small.layout, form)
    return small, found, small.write(found)


def _cifar_archive(folder: Path, form: str, *, packed: bool) -> Kind:
    _, names, contents = _cifar_contents(form)
    pack(folder / names.archive, names.folder, contents)
    data = (folder / names.archive).read_bytes()
    name = names.archive if packed else names.archive.removesuffix(".gz")
    files = {f"cifar/{name}": data if packed else gzip.decompress(data)}

    def inside(data: bytes, rng: Rng) -> bytes:
        """Damage a file of the archive, or what the archive says of it."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive, tarfile.open(fileobj=buffer, mode="w") as new:
            members = archive.getmembers()
            chosen = members[int(rng.integers(len(members)))]
            for member in members:
                stream = archive.extractfile(member)
                content = stream.read() if stream else b""
                if member is chosen:
                    change = int(rng.integers(8))
                    if change < 5:
                        content = DAMAGE[int(rng.integers(len(DAMAGE)))](content, rng)
                    elif change == 5:
                        member.type = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)[int(rng.integers(3))]
                        member.linkname = "/etc/passwd"
                    elif change == 6:
                        member.name = f"../{member.name}"
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        return gzip.compress(buffer.getvalue(), 1) if packed else buffer.getvalue()

    forged = (inside, inside, _gzipped(DAMAGE), _two_members, _bomb) if packed else (inside,)
    return Kind(files=files, damaged=tuple(files), read=_content(f"cifar/{name}"), has_digest=packed, forged=forged)


def cifar_extracted(folder: Path) -> Kind:
    _, names, contents = _cifar_contents("python")
    files = {f"{names.folder}/{name}": data for name, data in contents.items()}
    return Kind(files=files, damaged=tuple(files), read=_content(names.folder), has_digest=False)


# ---- pictures -------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, suffix: str, *, many_sizes: bool = False, **options: Any) -> Kind:
    for split, num in {"train": 3, "valid": 1, "test": 1}.items():
        for label, name in enumerate(("cat", "dog")):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for i in range(num):
                height, width = (20 + 7 * i, 41 - 5 * i) if many_sizes else (17, 23)
                picture(height, width, 10 * i + label).save(place / f"{i}{suffix}", **options)
    files = _files(folder)
    size = SIZE if many_sizes else None
    return Kind(files=files, damaged=tuple(files), read=_prepared("data", size=size), has_digest=False)


def tiny_imagenet(folder: Path) -> Kind:
    folders.TINY_IMAGENET_CLASSES, folders.TINY_IMAGENET_TRAIN_PER_CLASS, folders.TINY_IMAGENET_TEST = 2, 5, 4
    folders.TINY_IMAGENET_VALID_PER_CLASS, folders.TINY_IMAGENET_SHAPE = 2, (8, 8, 3)
    root = folder / "tiny-imagenet-200"
    for label, name in enumerate(("n01", "n02")):
        place = root / "train" / name / "images"
        place.mkdir(parents=True)
        for i in range(5):
            picture(8, 8, 10 * i + label).save(place / f"{name}_{i}.png")
    (root / "val" / "images").mkdir(parents=True)
    for i in range(4):
        picture(8, 8, 90 + i).save(root / "val" / "images" / f"val_{i}.png")
    lines = [f"val_{i}.png\tn0{1 + i % 2}\t0\t0\t62\t62" for i in range(4)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "words.txt").write_text("n01\tcat, true cat\nn02\tdog\nn03\tother\n")
    texts = ("tiny-imagenet-200/val/val_annotations.txt", "tiny-imagenet-200/words.txt")
    return Kind(files=_files(folder), damaged=texts, read=_prepared("tiny-imagenet-200"), has_digest=False)


KINDS: dict[str, Callable[[Path], Kind]] = {
    ".beton of arrays": beton_of_arrays,
    ".beton of JPEGs": beton_of_jpegs,
    "prepared .beton": prepared_beton,
    "dataset.json": dataset_json,
    ".npy": npy_pair,
    "idx": lambda folder: _fashion_mnist(folder, ""),
    "idx.gz": lambda folder: _fashion_mnist(folder, ".gz"),
    "CIFAR binary .tar.gz": lambda folder: _cifar_archive(folder, "binary", packed=True),
    "CIFAR python .tar.gz": lambda folder: _cifar_archive(folder, "python", packed=True),
    "CIFAR binary .tar": lambda folder: _cifar_archive(folder, "binary", packed=False),
    "CIFAR python, extracted": cifar_extracted,
    "JPEG of one size": lambda folder: _pictures(folder, ".jpg"),
    "JPEG of many sizes": lambda folder: _pictures(folder, ".jpg", many_sizes=True),
    "PNG": lambda folder: _pictures(folder, ".png"),
    "GIF": lambda folder: _pictures(folder, ".gif"),
    "WebP": lambda folder: _pictures(folder, ".webp"),
    "TIFF": lambda folder: _pictures(folder, ".tif", compression="tiff_lzw"),
    "BMP": lambda folder: _pictures(folder, ".bmp"),
    "PPM": lambda folder: _pictures(folder, ".ppm"),
    "Tiny ImageNet's lists": tiny_imagenet,
}
