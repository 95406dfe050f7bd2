from __future__ import annotations

import pytest
import torch
from networks import small_classifier
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ensdistill.engine.structure import (
    Conv,
    FrozenConv,
    MaxPool,
    Norm,
    NotExpressible,
    frozen_layers,
    readers,
    structure_of,
)
from ensdistill.models import build
from ensdistill.models.batch_ensemble import to_batch_ensemble


def test_a_pre_activation_block_as_written():
    layers = structure_of(build("wrn10x1", num_classes=5)).layers
    assert [layer.name for layer in layers[:5]] == [
        "stem",
        "blocks.0.norm1",
        "blocks.0.conv1",
        "blocks.0.norm2",
        "blocks.0.conv2",
    ]
    stem, norm1, conv1, norm2, conv2 = layers[:5]
    assert isinstance(norm1, Norm) and norm1.relu and norm1.source == stem.target
    assert isinstance(conv1, Conv) and (conv1.source, conv1.kernel, conv1.stride) == (norm1.target, 3, 1)
    assert conv2.source == norm2.target and conv2.residual == stem.target


def test_the_shortcut_runs_before_the_sum_that_reads_it():
    layers = structure_of(build("wrn16x2", num_classes=5)).layers
    written = {0}
    for layer in layers:
        assert layer.source in written and (layer.residual is None or layer.residual in written)
        written.add(layer.target)
    shortcut = next(layer for layer in layers if layer.name == "blocks.2.shortcut")
    conv2 = next(layer for layer in layers if layer.name == "blocks.2.conv2")
    assert conv2.residual == shortcut.target and shortcut.kernel == 1 and shortcut.stride == 2


def test_a_post_activation_sum_rides_on_the_norm():
    layers = structure_of(build("resnet20", num_classes=5)).layers
    norms = [layer for layer in layers if isinstance(layer, Norm)]
    assert sum(norm.residual is not None for norm in norms) == 9  # one a block
    downsample = next(norm for norm in norms if norm.name == "layer2.0.downsample.1")
    assert not downsample.relu and downsample.residual is None


def test_frozen_every_norm_rides_on_a_convolution():
    for name, convs in (("wrn10x1", 9), ("resnet20", 21), ("resnet50", 53)):
        structure = structure_of(build(name, num_classes=5, image_size=32))
        frozen = frozen_layers(structure)
        assert len(frozen) == convs and all(isinstance(layer, FrozenConv) for layer in frozen)
        norms = {layer.name for layer in structure.layers if isinstance(layer, Norm)}
        assert {layer.norm for layer in frozen} | {layer.second for layer in frozen} == norms | {None}


def test_imagenet_s_first_layers():
    structure = structure_of(build("resnet50", num_classes=5, image_size=224))
    stem, norm, pool, first = structure.layers[:4]
    assert isinstance(stem, Conv) and (stem.kernel, stem.stride, stem.source) == (7, 2, 0)
    assert isinstance(norm, Norm) and norm.relu
    assert isinstance(pool, MaxPool) and (pool.name, pool.source) == ("maxpool", norm.target)
    assert first.source == pool.target and readers(structure.layers, structure.features)[pool.target] == 2
    frozen = frozen_layers(structure)
    assert len(frozen) == 54 and frozen[1] == pool and frozen[0].target == pool.source and frozen[0].relu


def test_a_max_pool_by_a_function():
    layers = structure_of(Odd(lambda x: F.max_pool2d(x, 3, 2, padding=1))).layers
    assert layers[2] == MaxPool(name="max_pool2d", source=layers[1].target, target=layers[2].target)
    assert structure_of(Odd(lambda x: torch.max_pool2d(x, (3, 3), [2, 2], 1))).layers[:2] == layers[:2]
    assert structure_of(Odd(nn.MaxPool2d(3, 2, padding=(1, 1)))).layers[:2] == layers[:2]


def test_what_is_only_normalised_is_not_written_by_the_last_block():
    structure = structure_of(build("wrn10x1", num_classes=5))
    last = frozen_layers(structure)[-1]
    assert last.second == "norm" and not last.is_read and last.second_target == structure.features
    assert readers(structure.layers, structure.features)[last.target] == 1


def test_a_student_has_the_structure_of_its_network():
    network = build("wrn10x1", num_classes=5)
    assert structure_of(to_batch_ensemble(network, 3)) == structure_of(network)


def test_networks_of_other_packages():
    model_provider = pytest.importorskip("pytorchcv.model_provider")
    for name in ("resnet20_cifar10", "preresnet20_cifar10"):
        network = model_provider.get_model(name)
        with pytest.raises(NotExpressible, match=r"average pool 'features\.final_pool' has a window of a fixed size"):
            structure_of(network)
        network.features.final_pool = nn.AdaptiveAvgPool2d(1)
        assert len(frozen_layers(structure_of(network))) == 21


