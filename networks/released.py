"""SE-LResNet{18,34,50,101,152}E-IR, the family of the released checkpoint `insight-face-v3.pt`.

Its plain state_dict loads as it is. The price: the fourth-order details of that code are kept too (an unpadded first
convolution, one PReLU slope shared by all channels and by both places of a block).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.catalogue import RELEASED, Feeding, Stages
from networks.layers import count, full_map, in_float32, row_count, run_blocks, xavier


class SqueezeExcitation(nn.Module):
    """Channel attention (Hu et al., CVPR 2018) with reduction 16; its hidden activation is a PReLU, as released."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.PReLU(),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W], each channel scaled by a factor in (0, 1)."""
        weights = self.fc(x.mean(dim=(2, 3)))
        # Not weights[:, :, None, None]: OpenCV 4 reads no ONNX node that adds two dimensions at once.
        return x * weights.reshape(-1, x.shape[1], 1, 1)


class ImprovedResidual(nn.Module):
    """BN, conv3x3, BN, PReLU, conv3x3(stride), BN, SE; plus shortcut; then the same PReLU again.

    The "IR" block of ArcFace (Deng et al., CVPR 2019, section 3.2.2) with the squeeze-excitation of the released
    network and its activation after the addition. [N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, channels: int, stride: int, use_se: bool) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.se = SqueezeExcitation(channels) if use_se else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, channels, H', W']."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        return self.prelu(out + shortcut)


class SELResNet(nn.Module):
    """SE-LResNet{depth}E-IR: [N, 3, 112, 112] -> feature [N, embedding_size], float, not normalised.

    `depths` is the number of blocks in the four stages of 64, 128, 256, 512 channels (sides 55, 28, 14, 7). The "L"
    and "E" of the name (Deng et al., section 3.2.1): the large 7x7 last map, and the output BN-dropout-FC-BN.
    With `recompute`, only the inputs of the blocks are kept for the backward pass (see `layers.recomputed`).
    """

    feeding: ClassVar[Feeding] = RELEASED
    stages: ClassVar[Stages] = (("conv1", "bn1", "prelu", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def __init__(
        self, depths: tuple[int, ...], use_se: bool = True, embedding_size: int = 512, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv1 = nn.Conv2d(3, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU()
        self.maxpool = nn.MaxPool2d(2, stride=2)
        self.layer1 = _stage(64, 64, depths[0], stride=1, use_se=use_se)
        self.layer2 = _stage(64, 128, depths[1], stride=2, use_se=use_se)
        self.layer3 = _stage(128, 256, depths[2], stride=2, use_se=use_se)
        self.layer4 = _stage(256, 512, depths[3], stride=2, use_se=use_se)
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(512 * 7 * 7, embedding_size)
        self.bn3 = nn.BatchNorm1d(embedding_size)
        xavier(self)  # as in the reference

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "layer1.0.bn0.weight" not in state:
            return None
        depths = tuple(count(state, f"layer{stage}.{{}}.conv1.weight") for stage in (1, 2, 3, 4))
        use_se = any(".se." in key for key in state)
        return {"depths": depths, "use_se": use_se, "embedding_size": row_count(state, "fc.weight")}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = self.maxpool(self.prelu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_blocks(stage, x, self.recompute and self.training)
        x = self.dropout(full_map(self.bn2(x)))
        return in_float32(lambda rows: self.bn3(self.fc(rows)), x.flatten(1))


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int, use_se: bool) -> nn.Sequential:
    first = ImprovedResidual(in_channels, channels, stride, use_se)
    return nn.Sequential(first, *(ImprovedResidual(channels, channels, 1, use_se) for _ in range(blocks - 1)))
