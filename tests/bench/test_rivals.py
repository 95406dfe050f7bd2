"""The providers of bench/rivals: all compute the step that they are timed on, and spend what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import CountConvs, K, move_, small_batch, small_classifier, small_state
from torch import Tensor, nn

from bench.rivals import PROVIDERS, Agreement, Problem, agreement, bounds
from bench.rivals.compiled import Compiled
from bench.rivals.official import OfficialOrder
from ensdistill.config.methods import Method
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.layers import BatchNorm2d, GlobalAveragePool
from ensdistill.models.students import build_student
from ensdistill.runtime.environment import Precision
from ensdistill.training.step import StepConfig

METHODS = ["ce", "kd", "kd+tdiv", "latentbe", "be+tdiv", "latentbe+tdiv-sdiv"]
# Two steps in fp32, three seeds of every method, on a CPU: at most 5e-6, 4e-7, 7e-5, 2e-6 by the modules (the
# perturbation is a normalised gradient), 5e-6, 3e-7, 7e-5, 2e-6 by the library and by torch.compile.
CLOSE = Agreement(shown=1e-4, loss=1e-5, parameters=1e-3, statistics=5e-5)


def tiny_classifier(seed: int) -> Classifier:
    """Make a network so small that torch.compile compiles it in seconds."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, padding=1), BatchNorm2d(8), nn.ReLU(), GlobalAveragePool(), nn.Linear(8, K)
    classifier = Classifier(nn.Sequential(*layers), [0.4] * 3, [0.3] * 3)
    move_(classifier, seed)
    return classifier


def small_problem(
    method: str,
    precision: Precision = "fp32",
    *,
    E: int = 3,
    seed: int = 0,
    make: Any = small_classifier,
    device: torch.device | None = None,
    **changed: Any,
) -> Problem:
    parsed = Method.parse(method)
    student = build_student(parsed, make, E=E, seed=seed)
    move_(student, seed + 1)
    teachers = Teachers([make(100 + t) for t in range(E)], K) if parsed.needs_teachers else None
    config = StepConfig(**{"method": parsed, "seed": 3 + seed, "pad": 1, "alpha": 0.9} | changed)
    return Problem(
        teachers=None if teachers is None else teachers.to(device or "cpu"),
        student=student.to(device or "cpu"),
        config=config,
        precision=precision,
    )


def batches(device: torch.device | None = None, num: int = 2) -> list[tuple[Tensor, Tensor]]:
    images_BHWC, labels_B = small_batch()
    return [(images_BHWC.to(device or "cpu"), labels_B.to(device or "cpu"))] * num


@pytest.fixture
def fresh_dynamo() -> None:
    """Reset dynamo: one case's compiled variants do not count against the next one's."""
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("provider", ["official-order", "library"])
def test_two_steps_are_the_definition(provider: str, method: str) -> None:
    run = PROVIDERS[provider].make(small_problem(method))
    difference = agreement(run, PROVIDERS["pruned"].make(small_problem(method)), batches())
    assert difference.within(CLOSE), difference


@pytest.mark.parametrize("method", ["ce", "latentbe+tdiv-sdiv"])
@pytest.mark.parametrize("provider", ["official-order-amp", "pruned", "library"])
def test_bf16_follows_the_definition(provider: str, method: str) -> None:
    problem = small_problem(method, "bf16")
    run = PROVIDERS[provider].make(problem)
    difference = agreement(run, PROVIDERS["pruned"].make(small_problem(method)), batches())
    assert difference.within(bounds(problem)), difference
    assert difference.loss > 1e-5  # else bf16 was not used


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("method", "stacked"), [("ce", False), ("kd+tdiv", False), ("latentbe+tdiv-sdiv", True)])
def test_what_is_compiled_is_whole_and_the_definition(method: str, stacked: bool) -> None:
    run = Compiled(small_problem(method, make=tiny_classifier), stacked=stacked, compiler="aot_eager")
    reference = PROVIDERS["pruned"].make(small_problem(method, make=tiny_classifier))
    difference = agreement(run, reference, batches(num=3))  # other pairs
    assert difference.within(CLOSE), difference


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_compiles_a_tiny_step() -> None:
    """Some 20 seconds cold; the draws of the augmentation would double that."""
    problem = small_problem("latentbe+tdiv-sdiv", E=2, make=tiny_classifier, pad=0, flip=False)
    run = PROVIDERS["compiled"].make(problem)
    difference = agreement(run, PROVIDERS["pruned"].make(problem), batches())
    assert difference.within(CLOSE), difference


