"""What a training's modules are computed by: asked for, measured once for its kind, kept by whoever goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from ensdistill import fast_train
from ensdistill.engine import module_passes
from ensdistill.run import computing
from ensdistill.run.computing import compiling, require_compiler, write_passes
from ensdistill.runtime.errors import UserError, run_main

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def record(folder: Path, compiled: bool, *, begun: bool = False) -> Path:
    folder.mkdir()
    trial: Any = SimpleNamespace(captured=False, compiled=compiled, facts={"not_captured": "it asks"})
    write_passes(folder, trial)
    if begun:
        (folder / "checkpoint.pt").touch()
    return folder


def test_what_is_asked_for_counts_and_by_default_a_cpu_compiles_nothing(tmp_path: Path) -> None:
    assert compiling(None, tmp_path, [], CPU) == "no"
    assert compiling(None, tmp_path, [], GPU) == "auto"
    for asked in ("auto", "yes", "no"):
        assert compiling(asked, tmp_path, [], CPU) == asked


def test_auto_follows_what_was_chosen_for_its_kind(tmp_path: Path) -> None:
    one, other, missing = record(tmp_path / "0", True), record(tmp_path / "1", False), tmp_path / "2"
    assert compiling("auto", missing, [missing, one], CPU) == "yes"
    assert compiling("auto", missing, [other, one], GPU) == "no"
    assert compiling("no", missing, [one], CPU) == "no"
    assert json.loads((one / "passes.json").read_text())["not_captured"] == "it asks"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_training_that_was_begun_is_gone_on_with_as_it_was(compiled: bool, tmp_path: Path) -> None:
    folder = record(tmp_path / "0", compiled, begun=True)
    kept, other = ("yes", "no") if compiled else ("no", "yes")
    for asked in (None, "auto", kept):
        assert compiling(asked, folder, [record(tmp_path / f"of {asked}", not compiled)], GPU) == kept  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"compiled, got --compile {other}; go on with --compile {kept}"):
        compiling(other, folder, [], CPU)  # type: ignore[arg-type]


def test_a_training_of_an_earlier_version_was_not_compiled(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").touch()
    assert compiling(None, tmp_path, [], GPU) == "no"
    with pytest.raises(UserError, match="was begun uncompiled, got --compile yes"):
        compiling("yes", tmp_path, [], GPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"compiled": 1}'])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "passes.json").write_text(text)
    with pytest.raises(UserError, match=r"passes\.json: .*delete"):
        compiling("auto", tmp_path, [], CPU)


def test_without_a_compiler_yes_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: none found\nmore")

    monkeypatch.setattr(computing, "compiled", broken)
    with pytest.raises(UserError, match=r"not work here \(RuntimeError: InvalidCxxCompiler: none found\); install"):
        require_compiler(CPU)


def test_a_run_keeps_how_its_passes_were_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (computing, module_passes):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    few = "--train-images 32 --teacher.epochs 1 --teacher.warmup-epochs 0 --teacher.batch-size 16 --precision fp32"
    command = (
        f"--student.batch-size 16 --stage teachers --members 2 --threads 1 --out {tmp_path / 'run'} {few} --compile yes"
    )
    with mock.patch.object(sys, "argv", ["fast_train", *command.split()]):
        assert run_main(fast_train.main) == 0
    out = capsys.readouterr().out
    assert out.count("PyTorch's modules compute a part of the step, which is compiled by torch.compile") == 1
    for teacher in "01":
        values = json.loads((tmp_path / "run" / "teachers" / teacher / "passes.json").read_text())
        assert values["compiled"] and not values["captured"] and values["compiled_within"] == 0.0
