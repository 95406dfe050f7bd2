"""Reading and writing of `.beton` files; one that is read is checked before anything decodes it.

**Reading.** FFCV believes what a file says: a cut or foreign file ends in a traceback from deep inside, in pixels of
another image or in a crash. Here every offset is compared with the file's size and every image with the table of
allocations, without reading a pixel (a second for a million images).

The file, in order: header; a descriptor a field; the fixed-size values of every sample; pages of data; the table of
allocations (sample, offset, size), to which the header points.

**Writing** happens in this process. FFCV's own loop starts worker processes and waits for ever when one fails; it also
draws its own progress bar. The parts of the file (header, pages, table) are FFCV's; the loop here is one thread, so
that errors are raised, nothing is left behind, and the same images give the same bytes. Images are decoded in threads
before they get here (`image_files`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ensdistill.data.ffcv_guards import import_ffcv
from ensdistill.data.image_files import MAX_JPEG_BYTES, MAX_PIXELS, Stored, feed_decodes, parallel_map
from ensdistill.runtime.errors import UserError

MODE_JPEG, MODE_RAW = 0, 1
IMAGE_FIELD, LABEL_FIELD = "image", "label"
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 31
TABLE_BYTES, SAMPLE_BYTES = 24, 32  # an entry of the allocation table; at most, of the samples' fixed-size values


@dataclass(frozen=True, kw_only=True)
class BetonIndex:
    """Labels, sizes and kinds of the images of one file, without their pixels."""

    path: Path
    field_names: tuple[str, ...]
    image_field: str
    """Name of the field that holds the images: an RGBImageField, or an NDArrayField of uint8 (H, W, C)."""
    label_field: str
    """Name of the IntField that holds the labels."""
    labels_N: np.ndarray
    """Labels, int64."""
    heights_N: np.ndarray
    widths_N: np.ndarray
    """Heights and widths in pixels, int64."""
    is_jpeg_N: np.ndarray
    """Flags of images that are compressed and not stored as they are, bool."""
    num_channels: int
    is_array: bool
    """True where images are an NDArrayField: all of one size, stored as they are."""

    @property
    def num_images(self) -> int:
        return len(self.labels_N)


def read_index(path: str | Path) -> BetonIndex:
    """Read and check everything in the file but its pixels.

    Raises:
        UserError: the file is missing, not a `.beton`, cut short, empty, or without exactly one field of images and one
            of integer labels.
    """
    import_ffcv()
    from ffcv.reader import Reader

    path = Path(path)
    _check_layout(path)
    reader = Reader(str(path))
    image_field, label_field = _choose_fields(path, reader.handlers)
    names = list(reader.handlers)
    images = reader.metadata[f"f{names.index(image_field)}"]
    labels_N = reader.metadata[f"f{names.index(label_field)}"].astype(np.int64)
    handler = reader.handlers[image_field]
    is_array = hasattr(handler, "shape")
    if is_array:
        height, width, num_channels = (int(side) for side in handler.shape)
        heights_N = np.full(len(images), height, dtype=np.int64)
        widths_N = np.full(len(images), width, dtype=np.int64)
        offsets_N, is_jpeg_N = images, np.zeros(len(images), dtype=bool)
    else:
        num_channels = 3
        heights_N, widths_N = images["height"].astype(np.int64), images["width"].astype(np.int64)
        offsets_N, is_jpeg_N = images["data_ptr"], images["mode"] == MODE_JPEG
        strange_N = (~is_jpeg_N & (images["mode"] != MODE_RAW)) | (heights_N < 1) | (widths_N < 1)
        _refuse(path, strange_N, "has no size, or an unknown compression")
        _refuse(path, is_jpeg_N & (heights_N * widths_N > MAX_PIXELS), f"has more than {MAX_PIXELS:,} pixels")
    sizes_N = _sizes(path, offsets_N, reader)
    bytes_N = heights_N * widths_N * num_channels
    _refuse(path, np.where(is_jpeg_N, sizes_N < 1, sizes_N != bytes_N), "does not have the number of bytes of its size")
    return BetonIndex(
        path=path,
        field_names=tuple(names),
        image_field=image_field,
        label_field=label_field,
        labels_N=labels_N,
        heights_N=heights_N,
        widths_N=widths_N,
        is_jpeg_N=is_jpeg_N,
        num_channels=num_channels,
        is_array=is_array,
    )


def bytes_of_images(index: BetonIndex) -> Callable[[int], np.ndarray]:
    """Open a file that `read_index` has checked; returns a function from a row to its image's bytes, uint8."""
    from ffcv.reader import Reader

    reader = Reader(str(index.path))
    values = reader.metadata[f"f{index.field_names.index(index.image_field)}"]
    offsets = values if index.is_array else values["data_ptr"]
    size_at = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    data = np.memmap(index.path, np.uint8, mode="r")

    def stored(row: int) -> np.ndarray:
        offset = int(offsets[row])
        return data[offset : offset + size_at[offset]]

    return stored


