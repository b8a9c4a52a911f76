"""MobileFaceNet as its paper describes it (Chen et al., CCBR 2018). InsightFace's, twice as wide, is in mbf.py."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.catalogue import RELEASED, Feeding, Stages
from networks.layers import convolution, full_map, in_float32, row_count, run_blocks, xavier

# Rows of Table 1 of the paper: expansion, output channels by those of the stem, repeats, stride of the first.
_STAGES = ((2, 1, 5, 2), (4, 2, 1, 2), (2, 2, 6, 1), (4, 2, 1, 2), (2, 2, 2, 1))


class MobileFaceNet(nn.Module):
    """MobileFaceNet (Table 1): [N, 3, 112, 112] -> feature [N, embedding_size].

    Inverted residuals with per-channel PReLU, and a global depthwise convolution in place of average pooling, so that
    the centre of the face may weigh more than its corners. The paper's embedding has 128 dimensions and the network
    then 0.99 M parameters; larger sizes change only the last layer. `stem` is the number of channels of the first
    layer, and all others in proportion (MobileNetV2's width multiplier): the paper's is 64.
    """

    feeding: ClassVar[Feeding] = RELEASED
    stages: ClassVar[Stages] = (  # by the side of the map: 28, 14, 7
        ("stem", *(f"blocks.{index}" for index in range(5))),
        tuple(f"blocks.{index}" for index in range(5, 12)),
        tuple(f"blocks.{index}" for index in range(12, 15)),
    )

    def __init__(self, stem: int = 64, embedding_size: int = 512, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = nn.Sequential(_ConvBN(3, stem, 3, stride=2), _ConvBN(stem, stem, 3, groups=stem))
        blocks, channels, last = [], stem, 8 * stem
        for expansion, widening, repeats, stride in _STAGES:
            out_channels = widening * stem
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.expand = _ConvBN(channels, last, 1)
        self.global_depthwise = _ConvBN(last, last, 7, groups=last, padding=0, activation=False)
        self.project = _ConvBN(last, embedding_size, 1, activation=False)
        xavier(self)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "global_depthwise.0.weight" not in state:
            return None
        return {
            "stem": row_count(state, "stem.0.0.weight"),
            "embedding_size": row_count(state, "project.0.weight"),
        }

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
