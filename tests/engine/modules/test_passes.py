"""Modules' passes with members that tensors name: the same networks, whatever their tensors look like."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import K, small_classifier
from torch import nn

from ensdistill.engine.modules.passes import ModulePasses, NetworkTable, differing
from ensdistill.engine.modules.rehearsal import Attributes, Ran
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import PlainStudent

E = 3


class Odd(nn.Module):
    """Tensors of several types, layouts and sizes, one under two names, a buffer without dimensions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm, self.linear = nn.BatchNorm2d(5), nn.Linear(5, K)
        self.again, self.tied = self.linear, nn.Linear(5, K)  # a module in two places, a tensor in two modules
        self.tied.weight = self.linear.weight
        self.scale = nn.Parameter(torch.rand(()).double())
        self.register_buffer("order", torch.randperm(5))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).index_select(1, self.order).mean((2, 3))
        return self.again(x * self.scale.to(x.dtype)) + self.tied(x)


def teachers() -> Teachers:
    return Teachers([Classifier(Odd(t), [0.1 * t] * 3, [0.5] * 3) for t in range(E)], K)


def test_a_teacher_named_by_a_tensor_is_the_teacher() -> None:
    ensemble, x = teachers(), torch.rand(4, 3, 7, 7)
    right = [ensemble.member(m, x) for m in range(E)]
    passes = ModulePasses(ensemble, PlainStudent(small_classifier(0)))
    passes.choose(on_device=True, compiled=False)
    for m in range(E):
        torch.testing.assert_close(passes.teacher(torch.tensor([m]), x), right[m])
        torch.testing.assert_close(passes.teacher(m, x), right[m])
    torch.testing.assert_close(passes.all_teachers(x), torch.stack(right))


def test_a_table_keeps_values_layouts_and_follows_its_networks() -> None:
    networks = [Odd(t) for t in range(E)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    table = NetworkTable(networks)
    for m, network in enumerate(networks):
        row = table.row(torch.tensor([m]))
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            assert torch.equal(tensor, before[m][name]) and torch.equal(row[name], tensor)
            assert tensor.stride() == before[m][name].stride() == row[name].stride()
            assert tensor.data_ptr() % 16 == 0
    with torch.no_grad():
        networks[1].linear.bias.fill_(7.0)
    assert (table.row(torch.tensor([1]))["linear.bias"] == 7).all()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda network: setattr(network.norm, "eps", 0.1), "norm"),
        (lambda network: setattr(network, "linear", nn.Linear(5, K, bias=False)), ""),
        (lambda network: setattr(network, "conv", nn.Conv2d(3, 5, 3, groups=1, padding=1)), "conv"),
        (lambda network: setattr(network, "more", nn.ReLU()), "more"),
        (lambda network: network.half(), ""),
        (lambda network: setattr(network.tied, "weight", nn.Parameter(network.tied.weight.detach())), "tied"),
    ],
)
def test_networks_that_one_code_does_not_serve_are_told_apart(change: object, where: str) -> None:
    networks = [Odd(t) for t in range(E)]
    assert differing(networks) is None
    change(networks[2])  # type: ignore[operator]
    found = differing(networks)
    assert found is not None and found.startswith("teacher 3 ") and (where in found or "other layers" in found)


def test_the_distance_between_outcomes() -> None:
    before = [[torch.zeros(4), torch.zeros(4), torch.zeros(4)], []]
    after = [[torch.full((4,), 2.0), torch.full((4,), 1e-6), torch.zeros(4)], []]
    ran = Ran.of([3.0], after, before)
    assert ran.distance([3.0], after) == 0
    assert ran.distance([3.03], after) == pytest.approx(0.01)

    def moved(i: int, by: float) -> float:
        now = [tensor.clone() for tensor in after[0]]
        now[i] += by
        return ran.distance([3.0], [now, []])

    assert moved(0, 0.02) == pytest.approx(0.01, rel=1e-3)
    assert moved(1, 1e-6) < 2e-3  # rounding alone, beside what the others change by
    assert moved(2, 0.02) > 1
    assert moved(0, float("nan")) == ran.distance([float("nan")], after) == float("inf")
    still = Ran.of([3.0], before, before)
    assert still.distance([3.0], before) == 0 and still.distance([3.0], after) == float("inf")


def test_attributes_are_found_and_given_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    layer = module[0]
    layer.seen, layer.table = [1], {"a": (1, 2.0)}
    kept = Attributes([module])
    assert kept.changed() is None
    layer.table["b"], layer.new = 3, 4
    assert kept.changed() in ("Sequential.0.table", "Sequential.0.new")
    layer.seen.append(2)
    kept.restore()
    assert kept.changed() is None and layer.seen == [1] and layer.table == {"a": (1, 2.0)} and not hasattr(layer, "new")
