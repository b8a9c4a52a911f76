"""1:1: the score of every pair of templates that the list names, and TAR at FAR twice.

*As public code prints it*: of all points of scikit-learn's `roc_curve` the one whose FAR is nearest to the rate named,
on either side of it; the FAR taken may exceed it. *FAR not exceeded*: the laxest threshold whose FAR is at most the
rate named, with the number of impostor pairs and intervals; None where these pairs are too few to speak of it.

A pair with a template that has lost all its images is wrong in both: one person scores minus infinity, two plus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ijb import kernels
from ijb.lists import Pairs, People
from ijb.templates import Templates, Treatment, run_threads
from verification.intervals import Interval, ManyPairs
from verification.metrics import OperatingPoint, point_at

FAR_LEVELS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

_BLOCK = 64  # templates that stay in the second-level cache while the pairs with them are scored (float64, 512: 256 KB)
_PAIRS = 1 << 16  # of a thread's task


@dataclass(frozen=True)
class Verification:
    """1:1 under one treatment.

    printed: TAR by FAR as public code prints it, and `area` under that curve. points: FAR not exceeded; by_identity:
    intervals of the TAR of the resolved ones.
    """

    treatment: Treatment
    printed: dict[float, float]
    area: float
    points: list[OperatingPoint]
    by_identity: dict[float, Interval]


class PairScorer:
    """The pairs of a protocol, in an order in which they are scored fast.

    same: bool [P], in that order. order: int64 [P], where each pair stands in the list.
    """

    def __init__(self, pairs: Pairs, templates: Templates) -> None:
        first, second = templates.rows(pairs.first), templates.rows(pairs.second)
        self.order = kernels.block_order(first, second, len(templates.numbers), _BLOCK)
        self.first, self.second = (rows[self.order].astype(np.int32) for rows in (first, second))
        self.same = pairs.same[self.order]

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """float64 [P], in the order of `same`, from embeddings [T, D]; pairs of a lost template are wrong."""
        scores = np.empty(len(self.same))
        bounds, merges = kernels.pairwise_plan(embeddings.shape[1])
        arranged = kernels.arrange(embeddings, bounds)

        def work(start: int) -> None:
            end = min(start + _PAIRS, len(scores))
            kernels.score_pairs(arranged, self.first, self.second, merges, start, end, scores)

        run_threads(work, range(0, len(scores), _PAIRS))
        lost = np.isnan(embeddings[:, 0])
        if lost.any():
            gone = lost[self.first] | lost[self.second]
            scores[gone] = np.where(self.same[gone], -np.inf, np.inf)
        return scores


def verification(
    scores: np.ndarray,
    same: np.ndarray,
    treatment: Treatment,
    far_levels: Sequence[float] = FAR_LEVELS,
    people: ManyPairs | None = None,
) -> Verification:
    """Both columns from the scores float64 [P] of all pairs, of which `same` bool [P] are of one person; `people` says
    whose they are, for the intervals by identity."""
    genuine, impostor = (np.sort(scores[kind])[::-1] for kind in (same, ~same))
    targets = np.array(far_levels, np.float64)
    tars, area = kernels.nearest_points(genuine, impostor, targets)
    points = [point_at(genuine, impostor, far) for far in far_levels]
    by_identity = {}
    if people is not None:
        by_identity = people.tar_intervals(scores, [point.far for point in points if point.resolved])
    printed = dict(zip(far_levels, tars.tolist(), strict=True))
    return Verification(treatment, printed, float(area), points, by_identity)


def identities(pairs: Pairs, templates: Templates, known: Sequence[People]) -> np.ndarray:
    """Whose each template is, int64 [T] from 0.

    Templates are of one person if a genuine pair or a list of 1:N says so; a template that is in neither is a person of
    its own.
    """
    count = len(templates.numbers)
    first, second = templates.rows(pairs.first[pairs.same]), templates.rows(pairs.second[pairs.same])
    links = [(first, second)]
    rows = np.concatenate([templates.rows(people.templates) for people in known] or [np.zeros(0, int)])
    if len(rows):
        subjects = np.unique(np.concatenate([people.subjects for people in known]), return_inverse=True)[1]
        order = np.argsort(subjects, kind="stable")
        neighbours = subjects[order][1:] == subjects[order][:-1]
        links.append((rows[order][:-1][neighbours], rows[order][1:][neighbours]))
    left, right = (np.concatenate(side) for side in zip(*links, strict=True))
    graph = sparse.coo_array((np.ones(len(left), bool), (left, right)), (count, count))
    return sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
