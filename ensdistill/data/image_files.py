"""Image files: decoded to arrays, or made into JPEGs of a limited size, with errors that name the file."""

from __future__ import annotations

import io
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill.runtime.errors import UserError

JPEG_QUALITY = 90
MAX_JPEG_BYTES = 1 << 23  # one page of a .beton
MAX_PIXELS, ORDINARY_PIXELS, MAX_PIXELS_A_BYTE = 1 << 27, 1 << 24, 100
"""Limits of what is decoded: pixels of an image, and above some 4096x4096 pixels a byte of its file.

A photograph has 1 to 20 pixels a byte, a grey JPEG 85. Whoever packs more has made a file to fill memories.
"""
MAX_BLANK_RANGE = 16
"""Levels, of 256, between the darkest and the brightest pixel of what shows nothing."""
ORIENTATION_TAG = 0x0112
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Jpeg(NamedTuple):
    """Bytes and size of a JPEG; decodes to RGB."""

    data: bytes
    height: int
    width: int


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image without decoding it; whatever goes wrong inside names the file."""
    try:
        with Image.open(path) as image:
            if image.mode in WIDE_MODES:
                raise UserError(f"{path}: has more than 8 bits a channel (mode {image.mode}); expected 8: convert it")
            if image.format == "EPS":  # a program, which an interpreter of PostScript would run
                raise UserError(f"{path}: a PostScript file; expected an image: convert or remove it")
            pixels, num_bytes = image.width * image.height, path.stat().st_size
            if pixels > min(MAX_PIXELS, max(ORDINARY_PIXELS, MAX_PIXELS_A_BYTE * num_bytes)):
                raise UserError(
                    f"{path}: {image.height}x{image.width} pixels in {num_bytes:,} bytes would take "
                    f"{8 * pixels / 1e9:.1f} GB of memory; expected at most {MAX_PIXELS:,} pixels, and above "
                    f"{ORDINARY_PIXELS:,} at most {MAX_PIXELS_A_BYTE} a byte: make the image smaller, or remove it"
                )
            yield image
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); expected a whole image: replace or remove it") from error


def image_size(path: Path) -> tuple[int, int]:
    """Read height and width from the header, turned as the image's orientation says.

    Raises:
        UserError: not an image.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION_TAG, 1) >= 5
        return (width, height) if turned else (height, width)


def common_size(files: Sequence[Path], num_threads: int) -> tuple[tuple[int, int] | None, str]:
    """Find the one size (H, W) of all images, or None, and a line on the few files that have another than most.

    Of photographs, whose sizes differ at once, few files are looked at.

    Raises:
        UserError: a file that is looked at is not an image.
    """
    sample = Counter(map(image_size, files[:: max(1, len(files) // 64)]))
    size, count = sample.most_common(1)[0]
    if 2 * count < sample.total():
        return None, ""
    sizes = zip(files, parallel_map(image_size, files, num_threads), strict=True)
    odd = [(file, other) for file, other in sizes if other != size]
    if not odd:
        return size, ""
    if 10 * len(odd) > len(files):
        return None, ""
    (file, (height, width)), num = odd[0], len(odd)
    return None, f"{num:,} of {len(files):,} images are not {size[0]}x{size[1]}: {file} is {height}x{width}"


def read_rgb(path: Path) -> np.ndarray:
    """Read an image as uint8 (H, W, 3), turned upright.

    Raises:
        UserError: not an image, damaged or truncated.
    """
    with _opened(path) as image:
        return np.asarray(ImageOps.exif_transpose(_without_alpha(image, path)).convert("RGB"))


def read_jpeg(path: Path, *, max_short_side: int) -> Jpeg:
    """Read an image as a JPEG whose shorter side is at most `max_short_side` pixels.

    A JPEG that is small enough, upright and RGB or grey keeps its bytes; everything is decoded once, so that no damaged
    image gets through.

    Raises:
        UserError: not an image, damaged or truncated.
    """
    with _opened(path) as image:
        is_upright = image.getexif().get(ORIENTATION_TAG, 1) == 1
        short_side = min(image.size)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright and short_side <= max_short_side:
            image.load()
            data = path.read_bytes()
            if len(data) <= MAX_JPEG_BYTES:
                return Jpeg(data, image.height, image.width)
        scale = min(1.0, max_short_side / short_side)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image.draft("RGB", (width, height))  # JPEGs: decode at the nearest power of two above
        small = _without_alpha(image, path).convert("RGB")
        if small.size != (width, height):
            small = small.resize((width, height), Image.Resampling.BICUBIC)
        return encode_jpeg(ImageOps.exif_transpose(_with_orientation(small, image)))


def _without_alpha(image: Image.Image, path: Path) -> Image.Image:
    """Return an image whose colours show its picture: alpha is dropped, as every decoder of a network's images does.

    Raises:
        UserError: the picture is in the alpha channel alone, as in icons: dropped, every one would be a blank.
    """
    if image.has_transparency_data:
        *colours, alpha = np.ptp(np.asarray(image.convert("RGBA")), axis=(0, 1)).tolist()
        if alpha > MAX_BLANK_RANGE >= max(colours):
            raise UserError(
                f"{path}: its picture is in the alpha channel alone, which is dropped: the colours are one and the "
                "same everywhere; put it on a background of another colour, or remove it"
            )
    return image


def encode_jpeg(image: Image.Image) -> Jpeg:
    """Encode an RGB image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, exif=b"")
    assert buffer.tell() <= MAX_JPEG_BYTES
    return Jpeg(buffer.getvalue(), image.height, image.width)


def _with_orientation(image: Image.Image, original: Image.Image) -> Image.Image:
    orientation = original.getexif().get(ORIENTATION_TAG)
    if orientation is not None:
        image.getexif()[ORIENTATION_TAG] = orientation
    return image


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> Iterator[Result]:
    """Map in threads, in order, a few items ahead; an error is raised here and ends the threads.

    Decoding and encoding release the interpreter's lock, and threads neither fork nor hang when one fails.
    """
    if num_threads <= 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 8 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
