"""The embedding networks: SE-LResNet{18,34,50,101,152}E-IR, MobileFaceNet, and the margin head they are trained with.

A network maps RGB crops [N, 3, 112, 112], in [0, 1] and normalised with `MEAN` and `STD`, to features
[N, embedding_size]. The embedding of an image is the L2-normalised sum of the features of the image and of its mirror
image; that belongs to whoever uses the network.

Parameters are registered in the order, and under the names, of the released checkpoint `insight-face-v3.pt`, so its
plain state_dict loads as it is. The price: the fourth-order details of that code are kept too (an unpadded first
convolution, one PReLU slope shared by all channels and by both places of a block). Nothing here knows of files,
devices or options.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.margin import MarginHead

__all__ = ["MEAN", "NETWORKS", "STD", "MarginHead", "MobileFaceNet", "SELResNet", "build_network", "network_from_state"]

# Channel statistics of ImageNet, RGB in [0, 1]; the released checkpoint was trained with them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Blocks per stage. r34 and r50 are one and the same network: the reference builds both from the two-convolution
# improved-residual block, and only the bottleneck block (unused here) would tell them apart.
_DEPTHS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 6, 3),
    "r101": (3, 4, 23, 3),
    "r152": (3, 8, 36, 3),
}
NETWORKS = (*_DEPTHS, "mfn")

# Rows of Table 1 of MobileFaceNets (Chen et al., CCBR 2018): expansion, output channels, repeats, stride of the first.
_MOBILE_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


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
        return x * weights[:, :, None, None]


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
    With `recompute`, only the inputs of the blocks are kept for the backward pass (see `_recomputed`).
    """

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
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = self.maxpool(self.prelu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = _run(stage, x, self.recompute and self.training)
        x = self.dropout(self.bn2(x))
        return self.bn3(self.fc(x.flatten(1)))


class MobileFaceNet(nn.Module):
    """MobileFaceNet (Chen et al., CCBR 2018, Table 1): [N, 3, 112, 112] -> feature [N, embedding_size].

    Inverted residuals with per-channel PReLU, and a global depthwise convolution in place of average pooling, so that
    the centre of the face may weigh more than its corners. The paper's embedding has 128 dimensions and the network
    then 0.99 M parameters; larger sizes change only the last layer.
    """

    def __init__(self, embedding_size: int = 512, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = nn.Sequential(_ConvBN(3, 64, 3, stride=2), _ConvBN(64, 64, 3, groups=64))
        blocks, channels = [], 64
        for expansion, out_channels, repeats, stride in _MOBILE_STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.expand = _ConvBN(channels, 512, 1)
        self.global_depthwise = _ConvBN(512, 512, 7, groups=512, padding=0, activation=False)
        self.project = _ConvBN(512, embedding_size, 1, activation=False)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = _run(self.blocks, self.stem(x), self.recompute and self.training)
        return self.project(self.global_depthwise(self.expand(x))).flatten(1)


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
        padding = kernel // 2 if padding is None else padding
        convolution = _StridedDepthwise if groups > 1 and stride > 1 else nn.Conv2d
        layers: list[nn.Module] = [
            convolution(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        ]
        if activation:
            layers.append(nn.PReLU(channels))
        super().__init__(*layers)


class _StridedDepthwise(nn.Conv2d):
    """Depthwise convolution with a stride, kept in float32 under CPU autocast.

    oneDNN has no fast bfloat16 kernel for its gradient: the three such layers of MobileFaceNet took half of a step
    (94-140 ms each for 32 crops on one core, 3-36 ms in float32).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def build_network(
    name: str, use_se: bool = True, embedding_size: int = 512, *, recompute: bool = False
) -> SELResNet | MobileFaceNet:
    """A freshly initialised embedding network in training mode.

    `name` is one of `NETWORKS`; `use_se` concerns the residual networks (MobileFaceNet has no squeeze-excitation).
    `recompute` trades a second forward pass of the blocks for the memory of their activations (gradient
    checkpointing); results are the same. Raises ValueError for another name or a size below 1.
    """
    if embedding_size < 1:
        raise ValueError(f"embedding size {embedding_size} is not positive")
    if name == "mfn":
        return MobileFaceNet(embedding_size, recompute)
    if name not in _DEPTHS:
        raise ValueError(f"no network named {name!r} (there are {', '.join(NETWORKS)})")
    return SELResNet(_DEPTHS[name], use_se, embedding_size, recompute)


def network_from_state(state: Mapping[str, Tensor]) -> SELResNet | MobileFaceNet:
    """The network that a plain state_dict belongs to, in evaluation mode, with these weights.

    Depth, squeeze-excitation and embedding size are read from the keys and shapes. Raises ValueError, naming the first
    key that does not fit, when the state is none of ours.
    """
    with torch.device("meta"):  # no initial weights are drawn, and the caller's random numbers are left alone
        network = _empty_network(state)
    expected = network.state_dict()
    for key in (*expected, *state):
        if key not in state:
            raise ValueError(f"not the weights of an embedding network: {key} is missing")
        if key not in expected:
            raise ValueError(f"not the weights of an embedding network: unknown key {key}")
        if not isinstance(state[key], Tensor) or state[key].shape != expected[key].shape:
            found = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
            raise ValueError(f"weights do not fit: {key} is {found}, not {tuple(expected[key].shape)}")
        if state[key].is_floating_point() != expected[key].is_floating_point():  # copying would cast without a word
            raise ValueError(f"weights do not fit: {key} is {state[key].dtype}, not {expected[key].dtype}")
        if state[key].layout != torch.strided or state[key].device.type == "meta":
            raise ValueError(f"weights do not fit: {key} is no dense tensor with values")
    network.to_empty(device="cpu").load_state_dict(state)
    return network.eval()


def _empty_network(state: Mapping[str, Tensor]) -> SELResNet | MobileFaceNet:
    """The architecture whose keys `state` seems to have; the caller checks that they all fit."""

    def output_size(key: str) -> int:
        weight = state[key]
        if not isinstance(weight, Tensor) or weight.ndim < 1 or weight.shape[0] < 1:
            raise ValueError(f"not the weights of an embedding network: {key} has no rows")
        return weight.shape[0]

    if "project.0.weight" in state:
        return MobileFaceNet(output_size("project.0.weight"))
    if "fc.weight" not in state:
        raise ValueError("not the weights of an embedding network: neither fc.weight nor project.0.weight is there")
    depths = tuple(_stage_depth(state, f"layer{stage}") for stage in (1, 2, 3, 4))
    if depths not in _DEPTHS.values():
        raise ValueError(f"not the weights of an embedding network: stages of {depths} blocks")
    return SELResNet(depths, any(".se." in key for key in state), output_size("fc.weight"))


def _stage_depth(state: Mapping[str, Tensor], stage: str) -> int:
    depth = 0
    while f"{stage}.{depth}.conv1.weight" in state:
        depth += 1
    return depth


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int, use_se: bool) -> nn.Sequential:
    first = ImprovedResidual(in_channels, channels, stride, use_se)
    return nn.Sequential(first, *(ImprovedResidual(channels, channels, 1, use_se) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    """Xavier-normal convolutions and linear layers, zero bias, as in the reference; batch norm starts as identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _run(blocks: nn.Sequential, x: Tensor, recompute: bool) -> Tensor:
    if not recompute:
        return blocks(x)
    for block in blocks:
        x = _recomputed(block, x)
    return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, keeping only `x` for the backward pass, which runs the block a second time.

    Batch norm must not count that second run in its running statistics, or the trained network would differ.
    torch.compile's second run has no side effects anyway, and it does not understand context functions.
    """
    # The blocks draw no random numbers (the only dropout is behind them).
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():
        settings["context_fn"] = lambda: (contextlib.nullcontext(), _frozen_statistics(block))
    return checkpoint(block, x, **settings)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Another counter, not None: the batch norms that are synchronised over ranks insist on one.
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
