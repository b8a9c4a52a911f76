"""Photos in, faces with five landmarks out.

Photos of one size go through the network together; photos of different sizes never share a batch, because padding
would change what the convolutions see at the border, and with it the result.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import nms

from retinaface.anchors import anchors
from retinaface.engines import TorchEngine
from retinaface.weights import load_weights

BOX_VARIANCE = 0.1
SIZE_VARIANCE = 0.2
CANDIDATES = 5000
FACES = 750


@dataclass(frozen=True)
class Detections:
    """The faces of one photo, best first.

    boxes float32 [n, 4]: x1, y1, x2, y2 in pixels of the photo given; scores float32 [n] in [0, 1]; landmarks float32
    [n, 5, 2]: x, y of left eye, right eye, nose, left and right corner of the mouth, as seen in the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


class RetinaFace:
    def __init__(
        self,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        score_threshold: float = 0.9,
        nms_threshold: float = 0.4,
        max_side: int | None = None,
    ) -> None:
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_side = max_side
        self._engine = TorchEngine(load_weights(weights), torch.device(device or "cpu"))

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        results: list[Detections | None] = [None] * len(images)
        groups = defaultdict(list)
        for index, image in enumerate(images):
            groups[self._size(image)].append(index)
        for size, members in groups.items():
            for start in range(0, len(members), 8):
                chunk = members[start : start + 8]
                batch = np.stack([self._shrink(images[index], size) for index in chunk])
                maps = self._engine.run(torch.from_numpy(batch))
                for row, index in enumerate(chunk):
                    results[index] = self._decode([m[row] for m in maps], size, images[index].shape)
        return results

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        height, width = image.shape[:2]
        if self.max_side is None or max(height, width) <= self.max_side:
            return height, width
        ratio = self.max_side / max(height, width)
        return max(round(height * ratio), 1), max(round(width * ratio), 1)

    def _shrink(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)

    def _decode(self, maps: list[np.ndarray], size: tuple[int, int], shape: tuple[int, ...]) -> Detections:
        flat = [m.transpose(1, 2, 0) for m in maps]
        logits = np.concatenate([m[..., :4].reshape(-1, 2) for m in flat])
        loc = np.concatenate([m[..., 4:12].reshape(-1, 4) for m in flat])
        landmarks = np.concatenate([m[..., 12:].reshape(-1, 10) for m in flat])
        scores = torch.from_numpy(logits).softmax(1)[:, 1].numpy()
        keep = np.flatnonzero(scores > np.float32(self.score_threshold))
        keep = keep[np.argsort(-scores[keep], kind="stable")][:CANDIDATES]
        centre, side = anchors(*size)
        centre, side, loc, landmarks, scores = centre[keep], side[keep, None], loc[keep], landmarks[keep], scores[keep]
        middle = centre + loc[:, :2] * BOX_VARIANCE * side
        extent = side * np.exp(loc[:, 2:] * SIZE_VARIANCE)
        boxes = np.concatenate([middle - extent / 2, middle + extent / 2], axis=1)
        points = centre[:, None] + landmarks.reshape(-1, 5, 2) * BOX_VARIANCE * side[:, None]
        grown = boxes + np.float32([0, 0, 1, 1])
        keep = nms(torch.from_numpy(grown), torch.from_numpy(scores), self.nms_threshold).numpy()[:FACES]
        scale = np.float32([shape[1] / size[1], shape[0] / size[0]])
        return Detections(boxes[keep] * np.tile(scale, 2), scores[keep], points[keep] * scale)
