"""From five landmarks to a 112x112 crop, and which of several faces a photo is about.

Design: the least-squares similarity transform of Umeyama (PAMI 1991, DOI 10.1109/34.88573), written for the plane.
Read as complex numbers the centred points are s and d, and the best rotation-and-scale is the one complex number
a = sum(conj(s) d) / sum(|s|^2): the same minimum that Umeyama's singular value decomposition finds, reflections
excluded as there, without the decomposition and for any number of faces at once. Price: it works in two dimensions
only.

Interpolation is bilinear without smoothing, as in every public 112x112 data set; a face much larger than 112 pixels is
therefore subsampled, not averaged. Smoothing would look better and would no longer be what released models have seen.
"""

from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from config import CROP_SIZE

# Left eye, right eye, nose, left and right corner of the mouth (left as the viewer sees it), in pixels of a 112x112
# crop: the ArcFace template, as in InsightFace's face_align.py.
TEMPLATE: NDArray[np.float32] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)

Rule = Literal["central", "largest", "best_score", "overlap"]
RULES: tuple[str, ...] = get_args(Rule)

# cv2.warpAffine addresses the source with 16-bit integers.
_WARP_LIMIT = 32_767


class AlignmentError(ValueError):
    """The landmarks do not determine a crop."""


def estimate_similarity(landmarks: ArrayLike, template: ArrayLike = TEMPLATE) -> NDArray[np.float64]:
    """The similarity transform that takes `landmarks` nearest to `template` in the least-squares sense.

    `landmarks` is [5, 2] (or [..., k, 2] for many faces at once), (x, y) in pixels of the photo; `template` is [k, 2]
    in pixels of the crop. Returns float64 [2, 3] (or [..., 2, 3]), to be applied as `M @ [x, y, 1]`: rotation, one
    positive scale and a translation, never a reflection.

    Points without a solution (all landmarks in one place, or not finite) give NaN, as in scikit-image. Collinear
    points have a solution. For points whose best scale is zero (the exact mirror image of a regular arrangement) every
    rotation is equally good and the linear part is zero.
    """
    source = np.asarray(landmarks, dtype=np.float64)
    target = np.asarray(template, dtype=np.float64)
    if source.shape[-2:] != target.shape or target.ndim != 2 or target.shape[1] != 2:
        raise ValueError(f"landmarks {source.shape} and template {target.shape} must both be lists of (x, y)")
    source_mean = source.mean(axis=-2)
    target_mean = target.mean(axis=-2)
    s = _complex(source - source_mean[..., None, :])
    d = _complex(target - target_mean)
    spread = np.sum(np.abs(s) ** 2, axis=-1)
    # Equal points whose mean is not a float differ from it by a rounding error, which is not a shape.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(source).max(axis=(-2, -1), initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        linear = np.sum(np.conj(s) * d, axis=-1) / spread
        unsolvable = ~(spread > source.shape[-2] * rounding**2) | ~np.any(d != 0)
        linear = np.where(unsolvable, complex(np.nan, np.nan), linear)
        shift = _complex(target_mean) - linear * _complex(source_mean)
    rows = [[linear.real, -linear.imag, shift.real], [linear.imag, linear.real, shift.imag]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _complex(points: NDArray[np.float64]) -> NDArray[np.complex128]:
    return points[..., 0] + 1j * points[..., 1]


def align_face(bgr: NDArray[np.uint8], landmarks: ArrayLike, size: int = CROP_SIZE) -> NDArray[np.uint8]:
    """Cut the face with these `landmarks` [5, 2] out of a photo, upright, uint8 [size, size, 3] (bilinear).

    What lies outside the photo is black. The channel order is that of `bgr`. Raises `AlignmentError` where the
    landmarks determine no crop, or one that shows nothing of the photo.
    """
    # Other sizes scale the coordinates, as InsightFace's face_align.py does.
    matrix = estimate_similarity(landmarks, TEMPLATE.astype(np.float64) * (size / CROP_SIZE))
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    # Ten thousand crop pixels per photo pixel, or the reverse, are rounding errors rather than faces.
    if not np.isfinite(matrix).all() or not 1e-4 < scale < 1e4:
        raise AlignmentError("landmarks do not determine a crop")
    seen = _reach(matrix, size)
    if (seen.max(axis=0) <= 0).any() or (seen.min(axis=0) >= [bgr.shape[1], bgr.shape[0]]).any():
        raise AlignmentError("the face lies outside of the photo")
    return warp(bgr, matrix, size)


def warp(bgr: NDArray[np.uint8], matrix: NDArray[np.float64], size: int) -> np.ndarray:
    """Apply `matrix` [2, 3] (photo to crop) to a photo uint8 [H, W, 3]; returns [size, size, 3], black outside."""
    if max(bgr.shape[:2]) >= _WARP_LIMIT:
        bgr, matrix = _cut_to_reach(bgr, matrix, size)
    return cv2.warpAffine(bgr, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0))


