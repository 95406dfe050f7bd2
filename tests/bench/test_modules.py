"""The part `modules`: networks without kernels, as they are and compiled, with the way that each took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import __main__
from bench.harness.rows import read_rows
from bench.parts import modules
from ensdistill.engine import module_passes
from ensdistill.models import build
from ensdistill.runtime.errors import UserError

TINY = ["--batch=2", "--size=32", "--members=2", "--rounds=3", "--threads=1", "--device=cpu", "--parts=modules"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modules, "NETWORKS", ("small", "smaller"))

    def drawn(name: str, K: int, size: int, seed: int) -> torch.nn.Module:
        return build("wrn10x1", num_classes=K, image_size=size, seed=seed)

    monkeypatch.setattr(modules, "timm_network", drawn)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(tmp_path: Path) -> tuple[int, dict[tuple[str, str], str]]:
    """The exit code, and the notes by network and provider of the rows that have a time."""
    code = __main__.main([*TINY, f"--out={tmp_path}"])
    return code, {(row.network, row.provider): row.note for row in read_rows(tmp_path / "modules.csv") if row.n == 3}


def test_every_network_is_timed_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_passes, "compiled", lambda function: function)
    code, notes = measured(tmp_path)
    assert code == 0
    assert notes.keys() == {(name, way) for name in ("small", "smaller") for way in ("modules", "compiled")}
    assert notes["small", "modules"] == "" and notes["small", "compiled"].endswith(" s, within 0e+00")


def test_what_cannot_be_compiled_has_no_time_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_passes, "compiled", lambda function: lambda *args: 1.5 * function(*args))
    code, notes = measured(tmp_path)
    assert code == 1 and notes.keys() == {("small", "modules"), ("smaller", "modules")}
    failed = [row.note for row in read_rows(tmp_path / "modules.csv") if row.provider == "compiled"]
    assert all(
        note.startswith("failed: compile: yes, but the step cannot be compiled: compiled steps") for note in failed
    )


def test_the_part_is_measured_by_name_alone() -> None:
    assert "modules" not in __main__.Arguments().parts.split(",") and "modules" in __main__.PARTS


def test_images_that_are_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size: got 16, expected at least 32"):
        __main__.main([*TINY, "--size=16", f"--out={tmp_path}"])
