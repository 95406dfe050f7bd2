"""Image files become RGB arrays or JPEGs of a limited size, upright; errors name the file."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import (
    distance,
    picture,
    refused,
    take,
)
from PIL import Image

from ensdistill.data import beton_file, image_files
from ensdistill.data.feed import Feed
from ensdistill.runtime.errors import UserError


def test_which_jpegs_keep_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    upright = picture(60, 90, 1)
    upright.save(file, quality=95)
    jpeg = image_files.read_stored(file, max_short_side=60)
    assert jpeg == (file.read_bytes(), 60, 90, True)
    smaller = image_files.read_stored(file, max_short_side=59)
    assert (smaller.height, smaller.width) == (59, 88)
    exif = Image.Exif()
    exif[image_files.ORIENTATION_TAG] = 6  # the camera lay on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(file, quality=95, exif=exif)
    assert image_files.image_size(file) == (60, 90)
    turned = image_files.read_stored(file, max_short_side=60)
    assert (turned.height, turned.width) == (60, 90) and turned.data != file.read_bytes()
    decoded = decode(turned)
    assert decoded.getexif().get(image_files.ORIENTATION_TAG) is None
    assert distance(np.asarray(decoded), upright) < 2
    assert distance(image_files.read_rgb(file), upright) < 2
    upright.convert("CMYK").save(file)
    assert distance(np.asarray(decode(image_files.read_stored(file, max_short_side=60))), upright) < 4
    upright.convert("P").save(tmp_path / "p.png")
    upright.convert("RGBA").save(tmp_path / "rgba.png")
    for name in ("p.png", "rgba.png"):
        assert decode(image_files.read_stored(tmp_path / name, max_short_side=60)).mode == "RGB"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_the_feed_is_given_it_decodes_to_what_the_file_shows(tmp_path: Path, num_threads: int) -> None:
    """JPEGs with bytes that were flipped, dropped, inserted or cut off: of those that PIL takes none fails later."""
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]
    paths, shown = [], []
    for n in range(120):
        buffer = io.BytesIO()
        image = picture(40, 33, n)
        (image.convert("L") if n % 7 == 0 else image).save(buffer, "JPEG", quality=85 if n % 3 else 100, **kinds[n % 4])
        data = bytearray(buffer.getvalue())
        for _ in range(n % 3):
            at = int(rng.integers(2, len(data)))
            data[at : at + int(rng.integers(2))] = rng.bytes(int(rng.integers(3)))
        if n % 10 == 9:
            data = data[: len(data) - int(rng.integers(1, 30))]
        path = tmp_path / f"{n}.jpg"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            image_files.image_size(path)
            shown.append(image_files.read_rgb(path))
            paths.append(path)
    stored = list(image_files.parallel_map(partial(image_files.read_stored, max_short_side=40), paths, num_threads))
    beton_file.write_images(tmp_path / "a.beton", stored, np.zeros(len(stored), np.int64), lambda: None)
    assert 90 < len(paths) < 120  # PIL takes most of them
    assert 20 < sum(not image.is_jpeg for image in stored) < 60  # of which the feed would refuse a third
    for n, expected in enumerate(shown):  # one at a time: their sizes may differ
        with Feed(
            tmp_path / "a.beton", indices=range(n, n + 1), batch_size=1, seed=0, shuffle=False, drop_last=False
        ) as feed:
            (images_BHWC, _), *_ = take(feed)
        found = images_BHWC[0].numpy()
        assert found.shape == expected.shape
        if stored[n].is_jpeg:
            assert distance(found, Image.fromarray(expected)) <= image_files.MAX_DECODER_DISTANCE
        else:
            assert np.array_equal(found, expected)


def test_pixels_larger_than_a_page_become_a_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    picture(60, 90, 1).save(file, quality=95, restart_marker_blocks=1)
    data = file.read_bytes()
    at = data.index(b"\xff\xd3")
    file.write_bytes(data[:at] + bytes(4) + data[at:])  # stray bytes, which PIL passes over
    stored = image_files.read_stored(file, max_short_side=60)
    assert not stored.is_jpeg and stored.data == image_files.read_rgb(file).tobytes()
    monkeypatch.setattr(image_files, "MAX_JPEG_BYTES", 3 * 60 * 90 - 1)
    stored = image_files.read_stored(file, max_short_side=60)
    assert stored.is_jpeg and distance(np.asarray(decode(stored)), Image.fromarray(image_files.read_rgb(file))) < 2


def decode(jpeg: image_files.Stored) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg.data))
    assert (image.height, image.width) == (jpeg.height, jpeg.width)
    return image


def test_a_jpeg_larger_than_a_page_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    picture(60, 90, 1).save(file, quality=100)
    monkeypatch.setattr(image_files, "MAX_JPEG_BYTES", file.stat().st_size - 1)
    assert len(image_files.read_stored(file, max_short_side=60).data) < file.stat().st_size


def test_a_truncated_jpeg_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    picture(60, 90, 1).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    refused(lambda: image_files.read_stored(file, max_short_side=60), str(file), "cannot be read", "truncated")


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 20), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for read in (image_files.read_rgb, image_files.image_size):
        refused(lambda read=read: read(tmp_path / "deep.png"), "deep.png", "more than 8 bits", "convert it")  # type: ignore[misc]


def test_a_failing_consumer_ends_the_threads() -> None:
    results = image_files.parallel_map(lambda i: i * i, range(1000), 3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_small_file_of_very_many_pixels_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (5000, 4000)).save(tmp_path / "bomb.png")
    tracemalloc.start()
    for read in (image_files.image_size, image_files.read_rgb, partial(image_files.read_stored, max_short_side=40)):
        refused(
            lambda read=read: read(tmp_path / "bomb.png"), "bomb.png: 4000x5000 pixels in", "make the image smaller"
        )  # type: ignore[misc]
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_large_photographs_and_blank_ones_are_read(tmp_path: Path) -> None:
    picture(4200, 4100, 0).save(tmp_path / "photo.jpg")
    Image.new("L", (4100, 4200), 128).save(tmp_path / "grey.jpg")
    Image.new("L", (3000, 4000), 255).save(tmp_path / "blank.png")
    for name, side in (("photo.jpg", 4100), ("grey.jpg", 4100), ("blank.png", 3000)):
        assert image_files.image_size(tmp_path / name)[1] == side
    assert image_files.read_stored(tmp_path / "photo.jpg", max_short_side=40).width == 40


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGBA"), ("png", "LA"), ("webp", "RGBA"), ("tif", "RGBA"), ("png", "P")]
)
@pytest.mark.parametrize("colour", [0, 255, 90])
def test_a_picture_that_is_in_alpha_alone_is_refused(tmp_path: Path, suffix: str, mode: str, colour: int) -> None:
    file = tmp_path / f"icon.{suffix}"
    shape = np.zeros((20, 30), np.uint8)
    shape[5:15, 8:22] = 255
    icon = Image.new("RGB", (30, 20), (colour,) * 3).convert("RGB" if mode == "P" else mode)
    icon.putalpha(Image.fromarray(shape))
    if mode == "P":
        icon = icon.quantize(4)
    icon.save(file, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    for read in (image_files.read_rgb, partial(image_files.read_stored, max_short_side=10)):
        refused(lambda read=read: read(file), "icon", "alpha channel alone", "background of another colour")  # type: ignore[misc]


def test_alpha_beside_a_picture_is_dropped(tmp_path: Path) -> None:
    file, image = tmp_path / "a.png", picture(20, 30, 1)
    alpha = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1)))
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    with_alpha.save(file)
    assert np.array_equal(image_files.read_rgb(file), np.asarray(image))
    blank = Image.new("RGBA", (30, 20), (255, 255, 255, 255))  # a blank is one with or without alpha
    blank.save(file)
    assert (image_files.read_rgb(file) == 255).all()


def test_postscript_is_not_run(tmp_path: Path) -> None:
    picture(20, 20, 0).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for read in (image_files.image_size, image_files.read_rgb):
        refused(lambda read=read: read(tmp_path / "a.png"), "a.png: a PostScript file")  # type: ignore[misc]