@pytest.mark.values
@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_dynamo", "without_tf32")
@pytest.mark.parametrize("provider", [name for name, one in PROVIDERS.items() if "fp32" in one.precisions])
def test_on_a_gpu_two_steps_are_the_definition(provider: str, device: torch.device) -> None:
    """Warming the CUDA graphs up leaves no trace, and their steps are as many as they say."""
    method = "latentbe+tdiv-sdiv"
    problem = small_problem(method, device=device)
    run = PROVIDERS[provider].make(problem)
    difference = agreement(run, PROVIDERS["pruned"].make(problem), batches(device, 3))
    within = bounds(problem) if provider == "official-order-tf32" else replace(CLOSE, shown=1e-3, parameters=1e-2)
    assert difference.within(within), difference


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("shown", {"seed": 4}),
        ("loss", {"tau": 4.001}),
        ("parameters", {"weight_decay": 6e-4}),
        ("parameters", {"alpha": 0.89}),
    ],
)
def test_another_step_is_not_taken_for_the_definition(field: str, changed: dict[str, Any]) -> None:
    method = "latentbe+tdiv-sdiv"
    run = PROVIDERS["official-order"].make(small_problem(method, **changed))
    difference = agreement(run, PROVIDERS["pruned"].make(small_problem(method)), batches())
    assert getattr(difference, field) > 2 * getattr(CLOSE, field)


def test_statistics_and_nan_count() -> None:
    run, reference = (PROVIDERS["pruned"].make(small_problem("ce")) for _ in range(2))
    run.student.get_buffer("classifier.network.norm.running_var").mul_(1.01)
    moved = agreement(run, reference, batches())
    assert moved.statistics > 2 * CLOSE.statistics and not moved.within(CLOSE)
    run.student.get_parameter("classifier.network.linear.bias").data.fill_(float("nan"))
    assert not agreement(run, reference, batches()).within(CLOSE)


# In F, one forward of one network over the batch, as is one backward of it to inputs or to weights.
@pytest.mark.parametrize(
    ("provider", "method", "forward", "to_input", "to_weight"),
    [
        ("official-order", "latentbe+tdiv-sdiv", 16, 12, 4),  # 32
        ("official-order-amp", "latentbe+tdiv-sdiv", 16, 12, 4),
        ("pruned", "latentbe+tdiv-sdiv", 12, 6, 4),  # 22
        ("official-order", "be+tdiv", 12, 8, 4),
        ("pruned", "be+tdiv", 10, 5, 4),
        ("official-order", "latentbe", 8, 4, 4),
        ("pruned", "latentbe", 8, 4, 4),
    ],
)
def test_orders_of_work_spend_what_they_say(
    provider: str, method: str, forward: int, to_input: int, to_weight: int
) -> None:
    run = PROVIDERS[provider].make(small_problem(method, PROVIDERS[provider].precisions[0], E=4))
    images_BHWC, labels_B = small_batch()
    with CountConvs() as one:
        small_classifier(0).eval()(images_BHWC.permute(0, 3, 1, 2) / 255)
    with CountConvs() as step:
        run(images_BHWC, labels_B)
    spent = [count / one.forward for count in (step.forward, step.to_input, step.to_weight)]
    assert spent == [forward, to_input, to_weight]


def test_the_official_order_is_contiguous_and_leaves_its_problem_alone() -> None:
    problem = small_problem("latentbe+tdiv-sdiv")
    before = {name: x.clone() for name, x in problem.student.state_dict().items()}
    run = OfficialOrder(problem)
    run(*small_batch())
    weights = [p for p in [*run.student.parameters(), *run.teachers.parameters()] if p.ndim == 4]
    assert weights and run.shown.is_contiguous() and all(p.is_contiguous() for p in weights)
    assert all(torch.equal(x, before[name]) for name, x in problem.student.state_dict().items())
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize(
    ("method", "match"), [("latentbe+ods", "shown one of"), ("hydra+tdiv-sdiv", "got HydraStudent")]
)
def test_problems_that_not_all_can_compute_are_refused(method: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small_problem(method)
    state, config = small_state("kd")
    with pytest.raises(ValueError, match="teachers: got None for the method kd"):
        Problem(teachers=None, student=state.student, config=config)
