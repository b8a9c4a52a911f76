"""The networks by name: the only list of them, from which options, tests and benchmarks take theirs.

Plain data that needs no PyTorch, so that the names can be offered at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Triple = tuple[float, float, float]
# Names of the modules and parameters of each stage of a network, from the input on.
Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Feeding:
    """How the input of a network is prepared: (pixel / 255 - mean) / std, in this order of `channels` (rgb or bgr)."""

    channels: str
    mean: Triple
    std: Triple


# Channel statistics of ImageNet; the released checkpoint was trained with them.
RELEASED = Feeding("rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# -1 to 1: insightface, recognition/arcface_torch/dataset.py.
INSIGHTFACE = Feeding("rgb", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# The same in the order of OpenCV: AdaFace, inference.py.
ADAFACE = Feeding("bgr", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Families with the key names of insightface's recognition/arcface_torch.
ARCFACE_TORCH = ("iresnet", "mbf", "vit")


@dataclass(frozen=True)
class Entry:
    """One network: its family and what the family's class is built with, besides `embedding_size` and `recompute`.

    `training` holds settings that do not show in the weights: what is dropped at random while training.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def _vit(width: int, depth: int, drop_path: float, token_mask: float) -> Entry:
    return Entry("vit", {"width": width, "depth": depth}, {"drop_path": drop_path, "token_mask": token_mask})


# Blocks per stage of the released family. r34 and r50 are one and the same network: the reference builds both from the
# two-convolution improved-residual block, and only the bottleneck block (unused there) would tell them apart. Nor is
# r101 InsightFace's r100, which is ir100 here.
NETWORKS: dict[str, Entry] = {
    "r18": Entry("released", {"depths": (2, 2, 2, 2)}),
    "r34": Entry("released", {"depths": (3, 4, 6, 3)}),
    "r50": Entry("released", {"depths": (3, 4, 6, 3)}),
    "r101": Entry("released", {"depths": (3, 4, 23, 3)}),
    "r152": Entry("released", {"depths": (3, 8, 36, 3)}),
    "mfn": Entry("mobilefacenet", {"stem": 64}),
    "mfn_half": Entry("mobilefacenet", {"stem": 32}),  # half the channels, a quarter of the arithmetic
    # insightface, recognition/arcface_torch/backbones/iresnet.py; there without the i.
    "ir18": Entry("iresnet", {"depths": (2, 2, 2, 2)}),
    "ir34": Entry("iresnet", {"depths": (3, 4, 6, 3)}),
    "ir50": Entry("iresnet", {"depths": (3, 4, 14, 3)}),
    "ir100": Entry("iresnet", {"depths": (3, 13, 30, 3)}),
    "ir200": Entry("iresnet", {"depths": (6, 26, 60, 6)}),
    # backbones/mobilefacenet.py there.
    "mbf": Entry("mbf"),
    # backbones/__init__.py and vit.py there; vit_l exists there as vit_l_dp005_mask_005 only.
    "vit_t": _vit(256, 12, 0.1, 0.1),
    "vit_s": _vit(512, 12, 0.1, 0.1),
    "vit_b": _vit(512, 24, 0.1, 0.1),
    "vit_l": _vit(768, 24, 0.05, 0.05),
    # AdaFace, net.py; ir_101 has the depths of InsightFace's r100.
    "adaface_ir_18": Entry("adaface", {"depths": (2, 2, 2, 2), "use_se": False}),
    "adaface_ir_34": Entry("adaface", {"depths": (3, 4, 6, 3), "use_se": False}),
    "adaface_ir_50": Entry("adaface", {"depths": (3, 4, 14, 3), "use_se": False}),
    "adaface_ir_101": Entry("adaface", {"depths": (3, 13, 30, 3), "use_se": False}),
    "adaface_ir_se_50": Entry("adaface", {"depths": (3, 4, 14, 3), "use_se": True}),
}
NAMES = tuple(NETWORKS)  # for config.py
