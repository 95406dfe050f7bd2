"""Measure who computes each convolution of a training step: `python -m ensdistill.tune --network wrn28x4`.

Prints every candidate's time, its share of the floor and the choice, and keeps the choices where a run looks for them.
What takes the largest share of a step's floor comes first, our kernels for every layer before the library. Each choice
is kept as it comes: `--seconds` ends the measuring when time is up, and the same command later goes on from there.
`--list` prints the convolutions with their bytes, FLOPs and floor on an H100 and measures nothing: it works anywhere.
`--csv` and `--json` write the same to a file.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import track
from rich.table import Table

from ensdistill.config.methods import Method
from ensdistill.costs.dry_run import operations_of
from ensdistill.engine.launch_key import Key
from ensdistill.engine.operations import Pass, RecordingOperations
from ensdistill.engine.tuning.table import Choice, Measured, TuningTable
from ensdistill.engine.tuning.tuner import PROVIDERS, Tuner
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.devices import DEVICES, Device, installed_gpu
from ensdistill.runtime.environment import Precision, choose_precision, commit, versions
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.files import atomic_write

_FLOOR_DEVICE = DEVICES["H100"]
_WIDTH = 180
"""Characters of a line at least: in a narrower terminal lines wrap, where rich would cut columns off."""
_MOST = 1 << 16
"""Largest number that an option takes: numbers of elements then fit 64 bits."""
_OPERATIONS = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure who computes each convolution of a training step on this GPU, and keep the choices."""

    network: str = "wrn28x4"
    """Teachers and student: wrn{depth}x{width}, resnet{20,32,44,56,110}[x{width}], resnet18, resnet34, resnet50."""
    teachers: int = 4
    """E: teachers, and the student's members."""
    batch_size: int = 128
    """Images that a step takes."""
    image_size: int = 32
    """Side of an image in pixels."""
    channels: int = 3
    """Colour channels of an image."""
    num_classes: int = 100
    """Classes that the networks tell apart."""
    method: str = "latentbe+tdiv-sdiv"
    """student[+data shown]; `ce` is how teachers are trained."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 where the GPU computes in it."""
    seconds: float | None = None
    """Measure for so long, then print what is known; a later call goes on. Default: until everything is measured."""
    fresh: bool = False
    """Measure again what was measured before, and try again what crashed."""
    list_only: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the convolutions with bytes, FLOPs and floor on an H100; measure nothing."""
    markdown: bool = False
    """With --list: one row a layer shape, as docs/kernels.md has it."""
    csv: Path | None = None
    """Also write a table to this file: a row a convolution, or, measured, a row a candidate as it goes."""
    json: Path | None = None
    """Also write everything to this file."""


def _empty_table(numbers: Sequence[str], last: str) -> Table:
    """Table without rows: layer and operation, columns of `numbers`, and a last one of words."""
    table = Table(box=None, header_style="bold")
    for column in ("layer", "operation", *numbers, last):
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def list_table(recorded: RecordingOperations, device: Device) -> Table:
    """Table of operations: how often each runs in a step, bytes, FLOPs, floor and which of the two binds."""
    table = _empty_table(("a step", "MB", "GFLOP", "floor µs"), "binds")
    keys = recorded.keys
    for key in in_order(keys):
        costs = (f"{key.bytes / 1e6:.1f}", f"{key.flops / 1e9:.2f}", f"{1e6 * key.floor(device):.1f}")
        table.add_row(key.layer, operation(key), str(keys[key]), *costs, binding(key, device))
    floor = sum(count * key.floor(device) for key, count in keys.items())
    flops = sum(count * key.flops for key, count in keys.items())
    moved = sum(count * key.bytes for key, count in keys.items())
    sums = (str(sum(keys.values())), f"{moved / 1e6:.0f}", f"{flops / 1e9:.0f}", f"{1e6 * floor:.0f}")
    table.add_row("step", "all convolutions", *sums, "", style="bold")
    for one, count in recorded.passes.items():
        costs = (f"{one.bytes / 1e6:.1f}", "", f"{1e6 * one.bytes / device.bandwidth:.1f}")
        table.add_row(one.shape, one.name, str(count), *costs, "memory")
    moved = sum(count * one.bytes for one, count in recorded.passes.items())
    sums = (str(sum(recorded.passes.values())), f"{moved / 1e6:.0f}", "", f"{1e6 * moved / device.bandwidth:.0f}")
    table.add_row("step", "all that runs between them", *sums, "", style="bold")
    partial = (f"{recorded.partial / 1e6:.0f}", "", f"{1e6 * recorded.partial / device.bandwidth:.0f}")
    table.add_row("step", "partial sums that convolutions write", "", *partial, "memory")
    table.add_row("step", "all bytes", "", f"{recorded.bytes / 1e6:.0f}", "", "", "", style="bold")
    return table


def markdown_table(recorded: RecordingOperations, device: Device) -> str:
    """Markdown, a row a layer shape and operation; ranges over the members and epilogues that a step has."""
    lines = [
        "| layer | operation | launches a step | GFLOP | MB | floor µs | binds | µs a step |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in in_order(recorded.keys):
        groups.setdefault((key.layer, f"{key.op}"), []).append(key)

    def row(shape: str, name: str, count: int, columns: Sequence[str], floor: float) -> None:
        lines.append("| " + " | ".join([shape, name, str(count), *columns, f"{1e6 * floor:.0f}"]) + " |")

    total = 0.0
    for (layer, op), keys in sorted(groups.items(), key=lambda item: _OPERATIONS.index(item[0][1])):
        counts = [recorded.keys[key] for key in keys]
        floor = sum(count * key.floor(device) for count, key in zip(counts, keys, strict=True))
        total += floor
        columns = [
            _range([key.flops / 1e9 for key in keys], 1),
            _range([key.bytes / 1e6 for key in keys]),
            _range([1e6 * key.floor(device) for key in keys]),
            " or ".join(sorted({binding(key, device) for key in keys})),
        ]
        row(layer, op, sum(counts), columns, floor)
    passes: dict[tuple[str, str], list[Pass]] = {}
    for one in recorded.passes:
        has_images = "@" in one.shape
        passes.setdefault((one.name, one.shape if has_images else "every layer"), []).append(one)
    for (name, shape), some in sorted(passes.items(), key=lambda item: item[0][0]):
        count = sum(recorded.passes[one] for one in some)
        floor = sum(recorded.passes[one] * one.bytes for one in some) / device.bandwidth
        total += floor
        moved = [one.bytes / 1e6 for one in some]
        columns = ["–", _range(moved, 1), _range([1e6 * one.bytes / device.bandwidth for one in some], 1), "memory"]
        row(shape, f"`{name}`", count, columns, floor)
    partial = recorded.partial / device.bandwidth
    total += partial
    row("every layer", "partial sums", 0, ["–", f"{recorded.partial / 1e6:.0f} in all", "", "memory"], partial)
    flops = sum(count * key.flops for key, count in recorded.keys.items())
    count = sum(recorded.keys.values()) + sum(recorded.passes.values())
    row("all", "", count, [f"{flops / 1e9:.0f} in all", f"{recorded.bytes / 1e6:.0f} in all", "", ""], total)
    return "\n".join(lines)


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Sort keys: large images first, then by channels, kernel, operation and members."""

    def place(key: Key) -> tuple[Any, ...]:
        return -key.H, key.CI, key.CO, -key.k, key.stride, _OPERATIONS.index(key.op), key.M, key.extras

    return sorted(keys, key=place)


