"""The students: their members, what they ship, and the groups of their parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import K, move_, small_classifier
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.models import Classifier
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.models.students import HydraStudent, build_student
from ensdistill.runtime.errors import UserError

X = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def make(method: str):
    student = build_student(Method.parse(method), small_classifier, E=3, seed=5)
    move_(student, 6)
    return student.eval()


@pytest.mark.parametrize(("method", "E"), [("ce", 1), ("kd", 1), ("latentbe", 3), ("be", 3), ("hydra", 3)])
def test_members_by_name_are_rows_of_all_members(method, E):
    student = make(method)
    with torch.no_grad():
        s_MBK = student(X)
        assert s_MBK.shape == (E, 4, K) and student.E == E
        if E > 1:
            torch.testing.assert_close(student(X, members=(2, 0)), s_MBK[[2, 0]])
            assert not torch.allclose(s_MBK[0], s_MBK[1])


@pytest.mark.parametrize("method", ["be", "hydra"])
def test_ensembles_ship_the_mean_of_their_members_probabilities(method):
    student = make(method)
    shipped = student.shipped()
    assert isinstance(shipped.network, MemberNetworks) and len(shipped.network.members) == 3
    with torch.no_grad():
        expected = student(X).softmax(-1).mean(0)
        torch.testing.assert_close(shipped(X).softmax(-1), expected, rtol=1e-4, atol=1e-6)
    assert [type(network) for network in shipped.network.members] == [type(small_classifier(0).network)] * 3


def test_latentbe_ships_one_plain_network_made_of_the_means_of_its_factors():
    student = make("latentbe")
    shipped = student.shipped()
    assert shipped.network.state_dict().keys() == small_classifier(0).network.state_dict().keys()
    conv, plain = student.classifier.network.blocks[1].conv1, shipped.network.blocks[1].conv1
    r, s = 1 + conv.rho_r.mean(0), 1 + conv.rho_s.mean(0)
    torch.testing.assert_close(plain.weight, conv.weight * s[:, None, None, None] * r[None, :, None, None])
    assert torch.equal(shipped.pixel_mean, student.classifier.pixel_mean)


def test_shipping_changes_nothing():
    for method in ("kd", "latentbe", "be", "hydra"):
        student = make(method).train()
        before = copy.deepcopy(student.state_dict())
        student.shipped()
        assert student.training and all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_only_batch_ensembles_have_factors_and_every_parameter_has_one_group():
    for method in ("ce", "hydra", "be"):
        student = make(method)
        assert bool(student.factors()) == (method == "be")
        grouped = [id(p) for p in [*student.factors(), *student.shared()]]
        assert sorted(grouped) == sorted(id(p) for p in student.parameters())


def test_hydra_s_heads_start_from_different_draws_and_share_the_trunk():
    student = build_student(Method(student="hydra"), small_classifier, E=3, seed=5)
    first, second = (student.heads[m].state_dict() for m in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("conv1.weight"))
    shipped = student.shipped().network.members
    assert torch.equal(shipped[0].stem.weight, shipped[2].stem.weight)


def test_a_network_without_a_head_cannot_be_a_hydra():
    with pytest.raises(UserError, match=r"method hydra: Flatten has no split_head\(\)"):
        HydraStudent([Classifier(nn.Flatten(), [0.5], [0.5])])


def test_a_copied_student_is_a_student_of_its_own():
    for method in ("be", "hydra"):
        student = make(method)
        other = copy.deepcopy(student)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
            expected = student(X).softmax(-1).mean(0)
            torch.testing.assert_close(student.shipped()(X).softmax(-1), expected, rtol=1e-4, atol=1e-6)
            expected = other(X).softmax(-1).mean(0)
            torch.testing.assert_close(other.shipped()(X).softmax(-1), expected, rtol=1e-4, atol=1e-6)
