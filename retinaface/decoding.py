"""From the network's maps to faces.

Only what passes the score threshold is looked at further: of LFW's 2,688 anchors per photo about 25. Thresholding
comes first, on the difference of the two logits, then softmax, decoding and suppression on the few that are left.

What is kept of the reference (biubug6/Pytorch_Retinaface, detect.py and utils/nms/py_cpu_nms.py) to the letter, because
results depend on it: scores strictly above the threshold, the best 5,000 candidates before suppression and 750 faces
after it, areas of boxes counted with both end pixels (the +1), overlap strictly above the threshold suppresses, and the
order of equal scores. Equal scores are not rare: near 1 there are few float32 numbers, and which of two equal anchors
survives moves a box by pixels.
"""

import itertools
import math
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaface.anchors import anchors
from retinaface.network import ANCHORS_PER_CELL, BOXES, LANDMARKS, LOGITS

CENTRE_VARIANCE, SIZE_VARIANCE = np.float32(0.1), np.float32(0.2)  # `variance` in the reference's data/config.py
MAX_CANDIDATES, MAX_FACES = 5000, 750  # `top_k` and `keep_top_k` in the reference's detect.py

Floats: TypeAlias = NDArray[np.float32]
Cells: TypeAlias = np.ndarray | Tensor


class Candidates(NamedTuple):
    """Decoded anchors of one image, float32, in pixels.

    boxes [k, 4] xyxy; scores [k]; landmarks [k, 5, 2]; centres [k, 2] of the anchors that they come from.
    """

    boxes: Floats
    scores: Floats
    landmarks: Floats
    centres: Floats

    def select(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "Candidates":
        """Some of them, by mask, index or slice."""
        return Candidates(*(part[which] for part in self))


class RawOutputs(NamedTuple):
    """What the network says about each anchor of one image, in the order of `anchors`, float32.

    boxes [A, 4]: offset of the centre and logarithm of the size relative to the anchor, over their variances; scores
    [A, 2]: probabilities of background and face; landmarks [A, 10]: offsets x, y of five points, over the variance.
    """

    boxes: Floats
    scores: Floats
    landmarks: Floats


def raw_outputs(cells: Cells) -> RawOutputs:
    """Everything that the answers [1, 32, cells] of `network.forward` say, laid out as the reference network's."""
    values = _host(cells)[0].T
    logits, boxes, landmarks = values[:, LOGITS], values[:, BOXES], values[:, LANDMARKS]
    return RawOutputs(boxes.reshape(-1, 4), _softmax(logits.reshape(-1, 2)), landmarks.reshape(-1, 10))


def candidates(cells: Cells, size: tuple[int, int], threshold: float) -> list[Candidates]:
    """The anchors whose score exceeds `threshold`, for each image of a batch, in the order of `anchors`.

    `cells` [N, 32, cells] is what `network.forward` gives, on any device; `size` is the (height, width) of the images.
    """
    background, face = cells[:, LOGITS][:, 0::2], cells[:, LOGITS][:, 1::2]
    hot = (face - background > _logit(threshold)).swapaxes(1, 2)  # [N, cells, anchors per cell]
    image, cell, which = hot.nonzero(as_tuple=True) if isinstance(hot, Tensor) else hot.nonzero()
    values = _host(cells[image, :, cell])
    image, cell, which = _host(image), _host(cell), _host(which)

    each = np.arange(len(values))
    logits, boxes, landmarks = (
        values[:, part].reshape(-1, ANCHORS_PER_CELL, *shape)[each, which]
        for part, shape in ((LOGITS, (2,)), (BOXES, (4,)), (LANDMARKS, (5, 2)))
    )
    centres, sides = anchors(*size)
    anchor = cell * ANCHORS_PER_CELL + which
    centre, side = centres[anchor], sides[anchor, None]
    middle = centre + boxes[:, :2] * CENTRE_VARIANCE * side
    half = side * np.exp(boxes[:, 2:] * SIZE_VARIANCE) / 2
    found = Candidates(
        np.concatenate([middle - half, middle + half], axis=1),
        _softmax(logits)[:, 1],
        centre[:, None] + landmarks * CENTRE_VARIANCE * side[:, None],
        centre,
    )
    passed = found.scores > np.float32(threshold)
    ends = np.searchsorted(image[passed], np.arange(len(cells) + 1))
    found = found.select(passed)
    return [found.select(slice(*span)) for span in itertools.pairwise(ends)]


def suppress(found: Candidates, threshold: float) -> Candidates:
    """The best of each group of candidates that overlap by more than `threshold`, best first."""
    order = _descending(found.scores)[:MAX_CANDIDATES]
    # The reference sorts again inside its suppression; both sorts put equal scores in an order of their own.
    order = order[_descending(found.scores[order])]
    kept = _not_overlapped(found.boxes[order] + np.array([0, 0, 1, 1], np.float32), threshold)
    return found.select(order[kept])


def _not_overlapped(boxes: Floats, threshold: float) -> list[int]:
    """Greedy suppression: the numbers of at most `MAX_FACES` boxes [n, 4], best first, that no better one overlaps.

    What `torchvision.ops.nms` keeps, without the two seconds that importing torchvision takes in every process.
    """
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    areas = (right - left) * (bottom - top)
    kept: list[int] = []
    rest = np.arange(len(boxes))
    while len(rest) and len(kept) < MAX_FACES:
        best, rest = rest[0], rest[1:]
        kept.append(int(best))
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        common = width.clip(0) * height.clip(0)
        overlap = common / (areas[best] + areas[rest] - common)
        rest = rest[~(overlap.astype(np.float64) > threshold)]  # in float64, as the threshold is written
    return kept


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


def _host(values: Cells) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
