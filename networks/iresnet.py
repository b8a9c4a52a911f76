"""IResNet, InsightFace's r18 to r200 (recognition/arcface_torch/backbones/iresnet.py).

What tells it from the released family: the first convolution is padded and followed by no pooling, the first block of
every stage halves the side, the wide convolution comes first in a block, slopes are per channel, no activation follows
the addition, and there is neither squeeze-excitation nor dropout. The scale of the last batch norm stays at 1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.catalogue import INSIGHTFACE, Feeding, Stages
from networks.layers import convolution, count, full_map, in_float32, row_count, run_blocks

CHANNELS = (64, 128, 256, 512)


class Block(nn.Module):
    """BN, conv3x3, BN, PReLU, conv3x3(stride), BN; plus the input, through a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = convolution(channels, channels, 3, stride=stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                convolution(in_channels, channels, 1, stride=stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))) + shortcut


class IResNet(nn.Module):
    """[N, 3, 112, 112] -> feature [N, embedding_size]; `depths` blocks at the sides 56, 28, 14 and 7."""

    feeding: ClassVar[Feeding] = INSIGHTFACE
    stages: ClassVar[Stages] = (("conv1", "bn1", "prelu", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def __init__(self, depths: tuple[int, ...], embedding_size: int = 512, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv1 = convolution(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(Block(before, channels, 2), *(Block(channels, channels, 1) for _ in range(blocks - 1)))
            for before, channels, blocks in zip((64, *CHANNELS), CHANNELS, depths, strict=False)
        )
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "layer1.0.bn3.weight" not in state or "features.bias" not in state:
            return None
        depths = tuple(count(state, f"layer{stage}.{{}}.conv1.weight") for stage in (1, 2, 3, 4))
        return {"depths": depths, "embedding_size": row_count(state, "fc.weight")}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_blocks(stage, x, self.recompute and self.training)
        return in_float32(lambda rows: self.features(self.fc(rows)), full_map(self.bn2(x)).flatten(1))
