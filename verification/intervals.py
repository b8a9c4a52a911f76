"""How sure is a figure? Intervals by person, and the comparison of two models on the same pairs. NumPy and SciPy alone.

Pairs share people, and some people are harder than others, so the pairs are not independent and an interval that counts
them as if they were (Clopper and Pearson's, `metrics.binomial_interval`) is too narrow. Here the *people* are drawn
again, with replacement, and all their pairs go with them:

* Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems - the subsets bootstrap" (Computer Vision
  and Image Understanding 93, 2004): what is drawn are subsets of scores, one for each person, never single scores.
* Poh, Martin and Bengio, "Performance generalization in biometric authentication using joint user-specific and sample
  bootstraps" (PAMI 29, 2007): people matter more than the samples of one, so people are what is drawn.
* Owen and Eckles, "Bootstrapping data arrays of arbitrary order" (Annals of Applied Statistics 6, 2012): a pair of two
  people is in the drawn set as often as the product of how often either was drawn.

Two samples are weighted by each draw: a genuine pair by the multiplicity of its person, an impostor pair by the product
of the multiplicities of its two. Each sample is divided by its own total, and each replicate has its own threshold.

The product exaggerates. If v is the part of the variance that two people have to themselves and s the part that comes
from pairs that share one person, products have the variance 3 v + s instead of v + s (as Owen and Eckles show). The
deviations of the replicates are therefore shrunk by sqrt((total - 2 v) / total), v being measured by a second draw that
weights every two people by themselves. Where each person is in one impostor pair, as in most of LFW, this makes the
interval up to 1.7 times as narrow; where everybody meets everybody it changes nothing.

The interval is that of the rate with the same variance as the shrunk replicates: Clopper and Pearson's for the number
of independent trials that would have it (Korn and Graubard, "Confidence intervals for proportions with small expected
number of positive counts estimated from survey data", Survey Methodology 24, 1998), widened to the percentiles of the
replicates where these reach further, and to those of replicates in which every two people are drawn by themselves:
shrinking is too simple for a TAR whose threshold hangs on two or three impostor pairs. The interval has a width also
where no error at all was seen: then every person counts as one trial.

What no bootstrap can see is an impostor pair harder than the hardest that was met. As long as FAR times the number of
impostor pairs is below four, none may have come near the true threshold (probability above 0.02), and the lower end
of the TAR is too high.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special

from verification.metrics import CONFIDENCE, VerificationResult, worst_scores

REPLICATES = 1000
_SECOND_DRAW = 200  # replicates that measure v: enough for a variance (its standard error is a tenth)
_CHUNK = 1_000_000  # weights that are held at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a rate, `low` <= `value` <= `high`, from `replicates` draws of `identities` people."""

    value: float
    low: float
    high: float
    identities: int
    replicates: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON, under names that say what it is."""
        return {
            "value": self.value,
            "interval_95": [self.low, self.high],
            "by": "identity",
            "identities": self.identities,
            "replicates": self.replicates,
        }


@dataclass(frozen=True)
class PairIntervals:
    """Intervals of what `metrics.evaluate` says of a set of pairs. None: the set does not give the figure."""

    accuracy: Interval | None
    eer: Interval | None
    tar: dict[float, Interval]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON; the keys of `tar_at_far` are the rates as texts, such as "0.001"."""
        return {
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "eer": None if self.eer is None else self.eer.to_json(),
            "tar_at_far": {f"{far:g}": interval.to_json() for far, interval in self.tar.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Two models, A and B, on the same pairs.

    difference: rate of A minus rate of B, with `low` and `high` of its 95 % interval by identity. p_identity: how
    often, both ways, a draw of people turns the difference round or removes it.
    """

    difference: float
    low: float
    high: float
    p_identity: float
    identities: int
    replicates: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "difference": self.difference,
            "interval_95": [self.low, self.high],
            "p_by_identity": self.p_identity,
            "identities": self.identities,
            "replicates": self.replicates,
        }


# --- what one calls -------------------------------------------------------------------------------------------------


def result_intervals(
    result: VerificationResult, identities: ArrayLike, *, replicates: int = REPLICATES, seed: int = 0
) -> PairIntervals:
    """Intervals of a result's accuracy (over folds if it has them), EER and TAR at each resolved FAR.

    `identities` [P, 2] says who is on each side of each pair: numbers or names. Thresholds of the folds stay as they
    were chosen.
    """
    fars = [point.far for point in result.points if point.resolved]
    return pair_intervals(
        result.cosines,
        result.same,
        identities,
        correct=correct_pairs(result),
        far_levels=fars,
        eer=result.eer is not None,
        replicates=replicates,
        seed=seed,
    )


def correct_pairs(result: VerificationResult) -> NDArray[np.bool_] | None:
    """bool [P]: is each pair answered correctly by its fold's threshold (without folds: by the best one)? None where
    the result has no threshold."""
    if result.best_threshold is None:
        return None
    thresholds = np.full(len(result.same), result.best_threshold)
    for number, fold in zip(np.unique(result.fold_of), result.folds, strict=False):
        thresholds[result.fold_of == number] = fold.threshold
    return (worst_scores(result.cosines, result.same) >= thresholds) == result.same


def pair_intervals(
    cosines: ArrayLike,
    same: ArrayLike,
    identities: ArrayLike,
    *,
    correct: ArrayLike | None = None,
    far_levels: Sequence[float] = (),
    eer: bool = False,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> PairIntervals:
    """Intervals of P pairs: cosines float [P] (NaN: wrong in any case), same bool [P], identities [P, 2].

    Accuracy is the mean of `correct` bool [P]. Each of `far_levels` has to be resolved by the pairs (at least 1 / far
    impostor pairs). The same seed gives the same intervals.
    """
    kind = np.asarray(same, dtype=bool)
    scores = worst_scores(np.asarray(cosines, dtype=np.float64), kind)
    people = _People.of_pairs(identities, kind)
    figures: list[Statistic] = [_TarAtFar(scores, kind, far_levels)]
    if eer:
        figures.append(_Eer(scores, kind))
    if correct is not None:
        figures.append(_Mean(np.asarray(correct, dtype=np.float64)))
    # One draw of people for all figures: drawing costs as much as any of them.
    found = _intervals(
        lambda weights: np.concatenate([figure(weights) for figure in figures]), people, replicates, seed
    )
    accuracy = found.pop() if correct is not None else None
    balance = found.pop() if eer else None
    return PairIntervals(accuracy, balance, dict(zip(far_levels, found, strict=True)))


def rate_interval(
    outcomes: ArrayLike, identities: ArrayLike, *, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Interval of the mean of `outcomes` [n] in [0, 1], such as rank-1 hits of probes, whose people are `identities`
    [n]."""
    names, number = np.unique(np.asarray(identities), return_inverse=True)
    hits = np.bincount(number.reshape(-1), np.asarray(outcomes, dtype=np.float64), len(names))
    trials = np.bincount(number.reshape(-1), minlength=len(names)).astype(np.float64)
    # Everything of a person goes with him, so sums by person are all it takes, of however many probes.
    people = _People.of_probes(np.arange(len(names)))
    return _intervals(lambda weights: _share(hits @ weights, trials @ weights)[None], people, replicates, seed)[0]


def detection_intervals(
    mated_scores: ArrayLike,
    mated_identities: ArrayLike,
    other_scores: ArrayLike,
    other_identities: ArrayLike,
    fpir_levels: Sequence[float],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[float, Interval]:
    """Intervals of the detection and identification rate (TPIR) at false positive identification rates not exceeded.

    mated_scores [n]: the score of each mated probe's mate, minus infinity where somebody else is nearer.
    other_scores [m]: the best score of each probe without a mate. Each probe has its person.
    """
    scores = np.concatenate([np.asarray(mated_scores, np.float64), np.asarray(other_scores, np.float64)])
    mated = np.arange(len(scores)) < np.size(mated_scores)
    people = _People.of_probes(np.concatenate([np.asarray(mated_identities), np.asarray(other_identities)]))
    found = _intervals(_TarAtFar(scores, mated, fpir_levels), people, replicates, seed)
    return dict(zip(fpir_levels, found, strict=True))


class ManyPairs:
    """TAR at FAR of millions of pairs of the same people, for any number of models.

    first, second: int [P], whose the two sides of each pair are, from 0; a pair is weighted as one of one person where
    they are equal. same: bool [P]. Only the impostor pairs near and above a threshold are drawn one by one; the others
    enter through their total weight, which one product with the matrix of how often any two people meet gives for all
    replicates. Where it would take too long there are fewer replicates, at least 100 (their number is reported), and
    among so many pairs those of two people are not drawn by themselves: the interval is then the wider one.
    """

    _EFFORT = 50_000_000  # pairs times replicates
    _APART = 200_000  # pairs near and above a threshold up to which two people are drawn by themselves

    def __init__(
        self, first: ArrayLike, second: ArrayLike, same: ArrayLike, *, replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        self.first, self.second = np.asarray(first, np.int64), np.asarray(second, np.int64)
        self.same = np.asarray(same, bool)
        self.count = int(max(self.first.max(), self.second.max())) + 1
        self.replicates, self.seed = replicates, seed
        self.drawn = multiplicities(self.count, replicates, np.random.default_rng(seed))
        impostor = np.flatnonzero(~self.same)
        places = self.first[impostor], self.second[impostor]
        meetings = sparse.coo_array((np.ones(len(impostor)), places), (self.count, self.count)).tocsr()
        self.totals = np.empty(replicates)
        for start in range(0, replicates, 100):
            drawn = self.drawn[:, start : start + 100].astype(np.float64)
            self.totals[start : start + 100] = np.einsum("pb,pb->b", drawn, meetings @ drawn)

    def tar_intervals(self, scores: ArrayLike, far_levels: Sequence[float]) -> dict[float, Interval]:
        """Intervals of TAR at each resolved FAR, from scores float [P] without NaN."""
        values = np.asarray(scores, np.float64)
        return {far: self._tar_interval(values, far) for far in far_levels}

    def _tar_interval(self, scores: Floats, far: float) -> Interval:
        impostors = scores[~self.same]
        wanted = min(len(impostors), int(1.5 * far * len(impostors)) + 2000)
        least = np.partition(impostors, len(impostors) - wanted)[len(impostors) - wanted]
        rows = np.flatnonzero(self.same | (scores >= least))
        first, second, same = self.first[rows], self.second[rows], self.same[rows]
        alone = ~same & (first == second)  # an impostor pair of one person: the lists contradict themselves
        rows, first, second, same = (part[~alone] for part in (rows, first, second, same))
        second = np.where(same, first, second)
        rest = _Rest(self.drawn, self.totals, int((~self.same).sum()))
        if len(rows) <= self._APART:
            people = _People.of_numbers(self.count, first, second, rest)
        else:
            alone = np.full(len(rows), -1)
            people = _People(self.count, first, np.where(same, -1, second), alone, rest)
        statistic = _TarAtFar(np.append(scores[rows], -np.inf), np.append(same, False), [far])
        replicates = min(self.replicates, max(100, self._EFFORT // len(rows)))
        return _intervals(statistic, people, replicates, self.seed)[0]


def compare(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    same: ArrayLike,
    identities: ArrayLike,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """Compare the accuracy of two models: which pairs bool [P] each answers correctly; same bool [P], identities
    [P, 2]."""
    people = _People.of_pairs(identities, np.asarray(same, dtype=bool))
    difference = _Mean(np.asarray(correct_a, np.float64) - np.asarray(correct_b, np.float64))
    return _comparisons(difference, people, replicates, seed)[0]


def compare_tars(
    cosines_a: ArrayLike,
    cosines_b: ArrayLike,
    same: ArrayLike,
    identities: ArrayLike,
    far_levels: Sequence[float],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[float, Comparison]:
    """Compare the TAR of two models at each FAR, which the pairs have to resolve; the rest as in `pair_intervals`.

    Each draw has its own two thresholds: with few false accepts, most of what makes two equally good models differ is
    where their thresholds fell.
    """
    kind = np.asarray(same, dtype=bool)
    tar_a, tar_b = (
        _TarAtFar(worst_scores(np.asarray(cosines, np.float64), kind), kind, far_levels)
        for cosines in (cosines_a, cosines_b)
    )
    people = _People.of_pairs(identities, kind)
    found = _comparisons(lambda weights: tar_a(weights) - tar_b(weights), people, replicates, seed)
    return dict(zip(far_levels, found, strict=True))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test, which counts pairs as independent (Psychometrika 12, 1947): `only_a`
    pairs that A alone has right, `only_b` that B alone has."""
    total = only_a + only_b
    return float(min(1.0, 2 * special.bdtr(min(only_a, only_b), total, 0.5))) if total else 1.0


# --- drawing people -------------------------------------------------------------------------------------------------


def multiplicities(people: int, replicates: int, generator: np.random.Generator) -> NDArray[np.uint16]:
    """How often each of `people` is drawn when as many are drawn with replacement: [people, replicates]."""
    drawn = generator.integers(people, size=(replicates, people))
    drawn += people * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=people * replicates)
    return np.ascontiguousarray(counts.reshape(replicates, people).T.astype(np.uint16))


@dataclass(frozen=True)
class _People:
    """Who is in each row (pair or probe): `first` and `second` int [n]; `second` is -1 for a row of one person.

    `dyad` int [n] numbers the different pairs of people; -1 for a row of one person. `rest`: None, or what stands in
    the last row for all impostor pairs that have none of their own.
    """

    count: int
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    dyad: NDArray[np.int64]
    rest: "_Rest | None" = None

    @staticmethod
    def of_pairs(identities: ArrayLike, same: NDArray[np.bool_]) -> "_People":
        names, number = np.unique(np.asarray(identities), return_inverse=True)
        first, second = number.reshape(-1, 2).T.astype(np.int64)
        if len(first) != len(same) or not np.array_equal(first == second, same):
            raise ValueError("identities do not fit the pairs: a pair is of one person if both sides are equal")
        return _People.of_numbers(len(names), first, second)

    @staticmethod
    def of_numbers(
        count: int, first: NDArray[np.int64], second: NDArray[np.int64], rest: "_Rest | None" = None
    ) -> "_People":
        """Rows of one person where `first` and `second` are equal."""
        two = np.flatnonzero(first != second)
        low, high = np.minimum(first[two], second[two]), np.maximum(first[two], second[two])
        dyad = np.full(len(first), -1)
        dyad[two] = np.unique(low * count + high, return_inverse=True)[1].reshape(-1)
        return _People(count, first, np.where(first == second, -1, second), dyad, rest)

    @staticmethod
    def of_probes(identities: ArrayLike) -> "_People":
        names, number = np.unique(np.asarray(identities), return_inverse=True)
        alone = np.full(number.size, -1)
        return _People(len(names), number.reshape(-1).astype(np.int64), alone, alone)

    def draw(self, start: int, size: int, generator: np.random.Generator) -> NDArray[np.uint16]:
        """How often each person is drawn in replicates from `start` on, [people, size]."""
        if self.rest is not None:
            return self.rest.drawn[:, start : start + size]
        return multiplicities(self.count, size, generator)

    def weights(self, start: int, drawn: NDArray[np.uint16]) -> Floats:
        """float64 [n, b] of drawn people [people, b], the replicates from `start` on."""
        weights = drawn[self.first].astype(np.float64)
        two = np.flatnonzero(self.second >= 0)
        weights[two] *= drawn[self.second[two]]
        if self.rest is None:
            return weights
        others = self.rest.totals[start : start + drawn.shape[1]] - weights[two].sum(axis=0)
        return np.concatenate([weights, others[None]])

    def weights_apart(self, drawn: NDArray[np.uint16], generator: np.random.Generator) -> Floats:
        """float64 [n, b]: rows of one person by drawn people [people, b], every two people by a draw of their own."""
        weights = drawn[self.first].astype(np.float64)
        two = np.flatnonzero(self.second >= 0)
        dyads = generator.poisson(1.0, size=(int(self.dyad.max()) + 1, drawn.shape[1])).astype(np.uint16)
        weights[two] = dyads[self.dyad[two]]
        if self.rest is None:
            return weights
        return np.concatenate([weights, np.full((1, drawn.shape[1]), float(self.rest.pairs - len(two)))])

    @property
    def ones(self) -> Floats:
        """float64 [n, 1]: everybody drawn once."""
        weights = np.ones((len(self.first), 1))
        if self.rest is None:
            return weights
        others = self.rest.pairs - np.count_nonzero(self.second >= 0)
        return np.concatenate([weights, np.full((1, 1), float(others))])


@dataclass(frozen=True)
class _Rest:
    """Impostor pairs without a row of their own: drawn people [people, b], the weights of all `pairs` impostor pairs
    together in each replicate, float64 [b]."""

    drawn: NDArray[np.uint16]
    totals: Floats
    pairs: int


Statistic = Callable[[Floats], Floats]


class _Bootstrap:
    """A statistic's k figures: `values` [k], and `replicas` [k, b] of them in draws of people, shrunk as above.

    `apart` [k, b]: replicas in which every two people are drawn by themselves; None where no row has two people.
    """

    def __init__(self, statistic: Statistic, people: _People, replicates: int, seed: int) -> None:
        self._chunk = max(1, _CHUNK // max(len(people.first), people.count))
        generator = np.random.default_rng(seed)

        self.values = statistic(people.ones)[:, 0]
        self.replicas = self._collect(
            replicates, lambda start, size: statistic(people.weights(start, people.draw(start, size, generator)))
        )
        self.apart = None
        if (people.dyad < 0).all():
            return
        everybody_once = np.ones((people.count, 1), np.uint16)
        self.apart = self._collect(
            max(replicates // 2, 1),
            lambda start, size: statistic(people.weights_apart(people.draw(start, size, generator), generator)),
        )
        dyads = self._collect(
            min(_SECOND_DRAW, max(replicates // 2, 2)),
            lambda _, size: statistic(people.weights_apart(everybody_once.repeat(size, axis=1), generator)),
        )
        total = np.nanvar(self.replicas, axis=1)
        share = 1 - 2 * _share(np.nanvar(dyads, axis=1), total)
        factor = np.sqrt(np.clip(np.where(total > 0, share, 1.0), 1 / 3, 1.0))
        self.replicas = self.values[:, None] + factor[:, None] * (self.replicas - self.values[:, None])

    def _collect(self, replicates: int, figures: Callable[[int, int], Floats]) -> Floats:
        starts = range(0, replicates, self._chunk)
        return np.concatenate([figures(start, min(self._chunk, replicates - start)) for start in starts], axis=1)

    def percentiles(self, row: int) -> tuple[float, float]:
        """The outer ones of both kinds of replicas of figure `row`."""
        tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        low, high = np.nanquantile(self.replicas[row], tails)
        if self.apart is not None:
            other = np.nanquantile(self.apart[row], tails)
            low, high = min(low, other[0]), max(high, other[1])
        return float(low), float(high)


def _intervals(statistic: Statistic, people: _People, replicates: int, seed: int) -> list[Interval]:
    bootstrap = _Bootstrap(statistic, people, replicates, seed)
    return [
        _rate_interval(
            value, float(np.nanvar(bootstrap.replicas[row])), bootstrap.percentiles(row), people.count, replicates
        )
        for row, value in enumerate(bootstrap.values.tolist())
    ]


def from_replicates(value: float, replicas: Floats, people: int) -> Interval:
    """The interval of a rate from its replicates [b] in draws of `people` people, where everybody meets everybody.

    A replicate is NaN where its draw had nothing to count.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(replicas, [tail, 1 - tail])
    return _rate_interval(value, float(np.nanvar(replicas)), (float(low), float(high)), people, len(replicas))


def _rate_interval(
    value: float, variance: float, percentiles: tuple[float, float], people: int, replicates: int
) -> Interval:
    low, high = _rate_bounds(value, variance, people)
    low, high = min(low, percentiles[0], value), max(high, percentiles[1], value)
    return Interval(value, max(low, 0.0), min(high, 1.0), people, replicates)


def _rate_bounds(value: float, variance: float, people: int) -> tuple[float, float]:
    """Clopper and Pearson's bounds of a rate of this variance; without any variance, of one trial a person."""
    value = min(max(value, 0.0), 1.0)
    spread = value * (1 - value)
    # Where everybody has the same rate, what is left of the variance is rounding.
    trials = spread / variance if variance > 1e-12 * spread > 0 else float(people)
    hits = value * trials
    tail = (1 - CONFIDENCE) / 2
    low = special.betaincinv(hits, trials - hits + 1, tail) if hits > 0 else 0.0
    high = special.betaincinv(hits + 1, trials - hits, 1 - tail) if hits < trials else 1.0
    return float(low), float(high)


def _comparisons(statistic: Statistic, people: _People, replicates: int, seed: int) -> list[Comparison]:
    """A comparison for each figure of a statistic that is a difference."""
    bootstrap = _Bootstrap(statistic, people, replicates, seed)
    found = []
    for row, value in enumerate(bootstrap.values.tolist()):
        low, high = bootstrap.percentiles(row)
        # Of both kinds of replicas, as the interval: the larger p.
        kinds = [bootstrap.replicas[row]] + ([] if bootstrap.apart is None else [bootstrap.apart[row]])
        p_value = max(map(_two_sided, kinds))
        found.append(Comparison(value, min(low, value), max(high, value), p_value, people.count, replicates))
    return found


def _two_sided(replicas: Floats) -> float:
    """How often, both ways, replicas [b] of a difference are on the other side of none.

    One more above and below: no smaller p can be told by so many replicates (Davison and Hinkley 1997, 4.11).
    """
    sides = [1 + np.count_nonzero(replicas <= 0), 1 + np.count_nonzero(replicas >= 0)]
    return float(min(1.0, 2 * min(sides) / (len(replicas) + 1)))


# --- figures of weighted rows ---------------------------------------------------------------------------------------
# Each maps weights float64 [n, b] to float64 [k, b], one column for each replicate; NaN where a draw has no rows.


class _Mean:
    def __init__(self, outcomes: Floats) -> None:
        self.outcomes = outcomes

    def __call__(self, weights: Floats) -> Floats:
        return _share(self.outcomes @ weights, weights.sum(axis=0))[None]


class _TarAtFar:
    """TAR at each FAR, where the weighted false accepts do not exceed it; one threshold for each replicate."""

    def __init__(self, scores: Floats, same: NDArray[np.bool_], far_levels: Sequence[float]) -> None:
        genuine, impostor = np.flatnonzero(same), np.flatnonzero(~same)
        self.far_levels = far_levels
        self.genuine = genuine[np.argsort(-scores[genuine], kind="stable")]
        self.impostor = impostor[np.argsort(-scores[impostor], kind="stable")]
        ranked = scores[self.impostor]
        # Impostors of equal score are accepted together: the last of each group.
        self.ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, int)
        # Genuine pairs above each group, and above none of them (where all impostors may pass).
        above = np.searchsorted(-scores[self.genuine], -ranked[self.ends], side="left")
        self.above = np.append(above, np.count_nonzero(scores[genuine] > -np.inf))

    def __call__(self, weights: Floats) -> Floats:
        if not self.far_levels:
            return np.empty((0, weights.shape[1]))
        accepted = np.cumsum(weights[self.impostor], axis=0)
        total = accepted[-1]
        accepted = accepted[self.ends]
        hits = np.cumsum(weights[self.genuine], axis=0)
        rates = np.empty((len(self.far_levels), weights.shape[1]))
        for row, far in enumerate(self.far_levels):
            groups = np.count_nonzero(accepted <= far * total * (1 + 1e-12), axis=0)
            above = self.above[groups]
            counted = np.where(above > 0, np.take_along_axis(hits, np.maximum(above - 1, 0)[None], axis=0)[0], 0.0)
            rates[row] = _share(counted, hits[-1])
        return rates


class _Eer:
    """The equal error rate of each replicate, as `metrics.equal_error_rate`."""

    def __init__(self, scores: Floats, same: NDArray[np.bool_]) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked, self.same = scores[self.order], same[self.order]
        self.start = np.count_nonzero(ranked == np.inf)
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self.ends = ends[np.isfinite(ranked[ends])]

    def __call__(self, weights: Floats) -> Floats:
        weights = weights[self.order]
        rates = []
        for kind in (~self.same, self.same):
            counts = np.cumsum(weights * kind[:, None], axis=0)
            first = counts[self.start - 1] if self.start else np.zeros(counts.shape[1])
            corners = _share(np.concatenate([first[None], counts[self.ends]]), counts[-1])
            border = np.zeros((1, corners.shape[1]))
            rates.append(np.concatenate([border, corners, border + 1]))
        far, tar = rates
        surplus = far + tar - 1
        after = np.argmax(surplus >= 0, axis=0)[None]
        before = after - 1
        low, high = (np.take_along_axis(surplus, row, axis=0)[0] for row in (before, after))
        far_low, far_high = (np.take_along_axis(far, row, axis=0)[0] for row in (before, after))
        return (far_low + _share(-low, high - low) * (far_high - far_low))[None]


def _share(part: Floats, whole: Floats) -> Floats:
    """part / whole, NaN where nothing was drawn."""
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)
