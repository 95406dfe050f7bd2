"""The tables that `python -m ensdistill.tune` writes: what was measured, as far as it came, and the list."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from ensdistill import tune
from ensdistill.engine.launch_key import Key
from ensdistill.engine.tuning import tuner
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.measuring import Outcome
from ensdistill.engine.tuning.measuring_process import MeasuringProcess
from ensdistill.engine.tuning.table import Measured, TuningTable
from ensdistill.engine.tuning.tuner import Tuner
from ensdistill.runtime.devices import DEVICES
from ensdistill.runtime.errors import UserError


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tuned(monkeypatch: pytest.MonkeyPatch, fails_after: int | None = None) -> None:
    """A GPU and a clock that are made up."""
    count = 0

    def made_up(self: Tuner, key: Key, left: list[Candidate], deadline: float | None) -> Outcome:
        nonlocal count
        count += 1
        if count == fails_after:
            raise RuntimeError("the machine is gone")
        times = {"triton": (100.0, 0.4), "library": (120.0, 1.5)}
        return Outcome(
            measured=[
                Measured(candidate=one, microseconds=times[one.provider][0], spread=times[one.provider][1])
                for one in left
            ]
        )

    monkeypatch.setattr(Tuner, "_outcome", made_up)
    monkeypatch.setattr(MeasuringProcess, "start", lambda self: None)
    found = [Candidate(provider="triton", tile=(1, 128, 64, 64, 4, 3)), Candidate(provider="library")]
    monkeypatch.setattr(tuner, "candidates", lambda key, device: found)
    for module in (tune, tuner):
        monkeypatch.setattr(module, "installed_gpu", lambda: DEVICES["H100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = TuningTable(None, {})
    monkeypatch.setattr(TuningTable, "of_device", classmethod(lambda cls, device, fresh: table))


SMALL = ["--network", "wrn10x1", "--image-size", "8", "--batch-size", "2"]


def test_tuning_writes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned(monkeypatch)
    tune.main([*SMALL, "--csv", str(tmp_path / "table.csv")])
    rows = read_csv(tmp_path / "table.csv")
    first, second = rows[:2]
    assert (first["device"], first["network"], first["precision"]) == ("NVIDIA H100 80GB HBM3", "wrn10x1", "bf16")
    assert first["torch"] and first["triton"] and first["commit"]
    assert (first["candidate"], first["us"], first["spread_us"], first["is_chosen"]) == (
        "triton boxes 128x64x64 4w 3s", "100.0", "0.4", "1",
    )  # fmt: skip
    assert (second["candidate"], second["us"], second["is_chosen"]) == ("library loop", "120.0", "0")
    assert float(first["floor_share"]) == pytest.approx(float(first["floor_us"]) / 100, abs=1e-4)


def test_a_table_of_tuning_that_was_cut_off_has_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned(monkeypatch, fails_after=4)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        tune.main([*SMALL, "--csv", str(tmp_path / "table.csv")])
    assert len(read_csv(tmp_path / "table.csv")) == 3


def test_the_list_is_a_table_too(tmp_path: Path) -> None:
    tune.main(["--list", *SMALL, "--csv", str(tmp_path / "list.csv"), "--json", str(tmp_path / "list.json")])
    rows, entries = read_csv(tmp_path / "list.csv"), json.loads((tmp_path / "list.json").read_text())
    assert len(rows) == len(entries) and rows[0]["device"] == "H100"
    assert sum(int(row["flops"]) for row in rows) == sum(entry["flops"] for entry in entries)
    with pytest.raises(UserError, match=r"--csv /dev/null/x.csv: cannot be written"):
        tune.main(["--list", *SMALL, "--csv", "/dev/null/x.csv"])
