"""The README's table of claims: it says what is committed, of every number that has a committed source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench import claims
from bench.claims import BEGIN, END, Results
from bench.harness.rows import Row, write_rows
from ensdistill.aot.resources import read_table
from ensdistill.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

SOURCES = (
    "tests/commands/test_verify.py",
    "tests/training/test_step.py",
    "kernels/resources_sm90.csv",
    "tests/runtime/test_streams.py",
    "tests/commands/test_tune.py",
)


def row(provider: str, p50: float, spread: float = 10.0, **changes: object) -> Row:
    fields: dict = {
        "part": "step", "network": "wrn16x2", "method": "latentbe+tdiv-sdiv", "E": 4, "B": 32, "size": 32,
        "precision": "bf16", "device": "Some CPU, 2 threads", "versions": "python 3.11", "commit": "abc", "n": 21,
        "p20_ms": p50 - spread, "p50_ms": p50, "p80_ms": p50 + spread, "images_per_s": 32e3 / p50,
    }  # fmt: skip
    return Row(provider=provider, **fields | changes)


STEP = [
    row("official-order", 1622.4, 53, precision="fp32"),
    row("pruned", 522.1),
    row("library", 610),
    replace(row("triton", 1), n=0, p20_ms=None, p50_ms=None, p80_ms=None, note="needs a GPU"),
]
FEED = [
    row(name, p50, part="feed", network="", method="", E=None, size=size)
    for name, size, p50 in [
        ("ffcv", 32, 40), ("dataloader-0", 32, 100), ("dataloader-2", 32, 80),
        ("ffcv", 224, 90), ("dataloader-0", 224, 300), ("dataloader-2", 224, 95),
    ]
]  # fmt: skip
START = [row("cold", 13_800, 300, part="start-up"), row("warm", 12_100, 300, part="start-up")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout with what claims are made of, results of one comparison, and a README whose table is empty."""
    for source in SOURCES:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / source)
    folder = tmp_path / "bench" / "results" / "cpu-some"
    folder.mkdir(parents=True)
    for name, rows in (("step", STEP), ("feed", FEED), ("startup", START)):
        write_rows(folder / f"{name}.csv", rows)
    (folder / "tuning.csv").write_text("device,us\nx,1\n")  # of another command
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\n{END}\n\nThe rest, | with bars |.\n")
    return tmp_path


def test_the_readme_says_what_is_committed() -> None:
    assert claims.main(["--check"]) == 0


def test_numbers_of_the_table_are_those_of_the_rows(checkout: Path) -> None:
    assert claims.main([], root=checkout) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- ") and text.endswith(f"{END}\n\nThe rest, | with bars |.\n")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    step = lines["a step beside the official order of work"]
    assert "WRN-16-2, 32 px, B 32, E 4, latentbe+tdiv-sdiv: 522 ms (p20 to p80 512 to 532, n 21) by `pruned`" in step
    assert "against 1,622 ms (p20 to p80 1,569 to 1,675, n 21)" in step and "in one run: 3.1 ×; Some CPU" in step
    assert "python 3.11; commit abc" in step
    feed = lines["feeding"]
    assert "32 px, B 32: 800 images/s by FFCV, 400 by a DataLoader at its best, of 2 workers: 2.0 ×" in feed
    assert "224 px, B 32: 356 images/s by FFCV, 337 by a DataLoader at its best, of 2 workers: a tie" in feed
    assert "13.8 s (p20 to p80 13.5 to 14.1, n 21) cold, 12.1 s" in lines["command to first step"]
    assert "all 61 quantities" in lines["the official numbers"] and "22 F a step, not 32" in lines
    assert claims.main(["--check"], root=checkout) == 0