def by_share(keys: Mapping[Key, int], rates: Device | None) -> list[Key]:
    """Sort keys: the largest share of the step's floor first; of its bytes where the device's rates are not known."""
    return sorted(keys, key=lambda key: -keys[key] * (key.bytes if rates is None else key.floor(rates)))


def operation(key: Key) -> str:
    """Name a convolution: `forward ×4 of 8: bias, relu`, its members (of those to choose from) and extras."""
    members = f"×{key.M} of {key.E}" if key.members else f"×{key.M}"
    return f"{key.op} {members}" + (f": {', '.join(key.extras)}" if key.extras else "")


def binding(key: Key, device: Device) -> str:
    """Name the bound that the floor comes from, arithmetic or memory."""
    return "arithmetic" if key.flops / device.flops >= key.bytes / device.bandwidth else "memory"


def choice_table(
    choices: Mapping[Key, Choice], keys: Mapping[Key, int], partial: Mapping[Key, int] | None = None
) -> Table:
    """Table of convolutions: the best of Triton's tiles and both forms of the library, in µs, and the choice.

    `partial`: how many candidates of a key are not measured yet, shown as (+2).
    """
    partial = partial or {}
    table = _empty_table(("a step", "triton µs", "loop µs", "grouped µs", "of the floor"), "choice")
    for key in in_order(choices):
        choice = choices[key]
        table.add_row(
            key.layer,
            operation(key),
            str(keys[key]),
            *(_time(choice, *form) for form in (("triton", False), ("library", False), ("library", True))),
            "" if choice.floor_share is None else f"{choice.floor_share:.0%}",
            f"{choice.candidate}" + (f" (+{partial[key]})" if partial.get(key) else ""),
        )
    counts = {key: keys[key] for key in choices}
    best, library = (_total(choices, counts, name) for name in ("", "library"))
    table.add_row(
        "step",
        "all convolutions" if len(choices) == len(keys) else f"{len(choices)} of {len(keys)} convolutions",
        str(sum(counts.values())),
        "",
        "–" if library is None else f"{library:.0f}",
        "",
        "",
        "–" if best is None else f"{best:.0f} µs",
        style="bold",
    )
    return table


