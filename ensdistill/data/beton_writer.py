"""Writing one `.beton` file, in this process.

FFCV's own loop starts worker processes and waits for ever when one fails; it also draws its own progress bar. The
parts of the file (header, pages, table) are FFCV's; the loop here is one thread, so that errors are raised, nothing is
left behind, and the same images give the same bytes. Images are decoded in threads before they get here
(`image_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ensdistill.data.ffcv_guards import import_ffcv
from ensdistill.data.image_files import MAX_JPEG_BYTES, Jpeg
from ensdistill.runtime.errors import UserError

IMAGE_FIELD, LABEL_FIELD = "image", "label"
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 31
TABLE_BYTES, SAMPLE_BYTES = 24, 32  # an entry of the allocation table; at most, of the samples' fixed-size values


def predict_bytes(num_images: int, image_bytes: int, *, page_bytes: int) -> int:
    """About the size of a file of `num_images` images of `image_bytes` together, from above."""
    return image_bytes + num_images * (TABLE_BYTES + SAMPLE_BYTES) + image_bytes // 16 + 3 * page_bytes


def page_bytes_for(sample_bytes: int) -> int:
    """The smallest page that holds an image.

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


def write_jpegs(path: Path, jpegs: Iterable[Jpeg], labels_N: np.ndarray, on_image: Callable[[], None]) -> None:
    """Write compressed images of any size; calls `on_image` after each."""
    import_ffcv()
    from ffcv.fields import RGBImageField

    _write(path, RGBImageField(write_mode="jpg"), _JpegBytes(), jpegs, labels_N, MAX_JPEG_BYTES, on_image)


class _JpegBytes:
    """Stands in for RGBImageField where a sample is encoded: the image is a JPEG already."""

    def encode(self, destination: np.ndarray, jpeg: Jpeg, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
        from ffcv.fields.rgb_image import IMAGE_MODES

        destination["mode"] = IMAGE_MODES["jpg"]
        destination["height"], destination["width"] = jpeg.height, jpeg.width
        destination["data_ptr"], storage = malloc(len(jpeg.data))
        storage[:] = np.frombuffer(jpeg.data, np.uint8)


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
    writer.prepare()  # the header, and shared memory for the samples' fixed-size values
    try:
        allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
        with allocator:
            for i, sample in enumerate(zip(images, labels_N, strict=True)):
                handle_sample(sample, i, names, metadata, allocator, encoders)
                on_image()
        writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    _check_size(path, allocator, page_bytes, len(labels_N))


def _check_size(path: Path, allocator: Any, page_bytes: int, num_images: int) -> None:
    """FFCV ignores short writes, which a full disk gives."""
    expected = allocator.offset + int(allocator.next_page_written.value) * page_bytes + num_images * TABLE_BYTES
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path.parent}: only {found} of {expected} bytes were written; free space on the disk and try again"
        )
