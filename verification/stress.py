"""What a factor does to a model: figures of people in a reference photo and with one thing moved. NumPy alone.

The threshold is the one at which a share FAR of the pairs of two people's reference photos is taken for one person. At
each level a person's photo is compared with their own reference photo (false non-match rate, FNMR, and mean angle) and
with everybody else's (false match rate, FMR). Intervals draw the people again, with replacement, and with them the
threshold: people, not photos, are what another sample would have others of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verification.intervals import Interval, from_replicates, multiplicities
from verification.metrics import to_angle

REPLICATES = 200
LOST = 0.5  # share of genuine pairs: "half of them are lost at ..."

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LevelResult:
    """One level of one factor. `pairs`: people photographed so; angles in degrees."""

    pairs: int
    fnmr: Interval
    fmr: Interval
    angle: tuple[float, float, float]  # mean, and its 95 % interval
    found: float  # share of photos in which the detector finds the face
    landmark_error: float | None  # mean, as a share of the distance between the eyes; None where nothing was found

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "pairs": self.pairs,
            "fnmr": self.fnmr.to_json(),
            "fmr": self.fmr.to_json(),
            "mean_genuine_angle": {"value": self.angle[0], "interval_95": list(self.angle[1:])},
            "detector_found": self.found,
            "landmark_error_of_eye_distance": self.landmark_error,
        }


class Subjects:
    """A model's embeddings of all people, and the threshold that their reference photos give.

    `embeddings` float [N, K, D] of length 1, photo 0 the reference; `taken` bool [N, K]: photos that make sense.
    """

    def __init__(
        self, embeddings: NDArray[Any], taken: Mask, far: float, *, replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        self.embeddings, self.taken, self.far = np.asarray(embeddings, np.float32), taken, far
        count = len(taken)
        self.weights = multiplicities(count, replicates, np.random.default_rng(seed)).astype(np.float64)  # [N, R]
        reference = self.embeddings[:, 0]
        first, second = np.triu_indices(count, 1)
        cosines = np.asarray(np.sum(reference[first] * reference[second], axis=1, dtype=np.float64))
        order = np.argsort(-cosines)
        self.first, self.second, self.cosines = first[order], second[order], cosines[order]
        self.threshold = float(_threshold(self.cosines, np.ones((len(cosines), 1)), far)[0])
        drawn = self.weights[self.first] * self.weights[self.second]
        self.thresholds = _threshold(self.cosines, drawn, far)  # [R]

    @property
    def resolved(self) -> bool:
        """Whether there are enough pairs of two people for the FAR: at least one may be accepted."""
        return len(self.cosines) * self.far >= 1

    def genuine(self, shot: int) -> Floats:
        """Cosines [N] of everybody's photo to their own reference photo."""
        return np.sum(self.embeddings[:, shot] * self.embeddings[:, 0], axis=1, dtype=np.float64)

    def level(self, shot: int, found: Mask, error: NDArray[Any]) -> LevelResult:
        """The figures of photo number `shot`; found bool [N] and error [N] are the detector's of that photo."""
        people = self.taken[:, shot]
        cosines, weights = self.genuine(shot)[people], self.weights[people]
        lost = cosines < self.threshold
        replicas = _shares(cosines[:, None] < self.thresholds, weights)
        fnmr = from_replicates(float(lost.mean()), replicas, len(cosines))
        angles = to_angle(cosines)
        means = weights.T @ angles / np.maximum(weights.sum(0), 1)
        low, high = np.percentile(means[weights.sum(0) > 0], [2.5, 97.5])
        errors = error[people & found]
        return LevelResult(
            pairs=int(people.sum()),
            fnmr=fnmr,
            fmr=self._false_matches(shot, people),
            angle=(float(angles.mean()), float(low), float(high)),
            found=float(found[people].mean()),
            landmark_error=float(errors.mean()) if len(errors) else None,
        )

    def _false_matches(self, shot: int, people: Mask) -> Interval:
        others = self.embeddings[people, shot] @ self.embeddings[:, 0].T
        others[np.arange(len(others)), np.flatnonzero(people)] = -2.0  # one's own reference photo
        pairs = people.sum() * (len(people) - 1)
        value = float((others >= self.threshold).sum() / max(pairs, 1))
        replicas = np.empty(self.weights.shape[1])
        # Few are above any of the thresholds: only those need be looked at again.
        row, column = np.nonzero(others >= self.thresholds.min())
        near = others[row, column].astype(np.float64)
        number = np.flatnonzero(people)[row]
        for k, threshold in enumerate(self.thresholds):
            w = self.weights[:, k]
            total = w[people].sum() * w.sum() - (w[people] ** 2).sum()
            accepted = (w[number] * w[column])[near >= threshold].sum()
            replicas[k] = accepted / total if total > 0 else np.nan
        return from_replicates(value, replicas[np.isfinite(replicas)], int(people.sum()))

    def group(self, members: Mask) -> dict[str, Any] | None:
        """FMR among the reference photos of a group bool [N], and FNMR over photos, at the common threshold.

        Over those photos that there are of everybody, so that groups compare: a beard, or forty years more, are some
        people's alone. Where there is none of everybody, over all that there are. None for fewer than five people with
        a photo besides the reference photo, of whom nothing can be said.
        """
        common = self.taken & self.taken.all(0)
        photos = common if common[:, 1:].any() else self.taken
        members = members & photos[:, 1:].any(1)
        if members.sum() < 5:
            return None
        inside = members[self.first] & members[self.second]
        first, second, cosines = self.first[inside], self.second[inside], self.cosines[inside]
        drawn = self.weights[first] * self.weights[second]
        fmr = from_replicates(
            float((cosines >= self.threshold).mean()),
            _shares(cosines[:, None] >= self.thresholds, drawn),
            int(members.sum()),
        )
        taken = photos[members, 1:]
        genuine = np.einsum("nkd,nd->nk", self.embeddings[members, 1:], self.embeddings[members, 0])
        lost = ((genuine < self.threshold) & taken).sum(1) / taken.sum(1)
        weights = self.weights[members]
        replicas = np.stack([((genuine < t) & taken).sum(1) / taken.sum(1) for t in self.thresholds], axis=1)
        fnmr = from_replicates(float(lost.mean()), _shares(replicas, weights), int(members.sum()))
        return {"identities": int(members.sum()), "pairs": len(cosines), "fmr": fmr.to_json(), "fnmr": fnmr.to_json()}


