"""From features of images to embeddings of templates, for all eight treatments of the public programs at once.

An image's feature is that of its crop (F1: plus that of its mirror image), of length 1 if N1, times the detector's
score if D1. A template's is the sum over its media of the mean over each media's images, divided by its length. As in
the public programs (InsightFace's evaluation of IJB) images are pooled in float32 and templates divided in float64.

All images are read once; the eight treatments come out of one compiled loop. Price: 32 bytes a template and dimension,
0.4 GB for IJB-C at 512 dimensions.
"""

import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ijb import kernels
from ijb.lists import Lists

_ROWS = 4096  # images whose lengths are computed at a time
_TEMPLATES = 64  # of a thread's task


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
class Templates:
    """All templates of a protocol.

    numbers: int64 [T], ascending. pooled: float32 [8, T, D] by `Treatment.index`, not divided by its length.
    lost: bool [T], templates without a single image.
    """

    numbers: np.ndarray
    pooled: np.ndarray
    lost: np.ndarray

    def embeddings(self, treatment: Treatment) -> np.ndarray:
        """float64 [T, D] of length 1; a template whose features cancel out stays zero, a lost one is NaN."""
        embeddings = self.pooled[treatment.index].astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings))
        lengths[lengths == 0] = 1
        embeddings /= lengths[:, None]
        embeddings[self.lost] = np.nan
        return embeddings

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Where templates are in `numbers`, int64; ValueError for one that is not there."""
        places = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        if not np.array_equal(self.numbers[places], numbers):
            raise ValueError("a template that no image has")
        return places


def pool(plain: np.ndarray, mirror: np.ndarray, lists: Lists, there: np.ndarray) -> Templates:
    """Templates from float32 features [n, D] of the images of `lists` and of their mirror images.

    there: bool [n], images that have a feature; the others do not take part, whatever their rows hold.
    """
    numbers = np.unique(lists.templates)
    rows = np.lexsort((np.arange(len(there)), lists.medias, lists.templates))
    rows = rows[there[rows]]
    template, media = lists.templates[rows], lists.medias[rows]
    new_media = np.append(True, (template[1:] != template[:-1]) | (media[1:] != media[:-1]))[: len(rows)]
    media_starts = np.append(np.flatnonzero(new_media), len(rows))
    template_starts = np.searchsorted(template[media_starts[:-1]], numbers)
    template_starts = np.append(template_starts, len(media_starts) - 1)
    norms = _lengths(plain, mirror)
    pooled = np.empty((8, len(numbers), plain.shape[1]), np.float32)
    scores = lists.scores.astype(np.float32)

    def work(first: int) -> None:
        last = min(first + _TEMPLATES, len(numbers))
        kernels.pool(plain, mirror, norms, scores, rows, media_starts, template_starts, first, last, pooled)

    run_threads(work, range(0, len(numbers), _TEMPLATES))
    return Templates(numbers, pooled, np.diff(template_starts) == 0)


def run_threads(work, tasks: Iterable[int]) -> None:
    """`work` on all tasks, on as many threads as this process has CPUs."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(work, tasks):
            pass


def _lengths(plain: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """float32 [2, n]: lengths of the features, without and with those of the mirror images; 1 where they are 0."""
    lengths = np.empty((2, len(plain)), np.float32)

    def work(first: int) -> None:
        part = slice(first, first + _ROWS)
        for row, features in enumerate((plain[part], plain[part] + mirror[part])):
            lengths[row, part] = np.sqrt(np.einsum("ij,ij->i", features, features))

    run_threads(work, range(0, len(plain), _ROWS))
    lengths[lengths == 0] = 1
    return lengths
