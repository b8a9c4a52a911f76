"""Each crop on its own: its picture in small, and signs of quality that need no second embedding network.

Signs of quality, larger is better: `norm` (length of the feature: networks trained with a margin give blurred and
occluded faces short ones), `face` (the detector's score of the face in the middle, 0 where it sees none), `landmarks`
(minus the mean distance in pixels of that face's landmarks from where alignment puts them), `mirror` (cosine of the
features of crop and mirror image), `shift` (mean cosine to the features of the crop moved by 4 pixels, where asked
for), `sharpness` (logarithm of the Laplacian's variance), `resolution` (pixels along a side that would hold most of its
detail), `filled` (share of the crop that is not one flat colour at its border). Whether they mean anything for a model
is measured: `reject_curve` says how the errors of a verification set fall as the worst pairs by that sign are left out.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from auditing.duplicates import THUMB, thumbnail
from config import CROP_SIZE
from cropping.align import TEMPLATE, box_overlap
from cropping.faces import BOX_IN_CROP
from cropping.photos import decode_crop
from embedding import Embedder
from formats.crop_sets import Crops
from retinaface import RetinaFace
from utils import InputError

SIGNS = ("face", "landmarks", "mirror", "shift", "sharpness", "resolution", "filled")
WIDTH = THUMB * THUMB + len(SIGNS)  # columns of the store of measures
SHIFT = 4  # pixels
# Share of the energy of all gradients. By it real crops that are shrunk to 16, 24, 32 and 48 pixels and enlarged again
# have 16, 24, 30 and 42 (medians of 100).
DETAIL = 0.9

LEAST_SCORE = 0.02  # of a face that is looked at
_OVERLAP = 0.3  # with where the detector's boxes lie in aligned crops; from here on a face is the one in the middle


def readable(crops: Crops, index: int) -> np.ndarray | None:
    """A crop as uint8 RGB; None if it cannot be had or decoded."""
    try:
        return decode_crop(crops.read(index)[0])
    except (ValueError, OSError, InputError):
        return None


def measure(
    embedder: Embedder, crops: np.ndarray, *, shifts: bool, detector: RetinaFace | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, D], as the embedder gives them, and measures float32 [n, WIDTH], of uint8 RGB crops.

    The measures are the small picture's 256 grey values and `SIGNS`; `shift` is NaN unless `shifts`, `face` and
    `landmarks` without a `detector`.
    """
    unknown = np.full(len(crops), np.nan, np.float32)
    with ThreadPoolExecutor(1) as beside:  # much of the detector's work is the CPU's, also where there is a GPU
        seen = None if detector is None else beside.submit(look, detector, crops)
        plain = embedder.with_preprocessing(mirror=False)
        feature, mirrored = plain.features(crops), plain.features(crops[:, :, ::-1])
    signs = [*((unknown, unknown) if seen is None else seen.result()), cosine_rows(feature, mirrored)]
    if shifts:
        moved = [np.roll(crops, step, axis) for axis in (1, 2) for step in (SHIFT, -SHIFT)]
        signs.append(np.mean([cosine_rows(feature, plain.features(other)) for other in moved], axis=0))
    else:
        signs.append(unknown)
    signs += [np.array([sign(crop) for crop in crops]) for sign in (sharpness, resolution, filled)]
    pictures = np.stack([thumbnail(crop) for crop in crops]) if len(crops) else np.zeros((0, THUMB * THUMB))
    features = feature + mirrored if embedder.preprocessing.mirror else feature
    return features, np.concatenate([pictures, np.stack(signs, axis=1)], axis=1).astype(np.float32)


def look(detector: RetinaFace, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`face` and `landmarks`, float32 [n] each, of uint8 RGB crops; without a face 0 and minus the crop's side.

    The detector's own limit is to be `LEAST_SCORE`.
    """
    face, landmarks = np.zeros(len(crops), np.float32), np.full(len(crops), -CROP_SIZE, np.float32)
    for index, found in enumerate(detector.detect([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])):
        near = box_overlap(found.boxes, BOX_IN_CROP) >= _OVERLAP
        if near.any():
            best = int(np.argmax(np.where(near, found.scores, -1)))
            face[index] = found.scores[best]
            landmarks[index] = -np.linalg.norm(found.landmarks[best] - TEMPLATE, axis=1).mean()
    return face, landmarks


def cosine_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, float32 [n]; NaN where one has no direction."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.einsum("nd,nd->n", first, second) / lengths).astype(np.float32)


def sharpness(rgb: np.ndarray) -> float:
    """Logarithm of the variance of the Laplacian of the grey picture."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return float(np.log(cv2.Laplacian(grey, cv2.CV_32F).var() + 1e-3))


@cache
def _spectrum_of(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Window [side, side] that fades to the border, and frequency of each coefficient of its transform, in waves."""
    fade = np.hanning(side).astype(np.float32)
    rows, columns = np.fft.fftfreq(side, 1 / side), np.fft.rfftfreq(side, 1 / side)
    return np.outer(fade, fade), np.hypot(rows[:, None], columns[None])


def resolution(rgb: np.ndarray) -> float:
    """Pixels along a side, up to the crop's own, that hold most of its detail.

    It is twice the frequency below which `DETAIL` of the energy of all gradients lies: low for photos that were
    enlarged or are blurred; noise and the blocks of JPEG count as detail.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    window, frequency = _spectrum_of(len(grey))
    energy = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2 * frequency**2
    below = np.cumsum(np.bincount(np.ceil(frequency).astype(int).ravel(), energy.ravel()))
    return float(min(2 * np.searchsorted(below, DETAIL * below[-1]), len(grey)))


def filled(rgb: np.ndarray) -> float:
    """Share of rows and columns that are not flat from the border inwards, as the padding of an alignment is."""
    spread = rgb.max(axis=2).astype(np.int16)
    share = 1.0
    for lines in (spread, spread.T):
        busy = np.flatnonzero(lines.max(axis=1) - lines.min(axis=1) > 8)
        share *= (busy[-1] - busy[0] + 1) / len(lines) if len(busy) else 0.0
    return share


@dataclass(frozen=True)
class RejectCurve:
    """False non-match rate of the genuine pairs that are left when the worst share is rejected, threshold unchanged."""

    sign: str
    rejected: np.ndarray  # float64 [k], shares
    fnmr: np.ndarray  # float64 [k]

    @property
    def gain(self) -> float:
        """Mean of the curve below its first value, as a share of that value: 0 says the sign means nothing."""
        return float(1 - self.fnmr.mean() / self.fnmr[0]) if self.fnmr[0] > 0 else 0.0


def reject_curve(sign: str, quality: np.ndarray, accepted: np.ndarray, shares: np.ndarray | None = None) -> RejectCurve:
    """`quality` float [pairs]: the lower of both crops' values; `accepted` bool [pairs]: genuine pairs
    above threshold."""
    shares = np.linspace(0, 0.5, 26) if shares is None else shares
    order = np.argsort(quality, kind="stable")
    wrong = ~accepted[order]
    left = len(wrong) - np.floor(shares * len(wrong)).astype(int)
    fnmr = [wrong[len(wrong) - count :].mean() if count else 0.0 for count in left.tolist()]
    return RejectCurve(sign, shares, np.array(fnmr))
