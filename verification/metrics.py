"""Face verification: what the cosines of a model on pairs say about the model. NumPy alone, no files.

A pair is accepted as one person when the cosine of its two embeddings is at least the threshold. Everything here is
computed exactly from the sorted distinct cosines, without a grid of thresholds: pairs of equal cosine always pass or
fail together, and thresholds lie in the middle between neighbouring cosines. InsightFace's evaluation tries the 400
thresholds 0, 0.01, ... 3.99 on the squared distance instead: on simulated sets of 6,000 pairs it came out one pair
higher or lower than this at 99.9 % accuracy, five at 98 %. The price: one sort per fold, milliseconds in all.

A pair of which one photo shows no face counts as wrong in every figure: one person as minus infinity, two persons as
plus infinity. Not answering is never of advantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from utils import InputError

FAR_LEVELS = (1e-1, 1e-2, 1e-3, 1e-4)
CONFIDENCE = 0.95

# Cosines end at 1: from here on nothing is accepted.
ACCEPT_NOTHING = float(np.nextafter(1.0, 2.0))
ACCEPT_ALL = -1.0
# Cosines that differ by less over all pairs are the rounding of one: a network that looks at its input spreads them.
SAME_COSINE = 1e-5


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What happens at every threshold that makes a difference, from the strictest to the laxest.

    thresholds float64 [K + 1]: the first accepts nothing, each further one accepts one more distinct cosine.
    false_accepts, true_accepts: int64 [K + 1], how many pairs of two persons and of one person are accepted. Pairs
    at plus infinity are accepted from the start, pairs at minus infinity by no threshold: the last row need not
    accept everything. impostors, genuine: how many pairs there are of each kind.
    """

    thresholds: np.ndarray
    false_accepts: np.ndarray
    true_accepts: np.ndarray
    impostors: int
    genuine: int

    @property
    def far(self) -> np.ndarray:
        """False accept rate, float64 [K + 1]; NaN without impostor pairs."""
        return self.false_accepts / self.impostors if self.impostors else np.full(len(self.thresholds), np.nan)

    @property
    def tar(self) -> np.ndarray:
        """True accept rate, float64 [K + 1]; NaN without genuine pairs."""
        return self.true_accepts / self.genuine if self.genuine else np.full(len(self.thresholds), np.nan)

    @property
    def correct(self) -> np.ndarray:
        """int64 [K + 1]: pairs answered correctly."""
        return self.true_accepts + self.impostors - self.false_accepts


