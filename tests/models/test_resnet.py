"""The residual networks: torchvision's keys, published sizes, an independent implementation, heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensdistill.models.layers import BatchNorm2d, initialise_
from ensdistill.models.resnet import CifarResNet, ResNet
from ensdistill.runtime.errors import UserError


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def randomise_(network: nn.Module) -> None:
    """Weights as for training; statistics and affine parameters of every norm off their initial values."""
    initialise_(network, 5)
    generator = torch.Generator().manual_seed(7)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.3, generator=generator)


def images(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("depth", "parameters", "entries"), [(18, 11_689_512, 122), (34, 21_797_672, 218), (50, 25_557_032, 320)]
)
def test_resnet_has_the_published_size(depth: int, parameters: int, entries: int) -> None:
    with torch.device("meta"):
        network = ResNet(depth, 1000)
    assert num_parameters(network) == parameters
    assert len(network.state_dict()) == entries  # torchvision's count


# Option A of the paper has 269,722 and 853,018; the projections add 576 + 2176 with their norms.
@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722 + 2_752), (56, 853_018 + 2_752), (110, 1_727_962 + 2_752)]
)
def test_cifar_resnet_has_the_published_size_and_projections(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        assert num_parameters(CifarResNet(depth, 1, 10)) == parameters


def norm_keys(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize(
    ("depth", "blocks", "convs"), [(18, (2, 2, 2, 2), 2), (34, (3, 4, 6, 3), 2), (50, (3, 4, 6, 3), 3)]
)
@pytest.mark.parametrize("stem", ["conv3x3", "conv7x7"])
def test_resnet_has_torchvisions_keys_in_order(depth: int, blocks: tuple[int, ...], convs: int, stem: str) -> None:
    keys = ["conv1.weight", *norm_keys("bn1")]
    for group, num_blocks in enumerate(blocks, start=1):
        for i in range(num_blocks):
            prefix = f"layer{group}.{i}"
            for conv in range(1, convs + 1):
                keys += [f"{prefix}.conv{conv}.weight", *norm_keys(f"{prefix}.bn{conv}")]
            if i == 0 and (group > 1 or depth == 50):
                keys += [f"{prefix}.downsample.0.weight", *norm_keys(f"{prefix}.downsample.1")]
    with torch.device("meta"):
        network = ResNet(depth, 7, 3, stem="conv7x7" if stem == "conv7x7" else "conv3x3")
    assert list(network.state_dict()) == [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "network", "size"),
    [
        ("resnet18", ResNet(18, 1000), 71),
        ("resnet50b", ResNet(50, 1000), 71),  # "b": the stride is on the 3x3
        ("resnet20_cifar10", CifarResNet(20, 1, 10), 27),
    ],
)
def test_outputs_agree_with_pytorchcv(name: str, network: nn.Module, size: int) -> None:
    providers = pytest.importorskip("pytorchcv.model_provider")
    other = providers.get_model(name)
    randomise_(network)
    ours = list(network.state_dict().values())
    theirs = list(other.state_dict())
    assert len(ours) == len(theirs)
    other.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs is fixed to 8x8 or 7x7
    other.load_state_dict(dict(zip(theirs, ours, strict=True)))
    x_BCHW = images(2, 3, size)
    network.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x_BCHW), other(x_BCHW), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stem", "size", "expected"), [("conv3x3", 37, 37), ("conv7x7", 75, 19)])
def test_stem_resolution(stem: str, size: int, expected: int) -> None:
    network = ResNet(18, 5, 1, stem="conv7x7" if stem == "conv7x7" else "conv3x3").eval()
    seen: list[torch.Size] = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert network(images(1, 1, size)).shape == (1, 5)
    assert seen == [(1, 64, expected, expected)]


@pytest.mark.parametrize(
    ("network", "channels"),
    [(CifarResNet(20, 2, 7, 1), 1), (ResNet(18, 7, 3, "conv3x3"), 3), (ResNet(50, 7, 3, "conv7x7"), 3)],
)
def test_split_head_shares_modules_and_agrees_with_forward(network: CifarResNet | ResNet, channels: int) -> None:
    randomise_(network)
    network.eval()
    trunk, head = network.split_head()
    x_BCHW = images(3, channels, 33)
    with torch.no_grad():
        assert torch.equal(head(trunk(x_BCHW)), network(x_BCHW))
    ours = {id(parameter) for parameter in network.parameters()}
    in_trunk, in_head = ({id(parameter) for parameter in part.parameters()} for part in (trunk, head))
    assert in_trunk | in_head == ours
    assert not in_trunk & in_head
    last = network.layer3 if isinstance(network, CifarResNet) else network.layer4
    assert {id(p) for module in (last, network.fc) for p in module.parameters()} == in_head


def test_norms_and_convs() -> None:
    for network in (CifarResNet(20, 1, 3, 1), ResNet(50, 3, 3, "conv3x3")):
        norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms and all(type(layer) is BatchNorm2d for layer in norms)
        assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_training_reaches_every_parameter() -> None:
    network = CifarResNet(20, 1, 5, 2)
    initialise_(network, 1)
    nn.functional.cross_entropy(network(images(5, 2, 9)), torch.tensor([0, 1, 2, 3, 4])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize(("depth", "width"), [(21, 1), (2, 1), (20, 0)])
def test_cifar_resnet_refuses_sizes_that_do_not_exist(depth: int, width: int) -> None:
    with pytest.raises(
        UserError, match=rf"^CIFAR ResNet-{depth}x{width}: no such network; depth must be 6n \+ 2 .* try resnet20x1$"
    ):
        CifarResNet(depth, width, 10)


def test_resnet_refuses_depths_that_do_not_exist() -> None:
    with pytest.raises(
        UserError, match=r"^ResNet-101: no such network; expected depth 18, 34 or 50: use one of those$"
    ):
        ResNet(101, 10)
