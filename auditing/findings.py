"""What the centres say: crops of the wrong person, strangers, identities to merge or split, people of a test set.

No constant decides; every threshold comes from the set's own distributions and a rate of error that is asked for.

* *Crops.* The score of a crop is `other` - `fit`. The `fit` of all crops is a mixture of right crops and of crops that
  have nothing to do with their identity, and what the latter have is known: how crops fit random other identities. Its
  share follows from the lower half of that distribution, where right crops are rare; what is left over is the
  distribution of right crops. With the `other` cosines of crops that surely are right it says how many right crops lie
  above any score, so the score from which a finding counts is the lowest one at which no more than the error rate of
  the findings are right crops (a false discovery rate, as in Efron, "Large-scale inference", 2010, with an empirical
  null). Above it a crop shows another *person* of the set where `other` is beyond what sure crops have by chance, and a
  *stranger* otherwise. Where more than half of the crops seem not to show their identity, either the set has no
  identities or the model cannot tell them apart, and no crop is judged.
* *No face.* The detector sees none, and the model does not know the crop either: it is near neither to its own
  identity nor to another. The detector's score means the same in every set, so its limit is a constant.
* *Two labels, one person.* By chance the angle to the nearest other centre of an identity, the least of many, follows
  an extreme value distribution (Weibull, as angles end at 0; its logarithm is Gumbel's), fitted to the half of the
  identities that is farthest from all others, where hardly one has a second label; two identities are one person from
  the angle on at which no more than the error rate of the findings are expected by chance (the procedure of Benjamini
  and Hochberg).
* *One label, two people.* The crops fall into two parts, each near to itself, that are no nearer to each other than the
  centres of two random identities (but for the false alarm rate), and the gap is beyond chance as above.
* *A test set's person.* As many crops of an identity as that person has are nearer to some other identity than the
  limit with the false alarm rate.

An identity of one crop has no centre without that crop, and one of two has two crops that only speak of each other:
their crops are judged by other identities alone, and the reason says so.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from auditing.centres import (
    Centres,
    Rows,
    drawn,
    first_with,
    fitting,
    groups,
    nearest_of,
    nearest_other,
    robust_centres,
    unit_rows,
)
from formats import crop_sets

KEEP, WRONG, STRANGER, UNUSABLE, DUPLICATE = "", "wrong person", "stranger", "unusable", "duplicate"
MERGE, SPLIT, TEST = "two labels, one person", "one label, two people", "in the test set"

MOST_WRONG = 0.5  # share of crops that seem not to show their identity beyond which none is judged
# Score of the detector of stage 2 below which there is no face: of 25,332 crops of public sets none has less (0.09 and
# 0.12 are a profile in the dark), of 1,026 pieces of background 98.2 % have.
FACELESS = 0.05
FEW = 3  # crops below which an identity has no majority
LEAST = 20  # identities below which nothing is said of how alike two of them are by chance
SPLIT_ROUNDS = 10
SPLIT_PARTS = 2, 0.2  # least crops, and least share, of the smaller part


@dataclass
class Limits:
    """Thresholds on cosines (`score_limit`: on their difference), and what the set is estimated to be."""

    score_limit: float  # least other - fit of a finding; above 2: none
    other_limit: float  # of `other`: from here on it is that person
    stranger_limit: float  # a random other identity's centre is nearer than this with the false alarm rate
    merge_limit: float
    split_limit: float
    wrong_share: float  # estimated share of crops that do not show their identity
    error_rate: float
    false_alarms: float
    observed: dict[str, int] = field(default_factory=dict)

    @property
    def judges(self) -> bool:
        """Whether crops are judged at all."""
        return self.wrong_share <= MOST_WRONG

    def notes(self) -> list[str]:
        """What this set is too small, or too clean, to be told."""
        found = []
        if self.judges and not np.isfinite(self.score_limit):
            found.append("No crop differs from its identity so that more than chance would explain it.")
        if not np.isfinite(self.merge_limit):
            few = self.observed.get("centres", 0) < LEAST
            why = f"with fewer than {LEAST} identities that is not to be told" if few else "none stands out"
            found.append(f"No two identities are held to be one person: {why}.")
        return found


@dataclass
class Compared:
    """Everything that a set's embeddings say by themselves.

    `nearest` int64, `other` float32 [crops]: the nearest other centre of each crop; `near_centre`, `near_cosine`
    [identities]: that of each centre.
    """

    centres: Centres
    nearest: np.ndarray
    other: np.ndarray
    near_centre: np.ndarray
    near_cosine: np.ndarray
    bounds: Limits

    @property
    def called(self) -> int:
        """Crops that do not show their identity, at the error rate that was asked for."""
        return int((self.other - self.centres.fit >= self.bounds.score_limit).sum())


@dataclass(frozen=True)
class PairFinding:
    """A finding about one identity or two: `first` and `second` are labels, or a label and a person's name."""

    kind: str
    first: int
    second: str
    score: float
    reason: str
    crops: tuple[int, ...] = ()  # the evidence, crops of the training set