@dataclass(frozen=True)
class OperatingPoint:
    """The laxest threshold whose false accept rate is at most `far`.

    `false_accepts` of `impostors` pairs are accepted there. The intervals are Clopper and Pearson's, 95 %: of the
    false accept rate at that threshold, and of `tar`. `resolved` is False where fewer than 1 / far impostor pairs
    make a statement about this rate impossible; threshold, tar and intervals are then None.
    """

    far: float
    resolved: bool
    impostors: int
    false_accepts: int | None = None
    threshold: float | None = None
    tar: float | None = None
    far_interval: tuple[float, float] | None = None
    tar_interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The point with its threshold as cosine and as angle in degrees."""
        return {
            "far": self.far,
            "resolved": self.resolved,
            "impostor_pairs": self.impostors,
            "false_accepts": self.false_accepts,
            "tar": self.tar,
            "tar_interval_95": self.tar_interval,
            "far_interval_95": self.far_interval,
            "threshold": None if self.threshold is None else threshold_json(self.threshold),
        }


@dataclass(frozen=True)
class Fold:
    """One fold judged by the threshold that is best on the others; counts of pairs."""

    accuracy: float
    threshold: float
    genuine: int
    impostors: int


@dataclass
class VerificationResult:
    """All figures of one model on one set; rates in [0, 1], thresholds as cosines.

    cosines: float64 [P], NaN for pairs without two faces. Figures that the set cannot give are None, and `notes` says
    why.
    """

    set_name: str
    cosines: np.ndarray
    same: np.ndarray
    fold_of: np.ndarray
    folds: list[Fold]
    kfold_mean: float | None
    kfold_std: float | None
    best_accuracy: float | None
    best_threshold: float | None
    auc: float | None
    eer: float | None
    points: list[OperatingPoint]
    notes: list[str]

    @property
    def accuracy(self) -> float:
        """The one number to compare by: k-fold accuracy, without folds that at the best threshold, else NaN."""
        for value in (self.kfold_mean, self.best_accuracy):
            if value is not None:
                return value
        return float("nan")

    @property
    def kfold_threshold(self) -> float | None:
        """Mean of the thresholds that were chosen for the folds."""
        return float(np.mean([fold.threshold for fold in self.folds])) if self.folds else None

    def angles(self, same: bool) -> np.ndarray:
        """Angles in degrees of all pairs of one kind that have two faces."""
        return to_angle(self.cosines[(self.same == same) & ~np.isnan(self.cosines)])

    def to_json(self) -> dict[str, Any]:
        """Every figure under a name that says what it is, ready for JSON."""
        unscored = np.isnan(self.cosines)
        return {
            "pairs": len(self.same),
            "genuine_pairs": int(self.same.sum()),
            "impostor_pairs": int((~self.same).sum()),
            "pairs_without_face": {
                "genuine": int((unscored & self.same).sum()),
                "impostor": int((unscored & ~self.same).sum()),
            },
            "accuracy_kfold_mean": self.kfold_mean,
            "accuracy_kfold_std": self.kfold_std,
            "threshold_kfold_mean": threshold_json(self.kfold_threshold),
            "folds": [
                {
                    "accuracy": fold.accuracy,
                    "threshold": threshold_json(fold.threshold),
                    "genuine_pairs": fold.genuine,
                    "impostor_pairs": fold.impostors,
                }
                for fold in self.folds
            ],
            "accuracy_best_threshold": self.best_accuracy,
            "threshold_best": threshold_json(self.best_threshold),
            "auc": self.auc,
            "eer": self.eer,
            "tar_at_far": [point.to_json() for point in self.points],
            "angles": {
                "genuine": _moments(self.angles(True)),
                "impostor": _moments(self.angles(False)),
            },
            "notes": self.notes,
        }


def to_angle(cosine: np.ndarray | float) -> np.ndarray:
    """Cosine -> angle in degrees, 0 ... 180."""
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def threshold_json(cosine: float | None) -> dict[str, float] | None:
    """A threshold as cosine (accepted from here upwards) and angle in degrees (accepted up to here)."""
    return None if cosine is None else {"cosine": cosine, "angle": float(to_angle(cosine))}


def _moments(angles: np.ndarray) -> dict[str, float] | None:
    return {"mean": float(angles.mean()), "std": float(angles.std())} if len(angles) else None


def worst_scores(cosines: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Cosines with NaN replaced by the wrong answer: minus infinity for one person, plus infinity for two."""
    return np.where(np.isnan(cosines), np.where(same, -np.inf, np.inf), cosines)


def curve(cosines: np.ndarray, same: np.ndarray) -> Curve:
    """Count both kinds of accepted pairs at every threshold that makes a difference.

    cosines float [P] in [-1, 1], NaN for a pair without two faces (always wrong); same bool [P].
    """
    found = ~np.isnan(cosines)
    values, position = np.unique(cosines[found], return_inverse=True)
    per_value = [np.bincount(position[kind[found]], minlength=len(values))[::-1].cumsum() for kind in (same, ~same)]
    true_accepts, false_accepts = (np.concatenate([[0], counts]) for counts in per_value)
    always_wrong = int((~found & ~same).sum())
    return Curve(
        thresholds=_thresholds_between(values)[::-1],
        false_accepts=false_accepts + always_wrong,
        true_accepts=true_accepts,
        impostors=int((~same).sum()),
        genuine=int(same.sum()),
    )


def _thresholds_between(values: np.ndarray) -> np.ndarray:
    """Thresholds [K + 1] that tell K ascending distinct cosines apart: before, in the middle between, and after."""
    low, high = values[:-1], values[1:]
    middle = low + (high - low) / 2
    middle = np.where(middle > low, middle, high)  # neighbours in floating point have no middle
    return np.concatenate([[ACCEPT_ALL], middle, [ACCEPT_NOTHING]]) if len(values) else np.array([ACCEPT_NOTHING])


