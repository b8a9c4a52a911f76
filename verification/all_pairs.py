"""All pairs of any number of photos, counted exactly without ever holding their scores. NumPy alone, no files.

The scores (cosines, float64) are computed twice, a block of the matrix at a time. The first pass counts them in bins;
the counts say in which bins the wanted thresholds lie, and the second pass looks at the scores in these bins one by
one. So every threshold and count is what sorting all scores would give, as `metrics.curve` and
`metrics.operating_point` do for a list of pairs; the price is the second product. 13,000 photos (88 million pairs, 512
dimensions) take half a minute on a core.

Intervals are by person (`intervals`): people are drawn again, a pair of two people counts as often as the product of
how often each was drawn, and each replicate has its own threshold. Of the impostor pairs only those near a threshold
matter for that; where these are more than `SAMPLE`, an evenly drawn part of them stands for all, which moves an
interval's ends by less than a hundredth of its width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import utils
from utils import InputError
from verification import intervals
from verification.intervals import Interval
from verification.metrics import ACCEPT_ALL, ACCEPT_NOTHING, binomial_interval, threshold_json

FAR_LEVELS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BLOCK = 2048  # photos on a side of a block: 32 MB of scores
BINS = 1 << 18
SAMPLE = 200_000
LISTED = 100  # pairs kept of each kind of the worst

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """Photos: embeddings [N, D] of length 1 (a row of NaN has no face) and int64 [N], whom each shows."""

    embeddings: NDArray[Any]
    labels: Integers

    def __post_init__(self) -> None:
        if len(self.embeddings) != len(self.labels):
            raise ValueError(f"{len(self.embeddings)} embeddings for {len(self.labels)} labels")


class AllPairs:
    """The pairs of all photos of one side, or of each photo of one side with each of another.

    genuine, impostors: numbers of pairs with two faces; `genuine_lost`: pairs of one person of which a photo shows no
    face. The latter count as rejected. Impostor pairs with such a photo are not counted at all, since that photo would
    be a false accept as often as there are people.
    """

    def __init__(self, first: Side, second: Side | None = None, *, quiet: bool = False) -> None:
        self.own = second is None
        self.quiet = quiet
        self.sides = (first, first if second is None else second)
        self.present = [np.flatnonzero(np.isfinite(side.embeddings).all(axis=1)) for side in self.sides]
        _, numbers = np.unique(np.concatenate([side.labels for side in self.sides]), return_inverse=True)
        self.people = int(numbers.max()) + 1 if len(numbers) else 0
        self.labels = (numbers[: len(first.labels)], numbers[len(numbers) - len(self.sides[1].labels) :])
        counts = [
            np.bincount(own[kept], minlength=self.people) for own, kept in zip(self.labels, self.present, strict=True)
        ]
        everybody = [np.bincount(own, minlength=self.people) for own in self.labels]
        self.counts = counts
        self.genuine_of = _pairs_of_each(counts, self.own)  # by person
        self.genuine_all_of = _pairs_of_each(everybody, self.own)
        self.genuine = int(self.genuine_of.sum())
        self.genuine_lost = int(self.genuine_all_of.sum()) - self.genuine
        total = (
            len(self.present[0]) * (len(self.present[0]) - 1) // 2
            if self.own
            else int(np.prod([len(kept) for kept in self.present]))
        )
        self.impostors = total - self.genuine
        self._histograms: tuple[Integers, Integers] | None = None

    def blocks(self, what: str) -> Iterator[tuple[Floats, NDArray[np.bool_], Integers, Integers]]:
        """Cosines float64 [n], whether each is of one person bool [n], and the two photos int64 [n], block by block."""
        rows, columns = self.present
        starts = [
            (top, left)
            for top in range(0, len(rows), BLOCK)
            for left in range(top if self.own else 0, len(columns), BLOCK)
        ]
        with utils.progress(0 if self.quiet else self.genuine + self.impostors, what, unit="pair") as bar:
            bar.disable = bar.disable or self.quiet
            for top, left in starts:
                first, second = rows[top : top + BLOCK], columns[left : left + BLOCK]
                own, other = (
                    side.embeddings[part].astype(np.float64)
                    for side, part in zip(self.sides, (first, second), strict=True)
                )
                scores = np.clip(own @ other.T, -1.0, 1.0)
                if self.own and top == left:
                    at, to = np.triu_indices(len(first), 1)
                else:
                    at, to = (part.ravel() for part in np.indices(scores.shape))
                flat = scores[at, to]
                same = self.labels[0][first[at]] == self.labels[1][second[to]]
                yield flat, same, first[at], second[to]
                bar.update(len(flat))

    def histograms(self) -> tuple[Integers, Integers]:
        """How many scores of two people, and of one person, are in each of `BINS` equal parts of [-1, 1]: int64."""
        if self._histograms is None:
            impostor, genuine = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            for scores, same, _, _ in self.blocks("all pairs, first pass"):
                bins = _bin(scores)
                genuine += np.bincount(bins[same], minlength=BINS)
                impostor += np.bincount(bins[~same], minlength=BINS)
            self._histograms = impostor, genuine
        return self._histograms


def _pairs_of_each(counts: Sequence[Integers], own: bool) -> Integers:
    """How many pairs of one person's photos there are, by person: int64 [people]."""
    return counts[0] * (counts[0] - 1) // 2 if own else counts[0] * counts[1]


