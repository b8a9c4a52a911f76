"""The network as one table of convolutions and one description of how they connect.

Batch norm is folded into the convolutions when weights are loaded (`retinaface.weights`), so convolutions are all there
is. The description `forward` is written once against a small set of operations. The price is one level of indirection;
what it buys is that PyTorch (GPU) and the graph for onnxruntime (CPU) cannot drift apart.

Sources: layer sizes, strides, slopes and key names from biubug6/Pytorch_Retinaface (models/net.py, models/retinaface.py
and `cfg_mnet` in data/config.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Weights: TypeAlias = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""By name of the convolution: weight [out, in / groups, k, k] and bias [out]."""

STRIDES = (8, 16, 32)
ANCHOR_SIZES = ((16, 32), (64, 128), (256, 512))
ANCHORS_PER_CELL = 2
MEAN_BGR = (104, 117, 123)
SLOPE = 0.1

HEADS = ("ClassHead", "BboxHead", "LandmarkHead")
# The channels of the three heads, one after the other: for each of a cell's anchors the logits of background and face,
# then for each anchor its box, then its five points.
LOGITS, BOXES, LANDMARKS = slice(0, 4), slice(4, 12), slice(12, 32)


@dataclass(frozen=True)
class Layer:
    """One convolution with weights of its own.

    `norm` is the key of the batch norm that follows in the original files, or None where the convolution has a bias.
    `shape` is [out, in / groups, height, width]; a second entry of 1 means depthwise.
    """

    name: str
    norm: str | None
    shape: tuple[int, int, int, int]
    stride: int = 1


# (input, output, stride) of the depthwise-separable blocks of each stage; stage 1 opens with a plain 3x3 convolution.
BLOCKS = {
    "stage1": ((8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)),
    "stage2": ((64, 128, 2), *[(128, 128, 1)] * 5),
    "stage3": ((128, 256, 2), (256, 256, 1)),
}


def _separable_block(prefix: str, width: int, out: int, stride: int) -> list[Layer]:
    return [
        Layer(f"{prefix}.0", f"{prefix}.1", (width, 1, 3, 3), stride),
        Layer(f"{prefix}.3", f"{prefix}.4", (out, width, 1, 1)),
    ]


def _all_layers() -> list[Layer]:
    def normed(prefix: str, out: int, width: int, size: int, stride: int = 1) -> Layer:
        return Layer(f"{prefix}.0", f"{prefix}.1", (out, width, size, size), stride)

    layers = [normed("body.stage1.0", 8, 3, 3, stride=2)]
    for stage, blocks in BLOCKS.items():
        first = 1 if stage == "stage1" else 0
        for index, (width, out, stride) in enumerate(blocks, start=first):
            layers += _separable_block(f"body.{stage}.{index}", width, out, stride)
    layers += [normed(f"fpn.output{level + 1}", 64, width, 1) for level, width in enumerate((64, 128, 256))]
    layers += [normed("fpn.merge2", 64, 64, 3), normed("fpn.merge1", 64, 64, 3)]
    for level in range(3):
        ssh = f"ssh{level + 1}"
        layers += [
            normed(f"{ssh}.conv3X3", 32, 64, 3),
            normed(f"{ssh}.conv5X5_1", 16, 64, 3),
            normed(f"{ssh}.conv5X5_2", 16, 16, 3),
            normed(f"{ssh}.conv7X7_2", 16, 16, 3),
            normed(f"{ssh}.conv7x7_3", 16, 16, 3),
        ]
    for head, out in zip(HEADS, (4, 8, 20), strict=True):
        layers += [Layer(f"{head}.{level}.conv1x1", None, (out, 64, 1, 1)) for level in range(3)]
    return layers


LAYERS: tuple[Layer, ...] = tuple(_all_layers())
"""The convolutions as weight files know them."""

STRIDE = {layer.name: layer.stride for layer in LAYERS} | {f"Heads.{level}": 1 for level in range(len(STRIDES))}


def fuse_heads(weights: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Weights:
    """The weights that `forward` asks for: the three heads of each level as one convolution `Heads.<level>`."""
    fused = {name: arrays for name, arrays in weights.items() if not name.startswith(HEADS)}
    for level in range(len(STRIDES)):
        heads = [weights[f"{head}.{level}.conv1x1"] for head in HEADS]
        weight, bias = (np.concatenate(parts) for parts in zip(*heads, strict=True))
        fused[f"Heads.{level}"] = (weight, bias)
    return fused


class Operations(Protocol[T]):
    """What `forward` needs of an engine; T is the engine's tensor or node."""

    def convolve(self, name: str, x: T, slope: float | None = None) -> T:
        """The convolution `name` on x, then a leaky ReLU of that slope (0 is a plain ReLU, None is nothing).

        Its stride is `STRIDE[name]`, its padding half the kernel; a weight [out, 1, k, k] is depthwise.
        """

    def add_upsampled(self, x: T, coarse: T) -> T:
        """x plus `coarse` enlarged to x's size, each cell repeated (nearest neighbour)."""

    def concatenate(self, parts: list[T]) -> T:
        """Along the channels."""

    def join_cells(self, maps: list[T]) -> T:
        """Maps [N, C, h, w] of any h and w as one [N, C, sum of h * w], each map's cells row by row."""


def forward(ops: Operations[T], x: T) -> T:
    """From the image minus mean, [N, 3, height, width], to the answers of all cells, [N, 32, cells].

    Cells come in the order of `STRIDES`, for each stride ceil(height / stride) rows of ceil(width / stride). `LOGITS`,
    `BOXES` and `LANDMARKS` say which channels hold what.
    """
    x = ops.convolve("body.stage1.0.0", x, SLOPE)
    stages = []
    for stage, blocks in BLOCKS.items():
        first = 1 if stage == "stage1" else 0
        for index in range(first, first + len(blocks)):
            x = ops.convolve(f"body.{stage}.{index}.0", x, SLOPE)
            x = ops.convolve(f"body.{stage}.{index}.3", x, SLOPE)
        stages.append(x)

    fine, middle, coarse = (ops.convolve(f"fpn.output{level + 1}.0", x, SLOPE) for level, x in enumerate(stages))
    middle = ops.convolve("fpn.merge2.0", ops.add_upsampled(middle, coarse), SLOPE)
    fine = ops.convolve("fpn.merge1.0", ops.add_upsampled(fine, middle), SLOPE)
    return ops.join_cells([_context(ops, level, x) for level, x in enumerate((fine, middle, coarse))])


def _context(ops: Operations[T], level: int, x: T) -> T:
    """SSH (Najibi et al. 2017): receptive fields of 3, 5 and 7 cells side by side, then the three heads."""
    ssh = f"ssh{level + 1}"
    three = ops.convolve(f"{ssh}.conv3X3.0", x, 0.0)
    shared = ops.convolve(f"{ssh}.conv5X5_1.0", x, SLOPE)
    five = ops.convolve(f"{ssh}.conv5X5_2.0", shared, 0.0)
    seven = ops.convolve(f"{ssh}.conv7x7_3.0", ops.convolve(f"{ssh}.conv7X7_2.0", shared, SLOPE), 0.0)
    return ops.convolve(f"Heads.{level}", ops.concatenate([three, five, seven]))