@pytest.mark.parametrize("what", ["row", "readme", "kernels", "test", "gone"])
def test_a_table_that_says_something_else_is_refused(checkout: Path, what: str) -> None:
    claims.main([], root=checkout)
    results = checkout / "bench" / "results" / "cpu-some"
    if what == "row":
        write_rows(results / "step.csv", [replace(STEP[1], p50_ms=530.0), *STEP[:1], *STEP[2:]])
    elif what == "readme":
        path = checkout / "README.md"
        path.write_text(path.read_text().replace("522 ms", "422 ms"))
    elif what == "kernels":
        path = checkout / SOURCES[2]
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    elif what == "test":
        path = checkout / SOURCES[0]
        path.write_text(path.read_text().replace("61 of 61", "60 of 60"))
    else:
        shutil.rmtree(results)
    with pytest.raises(UserError, match=r"README.md: its claims are not what is committed .*run `make claims`"):
        claims.main(["--check"], root=checkout)
    assert claims.main([], root=checkout) == 0
    assert claims.main(["--check"], root=checkout) == 0


def test_without_rows_nothing_is_claimed_of_speed(checkout: Path) -> None:
    for name in ("step", "feed", "startup"):
        (checkout / "bench" / "results" / "cpu-some" / f"{name}.csv").unlink()
    assert claims.read_results(checkout / "bench" / "results") == []
    assert claims.main([], root=checkout) == 0
    titles = [line.split(" | ")[0] for line in (checkout / "README.md").read_text().splitlines()]
    assert "| the official numbers" in titles
    assert not {"| a step beside the official order of work", "| feeding", "| command to first step"} & set(titles)


def test_a_measurement_that_git_does_not_know_changes_no_claim(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # where a hook runs the tests
        monkeypatch.delenv(name)
    results = checkout / "bench" / "results"
    assert len(claims.read_results(results)) == 3
    git = ["git", "-C", str(checkout)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert claims.read_results(results) == []
    subprocess.run([*git, "add", "bench/results/cpu-some/feed.csv"], check=True)
    assert [each.path.name for each in claims.read_results(results)] == ["feed.csv"]


def test_overlapping_spreads_are_a_tie_and_slower_is_said() -> None:
    assert claims.times_faster(row("a", 100), row("b", 119)) == "a tie"
    assert claims.times_faster(row("a", 100), row("b", 121)) == "1.2 ×"
    assert claims.times_faster(row("a", 200), row("b", 100)) == "0.5 ×"


def test_a_spill_and_a_convolution_without_tensor_cores_would_be_told() -> None:
    resources = read_table(ROOT / "kernels" / "resources_sm90.csv")
    good = claims.fits_a_gpu(resources)
    assert good["variants"] == str(len(resources))
    assert good["spills"] == "no spilled register" and good["tensor_cores"] == "every convolution"
    convolution = next(i for i, one in enumerate(resources) if one.kernel == "member_conv_kernel")
    resources[convolution] = replace(resources[convolution], stack_bytes=8, matrix="missing", shared_bytes=250 * 1024)
    bad = claims.fits_a_gpu(resources)
    assert bad["spills"] == "1 of them spill registers" and (bad["shared"], bad["shared_limit"]) == ("250", "227")
    assert re.fullmatch(r"\d+ of \d+ convolutions", bad["tensor_cores"])


def test_two_rows_of_one_thing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 rows of .*provider official-order"):
        list(claims.official_order(Results(tmp_path / "step.csv", [*STEP[:2], STEP[0]])))


def test_a_source_that_says_it_no_longer_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("nothing\n")
    with pytest.raises(UserError, match=r"test_some.py: found nothing like"):
        claims.asserted(r"(\d+) of", tmp_path / "test_some.py")


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="put both lines around the table"):
        claims.replaced(text, "table", Path("README.md"))


def test_a_cell_that_would_break_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="claim 'a': has a"):
        claims.filled("| a | {a} | c |", {"a": ["one | two"]})


def test_a_line_is_written_once_for_every_text() -> None:
    texts = {"one": ["1"], "two": ["2", "3"], "none": []}
    assert claims.filled("| a |\n| {one} {one} |\n| {two} |\n| {none} |", texts) == "| a |\n| 1 1 |\n| 2 |\n| 3 |"
