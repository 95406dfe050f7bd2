"""Post-activation residual networks (He et al. 2016): `CifarResNet` for 32 px, `ResNet` (18, 34, 50) for 64 and 224 px.

Modules carry torchvision's names (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, …, `fc`), so that weights
of torchvision and timm load into `ResNet` as they are.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ensdistill.models.layers import BatchNorm2d, GlobalAveragePool
from ensdistill.runtime.errors import UserError


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Build a 1x1 conv and a norm where the shape changes; nothing, which means the identity, elsewhere."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convs: `relu(bn(conv3x3(relu(bn(conv3x3_s(x))))) + shortcut(x))`."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.bn1(self.conv1(x_BCHW)).relu()
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return (y_BCHW + shortcut_BCHW).relu()


class Bottleneck(nn.Module):
    """Three convs, 1x1 to `width`, 3x3 with the stride, 1x1 to 4 `width`, each with its norm (v1.5)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.bn1(self.conv1(x_BCHW)).relu()
        y_BCHW = self.bn2(self.conv2(y_BCHW)).relu()
        y_BCHW = self.bn3(self.conv3(y_BCHW))
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return (y_BCHW + shortcut_BCHW).relu()


def _group(
    block: type[BasicBlock | Bottleneck], in_channels: int, width: int, num_blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(num_blocks - 1)))


class CifarResNet(nn.Module):
    """CIFAR ResNet-`depth`, `width` times as wide: normalised images (B, C, H, W) -> logits (B, K).

    Stem 3x3 conv, norm, relu; three groups of (depth − 2) / 6 basic blocks of 16k, 32k, 64k channels with strides 1, 2,
    2; global average pool; linear with bias. Where the shape changes the shortcut is a 1x1 conv and a norm (option B of
    the paper, whose own CIFAR networks pad channels with zeros, option A): every path then has weights for a member's
    factors to act on, and every shortcut is the same primitive as the other convs. That makes ResNet-20 272,474
    parameters at K = 10; option A has 269,722.

    Raises:
        UserError: depth is not 6n + 2, or width is below 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2 or width < 1:
            raise UserError(
                f"CIFAR ResNet-{depth}x{width}: no such network; depth must be 6n + 2 and width at least 1: "
                "try resnet20x1"
            )
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16 * width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(16 * width)
        self.relu = nn.ReLU()
        self.layer1 = _group(BasicBlock, 16 * width, 16 * width, n, stride=1)
        self.layer2 = _group(BasicBlock, 16 * width, 32 * width, n, stride=2)
        self.layer3 = _group(BasicBlock, 32 * width, 64 * width, n, stride=2)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = self.layer3(self.layer2(self.layer1(x_BCHW)))
        return self.fc(self.avgpool(x_BCHW))

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        """Split into (trunk, head): the last group and the classifier are the head. Both share our modules."""
        trunk = nn.Sequential(self.conv1, self.bn1, self.relu, self.layer1, self.layer2)
        return trunk, nn.Sequential(self.layer3, self.avgpool, self.fc)


class ResNet(nn.Module):
    """ResNet-18, -34 or -50: normalised images (B, C, H, W) -> logits (B, K).

    Four groups of 64, 128, 256, 512 channels (4 times as many out of ResNet-50's bottlenecks) with strides 1, 2, 2, 2.
    The stem `conv7x7` has stride 2 and a 3x3 max-pool of stride 2 behind it (224 px); `conv3x3` has stride 1 and no
    pool (64 px).

    Raises:
        UserError: depth is none of 18, 34, 50.
    """

    def __init__(
        self, depth: int, num_classes: int, in_channels: int = 3, stem: Literal["conv3x3", "conv7x7"] = "conv7x7"
    ) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = Bottleneck if depth == 50 else BasicBlock
        groups = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}.get(depth)
        if groups is None:
            raise UserError(f"ResNet-{depth}: no such network; expected depth 18, 34 or 50: use one of those")
        self.maxpool: nn.Module
        if stem == "conv7x7":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _group(block, 64, 64, groups[0], stride=1)
        self.layer2 = _group(block, 64 * block.expansion, 128, groups[1], stride=2)
        self.layer3 = _group(block, 128 * block.expansion, 256, groups[2], stride=2)
        self.layer4 = _group(block, 256 * block.expansion, 512, groups[3], stride=2)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(512 * block.expansion, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
        x_BCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_BCHW))))
        return self.fc(self.avgpool(x_BCHW))

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        """Split into (trunk, head): the last group and the classifier are the head. Both share our modules."""
        trunk = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool, self.layer1, self.layer2, self.layer3)
        return trunk, nn.Sequential(self.layer4, self.avgpool, self.fc)