def require_decodable(index: BetonIndex, num_threads: int, on_image: Callable[[], None]) -> None:
    """Decode every JPEG of a file once, as the feed will; calls `on_image` after each.

    Raises:
        UserError: the feed does not decode one of them.
    """
    stored = bytes_of_images(index)

    def decodes(row: int) -> bool:
        return feed_decodes(stored(row), np.empty((index.heights_N[row], index.widths_N[row], 3), np.uint8))

    rows = np.flatnonzero(index.is_jpeg_N).tolist()
    for row, is_whole in zip(rows, parallel_map(decodes, rows, num_threads), strict=True):
        if not is_whole:
            raise damaged_jpeg(index.path, row)
        on_image()


def damaged_jpeg(path: Path, row: int) -> UserError:
    """Make the error of a JPEG that the feed does not decode."""
    return UserError(
        f"{path}: image {row} is a damaged JPEG, or has stray bytes in it, which FFCV's decoder refuses; write the "
        "file again from its source without it, or with its pixels"
    )


def _check_layout(path: Path) -> None:
    """Refuse a file whose header, descriptors, samples or table lie outside of it or make no sense."""
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_handlers,
        get_metadata_type,
    )

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HeaderType.itemsize)
            if len(head) < HeaderType.itemsize:
                raise UserError(f"{path}: {size} bytes are no .beton file; write it again from its source")
            header = np.frombuffer(head, dtype=HeaderType)[0]
            num_fields = int(header["num_fields"])
            descriptors_raw = file.read(num_fields * FieldDescType.itemsize)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a .beton file with images and labels") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a .beton file that you may read"
        ) from error

    page_size = int(header["page_size"])
    # FFCV's writer takes powers of two from 2 MiB up: two bytes of version alone would let too much pass for a .beton.
    if header["version"] != CURRENT_VERSION or page_size < 1 << 21 or page_size & (page_size - 1) or not num_fields:
        raise UserError(f"{path}: not a .beton file (of version {CURRENT_VERSION}); give one that FFCV's writer made")
    num_samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if num_samples == 0:
        raise UserError(f"{path}: holds no images; write it again from a source that has some")
    if table == 0:
        raise UserError(f"{path}: its writing was interrupted; delete it and write it again")
    descriptors = np.frombuffer(descriptors_raw, FieldDescType) if num_fields * FieldDescType.itemsize <= size else None
    if descriptors is None or len(descriptors) < num_fields:
        raise _truncated(path, size)
    try:
        names = [descriptor["name"].tobytes().decode("ascii").split("\0")[0] for descriptor in descriptors]
        foreign = [n for n, d in zip(names, descriptors, strict=True) if TYPE_ID_HANDLER.get(int(d["type_id"])) is None]
        if foreign:
            raise UserError(
                f"{path}: field '{foreign[0]}' is of a type that FFCV does not have; expected its own fields"
            )
        sample_size = get_metadata_type(get_handlers(descriptors)).itemsize
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, IndexError, AssertionError) as error:
        raise _truncated(path, size) from error
    end_of_samples = HeaderType.itemsize + descriptors.nbytes + num_samples * sample_size
    table_bytes = size - table
    if not end_of_samples <= table < size or table_bytes % ALLOC_TABLE_TYPE.itemsize:
        raise _truncated(path, size)


