"""The README's table of claims: `make claims` writes it, `python -m bench.claims --check` fails where it is another.

claims.md holds the sentences. What stands in braces there is read from what is committed: rows of the comparison (CSV
under bench/results/), the table of what kernels ask of a GPU (kernels/resources_sm90.csv), what tests assert. A line
that rests on rows is written once for every file of results that has them all, so a GPU is spoken of only where one
produced results; a comparison inside the spread is called a tie. Exit code 2 where a source is damaged, or the table
differs.
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
TEMPLATE = Path(__file__).with_name("claims.md")
BEGIN = "<!-- claims: written by `make claims` from bench/claims.py and what is committed; edit those -->"
END = "<!-- end of claims -->"


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
    """CSV that messages name."""
    rows: Sequence[Row]
    """Rows that were timed."""

    def find(self, **wanted: Any) -> list[Row]:
        """Find the rows whose columns are `wanted`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def one(self, **wanted: Any) -> Row | None:
        """Find the row whose columns are `wanted`; None where there is none.

        Raises:
            UserError: there are several.
        """
        found = self.find(**wanted)
        if len(found) > 1:
            said = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise UserError(f"{self.path}: {len(found)} rows of {said}, expected one; measure it again")
        return found[0] if found else None


def read_results(folder: Path) -> list[Results]:
    """Read every comparison, sorted by path. Other tables, such as those of `make gpu-check`, are passed over."""
    results = []
    for path in committed(folder):
        if _is_ours(path) and (rows := [row for row in read_rows(path) if row.p50_ms is not None]):
            results.append(Results(path, rows))
    return results


