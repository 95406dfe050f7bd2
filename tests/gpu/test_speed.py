"""Speed on a GPU: share of the floor, tuned dispatch beside the library, fused passes beside torch.compile.

Medians over rounds in which all rivals take turns, each a CUDA graph over inputs that together do not fit in the L2
cache (see timing.py). Every test prints what it measured: `pytest tests/gpu/test_speed.py -s`. The first run measures
WRN-28-4's convolutions for the dispatch and keeps the choices where a training run looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from timing import Timing, interleaved, num_sets
from torch import Tensor

from bench.harness.calibrated import calibrated, random_images
from bench.harness.compiled_networks import compiled, divergence_gradient, loop_forward, vmap_forward
from ensdistill.config.methods import Method
from ensdistill.engine.launch_key import Key
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import Backend, TunedOperations
from ensdistill.engine.tuning.choices import Candidate, Choice, TuningTable, arguments
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.devices import DEVICES, installed_gpu
from ensdistill.tune import in_order, operation, operations_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.values,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="the kernels need compute capability 8.0",
    ),
]
NETWORK, E, B, SIZE, K = "wrn28x4", 4, 128, 32, 100
METHOD = Method.parse("latentbe+tdiv-sdiv")
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "library")
MIN_FLOOR_SHARE = 0.65
MAX_OF_LIBRARY = 1.02
MIN_FORWARD_GAIN, MIN_PERTURBATION_GAIN = 1.5, 2.0
# Between two bf16 computations, in the norm of the whole; on a CPU 0.006 and 0.12 at B = 8.
MAX_LOGITS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 0.03, 0.3
IMAGE_SETS = 4  # a pass's activations alone are larger than the cache


@pytest.fixture(scope="module")
def operations(device: torch.device) -> TunedOperations:
    """Make the operations as a training run has them."""
    return TunedOperations(TuningTable.of_device(device))


@pytest.fixture(scope="module")
def step_keys() -> list[Key]:
    """The convolutions of a training step that take the most, up to half of each operation's floor: 14 of 75.

    `python -m ensdistill.tune` measures all of them.
    """
    recorded = operations_of(NETWORK, method=METHOD, E=E, B=B, image_size=SIZE, num_classes=K)
    floors = {key: times * key.floor(DEVICES["H100"]) for key, times in recorded.keys.items()}
    taken: list[Key] = []
    for op in ("forward", "input gradient", "weight gradient"):
        left = 0.5 * sum(floor for key, floor in floors.items() if key.op == op)
        for key in sorted((key for key in floors if key.op == op), key=lambda key: -floors[key]):
            if left > 0:
                taken.append(key)
                left -= floors[key]
    return in_order(taken)


def chosen(operations: TunedOperations, key: Key, given: Any) -> Choice:
    """Choose who computes `key`, measured now if it never was."""
    operations.run(key, *given)
    choice = operations.table.get(key)
    assert choice is not None
    return choice


def input_sets(key: Key, device: torch.device) -> list[Any]:
    """Arguments of `key`'s operation, past the cache."""
    return [arguments(key, device, seed) for seed in range(num_sets(key.bytes, device))]


def wide_key(op: str, C: int, size: int, present: tuple[str, ...]) -> Key:
    """A 3x3 convolution of WRN-28-4 between equal widths, all members'."""
    fields: dict[str, Any] = {"op": op, "E": E, "M": E, "B": B, "H": size, "W": size, "CI": C, "CO": C, "k": 3}
    out_dtype = "fp32" if op == "weight gradient" else "bf16"
    return Key(**fields, stride=1, dtype="bf16", out_dtype=out_dtype, present=present)


