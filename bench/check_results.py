"""What the tools of a check leave, as rows of tables: benchmarks, tests, training runs; and the tables themselves.

A row is a flat dictionary. Every table is written as CSV and as JSON, with the same columns in front: the device,
versions and commit that it is of.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensdistill.files import atomic_write

Row = dict[str, Any]

_PROGRESS = re.compile(r"^(\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def write_table(folder: Path, name: str, rows: Sequence[Row], identity: Mapping[str, Any], key: Sequence[str]) -> None:
    """Write `rows` to `folder`/`name`.csv and .json, `identity` in front of each.

    Rows that the files hold already stay, if they have the same identity and no new row has their values of `key`:
    parts may be run one by one. Those of another device, version or commit go.
    """
    new = [{**identity, **row, **identity} for row in rows]  # in front, and over what the row says itself
    replaced = {_values(row, key) for row in new}
    old = [row for row in read_table(folder / f"{name}.json") if _values(row, identity) == _values(identity, identity)]
    kept = [row for row in old if _values(row, key) not in replaced] + new
    columns = list(dict.fromkeys(column for row in kept for column in row))
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_write(folder / f"{name}.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(kept)


def _values(row: Mapping[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in columns)


def read_table(path: Path) -> list[Row]:
    """The rows of a JSON table; none where it is missing or was cut off."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return rows if isinstance(rows, list) else []


def read_csv(path: Path) -> list[Row]:
    """The whole rows of a CSV table that another process may have been writing when it ended."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


# ---- pytest-benchmark ---------------------------------------------------------------------------------------------


def benchmark_rows(path: Path) -> list[Row]:
    """A row a benchmark of a `--benchmark-json` file; none where it was not written.

    `us` is the median over the rounds, with the quartiles and the extremes beside it; what the benchmark added
    (`extra_info`) follows.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    rows = []
    for one in report["benchmarks"]:
        parameters = dict(one["params"] or {})
        provider = parameters.pop("provider", None) or parameters.pop("backend", None) or "library"
        stats, extra = one["stats"], dict(one["extra_info"])
        extra.pop("device", None)
        extra.pop("microseconds", None)
        times = {"us": "median", "q1_us": "q1", "q3_us": "q3", "min_us": "min", "max_us": "max"}
        rows.append(
            {
                "file": Path(one["fullname"].split("::")[0]).name,
                "benchmark": one["name"].split("[")[0],
                "problem": ", ".join(f"{name} {value}" for name, value in parameters.items()),
                "provider": provider,
                **{column: round(1e6 * stats[name], 3) for column, name in times.items()},
                "rounds": stats["rounds"],
                "calls_a_round": stats["iterations"],
                **extra,
            }
        )
    return rows


def fastest(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows of each problem, the fastest first."""
    problems: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        problems.setdefault(_values(row, ("network", "benchmark", "problem")), []).append(row)
    return {problem: sorted(rivals, key=lambda row: float(row["us"])) for problem, rivals in problems.items()}


def races_headline(rows: Sequence[Row], ours: str = "triton") -> str:
    """`142 timings; triton is the fastest in 41 of 48 problems`, of those that several computed."""
    races = [race for race in fastest(rows).values() if len(race) > 1 and any(row["provider"] == ours for row in race)]
    won = sum(race[0]["provider"] == ours for race in races)
    return f"{len(rows)} timings; {ours} is the fastest in {won} of {len(races)} problems"


def times_headline(rows: Sequence[Row]) -> str:
    """`bench_teachers: auto 2.41 ms, library 3.02 ms; …`, the fastest three of each problem."""
    parts = []
    for (network, benchmark, _), race in fastest(rows).items():
        name = " ".join(word for word in (network, benchmark.removeprefix("bench_")) if word)
        times = (f"{row['provider']} {1e-3 * float(row['us']):.3g} ms{_share(row)}" for row in race[:3])
        parts.append(f"{name}: {', '.join(times)}")
    return "; ".join(parts)


def _share(row: Row) -> str:
    share = row.get("roofline")
    return f" ({share:.0%} of the floor)" if isinstance(share, float) else ""


# ---- pytest ---------------------------------------------------------------------------------------------------------


def test_rows(junit: Path, log: Path) -> list[Row]:
    """A row a test: from pytest's JUnit report, or, where it came to none, from the lines that `pytest -v` printed."""
    if junit.exists():
        cases = ElementTree.parse(junit).iter("testcase")
        return [_of_case(case) for case in cases if case.get("name")]  # the one that was interrupted has none
    words = {"PASSED": "passed", "SKIPPED": "skipped", "ERROR": "error", "XFAIL": "skipped"}
    rows = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        if found := _PROGRESS.match(line):
            module = found[1].removesuffix(".py").replace("/", ".")
            rows.append({"test": f"{module}::{found[2]}", "outcome": words.get(found[3], "failed"), "message": ""})
    return rows


def _of_case(case: ElementTree.Element) -> Row:
    outcome, message = "passed", ""
    for tag, word in (("skipped", "skipped"), ("error", "error"), ("failure", "failed")):
        if (found := case.find(tag)) is not None:
            outcome, message = word, (found.get("message") or "").strip()
    first = message.splitlines()[0][:300] if message else ""
    return {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome, "message": first}


def tests_headline(rows: Sequence[Row]) -> str:
    """`209 passed, 2 failed, 9 skipped`."""
    counts = {word: sum(row["outcome"] == word for row in rows) for word in ("passed", "failed", "error", "skipped")}
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number)