def _bin(scores: Floats) -> Integers:
    return np.minimum(((scores + 1.0) * (BINS / 2)).astype(np.int64), BINS - 1)


@dataclass(frozen=True)
class Point:
    """The laxest threshold whose false accept rate is at most `far`; see `metrics.OperatingPoint`.

    tar_by_person, far_by_person: intervals by person, of the TAR (with a threshold of its own in each replicate) and of
    the FAR at this threshold. threshold_by_person: where the threshold of the replicates lies.
    """

    far: float
    resolved: bool
    impostors: int
    genuine: int
    false_accepts: int = 0
    true_accepts: int = 0
    threshold: float = ACCEPT_NOTHING
    tar_by_person: Interval | None = None
    far_by_person: Interval | None = None
    threshold_by_person: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        head = {"far": self.far, "resolved": self.resolved, "impostor_pairs": self.impostors}
        if not self.resolved:
            return head
        return head | {
            "genuine_pairs": self.genuine,
            "false_accepts": self.false_accepts,
            "true_accepts": self.true_accepts,
            "tar": self.true_accepts / self.genuine,
            "tar_interval_95": binomial_interval(self.true_accepts, self.genuine),
            "tar_by_identity": None if self.tar_by_person is None else self.tar_by_person.to_json(),
            "far_measured": self.false_accepts / self.impostors,
            "far_interval_95": binomial_interval(self.false_accepts, self.impostors),
            "far_by_identity": None if self.far_by_person is None else self.far_by_person.to_json(),
            "threshold": threshold_json(self.threshold),
            "threshold_by_identity_95": self.threshold_by_person,
        }