def _total(choices: Mapping[Key, Choice], counts: Mapping[Key, int], provider: str) -> float | None:
    """Sum of µs a step by the fastest candidates, or the fastest of one provider; None where one was not measured."""
    times = [
        [count * one.microseconds for one in choices[key].measured if provider in ("", one.candidate.provider)][:1]
        for key, count in counts.items()
    ]
    return sum(time for (time,) in times) if all(times) and times else None


def _time(choice: Choice, provider: str, grouped: bool) -> str:
    found: list[Measured] = [
        one for one in choice.measured if (one.candidate.provider, one.candidate.grouped) == (provider, grouped)
    ]
    return f"{found[0].microseconds:.1f} ±{found[0].spread / 2:.1f}" if found else "–"


def _check(arguments: Arguments) -> None:
    for name in ("teachers", "batch_size", "image_size", "channels", "num_classes"):
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if value < 1:
            raise UserError(f"{option}: got {value}, expected at least 1; give a positive number")
        if value > _MOST:
            raise UserError(f"{option}: got {value}, expected at most {_MOST}; give a smaller number")
    method = Method.parse(arguments.method)
    if method.shown in ("tdiv", "tdiv-sdiv") and arguments.teachers < 2:
        raise UserError(f"--teachers: {method} compares two of them, got 1; give 2 or more, or another --method")
    if arguments.precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision: got {arguments.precision}, expected auto, fp32 or bf16; choose one of them")
    if arguments.markdown and not arguments.list_only:
        raise UserError("--markdown: a form of --list; give both")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UserError(f"--seconds: got {arguments.seconds:g}, expected more than 0; give a positive number")
    if not arguments.list_only and not torch.cuda.is_available():
        raise UserError("tune: measuring needs an NVIDIA GPU that PyTorch sees; --list prints the layers without one")


