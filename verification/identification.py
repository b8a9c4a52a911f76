"""Who is it? Closed-set and open-set identification, by the definitions of Phillips, Grother and Micheals.

("Evaluation Methods in Face Recognition", Handbook of Face Recognition, chapter 14.) A *gallery* holds photos of known
people. A *mated* probe shows one of them, a *non-mated* probe somebody else. A person's score is that of the most alike
of the person's gallery photos; a probe's rank is 1 + the number of other people in the gallery whose score is at least
the mate's, so ties count against the model.

Closed set: CMC(r) is the share of mated probes of rank r or better. Open set: the detection and identification rate
DIR(t, r) is the share of mated probes of rank r or better whose mate has a score of at least t; the false positive
identification rate FPIR(t) is the share of non-mated probes that have anybody with a score of at least t. DIR is given
at the laxest t whose FPIR does not exceed the one named.

A probe without a face finds nobody: a miss if it is mated, no false positive if it is not. Photos without a face do not
enter a gallery; probes of a person who has no other photo there stay mated, and miss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils import InputError
from verification.all_pairs import BLOCK, Side
from verification.intervals import Interval, detection_intervals, rate_interval
from verification.metrics import binomial_interval, curve, operating_point, threshold_json

FPIR_LEVELS = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10, 20)
LONGEST = 100  # ranks of the CMC that are kept

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
UNRANKED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Roles:
    """Which photos (numbers into their sides) are gallery and probes. `mated`: bool for each probe."""

    gallery: Integers
    probes: Integers
    mated: NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """What a gallery says of probes: for each, its person int64 [P], whether it is mated, the mate's score (minus
    infinity where there is none, or none with a face), the best score of anybody else, and the mate's rank (`UNRANKED`
    without a score)."""

    people: Integers
    mated: NDArray[np.bool_]
    mate: Floats
    other: Floats
    rank: Integers
    gallery_people: int

    @property
    def best(self) -> Floats:
        """The best score of anybody."""
        return np.maximum(self.mate, self.other)

    @staticmethod
    def joined(answers: Sequence["Answers"]) -> "Answers":
        """The probes of several galleries as one list."""
        names = ("people", "mated", "mate", "other", "rank")
        columns: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in answers]) for name in names}
        return Answers(**columns, gallery_people=max(one.gallery_people for one in answers))


def closed_roles(side: Side, generator: np.random.Generator, gallery_photos: int = 1) -> Roles:
    """Everybody with more photos than that is in the gallery with `gallery_photos` random ones; the others probe."""
    return _roles(side, _mateable(side, gallery_photos), generator, gallery_photos, everybody=False)


def open_roles(side: Side, generator: np.random.Generator, gallery_photos: int = 1) -> Roles:
    """A random half of the people who have enough photos is known, all photos of everybody else are non-mated."""
    able = generator.permutation(_mateable(side, gallery_photos))
    return _roles(side, np.sort(able[: max(len(able) // 2, 1)]), generator, gallery_photos, everybody=True)


def _mateable(side: Side, gallery_photos: int) -> Integers:
    """People with a photo to spare after the gallery has got its own."""
    present = np.isfinite(side.embeddings).all(axis=1)
    people, photos = np.unique(side.labels, return_counts=True)
    faces = np.bincount(np.searchsorted(people, side.labels[present]), minlength=len(people))
    return people[(faces >= gallery_photos) & (photos > gallery_photos)]


def _roles(
    side: Side, known: Integers, generator: np.random.Generator, gallery_photos: int, *, everybody: bool
) -> Roles:
    order = generator.permutation(len(side.labels))
    present = np.isfinite(side.embeddings[order]).all(axis=1)
    candidates = order[present & np.isin(side.labels[order], known)]
    candidates = candidates[np.argsort(side.labels[candidates], kind="stable")]
    _, starts, counts = np.unique(side.labels[candidates], return_index=True, return_counts=True)
    place = np.arange(len(candidates)) - np.repeat(starts, counts)
    gallery = np.sort(candidates[place < gallery_photos])
    probes = np.setdiff1d(np.arange(len(side.labels)), gallery)
    mated = np.isin(side.labels[probes], known)
    return Roles(gallery, probes, mated) if everybody else Roles(gallery, probes[mated], mated[mated])


def answer(gallery: Side, probes: Side, roles: Roles) -> Answers:
    """Compare every probe with every person of the gallery, a block of probes at a time."""
    if not len(roles.gallery):
        raise InputError("nobody has a photo for the gallery")
    order = roles.gallery[np.argsort(gallery.labels[roles.gallery], kind="stable")]
    people, starts = np.unique(gallery.labels[order], return_index=True)
    known = gallery.embeddings[order].astype(np.float64)
    labels = probes.labels[roles.probes]
    column = np.clip(np.searchsorted(people, labels), 0, len(people) - 1)
    has_mate = people[column] == labels
    mate, other = np.full(len(labels), -np.inf), np.full(len(labels), -np.inf)
    rank = np.full(len(labels), UNRANKED)
    for start in range(0, len(labels), BLOCK):
        part = slice(start, start + BLOCK)
        scores = np.clip(probes.embeddings[roles.probes[part]].astype(np.float64) @ known.T, -1.0, 1.0)
        scores = np.maximum.reduceat(np.where(np.isnan(scores), -np.inf, scores), starts, axis=1)
        rows = np.flatnonzero(has_mate[part])
        own = scores[rows, column[part][rows]]
        scores[rows, column[part][rows]] = -np.inf
        mate[start + rows] = own
        ranked = own > -np.inf
        rank[start + rows[ranked]] = 1 + (scores[rows[ranked]] >= own[ranked, None]).sum(axis=1)
        other[part] = scores.max(axis=1)
    return Answers(labels, roles.mated, mate, other, rank, len(people))


# --- figures --------------------------------------------------------------------------------------------------------


def closed_set(splits: Sequence[Answers], seed: int = 0) -> dict[str, Any]:
    """Rank-r rates of all mated probes of all splits, with intervals by person, and the CMC; ready for JSON."""
    everything = Answers.joined(splits)
    mated = everything.mated
    ranks, people = everything.rank[mated], everything.people[mated]
    if not len(ranks):
        raise InputError("no probe shows anybody of the gallery")
    longest = min(LONGEST, everything.gallery_people)
    return {
        "splits": len(splits),
        "gallery_people": everything.gallery_people,
        "probes": len(ranks) // len(splits),
        "probes_without_face": int(np.isneginf(everything.best[mated]).sum()) // len(splits),
        "ranks": [
            {
                "rank": rank,
                "rate": float((ranks <= rank).mean()),
                "interval_95": binomial_interval(round((ranks <= rank).sum() / len(splits)), len(ranks) // len(splits)),
                "by_identity": rate_interval(ranks <= rank, people, seed=seed).to_json(),
                "std_over_splits": _std([float((one.rank[one.mated] <= rank).mean()) for one in splits]),
            }
            for rank in RANKS
            if rank == 1 or rank < everything.gallery_people
        ],
        "cmc": [float((ranks <= rank).mean()) for rank in range(1, longest + 1)],
    }


def open_set(splits: Sequence[Answers], fpir_levels: Sequence[float] = FPIR_LEVELS, seed: int = 0) -> dict[str, Any]:
    """DIR of rank 1 at each FPIR, one threshold for all splits, with intervals by person; ready for JSON."""
    everything = Answers.joined(splits)
    mated = everything.mated
    if mated.all() or not mated.any():
        raise InputError("an open set needs probes of people in the gallery and of others")
    counts = _detection(everything)
    # What is resolved by one split is: the others ask the same people again.
    smallest = min(int((~one.mated).sum()) for one in splits)
    points: list[dict[str, Any]] = []
    resolved = [level for level in fpir_levels if smallest * level * (1 + 1e-12) >= 1]
    found = detections(everything, resolved, seed)
    for level in fpir_levels:
        if level not in found:
            points.append({"fpir": level, "resolved": False, "non_mated_probes": smallest})
            continue
        point, own = operating_point(counts, level), [operating_point(_detection(one), level) for one in splits]
        points.append(
            {
                "fpir": level,
                "resolved": True,
                "non_mated_probes": smallest,
                "dir": point.tar,
                "by_identity": found[level].to_json(),
                "std_over_splits": _std([float(one.tar) for one in own if one.tar is not None]),
                "threshold": None if point.threshold is None else threshold_json(point.threshold),
            }
        )
    keep = np.unique(np.geomspace(1, len(counts.far), 400).astype(int)) - 1
    return {
        "splits": len(splits),
        "gallery_people": everything.gallery_people,
        "mated_probes": int(mated.sum()) // len(splits),
        "non_mated_probes": int((~mated).sum()) // len(splits),
        "probes_without_face": int((everything.best == -np.inf).sum()) // len(splits),
        "dir_at_fpir": points,
        "curve": {"fpir": counts.far[keep].tolist(), "dir": counts.tar[keep].tolist()},
    }


def detections(answers: Answers, levels: Sequence[float], seed: int = 0) -> dict[float, Interval]:
    """Intervals by person of the DIR of rank 1 at each FPIR."""
    if not levels:
        return {}
    mated = answers.mated
    mate = np.where(answers.rank == 1, answers.mate, -np.inf)
    return detection_intervals(
        mate[mated], answers.people[mated], answers.best[~mated], answers.people[~mated], levels, seed=seed
    )


def _detection(answers: Answers) -> Any:
    """`metrics.Curve` of scores of mates of rank 1 against the best scores of probes that have none.

    What finds nobody is put below every cosine: a score of its own that no threshold in use accepts.
    """
    mated = answers.mated
    mate = np.where(answers.rank == 1, answers.mate, -np.inf)
    scores = np.where(mated, mate, answers.best)
    nobody = np.isneginf(scores)
    found = curve(np.where(nobody, np.nan, scores)[mated | ~nobody], mated[mated | ~nobody])
    return type(found)(found.thresholds, found.false_accepts, found.true_accepts, int((~mated).sum()), int(mated.sum()))


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values)) if len(values) > 1 else None
