"""The helpers of the speed tests, on small problems: rivals are timed alike, and compute what they stand for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from networks import K, small_classifier
from timing import interleaved, num_sets

from bench.harness.calibrated import calibrated, random_images
from bench.harness.compiled_networks import divergence_gradient, loop_forward, vmap_forward
from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student


def test_rivals_take_turns_and_every_call_counts(device: torch.device) -> None:
    counts: Counter[str] = Counter()
    x = torch.randn(1 << 10, device=device)

    def call(name: str, repeats: int) -> object:
        counts[name] += 1
        return [torch.sin(x) for _ in range(repeats)]

    rivals = {
        "slow": [lambda: call("slow", 300)],
        "fast": [lambda: call("fast", 3), lambda: call("fast", 3)],
    }
    timings = interleaved(rivals, device, rounds=21)
    assert list(timings) == ["slow", "fast"]
    assert all(0 < one.low <= one.median <= one.high for one in timings.values())
    assert timings["slow"].median > 5 * timings["fast"].median  # 100 times the work
    if device.type == "cpu":  # on a GPU replays call nothing
        assert counts == {"slow": 22, "fast": 44}


def test_inputs_rotate_past_the_cache(device: torch.device) -> None:
    few, many = num_sets(1e12, device), num_sets(1, device)
    assert few == 2 and many == (2 if device.type == "cpu" else 32)


@pytest.fixture(scope="module")
def networks(device: torch.device) -> Networks:
    student = build_student(Method.parse("latentbe"), small_classifier, E=3, seed=0)
    teachers = Teachers([small_classifier(1 + t) for t in range(3)], K)
    return Networks(teachers.to(device), student.to(device), "fp32")


def images(device: torch.device) -> torch.Tensor:
    return torch.rand(4, 9, 9, 3, device=device).permute(0, 3, 1, 2)


def test_rivals_of_the_forward_are_the_teachers(networks: Networks, device: torch.device) -> None:
    assert networks.teachers is not None
    x = images(device)
    truth = networks.teacher_logits(x)
    torch.testing.assert_close(loop_forward(networks.teachers, "fp32")(x), truth)
    torch.testing.assert_close(vmap_forward(networks.teachers, torch.float32)(x), truth, rtol=1e-3, atol=1e-3)
    # bf16 throughout: 1e-2 measured
    one = vmap_forward(networks.teachers)(x)
    assert one.dtype == torch.bfloat16 and (one - truth).norm() < 0.05 * truth.norm()


def test_the_rival_of_the_perturbation_is_its_definition(networks: Networks, device: torch.device) -> None:
    assert networks.teachers is not None
    x, pair = images(device), (2, 0)
    truth = networks.divergence_gradient(x, pair, with_student=True)
    rival = divergence_gradient(networks.teachers, networks.student, pair, "fp32")
    torch.testing.assert_close(rival(x), truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())
    whole = torch.compile(rival, backend="aot_eager", fullgraph=True, dynamic=False)(
        x
    )  # one graph, no weight gradients
    torch.testing.assert_close(whole, truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())


def test_calibrated_networks_do_not_saturate(device: torch.device) -> None:
    networks = calibrated("wrn28x1", "latentbe", E=2, K=K, size=8, device=device)
    x = random_images(4, 8, device)
    for network in networks:
        logits = network(x).detach()
        assert logits.shape == (2, 4, K) and 0.05 < float(logits.std()) < 5