@dataclass(frozen=True)
class Pair:
    """Two photos by their numbers, and their cosine."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class Summary:
    """What all pairs say: points at each FAR, the equal error rate with its interval by person, and the most alike of
    two, most unlike of one."""

    points: list[Point]
    eer: float
    eer_by_person: Interval
    nearest_impostors: list[Pair]
    farthest_genuine: list[Pair]


def summarise(
    pairs: AllPairs, far_levels: Sequence[float] = FAR_LEVELS, *, replicates: int = intervals.REPLICATES, seed: int = 0
) -> Summary:
    """Exact figures of all pairs with intervals by person; InputError without pairs of both kinds."""
    if not pairs.genuine or not pairs.impostors:
        raise InputError(
            f"{pairs.genuine} pairs of one person and {pairs.impostors} of two with faces: it takes both kinds, so "
            "two people at least, and two photos of somebody"
        )
    impostor, genuine = pairs.histograms()
    # Scores in this bin or above.
    impostor_from, genuine_from = (np.append(counts[::-1].cumsum()[::-1], 0) for counts in (impostor, genuine))
    allowed = {far: int(np.floor(far * pairs.impostors * (1 + 1e-12))) for far in far_levels}
    resolved = [far for far in far_levels if allowed[far] >= 1]
    both = impostor + genuine
    wanted = np.zeros(BINS, dtype=bool)
    for far in resolved:
        _want(wanted, both, _last_above(impostor_from, allowed[far]))
    total = pairs.genuine + pairs.genuine_lost
    surplus = impostor_from[:-1] / pairs.impostors + genuine_from[:-1] / total - 1
    balance = int(np.flatnonzero(surplus >= 0)[-1]) if (surplus >= 0).any() else 0
    wanted[balance] = True
    worst = _Worst(impostor_from, genuine_from, pairs.genuine)
    level = max(impostor_from[balance] / pairs.impostors, 1 / pairs.impostors)
    around = _Sample(float(level), impostor_from, int(level * pairs.impostors), seed)
    samples = [_Sample(far, impostor_from, allowed[far], seed) for far in resolved]
    own = _Genuine(pairs.genuine, seed)
    exact = _Exact(wanted)
    for block in pairs.blocks("all pairs, second pass"):
        bins = _bin(block[0])
        exact.add(block, bins)
        worst.add(block, bins)
        own.add(block, pairs)
        for sample in (around, *samples):
            sample.add(block, bins, pairs)
    draws = _Draws(pairs, own, replicates, seed)
    by_far = {sample.far: sample for sample in samples}
    points = []
    for far in far_levels:
        if far not in by_far:
            points.append(Point(far, False, pairs.impostors, total))
            continue
        bin_ = _last_above(impostor_from, allowed[far])
        threshold, false_accepts, true_accepts = exact.laxest(
            bin_, allowed[far], int(impostor_from[bin_ + 1]), int(genuine_from[bin_ + 1])
        )
        tar, rate, ends = draws.intervals(by_far[far], threshold, true_accepts / total, false_accepts / pairs.impostors)
        points.append(Point(far, True, pairs.impostors, total, false_accepts, true_accepts, threshold, tar, rate, ends))
    eer = exact.balance(
        balance,
        (int(impostor_from[balance + 1]), int(genuine_from[balance + 1])),
        (pairs.impostors, total),
    )
    return Summary(points, eer, draws.balance(around, eer), worst.impostors(), worst.genuine())


def _last_above(counts_from: Integers, allowed: int) -> int:
    """The highest bin from which on more than `allowed` scores lie, 0 if there is none."""
    above = np.flatnonzero(counts_from[:-1] > allowed)
    return int(above[-1]) if len(above) else 0


def _want(wanted: NDArray[np.bool_], both: Integers, bin_: int) -> None:
    """Mark a bin, and the next one above that has scores: a threshold lies in the middle between two scores."""
    wanted[bin_] = True
    above = np.flatnonzero(both[bin_ + 1 :])
    if len(above):
        wanted[bin_ + 1 + above[0]] = True


Block = tuple[Floats, NDArray[np.bool_], Integers, Integers]


class _Exact:
    """The scores in some bins, each distinct one once, with the numbers of pairs of both kinds."""

    def __init__(self, wanted: NDArray[np.bool_]) -> None:
        self.wanted = wanted
        self.values, self.counts = np.zeros(0), np.zeros((0, 2), dtype=np.int64)
        self.waiting: list[tuple[Floats, NDArray[np.bool_]]] = []
        self.waiting_count = 0

    def add(self, block: Block, bins: Integers) -> None:
        kept = self.wanted[bins]
        self.waiting.append((block[0][kept], block[1][kept]))
        self.waiting_count += int(kept.sum())
        if self.waiting_count > 4_000_000:
            self._merge()

    def _merge(self) -> None:
        scores = np.concatenate([self.values, *(part for part, _ in self.waiting)])
        counts = np.concatenate([self.counts, *(np.stack([~same, same], axis=1) for _, same in self.waiting)])
        self.values, number = np.unique(scores, return_inverse=True)
        merged = np.zeros((len(self.values), 2), dtype=np.int64)
        np.add.at(merged, number, counts)
        self.counts, self.waiting, self.waiting_count = merged, [], 0

    def _within(self, bin_: int) -> tuple[Floats, Integers]:
        """The distinct scores of a bin from the highest, with the numbers of pairs of two and of one person."""
        if self.waiting:
            self._merge()
        inside = _bin(self.values) == bin_
        return self.values[inside][::-1], self.counts[inside][::-1]

    def laxest(self, bin_: int, allowed: int, impostors: int, genuine: int) -> tuple[float, int, int]:
        """(threshold, false accepts, true accepts) of the laxest threshold with at most `allowed` false accepts.

        `impostors` and `genuine` are the pairs in the bins above.
        """
        values, counts = self._within(bin_)
        sums = counts.cumsum(axis=0)
        passed = int(np.count_nonzero(impostors + sums[:, 0] <= allowed))
        if passed == len(values):  # more is allowed than there is
            return ACCEPT_ALL, impostors + int(sums[-1, 0]), genuine + int(sums[-1, 1])
        higher = values[passed - 1] if passed else self._lowest_above(bin_)
        threshold = _middle(float(values[passed]), higher)
        added = sums[passed - 1] if passed else np.zeros(2, dtype=np.int64)
        return threshold, impostors + int(added[0]), genuine + int(added[1])

    def _lowest_above(self, bin_: int) -> float | None:
        above = self.values[_bin(self.values) > bin_]
        return float(above[0]) if len(above) else None

    def balance(self, bin_: int, above: tuple[int, int], totals: tuple[int, int]) -> float:
        """The equal error rate, on the straight line between the two points next to it."""
        _, counts = self._within(bin_)
        sums = np.concatenate([np.zeros((1, 2)), counts.cumsum(axis=0)]) + above
        far, tar = np.append(sums[:, 0] / totals[0], 1.0), np.append(sums[:, 1] / totals[1], 1.0)
        surplus = far + tar - 1
        after = max(int(np.argmax(surplus >= 0)), 1)
        share = -surplus[after - 1] / (surplus[after] - surplus[after - 1])
        return float(far[after - 1] + share * (far[after] - far[after - 1]))


def _middle(low: float, high: float | None) -> float:
    """The threshold between two neighbouring scores; as `metrics` has it."""
    if high is None:
        return ACCEPT_NOTHING
    middle = low + (high - low) / 2
    return middle if middle > low else high


class _Worst:
    """The pairs of two people that are most alike, and of one person that are most unlike."""

    def __init__(self, impostor_from: Integers, genuine_from: Integers, genuine: int) -> None:
        self.from_bin = max(_last_above(impostor_from, LISTED - 1), 0)
        # Genuine scores up to this bin: the lowest `LISTED`.
        below = genuine - genuine_from[1:]
        self.to_bin = int(np.searchsorted(below, min(LISTED, genuine)))
        self.found: tuple[list[Pair], list[Pair]] = ([], [])

    def add(self, block: Block, bins: Integers) -> None:
        scores, same, first, second = block
        for kind, kept in enumerate((~same & (bins >= self.from_bin), same & (bins <= self.to_bin))):
            at = np.flatnonzero(kept)
            if len(at) > LISTED:
                order = np.argsort(scores[at] if kind else -scores[at], kind="stable")
                at = at[order[:LISTED]]
            self.found[kind].extend(Pair(int(first[i]), int(second[i]), float(scores[i])) for i in at)
            if len(self.found[kind]) > 10 * LISTED:
                self.found[kind][:] = self._sorted(kind)

    def _sorted(self, kind: int) -> list[Pair]:
        sign = 1 if kind else -1
        return sorted(self.found[kind], key=lambda pair: (sign * pair.cosine, pair.first, pair.second))[:LISTED]

    def impostors(self) -> list[Pair]:
        return self._sorted(0)

    def genuine(self) -> list[Pair]:
        return self._sorted(1)


# --- intervals by person --------------------------------------------------------------------------------------------


class _Sample:
    """The impostor pairs near the threshold of one FAR: scores and the two people, or an even part of them."""

    def __init__(self, far: float, impostor_from: Integers, allowed: int, seed: int) -> None:
        self.far = far
        self.from_bin = _last_above(impostor_from, 3 * allowed + 200)
        self.share = min(1.0, SAMPLE / max(int(impostor_from[self.from_bin]), 1))
        self.generator = np.random.default_rng([seed, allowed])
        self.parts: list[tuple[Floats, Integers, Integers]] = []

    def add(self, block: Block, bins: Integers, pairs: AllPairs) -> None:
        scores, same, first, second = block
        at = np.flatnonzero(~same & (bins >= self.from_bin))
        if self.share < 1:
            at = at[self.generator.random(len(at)) < self.share]
        self.parts.append((scores[at], pairs.labels[0][first[at]], pairs.labels[1][second[at]]))

    def ranked(self) -> tuple[Floats, Integers, Integers]:
        scores, first, second = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        order = np.argsort(-scores, kind="stable")
        return scores[order], first[order], second[order]


class _Genuine:
    """The scores of pairs of one person with that person, or an even part of them."""

    def __init__(self, genuine: int, seed: int) -> None:
        self.share = min(1.0, SAMPLE / max(genuine, 1))
        self.generator = np.random.default_rng([seed, 1])
        self.parts: list[tuple[Floats, Integers]] = []

    def add(self, block: Block, pairs: AllPairs) -> None:
        at = np.flatnonzero(block[1])
        if self.share < 1:
            at = at[self.generator.random(len(at)) < self.share]
        self.parts.append((block[0][at], pairs.labels[0][block[2][at]]))


class _Draws:
    """People drawn again, and what becomes of the genuine pairs."""

    CHUNK = 16  # replicates at a time: 200,000 pairs of 16 replicates are 25 MB

    def __init__(self, pairs: AllPairs, genuine: _Genuine, replicates: int, seed: int) -> None:
        photos = [np.bincount(pairs.labels[side], minlength=pairs.people) for side in (0, 1)]
        self.people = int((photos[0] + photos[1]).astype(bool).sum())
        self.replicates = replicates
        self.drawn = intervals.multiplicities(pairs.people, replicates, np.random.default_rng(seed)).astype(np.float64)
        scores, labels = (np.concatenate(column) for column in zip(*genuine.parts, strict=True))
        order = np.argsort(-scores, kind="stable")
        self.genuine_scores, self.genuine_labels = scores[order], labels[order]
        self.genuine_share = genuine.share
        self.genuine_total = pairs.genuine_all_of.astype(np.float64) @ self.drawn
        first, second = (counts.astype(np.float64) @ self.drawn for counts in pairs.counts)
        both = (pairs.counts[0] * pairs.counts[1]).astype(np.float64) @ self.drawn**2
        self.impostor_total = (first * second - both) / (2 if pairs.own else 1)

    def intervals(
        self, sample: _Sample, threshold: float, tar: float, far: float
    ) -> tuple[Interval, Interval, tuple[float, float]]:
        """Intervals of TAR, of the FAR at `threshold`, and the percentiles of the replicates' thresholds."""
        scores, first, second = sample.ranked()
        above = np.searchsorted(-scores, -threshold, side="right")
        tars, fars, thresholds = (np.empty(self.replicates) for _ in range(3))
        for start in range(0, self.replicates, self.CHUNK):
            part = slice(start, start + self.CHUNK)
            drawn = self.drawn[:, part]
            accepted = np.cumsum(drawn[first] * drawn[second], axis=0) / sample.share
            with np.errstate(invalid="ignore", divide="ignore"):
                fars[part] = (accepted[above - 1] if above else 0.0) / self.impostor_total[part]
            passed = np.count_nonzero(accepted <= sample.far * self.impostor_total[part] * (1 + 1e-12), axis=0)
            # The first pair that is one too many is the highest score that may not pass.
            limits = scores[np.minimum(passed, len(scores) - 1)]
            thresholds[part] = limits
            counted = np.cumsum(drawn[self.genuine_labels], axis=0) / self.genuine_share
            hits = np.searchsorted(-self.genuine_scores, -limits, side="left")
            found = np.where(hits > 0, np.take_along_axis(counted, np.maximum(hits - 1, 0)[None], axis=0)[0], 0.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                tars[part] = found / self.genuine_total[part]
        low, high = np.quantile(thresholds, [0.025, 0.975])
        return (
            intervals.from_replicates(tar, tars, self.people),
            intervals.from_replicates(far, fars, self.people),
            (float(low), float(high)),
        )

    def balance(self, sample: _Sample, eer: float) -> Interval:
        """Interval of the equal error rate, from the impostor pairs on both sides of it."""
        scores, first, second = sample.ranked()
        passed = np.searchsorted(-self.genuine_scores, -scores, side="right")
        found = np.empty(self.replicates)
        for start in range(0, self.replicates, self.CHUNK):
            part = slice(start, start + self.CHUNK)
            drawn = self.drawn[:, part]
            counted = np.cumsum(drawn[self.genuine_labels], axis=0) / self.genuine_share
            counted = np.concatenate([np.zeros((1, counted.shape[1])), counted])
            with np.errstate(invalid="ignore", divide="ignore"):
                far = np.cumsum(drawn[first] * drawn[second], axis=0) / sample.share / self.impostor_total[part]
                rejected = 1 - counted[passed] / self.genuine_total[part]
            after = far >= rejected
            at = np.where(after.any(axis=0), after.argmax(axis=0), len(scores) - 1)[None]
            found[part] = (np.take_along_axis(far, at, 0)[0] + np.take_along_axis(rejected, at, 0)[0]) / 2
        return intervals.from_replicates(eer, found, self.people)


# --- how much data a rate takes -------------------------------------------------------------------------------------


def people_needed(far: float, people: int, impostors: int) -> dict[str, Any]:
    """How many people it takes until a false accept rate can be measured, everybody with as many photos as now.

    `to_resolve`: at least 1 / far impostor pairs. `to_trust`: 30 / far, so that 30 false accepts are expected and the
    rate is known to a third either way with a confidence of 90 % (Doddington's rule of 30: "The NIST speaker
    recognition evaluation", Speech Communication 31, 2000).
    """
    each = impostors / max(people * (people - 1) / 2, 1)  # photo pairs of two people

    def least(pairs: float) -> int:
        return int(np.ceil(0.5 + np.sqrt(0.25 + 2 * pairs / each))) if each else 0

    needed = {"to_resolve": least(1 / far), "to_trust": least(30 / far)}
    more = {f"more_people_{key}": max(count - people, 0) for key, count in needed.items()}
    return {"far": far, "people": people, **more}
