"""Measuring who computes a convolution, the file of choices, and the command that prints both."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ensdistill import tune
from ensdistill.config.methods import Method
from ensdistill.costs.dry_run import operations_of
from ensdistill.costs.floor import step_parts
from ensdistill.costs.network import network_cost
from ensdistill.engine.launch_key import Key
from ensdistill.engine.operations import TunedOperations
from ensdistill.engine.tuning import table as table_module
from ensdistill.engine.tuning import tuner
from ensdistill.engine.tuning.candidates import Candidate, arguments, candidates, difference
from ensdistill.engine.tuning.measuring import Outcome, measure
from ensdistill.engine.tuning.measuring_process import MeasuringProcess
from ensdistill.engine.tuning.table import Choice, Failure, Measured, TuningTable
from ensdistill.engine.tuning.tuner import Tuner
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.models import build
from ensdistill.runtime.devices import DEVICES
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.files import cache_folder

ROOT = Path(__file__).resolve().parents[2]
H100 = DEVICES["H100"]
TRITON, LOOP = Candidate(provider="triton", tile=(1, 128, 64, 64, 4, 3)), Candidate(provider="library")
GROUPED = Candidate(provider="library", grouped=True)
_POOLS = ("max_pool", "max_pool_gradient")


def make_key(op: str = "forward", **changes: object) -> Key:
    fields = {"E": 2, "M": 2, "B": 1, "H": 5, "W": 6, "CI": 16, "CO": 16, "k": 3, "stride": 1, "dtype": "bf16"}
    fields |= {"out_dtype": "fp32" if op == "weight gradient" else "bf16"} | changes
    return Key(op=op, **fields)  # type: ignore[arg-type]


def took(candidate: Candidate, microseconds: float) -> Measured:
    return Measured(candidate=candidate, microseconds=microseconds, spread=0.5)


def make_choice(microseconds: float = 100.0) -> Choice:
    return Choice.of(make_key(), [took(LOOP, 120.0), took(TRITON, microseconds), took(GROUPED, 300.0)], H100)


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_every_layer_of_imagenet_s_resnet50_is_listed() -> None:
    """22 F of 23.03 TFLOP, less the student's gradient of the images, which its training does not need."""
    recorded = operations_of(
        "resnet50",
        method=Method.parse("latentbe+tdiv-sdiv"),
        E=4,
        B=128,
        image_size=224,
        num_classes=1000,
        precision="bf16",
    )
    assert recorded.notes == []
    stem = 2 * 4 * 128 * 112 * 112 * 49 * 3 * 64
    flops = sum(count * key.flops for key, count in recorded.keys.items())
    assert flops == pytest.approx(23030.3e9 - stem, rel=1e-4)
    # what passes move depends on tiles, which are others in the interpreter
    floor = sum(count * key.floor(H100) for key, count in recorded.keys.items())
    said = " ".join((ROOT / "docs/kernels.md").read_text().split())
    assert f"is {flops / 1e12:.1f} TFLOP" in said and f"which convolutions are {1e3 * floor:.1f} ms" in said
    pools = {name: sum(n for one, n in recorded.passes.items() if one.name == name) for name in _POOLS}
    assert pools == {"max_pool": 3, "max_pool_gradient": 2}
    assert {one.shape for one in recorded.passes if one.name in _POOLS} == {"64 @ 112x112"}


def test_triton_is_chosen_only_where_it_is_not_slower() -> None:
    assert make_choice(100.0).candidate == TRITON
    assert make_choice(120.0).candidate == TRITON
    assert make_choice(120.1).candidate == LOOP
    choice = make_choice(130.0)
    assert [one.candidate for one in choice.measured] == [LOOP, TRITON, GROUPED]
    assert choice.floor_share == pytest.approx(1e6 * make_key().floor(H100) / 120.0)
    assert Choice.of(make_key(), [took(LOOP, 1.0)], None).floor_share is None


