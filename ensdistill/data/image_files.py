"""Image files: decoded to arrays, or made into what a .beton stores of them, with errors that name the file."""

from __future__ import annotations

import io
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill.data.ffcv_guards import import_ffcv
from ensdistill.runtime.errors import UserError

JPEG_QUALITY = 90
MAX_JPEG_BYTES = 1 << 23  # one page of a .beton
MAX_PIXELS, ORDINARY_PIXELS, MAX_PIXELS_A_BYTE = 1 << 27, 1 << 24, 100
"""Limits of what is decoded: pixels of an image, and above some 4096x4096 pixels a byte of its file.

A photograph has 1 to 20 pixels a byte, a grey JPEG 85. Whoever packs more has made a file to fill memories.
"""
MAX_BLANK_RANGE = 16
"""Levels, of 256, between the darkest and the brightest pixel of what shows nothing."""
MAX_DECODER_DISTANCE = 3.0
"""Levels, of 256, by which a whole image may differ, on average, between the feed's decoder and PIL's.

The feed's takes the faster of libjpeg's transforms, which is off by up to 2.4 levels up to quality 95, and by 4 to 12
at quality 100; of a damaged file either decoder makes what it can.
"""
ORIENTATION_TAG = 0x0112
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stored(NamedTuple):
    """An image as a `.beton` stores it."""

    data: bytes
    """A JPEG that decodes to RGB, or the pixels (H, W, 3) themselves."""
    height: int
    width: int
    is_jpeg: bool = True


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


def read_stored(path: Path, *, max_short_side: int) -> Stored:
    """Read an image as a `.beton` stores it, its shorter side at most `max_short_side` pixels.

    A JPEG that is small enough, upright and RGB or grey keeps its bytes, if the feed decodes them to the image that it
    shows everywhere else; otherwise its pixels are stored. All others become JPEGs. Everything is decoded once, so that
    no damaged image gets through.

    Raises:
        UserError: not an image, damaged or truncated.
    """
    with _opened(path) as image:
        is_upright = image.getexif().get(ORIENTATION_TAG, 1) == 1
        short_side = min(image.size)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright and short_side <= max_short_side:
            pixels_HWC = np.asarray(image.convert("RGB"))
            data = path.read_bytes()
            if len(data) <= MAX_JPEG_BYTES and _feed_shows(data, pixels_HWC):
                return Stored(data, image.height, image.width)
            if pixels_HWC.nbytes <= MAX_JPEG_BYTES:
                return Stored(pixels_HWC.tobytes(), image.height, image.width, is_jpeg=False)
        scale = min(1.0, max_short_side / short_side)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image.draft("RGB", (width, height))  # JPEGs: decode at the nearest power of two above
        small = _without_alpha(image, path).convert("RGB")
        if small.size != (width, height):
            small = small.resize((width, height), Image.Resampling.BICUBIC)
        return encode_jpeg(ImageOps.exif_transpose(_with_orientation(small, image)))


def feed_decodes(data: np.ndarray, pixels_HWC: np.ndarray) -> bool:
    """Decode a JPEG, uint8 (bytes,), to uint8 (H, W, 3) as the feed does; False where the feed refuses it.

    The feed's decoder takes every warning for an error, such as of stray bytes, which others pass over.
    """
    import_ffcv()
    from ffcv.libffcv import imdecode

    height, width, _ = pixels_HWC.shape
    return imdecode(data, pixels_HWC.reshape(-1), height, width, height, width, 0, 0, 1, 1, False, False) == 0


def _feed_shows(data: bytes, pixels_HWC: np.ndarray) -> bool:
    """Tell whether the feed decodes a JPEG to these pixels, uint8 (H, W, 3), up to the rounding of its decoder."""
    decoded_HWC = np.zeros_like(pixels_HWC)
    if not feed_decodes(np.frombuffer(data, np.uint8), decoded_HWC):
        return False
    distance_HWC = np.maximum(decoded_HWC, pixels_HWC) - np.minimum(decoded_HWC, pixels_HWC)
    return float(distance_HWC.mean()) <= MAX_DECODER_DISTANCE


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


def encode_jpeg(image: Image.Image) -> Stored:
    """Encode an RGB image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, exif=b"")
    assert buffer.tell() <= MAX_JPEG_BYTES
    return Stored(buffer.getvalue(), image.height, image.width)


def _with_orientation(image: Image.Image, original: Image.Image) -> Image.Image:
    orientation = original.getexif().get(ORIENTATION_TAG)
    if orientation is not None:
        image.getexif()[ORIENTATION_TAG] = orientation
    return image


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
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
