"""MobileFaceNet as its paper describes it (Chen et al., CCBR 2018). InsightFace's, twice as wide, is in mbf.py."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.catalogue import RELEASED, Feeding, Stages
from networks.layers import convolution, full_map, in_float32, row_count, run_blocks, xavier

# Rows of Table 1 of the paper: expansion, output channels, repeats, stride of the first.
_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class MobileFaceNet(nn.Module):
    """MobileFaceNet (Table 1): [N, 3, 112, 112] -> feature [N, embedding_size].

    Inverted residuals with per-channel PReLU, and a global depthwise convolution in place of average pooling, so that
    the centre of the face may weigh more than its corners. The paper's embedding has 128 dimensions and the network
    then 0.99 M parameters; larger sizes change only the last layer.
    """

    feeding: ClassVar[Feeding] = RELEASED
    stages: ClassVar[Stages] = (  # by the side of the map: 28, 14, 7
        ("stem", *(f"blocks.{index}" for index in range(5))),
        tuple(f"blocks.{index}" for index in range(5, 12)),
        tuple(f"blocks.{index}" for index in range(12, 15)),
    )

    def __init__(self, embedding_size: int = 512, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = nn.Sequential(_ConvBN(3, 64, 3, stride=2), _ConvBN(64, 64, 3, groups=64))
        blocks, channels = [], 64
        for expansion, out_channels, repeats, stride in _STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.expand = _ConvBN(channels, 512, 1)
        self.global_depthwise = _ConvBN(512, 512, 7, groups=512, padding=0, activation=False)
        self.project = _ConvBN(512, embedding_size, 1, activation=False)
        xavier(self)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "global_depthwise.0.weight" not in state:
            return None
        return {"embedding_size": row_count(state, "project.0.weight")}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = run_blocks(self.blocks, self.stem(x), self.recompute and self.training)
        return in_float32(self.project, self.global_depthwise(full_map(self.expand(x)))).flatten(1)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection (MobileNetV2's bottleneck); shortcut where shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            _ConvBN(in_channels, hidden, 1),
            _ConvBN(hidden, hidden, 3, stride=stride, groups=hidden),
            _ConvBN(hidden, channels, 1, activation=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H', W']."""
        out = self.layers(x)
        return x + out if self.shortcut else out


class _ConvBN(nn.Sequential):
    """Convolution, batch norm and, unless it is linear, a PReLU with a slope per channel."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        activation: bool = True,
    ) -> None:
        layers: list[nn.Module] = [
            convolution(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups),
            nn.BatchNorm2d(channels),
        ]
        if activation:
            layers.append(nn.PReLU(channels))
        super().__init__(*layers)
