"""The same photo twice: byte for byte, encoded again, resized, or mirrored, within and across identities.

A crop is described by its grey picture of 16x16 pixels, whitened by the principal components of the set, so that what
all faces share does not count. Signs of random projections of that description are its bits; crops that agree in all
bits of one of several bands are candidates (bands are sorted, so no two crops are compared that do not agree in one).
The number of bits grows with the set and the number of bands with it, so that a band holds few crops by chance and a
pair that differs in 6 % of its bits is missed once in 300. A mirrored crop is found by its mirror image's bits.
Candidates whose descriptions agree are then compared pixel by pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

import utils

THUMB = 16  # pixels per side of the grey picture
COMPONENTS = 64
SAMPLE = 20_000  # crops from which the principal components are computed
FLIPPED = 0.06  # share of bits that differ between a picture and its second encoding (JPEG 70, or 80 pixels and back)
MISSED = 1 / 300
SIMILAR = 0.80  # least cosine of two descriptions that are worth a look at the pixels
HOW = "identical", "encoded again", "mirrored"  # how two crops are one photo, as a finding's reason begins
LARGEST_BUCKET = 64  # crops that share a band: with more of them each is compared with its neighbours in the order only

SAME_PICTURE = 0.985  # least correlation of two pictures of 56x56 pixels: encoded again 0.995 and more, two frames less


@dataclass(frozen=True)
class Duplicate:
    """Two crops, `first` < `second`, that show one photo; `how`: identical, encoded again or mirrored."""

    first: int
    second: int
    how: str
    correlation: float


def thumbnail(rgb: np.ndarray) -> np.ndarray:
    """Grey values float32 [256], 0 to 255, of a uint8 RGB crop."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()


def describe(thumbs: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whitened descriptions, float32 [n, 64] of length 1, of pictures [n, 256] and of their mirror images."""
    random = np.random.default_rng(seed)
    some = thumbs[np.sort(random.permutation(len(thumbs))[:SAMPLE])].astype(np.float32)
    mirrored = some.reshape(-1, THUMB, THUMB)[:, :, ::-1].reshape(len(some), -1)
    both = _level(np.concatenate([some, mirrored]))
    mean = both.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(both - mean, rowvar=False) + 1e-6 * np.eye(THUMB * THUMB))
    # Half-whitened below the 24th component: there JPEG's noise is as large as the picture.
    order = np.argsort(values)[::-1][:COMPONENTS]
    floor = values[order[min(24, len(order) - 1)]]
    basis = (vectors[:, order] / np.sqrt(np.maximum(values[order], floor))).astype(np.float32)

    def of(pictures: np.ndarray) -> np.ndarray:
        described = (_level(pictures) - mean) @ basis
        return described / np.maximum(np.linalg.norm(described, axis=1, keepdims=True), 1e-12)

    plain, mirror = np.empty((2, len(thumbs), basis.shape[1]), np.float32)
    for start in range(0, len(thumbs), SAMPLE):
        part = np.asarray(thumbs[start : start + SAMPLE], np.float32)
        plain[start : start + SAMPLE] = of(part)
        mirror[start : start + SAMPLE] = of(part.reshape(-1, THUMB, THUMB)[:, :, ::-1].reshape(len(part), -1))
    return plain, mirror


def _level(pictures: np.ndarray) -> np.ndarray:
    """Brightness and contrast taken off."""
    pictures = pictures - pictures.mean(axis=1, keepdims=True)
    return pictures / np.maximum(pictures.std(axis=1, keepdims=True), 1.0)


def candidates(plain: np.ndarray, mirror: np.ndarray, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs that share a band and have similar descriptions: (first, second, mirrored bool) arrays, a band each."""
    count = len(plain)
    bits = min(30, max(8, math.ceil(math.log2(max(2, count))) + 1))
    bands = math.ceil(math.log(MISSED) / math.log1p(-((1 - FLIPPED) ** bits)))
    random = np.random.default_rng(seed)
    found = []
    with utils.progress(bands, "same photo twice", unit="band") as bar:
        for _ in range(bands):
            planes = random.standard_normal((plain.shape[1], bits)).astype(np.float32)
            powers = 1 << np.arange(bits, dtype=np.int64)
            codes = np.concatenate([(side @ planes > 0) @ powers for side in (plain, mirror)])
            first, second = _sharing(codes)
            # A pair of two mirror images is the pair itself; keep those with at least one picture as it is.
            keep = (first < count) | (second < count)
            first, second = first[keep], second[keep]
            mirrored = (first >= count) != (second >= count)
            first, second = first % count, second % count
            swap = first > second
            first, second = np.where(swap, second, first), np.where(swap, first, second)
            keep = first != second
            first, second, mirrored = first[keep], second[keep], mirrored[keep]
            left = plain[first]
            cosine = np.where(
                mirrored,
                np.einsum("nd,nd->n", left, mirror[second]),
                np.einsum("nd,nd->n", left, plain[second]),
            )
            keep = cosine >= SIMILAR
            found.append((first[keep], second[keep], mirrored[keep]))
            bar.update()
    return found


def _sharing(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (a, b) of rows with equal codes; in large buckets each with its next `LARGEST_BUCKET` neighbours."""
    order = np.argsort(codes, kind="stable")
    sorted_codes = codes[order]
    first, second = [], []
    for step in range(1, LARGEST_BUCKET + 1):
        same = np.flatnonzero(sorted_codes[:-step] == sorted_codes[step:]) if step < len(codes) else np.array([], int)
        if not len(same):
            break
        first.append(order[same])
        second.append(order[same + step])
    empty = np.array([], np.int64)
    return (np.concatenate(first), np.concatenate(second)) if first else (empty, empty)


def find_duplicates(
    thumbs: np.ndarray, read: Callable[[int], tuple[bytes, np.ndarray]], seed: int = 0
) -> list[Duplicate]:
    """All pairs of crops that show one photo. `read(index)` gives a crop's encoded bytes and its uint8 RGB pixels."""
    if len(thumbs) < 2:
        return []
    bands = candidates(*describe(thumbs, seed), seed=seed)
    pairs = np.unique(np.concatenate([np.stack(band, axis=1).astype(np.int64) for band in bands]), axis=0)
    duplicates: dict[tuple[int, int], Duplicate] = {}
    with utils.progress(len(pairs), "comparing pixels", unit="pair") as bar:
        for first, second, mirrored in pairs.tolist():
            found = compare(read(first), read(second), bool(mirrored))
            if found is not None:
                how, correlation = found
                known = duplicates.get((first, second))
                if known is None or correlation > known.correlation:
                    duplicates[first, second] = Duplicate(first, second, how, correlation)
            bar.update()
    return sorted(duplicates.values(), key=lambda duplicate: (duplicate.first, duplicate.second))


def compare(
    first: tuple[bytes, np.ndarray], second: tuple[bytes, np.ndarray], mirrored: bool
) -> tuple[str, float] | None:
    """How two crops are one photo, and the correlation of their pixels; None if they are not."""
    if not mirrored and first[0] == second[0]:
        return HOW[0], 1.0
    one, other = (_small(rgb) for _, rgb in (first, second))
    if mirrored:
        other = other[:, ::-1]
    one, other = one - one.mean(), other - other.mean()
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    correlation = float((one * other).sum()) / length if length > 0 else 0.0
    if correlation < SAME_PICTURE:
        return None
    return HOW[2] if mirrored else HOW[1], correlation


def _small(rgb: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (56, 56), interpolation=cv2.INTER_AREA).astype(np.float32)