def test_candidates_say_what_they_are() -> None:
    assert [str(one) for one in (TRITON, LOOP, GROUPED, Candidate(provider="triton"))] == [
        "triton boxes 128x64x64 4w 3s",
        "library loop",
        "library grouped",
        "triton",
    ]
    assert str(Candidate(provider="triton", tile=(0, 256, 64, 64, 8, 3, 12))) == "triton pointers 256x64x64 8w 3s /12"
    assert str(Candidate(provider="triton", tile=(5, 128, 64, 64, 4, 3))) == "triton patches 128x64x64 4w 3s"


def test_the_image_s_gradient_has_candidates_by_patches_and_by_parities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    key = make_key("input gradient", shared=True, present=("scale",), B=96, H=224, W=224, CI=3, CO=64, k=7, stride=2)
    forms = [one.tile[0] for one in candidates(key, torch.device("meta")) if one.provider == "triton"]
    assert forms[0] == tiles.PATCHES and tiles.POINTERS in forms
    masked = make_key("input gradient", present=("bits",), B=96, H=224, W=224, CI=3, CO=64, k=7, stride=2)
    assert {one.tile[0] for one in candidates(masked, torch.device("meta")) if one.tile} == {tiles.POINTERS}


@pytest.mark.parametrize("op", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("shared", [False, True])
def test_both_forms_of_the_library_are_candidates_of_every_shape(op: str, shared: bool, device: torch.device) -> None:
    found = candidates(make_key(op, shared=shared), device)
    assert found[-2:] == [LOOP, GROUPED]
    assert len(found) > 2 and all(one.provider == "triton" and one.tile for one in found[:-2])


@pytest.mark.parametrize(
    "key",
    [
        make_key(present=("bias", "relu", "residual", "sums"), bits=1),
        make_key(shared=True, members=True, M=3, present=("no y", "prologue", "second"), stride=2),
        make_key("input gradient", present=("after", "before", "bits", "scale")),
        make_key("input gradient", present=("norm",), k=1),
        make_key("input gradient", shared=True, dtype="fp32", out_dtype="fp32"),
        make_key("weight gradient", present=("prologue",)),
        make_key("weight gradient", shared=True, stride=2),
        make_key(shared=True, present=("bias", "relu"), bits=1, k=7, CI=3, stride=2),
        make_key("input gradient", shared=True, present=("scale",), out_dtype="fp32", k=7, CI=3, stride=2),
        make_key("weight gradient", shared=True, k=7, CI=3, stride=2),
    ],
    ids=str,
)
def test_every_candidate_is_right_and_measured(key: Key, device: torch.device) -> None:
    outcome = measure(key, candidates(key, device), device, rounds=2)
    assert outcome.rejected == {}
    assert {one.candidate for one in outcome.measured} == set(candidates(key, device))
    assert all(one.microseconds > 0 and one.spread >= 0 for one in outcome.measured)


def test_a_wrong_kernel_is_no_candidate(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    key = make_key(present=("second", "sums"), bits=2)
    run = Candidate.run

    def wrong(field: str) -> None:
        def altered(self: Candidate, *args: object) -> object:
            out = run(self, *args)  # type: ignore[arg-type]
            if self.provider == "library" and not self.grouped:
                return out
            value = getattr(out, field)
            return out._replace(**{field: ~value if value.dtype == torch.uint8 else value * 1.1})

        monkeypatch.setattr(Candidate, "run", altered)

    for field, message in (("y", "relative error 0.1"), ("sums", "relative error 0.1"), ("bits", "100.0% of the bits")):
        wrong(field)
        outcome = measure(key, candidates(key, device), device, rounds=1)
        assert [one.candidate for one in outcome.measured] == [LOOP]
        assert all(reason.startswith(message) for reason in outcome.rejected.values())
        assert {*outcome.rejected, LOOP} == set(candidates(key, device))


def test_a_kernel_that_does_not_fit_the_device_is_no_candidate(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from triton.runtime.errors import OutOfResources

    run = Candidate.run

    def refused(self: Candidate, *args: object) -> object:
        if self.provider == "triton":
            raise OutOfResources(300_000, 232_448, "shared memory")
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Candidate, "run", refused)
    outcome = measure(make_key(), candidates(make_key(), device), device, rounds=1)
    assert all(one.candidate.provider == "library" for one in outcome.measured)
    assert all("shared memory, Required: 300000" in reason for reason in outcome.rejected.values())


def test_what_finds_no_memory_is_neither_measured_nor_rejected(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    run = Candidate.run

    def full(self: Candidate, *args: object) -> object:
        if self == GROUPED:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Candidate, "run", full)
    outcome = measure(make_key(), [GROUPED, LOOP], device, rounds=1)
    assert [one.candidate for one in outcome.measured] == [LOOP] and not outcome.rejected


def test_results_that_are_not_numbers_are_wrong() -> None:
    key, truth = make_key("weight gradient"), torch.ones(2, 3)
    assert difference(truth * 1.001, truth, key) is None
    assert difference(truth * float("nan"), truth, key) == "relative error nan"
    assert difference((truth, None), (truth, truth), key) == "another number of results"


def test_arguments_are_random_and_repeat(device: torch.device) -> None:
    key = make_key(present=("bias", "prologue", "residual"))
    (x, w), options = arguments(key, device, seed=1)
    (again, _), _ = arguments(key, device, seed=1)
    (other, _), _ = arguments(key, device, seed=2)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.float().std() == pytest.approx(1, abs=0.2) and options["residual"].dtype == torch.bfloat16
    assert w.float().std() == pytest.approx((9 * 16) ** -0.5, rel=0.2) and options["bias"].shape == (2, 16)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_choices_come_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    table = TuningTable(path, {"sources": "a"})
    assert table.get(make_key()) is None and not path.exists()
    table.put(make_key(), make_choice())
    table.put(make_key(B=3), Choice.of(make_key(), [took(GROUPED, 1.0)], None))
    again = TuningTable(path, {"sources": "a"})
    assert again.get(make_key()) == make_choice()
    assert again.get(make_key(B=3)) == Choice.of(make_key(), [took(GROUPED, 1.0)], None)
    assert again.get(make_key(B=4)) is None and len(again) == 2
    assert len(TuningTable(path, {"sources": "a"}, fresh=True)) == 0


def test_what_failed_is_remembered_by_key_and_form(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = TuningTable(path, {"sources": "a"})
    rows = Candidate(provider="triton", tile=(2, 128, 64, 64, 8, 3))
    table.put_failure(make_key(), TRITON, Failure(reason="its process ended with SIGABRT", crashed=True))
    table.put_failure(make_key(), rows, Failure(reason="relative error 0.1"))
    again = TuningTable(path, {"sources": "a"})
    assert again.failure(make_key(), TRITON) == Failure(reason="its process ended with SIGABRT", crashed=True)
    assert again.failure(make_key(), rows) == Failure(reason="relative error 0.1")
    assert again.failure(make_key(), LOOP) is None and again.failure(make_key(B=2), TRITON) is None
    # another process's choices and failures stay
    other = TuningTable(path, {"sources": "a"})
    other.put(make_key(B=5), make_choice())
    again.put_failure(make_key(B=2), TRITON, Failure(reason="no answer in 60 s", crashed=True))
    found = TuningTable(path, {"sources": "a"})
    assert found.get(make_key(B=5)) == make_choice()
    # a form that crashed at two layers is not tried at a third, by any tile; that of wrong numbers is
    boxes = Candidate(provider="triton", tile=(1, 64, 64, 64, 4, 3))
    third = found.failure(make_key(B=3), boxes)
    assert third is not None and third.crashed and "2 other layers" in third.reason
    assert found.failure(make_key(B=3), rows) is None and found.failure(make_key("weight gradient"), boxes) is None
    assert TuningTable(path, {"sources": "a"}, fresh=True).failure(make_key(), TRITON) is None
    # measured after all: forgotten
    fresh = TuningTable(path, {"sources": "a"}, fresh=True)
    fresh.put(make_key(), make_choice())
    assert TuningTable(path, {"sources": "a"}).failure(make_key(), TRITON) is None


def test_more_candidates_are_compared_at_the_same_clock() -> None:
    """Timed again the choice takes twice as long as before, and so do those that were timed beside it."""
    key = make_key()
    slower = Candidate(provider="triton", tile=(1, 64, 64, 64, 4, 3))
    before = Choice.of(key, [took(TRITON, 100.0), took(slower, 104.0)], H100)
    choice = before.with_more(key, [took(TRITON, 200.0), took(LOOP, 205.0)], H100)
    assert [(one.candidate, one.microseconds) for one in choice.measured] == [
        (TRITON, 200.0), (LOOP, 205.0), (slower, 208.0),
    ]  # fmt: skip
    assert before.with_more(key, [took(TRITON, 200.0), took(LOOP, 195.0)], H100).candidate == LOOP


def test_changed_sources_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    TuningTable(path, {"sources": "a"}).put(make_key(), make_choice())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = TuningTable(path, {"sources": "b"})
        assert len(changed) == 0
        changed.put(make_key(B=3), make_choice())
    assert json.loads(path.read_text())["sources"] == "b"
    assert len(TuningTable(path, {"sources": "b"})) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 2, "sources": "a", "choices": {',
        b"[1, 2]",
        b"\xff\xfe",
        b'{"format": 2, "sources": "a"}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": 3}}}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": {"provider": "nobody", "tile": []}, '
        b'"measured": [], "floor_share": null}}}',
        b'{"format": 2, "sources": "a", "choices": {}}',
        b'{"format": 2, "sources": "a", "choices": {}, "failures": {"x": {"y": {"reason": 3, "crashed": true}}}}',
        b'{"format": 2, "sources": "a", "choices": {}, "failures": {"x": {"y": {"reason": "a", "crashed": "no"}}}}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": {"provider": "triton", "tile": []}, '
        b'"measured": [], "floor_share": null}}, "failures": {}}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": {"provider": "triton", "tile": []}, "measured": '
        b'[{"candidate": {"provider": "triton", "tile": []}, "microseconds": "nan", "spread": 1}], '
        b'"floor_share": null}}, "failures": {}}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": {"provider": "triton", "tile": [9, 1, 2]}, '
        b'"measured": [], "floor_share": null}}, "failures": {}}',
        b'{"format": 2, "sources": "a", "choices": {"x": {"candidate": {"provider": "triton", "tile": []}, "measured": '
        b'[{"candidate": {"provider": "triton", "tile": []}, "microseconds": 1' + b"0" * 400 + b', "spread": 1}], '
        b'"floor_share": null}}, "failures": {}}',
        b'{"format": 2, "sources": "a", "choices": {}, "failures": {}, "sha256": "of something else"}',
        b"[" * 100_000,
    ],
)
def test_a_broken_file_is_said_once_and_rewritten(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = TuningTable(path, {"sources": "a"})
        table.put(make_key(), make_choice())
    assert len(caught) == 1 and "is not a table of ours and will be rewritten" in str(caught[0].message)
    assert TuningTable(path, {"sources": "a"}).get(make_key()) == make_choice()


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = TuningTable(tmp_path / "file" / "table.json", {})
    with pytest.warns(UserWarning, match="choices are not kept"):
        table.put(make_key(), make_choice())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.put(make_key(B=3), make_choice())
    assert table.get(make_key()) == table.get(make_key(B=3)) == make_choice()


def _put_many(path: Path, first: int) -> None:
    table = TuningTable(path, {})
    for B in range(first, first + 20):
        table.put(make_key(B=B), make_choice())


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_put_many, args=(path, 1 + 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = TuningTable(path, {})
    # the last to write had read some of the others'; what it missed is measured again
    assert 20 <= len(found) <= 60 and [*tmp_path.iterdir()] == [path]


def test_another_process_s_choices_stay(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    one, other = TuningTable(path, {}), TuningTable(path, {})
    one.put(make_key(B=1), make_choice(1.0))
    other.put(make_key(B=2), make_choice(2.0))
    one.put(make_key(B=2), make_choice(3.0))
    found = TuningTable(path, {})
    assert found.get(make_key(B=1)) == make_choice(1.0) and found.get(make_key(B=2)) == make_choice(3.0)


def test_the_table_of_a_device_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ENSDISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "ensdistill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ensdistill"
    monkeypatch.setenv("ENSDISTILL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(table_module, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(table_module.triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    table = TuningTable.of_device(torch.device("cuda"))
    name = "NVIDIA_H100_80GB_HBM3-580.65.06-torch2.11.0_cu130-triton3.6.0.json"
    assert table.path == tmp_path / "own" / "tuning" / name
    assert table.identity["device"] == "NVIDIA H100 80GB HBM3"
    assert re.fullmatch(r"[0-9a-f]{16}", table.identity["sources"])


def test_warnings_of_a_command_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    assert run_main(lambda: None) == 0
    assert (
        warnings.formatwarning("tuning: left out", UserWarning, "file.py", 3, "code") == "warning: tuning: left out\n"
    )


# ---- the command ---------------------------------------------------------------------------------------------------


def run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run_main(lambda: tune.main(command.split()))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_convolution_of_a_step_is_listed() -> None:
    """22 F, as roofline.py counts them: 4.76 TFLOP a step; the student's training needs no gradient of the images."""
    recorded = operations_of(
        "wrn28x4", method=Method.parse("latentbe+tdiv-sdiv"), E=4, B=128, image_size=32, precision="bf16"
    )
    flops = sum(count * key.flops for key, count in recorded.keys.items())
    stem = 2 * 4 * 128 * 32 * 32 * 9 * 3 * 16
    assert flops == pytest.approx(4762.5e9 - stem, rel=1e-4)
    assert {key.dtype for key in recorded.keys} == {"bf16"}
    assert {one.name for one in recorded.passes} >= {
        "batch_norm_backward",
        "global_pool",
        "member_weights",
        "member_weights_gradient",
    }


def test_hydra_s_convolutions_are_those_that_the_floor_counts() -> None:
    """Its trunk runs once for all heads, in training as in the perturbation."""
    method, B = Method.parse("hydra+tdiv-sdiv"), 128
    recorded = operations_of("wrn16x2", method=method, E=4, B=B, image_size=32, precision="bf16")
    assert recorded.notes == []
    flops = sum(count * key.flops for key, count in recorded.keys.items())
    cost = network_cost(build("wrn16x2", num_classes=100), in_channels=3, image_size=32)
    stem = 2 * B * 32 * 32 * 9 * 3 * 16  # training needs no gradient of the images
    assert flops == sum(part.flops(B) for part in step_parts(cost, [cost] * 4, method)) - stem


@pytest.mark.parametrize("network", ["wrn10x1", "resnet20"])
def test_both_forms_of_the_library_agree_on_all_convolutions_of_hydra(network: str, device: torch.device) -> None:
    """What heads read of their trunk, and give back to it, is what no other step has."""
    method = Method.parse("hydra+tdiv-sdiv")
    keys = operations_of(network, method=method, E=2, B=2, image_size=8, num_classes=5, precision="fp32").keys
    between = {(key.op, key.shared) for key in keys if key.E == 2 and key.CI == 32 and key.CO == 64}
    assert ("forward", True) in between and (network == "wrn10x1" or ("input gradient", True) in between)
    for key in keys:
        given = arguments(key, device, seed=0)
        loop, grouped = (candidate.run(key, *given) for candidate in (LOOP, GROUPED))
        assert difference(grouped, loop, key) is None, key


@pytest.mark.parametrize("method", ["ce", "kd", "kd+confods", "latentbe+tdiv", "be", "hydra+tdiv-sdiv"])
def test_every_method_is_listed(method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    command = f"--list --network resnet20 --image-size 8 --batch-size 2 --teachers 2 --method {method} --json {path}"
    code, out, err = run(command, capsys)
    assert code == 0 and not err
    assert "3x3/1 16→16 @ 8x8" in out and "all convolutions" in out
    rows = json.loads(path.read_text())
    assert all(row["flops"] > 0 and row["bytes"] > 0 and row["floor_seconds"] > 0 and row["a_step"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "tune: measuring needs an NVIDIA GPU that PyTorch sees; --list prints the layers without one"),
        ("--list --batch-size 0", "--batch-size: got 0, expected at least 1; give a positive number"),
        ("--list --precision fp8", "--precision: got fp8, expected auto, fp32 or bf16; choose one of them"),
        ("--list --network resnet19", "network 'resnet19': no such network"),
        ("--list --method kd+sdiv", "method: no data is called 'sdiv'"),
        ("--list --image-size 100000000", "--image-size: got 100000000, expected at most 65536; give a smaller number"),
        ("--list --image-size 16384", "a batch of 128, 16384 pixels: x: expected fewer than 2^31 elements a member"),
        ("--list --teachers 1", "--teachers: latentbe+tdiv-sdiv compares two of them, got 1; give 2 or more"),
        ("--markdown", "--markdown: a form of --list; give both"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 1


def test_the_command_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "ensdistill.tune", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0 and "--list" in found.stdout and "--fresh" in found.stdout


def test_choices_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command with a clock that is made up."""
    measured = []

    def made_up(self: Tuner, key: Key, left: list[Candidate], deadline: float | None) -> Outcome:
        measured.append((key, left[0].provider))
        if left[0].provider == "library":
            return Outcome(measured=[took(LOOP, 120.0), took(GROUPED, 300.0), took(left[-1], 100.0)])
        return Outcome(measured=[took(one, 100.0 + i) for i, one in enumerate(left)])

    table = TuningTable(tmp_path / "table.json", {})
    on_made_up_gpu(monkeypatch, table, made_up)
    command = f"--network wrn10x1 --image-size 8 --batch-size 2 --json {tmp_path / 'out.json'}"
    code, out, _ = run(command, capsys)
    assert code == 0 and measured
    assert "NVIDIA H100 80GB HBM3; floor: 800 TFLOP/s, 3 TB/s (measured); kept in" in out
    row = next(line for line in out.splitlines() if "16→16" in line)
    assert "100.0 ±0.2" in row and "120.0 ±0.2" in row and "triton pointers" in row
    rows = json.loads((tmp_path / "out.json").read_text())
    count = sum(entry["a_step"] for entry in rows)
    assert f"{120 * count}" in out.splitlines()[-1] and f"{100 * count} µs" in out.splitlines()[-1]
    assert "not measured" not in out
    providers = [provider for _, provider in measured]
    assert providers == sorted(providers, reverse=True), "our kernels of every layer come first"
    a_step = {entry["key"]: entry["a_step"] for entry in rows}
    shares = [a_step[str(key)] * key.floor(H100) for key, provider in measured if provider == "triton"]
    assert len(shares) == len(rows)
    assert shares == sorted(shares, reverse=True), "the largest share of the floor comes first"
    first = len(measured)
    assert run(command, capsys)[0] == 0 and len(measured) == first  # all of them are in the table


def on_made_up_gpu(monkeypatch: pytest.MonkeyPatch, table: TuningTable, outcome: Any) -> None:
    """The command with a GPU that is made up, and measurements too."""
    monkeypatch.setattr(Tuner, "_outcome", outcome)
    monkeypatch.setattr(MeasuringProcess, "start", lambda self: None)
    monkeypatch.setattr(tiles, "limits", lambda device: (tiles.SHARED_LIMIT[90], (tiles.POINTERS,)))
    for module in (tune, tuner):
        monkeypatch.setattr(module, "installed_gpu", lambda: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(TuningTable, "of_device", classmethod(lambda cls, device, fresh: table))


def test_measuring_ends_when_time_is_up_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every key takes a minute of a clock that is made up."""
    now, asked = 0.0, []

    def minute(self: Tuner, key: Key, left: list[Candidate], deadline: float | None) -> Outcome:
        nonlocal now
        now += 60
        asked.append((key, left[0].provider))
        if deadline is not None and now > deadline:  # cut off in the middle of it
            return Outcome()
        return Outcome(measured=[took(one, 100.0 + i) for i, one in enumerate(left)])

    path = tmp_path / "table.json"
    monkeypatch.setattr(time, "monotonic", lambda: now)
    on_made_up_gpu(monkeypatch, TuningTable(path, {}), minute)
    command = f"--network wrn10x1 --image-size 8 --batch-size 2 --csv {tmp_path / 'out.csv'}"
    code, out, _ = run(f"{command} --seconds 150", capsys)
    assert code == 0 and len(asked) == 3 and len(TuningTable(path, {})) == 2
    total = int(out.splitlines()[-1].split()[2])
    assert (
        f"{total} of {total} convolutions have candidates that are not measured (+), {total - 2} of them tiles" in out
    )
    assert f"2 of {total} convolutions" in out and "(+2)" in out
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"triton"} and sum(row["is_chosen"] == "1" for row in rows) == 2
    third = asked[2]
    asked.clear()
    on_made_up_gpu(monkeypatch, TuningTable(path, {}), minute)
    code, out, _ = run(command, capsys)
    assert code == 0 and asked[0] == third and "not measured" not in out and "(+" not in out
    assert len(asked) == 2 * total - 2 and "all convolutions" in out


@pytest.fixture(scope="module")
def markdown() -> str:
    """What the command prints of the main job, by a process that compiles: one that interprets has other tiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "ensdistill.tune", "--list", "--markdown"]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_docs_have_the_table_that_the_command_prints(markdown: str) -> None:
    assert markdown.strip() in (ROOT / "docs" / "kernels.md").read_text(), (
        "the table in docs/kernels.md is not that of `python -m ensdistill.tune --list --markdown`: paste it there"
    )


def test_the_main_job_s_step_moves_at_most_19_gb(markdown: str) -> None:
    """All tensors that a launch is given or gives, partial sums of norms and of splits included."""
    megabytes = [
        int(cells[5].removesuffix("in all")) for cells in map(_cells, markdown.splitlines()) if cells[1] == "all"
    ]
    assert len(megabytes) == 1 and 15_000 < megabytes[0] <= 19_000, markdown


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.values
@pytest.mark.gpu
@pytest.mark.parametrize("op", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize(("C", "size"), [(64, 32), (128, 16), (256, 8)])
def test_nobody_gets_the_slower_one(op: str, C: int, size: int, device: torch.device) -> None:
    key = make_key(op, E=4, M=4, B=128, H=size, W=size, CI=C, CO=C)
    table = TuningTable(None, {})
    tuner = Tuner(table, device)
    choice = tuner.choice(key)
    tuner.close()
    assert choice is not None
    library = min(one.microseconds for one in choice.measured if one.candidate.provider == "library")
    chosen = next(one for one in choice.measured if one.candidate == choice.candidate)
    assert chosen.microseconds <= library
    # measured again, the chosen one and the library's best beside each other
    again = {one.candidate: one for one in measure(key, candidates(key, device), device).measured}
    best_library = min((one for one in again.values() if one.candidate.provider == "library"), key=_microseconds)
    assert again[choice.candidate].microseconds <= 1.05 * best_library.microseconds
    tensors, options = arguments(key, device, seed=0)
    result = TunedOperations(table).run(key, tensors, options)
    assert difference(result, LOOP.run(key, tensors, options), key) is None


def _microseconds(one: Measured) -> float:
    return one.microseconds


@pytest.mark.values
@pytest.mark.gpu
def test_rotation_passes_the_cache(device: torch.device) -> None:
    """A shape that fits the L2 cache many times over is still read from memory."""
    key = make_key(E=4, M=4, B=32, H=8, W=8, CI=64, CO=64, k=1)
    measured = measure(key, candidates(key, device), device).measured
    fastest = min(one.microseconds for one in measured)
    assert fastest > 0.5e6 * key.bytes / DEVICES["H200"].bandwidth


def test_tiles_are_written_as_numbers(tmp_path: Path) -> None:
    """A `Tile` comes back as the numbers that the operation takes."""
    tile = Tile(0, 64, 16, 16, 4, 2)
    choice = Choice.of(make_key(), [took(Candidate(provider="triton", tile=tuple(tile)), 1.0)], None)
    TuningTable(tmp_path / "table.json", {}).put(make_key(), choice)
    found = TuningTable(tmp_path / "table.json", {}).get(make_key())
    assert found is not None and Tile(*found.candidate.tile) == tile


def test_unknown_network_has_no_layers() -> None:
    with pytest.raises(UserError, match="no such network"):
        operations_of("wrn27x4", method=Method.parse("ce"), E=1, B=1, image_size=8)
