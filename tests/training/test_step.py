"""The step: what it computes for every method, what it spends, and that it never waits for the device."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from networks import CountConvs, K, small_batch, small_classifier, small_state
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ensdistill.config.methods import SHOWN, STUDENTS, Method
from ensdistill.engine.networks import Networks
from ensdistill.kernels.philox import counter_of, draw_pair
from ensdistill.runtime.errors import UserError
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, measure_names, show, train_step, update

EXISTING = [
    *(("ce", shown) for shown in ("clean", "gaussian")),
    *(("kd", shown) for shown in ("clean", "gaussian", "ods", "confods", "tdiv")),
    *itertools.product(("latentbe", "be", "hydra"), ("clean", "gaussian", "ods", "confods", "tdiv", "tdiv-sdiv")),
]


class ForbidSynchronisation(TorchDispatchMode):
    """Fails on every operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::item",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::lift_fresh",  # torch.tensor(host values): on a GPU a copy that waits
        ), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("student", "shown"), list(itertools.product(STUDENTS, SHOWN)))
def test_combinations_that_do_not_exist_are_refused(student, shown):
    if (student, shown) in EXISTING:
        assert str(Method.parse(f"{student}+{shown}")) == (student if shown == "clean" else f"{student}+{shown}")
        return
    with pytest.raises(UserError, match=f"'{student}' cannot be shown '{shown}'; it goes with clean"):
        Method(student=student, shown=shown)


def test_unknown_methods_get_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'latentbe'"):
        Method.parse("latenbe+tdiv")
    with pytest.raises(UserError, match="did you mean 'tdiv-sdiv'"):
        Method.parse("latentbe+tdiv-sdv")


@pytest.mark.parametrize(("student", "shown"), EXISTING)
def test_every_method_learns_a_batch_by_heart(student, shown):
    state, config = small_state(f"{student}+{shown}", moved=False)
    images, labels = small_batch()
    losses = [train_step(state, config, images, labels, lr=0.02) for _ in range(12)]
    name = "loss_ce" if student == "ce" else "loss_kd"
    first, last = (sum(float(m[name]) for m in part) / 3 for part in (losses[:3], losses[-3:]))
    assert last < first, (first, last)
    assert state.step == 12 and all(torch.isfinite(v).all() for m in losses for v in m.values())
    assert set(losses[0]) == {"loss", "loss_ce", "loss_wd", "acc1"} | ({"loss_kd"} if student != "ce" else set())


@pytest.mark.parametrize("method", [f"{student}+{shown}" for student, shown in EXISTING])
def test_no_host_synchronisation(method):
    state, config = small_state(method)
    images, labels = small_batch()
    counter, lr = counter_of(config.seed, state.step, 0, images.device), torch.tensor(0.1, dtype=torch.float64)
    with ForbidSynchronisation():
        measures = train_step(state, config, images, labels, lr, counter=counter)
    assert set(measures) == set(measure_names(config.method))
    assert all(value.shape == () and not value.requires_grad for value in measures.values())


# What each part may spend, in F: forwards of one network over the batch, and the backwards to inputs and to weights.
@pytest.mark.parametrize(
    ("method", "forward", "to_input"),
    [
        ("latentbe+tdiv-sdiv", 4, 2),
        ("hydra+tdiv-sdiv", None, None),
        ("kd+tdiv", 2, 1),
        ("latentbe+ods", 1, 1),
        ("be+confods", 1, 1),
        ("kd+gaussian", 0, 0),
    ],
)
def test_the_perturbation_spends_what_it_needs(method, forward, to_input):
    state, config = small_state(method, E=4)
    images, _ = small_batch()
    x = images.permute(0, 3, 1, 2) / 255
    with CountConvs() as plain:
        small_classifier(0).eval()(x)
    with CountConvs() as count:
        show(config.method.shown, x, state.networks, seed=1, step=0, tau=4.0)
    assert count.to_weight == 0
    if (
        forward is None
    ):  # hydra's trunk serves both heads: 2 forwards and 1 backward of the teachers, less than that of its own
        assert 3 * plain.forward < count.forward <= 4 * plain.forward and count.to_input <= 2 * plain.forward
    else:
        assert (count.forward, count.to_input) == (forward * plain.forward, to_input * plain.forward)


def test_the_whole_step_spends_22_F():
    state, config = small_state("latentbe+tdiv-sdiv", E=4)
    images, labels = small_batch()
    with CountConvs() as plain:
        small_classifier(0).eval()(images.permute(0, 3, 1, 2) / 255)
    with CountConvs() as count:
        train_step(state, config, images, labels, lr=0.1)
    F_ = plain.forward
    assert count.forward == (4 + 4 + 4) * F_ and count.to_weight == 4 * F_
    assert count.to_input == (2 + 4) * F_  # the gradient of r needs that of the stem's input too


