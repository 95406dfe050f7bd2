"""The learning rate at the corners of its schedule; both optimizers in float64 against PyTorch's, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from networks import small_classifier
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.models.students import build_student
from ensdistill.training.optimizer import MOMENTUM, Schedule, make_optimizer, remembered, restore_optimizer

E, DECAY, FACTOR_RATE = 3, 0.03, 0.5


def test_linear_then_cosine():
    schedule = Schedule(peak=0.4, warmup_steps=4, total_steps=12)
    assert [schedule(step) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert schedule(8) == pytest.approx(0.2)
    assert schedule(10) == pytest.approx(0.4 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert schedule(12) == pytest.approx(0) and schedule(13) == pytest.approx(0)


def test_without_warm_up_it_starts_at_the_peak():
    assert Schedule(peak=0.1, warmup_steps=0, total_steps=5)(0) == 0.1


def student_of():
    return build_student(Method(student="latentbe"), small_classifier, E=E, seed=0).double()


def step_(optimizer, step):
    """Update by gradients that are functions of the step, at a rate of its own."""
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        lr = 0.01 * (step % 3) * group.get("rate_scale", 1)
        group["lr"] = torch.tensor(lr, dtype=torch.float64) if isinstance(group["lr"], torch.Tensor) else lr
        for parameter in group["params"]:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the order of memory, as autograd's
    optimizer.step()


def groups_of(student):
    """Plain groups of the parameters: everything decays, norms and biases too; the factors E times as fast."""
    factors, shared = student.factors(), student.shared()
    assert len(factors) > 5 and any(parameter.ndim == 1 for parameter in shared)
    scale = FACTOR_RATE * E
    return [
        {"params": shared, "weight_decay": DECAY},
        {"params": factors, "weight_decay": DECAY / E, "rate_scale": scale},
    ]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_updates_are_those_of_pytorch_in_float64(kind):
    student, other = student_of(), student_of()
    ours = make_optimizer(student, DECAY, FACTOR_RATE, kind)
    if kind == "sgd":
        theirs = torch.optim.SGD(groups_of(other), lr=0.0, momentum=MOMENTUM, nesterov=True, foreach=False)
    else:
        theirs = torch.optim.AdamW(groups_of(other), lr=0.0, foreach=False)
    for step in range(8):
        for optimizer in (ours, theirs):
            step_(optimizer, step)
        for mine, right in zip(student.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-14)


def test_adamw_draws_factors_to_1_and_everything_else_to_0():
    """By hand: with no gradient u is 0, and a step scales weights and deviations alike."""
    student = student_of()
    for rho in student.factors():
        nn.init.normal_(rho)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer = make_optimizer(student, DECAY, 1.0, "adamw")
    for group in optimizer.param_groups:
        group["lr"].fill_(0.1 * group["rate_scale"])
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for value, parameter in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), (1 - 0.1 * DECAY) * value, rtol=1e-14, atol=0)


def test_what_is_restored_goes_on_in_the_tensors_that_were_there():
    student, other = student_of(), student_of()
    unbroken, resumed = (make_optimizer(one, DECAY, kind="adamw") for one in (student, other))
    for step in range(3):
        step_(unbroken, step)
    other.load_state_dict(student.state_dict())
    places = [tensor.data_ptr() for tensor in remembered(resumed)]
    restore_optimizer(resumed, unbroken.state_dict())
    assert [tensor.data_ptr() for tensor in remembered(resumed)] == places and len(set(places)) == len(places)
    for optimizer in (unbroken, resumed):
        step_(optimizer, 4)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="or other ones are stored"):
        restore_optimizer(make_optimizer(student_of(), DECAY), unbroken.state_dict())
