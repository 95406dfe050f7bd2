"""Our step against the official order of work, side by side: `python bench/official_order.py --help`.

Every provider is checked against the fp32 definition over two steps first, and refused where it computes something
else. Then they take turns, a step each, and the host waits for each step. A step's time is the median of the rounds;
beside it the quartiles, and how many times faster than the first provider it is, with the quartiles of the rounds' own
ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from calibrated import calibrated
from rivals import PROVIDERS, Problem, Provider, Run, agreement, bounds

from ensdistill.cli import parse_arguments
from ensdistill.environment import choose_device, choose_precision, device_name
from ensdistill.errors import UserError, nearest, run_main
from ensdistill.methods import Method
from ensdistill.precision import Precision
from ensdistill.step import StepConfig

WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time providers of one training step side by side."""

    providers: tuple[str, ...] = ("official-order", "auto")
    """Names of bench/rivals, the first being what the others are compared with."""
    network: str = "wrn16x2"
    """Teachers and student."""
    method: str = "latentbe+tdiv-sdiv"
    """What is trained."""
    batch: int = 32
    """Images a step."""
    size: int = 32
    """Their side in pixels."""
    members: int = 4
    """E."""
    classes: int = 100
    """K."""
    rounds: int = 15
    """Steps of each provider that are timed; at least 2."""
    device: str | None = None
    """Where to compute: cpu, cuda. Default: a GPU where there is one."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's."""


def main() -> int:
    """The command."""
    arguments = parse_arguments(Arguments, "official_order", description=__doc__)
    device = choose_device(arguments.device)
    if arguments.rounds < 2:
        raise UserError(f"rounds: got {arguments.rounds}, expected at least 2")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    fastest = choose_precision("auto", device)
    runs: dict[str, Run] = {}
    generator = torch.Generator().manual_seed(0)
    B, size = arguments.batch, arguments.size
    batches = [
        (
            torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8, generator=generator).to(device),
            torch.randint(0, arguments.classes, (B,), generator=generator).to(device),
        )
        for _ in range(2)
    ]
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    )
    print(f"{arguments.method}, {arguments.network}, {size} px, B {B}, E {arguments.members}, n {arguments.rounds}")
    for name in arguments.providers:
        provider = _provider(name)
        precision = fastest if fastest in provider.precisions else provider.precisions[0]
        problem = _problem(arguments, precision, device)
        run = provider.make(problem)
        reference = PROVIDERS["pruned"].make(_problem(arguments, "fp32", device))
        difference = agreement(run, reference, batches)
        if not difference.within(bounds(problem)):
            raise UserError(f"{name}: {difference} from the fp32 definition, expected at most {bounds(problem)}")
        runs[f"{name} {precision}"] = run
        print(f"{name} {precision}: {difference}", flush=True)
    report(timed(runs, batches, arguments.rounds))
    return 0


def _provider(name: str) -> Provider:
    if name not in PROVIDERS:
        known = ", ".join(PROVIDERS)
        raise UserError(f"providers: there is none called '{name}'{nearest(name, PROVIDERS)}; expected some of {known}")
    return PROVIDERS[name]


def _problem(arguments: Arguments, precision: Precision, device: torch.device) -> Problem:
    method = Method.parse(arguments.method)
    teachers, student = calibrated(
        arguments.network,
        arguments.method,
        E=arguments.members,
        K=arguments.classes,
        size=arguments.size,
        device=device,
    )
    config = StepConfig(method=method, seed=0)
    return Problem(
        teachers=teachers if method.needs_teachers else None, student=student, config=config, precision=precision
    )


def timed(
    runs: dict[str, Run], batches: Sequence[tuple[torch.Tensor, torch.Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every step of every run, in turns: run i of round j is the i-th or, in odd rounds, the i-th last."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for j in range(-WARM_UP_STEPS, rounds):
        order = list(runs.items())
        for name, run in order if j % 2 == 0 else reversed(order):
            start = time.perf_counter()
            loss = run(*batches[j % len(batches)])["loss"].item()  # waits for the device
            if j >= 0:
                seconds[name].append(time.perf_counter() - start)
            assert 0 < loss < float("inf"), f"{name}: loss {loss}"
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    """One line a run."""
    first = next(iter(seconds.values()))
    for name, each in seconds.items():
        low, middle, high = (1e3 * s for s in statistics.quantiles(each, n=4, method="inclusive"))
        ratios = [theirs / ours for theirs, ours in zip(first, each, strict=True)]
        ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4, method="inclusive")
        ratio = statistics.median(first) / statistics.median(each)
        print(
            f"{name:<26} {middle:8.1f} ms a step (quartiles {low:.1f} to {high:.1f}, IQR {high - low:.1f})   "
            f"{ratio:.2f} x (quartiles {ratio_low:.2f} to {ratio_high:.2f})"
        )


if __name__ == "__main__":
    raise SystemExit(run_main(main))