@pytest.mark.parametrize(
    ("op", "present"),
    [
        ("forward", ()),
        ("forward", ("bias", "relu")),
        ("forward", ("residual", "second")),
        ("input gradient", ()),
        ("weight gradient", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
@pytest.mark.parametrize(("C", "size"), [(64, 32), (128, 16), (256, 8)])
def test_kernels_reach_their_share_of_the_floor(
    C: int, size: int, op: str, present: tuple[str, ...], operations: TunedOperations, device: torch.device
) -> None:
    rates = installed_gpu()
    if rates is None or rates.source != "measured":
        pytest.skip(f"no rates were measured for an {torch.cuda.get_device_name(device)}")
    key = wide_key(op, C, size, present)
    sets = input_sets(key, device)
    measured = chosen(operations, key, sets[0]).measured
    best = next(one.candidate for one in measured if one.candidate.provider == "triton")
    timing = interleaved({"triton": [partial(best.run, key, *each) for each in sets]}, device)["triton"]
    share = 1e6 * key.floor(rates) / timing.median
    print(f"\n{key.layer} {operation(key)}: {best}: {timing}, {share:.0%} of the floor by {rates.rates}")
    assert share >= MIN_FLOOR_SHARE, f"{share:.0%} of the floor by {best}"


@pytest.mark.parametrize("op", ["forward", "input gradient", "weight gradient"])
def test_tuned_dispatch_is_never_slower_than_the_library(
    op: str, step_keys: Sequence[Key], operations: TunedOperations, device: torch.device
) -> None:
    slower = []
    print()
    for key in (key for key in step_keys if key.op == op):
        sets = input_sets(key, device)
        choice = chosen(operations, key, sets[0])
        rivals = {"chosen": [partial(operations.run, key, *each) for each in sets]}
        for candidate in library_forms(choice):
            rivals[str(candidate)] = [partial(candidate.run, key, *each) for each in sets]
        timings = interleaved(rivals, device, rounds=51)
        report = f"{key.layer} {operation(key)}: {choice.candidate} {line(timings)}"
        print(report)
        library = min((timing.median for name, timing in timings.items() if name != "chosen"), default=float("inf"))
        if timings["chosen"].median > MAX_OF_LIBRARY * library:
            slower.append(report)
    assert not slower, "\n".join(["slower than the library:", *slower])


def library_forms(choice: Choice) -> list[Candidate]:
    """The library's forms that run and are not the choice itself, which needs no comparison with itself."""
    measured = [one.candidate for one in choice.measured]
    return [one for one in measured if one.provider == "library" and one != choice.candidate]


def line(timings: dict[str, Timing]) -> str:
    """All of them in words."""
    return "; ".join(f"{name} {timing}" for name, timing in timings.items())


@pytest.fixture(scope="module")
def networks(device: torch.device) -> tuple[Teachers, Student]:
    return calibrated(NETWORK, str(METHOD), E=E, K=K, size=SIZE, device=device)


@pytest.fixture(scope="module")
def fused(networks: tuple[Teachers, Student], device: torch.device) -> dict[Backend, Networks]:
    """The networks by backend; the test is of `auto`."""
    return {name: make_networks(name, *networks, "bf16", device) for name in BACKENDS}


@pytest.fixture(scope="module")
def images(device: torch.device) -> list[Tensor]:
    """(B, C, H, W) in channels_last, as the step has them."""
    return [random_images(B, SIZE, device, seed) for seed in range(IMAGE_SETS)]


def gain(
    ours: Mapping[Backend, Callable[..., Tensor]],
    rivals: Mapping[str, Callable[..., Tensor]],
    images: Sequence[Tensor],
    device: torch.device,
    max_difference: float,
) -> float:
    """How many times as fast as the fastest rival `auto` is; all must compute the same, in the norm of the result."""
    functions: dict[Any, Callable[..., Tensor]] = {**ours, **rivals}
    torch._dynamo.reset()  # variants of other tests do not count against this one's
    expected = next(iter(rivals.values()))(images[0]).float()
    for name, function in functions.items():
        difference = float((function(images[0]).float() - expected).norm() / expected.norm())
        assert difference <= max_difference, f"{name}: relative difference {difference:.2g}"
    calls = {name: [partial(function, x) for x in images] for name, function in functions.items()}
    timings = interleaved(calls, device)
    result = min(timings[name].median for name in rivals) / timings["auto"].median
    print(f"\n{line(timings)}: {result:.2f} × as fast as the best of {', '.join(rivals)}")
    return result


def test_the_fused_forward_beats_compiled_teachers(
    networks: tuple[Teachers, Student], fused: dict[Backend, Networks], images: list[Tensor], device: torch.device
) -> None:
    teachers, _ = networks
    ours = {name: fused[name].teacher_logits for name in BACKENDS}
    rivals = {"loop": compiled(loop_forward(teachers)), "vmap": compiled(vmap_forward(teachers))}
    assert gain(ours, rivals, images, device, MAX_LOGITS_DIFFERENCE) >= MIN_FORWARD_GAIN


def test_the_fused_perturbation_beats_compiled_networks(
    networks: tuple[Teachers, Student], fused: dict[Backend, Networks], images: list[Tensor], device: torch.device
) -> None:
    pair = (0, E - 1)
    ours = {name: partial(fused[name].divergence_gradient, pair=pair, with_student=True) for name in BACKENDS}
    rivals = {"compiled": compiled(divergence_gradient(*networks, pair, "bf16"))}
    assert gain(ours, rivals, images, device, MAX_GRADIENT_DIFFERENCE) >= MIN_PERTURBATION_GAIN