def _threshold(descending: Floats, weights: Floats, far: float) -> Floats:
    """Thresholds [R] that accept at most a share `far` of the weight of cosines [P], for weights [P, R].

    Equal cosines are accepted together or not at all.
    """
    reached = np.cumsum(weights, axis=0)
    refused = reached > far * np.maximum(reached[-1], 1) * (1 + 1e-12)
    first = np.argmax(refused, axis=0)  # the largest cosine that may not be accepted
    # In the middle between it and the one above: cosines are known to seven digits, so what differs less is equal.
    above = np.searchsorted(-descending, -(descending[first] + 1e-6)) - 1
    return (np.where(above >= 0, descending[above], descending[first] + 4e-6) + descending[first]) / 2


def _shares(outcomes: NDArray[Any], weights: Floats) -> Floats:
    """Weighted means [R] of outcomes [n, R], without replicates in which nobody was drawn."""
    total = weights.sum(0)
    return ((outcomes * weights).sum(0) / np.maximum(total, 1e-9))[total > 0]


def half_lost(levels: Sequence[float], fnmr: Sequence[float], share: float = LOST) -> float | None:
    """The level, between two that were tried, at which a share of the genuine pairs is lost; None if at none of them.

    Where already the first one loses more it is the first level: the true one is milder.
    """
    for k, rate in enumerate(fnmr):
        if rate >= share:
            if k == 0:
                return float(levels[0])
            before = fnmr[k - 1]
            return float(levels[k - 1] + (share - before) / (rate - before) * (levels[k] - levels[k - 1]))
    return None


Group = tuple[str, Callable[[Mapping[str, float]], bool]]
GROUPS: list[Group] = [
    ("women", lambda who: who["gender"] <= 0.5),
    ("men", lambda who: who["gender"] > 0.5),
    ("up to 35 years", lambda who: who["years"] <= 35),
    ("36 to 55 years", lambda who: 35 < who["years"] <= 55),
    ("over 55 years", lambda who: who["years"] > 55),
    ("light skin", lambda who: who["melanin"] < 0.15),
    ("medium skin", lambda who: 0.15 <= who["melanin"] < 0.4),
    ("dark skin", lambda who: who["melanin"] >= 0.4),
    *(
        (f"mostly {name}", lambda who, name=name: who[name] >= 0.6)  # type: ignore[misc]
        for name in ("african", "asian", "caucasian")
    ),
    ("mixed", lambda who: max(who[name] for name in ("african", "asian", "caucasian")) < 0.6),
]
