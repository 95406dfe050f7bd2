"""Whole networks on a GPU: every backend's passes against the modules in float64, a step that waits for nothing,
runs that repeat to the bit.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.harness.calibrated import calibrated, random_images
from ensdistill.config.methods import Method
from ensdistill.engine.networks import KernelNetworks, Networks, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.environment import Precision
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="the kernels need compute capability 8.0",
    ),
]
METHOD = "latentbe+tdiv-sdiv"
K, SIZE = 10, 32
# Relative, in the norm of the whole, added to twice the modules' own error. The modules' on a CPU, wrn10x1 and resnet20
# at B = 4: in bf16 5e-3 to 0.02 (logits), 0.07 to 0.4 (gradients), 5e-4 (statistics); in fp32 3e-8 to 2e-6.
FLOOR = {"bf16": 1e-3, "fp32": 1e-6}


class Problem(NamedTuple):
    """Networks and a batch, and what the modules compute of it in float64."""

    teachers: Teachers
    student: Student
    x_BCHW: Tensor
    seeds_MBK: Tensor
    truth: dict[str, Tensor]


def make_problem(network: str, *, E: int, B: int, size: int, device: torch.device, method: str = METHOD) -> Problem:
    teachers, student = calibrated(network, method, E=E, K=K, size=size, device=device)
    x_BCHW = random_images(B, size, device)
    seeds_MBK = torch.randn(E, B, K, generator=torch.Generator(device).manual_seed(1), device=device)
    exact = Networks(copy.deepcopy(teachers).double(), copy.deepcopy(student).double(), "fp32")
    return Problem(teachers, student, x_BCHW, seeds_MBK, passes(exact, x_BCHW.double(), seeds_MBK.double()))


def passes(networks: Networks, x_BCHW: Tensor, seeds_MBK: Tensor) -> dict[str, Tensor]:
    """All that a step asks of networks, each in one piece. The student's statistics advance."""
    logits = networks.teacher_logits(x_BCHW)
    image_gradient = networks.divergence_gradient(x_BCHW, (0, len(seeds_MBK) - 1), with_student=True)
    student_logits = networks.student_logits(x_BCHW)
    parameters = list(networks.student.parameters())
    gradients = torch.autograd.grad((student_logits * seeds_MBK).sum(), parameters)
    statistics = [x for name, x in networks.student.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return {
        "teachers' logits": logits,
        "image gradient": image_gradient,
        "student's logits": student_logits.detach(),
        "parameter gradients": torch.cat([gradient.flatten() for gradient in gradients]),
        "running statistics": torch.cat([x.flatten() for x in statistics]),
    }


def errors(problem: Problem, backend: Backend, precision: Precision) -> dict[str, float]:
    """Relative errors of a backend, `reference` being the modules."""
    teachers, student = copy.deepcopy((problem.teachers, problem.student))
    networks = make_networks(backend, teachers, student, precision, problem.x_BCHW.device)
    if isinstance(networks, KernelNetworks):
        assert not networks.notes, networks.notes  # nothing runs through the modules
    results = passes(networks, problem.x_BCHW, problem.seeds_MBK)
    return {
        name: float((results[name].double() - right).norm() / right.norm()) for name, right in problem.truth.items()
    }


def assert_as_good_as_the_modules(problem: Problem, backend: Backend, precision: Precision) -> None:
    ours, modules = errors(problem, backend, precision), errors(problem, "reference", precision)
    for name in problem.truth:
        print(f"\n{name}: {backend} {ours[name]:.2g}, modules {modules[name]:.2g}", end="")
    worse = {
        name: (ours[name], modules[name]) for name in ours if not ours[name] <= 2 * modules[name] + FLOOR[precision]
    }
    assert not worse, f"(ours, the modules'): {worse}"


NETWORKS = ("wrn10x1", "wrn28x4", "resnet20", "wrn28x4 hydra", "resnet20 hydra")


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request: pytest.FixtureRequest, device: torch.device) -> Problem:
    network, _, student = request.param.partition(" ")
    method = f"{student}+tdiv-sdiv" if student else METHOD
    return make_problem(network, E=3, B=16, size=SIZE, device=device, method=method)


