"""1:N: who of a gallery is it (closed set), and is it anybody of them (open set)? Always with the usual treatment.

*As public code prints it* (InsightFace's evaluation of IJB): rank-1, 5, 10 as hits in both galleries over *all* probes;
TPIR at FPIR with the k-th largest of the best scores of probes without a mate as threshold, k = max(int(n FPIR), 1),
which a mate has to exceed; the mean of both galleries. *FPIR not exceeded*: hits over the probes that have a mate, and
the laxest threshold that not more than n FPIR probes without a mate exceed, with their number and intervals; None where
n FPIR is below 1. Equal scores: public code sorts, which puts the gallery's later template first; in the other column a
mate has to beat all others.

A probe that has lost all its images finds nobody if it has a mate, and is taken for somebody if it has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ijb.lists import Lists, People, read_people
from ijb.templates import USUAL, Templates
from verification.intervals import REPLICATES, Interval, detection_intervals, rate_interval
from verification.metrics import binomial_interval

RANKS = (1, 5, 10)
FPIR_LEVELS = (1e-4, 1e-3, 1e-2, 1e-1)
# The points of the printed curve: 10^-4, four tenths of a decade apart times ten, and 1.
CURVE = (*(10.0 ** (-4 + i / 25) for i in range(100)), 1.0)
_NEVER = 1 << 30  # templates ahead of a mate that cannot be compared
_PROBES = 512  # probes that are scored against a gallery together


@dataclass(frozen=True)
class Detection:
    """TPIR at an FPIR that is not exceeded. `false_alarms` of `others` probes without a mate exceed the threshold;
    None where there are fewer than 1 / fpir of them."""

    fpir: float
    others: int
    false_alarms: int | None = None
    threshold: float | None = None
    tpir: float | None = None
    binomial: tuple[float, float] | None = None
    by_identity: Interval | None = None


@dataclass(frozen=True)
class Gallery:
    """All probes against one gallery.

    hits: by rank, as public code counts them; hits_strict: where the mate beats all others but rank - 1.
    printed: TPIR by FPIR, and thresholds: the scores to exceed, at `CURVE`.
    ranks: int64 [m] of the mated probes' mates (ties against them), with the probes' subjects.
    """

    name: str
    size: int
    probes: int
    mated: int
    hits: dict[int, int]
    hits_strict: dict[int, int]
    printed: dict[float, float]
    thresholds: dict[float, float]
    detections: list[Detection]
    ranks: np.ndarray = field(repr=False)
    subjects: np.ndarray = field(repr=False)

    @property
    def rates(self) -> dict[int, Interval | None]:
        """Share of the mated probes found within each rank, with intervals by identity."""
        return {
            rank: rate_interval(self.ranks <= rank, self.subjects) if self.mated else None for rank in self.hits_strict
        }


@dataclass(frozen=True)
class Identification:
    """Both galleries and what is made of them: `printed` hits of both over all probes, by rank; `printed_tpir` the
    mean of both, by FPIR; `rates` the share of mated probes found."""

    galleries: tuple[Gallery, ...]
    printed: dict[int, float]
    printed_tpir: dict[float, float]
    rates: dict[int, Interval | None]


def identification(
    lists: Lists, templates: Templates, embeddings: np.ndarray | None = None, replicates: int = REPLICATES
) -> Identification:
    """Closed and open set of both galleries; embeddings [T, D] of the usual treatment, computed if not given."""
    if embeddings is None:
        embeddings = templates.embeddings(USUAL)
    probes = read_people(lists, "1N_probe_mixed")
    galleries = tuple(
        against(name, read_people(lists, f"1N_gallery_{name}"), probes, templates, embeddings, replicates=replicates)
        for name in lists.galleries
    )
    ranks = np.concatenate([gallery.ranks for gallery in galleries])
    subjects = np.concatenate([gallery.subjects for gallery in galleries])
    return Identification(
        galleries=galleries,
        printed={rank: sum(g.hits[rank] for g in galleries) / len(probes.templates) for rank in RANKS},
        printed_tpir={fpir: float(np.mean([g.printed[fpir] for g in galleries])) for fpir in CURVE},
        rates={
            rank: rate_interval(ranks <= rank, subjects, replicates=replicates) if len(ranks) else None
            for rank in RANKS
        },
    )


def against(
    name: str,
    gallery: People,
    probes: People,
    templates: Templates,
    embeddings: np.ndarray,
    *,
    fpir_levels: Sequence[float] = FPIR_LEVELS,
    replicates: int = REPLICATES,
) -> Gallery:
    """All probes against one gallery; embeddings float64 [T, D], NaN for a lost template.

    Of a subject with several templates in the gallery the first is the mate, as in public code.
    """
    known, first = np.unique(gallery.subjects, return_index=True)
    place = np.minimum(np.searchsorted(known, probes.subjects), len(known) - 1)
    mate = np.where(known[place] == probes.subjects, first[place], -1)
    enrolled = embeddings[templates.rows(gallery.templates)]
    wanted = embeddings[templates.rows(probes.templates)]
    lost = np.isnan(wanted[:, 0])
    own, best, ahead, level, later = _compare(wanted, np.nan_to_num(enrolled), np.isnan(enrolled[:, 0]), mate)
    own[lost], best[lost] = -np.inf, np.inf
    mated = mate >= 0
    ahead[mated & (own == -np.inf)] = _NEVER
    others = np.sort(best[~mated])[::-1]
    ranks = (1 + ahead + level)[mated]
    printed_ranks = (1 + ahead + later)[mated]
    printed, thresholds = {}, {}
    for fpir in CURVE:
        thresholds[fpir] = float(others[max(int(len(others) * fpir), 1) - 1]) if len(others) else -np.inf
        found = (own[mated] > best[mated]) & (own[mated] > thresholds[fpir])
        printed[fpir] = float(found.mean()) if mated.any() else 0.0
    sure = np.where(own > best, own, -np.inf)[mated]
    subjects = probes.subjects
    return Gallery(
        name=name,
        size=len(gallery.templates),
        probes=len(mate),
        mated=int(mated.sum()),
        hits={rank: int((printed_ranks <= rank).sum()) for rank in RANKS},
        hits_strict={rank: int((ranks <= rank).sum()) for rank in RANKS},
        printed=printed,
        thresholds=thresholds,
        detections=_detections(sure, subjects[mated], best[~mated], subjects[~mated], fpir_levels, replicates),
        ranks=ranks,
        subjects=subjects[mated],
    )


def _compare(
    probes: np.ndarray, gallery: np.ndarray, lost: np.ndarray, mate: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each probe: its mate's score (minus infinity without one), the best score of anybody else, how many others
    are ahead of the mate and level with it, and how many of these come later in the gallery."""
    count = len(probes)
    own, best = np.full(count, -np.inf), np.full(count, -np.inf)
    ahead, level, later = np.zeros((3, count), np.int64)
    for start in range(0, count, _PROBES):
        part = slice(start, start + _PROBES)
        scores = probes[part] @ gallery.T
        scores[:, lost] = -np.inf
        mated = np.flatnonzero(mate[part] >= 0)
        mates = mate[part][mated]
        mine = scores[mated, mates]
        own[part][mated] = mine
        scores[mated, mates] = -np.inf
        best[part] = scores.max(axis=1)
        rivals = scores[mated]
        ahead[part][mated] = (rivals > mine[:, None]).sum(axis=1)
        equal = rivals == mine[:, None]
        equal[np.arange(len(mated)), mates] = False
        level[part][mated] = equal.sum(axis=1)
        later[part][mated] = (equal & (np.arange(len(gallery)) > mates[:, None])).sum(axis=1)
    return own, best, ahead, level, later