def _choose_fields(path: Path, handlers: dict[str, Any]) -> tuple[str, str]:
    """Choose the field of images and the field of labels; where several would do, the one called `image` or `label`."""
    from ffcv.fields import IntField, NDArrayField, RGBImageField

    def is_image(field: Any) -> bool:
        if isinstance(field, NDArrayField):
            return field.dtype == np.uint8 and len(field.shape) == 3
        return isinstance(field, RGBImageField)

    chosen = []
    for purpose, wanted, fits in [
        ("image", "RGBImageField or NDArrayField of uint8 (H, W, C)", is_image),
        ("label", "IntField", lambda field: isinstance(field, IntField)),
    ]:
        fitting = [name for name in handlers if fits(handlers[name])]
        if purpose in fitting:
            fitting = [purpose]
        if len(fitting) != 1:
            found = ", ".join(f"{name}: {type(field).__name__}" for name, field in handlers.items())
            raise UserError(
                f"{path}: {len(fitting)} fields could be the {purpose}s, expected one {wanted}"
                f" (or one called '{purpose}'); the file has {found}"
            )
        chosen.append(fitting[0])
    return chosen[0], chosen[1]


def _sizes(path: Path, offsets_N: np.ndarray, reader: Any) -> np.ndarray:
    """Return the bytes of each image by the table of allocations; refuse an image outside of it or of the file."""
    order = np.argsort(reader.alloc_table["ptr"])
    starts, sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
    at_N = np.minimum(np.searchsorted(starts, offsets_N), len(starts) - 1)
    starts_N, sizes_N, end = starts[at_N], sizes[at_N], reader.header["alloc_table_ptr"]
    outside_N = (
        (starts_N != offsets_N) | (starts_N > end) | (sizes_N > end - starts_N)
    )  # unsigned: no sum that may wrap
    _refuse(path, outside_N, "is not in the file")
    return sizes_N.astype(np.int64)


def _refuse(path: Path, bad_N: np.ndarray, what: str) -> None:
    if bad_N.any():
        raise UserError(
            f"{path}: image {int(bad_N.argmax())} {what}: the file is damaged; write it again from its source"
        )


def _truncated(path: Path, size: int) -> UserError:
    return UserError(f"{path}: truncated or damaged ({size} bytes are not all of it); write it again from its source")


def predict_bytes(num_images: int, image_bytes: int, *, page_bytes: int) -> int:
    """Predict the size of a file of `num_images` images of `image_bytes` together, an upper bound."""
    return image_bytes + num_images * (TABLE_BYTES + SAMPLE_BYTES) + image_bytes // 16 + 3 * page_bytes


def page_bytes_for(sample_bytes: int) -> int:
    """Return the size of the smallest page that holds an image.

    Raises:
        UserError: no page does.
    """
    page_bytes = max(MIN_PAGE_BYTES, 1 << (sample_bytes - 1).bit_length())
    if page_bytes > MAX_PAGE_BYTES:
        raise UserError(
            f"an image of {sample_bytes} bytes; a .beton holds images of at most {MAX_PAGE_BYTES} bytes: make it "
            "smaller"
        )
    return page_bytes


def write_arrays(
    path: Path,
    images: Iterable[np.ndarray],
    labels_N: np.ndarray,
    shape: tuple[int, int, int],
    on_image: Callable[[], None],
) -> None:
    """Write images of one shape (H, W, C) uint8 as they are; calls `on_image` after each."""
    import_ffcv()
    from ffcv.fields import NDArrayField

    field = NDArrayField(np.dtype("u1"), shape)
    page_bytes = page_bytes_for(int(np.prod(shape)))
    _write(path, field, field, map(np.ascontiguousarray, images), labels_N, page_bytes, on_image)