@pytest.mark.values
@pytest.mark.parametrize(
    ("problem", "backend"),
    # `auto` measures every layer and takes from the other two: one network shows that
    [*itertools.product(NETWORKS, ["triton", "library"]), ("wrn10x1", "auto")],
    indirect=["problem"],
    scope="module",
)
def test_bf16_is_as_good_as_autocast(backend: Backend, problem: Problem) -> None:
    assert_as_good_as_the_modules(problem, backend, "bf16")


@pytest.mark.values
@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("backend", ["triton", "library"])
def test_fp32_is_as_good_as_pytorch_without_tf32(backend: Backend, problem: Problem) -> None:
    assert_as_good_as_the_modules(problem, backend, "fp32")


@pytest.mark.values
@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_channels_that_are_no_power_of_two(precision: Precision, device: torch.device) -> None:
    wide = make_problem("wrn28x10", E=2, B=4, size=SIZE, device=device)  # 160, 320, 640
    assert_as_good_as_the_modules(wide, "triton", precision)


def make_state(
    networks: tuple[Teachers, Student], method: str, backend: Backend, device: torch.device
) -> tuple[State, StepConfig]:
    """A state of its own, ready to step in bf16."""
    parsed = Method.parse(method)
    teachers, student = copy.deepcopy(networks)
    state = State(
        networks=make_networks(backend, teachers, student, "bf16", device),
        optimizer=make_optimizer(student, 5e-4),
    )
    return state, StepConfig(method=parsed, seed=3)


def steps(state: State, config: StepConfig, num_steps: int, *, B: int, size: int) -> dict[str, Tensor]:
    """Step on one batch of random pixels; the last step's measures."""
    device = next(state.student.parameters()).device
    generator = torch.Generator(device).manual_seed(7)
    images_BHWC = torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8, generator=generator, device=device)
    labels_B = torch.randint(0, K, (B,), generator=generator, device=device)
    measures: dict[str, Tensor] = {}
    for _ in range(num_steps):
        measures = train_step(state, config, images_BHWC, labels_B, lr=0.05)
    return measures


@pytest.mark.parametrize("method", [METHOD, "latentbe+confods", "be+gaussian", "kd+tdiv", "hydra+tdiv-sdiv"])
def test_a_step_waits_for_nothing(method: str, device: torch.device) -> None:
    networks = calibrated("wrn10x1", method, E=3, K=K, size=SIZE, device=device)
    state, config = make_state(networks, method, "triton", device)
    steps(state, config, 2, B=16, size=SIZE)  # compiles
    images_BHWC = torch.randint(0, 256, (16, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
    labels_B = torch.randint(0, K, (16,), device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, config, images_BHWC, labels_B, lr=0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.values
def test_two_runs_are_bit_identical(device: torch.device) -> None:
    networks = calibrated("wrn28x4", METHOD, E=3, K=K, size=SIZE, device=device)
    first, second = (run(networks, "triton", 4, B=16, size=SIZE, device=device) for _ in range(2))
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def run(
    networks: tuple[Teachers, Student], backend: Backend, num_steps: int, *, B: int, size: int, device: torch.device
) -> dict[str, Tensor]:
    """Everything that `num_steps` steps leave: measures, parameters, statistics, momentum."""
    state, config = make_state(networks, METHOD, backend, device)
    measures = steps(state, config, num_steps, B=B, size=size)
    momenta: dict[str, Any] = {
        f"momentum {i}": slots["momentum_buffer"] for i, slots in enumerate(state.optimizer.state.values())
    }
    return measures | momenta | dict(state.student.state_dict())
