"""From features of images to embeddings of templates, for all eight treatments of the public programs at once.

An image's feature is that of its crop (F1: plus that of its mirror image), of length 1 if N1, times the detector's
score if D1. A template's is the sum over its media of the mean over each media's images, divided by its length. As in
the public programs (InsightFace's evaluation of IJB) images are pooled in float32 and templates divided in float64.

All images are read once; the eight treatments come out of one compiled loop. Price: 32 bytes a template and dimension,
0.4 GB for IJB-C at 512 dimensions.
"""

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ijb import kernels
from ijb.lists import Lists

_ROWS = 4096  # images whose lengths are computed at a time
_TEMPLATES = 64  # of a thread's task
_NOTHING = 10  # float spacings at 1 below which a length counts as zero, as in scikit-learn's `normalize`


@dataclass(frozen=True)
class Treatment:
    """How images become a template; N, D, F as in the room's docstring. Its name is that of InsightFace's programs
    and of most papers' tables: `N0D1F1` is the usual one."""

    unit: bool
    weighted: bool
    mirror: bool

    @property
    def name(self) -> str:
        """Such as N0D1F1."""
        return f"N{self.unit:d}D{self.weighted:d}F{self.mirror:d}"

    @property
    def index(self) -> int:
        """Its place in `Templates.pooled`."""
        return 4 * self.mirror + 2 * self.unit + self.weighted


TREATMENTS = tuple(Treatment(*choice) for choice in itertools.product((True, False), repeat=3))
USUAL = Treatment(unit=False, weighted=True, mirror=True)


@dataclass(frozen=True)
class ImageFeatures:
    """float32 features of n images: of image i `rows[step * i]`, of its mirror image `mirrored[step * i + step - 1]`.

    So that one array with both rows of each image in turn does as well as two arrays. `there` bool [n]: images that
    have a feature; what the others' rows hold does not matter.
    """

    rows: np.ndarray
    mirrored: np.ndarray
    step: int
    there: np.ndarray

    @staticmethod
    def of_arrays(plain: np.ndarray, mirrored: np.ndarray) -> "ImageFeatures":
        """From two arrays [n, D]; images with a number in either that is not finite, or is too large to be squared in
        float32, have no feature."""
        plain, mirrored = (np.ascontiguousarray(array, np.float32) for array in (plain, mirrored))
        return ImageFeatures(plain, mirrored, 1, _finite(plain) & _finite(mirrored))

    @staticmethod
    def of_rows(rows: np.ndarray, gone: Iterable[int]) -> "ImageFeatures":
        """From one array [n, 2 D], each image's feature and its mirror image's side by side; `gone` have none."""
        there = np.ones(len(rows), bool)
        there[list(gone)] = False
        turns = rows.reshape(2 * len(rows), -1)
        return ImageFeatures(turns, turns, 2, there)

    def zeros(self) -> int:
        """How many images have a feature that is zero, with its mirror image: no direction, so alike to nothing."""
        found = 0
        for first in range(0, len(self.there), _ROWS):
            last = min(first + _ROWS, len(self.there))
            plain = self.rows[self.step * first : self.step * last : self.step].any(axis=1)
            turned = self.mirrored[self.step * first + self.step - 1 : self.step * last : self.step].any(axis=1)
            found += int((self.there[first:last] & ~plain & ~turned).sum())
        return found


def _finite(features: np.ndarray) -> np.ndarray:
    parts = [features[start : start + _ROWS] for start in range(0, len(features), _ROWS)]
    with np.errstate(over="ignore", invalid="ignore"):  # 4: the sum with the mirror image is squared, too
        return np.concatenate([np.isfinite(4 * np.einsum("ij,ij->i", part, part)) for part in parts])


@dataclass(frozen=True)
class Templates:
    """All templates of a protocol.

    numbers: int64 [T], ascending. pooled: float32 [8, T, D] by `Treatment.index`, not divided by its length.
    lost: bool [T], templates without a single image.
    """

    numbers: np.ndarray
    pooled: np.ndarray
    lost: np.ndarray

    def embeddings(self, treatment: Treatment) -> np.ndarray:
        """float64 [T, D] of length 1; a template whose features cancel out stays as it is, a lost one is NaN."""
        embeddings = self.pooled[treatment.index].astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings))
        lengths[lengths < _NOTHING * np.finfo(np.float64).eps] = 1
        embeddings /= lengths[:, None]
        embeddings[self.lost] = np.nan
        return embeddings

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Where templates are in `numbers`, int64; ValueError for one that is not there."""
        places = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        if not np.array_equal(self.numbers[places], numbers):
            raise ValueError("a template that no image has")
        return places


def pool(features: ImageFeatures, lists: Lists) -> Templates:
    """Templates from the features of the images of `lists`, in their order."""
    numbers = np.unique(lists.templates)
    rows = np.lexsort((np.arange(len(features.there)), lists.medias, lists.templates))
    rows = rows[features.there[rows]]
    template, media = lists.templates[rows], lists.medias[rows]
    new_media = np.append(True, (template[1:] != template[:-1]) | (media[1:] != media[:-1]))[: len(rows)]
    media_starts = np.append(np.flatnonzero(new_media), len(rows))
    template_starts = np.searchsorted(template[media_starts[:-1]], numbers)
    template_starts = np.append(template_starts, len(media_starts) - 1)
    norms = _lengths(features)
    pooled = np.empty((8, len(numbers), features.rows.shape[1]), np.float32)

    def work(first: int) -> None:
        last = min(first + _TEMPLATES, len(numbers))
        kernels.pool(
            features.rows,
            features.mirrored,
            features.step,
            norms,
            lists.scores,
            rows,
            media_starts,
            template_starts,
            first,
            last,
            pooled,
        )

    run_threads(work, range(0, len(numbers), _TEMPLATES))
    return Templates(numbers, pooled, np.diff(template_starts) == 0)


def run_threads(work: Callable[[int], None], tasks: Iterable[int]) -> None:
    """`work` on all tasks, on as many threads as this process has CPUs."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(work, tasks):
            pass


def _lengths(features: ImageFeatures) -> np.ndarray:
    """float32 [2, n]: lengths of the features, without and with those of the mirror images; 1 where that is nothing."""
    count, step = len(features.there), features.step
    lengths = np.empty((2, count), np.float32)

    def work(first: int) -> None:
        last = min(first + _ROWS, count)
        plain = np.ascontiguousarray(features.rows[step * first : step * last : step])
        mirrored = features.mirrored[step * first + step - 1 : step * last : step]
        for row, part in enumerate((plain, plain + mirrored)):
            lengths[row, first:last] = np.sqrt(np.einsum("ij,ij->i", part, part))

    run_threads(work, range(0, count, _ROWS))
    lengths[lengths < _NOTHING * np.finfo(np.float32).eps] = 1
    return lengths