def _written(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    if path is not None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same columns; the file is whole whenever the process ends."""
    if path is None or not rows:
        return
    try:
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except UserError as error:
        raise UserError(f"--csv {error}") from error


def _problem(arguments: Arguments, precision: Precision, device: str) -> dict[str, Any]:
    """Columns of a row that name the device, the versions and the step."""
    found = versions()
    where = {"device": device, "torch": found["torch"], "triton": found["triton"], "commit": commit()}
    asked = ("network", "method", "teachers", "batch_size", "image_size")
    return where | {name: getattr(arguments, name) for name in asked} | {"precision": precision}


def _layer(key: Key, count: int, floor: Device | None) -> dict[str, Any]:
    costs = {"layer": key.layer, "operation": operation(key), "a_step": count, "flops": key.flops, "bytes": key.bytes}
    return costs | {"floor_us": "" if floor is None else round(1e6 * key.floor(floor), 3)}


def candidate_rows(key: Key, count: int, choice: Choice, floor: Device | None) -> list[dict[str, Any]]:
    """Rows of `key`'s candidates, the fastest first: `us` is the median, `spread_us` 90th less 10th percentile.

    `floor` None, of a device whose rates are not known, leaves `floor_us` and `floor_share` empty.
    """
    rows = []
    for one in choice.measured:
        share = "" if floor is None else round(1e6 * key.floor(floor) / one.microseconds, 4)
        times = {"us": round(one.microseconds, 3), "spread_us": round(one.spread, 3), "floor_share": share}
        chosen = {"provider": one.candidate.provider, "candidate": str(one.candidate)}
        rows.append(_layer(key, count, floor) | chosen | times | {"is_chosen": int(one.candidate == choice.candidate)})
    return rows


def _costs_of(key: Key, count: int) -> dict[str, Any]:
    return {"key": str(key), **asdict(key), "a_step": count, "flops": key.flops, "bytes": key.bytes}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `python -m ensdistill.tune`."""
    arguments = parse_arguments(Arguments, "ensdistill.tune", argv)
    _check(arguments)
    deadline = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuner = None
    if not arguments.list_only:
        tuner = Tuner(TuningTable.of_device(device, fresh=arguments.fresh), device)
        if tuner.process is not None:
            tuner.process.start()  # its imports take as long as what comes next here
    precision = "bf16" if arguments.list_only and arguments.precision == "auto" else arguments.precision
    chosen_precision = choose_precision(precision, device)
    recorded = operations_of(
        arguments.network,
        method=Method.parse(arguments.method),
        E=arguments.teachers,
        B=arguments.batch_size,
        image_size=arguments.image_size,
        in_channels=arguments.channels,
        num_classes=arguments.num_classes,
        precision=chosen_precision,
    )
    keys = recorded.keys
    console = plain_console()
    console.width = max(console.width, _WIDTH)
    if arguments.list_only:
        if arguments.markdown:
            print(markdown_table(recorded, _FLOOR_DEVICE))
        else:
            console.print(list_table(recorded, _FLOOR_DEVICE))
        floors = [{"floor_seconds": key.floor(_FLOOR_DEVICE), **_costs_of(key, n)} for key, n in keys.items()]
        _written(arguments.json, floors)
        problem = _problem(arguments, chosen_precision, _FLOOR_DEVICE.name)
        _write_csv(arguments.csv, [problem | _layer(key, keys[key], _FLOOR_DEVICE) for key in in_order(keys)])
        return
    assert tuner is not None
    table, rates = tuner.table, installed_gpu()
    problem = _problem(arguments, chosen_precision, torch.cuda.get_device_name(device))

    def rows() -> list[dict[str, Any]]:
        known = ((key, table.get(key)) for key in in_order(keys))
        return [
            problem | row for key, choice in known if choice for row in candidate_rows(key, keys[key], choice, rates)
        ]

    order = by_share(keys, rates)
    todo = [(key, (provider,)) for provider in PROVIDERS for key in order]
    try:
        for key, providers in track(todo, description="measuring", console=plain_console(stderr=True), transient=True):
            if deadline is not None and time.monotonic() >= deadline:
                break
            if tuner.left(key, providers):
                tuner.choice(key, providers, deadline=deadline)
                _write_csv(arguments.csv, rows())
    finally:
        tuner.close()
    _write_csv(arguments.csv, rows())
    choices = {key: choice for key in keys if (choice := table.get(key)) is not None}
    partial = {key: len(left) for key in keys if (left := tuner.left(key))}
    where = "" if table.path is None else f"; kept in {table.path}"
    floor = "" if rates is None else f"; floor: {rates.rates}"
    console.print(f"{torch.cuda.get_device_name(device)}{floor}{where}\n", soft_wrap=True)
    console.print(choice_table(choices, keys, partial))
    if partial:
        ours = sum(bool(tuner.left(key, ("triton",))) for key in partial)
        console.print(
            f"\n{len(partial)} of {len(keys)} convolutions have candidates that are not measured (+), {ours} of them "
            "tiles of ours: the same command goes on",
            soft_wrap=True,
        )
    _written(arguments.json, [{**_costs_of(key, keys[key]), **asdict(one)} for key, one in choices.items()])


if __name__ == "__main__":
    sys.exit(run_main(main))