def _detections(
    mates: np.ndarray,
    mate_subjects: np.ndarray,
    best: np.ndarray,
    other_subjects: np.ndarray,
    fpir_levels: Sequence[float],
    replicates: int,
) -> list[Detection]:
    """TPIR at FPIR not exceeded: scores of mates (minus infinity if not first), best scores of probes without one."""
    ranked = np.sort(best)[::-1]
    allowed = {fpir: int(np.floor(fpir * len(ranked) * (1 + 1e-12))) for fpir in fpir_levels}
    # A probe that was lost alarms at any threshold: with more of them than allowed a rate cannot be had.
    lost = int(np.isposinf(ranked).sum())
    resolved = [fpir for fpir in fpir_levels if max(lost, 1) <= allowed[fpir] and len(mates)]
    intervals = {}
    if resolved:
        intervals = detection_intervals(mates, mate_subjects, best, other_subjects, resolved, replicates=replicates)
    detections = []
    for fpir in fpir_levels:
        if fpir not in resolved:
            detections.append(Detection(fpir, len(ranked)))
            continue
        threshold = float(ranked[allowed[fpir]]) if allowed[fpir] < len(ranked) else -np.inf
        hits = int((mates > threshold).sum())
        detections.append(
            Detection(
                fpir=fpir,
                others=len(ranked),
                false_alarms=int((ranked > threshold).sum()),
                threshold=threshold,
                tpir=hits / len(mates),
                binomial=binomial_interval(hits, len(mates)),
                by_identity=intervals[fpir],
            )
        )
    return detections
