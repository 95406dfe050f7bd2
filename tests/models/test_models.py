"""The networks against their definition: shapes, parameter counts, initialisation, statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ensdistill.models import Classifier, build
from ensdistill.models.layers import BatchNorm2d
from ensdistill.runtime.errors import UserError


@pytest.mark.parametrize(("name", "millions"), [("wrn28x4", 5.87), ("wrn10x1", 0.08), ("wrn28x10", 36.54)])
def test_wide_resnet_has_the_parameters_of_its_definition(name, millions):
    depth, k = (int(part) for part in name[3:].split("x"))
    n, expected, channels = (depth - 4) // 6, 3 * 16 * 9, 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range(n):
            expected += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            expected += channels * width if channels != width else 0
            channels = width
    expected += 2 * channels + 100 * channels + 100
    with torch.device("meta"):
        from ensdistill.models.wide_resnet import WideResNet

        found = sum(p.numel() for p in WideResNet(depth, k, 100).parameters())
    assert found == expected and round(found / 1e6, 2) == millions


def test_wrn_28_4_spends_846_mmac():
    from torch.utils.flop_counter import FlopCounterMode

    from ensdistill.models.wide_resnet import WideResNet

    with torch.device("meta"):
        network, x = WideResNet(28, 4, 100), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as count:
        network(x)
    assert round(count.get_total_flops() / 2e6) == 846


def test_the_shortcut_convolves_x_itself():
    block = build("wrn10x1", num_classes=3, image_size=8).blocks[1].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x))


@pytest.mark.parametrize("name", ["wrn10x1", "resnet20", "resnet18"])
def test_head_after_trunk_is_the_network(name):
    network = build(name, num_classes=5, in_channels=2, image_size=16).eval()
    trunk, head = network.split_head()
    x = torch.randn(3, 2, 16, 16)
    torch.testing.assert_close(head(trunk(x)), network(x))
    ours = {id(p) for p in network.parameters()}
    assert {id(p) for p in [*trunk.parameters(), *head.parameters()]} == ours


def test_initialisation_is_he_normal_truncated_at_two_sigma_and_rescaled():
    network = build("wrn10x4", num_classes=100, image_size=32, seed=3)
    weight = network.blocks[2].conv2.weight
    std = math.sqrt(2 / (9 * 256))
    assert abs(weight.std().item() / std - 1) < 0.01
    assert abs(weight.abs().max().item() / (2 * std / 0.87962566103423978) - 1) < 0.01
    assert not network.linear.bias.any() and bool((network.norm.weight == 1).all())
    assert abs(network.linear.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02
    assert torch.equal(weight, build("wrn10x4", num_classes=100, seed=3).blocks[2].conv2.weight)
    assert not torch.equal(weight, build("wrn10x4", num_classes=100, seed=4).blocks[2].conv2.weight)


def test_running_variance_is_biased():
    norm, x = BatchNorm2d(3), torch.randn(4, 3, 2, 2) * 3 + 1
    y = norm(x)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    torch.testing.assert_close(y, nn.BatchNorm2d(3)(x))


def test_batch_norm_never_reads_memory_that_nobody_wrote():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        norm = BatchNorm2d(5)
        norm(torch.randn(4, 5, 3, 3)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (
        norm.running_mean.isfinite().all() and norm.running_var.isfinite().all() and norm.weight.grad.isfinite().all()
    )


def test_update_bn_gives_the_mean_over_batches():
    norm = BatchNorm2d(3)
    batches = [torch.randn(4, 3, 2, 2) + i for i in range(5)]
    update_bn(batches, norm)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(
        norm.running_var, torch.stack([b.var((0, 2, 3), unbiased=False) for b in batches]).mean(0)
    )


def test_classifier_normalises():
    network = nn.Flatten()
    x = torch.rand(2, 3, 4, 4)
    y = Classifier(network, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])(x)
    expected = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(y, expected.flatten(1))
    assert not Classifier(network, [0.5], [0.1]).state_dict()


@pytest.mark.parametrize("name", ["wrn28", "wrn27x4", "wrn28x0", "wrn4x1", "resnet21", "vgg16", "resnet18x2"])
def test_unknown_networks_are_named(name):
    with pytest.raises(UserError, match=f"network '{name}': no such network; expected one of wrn"):
        build(name, num_classes=10)
