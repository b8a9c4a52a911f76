"""AdaFace's IR networks (Kim et al., CVPR 2022; net.py of its repository): ir_18 to ir_101 and ir_se_50.

Blocks as in IResNet, with three differences: where the number of channels stays, a shortcut of stride 2 takes every
second pixel and has no weights (this concerns the first block); squeeze-excitation, where there is any, is without
biases; the last batch norm has neither scale nor shift. They are fed with BGR. The public code gives the feature's
direction and its norm; here the feature itself is given, and its norm is AdaFace's measure of quality.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.catalogue import ADAFACE, Feeding, Stages
from networks.iresnet import CHANNELS
from networks.layers import convolution, count, full_map, in_float32, kaiming, row_count, run_blocks


class SqueezeExcitation(nn.Module):
    """Channel attention (Hu et al., CVPR 2018) with reduction 16, without biases."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = convolution(channels, channels // reduction, 1)
        self.fc2 = convolution(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W], each channel scaled by a factor in (0, 1)."""
        return x * self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """BN, conv3x3, BN, PReLU, conv3x3(stride), BN and perhaps squeeze-excitation; plus the input."""

    def __init__(self, in_channels: int, channels: int, stride: int, use_se: bool) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer = None
        if in_channels != channels:
            self.shortcut_layer = nn.Sequential(
                convolution(in_channels, channels, 1, stride=stride), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            convolution(in_channels, channels, 3),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            convolution(channels, channels, 3, stride=stride),
            nn.BatchNorm2d(channels),
        )
        if use_se:
            self.res_layer.add_module("se_block", SqueezeExcitation(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H / stride, W / stride]."""
        if self.shortcut_layer is not None:
            shortcut = self.shortcut_layer(x)
        else:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        return self.res_layer(x) + shortcut


class AdaFaceIR(nn.Module):
    """[N, 3, 112, 112] -> feature [N, embedding_size]; `depths` blocks at the sides 56, 28, 14 and 7."""

    feeding: ClassVar[Feeding] = ADAFACE

    def __init__(
        self, depths: tuple[int, ...], use_se: bool, embedding_size: int = 512, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.input_layer = nn.Sequential(convolution(3, 64, 3), nn.BatchNorm2d(64), nn.PReLU(64))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=False),
        )
        blocks: list[nn.Module] = []
        before = 64
        stages: list[tuple[str, ...]] = []
        for channels, repeats in zip(CHANNELS, depths, strict=True):
            stages.append(tuple(f"body.{len(blocks) + index}" for index in range(repeats)))
            for index in range(repeats):
                blocks.append(Block(before, channels, 1 if index else 2, use_se))
                before = channels
        self.body = nn.Sequential(*blocks)
        self.stages: Stages = (("input_layer", *stages[0]), *stages[1:])
        kaiming(self)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "body.0.res_layer.1.weight" not in state or "input_layer.0.weight" not in state:
            return None
        rows = [
            row_count(state, f"body.{i}.res_layer.1.weight") for i in range(count(state, "body.{}.res_layer.1.weight"))
        ]
        return {
            "depths": tuple(rows.count(channels) for channels in CHANNELS),
            "use_se": any(".se_block." in key for key in state),
            "embedding_size": row_count(state, "output_layer.3.weight"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Normalised BGR [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = run_blocks(self.body, self.input_layer(x), self.recompute and self.training)
        return in_float32(self.output_layer, full_map(x))
