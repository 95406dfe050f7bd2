"""Classes by name: the same, in another order, numbers beside names, and others."""

from __future__ import annotations

import pytest
import torch
from networks import foreign_network
from torch import nn

from ensdistill.engine.structure import structure_of
from ensdistill.formats.class_order import in_order, match_classes
from ensdistill.models import build
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.runtime.errors import UserError

NUMBERS = [str(k) for k in range(12)]
AS_TEXT = sorted(NUMBERS)  # 0, 1, 10, 11, 2, …: class folders


@pytest.mark.parametrize(
    ("theirs", "ours", "order", "said"),
    [
        ("abc", "abc", None, ""),
        ("abc", "cab", [2, 0, 1], "class 0 is called 'a', in the data 'c': the same classes in another order"),
        (NUMBERS, AS_TEXT, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "class 2 is called '2', in the data '10'"),
        (AS_TEXT, NUMBERS, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3], "in another order, taken by their names"),
        ("012", "abc", None, "class 0 is called '0', in the data 'a': numbers are no names, so the classes are taken"),
        ("abc", "012", None, "taken in order"),
        (NUMBERS, [f"{k:02}" for k in range(12)], None, "taken in order"),
    ],
)
def test_names_decide(theirs, ours, order, said):
    found, note = match_classes(theirs, ours, "a.safetensors")
    assert found == order and said in note and bool(note) == bool(said)
    assert order is None or [theirs[k] for k in order] == list(ours)


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [
        ("abc", "abd", r"class 2 is called 'c', which the data do not have \(a, b, d\)"),
        ("abc", "xyz", "class 0 is called 'a'"),
        ("012", "123", "class 0 is called '0'"),  # numbers on both sides, and not the same ones
        ("102", "123", "class 1 is called '0'"),
        ("aab", "aba", "class 1 is called 'a', in the data 'b'"),  # which of the two is which?
    ],
)
def test_other_names_are_refused(theirs, ours, reason):
    with pytest.raises(UserError, match=rf"^a\.safetensors: {reason}.*; expected the same names: give a network of"):
        match_classes(theirs, ours, "a.safetensors")


@pytest.mark.parametrize("name", ["wrn10x1", "resnet20", "resnet18", "members", "foreign"])
def test_logits_are_put_in_order(name):
    order = [3, 1, 9, 0, 2, 8, 7, 5, 6, 4]

    def make() -> nn.Module:
        torch.manual_seed(0)
        if name == "members":
            return MemberNetworks([build("wrn10x1", num_classes=10, in_channels=1, seed=m) for m in range(2)])
        if name == "foreign":
            return foreign_network(4)
        return build(name, num_classes=10, in_channels=1, image_size=8)

    network, moved = make().eval(), in_order(make(), order).eval()
    x_BCHW = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(moved(x_BCHW), network(x_BCHW)[:, order])
    if name == "wrn10x1":  # as it was to the kernels
        assert structure_of(moved) == structure_of(network) and moved.state_dict().keys() == network.state_dict().keys()