def best_threshold(cosines: np.ndarray, same: np.ndarray) -> tuple[float, int]:
    """The threshold that answers most pairs correctly, and how many these are.

    Of several equally good ones the strictest is taken (InsightFace's evaluation, which takes the first maximum over
    ascending distances, does the same).
    """
    counts = curve(cosines, same)
    index = int(counts.correct.argmax())
    return float(counts.thresholds[index]), int(counts.correct[index])


def accuracy_at(threshold: float, cosines: np.ndarray, same: np.ndarray) -> float:
    """Share of pairs that the threshold answers correctly; NaN cosines are wrong answers."""
    accepted = worst_scores(cosines, same) >= threshold
    return float(np.mean(accepted == same))


def k_fold(cosines: np.ndarray, same: np.ndarray, fold_of: np.ndarray) -> list[Fold]:
    """Each fold's accuracy with the threshold that is best on all other folds together. Empty for a single fold."""
    numbers = np.unique(fold_of)
    if len(numbers) < 2:
        return []
    folds = []
    for number in numbers:
        held_out = fold_of == number
        threshold, _ = best_threshold(cosines[~held_out], same[~held_out])
        accuracy = accuracy_at(threshold, cosines[held_out], same[held_out])
        genuine = int(same[held_out].sum())
        folds.append(Fold(accuracy, threshold, genuine, int(held_out.sum()) - genuine))
    return folds


def _folds_of_one_kind(same: np.ndarray, fold_of: np.ndarray) -> tuple[int, int]:
    """How many folds hold pairs of one kind only, and how many folds there are."""
    _, position = np.unique(fold_of, return_inverse=True)
    sizes, genuine = np.bincount(position), np.bincount(position[same], minlength=position.max() + 1)
    return int(((genuine == 0) | (genuine == sizes)).sum()), len(sizes)


def area_under_curve(counts: Curve) -> float:
    """Area under the ROC: the probability that a genuine pair has the larger cosine, ties counting half."""
    far, tar = _whole_curve(counts)
    return float(np.trapezoid(tar, far))


def equal_error_rate(counts: Curve) -> float:
    """Where false accept and false reject rate meet, on the straight line between the curve's two nearest points."""
    far, tar = _whole_curve(counts)
    surplus = far + tar - 1  # false accept minus false reject rate: -1 at the start, 1 at the end, never falling
    after = int(np.argmax(surplus >= 0))
    rise = surplus[after] - surplus[after - 1]
    share = -surplus[after - 1] / rise
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def _whole_curve(counts: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The ROC's corners from (0, 0) to (1, 1), with the pairs at plus and minus infinity."""
    return np.concatenate([[0.0], counts.far, [1.0]]), np.concatenate([[0.0], counts.tar, [1.0]])


def operating_point(counts: Curve, far: float) -> OperatingPoint:
    """TAR at a false accept rate of at most `far`; not resolved with fewer than 1 / far impostor pairs."""
    allowed = int(np.floor(far * counts.impostors * (1 + 1e-12)))  # 0.001 * 3000 has to be 3
    within = counts.false_accepts <= allowed
    if allowed < 1 or not counts.genuine or not within.any():
        return OperatingPoint(far, False, counts.impostors)
    index = int(np.flatnonzero(within)[-1])
    accepts = int(counts.false_accepts[index]), int(counts.true_accepts[index])
    return _resolved_point(far, *accepts, counts.impostors, counts.genuine, float(counts.thresholds[index]))


def point_at(genuine: np.ndarray, impostor: np.ndarray, far: float) -> OperatingPoint:
    """`operating_point` for millions of pairs: from the scores of both kinds, each sorted, the largest first.

    Pairs that are wrong in any case have infinite scores, as `worst_scores` gives them.
    """
    allowed = int(np.floor(far * len(impostor) * (1 + 1e-12)))
    bound = impostor[allowed] if allowed < len(impostor) else -np.inf  # accepted is what exceeds it
    if allowed < 1 or not len(genuine) or bound == np.inf:
        return OperatingPoint(far, False, len(impostor))
    false_accepts, true_accepts = (
        len(scores) - int(np.searchsorted(scores[::-1], bound, "right")) for scores in (impostor, genuine)
    )
    least = [scores[count - 1] for scores, count in ((impostor, false_accepts), (genuine, true_accepts)) if count]
    least = [score for score in least if score < np.inf]
    threshold = _between(bound, min(least)) if least else ACCEPT_NOTHING
    return _resolved_point(far, false_accepts, true_accepts, len(impostor), len(genuine), threshold)


def _between(low: float, high: float) -> float:
    """A threshold that accepts `high` and not `low`."""
    if low == -np.inf:
        return ACCEPT_ALL
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)  # neighbours in floating point have no middle


