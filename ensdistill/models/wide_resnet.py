"""Pre-activation wide residual network (Zagoruyko & Komodakis 2016) as the official code builds it."""

from __future__ import annotations

from torch import Tensor, nn

from ensdistill.models.layers import BatchNorm2d, GlobalAveragePool


class Block(nn.Module):
    """A pre-activation block, `y = conv3x3(relu(norm(conv3x3_s(relu(norm(x)))))) + shortcut(x)`.

    The shortcut is a 1x1 strided conv of x itself where stride or width changes, the identity elsewhere.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv1(self.norm1(x_BCHW).relu())
        y_BCHW = self.conv2(self.norm2(y_BCHW).relu())
        return y_BCHW + self.shortcut(x_BCHW)


class WideResNet(nn.Module):
    """WRN-`depth`-`width`: normalised images (B, C, H, W) -> logits (B, K).

    Stem 3x3 conv to 16 channels; three groups of (depth − 4) / 6 blocks of 16k, 32k, 64k channels with strides 1, 2, 2;
    relu(norm), global average pool, linear with bias. `blocks` runs over all groups.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        assert depth >= 10 and (depth - 4) % 6 == 0, f"depth {depth} is not 6n + 4"
        n = (depth - 4) // 6
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks, channels = [], 16
        for group, group_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range(n):
                blocks.append(Block(channels, group_channels, stride=2 if group > 0 and i == 0 else 1))
                channels = group_channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = BatchNorm2d(channels)
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(self.stem(x_BCHW))
        return self.linear(self.pool(self.norm(x_BCHW).relu()))

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        """Split into (trunk, head), which share our modules; the head is last group, final norm and classifier."""
        first = len(self.blocks) // 3 * 2
        blocks = list(self.blocks)
        trunk = nn.Sequential(self.stem, *blocks[:first])
        return trunk, nn.Sequential(*blocks[first:], self.norm, nn.ReLU(), self.pool, self.linear)
