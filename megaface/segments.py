"""What is known so far about the distractors between two of the sizes asked for; filled by several threads."""

import threading
from collections.abc import Mapping

import numpy as np

from megaface import kernels

BEST = 5  # the devkit lists five distractors a probe


class Segment:
    """Counts and best lists for n probes with K thresholds each and U genuine scores. Hold `lock` to change them."""

    def __init__(self, probes: int, thresholds: int, genuine: int) -> None:
        self.histogram = np.zeros((probes, thresholds + 1), np.int64)  # scores above exactly k (0 is not kept right)
        self.best_index = np.full((probes, BEST), -1, np.int64)
        self.best_score = np.full((probes, BEST), -np.inf, np.float32)
        self.accepted = np.zeros(genuine, np.int64)  # impostor scores above each genuine score
        self.recomputed = 0
        self.lock = threading.Lock()

    def fifth(self, rows: slice) -> np.ndarray:
        """The fifth best score so far of probes `rows`, float64; -inf where there are fewer."""
        with self.lock:
            return self.best_score[rows, -1].astype(np.float64)

    def add_best(
        self, probe: np.ndarray, index: np.ndarray, score: np.ndarray, twins: Mapping[int, np.ndarray] | None
    ) -> None:
        """Offer candidates (probe, distractor, score). `twins`: the last five of those equal to a distractor, by it."""
        if twins is not None:
            equal = [twins[int(leader)] for leader in index]
            times = [len(some) for some in equal]
            probe, score = np.repeat(probe, times), np.repeat(score, times)
            index = np.concatenate([np.empty(0, np.int64), *equal])
        with self.lock:
            kernels.keep_best(self.best_index, self.best_score, probe, index, score)

    def add(self, other: "Segment") -> None:
        """Add the answers for other distractors."""
        self.histogram += other.histogram
        self.accepted += other.accepted
        self.recomputed += other.recomputed
        rows = np.repeat(np.arange(len(other.best_index)), BEST)
        self.add_best(rows, other.best_index.ravel(), other.best_score.ravel(), None)


def exceeding(histogram: np.ndarray) -> np.ndarray:
    """How many scores exceed each of K thresholds, int64 [n, K], from how many exceed exactly k of them [n, K + 1]."""
    return histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]