def test_divergence_gradient_is_that_of_the_objective_in_float64():
    state, _ = small_state("latentbe+tdiv-sdiv", E=3)
    networks = state.networks
    student, teachers = state.student.double().eval(), networks.teachers.double()
    x = torch.rand(4, 3, 9, 9, dtype=torch.float64).requires_grad_()
    a, b = 2, 0
    t, s = teachers(x), student(x)

    def cross_entropy(z):  # of a under b, b held constant
        return -(z[b].detach().softmax(-1) * z[a].log_softmax(-1)).sum()

    (expected,) = torch.autograd.grad(cross_entropy(t) - cross_entropy(s), x)
    torch.testing.assert_close(networks.divergence_gradient(x, (a, b), with_student=True), expected)
    (expected,) = torch.autograd.grad(cross_entropy(teachers(x)), x)
    torch.testing.assert_close(networks.divergence_gradient(x, (a, b), with_student=False), expected)
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("shown", [s for s in SHOWN if s != "clean"])
def test_shown_images_differ_by_the_stated_step_and_depend_on_the_global_row(shown):
    state, _ = small_state(f"latentbe+{shown}")
    state.student.eval()
    x = torch.rand(6, 3, 9, 9) * 0.8 + 0.1
    arguments = dict(networks=state.networks, seed=9, tau=4.0)
    y, _ = show(shown, x, step=4, **arguments)
    norm_B = (y - x).flatten(1).norm(dim=1)
    length = (3 * 9 * 9) ** 0.5 / 255
    if shown == "gaussian":
        assert ((norm_B / length - 1).abs() < 0.2).all()
    elif shown == "confods":
        assert ((norm_B > length / K * 0.99) & (norm_B < length)).all()
    else:
        torch.testing.assert_close(norm_B, torch.full((6,), length), rtol=1e-4, atol=0)
    halves = [show(shown, x[i : i + 3], step=4, first_row=i, **arguments)[0] for i in (0, 3)]
    torch.testing.assert_close(torch.cat(halves), y, rtol=0, atol=2e-6)
    if shown in ("gaussian", "ods", "confods"):
        assert not torch.equal(show(shown, x, step=5, **arguments)[0], y)


def test_students_are_perturbed_in_evaluation_mode_and_statistics_move_once():
    state, config = small_state("latentbe+tdiv-sdiv")
    images, labels = small_batch()
    train_step(state, config, images, labels, lr=0.1)
    counters = [b for name, b in state.student.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(int(c) == 1 for c in counters)


def test_update_is_the_stated_loss_and_rule():
    """One update against the formulas written out: α between, factors r = 1 + ρ with their gradient times E."""
    state, config = small_state("latentbe")
    config = copy.copy(config)
    object.__setattr__(config, "alpha", 0.3)
    wd, lr, E, B = config.weight_decay, 0.05, 3, 5
    x, labels = torch.rand(B, 3, 9, 9), torch.randint(0, K, (B,))
    reference = copy.deepcopy(state.student).train()
    s = reference(x)
    with torch.no_grad():
        t = state.networks.teachers(x)
    kd = 16 * sum(F.cross_entropy(s[m] / 4, (t[m] / 4).softmax(-1)) for m in range(E)) / E
    ce = sum(F.cross_entropy(s[m], labels) for m in range(E)) / E
    factors = {name: p for name, p in reference.named_parameters() if "rho" in name}
    others = {name: p for name, p in reference.named_parameters() if "rho" not in name}
    loss_wd = (sum((p**2).sum() for p in others.values()) + sum((p**2).sum() for p in factors.values()) / E) / 2
    loss = 0.7 * ce + 0.3 * kd + wd * loss_wd
    loss.backward()
    for p in factors.values():
        p.grad *= E
    expected = {name: p.detach() - lr * (p.grad + 0.9 * p.grad) for name, p in reference.named_parameters()}
    measures = update(state, config, x, labels, lr)
    for name, value in (("loss", loss), ("loss_ce", ce), ("loss_kd", kd), ("loss_wd", loss_wd)):
        torch.testing.assert_close(measures[name], value.detach(), rtol=1e-5, atol=1e-6)
    for name, p in state.student.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_factor_rate_scales_only_the_factors():
    state, _ = small_state("latentbe")
    shared, factors = make_optimizer(state.student, 1e-3, factor_rate=0.5).param_groups
    assert (shared["rate_scale"], shared["weight_decay"]) == (1.0, 1e-3)
    assert (factors["rate_scale"], factors["weight_decay"]) == (1.5, pytest.approx(1e-3 / 3))
    names = {id(p): name for name, p in state.student.named_parameters()}
    assert all("rho" in names[id(p)] for p in factors["params"]) and not any(
        "rho" in names[id(p)] for p in shared["params"]
    )
    assert len(factors["params"]) + len(shared["params"]) == len(names)


def test_the_pair_is_the_step_s():
    state, config = small_state("latentbe+tdiv-sdiv")
    state.step = 17
    images, _ = small_batch()
    x = images.permute(0, 3, 1, 2) / 255
    shown, _ = show("tdiv-sdiv", x, state.networks, seed=config.seed, step=17, tau=4.0)
    g = state.networks.divergence_gradient(x, draw_pair(config.seed, 17, 3), with_student=True)
    from ensdistill.kernels.images.perturb import perturb

    assert torch.equal(shown, perturb(x, g)[0])


@pytest.mark.parametrize("method", ["ce", "latentbe+tdiv-sdiv"])
def test_bf16_follows_fp32(method):
    state, config = small_state(method)
    networks = Networks(state.networks.teachers, copy.deepcopy(state.student), "bf16")
    other = State(networks=networks, optimizer=make_optimizer(networks.student, 5e-4))
    images, labels = small_batch(16)
    a, b = (train_step(s, c, images, labels, lr=0.01) for s, c in ((state, config), (other, config)))
    torch.testing.assert_close(a["loss"], b["loss"], rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in other.student.parameters())
    assert float(a["loss"]) != float(b["loss"])  # else bf16 was not used