# ---- training runs --------------------------------------------------------------------------------------------------


def training_rows(run: Path) -> list[Row]:
    """A row a network that was trained, or began to be, in a run folder: speed, waiting for data, what the device did.

    Rates are medians with quartiles over the log's lines but the first, in which things are still being compiled;
    utilisation is the monitor's mean, with the 10th and 90th percentile of its samples.
    """
    return [_of_training(path.parent, run) for path in sorted(run.rglob("metrics.jsonl"))]


def _of_training(folder: Path, run: Path) -> Row:
    outcome = _read_object(folder / "outcome.json")
    device = outcome.get("device") or {}
    lines = _read_lines(folder / "metrics.jsonl")
    rates = [line["images_per_s"] for line in lines if line["kind"] == "train" and line.get("images_per_s")]
    rates = sorted(rates[1:] or rates)
    samples = [line for line in lines if line["kind"] == "device"]
    seconds, waited = outcome.get("seconds"), outcome.get("waited")
    accuracies = [line["acc"] for line in lines if line["kind"] == "valid"]
    return {
        "training": str(folder.relative_to(run)),
        "finished": int(bool(outcome)),
        "seconds": _rounded(seconds),
        "images": outcome.get("images", ""),
        "images_per_s": _rounded(statistics.median(rates), 1) if rates else "",
        "images_per_s_q1": _rounded(_quantile(rates, 0.25), 1),
        "images_per_s_q3": _rounded(_quantile(rates, 0.75), 1),
        "log_lines": len(rates),
        "data_wait_share": _rounded(waited / seconds, 4) if seconds and waited is not None else "",
        "utilisation": _rounded(device.get("utilisation")),
        "utilisation_p10": _rounded(_quantile(_known(samples, "utilisation"), 0.1)),
        "utilisation_p90": _rounded(_quantile(_known(samples, "utilisation"), 0.9)),
        "clock_mhz": _rounded(_quantile(_known(samples, "clock_mhz"), 0.5), 0),
        "power_w": _rounded(_quantile(_known(samples, "power_w"), 0.5), 0),
        "memory_gb": _rounded(max(_known(samples, "memory_gb"), default=None), 2),
        "samples": len(samples),
        "wh": _rounded(device.get("energy_wh")),
        "throttled_share": _rounded(device.get("throttled")),
        "shared_share": _rounded(device.get("shared")),
        "accuracy": _rounded(accuracies[-1], 4) if accuracies else "",
    }


def training_headline(row: Row) -> str:
    """`31,250 images/s for 36 s, utilisation 97 %, 0.4 % waiting for data, 4.1 Wh`; what is not known is left out."""
    parts = [f"{row['images_per_s']:,.0f} images/s" if row["images_per_s"] != "" else "no step was logged"]
    parts[0] += f" for {row['seconds']:.0f} s" if row["finished"] else ", not finished"
    if row["utilisation"] != "":
        parts.append(f"utilisation {row['utilisation']:.0%}")
    if row["data_wait_share"] != "":
        parts.append(f"{row['data_wait_share']:.1%} waiting for data")
    if row["wh"] != "":
        parts.append(f"{row['wh']:.3g} Wh")
    if row["throttled_share"]:
        parts.append(f"throttled in {row['throttled_share']:.0%} of the samples")
    return ", ".join(parts)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # the half line of a process that was killed
    return lines


def _known(lines: Iterable[dict[str, Any]], name: str) -> list[float]:
    return sorted(line[name] for line in lines if line.get(name) is not None)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[round(share * (len(ordered) - 1))] if ordered else None


def _rounded(value: float | None, digits: int = 3) -> float | str:
    return "" if value is None else round(value, digits)
