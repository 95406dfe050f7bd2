"""The README's table of claims: `make claims` writes it, `python -m bench.claims --check` fails where it is another.

Every number in it that has a committed source is read from there: rows of the comparison (CSV under bench/results/),
the table of what kernels ask of a GPU (kernels/resources_sm90.csv), what tests assert. A claim that rests on rows is
made once for every file of results that has them all, so a GPU is spoken of only where one produced results; a
comparison inside the spread is called a tie. Exit code 2 where a source is damaged, or the table differs.
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.rows import Row, read_rows
from bench.tables import ties
from ensdistill.aot.resources import Resources, read_table
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- claims: written by `make claims` from bench/claims.py and what is committed; edit those -->"
END = "<!-- end of claims -->"


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    title: str
    """What is claimed."""
    measured: str
    """What was found: numbers, device, n, spread."""
    again: str
    """The command that gives it again, as Markdown."""


@dataclass(frozen=True)
class Arguments:
    """Write the README's table of claims from what is committed."""

    check: bool = False
    """Write nothing: fail if the table is another."""


# ---- what is committed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The rows of one comparison, which were measured in turns."""

    path: Path
    """The CSV, for messages."""
    rows: Sequence[Row]
    """All that were timed."""

    def find(self, **wanted: Any) -> list[Row]:
        """Rows whose columns are `wanted`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def one(self, **wanted: Any) -> Row | None:
        """The row whose columns are `wanted`, if it is there.

        Raises:
            UserError: there are several.
        """
        found = self.find(**wanted)
        if len(found) > 1:
            said = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise UserError(f"{self.path}: {len(found)} rows of {said}, expected one; measure it again")
        return found[0] if found else None


def read_results(folder: Path) -> list[Results]:
    """Of every comparison, sorted by path. Other tables, such as those of `make gpu-check`, are passed over."""
    results = []
    for path in committed(folder):
        if _is_ours(path) and (rows := [row for row in read_rows(path) if row.p50_ms is not None]):
            results.append(Results(path, rows))
    return results


def committed(folder: Path) -> list[Path]:
    """The CSVs of `folder`/DEVICE/ that git knows, so that a measurement of one's own changes no claim; else all."""
    found = sorted(folder.glob("*/*.csv"))
    # a hook's GIT_DIR would be looked for below `folder`
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "ls-files", "-z", "--", "."]
    try:
        listed = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git, or nothing was ever measured here
        return found
    if listed.returncode:
        return found
    known = {folder / name for name in listed.stdout.split("\0")}
    return [path for path in found if path in known]


def _is_ours(path: Path) -> bool:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])[:2] == ["part", "provider"]


