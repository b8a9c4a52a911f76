"""The space in which an audit compares embeddings: whitened within people.

Pose, light and age move the embeddings of one person along some directions more than along others, and a network that
was trained on wrong labels spreads a person along still others. Cosines weigh all directions alike. So the embeddings
are moved and stretched: the mean of all is taken off, and the covariance of a person's photos about their centre, to
which its own mean variance is added in every direction, becomes the identity (within-class covariance normalisation:
Hatch, Kajarekar and Stolcke, Interspeech 2006). Only trusted crops count, and which these are is found anew in the new
space.

Whether that helps depends on the network: of one that has learned the wrong labels of its set it shows what is left of
their difference, of one that has learned little it shows noise. So both spaces are tried on a sample, and the one in
which more crops are found at the same rate of error is taken (`choose`), the plain one where the numbers might differ
by chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auditing.centres import Rows, first_with, robust_centres, unit_rows
from auditing.findings import compare

SAMPLE = 100_000  # crops, of whole identities, that the covariance comes from: 200 MB of 512 dimensions
ROUNDS = 2  # of whitening and trusting
# Mean variances that are added to every direction. More (3 or 10) finds less, less (0.3) finds as much but leaves small
# sets to chance. One more for each time that the dimensions outnumber what the covariance is made of.
ADDED = 1.0
LEAST = 20  # identities below which their mean is rather theirs than the network's, and nothing is changed


@dataclass(frozen=True)
class Space:
    """`mean` float32 [D] of unit embeddings, `projection` float32 [D, D]."""

    mean: np.ndarray
    projection: np.ndarray

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [n, D] of any length in this space, float32; zero where one is zero or not finite."""
        unit = unit_rows(rows)
        placed = (unit - self.mean) @ self.projection.T
        placed[~unit.any(axis=1)] = 0
        return placed

    def after(self, embed: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """The same embedder, with its embeddings in this space."""
        return lambda crops: self(embed(crops))


@dataclass
class Placed:
    """Mapped embeddings in a space, computed as they are read."""

    rows: Rows
    space: Space

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> Any:
        """[n, D]."""
        return self.rows.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows by slice, mask or numbers."""
        return self.space(self.rows[index])


def whitened(embeddings: Rows, labels: np.ndarray, identities: int) -> Space:
    """The space of a set of embeddings [crops, D] and their labels."""
    return _fit(*_sample(embeddings, labels, identities))


def _fit(rows: np.ndarray, labels: np.ndarray, identities: int) -> Space:
    """The space of unit embeddings in memory."""
    dim = rows.shape[1]
    space = Space(np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32))
    usable = rows.any(axis=1)
    if len(np.unique(labels[usable])) < LEAST:
        return space
    mean = rows[usable].mean(axis=0, dtype=np.float64).astype(np.float32)
    for _ in range(ROUNDS):
        trusted = robust_centres(space(rows), labels, identities).trusted
        scatter, freedom = _scatter(rows, labels, identities, trusted)
        if not freedom or not np.trace(scatter) > 0:
            return space
        within = scatter / freedom
        within += (ADDED + dim / freedom) * np.trace(within) / dim * np.eye(dim)
        space = Space(mean, np.linalg.inv(np.linalg.cholesky(within)).astype(np.float32))
    return space


def choose(
    embeddings: Rows,
    labels: np.ndarray,
    identities: int,
    error_rate: float,
    false_alarms: float,
    device: torch.device | str = "cpu",
) -> tuple[Space | None, dict[str, int]]:
    """The space to compare in, None for that of the embeddings themselves, and the findings in either, of a sample."""
    rows, labels, identities = _sample(embeddings, labels, identities)
    space = _fit(rows, labels, identities)
    plain, other = (
        compare(each, labels, identities, error_rate, false_alarms, device).called for each in (rows, space(rows))
    )
    return space if other > plain + 2 * plain**0.5 else None, {"plain": plain, "whitened": other}


def _sample(embeddings: Rows, labels: np.ndarray, identities: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Unit embeddings of about `SAMPLE` crops of random identities, with labels from 0 on."""
    order = np.random.default_rng(seed).permutation(identities)
    some = first_with(order, np.bincount(labels, minlength=identities), SAMPLE)
    place = np.full(identities, -1, np.int64)
    place[some] = np.arange(len(some))
    crops = np.flatnonzero(place[labels] >= 0)
    return unit_rows(embeddings[crops]), place[labels[crops]], len(some)


def _scatter(rows: np.ndarray, labels: np.ndarray, identities: int, trusted: np.ndarray) -> tuple[np.ndarray, int]:
    """Sum of outer products of trusted rows about their identity's mean, float64 [D, D], and its degrees of freedom."""
    rows, labels = rows[trusted], labels[trusted]
    counts = np.bincount(labels, minlength=identities)
    sums = np.zeros((identities, rows.shape[1]), np.float32)
    np.add.at(sums, labels, rows)
    away = rows - (sums / np.maximum(counts, 1)[:, None])[labels]
    return (away.T @ away).astype(np.float64), int((counts[counts > 0] - 1).sum())
