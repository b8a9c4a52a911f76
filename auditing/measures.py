"""Each crop on its own: its picture in small, and signs of quality that need no second network.

Signs of quality, larger is better: `norm` (length of the feature: networks trained with a margin give blurred and
occluded faces short ones), `mirror` (cosine of the features of crop and mirror image), `shift` (mean cosine to the
features of the crop moved by 4 pixels, where asked for), `sharpness` (logarithm of the Laplacian's variance), `filled`
(share of the crop that is not one flat colour at its border). Whether they mean anything for a model is measured:
`reject_curve` says how the errors of a verification set fall as the worst pairs by that sign are left out.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from auditing.duplicates import THUMB, thumbnail
from embedding import Embedder

SIGNS = ("mirror", "shift", "sharpness", "filled")
WIDTH = THUMB * THUMB + len(SIGNS)  # columns of the store of measures
SHIFT = 4  # pixels


def measure(embedder: Embedder, crops: np.ndarray, *, shifts: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, D], as the embedder gives them, and measures float32 [n, WIDTH], of uint8 RGB crops.

    The measures are the small picture's 256 grey values and `SIGNS`; `shift` is NaN unless `shifts`.
    """
    plain = embedder.with_preprocessing(mirror=False)
    feature, mirrored = plain.features(crops), plain.features(crops[:, :, ::-1])
    signs = [cosine_rows(feature, mirrored)]
    if shifts:
        moved = [np.roll(crops, step, axis) for axis in (1, 2) for step in (SHIFT, -SHIFT)]
        signs.append(np.mean([cosine_rows(feature, plain.features(other)) for other in moved], axis=0))
    else:
        signs.append(np.full(len(crops), np.nan, np.float32))
    signs += [np.array([sharpness(crop) for crop in crops]), np.array([filled(crop) for crop in crops])]
    pictures = np.stack([thumbnail(crop) for crop in crops]) if len(crops) else np.zeros((0, THUMB * THUMB))
    features = feature + mirrored if embedder.preprocessing.mirror else feature
    return features, np.concatenate([pictures, np.stack(signs, axis=1)], axis=1).astype(np.float32)


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
