"""`python -m bench`: its command, the parts `step` and `methods`, its tables, and the comparison of two CSVs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import __main__
from bench.harness.context import FAILED, WRONG, Batches, Context, timing_columns
from bench.harness.rows import Book, Row, read_rows, write_rows
from bench.harness.turns import Timing, in_turns
from bench.parts import methods
from bench.rivals import PROVIDERS, Problem, Provider, Run
from bench.tables import Change, compare, render, ties
from ensdistill.config.methods import Method
from ensdistill.monitor.readings import Figures
from ensdistill.runtime.errors import UserError

CPU = torch.device("cpu")
TINY = ["--quick", "--size=8", "--batch=2", "--members=2", "--rounds=3", "--threads=1"]


def tiny_context(**changed: Any) -> Context:
    values: dict[str, Any] = {
        "device": CPU,
        "quick": True,
        "precision": "fp32",
        "threads": 1,
        "network": "wrn10x1",
        "E": 2,
        "B": 2,
        "size": 8,
        "classes": 10,
        "providers": ("official-order", "pruned"),
        "rounds": 3,
        "seconds": 0.0,
        "identity": {"device": "a CPU", "versions": "some", "commit": "abc"},
        "say": lambda text: None,
    }
    return Context(**(values | changed))


def timed(p50: float, spread: float = 0.0, **changed: Any) -> Row:
    values = {"part": "step", "provider": "auto", "n": 5, "p20_ms": p50 - spread, "p50_ms": p50, "p80_ms": p50 + spread}
    return Row(**(values | changed))


def shown(rows: list[Row]) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(render(rows))
    return captured.get()


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_step_by_two_providers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [*TINY, "--device=cpu", "--parts=step", "--providers=official-order,pruned", f"--out={out}"]
    assert __main__.main(arguments) == 0
    rows = read_rows(out / "step.csv")
    assert [row.provider for row in rows] == ["official-order", "pruned"]
    for row in rows:
        assert row.n == 3 and row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.images_per_s == pytest.approx(1e3 * 2 / row.p50_ms, rel=1e-4)
        assert row.tflops and row.gbps and row.floor_share and row.peak_gb is None and not row.note
        assert "1 thread" in row.device and torch.__version__.split("+")[0] in row.versions and row.commit
    assert rows[0].tflops and rows[1].tflops and rows[0].p50_ms and rows[1].p50_ms
    assert rows[0].tflops * rows[0].p50_ms == pytest.approx(rows[1].tflops * rows[1].p50_ms, rel=1e-4)
    printed = capsys.readouterr().out
    assert "official-order" in printed and f"results: {out}" in printed


class _Wrong(Run):
    """Does the right step, and shows images that are 0.1 brighter than its own."""

    def __init__(self, problem: Problem) -> None:
        self._run = PROVIDERS["pruned"].make(problem)
        self.student = self._run.student

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        measures = self._run(images_BHWC, labels_B)
        self.shown = self._run.shown + 0.1
        return measures


def _broken(problem: Problem) -> Run:
    raise RuntimeError("no such algorithm\nand a trace")


def _unable(problem: Problem) -> Run:
    raise ValueError("expected other networks")


@pytest.mark.parametrize(
    ("make", "note", "code"),
    [(_Wrong, WRONG, 1), (_broken, f"{FAILED}: RuntimeError: no such algorithm", 1), (_unable, "expected other", 0)],
)
def test_no_time_for_wrong_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, note: str, code: int
) -> None:
    monkeypatch.setitem(PROVIDERS, "library", Provider(make=make))
    arguments = [*TINY, "--device=cpu", "--parts=step", "--providers=library,pruned,auto,triton"]
    arguments.append(f"--out={tmp_path}")
    assert __main__.main(arguments) == code
    rows = {row.provider: row for row in read_rows(tmp_path / "step.csv")}
    assert rows["library"].p50_ms is None and rows["library"].n == 0 and rows["library"].note.startswith(note)
    assert rows["triton"].note == "needs a GPU" and rows["auto"].p50_ms is not None
    assert rows["pruned"].p50_ms is not None


def test_rows_are_on_disk_when_a_part_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(context: Context) -> Iterator[Row]:
        yield context.row(part="step", provider="first")
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cut_off", SimpleNamespace(rows=rows))
    monkeypatch.setitem(__main__.PARTS, "step", "cut_off")
    with pytest.raises(KeyboardInterrupt):
        __main__.main([*TINY, "--device=cpu", "--parts=step", f"--out={tmp_path}"])
    assert [row.provider for row in read_rows(tmp_path / "step.csv")] == ["first"]


def test_networks_take_turns_in_their_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(context: Context) -> Iterator[Row]:
        yield context.row(part="any", provider="somebody")

    monkeypatch.setitem(sys.modules, "any_part", SimpleNamespace(rows=rows))
    for part in ("step", "feed"):
        monkeypatch.setitem(__main__.PARTS, part, "any_part")
    networks = "wrn10x1,resnet20"
    __main__.main([*TINY, "--device=cpu", "--parts=step,feed", f"--networks={networks}", f"--out={tmp_path}"])
    assert [row.network for row in read_rows(tmp_path / "step.csv")] == networks.split(",")
    assert [row.network for row in read_rows(tmp_path / "feed.csv")] == ["wrn10x1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=stp"], "did you mean 'step'"),
        (["--providers=offical-order"], "did you mean 'official-order'"),
        (["--networks=wrn10"], "wrn10"),
        (["--rounds=2"], "--rounds: got 2, expected at least 3"),
        (["--runs=nowhere"], "holds no results.json"),
        (["--roundz=2"], "--roundz"),
        (["--compare", "nowhere.csv", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_mistakes_are_said(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        __main__.main(["--quick", "--device=cpu", *arguments])


# ---- methods ------------------------------------------------------------------------------------------------------


def test_every_method_that_exists() -> None:
    counts = {student: len(methods.existing_methods(student)) for student in methods.STUDENTS}
    assert counts == {"ce": 2, "kd": 5, "latentbe": 6, "be": 6, "hydra": 6}


def test_methods_and_the_jobs_that_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"ce": ["ce"], "kd": ["kd+ods"], "hydra": ["hydra+tdiv-sdiv"]}
    monkeypatch.setattr(methods, "STUDENTS", dict.fromkeys(few))
    monkeypatch.setattr(methods, "existing_methods", lambda student: [Method.parse(text) for text in few[student]])
    monkeypatch.setattr(methods, "WRITTEN", 60)
    context = tiny_context()
    rows = list(methods.rows(context))
    steps = {row.method: row for row in rows if row.part == "methods"}
    assert list(steps) == ["ce", "kd+ods", "hydra+tdiv-sdiv"]
    assert steps["ce"].vs_ce == 1
    for row in steps.values():
        assert row.vs_ce and row.peak_gb and row.tflops and not row.note
    assert steps["hydra+tdiv-sdiv"].peak_gb > steps["kd+ods"].peak_gb > steps["ce"].peak_gb

    jobs = {(row.provider, row.method): row for row in rows if row.part == "job"}
    data, teachers = jobs["data", ""].p50_ms, jobs["teachers", "ce"].p50_ms
    # digits: 400 images, teachers 80 epochs, students 120
    assert steps["ce"].p50_ms and teachers == pytest.approx(steps["ce"].p50_ms * 2 * 80 * 400 / context.B)
    for name in ("kd+ods", "hydra+tdiv-sdiv"):
        step = steps[name].p50_ms
        assert step and jobs["student", name].p50_ms == pytest.approx(step * 120 * 400 / context.B)
        assert jobs["job", name].p50_ms == pytest.approx(data + teachers + jobs["student", name].p50_ms)
    assert jobs["job", "ce"].p50_ms == pytest.approx(data + jobs["student", "ce"].p50_ms)


def test_wrong_methods_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = methods.train_step

    def wrong(state: Any, config: Any, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        measures = train_step(state, config, *arguments, **options)
        if state.networks.precision == "bf16" and config.method.shown == "gaussian":  # not the definition's
            measures["loss"] = measures["loss"] * 1.5
        return measures

    monkeypatch.setattr(methods, "train_step", wrong)
    monkeypatch.setattr(methods, "STUDENTS", {"ce": ""})
    rows = {row.method: row for row in methods.rows(tiny_context(precision="bf16")) if row.part == "methods"}
    assert rows["ce+gaussian"].p50_ms is None and rows["ce+gaussian"].note.startswith(WRONG)
    assert rows["ce"].p50_ms is not None


def test_the_quality_of_a_run_beside_its_cost(tmp_path: Path) -> None:
    measures = {"acc": 0.96, "nll": 0.17}
    costs = {"kd": 1.5, "latentbe": None}
    results = [{"name": name, "measures": measures, "cost": cost} for name, cost in costs.items()]
    (tmp_path / "results.json").write_text(json.dumps({"rows": results}))
    rows = [Row(part="methods", provider="auto", method="latentbe", vs_ce=2.5)]
    methods.write_quality(tmp_path, rows, tmp_path / "nll.csv")
    with (tmp_path / "nll.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["method"], row["cost"]) for row in found] == [("kd", "1.5"), ("latentbe", "2.5")]
    assert found[0]["nll"] == "0.17" and found[0]["acc"] == "0.96"
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json"):
        methods.write_quality(tmp_path, rows, tmp_path / "nll.csv")


# ---- timing, rows, tables ------------------------------------------------------------------------------------------


def test_batches_rotate_past_the_caches() -> None:
    batches = Batches(tiny_context(B=512, size=32))
    images = [batches[i][0] for i in range(3)]
    assert images[0].shape == (512, 32, 32, 3) and images[0].dtype == torch.uint8
    assert not torch.equal(images[0], images[1])
    distinct = {batches[i][0].data_ptr() for i in range(100)}
    assert len(distinct) * images[0].nbytes >= 64_000_000
    assert torch.equal(batches[len(distinct)][0], images[0])


def test_turns_alternate() -> None:
    done: list[str] = []
    calls = {name: (lambda i, name=name: done.append(name)) for name in "ab"}
    timings = in_turns(calls, CPU, rounds=9, max_seconds=0.0)
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    a, b = (timing.calls // 3 * name for name, timing in timings.items())
    assert "".join(done).endswith(a + b + b + a + a + b)
    assert len(done) > sum(timing.calls for timing in timings.values()), "warmed up"


def test_columns_of_a_timing() -> None:
    parts = [
        Figures(seconds=1.0, samples=1, energy_wh=energy, throttled=throttled)
        for energy, throttled in ((0.5, 1.0), (1.5, 0.0))
    ]
    columns = timing_columns(Timing(seconds=[0.1, 0.2, 0.3], calls=10, parts=parts), images=20)
    assert (columns["n"], columns["p50_ms"], columns["images_per_s"]) == (3, pytest.approx(200), pytest.approx(100))
    assert columns["wh_per_million"] == pytest.approx(2.0 / (10 * 20) * 1e6)
    assert columns["throttled"] == 0.5


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    book = Book(tmp_path / "rows.csv")
    rows = [timed(12.5, 0.5, E=4, B=8, note="a, b"), Row(part="feed", provider="ffcv")]
    for row in rows:
        book.add(row)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_rows_from_before_a_column_was_there(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("part,provider,p50_ms\nstep,auto,12\n")
    assert read_rows(tmp_path / "old.csv") == [Row(part="step", provider="auto", p50_ms=12)]
    (tmp_path / "other.csv").write_text("time,name\n12,auto\n")
    with pytest.raises(UserError, match=r"other\.csv"):
        read_rows(tmp_path / "other.csv")


def test_the_table_calls_a_tie_a_tie() -> None:
    rows = [
        timed(20, 1, provider="official-order"),
        timed(10, 1, provider="auto"),
        timed(19.5, 1, provider="near"),
        timed(5, 0, provider="once", n=1),
        Row(part="step", provider="broken", note="needs a GPU"),
    ]
    lines = {line.split()[0]: line for line in shown(rows).splitlines() if line.strip()}
    assert "2.00" in lines["auto"] and "tie" not in lines["auto"]
    assert "tie" in lines["near"] and "tie" in lines["once"]
    assert "(1)" in lines["broken"] and "needs a GPU" in lines["(1)"]
    assert "TFLOP/s" not in lines["provider"], "a column that nobody has"
    assert ties(rows[0], rows[2]) and not ties(rows[0], rows[1])


def test_the_table_of_methods_is_relative_to_ce() -> None:
    ce = timed(10, part="methods", method="ce", peak_gb=2.0, wh_per_million=3.0, vs_ce=1.0)
    other = timed(45, part="methods", method="kd", peak_gb=5.0, wh_per_million=12.0, vs_ce=4.44)
    line = next(line for line in shown([ce, other]).splitlines() if " kd " in line)
    assert all(text in line for text in ("4.44", "2.50", "4.00"))


# ---- two files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (timed(10, 0.1), timed(11, 0.1), "slower"),
        (timed(10, 0.1), timed(9, 0.1), "faster"),
        (timed(10, 0.6), timed(11, 0.6), "tie"),
        (timed(10), timed(10.15), "tie"),
        (timed(10, 0.1), timed(11, 0.1, n=2), "tie"),
        (timed(10), Row(part="step", provider="auto", note=WRONG), "lost"),
        (Row(part="step", provider="auto", note=WRONG), timed(10), "new"),
        (Row(part="step", provider="auto"), Row(part="step", provider="auto"), "not timed"),
        (timed(10), None, "only before"),
        (None, timed(10), "only after"),
    ],
)
def test_verdicts(before: Row | None, after: Row | None, verdict: str) -> None:
    assert Change(before=before, after=after).verdict == verdict


def test_rows_are_paired_by_what_they_are_of() -> None:
    rows = [timed(10, B=8), timed(20, B=16), timed(30, B=16)]
    later = [replace(rows[2], p50_ms=25.0), replace(rows[1], p50_ms=40.0), timed(1, provider="other")]
    pairs = [(c.before and c.before.p50_ms, c.after and c.after.p50_ms) for c in compare(rows, later)]
    assert pairs == [(10, None), (20, 25), (30, 40), (None, 1)], "the first of a key with the first"


@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (5.0, 0), (20.0, 1)])
def test_the_exit_code_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: float, code: int
) -> None:
    paths = tmp_path / "before.csv", tmp_path / "after.csv"
    write_rows(paths[0], [timed(10, 0.1, device="one")])
    write_rows(paths[1], [timed(after, 0.1, device="other")])
    assert __main__.main(["--compare", *map(str, paths)]) == code
    assert "device: one before, other after" in capsys.readouterr().out


@pytest.mark.values
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BACKEND", "triton")  # `auto` would first measure every layer of every method
    arguments = ["--quick", "--rounds=3", "--device=cuda", "--parts=step,methods", f"--out={tmp_path}"]
    assert __main__.main([*arguments, "--providers=official-order,official-order-amp,pruned,library,triton"]) == 0
    for row in (*read_rows(tmp_path / "step.csv"), *read_rows(tmp_path / "methods.csv")):
        assert row.p50_ms is not None and (row.part == "job" or (row.peak_gb and row.peak_gb > 0)), row