class MaxPoolOfItsOwn(nn.MaxPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Odd(nn.Module):
    """A convolution, a norm, and whatever `body` does before the pool."""

    def __init__(self, body=None, conv=None, head=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)
        self.body = body if isinstance(body, nn.Module) else None
        self._function, self._head = body, head

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        if self._function is not None:
            x = self._function(x)
        return self._head(self, x) if self._head else self.linear(x.mean((2, 3)).flatten(1))


def test_functions_and_methods_are_read_like_modules():
    structure = structure_of(Odd())
    assert [layer.name for layer in structure.layers] == ["conv", "norm"] and structure.layers[1].relu


@pytest.mark.parametrize(
    "network, why",
    [
        (lambda: Odd(nn.MaxPool2d(2)), r"max-pool '.*' \(kernel_size 2, stride 2.* is not the one of 3x3"),
        (
            lambda: Odd(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
            "max-pool '.*' .*ceil_mode True.* is not the one of 3x3",
        ),
        (lambda: Odd(lambda x: F.max_pool2d(x, 3, padding=1)), "max-pool 'max_pool2d' .* is not the one of 3x3"),
        (lambda: Odd(MaxPoolOfItsOwn(3, 2, 1)), "MaxPoolOfItsOwn '.*' has a forward of its own"),
        (lambda: Odd(lambda x: F.max_pool2d(x, 3, 2, 1).relu()), "a ReLU does not follow a norm"),
        (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 8, 1)), "a max-pool reads the image itself"),
        (lambda: Odd(nn.SiLU()), "SiLU '.*' has no kernel"),
        (lambda: Odd(torch.sigmoid), "the operation .*sigmoid.* has no kernel"),
        (lambda: Odd(lambda x: x.relu()), "a ReLU does not follow a norm"),
        (lambda: Odd(lambda x: x * 2), "the operation .*mul.* has no kernel"),
        (lambda: Odd(lambda x: x + x), "the operation .*add.* has no kernel"),
        (lambda: Odd(lambda x: x.flatten(2).view(x.shape)), "reshapes something else than the pooled features"),
        (lambda: Odd(nn.Dropout(0.5)), "Dropout '.*' has no kernel"),
        (lambda: Odd(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        (lambda: Odd(conv=nn.Conv2d(3, 8, 5, padding=2)), r"convolution 'conv' \(5x5, stride 1"),
        (lambda: Odd(conv=nn.Conv2d(3, 8, 3, padding=0)), r"convolution 'conv' \(3x3, stride 1, padding \(0, 0\)"),
        (lambda: Odd(conv=nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), "is none of 1x1, 3x3 or 7x7"),
        (lambda: Odd(head=lambda self, x: self.linear(x.amax((2, 3)))), "the operation amax has no kernel"),
        (lambda: Odd(head=lambda self, x: x.mean((2, 3))), "does not end in a global average pool and a linear layer"),
        (lambda: Odd(head=lambda self, x: self.linear(x.mean((2, 3))).softmax(-1)), "softmax has no kernel"),
        (
            lambda: Odd(head=lambda self, x: self.linear(self.norm(self.conv(x[:, :3])).mean((2, 3)))),
            "reads something else than an image",
        ),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)), "does not end in"),
        (
            lambda: nn.Sequential(
                nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
            ),
            "norm '0' does not follow a convolution",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.AdaptiveAvgPool2d(1)),
            "norm '1' has no weights",
        ),
    ],
)
def test_what_has_no_form_is_refused_with_the_reason(network, why):
    with pytest.raises(NotExpressible, match=why):
        structure_of(network())


class Standardised(nn.Conv2d):
    """A convolution that computes with other weights than it holds."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def hooked() -> nn.Module:
    network = Odd()
    network.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def replaced() -> nn.Module:
    network = Odd()
    network.forward = lambda x: 2 * Odd.forward(network, x)
    return network


class TwoNorms(nn.Module):
    """`body(self, y)` gives what is pooled, y = conv(x)."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.norm2, self.linear = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.body = body

    def forward(self, x):
        return self.linear(self.body(self, self.conv(x)).mean((2, 3)))


def relu_as_a_statement(self, y):
    y = self.norm(y)
    y.relu_()
    return self.norm2(self.conv2(y))


def sum_that_is_read_by_its_old_name(self, y):
    y.add_(self.conv2(F.relu(self.norm(y))))
    return F.relu(self.norm2(y))


@pytest.mark.parametrize(
    "network, why",
    [
        (lambda: Odd(conv=Standardised(3, 8, 3)), "Standardised 'conv' has a forward of its own"),
        (lambda: Odd(conv=weight_norm(nn.Conv2d(3, 8, 3, padding=1))), "computes its weight or bias"),
        (hooked, "BatchNorm2d 'norm' has hooks"),
        (lambda: Odd(head=lambda self, x: (self.linear(x.mean((2, 3))), x)), "does not end in"),
        (replaced, "Odd: its forward is replaced"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
            "it has no norm",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 1),
                nn.BatchNorm2d(8),
                nn.AvgPool2d(4, divisor_override=3),
                nn.Flatten(),
                nn.Linear(8, 2),
            ),
            "has a window of a fixed size",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Linear(1, 2)),
            "does not read the channels",
        ),
        (lambda: TwoNorms(lambda self, y: [self.norm(y), self.norm2(y)][0]), "nothing reads what 'norm2' computes"),
        (lambda: TwoNorms(relu_as_a_statement), "a ReLU does not follow"),
        (lambda: TwoNorms(sum_that_is_read_by_its_old_name), "read after it was added to in place"),
        (
            lambda: TwoNorms(lambda self, y: self.norm(y) if self.training else self.norm2(y)),
            "something else in training than in evaluation",
        ),
    ],
)
def test_what_would_be_computed_wrong_is_refused(network, why):
    with pytest.raises(NotExpressible, match=why):
        structure_of(network())


def test_a_network_keeps_its_modes():
    network = Odd().eval()
    network.norm.train()
    structure_of(network)
    assert [network.training, network.conv.training, network.norm.training] == [False, False, True]


def test_classifiers_are_traced_by_their_network():
    assert structure_of(small_classifier(0).network).linear == "linear"