class Findings:
    """What is known of crops and of pairs of identities, and what training does with them, filled in step by step."""

    def __init__(self, crops: crop_sets.Crops) -> None:
        count = len(crops)
        self.crops, self.labels = crops, crops.labels
        self.names = crops.identity_names
        self.kinds = [KEEP] * count
        self.reasons = [""] * count
        self.score = np.full(count, np.nan)
        self.action = ["keep"] * count
        self.to: list[int | None] = [None] * count
        self.pairs: list[PairFinding] = []
        self.pair_actions: dict[str, str] = {}

    def set(self, index: int, kind: str, reason: str, action: str, to: int | None = None) -> None:
        self.kinds[index], self.reasons[index], self.action[index], self.to[index] = kind, reason, action, to


def _quantile(values: np.ndarray, share: float, otherwise: float) -> float:
    values = values[np.isfinite(values)]
    return float(np.quantile(values, share)) if len(values) else otherwise


def random_other(embeddings: Rows, labels: np.ndarray, centres: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Cosines of random crops and the centres of random other identities, float32."""
    random = np.random.default_rng(seed)
    crops = np.sort(random.integers(0, len(labels), count))
    others = random.integers(0, len(centres), count)
    keep = (labels[crops] != others) & centres[others].any(axis=1)
    return _pair_cosines(embeddings, crops[keep], centres, others[keep])


def random_fit(embeddings: Rows, labels: np.ndarray, made: Centres, seed: int, count: int = 25_000) -> np.ndarray:
    """How well some `count` random crops fit random other identities, float32.

    Identities are drawn by their crops, and all but one of these are met, as a crop meets those of its own.
    """
    random = np.random.default_rng(seed)
    centres = made.centres
    sizes = np.bincount(labels, minlength=len(centres))
    order = random.permutation(np.flatnonzero((sizes > 1) & centres.any(axis=1)))
    some = first_with(order, sizes, count)
    each = count / max(1, int(sizes[some].sum()))
    wanted = set(some.tolist())
    found = [np.zeros(0, np.float32)]
    for label, members in groups(labels, len(centres)):
        if label in wanted:
            crops = np.sort(random.integers(0, len(labels), int(np.ceil(each * len(members)))))
            rows = unit_rows(embeddings[crops[labels[crops] != label]])
            others = np.sort(random.permutation(members)[1:])
            fit = fitting(rows @ centres[label], nearest_of(rows, unit_rows(embeddings[others])))
            found.append(drawn(fit, made.trusted[others].sum(), made.typical))
    return np.concatenate(found)


def _pair_cosines(first: Rows, rows: np.ndarray, second: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines float32 [n] of rows of `first`, of any length, and of `second`, of length 1; some megabytes at a time."""
    parts = [
        np.einsum("nd,nd->n", unit_rows(first[rows[start:stop]]), second[others[start:stop]])
        for start, stop in itertools.pairwise([*range(0, len(rows), 8192), len(rows)])
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def compare(
    embeddings: Rows,
    labels: np.ndarray,
    identities: int,
    error_rate: float,
    false_alarms: float,
    device: torch.device | str = "cpu",
) -> Compared:
    """Centres, their and all crops' nearest other centres, and the thresholds that follow."""
    centres = robust_centres(embeddings, labels, identities)
    nearest, other = nearest_other(embeddings, labels, centres.centres, device)
    near_centre, near_cosine = nearest_other(
        centres.centres, np.arange(identities), centres.centres, device, what="identities compared"
    )
    bounds = limits(embeddings, labels, centres, other, near_cosine, error_rate, false_alarms)
    return Compared(centres, nearest, other, near_centre, near_cosine, bounds)


def limits(
    embeddings: Rows,
    labels: np.ndarray,
    found: Centres,
    other: np.ndarray,
    near_centre: np.ndarray,
    error_rate: float,
    false_alarms: float,
    seed: int = 0,
) -> Limits:
    """The thresholds of a set.

    `other` float32 [crops]: cosine to the nearest other centre; `near_centre` float32 [identities]: of each centre to
    its nearest other. Identities without trusted crops have none.
    """
    strangers = random_other(embeddings, labels, found.centres, seed, 200_000)
    stranger_limit = _quantile(strangers, 1 - false_alarms, 1.0)
    sure = found.trusted & (found.own >= stranger_limit) & (found.own > other)
    score_limit, wrong_share = score_threshold(
        found.fit, other, random_fit(embeddings, labels, found, seed), other[sure], error_rate
    )
    other_limit = _quantile(other[sure], 1 - false_alarms, 1.0)
    if wrong_share > MOST_WRONG:
        score_limit = other_limit = np.inf
    random = np.random.default_rng(seed)
    known = np.flatnonzero(found.centres.any(axis=1))
    first, second = random.choice(known, (2, 100_000)) if len(known) else np.zeros((2, 0), np.int64)
    different = first != second
    apart = _pair_cosines(found.centres, first[different], found.centres, second[different])
    return Limits(
        score_limit=score_limit,
        other_limit=other_limit,
        stranger_limit=stranger_limit,
        merge_limit=_cosine(chance_threshold(_nearness(near_centre), error_rate)),
        split_limit=_quantile(apart, 1 - false_alarms, -1.0),
        wrong_share=wrong_share,
        error_rate=error_rate,
        false_alarms=false_alarms,
        observed={"strangers": len(strangers), "sure_crops": int(sure.sum()), "centres": len(known)},
    )


def score_threshold(
    fit: np.ndarray, other: np.ndarray, strangers: np.ndarray, other_of_right: np.ndarray, error_rate: float
) -> tuple[float, float]:
    """The least score of a finding, and the share of crops that do not show their identity; see the module's text."""
    known = np.isfinite(fit) & np.isfinite(other)
    if not known.any() or not len(strangers) or not len(other_of_right):
        return np.inf, 0.0
    fit, score = fit[known], (other - fit)[known]
    wrong = min(1.0, 2 * float((fit < np.median(strangers)).mean()))
    edges = np.linspace(-1, 1, 401)
    mixture, null = (np.histogram(values, edges)[0] / len(values) for values in (fit, strangers))
    # Cumulated, what is left only grows; its greatest minorant that does is free of the noise of single bins.
    left = np.minimum.accumulate(np.cumsum(mixture - wrong * null)[::-1])[::-1]
    right = np.diff(left.clip(0), prepend=0)
    right /= max(right.sum(), 1e-12)
    middle = (edges[1:] + edges[:-1]) / 2
    sorted_other, sorted_score = np.sort(other_of_right), np.sort(score)
    limit = np.inf
    for least in np.linspace(1.5, -0.5, 401):
        above = 1 - np.searchsorted(sorted_other, least + middle, side="right") / len(sorted_other)
        chance = (1 - wrong) * float((right * above).sum())
        findings = 1 - np.searchsorted(sorted_score, least, side="right") / len(sorted_score)
        if chance > error_rate * findings:
            if findings > 0:
                break
            continue
        limit = float(least)
    return limit, wrong


def _nearness(cosine: np.ndarray) -> np.ndarray:
    """Minus the logarithm of the angle: of nearest neighbours by chance it follows Gumbel's distribution."""
    return -np.log(np.maximum(np.arccos(np.clip(cosine.astype(np.float64), -1, 1)), 1e-6))


def _cosine(nearness: float) -> float:
    return float(np.cos(np.exp(-nearness))) if np.isfinite(nearness) else np.inf


def chance_threshold(extremes: np.ndarray, error_rate: float) -> float:
    """From which value on no more than `error_rate` of these values, each the largest of many, are chance.

    Gumbel's distribution is fitted to the lower quartile and the median. Infinity where fewer than `LEAST` values
    say nothing, or none is conspicuous.
    """
    values = np.sort(extremes[np.isfinite(extremes)].astype(np.float64))
    if len(values) < LEAST:
        return np.inf
    low, middle = np.quantile(values, [0.25, 0.5])
    # Gumbel's quantile function is location - scale ln(-ln p).
    scale = (middle - low) / (np.log(-np.log(0.25)) - np.log(-np.log(0.5)))
    location = low + scale * np.log(-np.log(0.25))
    expected = -np.expm1(-np.exp(-(values - location) / max(scale, 1e-9))) * len(values)
    passing = np.flatnonzero(expected <= error_rate * np.arange(len(values), 0, -1))
    return float(values[passing[0]]) if len(passing) else np.inf


def judge_crops(
    labels: np.ndarray, found: Centres, other: np.ndarray, nearest: np.ndarray, bounds: Limits, names: Sequence[str]
) -> tuple[list[str], np.ndarray, list[str]]:
    """For each crop what it is (`KEEP` if nothing is wrong), a score (larger is worse) and a reason."""
    own = found.own
    sizes = np.bincount(labels, minlength=len(found.centres))[labels]
    # Where there is no centre of the identity without the crop, another must be near on its own account.
    alone = ~np.isfinite(own)
    score = np.where(alone, other - bounds.other_limit, other - found.fit).astype(np.float64)
    finding = np.where(alone, other >= bounds.other_limit, score >= bounds.score_limit)
    wrong = finding & (other >= bounds.other_limit)
    stranger = finding & ~wrong & (sizes >= FEW)
    no_direction = ~np.isfinite(other) if len(found.centres) > 1 else np.zeros(len(labels), bool)
    kinds, reasons = [], []
    for index in range(len(labels)):
        few = f" (identity of {sizes[index]})" if sizes[index] < FEW else ""
        if no_direction[index]:
            kinds.append(UNUSABLE)
            reasons.append("the model gives no finite feature other than zero")
        elif wrong[index]:
            kinds.append(WRONG)
            mine = "no other crop" if not np.isfinite(own[index]) else f"own {own[index]:.3f}"
            reasons.append(f"{names[nearest[index]]} {other[index]:.3f}, {mine}, limit {bounds.other_limit:.3f}{few}")
        elif stranger[index]:
            kinds.append(STRANGER)
            reasons.append(
                f"own {own[index]:.3f}, nearest other {other[index]:.3f}, which strangers reach too "
                f"(limit {bounds.other_limit:.3f})"
            )
        else:
            kinds.append(KEEP)
            reasons.append(few.strip())
    score[no_direction] = np.inf
    return kinds, score, reasons


def find_faceless(face: np.ndarray, found: Centres, other: np.ndarray, bounds: Limits) -> np.ndarray:
    """Which crops show no face, bool [crops]; `face` float [crops]: the detector's scores, NaN where not looked at."""
    known = (found.own >= bounds.stranger_limit) | (other >= bounds.other_limit)
    return (face < FACELESS) & ~known


def find_merges(
    embeddings: Rows,
    labels: np.ndarray,
    found: Centres,
    nearest: np.ndarray,
    cosine: np.ndarray,
    bounds: Limits,
    names: Sequence[str],
) -> list[PairFinding]:
    """Pairs of identities that are one person; `nearest`, `cosine`: of each centre among the others.

    More than half of the crops of either have to be nearer to the other's centre than strangers are: one wrong crop of
    two takes the centre with it, but does not make two people one.
    """
    pairs = {}
    for label, (other, value) in enumerate(zip(nearest.tolist(), cosine.tolist(), strict=True)):
        if other >= 0 and value >= bounds.merge_limit:
            pairs[min(label, other), max(label, other)] = value
    wanted = {label for pair in pairs for label in pair}
    crops = {label: members[found.trusted[members]] for label, members in groups(labels, len(found.centres))
             if label in wanted}  # fmt: skip

    def fits(label: int, other: int) -> bool:
        near = np.sort(unit_rows(embeddings[crops[label]]) @ found.centres[other])
        return bool(near[(len(near) - 1) // 2] >= bounds.stranger_limit)

    pairs = {(one, two): value for (one, two), value in pairs.items() if fits(one, two) and fits(two, one)}
    return [
        PairFinding(MERGE, first, str(second), value,
                    f"{names[first]} and {names[second]}: centres {value:.3f}, limit {bounds.merge_limit:.3f}")
        for (first, second), value in sorted(pairs.items(), key=lambda item: -item[1])
    ]  # fmt: skip


def find_splits(
    embeddings: Rows, labels: np.ndarray, found: Centres, bounds: Limits, names: Sequence[str]
) -> list[PairFinding]:
    """Identities whose crops fall into two parts, each near to itself and no nearer to the other than strangers are.

    Any crops can be cut in two, so the gap between the parts must also be beyond what the set's identities show by
    chance.
    """
    parted = []
    for label, members in groups(labels, len(found.centres)):
        least = max(SPLIT_PARTS[0], int(np.ceil(SPLIT_PARTS[1] * len(members))))
        if len(members) < 2 * least:
            continue
        unit = unit_rows(embeddings[members])
        part = two_means(unit)
        sizes = [int((part == side).sum()) for side in (0, 1)]
        if min(sizes) < least:
            continue
        one, other = (unit_rows(unit[part == side].sum(axis=0)[None])[0] for side in (0, 1))
        inner = min(_cohesion(unit[part == side]) for side in (0, 1))
        parted.append((label, members[part == int(sizes[1] < sizes[0])], max(sizes), inner, float(one @ other)))
    gap_limit = chance_threshold(np.array([inner - between for *_, inner, between in parted]), bounds.error_rate)
    findings = [
        PairFinding(SPLIT, label, str(label), inner - between,
                    f"{names[label]}: {larger} + {len(smaller)} crops, between the parts {between:.3f} "
                    f"(limit {bounds.split_limit:.3f}), within {inner:.3f}",
                    tuple(smaller.tolist()))
        for label, smaller, larger, inner, between in parted
        if between < bounds.split_limit and inner >= bounds.stranger_limit and inner - between >= gap_limit
    ]  # fmt: skip
    return sorted(findings, key=lambda finding: -finding.score)


def two_means(unit: np.ndarray) -> np.ndarray:
    """Two parts of unit rows [n, D] by spherical k-means from the two rows that are farthest apart;
    int64 [n], 0 or 1."""
    first = int(np.argmin(unit @ unit.mean(axis=0)))
    second = int(np.argmin(unit @ unit[first]))
    centres = unit[[first, second]]
    part = np.zeros(len(unit), np.int64)
    for _ in range(SPLIT_ROUNDS):
        new = (unit @ centres.T).argmax(axis=1)
        if (new == part).all() and new.any():
            break
        part = new
        for side in (0, 1):
            if (part == side).any():
                centres[side] = unit_rows(unit[part == side].sum(axis=0)[None])[0]
    return part


def _cohesion(unit: np.ndarray) -> float:
    """Mean cosine of each row to the sum of the others."""
    without = unit.sum(axis=0)[None] - unit
    return float((np.einsum("nd,nd->n", without, unit) / np.maximum(np.linalg.norm(without, axis=1), 1e-12)).mean())


def person_limit(
    embeddings: Rows,
    labels: np.ndarray,
    found: Centres,
    crops: int,
    error_rate: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[float, int]:
    """From which cosine to the nearest identity a person with `crops` photos is called one of the training set.

    What people who are *not* the identity that they are compared with get: the mean of as many crops of one identity,
    against all others. Returns the limit and how many identities it comes from.
    """
    random = np.random.default_rng(seed)
    trusted = np.bincount(labels[found.trusted], minlength=len(found.centres))
    some = set(random.permutation(np.flatnonzero(trusted >= max(2, min(crops, 4))))[:3000].tolist())
    if not some:
        return 1.0, 0
    means, owners = [], []
    for label, members in groups(labels, len(found.centres)):
        if label in some:
            chosen = random.permutation(members[found.trusted[members]])[:crops]
            means.append(unit_rows(embeddings[np.sort(chosen)]).sum(axis=0))
            owners.append(label)
    rows, own = np.stack(means), np.array(owners, np.int64)
    _, best = nearest_other(rows, own, found.centres, device, what=f"limit for people of {crops} photos")
    return _quantile(best, 1 - error_rate, 1.0), len(some)