def write_images(path: Path, images: Iterable[Stored], labels_N: np.ndarray, on_image: Callable[[], None]) -> None:
    """Write images of any size, compressed or not; calls `on_image` after each."""
    import_ffcv()
    from ffcv.fields import RGBImageField

    _write(path, RGBImageField(write_mode="jpg"), _StoredBytes(), images, labels_N, MAX_JPEG_BYTES, on_image)


def write_pixels(
    path: Path,
    images: Iterable[np.ndarray],
    labels_N: np.ndarray,
    shape: tuple[int, int, int],
    on_image: Callable[[], None],
) -> None:
    """Write images of one shape (H, W, 3) uint8 as they are, in a field that can be cropped; calls `on_image`."""
    import_ffcv()
    from ffcv.fields import RGBImageField

    pixels = (Stored(image.tobytes(), image.shape[0], image.shape[1], is_jpeg=False) for image in images)
    page_bytes = page_bytes_for(int(np.prod(shape)))
    _write(path, RGBImageField(write_mode="raw"), _StoredBytes(), pixels, labels_N, page_bytes, on_image)


class _StoredBytes:
    """Stands in for RGBImageField where a sample is encoded: the image's bytes are what is stored."""

    def encode(self, destination: np.ndarray, image: Stored, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
        destination["mode"] = MODE_JPEG if image.is_jpeg else MODE_RAW
        destination["height"], destination["width"] = image.height, image.width
        destination["data_ptr"], storage = malloc(len(image.data))
        storage[:] = np.frombuffer(image.data, np.uint8)


def _write(
    path: Path,
    image_field: Any,
    image_encoder: Any,
    images: Iterable[Any],
    labels_N: np.ndarray,
    page_bytes: int,
    on_image: Callable[[], None],
) -> None:
    from ffcv.fields import IntField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    label_field = IntField()
    fields = {IMAGE_FIELD: image_field, LABEL_FIELD: label_field}
    writer = DatasetWriter(str(path), fields, page_size=page_bytes)
    writer.num_samples = len(labels_N)
    metadata = np.zeros(len(labels_N), writer.metadata_type)
    names = metadata.dtype.names
    encoders = {IMAGE_FIELD: image_encoder, LABEL_FIELD: label_field}
    with _own_memory():
        writer.prepare()  # the header, and memory for the samples' fixed-size values
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
    with allocator:
        for i, sample in enumerate(zip(images, labels_N, strict=True)):
            handle_sample(sample, i, names, metadata, allocator, encoders)
            on_image()
    writer.metadata_sm.buf[:] = metadata.tobytes()
    writer.finalize(allocator.allocations)
    _check_size(path, allocator, page_bytes, len(labels_N))


class _OwnMemory:
    """Stands in for memory that processes share."""

    def __init__(self, create: bool, size: int) -> None:
        self.buf = memoryview(bytearray(size))


class _OwnValue:
    """Stands in for a number that processes share."""

    def __init__(self, kind: type, value: int) -> None:
        self.value = value

    def get_lock(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def _own_memory() -> Iterator[None]:
    """Lend FFCV's writer memory of this process, which alone writes: /dev/shm may be too small, or read-only."""
    import ffcv.memory_allocator
    import ffcv.writer

    lent = [
        (ffcv.writer, "shared_memory", SimpleNamespace(SharedMemory=_OwnMemory)),
        (ffcv.memory_allocator, "Value", _OwnValue),
    ]
    before = [getattr(module, name) for module, name, _ in lent]
    try:
        for module, name, own in lent:
            setattr(module, name, own)
        yield
    finally:
        for (module, name, _), theirs in zip(lent, before, strict=True):
            setattr(module, name, theirs)


def _check_size(path: Path, allocator: Any, page_bytes: int, num_images: int) -> None:
    """Refuse a file that is shorter than what was written: FFCV ignores short writes, which a full disk gives."""
    expected = allocator.offset + int(allocator.next_page_written.value) * page_bytes + num_images * TABLE_BYTES
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path.parent}: only {found} of {expected} bytes were written; free space on the disk and try again"
        )
