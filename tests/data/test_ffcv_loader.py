"""Decoding threads end whatever happens, errors reach the consumer, and nothing is compiled twice."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import (
    BATCH,
    Written,
    decode_threads,
    feed_of,
    random_resized,
    same,
    stored_regions,
    take,
    within,
)

from ensdistill.runtime.errors import UserError


def test_two_feeds_and_two_epochs_at_once(arrays: Written, jpeg: Written) -> None:
    feeds = [
        feed_of(arrays, cache="none"),
        random_resized(jpeg, num_workers=2),
        random_resized(jpeg, num_workers=1, seed=3),
    ]
    expected = {(i, epoch): take(feed, epoch) for i, feed in enumerate(feeds) for epoch in (0, 1)}
    open_epochs = {(i, epoch): feeds[i].epoch(epoch) for i, epoch in expected}
    got: dict[tuple[int, int], list] = {key: [] for key in expected}
    for _ in range(7):
        for key, batches in open_epochs.items():
            got[key].extend([batch] if (batch := next(batches, None)) else [])
    assert all(next(batches, None) is None for batches in open_epochs.values())
    assert all(same(got[key], expected[key]) for key in expected)
    assert decode_threads() == []


@pytest.mark.parametrize("leave", ["close", "with", "drop", "feed"])
def test_leaving_early_ends_the_thread(arrays: Written, leave: str) -> None:
    feed = feed_of(arrays, cache="none", batch_size=1)

    def leave_early() -> None:
        batches = feed.epoch(0)
        for _ in batches:
            break
        assert len(decode_threads()) == 1
        if leave == "close":
            batches.close()
            batches.close()
            assert next(batches, None) is None
        elif leave == "with":
            with batches:
                pass
        elif leave == "feed":
            with feed:
                pass
            assert next(batches, None) is None
        else:
            del batches
            gc.collect()
        assert decode_threads() == []

    for _ in range(3):
        within(20, leave_early)


def test_torch_keeps_its_threads(arrays: Written) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            feed = feed_of(arrays, cache="none", num_workers=2)
            assert torch.get_num_threads() == count
            with feed.epoch(0) as batches:
                for _ in batches:
                    assert torch.get_num_threads() == count
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_later_epochs_and_feeds_compile_nothing(jpeg: Written, mixed: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import event

    from ensdistill.data import ffcv_loader

    monkeypatch.setattr(ffcv_loader, "_stages", {})
    feed, other = random_resized(jpeg, num_workers=2), random_resized(mixed, num_workers=2, image_size=13)
    with event.install_recorder("numba:compile") as first:
        take(feed, 0)
    with event.install_recorder("numba:compile") as second:
        take(feed, 1)
        take(feed, 1, first_step=3)
    with event.install_recorder("numba:compile") as third:
        take(other, 0)
    assert len(first.buffer) > 0 and len(second.buffer) == 0 and len(third.buffer) == 0


def test_numbas_types_stay_as_they_are(arrays: Written) -> None:
    import numba

    vector, function = numba.uint8[::1], numba.njit(lambda x: x.sum())
    function(np.arange(3, dtype=np.uint8))
    take(feed_of(arrays, cache="none"))
    assert vector.mutable and numba.uint8[::1] is vector
    assert all(signature in function.overloads for signature in function.signatures)


def test_ffcvs_own_iteration_goes_epoch_by_epoch(arrays: Written) -> None:
    feed = feed_of(arrays, cache="none")
    expected = [take(feed, epoch) for epoch in (0, 1)]
    assert feed._loader is not None
    assert same(list(feed._loader), expected[0]) and same(list(feed._loader), expected[1])


def test_an_exception_in_the_thread_reaches_the_consumer(jpeg: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = random_resized(jpeg)
    real = feed._boxes

    def boxes(indices: np.ndarray, epoch: int) -> np.ndarray:
        if len(indices) < BATCH:
            raise ZeroDivisionError("the last batch went wrong")
        return real(indices, epoch)

    monkeypatch.setattr(feed, "_boxes", boxes)

    def consume() -> None:
        batches, count = feed.epoch(0), 0
        with pytest.raises(ZeroDivisionError, match="the last batch went wrong"):
            for _ in batches:
                count += 1
        assert count == 3 and next(batches, None) is None

    within(60, consume)
    assert decode_threads() == []


@pytest.mark.parametrize("crop", ["random-resized", "center"])
@pytest.mark.parametrize("damage", ["zeros", "cut"])
def test_a_damaged_jpeg_names_file_and_image(jpeg: Written, tmp_path: Path, crop: str, damage: str) -> None:
    content = bytearray(jpeg.path.read_bytes())
    start, size = stored_regions(jpeg.path)[13]
    first = 0 if damage == "zeros" else size // 2
    content[start + first : start + size] = bytes(size - first)
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)

    def consume() -> None:
        feed = feed_of(Written(path, [], jpeg.labels), crop=crop, image_size=21)
        with pytest.raises(UserError, match=r"damaged\.beton: image 13 is a damaged JPEG"):
            take(feed)

    within(60, consume)
    assert decode_threads() == []
    healthy = feed_of(Written(path, [], jpeg.labels), crop=crop, image_size=21, indices=range(13))
    assert len(take(healthy)) == 3


_LEFT_OPEN = """
import os, sys
from ensdistill.data.feed import Feed
feed = Feed(sys.argv[1], batch_size=2, seed=0, shuffle=True, drop_last=False, cache="none")
kept = feed.epoch(0)
next(kept)
kept.itself = kept  # only the end of Python drops it
if (child := os.fork()) == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_an_epoch_that_is_left_open_ends_with_the_process_and_its_fork(arrays: Written) -> None:
    ended = subprocess.run([sys.executable, "-c", _LEFT_OPEN, arrays.path], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_thread_that_could_not_be_made_is_dropped_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    from ensdistill.data.ffcv_loader import WorkerThread

    WorkerThread.__new__(WorkerThread).__del__()
    assert capsys.readouterr().err == ""
