"""From the network's maps to faces.

Only what passes the score threshold is looked at further: of LFW's 2,688 anchors per photo about 25. Thresholding
comes first, on the difference of the two logits, then softmax, decoding and suppression on the few that are left.

What is kept of the reference (biubug6/Pytorch_Retinaface, detect.py and utils/nms/py_cpu_nms.py) to the letter, because
results depend on it: scores strictly above the threshold, the best 5,000 candidates before suppression and 750 faces
after it, areas of boxes counted with both end pixels (the +1), overlap strictly above the threshold suppresses, and the
order of equal scores. Equal scores are not rare: near 1 there are few float32 numbers, and which of two equal anchors
survives moves a box by pixels.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from retinaface.anchors import anchors
from retinaface.network import ANCHORS_PER_CELL, BOXES, LANDMARKS, LOGITS

CENTRE_VARIANCE, SIZE_VARIANCE = np.float32(0.1), np.float32(0.2)  # `variance` in the reference's data/config.py
MAX_CANDIDATES, MAX_FACES = 5000, 750  # `top_k` and `keep_top_k` in the reference's detect.py

Floats: TypeAlias = NDArray[np.float32]
Maps: TypeAlias = list[np.ndarray] | list[Tensor]


class Candidates(NamedTuple):
    """Decoded anchors of one image, float32, in pixels.

    boxes [k, 4] xyxy; scores [k]; landmarks [k, 5, 2]; centres [k, 2] of the anchors that they come from.
    """

    boxes: Floats
    scores: Floats
    landmarks: Floats
    centres: Floats


class RawOutputs(NamedTuple):
    """What the network says about each anchor of one image, in the order of `anchors`, float32.

    boxes [A, 4]: offset of the centre and logarithm of the size relative to the anchor, over their variances; scores
    [A, 2]: probabilities of background and face; landmarks [A, 10]: offsets x, y of five points, over the variance.
    """

    boxes: Floats
    scores: Floats
    landmarks: Floats


def raw_outputs(maps: Maps) -> RawOutputs:
    """Everything the maps [1, 32, h, w] of one image say, laid out as the reference network returns it."""
    cells = [_host(level[0]).reshape(len(level[0]), -1).T for level in maps]
    logits, boxes, landmarks = (
        np.concatenate([level[:, part].reshape(-1, width) for level in cells])
        for part, width in ((LOGITS, 2), (BOXES, 4), (LANDMARKS, 10))
    )
    return RawOutputs(boxes, _softmax(logits), landmarks)


def candidates(maps: Maps, size: tuple[int, int], threshold: float) -> list[Candidates]:
    """The anchors whose score exceeds `threshold`, for each image of a batch, in the order of `anchors`.

    `maps` are those of `network.forward`, [N, 32, h, w] each, arrays or tensors on any device; `size` is the (height,
    width) of the images.
    """
    centres, sides = anchors(*size)
    rows, anchor, logits, boxes, landmarks = _pick(maps, _logit(threshold))
    scores = _softmax(logits)[:, 1]
    centre, side = centres[anchor], sides[anchor, None]
    middle = centre + boxes[:, :2] * CENTRE_VARIANCE * side
    half = side * np.exp(boxes[:, 2:] * SIZE_VARIANCE) / 2
    boxes = np.concatenate([middle - half, middle + half], axis=1)
    landmarks = centre[:, None] + landmarks * CENTRE_VARIANCE * side[:, None]
    found = Candidates(boxes, scores, landmarks, centre)
    passed = scores > np.float32(threshold)
    return [select(found, passed & (rows == row)) for row in range(len(maps[0]))]


def select(found: Candidates, which: NDArray[np.bool_] | NDArray[np.int64]) -> Candidates:
    """Some of the candidates, by mask or by index."""
    return Candidates(*(part[which] for part in found))


def suppress(found: Candidates, threshold: float) -> Candidates:
    """The best of each group of candidates that overlap by more than `threshold`, best first."""
    found = select(found, _descending(found.scores)[:MAX_CANDIDATES])
    # The reference sorts again inside its suppression; both sorts put equal scores in an order of their own.
    found = select(found, _descending(found.scores))
    counted = torch.from_numpy(found.boxes + np.float32([0, 0, 1, 1]))
    kept = nms(counted, torch.from_numpy(found.scores), threshold)
    return select(found, kept[:MAX_FACES].numpy())


def _descending(scores: Floats) -> NDArray[np.int64]:
    return scores.argsort()[::-1]


def _logit(probability: float) -> float:
    """The difference of logits that may just reach a probability, a little low so that rounding loses nothing."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability)) - 1e-3


def _softmax(logits: Floats) -> Floats:
    # PyTorch's own, because the reference's rounding decides which scores are equal.
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def _pick(maps: Maps, limit: float) -> tuple[np.ndarray, ...]:
    """The row in the batch, the anchor's number, logits [k, 2], box [k, 4] and landmarks [k, 5, 2] of the anchors whose
    logits differ by more than `limit`."""
    picked, first = [], 0
    for level in maps:
        height, width = level.shape[2:]
        hot = (level[:, 1:4:2] - level[:, 0:4:2] > limit).swapaxes(1, 2).swapaxes(2, 3)  # [N, h, w, anchor]
        row, y, x, which = hot.nonzero(as_tuple=True) if isinstance(hot, Tensor) else hot.nonzero()
        values = _host(level[row, :, y, x])
        row, y, x, which = (_host(index) for index in (row, y, x, which))
        each = np.arange(len(row))
        logits, boxes, landmarks = (
            values[:, part].reshape(-1, ANCHORS_PER_CELL, *shape)[each, which]
            for part, shape in ((LOGITS, (2,)), (BOXES, (4,)), (LANDMARKS, (5, 2)))
        )
        picked.append((row, first + (y * width + x) * ANCHORS_PER_CELL + which, logits, boxes, landmarks))
        first += height * width * ANCHORS_PER_CELL
    return tuple(np.concatenate(parts) for parts in zip(*picked, strict=True))


def _host(values: np.ndarray | Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