def _resolved_point(
    far: float, false_accepts: int, true_accepts: int, impostors: int, genuine: int, threshold: float
) -> OperatingPoint:
    return OperatingPoint(
        far=far,
        resolved=True,
        impostors=impostors,
        false_accepts=false_accepts,
        threshold=threshold,
        tar=true_accepts / genuine,
        far_interval=binomial_interval(false_accepts, impostors),
        tar_interval=binomial_interval(true_accepts, genuine),
    )


def binomial_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a rate (Biometrika 26, 1934)."""
    tail = (1 - confidence) / 2
    low = special.betaincinv(successes, trials - successes + 1, tail) if successes > 0 else 0.0
    high = special.betaincinv(successes + 1, trials - successes, 1 - tail) if successes < trials else 1.0
    return float(low), float(high)


def evaluate(
    cosines: np.ndarray,
    same: np.ndarray,
    fold_of: np.ndarray,
    *,
    name: str = "",
    far_levels: Sequence[float] = FAR_LEVELS,
) -> VerificationResult:
    """All figures of P pairs: cosines float [P] in [-1, 1] (NaN: no face), same bool [P], fold_of int [P]."""
    if len(same) == 0 or np.isnan(cosines).all():
        raise InputError(f"{name}: no pair of which both crops are there")
    notes = []
    both_kinds = bool(same.any()) and not same.all()
    counts = curve(cosines, same)
    one_kind, numbers = _folds_of_one_kind(same, fold_of)
    mixed = both_kinds and 2 * one_kind <= numbers
    folds = k_fold(cosines, same, fold_of) if mixed else []
    best, correct = best_threshold(cosines, same)
    if not both_kinds:
        kind = "one person" if same.all() else "two persons"
        notes.append(f"all {len(same)} pairs are of {kind}: no accuracy, AUC, EER or TAR can be had from them")
    elif numbers < 2:
        notes.append("one fold only: there are no other folds to choose a threshold on")
    elif one_kind:
        what = "their accuracies are counted, but say little" if folds else "no accuracy over folds is given"
        notes.append(f"{one_kind} of {numbers} folds hold pairs of one kind only: {what}")
    scored = cosines[~np.isnan(cosines)]
    if len(scored) > 1 and np.ptp(scored) < SAME_COSINE:
        notes.append(
            "all pairs have one and the same cosine: the model gives one feature for every crop (a training that "
            "collapsed, or input in a range it was not made for; see doctor.py)"
        )
    points = [operating_point(counts, far) for far in far_levels] if both_kinds else []
    notes += [_unresolved(point) for point in points if not point.resolved]
    accuracies = [fold.accuracy for fold in folds]
    return VerificationResult(
        set_name=name,
        cosines=cosines,
        same=same,
        fold_of=fold_of,
        folds=folds,
        kfold_mean=float(np.mean(accuracies)) if folds else None,
        kfold_std=float(np.std(accuracies)) if folds else None,
        best_accuracy=correct / len(same) if both_kinds else None,
        best_threshold=best if both_kinds else None,
        auc=area_under_curve(counts) if both_kinds else None,
        eer=equal_error_rate(counts) if both_kinds else None,
        points=points,
        notes=notes,
    )


def _unresolved(point: OperatingPoint) -> str:
    needed = int(np.ceil(1 / point.far))
    if point.impostors >= needed:
        return f"FAR {point.far:g}: pairs without a face alone are more false accepts than that"
    return f"FAR {point.far:g}: {point.impostors} impostor pairs cannot resolve it; it takes at least {needed}"