def asserted(pattern: str, test: Path) -> str:
    """What the first group of `pattern` is in the source of a test: a number that fails there when it is another.

    Raises:
        UserError: the test says nothing like it any more.
    """
    found = re.search(pattern, test.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{test}: found nothing like {pattern!r}, on which a claim rests; mend bench/claims.py")
    return found[1]


# ---- in words -----------------------------------------------------------------------------------------------------


def time_of(row: Row) -> str:
    """`522 ms (p20 to p80 500 to 560, n 21)`; seconds from ten on."""
    assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
    unit, scale = ("s", 1e3) if row.p50_ms >= 1e4 else ("ms", 1.0)
    p20, p50, p80 = (_three_digits(value / scale) for value in (row.p20_ms, row.p50_ms, row.p80_ms))
    return f"{p50} {unit} (p20 to p80 {p20} to {p80}, n {row.n})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times_faster(fast: Row, slow: Row) -> str:
    """`3.1 ×`, or `a tie` where their spreads overlap."""
    if ties(fast, slow):
        return "a tie"
    assert fast.p50_ms is not None and slow.p50_ms is not None
    return f"{slow.p50_ms / fast.p50_ms:.1f} ×"


def problem_of(row: Row) -> str:
    """`WRN-16-2, 32 px, B 32, E 4, latentbe+tdiv-sdiv`."""
    network = re.sub(r"^wrn(\d+)x(\d+)$", r"WRN-\1-\2", row.network)
    return f"{network}, {row.size} px, B {row.B}, E {row.E}, {row.method}"


def where(row: Row) -> str:
    """Device, versions and commit."""
    return f"{row.device}; {row.versions}; commit {row.commit}"


# ---- the claims ---------------------------------------------------------------------------------------------------


def fits_a_gpu(resources: Sequence[Resources]) -> Claim:
    """By the table that a build without a GPU made."""
    spilling = sum(one.stack_bytes > 0 or one.local_accesses > 0 for one in resources)
    convolutions = [one for one in resources if one.kernel.startswith(("member_conv", "weight_gradient"))]
    with_cores = sum(one.matrix.endswith("MMA") for one in convolutions)
    shared = max(one.shared_bytes for one in resources) / 1024
    limit = min(one.shared_limit for one in resources) / 1024
    spills = f"{spilling} of them spill registers" if spilling else "no spilled register"
    cores = (
        "every convolution" if with_cores == len(convolutions) else f"{with_cores} of {len(convolutions)} convolutions"
    )
    return Claim(
        "the kernels fit a GPU",
        f"WRN-28-4's step: its {len(resources)} kernel variants (teachers in one go among them) compiled for sm_90 "
        f"without a GPU in a minute; {spills}, tensor cores in {cores}, at most {shared:.0f} of {limit:.0f} KiB of "
        "shared memory ([table](kernels/README.md))",
        "`make aot ARGS=-DENSDISTILL_AOT_RECIPES=cifar100-wrn28x4`",
    )


def official_order(results: Results) -> Iterator[Claim]:
    """Our quickest step beside the official order of work, network by network."""
    for network in dict.fromkeys(row.network for row in results.find(part="step")):
        official = results.one(part="step", provider="official-order", network=network)
        names = ("tuned", "auto", "library", "triton", "pruned")
        ours = [row for name in names for row in results.find(part="step", provider=name, network=network)]
        if official is None or not ours:
            continue
        best = min(ours, key=lambda row: row.p50_ms or math.inf)
        yield Claim(
            "a step beside the official order of work",
            f"{problem_of(best)}: {time_of(best)} by `{best.provider}` in {best.precision}, against "
            f"{time_of(official)} for a straight PyTorch port of the official order of work, 32 F in fp32, turn by "
            f"turn in one run: {times_faster(best, official)}; {where(best)}",
            "`python -m bench --parts step`",
        )


def feed(results: Results) -> Iterator[Claim]:
    """Ours beside the quickest DataLoader, by size of image."""
    said = []
    for size in sorted({row.size for row in results.find(part="feed") if row.size}):
        ours = results.one(part="feed", provider="ffcv", size=size)
        theirs = [row for row in results.find(part="feed", size=size) if row.provider.startswith("dataloader-")]
        if ours is None or not theirs:
            continue
        best = min(theirs, key=lambda row: row.p50_ms or math.inf)
        workers = best.provider.removeprefix("dataloader-")
        said.append(
            f"{size} px, B {ours.B}: {ours.images_per_s:,.0f} images/s by FFCV, {best.images_per_s:,.0f} by a "
            f"DataLoader at its best, of {workers} workers: {times_faster(ours, best)}"
        )
    if said:
        row = results.find(part="feed")[0]
        yield Claim("feeding", f"{'; '.join(said)} (n {row.n}); {where(row)}", "`python -m bench --parts feed`")


def start_up(results: Results) -> Iterator[Claim]:
    """Cold, and with what earlier starts or `make aot` left."""
    rows = results.find(part="start-up")
    if rows:
        times = ", ".join(f"{time_of(row)} {row.provider}" for row in rows)
        yield Claim(
            "command to first step",
            f"{problem_of(rows[0])}, fresh processes: {times}; {where(rows[0])}",
            "`python -m bench --parts startup`",
        )


def claims(results: Sequence[Results], root: Path = ROOT) -> Iterator[Claim]:
    """In the order of the table."""
    quantities = asserted(r"(\d+) of \1 quantities agree", root / "tests" / "test_verify.py")
    forwards = asserted(r"def test_the_whole_step_spends_(\d+)_F", root / "tests" / "test_step.py")
    golden = "`python -m ensdistill.verify tests/golden/official_wrn10x1_m4.npz"
    yield Claim(
        "the official numbers",
        f"all {quantities} quantities of a golden file agree in fp32: x' within 6e-8, losses within 6e-7, parameters "
        "after two steps within 1.2e-4 of a tensor's largest entry",
        f"{golden}`",
    )
    yield Claim(
        "the kernels give them too",
        f"the same {quantities} quantities through the Triton kernels, in Triton's interpreter: losses within 6e-7, "
        "parameters within 1.2e-4, x' within 6e-8 and in the second step 1.6e-4 (a few ReLUs next to 0 fall on the "
        "other side)",
        f"{golden} --backend triton` (2 min)",
    )
    yield fits_a_gpu(read_table(root / "kernels" / "resources_sm90.csv"))
    yield Claim(
        f"{forwards} F a step, not 32",
        "convolutions counted, latentbe + tdiv-sdiv, E = 4 (F: one forward of one network over the batch)",
        "`pytest tests/training/test_step.py -k spends`",
    )
    nodes = asserted(r"nodes <= (\d+)", root / "tests/runtime/test_streams.py")
    megabytes = asserted(r"megabytes\[0\] <= (\d+_\d+)", root / "tests/commands/test_tune.py")
    yield Claim(
        f"at most {nodes} launches a step, {int(megabytes) / 1e3:.3g} GB moved",
        "WRN-28-4's step, latentbe + tdiv-sdiv, E = 4, B = 128, as one graph on two streams: nodes counted, and "
        "the bytes of every recorded launch of a kernel, partial sums included",
        "`pytest tests/runtime/test_streams.py tests/commands/test_tune.py -k 'nodes or moves'`",
    )
    yield from [claim for each in results for claim in official_order(each)]
    yield Claim(
        "captured is eager",
        "200 captured steps leave the same bits as 200 launched one by one: by recorded operations on a CPU; the CUDA "
        "graph's test waits for a GPU",
        "`pytest tests/training/test_stepper.py`",
    )
    yield Claim(
        "the same results in bf16",
        "digits, same teachers, 3 seeds, bf16 and fp32: latentbe ACC 96.97 ± .31 and 97.27 ± .29, NLL .164 ± .012 and "
        ".163 ± .006; latentbe + tdiv-sdiv 97.07 ± .25 and 97.03 ± .32, NLL .163 ± .006 and .167 ± .021",
        "`--precision`, `--seeds 3`",
    )
    for make in (feed, start_up):
        yield from (claim for each in results for claim in make(each))
    yield Claim(
        "data to network",
        "`digits`, everything included: 2 min 12 s on one thread, on a shared machine",
        "`make train`",
    )


# ---- the README ---------------------------------------------------------------------------------------------------


def table(lines: Iterable[Claim]) -> str:
    """As Markdown, with its markers.

    Raises:
        ValueError: a cell would break the table.
    """
    text = [BEGIN, "", "| claim | measured | again |", "|---|---|---|"]
    for one in lines:
        cells = (one.title, one.measured, one.again)
        if any("|" in cell or "\n" in cell for cell in cells):
            raise ValueError(f"claim '{one.title}': has a | or a line break, which ends a cell")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", END])


def replaced(readme: str, written: str, path: Path) -> str:
    """The text of a README with `written` in place of what lies between the markers.

    Raises:
        UserError: they are not there, once each and in order.
    """
    before, begins, rest = readme.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not (begins and ends) or BEGIN in after or END in after:
        raise UserError(f"{path}: expected one '{BEGIN}' and after it one '{END}'; put both lines around the table")
    return before + written + after


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command."""
    arguments = parse_arguments(Arguments, "bench.claims", argv)
    path = root / "README.md"
    found = path.read_text(encoding="utf-8")
    expected = replaced(found, table(claims(read_results(root / "bench" / "results"), root)), path)
    if arguments.check:
        if found != expected:
            changed = [line for line in expected.splitlines() if line not in found.splitlines()]
            which = changed[0] if changed else "a line too many"
            raise UserError(f"{path}: its claims are not what is committed ({which[:100]}); run `make claims`")
        return 0
    if found != expected:
        with atomic_write(path) as temporary:
            temporary.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