def committed(folder: Path) -> list[Path]:
    """List the CSVs of `folder`/DEVICE/ that git knows, or all: a measurement of one's own changes no claim."""
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
    """Find the first group of `pattern` in the source of a test: a number that fails there when it is another.

    Raises:
        UserError: the test says nothing like it any more.
    """
    found = re.search(pattern, test.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{test}: found nothing like {pattern!r}, on which a claim rests; mend bench/claims.py")
    return found[1]


# ---- in words -----------------------------------------------------------------------------------------------------


def time_of(row: Row) -> str:
    """Write `522 ms (p20 to p80 500 to 560, n 21)`; seconds from ten on."""
    assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
    unit, scale = ("s", 1e3) if row.p50_ms >= 1e4 else ("ms", 1.0)
    p20, p50, p80 = (_three_digits(value / scale) for value in (row.p20_ms, row.p50_ms, row.p80_ms))
    return f"{p50} {unit} (p20 to p80 {p20} to {p80}, n {row.n})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times_faster(fast: Row, slow: Row) -> str:
    """Write `3.1 ×`, or `a tie` where their spreads overlap."""
    if ties(fast, slow):
        return "a tie"
    assert fast.p50_ms is not None and slow.p50_ms is not None
    return f"{slow.p50_ms / fast.p50_ms:.1f} ×"


def problem_of(row: Row) -> str:
    """Write `WRN-16-2, 32 px, B 32, E 4, latentbe+tdiv-sdiv`."""
    network = re.sub(r"^wrn(\d+)x(\d+)$", r"WRN-\1-\2", row.network)
    return f"{network}, {row.size} px, B {row.B}, E {row.E}, {row.method}"


def where(row: Row) -> str:
    """Write device, versions and commit."""
    return f"{row.device}; {row.versions}; commit {row.commit}"


# ---- the numbers --------------------------------------------------------------------------------------------------


def values(results: Sequence[Results], root: Path = ROOT) -> dict[str, list[str]]:
    """Read what stands in the template's braces: one text for each time that a line with it is written."""
    quantities = asserted(r"(\d+) of \1 quantities agree", root / "tests/commands/test_verify.py")
    forwards = asserted(r"def test_the_whole_step_spends_(\d+)_F", root / "tests/training/test_step.py")
    launches = asserted(r"nodes <= (\d+)", root / "tests/runtime/test_streams.py")
    megabytes = asserted(r"megabytes\[0\] <= (\d+_\d+)", root / "tests/commands/test_tune.py")
    single = {
        "quantities": quantities,
        "forwards": forwards,
        "launches": launches,
        "gigabytes": f"{int(megabytes) / 1e3:.3g}",
        **fits_a_gpu(read_table(root / "kernels" / "resources_sm90.csv")),
    }
    measured = {"official_order": official_order, "threads": threads, "feed": feed, "start_up": start_up}
    return {name: [text] for name, text in single.items()} | {
        name: [text for each in results for text in texts_of(each)] for name, texts_of in measured.items()
    }


def fits_a_gpu(resources: Sequence[Resources]) -> dict[str, str]:
    """Read what the kernels of WRN-28-4's step ask of a GPU, from the table of a build that needs none."""
    spilling = sum(one.stack_bytes > 0 or one.local_accesses > 0 for one in resources)
    convolutions = [one for one in resources if one.kernel.startswith(("member_conv", "weight_gradient"))]
    with_cores = sum(one.matrix.endswith("MMA") for one in convolutions)
    all_have = with_cores == len(convolutions)
    return {
        "variants": str(len(resources)),
        "spills": f"{spilling} of them spill registers" if spilling else "no spilled register",
        "tensor_cores": "every convolution" if all_have else f"{with_cores} of {len(convolutions)} convolutions",
        "shared": f"{max(one.shared_bytes for one in resources) / 1024:.0f}",
        "shared_limit": f"{min(one.shared_limit for one in resources) / 1024:.0f}",
    }


def official_order(results: Results) -> Iterator[str]:
    """Compare our quickest step with the official order of work, network by network."""
    for network in dict.fromkeys(row.network for row in results.find(part="step")):
        official = results.one(part="step", provider="official-order", network=network)
        names = ("tuned", "auto", "library", "triton", "pruned")
        ours = [row for name in names for row in results.find(part="step", provider=name, network=network)]
        if official is None or not ours:
            continue
        best = min(ours, key=lambda row: row.p50_ms or math.inf)
        yield (
            f"{problem_of(best)}: {time_of(best)} by `{best.provider}` in {best.precision}, against "
            f"{time_of(official)} for a straight PyTorch port of the official order of work, 32 F in fp32, turn by "
            f"turn in one run: {times_faster(best, official)}; {where(best)}"
        )


def threads(results: Results) -> Iterator[str]:
    """Compare our step on one thread, on two, and on two beside a busy neighbour; and with torch.compile's."""
    ways = {"one": "1 thread", "two": "2 threads", "busy": "2 threads, a busy neighbour"}
    ours = {way: results.one(part="threads", provider=f"auto, {text}") for way, text in ways.items()}
    one, two, busy = ours["one"], ours["two"], ours["busy"]
    if one is None or two is None or busy is None:
        return
    said = (
        f"{problem_of(one)}, bf16: one thread {time_of(one)}; two {time_of(two)}, {times_faster(two, one)}; two, and a "
    )
    said += f"process that never rests on one of the cores, {time_of(busy)}, {times_faster(busy, one)}"
    rivals = [results.one(part="threads", provider=f"compiled, {ways[way]}") for way in ours]
    if all(rivals):
        said += f"; the same order of work by torch.compile {', '.join(time_of(row) for row in rivals if row)}"
    yield f"{said}; {where(one)}"


def feed(results: Results) -> Iterator[str]:
    """Compare our feed with the quickest DataLoader, by size of image."""
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
        yield f"{'; '.join(said)} (n {row.n}); {where(row)}"


def start_up(results: Results) -> Iterator[str]:
    """List the starts: cold, and with what earlier starts or `make aot` left."""
    if rows := results.find(part="start-up"):
        times = ", ".join(f"{time_of(row)} {row.provider}" for row in rows)
        yield f"{problem_of(rows[0])}, fresh processes: {times}; {where(rows[0])}"


# ---- the README ---------------------------------------------------------------------------------------------------


def filled(template: str, values: Mapping[str, Sequence[str]]) -> str:
    """Fill a Markdown table: each of its lines once for every text of what stands in its braces.

    Raises:
        ValueError: a text would break the table.
    """
    lines = []
    for line in template.splitlines():
        names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", line)))
        for texts in zip(*(values[name] for name in names), strict=True) if names else [()]:
            given = dict(zip(names, texts, strict=True))
            for name, text in given.items():
                if "|" in text or "\n" in text:
                    raise ValueError(f"claim '{name}': has a | or a line break, which ends a cell")
            lines.append(line.format(**given))
    return "\n".join(lines)


def replaced(readme: str, written: str, path: Path) -> str:
    """Put `written` in place of what lies between a README's markers, and these too.

    Raises:
        UserError: they are not there, once each and in order.
    """
    before, begins, rest = readme.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not (begins and ends) or BEGIN in after or END in after:
        raise UserError(f"{path}: expected one '{BEGIN}' and after it one '{END}'; put both lines around the table")
    return before + written + after


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command."""
    arguments = parse_arguments(Arguments, "bench.claims", argv)
    path = root / "README.md"
    found = path.read_text(encoding="utf-8")
    table = filled(TEMPLATE.read_text(encoding="utf-8"), values(read_results(root / "bench" / "results"), root))
    expected = replaced(found, f"{BEGIN}\n\n{table}\n\n{END}", path)
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
