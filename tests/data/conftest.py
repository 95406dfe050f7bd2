"""Small `.beton` files that several tests read, and the check that nothing is left behind."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import Written, smooth_images, write

from ensdistill.data.ffcv_guards import import_ffcv


@pytest.fixture(scope="session")
def ffcv() -> None:
    """Import FFCV, which takes seconds, outside of any test's own time."""
    import_ffcv()


@pytest.fixture
def nothing_is_left(ffcv: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that no process, thread, shared memory or temporary file survives, whether writing succeeds or fails."""
    import ffcv.writer

    shared: list[str] = []

    def spy(*args: Any, **kwargs: Any) -> SharedMemory:
        memory = SharedMemory(*args, **kwargs)
        shared.append(memory.name)
        return memory

    monkeypatch.setattr(ffcv.writer.shared_memory, "SharedMemory", spy)
    yield
    assert multiprocessing.active_children() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")] == []
    assert [name for name in shared if Path("/dev/shm", name).exists()] == []
    assert [path for path in tmp_path.rglob("*.tmp")] == []


@pytest.fixture(scope="session")
def folder(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared files lie."""
    return tmp_path_factory.mktemp("feed")


@pytest.fixture(scope="session")
def arrays(folder: Path) -> Written:
    """37 images: six batches and a batch of one."""
    from ffcv.fields import IntField, NDArrayField

    images = list(np.random.default_rng(0).integers(0, 256, (37, 5, 7, 3), dtype=np.uint8))
    fields = {"pixels": NDArrayField(np.dtype(np.uint8), (5, 7, 3)), "class": IntField()}
    return write(folder / "arrays.beton", images, fields)


@pytest.fixture(scope="session")
def sizes() -> list[tuple[int, int]]:
    """Heights and widths of the images in `raw` and `jpeg`."""
    rng = np.random.default_rng(3)
    return [(int(h), int(w)) for h, w in rng.integers(17, 61, (19, 2))]


@pytest.fixture(scope="session")
def raw(folder: Path, sizes: list[tuple[int, int]]) -> Written:
    """Images of many sizes, not compressed."""
    from ffcv.fields import IntField, RGBImageField

    return write(folder / "raw.beton", smooth_images(sizes), {"image": RGBImageField("raw"), "label": IntField()})


@pytest.fixture(scope="session")
def jpeg(folder: Path, sizes: list[tuple[int, int]]) -> Written:
    """Images of many sizes, compressed."""
    from ffcv.fields import IntField, RGBImageField

    fields = {"image": RGBImageField("jpg", jpeg_quality=95), "label": IntField()}
    return write(folder / "jpeg.beton", smooth_images(sizes), fields)


@pytest.fixture(scope="session")
def mixed(folder: Path) -> Written:
    """One size, some images compressed and some not."""
    from ffcv.fields import IntField, RGBImageField

    fields = {"image": RGBImageField("proportion", compress_probability=0.5, jpeg_quality=95), "label": IntField()}
    return write(folder / "mixed.beton", smooth_images([(24, 33)] * 13), fields)