def _reach(matrix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The corners, [4, 2] in pixels of the photo, of what a crop of `size` pixels can see."""
    corners = np.array([[-1, -1, 1], [size, -1, 1], [-1, size, 1], [size, size, 1]], dtype=np.float64)
    return corners @ cv2.invertAffineTransform(matrix).T


def _cut_to_reach(
    bgr: NDArray[np.uint8], matrix: NDArray[np.float64], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The part of the photo that the crop can see, and the matrix for that part."""
    seen = _reach(matrix, size)
    height, width = bgr.shape[:2]
    left, top = np.clip(np.floor(seen.min(axis=0)).astype(int) - 1, 0, [width - 1, height - 1])
    right, bottom = np.clip(np.ceil(seen.max(axis=0)).astype(int) + 2, [left + 1, top + 1], [width, height])
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ [left, top]
    # Of a part that is still too large bilinear sampling looks at few pixels anyway.
    step = max(right - left, bottom - top) // _WARP_LIMIT + 1
    moved[:, :2] *= step
    return np.ascontiguousarray(bgr[top:bottom:step, left:right:step]), moved


def box_overlap(boxes: ArrayLike, box: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union, float64 [n] in [0, 1], of `boxes` [n, 4] with one `box` [4], all xyxy."""
    many = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    one = np.asarray(box, dtype=np.float64)
    sides = np.minimum(many[:, 2:], one[2:]) - np.maximum(many[:, :2], one[:2])
    common = np.prod(np.clip(sides, 0, None), axis=1)
    area = np.prod(np.clip(many[:, 2:] - many[:, :2], 0, None), axis=1) + np.prod(np.clip(one[2:] - one[:2], 0, None))
    return np.divide(common, area - common, out=np.zeros(len(many)), where=area > common)


def choose_face(
    boxes: ArrayLike,
    scores: ArrayLike,
    size_wh: tuple[int, int],
    rule: Rule = "central",
    box: ArrayLike | None = None,
) -> int | None:
    """The index of the face that a photo is about, or None when there is no such face.

    `boxes` [n, 4] xyxy and `scores` [n] are detections in a photo of `size_wh` = (width, height) pixels. Rules:

    * `central`: the box whose centre is nearest to the photo's centre (the rule behind 99.10 % on LFW, where the
      largest face and the first detection give 98.73 %);
    * `largest`: the box with the largest area;
    * `best_score`: the detection with the highest score;
    * `overlap`: the box with the largest intersection over union with `box` [4]; a face that does not touch `box` is
      not the one meant, so the answer may be None.

    Of equals the one with the higher score wins, then the first.
    """
    many = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    confidence = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(many) != len(confidence):
        raise ValueError(f"{len(many)} boxes but {len(confidence)} scores")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}, expected one of {', '.join(RULES)}")
    if rule == "overlap" and box is None:
        raise ValueError("the rule overlap needs a box")
    if len(many) == 0:
        return None
    merit = _merit(many, confidence, size_wh, rule, box)
    best = int(np.lexsort((-confidence, -merit))[0])
    return None if rule == "overlap" and merit[best] <= 0 else best


def _merit(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], size_wh: tuple[int, int], rule: Rule, box: Any
) -> NDArray[np.float64]:
    """What `rule` maximises, float64 [n]."""
    if rule == "overlap":
        return box_overlap(boxes, box)
    if rule == "best_score":
        return scores
    if rule == "largest":
        return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return -np.hypot(*(centres - np.asarray(size_wh, dtype=np.float64) / 2).T)
