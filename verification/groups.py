"""Does a model fail some people more than others? Error rates by group, at one threshold for everybody.

The false match rate (FMR) of a group is the share of pairs of two of its people that are accepted, the false non-match
rate (FNMR) the share of pairs of one person that are rejected (Grother, Ngan and Hanaoka, "Face Recognition Vendor Test
part 3: demographic effects", NISTIR 8280, 2019). Pairs of two groups are counted apart, because people of two groups
are easier to tell from each other.

Intervals are by person (`intervals`). The ratio of the two groups that differ most is given with the probability that
groups differ as much or more by chance: rates are compared as arcsin sqrt(rate), in which an interval has about the
same width everywhere; the largest studentised difference is compared with that of groups of equal rates and intervals
as wide as these. So it is allowed for that one looks for the largest of many differences. Groups are taken to have no
person in common, which holds for what people are and not for what photos are; a note says so where it does not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects

import plotting
from utils import InputError
from verification.intervals import Interval, pair_intervals
from verification.metrics import VerificationResult, binomial_interval, threshold_json, to_angle, worst_scores

FEW = 30  # fewer pairs, or false accepts behind a threshold, say nothing of a rate
FEW_PEOPLE = 5  # fewer cannot be drawn again in many ways
SIMULATIONS = 20_000
MOST_GROUPS = 40
ACROSS = "across groups"
_HEAD = 46  # characters above half a figure


@dataclass(frozen=True)
class Rate:
    """Share of errors among pairs of one kind, with its intervals by person and by pairs."""

    errors: int
    pairs: int
    by_person: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "errors": self.errors,
            "pairs": self.pairs,
            "rate": self.errors / self.pairs if self.pairs else None,
            "interval_95": binomial_interval(self.errors, self.pairs) if self.pairs else None,
            "by_identity": None if self.by_person is None else self.by_person.to_json(),
        }


@dataclass(frozen=True)
class Group:
    """One group, or the pairs of two different ones."""

    name: str
    fmr: Rate
    fnmr: Rate


@dataclass(frozen=True)
class Spread:
    """The two groups whose rates differ most beyond chance; `worst` has the higher one. One group twice: none.

    ratio: None where the lower rate is zero. p: how often groups that do not differ look as different as these, or
    more.
    """

    worst: str
    best: str
    ratio: float | None
    p: float

    def sentence(self, what: str) -> str:
        """What it says, for people."""
        if self.worst == self.best:
            return f"{what}: the same for all groups"
        times = "while that of the latter is zero" if self.ratio is None else f"by a factor of {self.ratio:.2g}"
        chance = "more than chance" if self.p < 0.05 else "no more than chance can do"
        return f"{what}: {self.worst} above {self.best}, {times} (p = {self.p:.2g}: {chance})"


@dataclass(frozen=True)
class Groups:
    """Figures by group at one threshold (cosine). `pairs_across`: FMR of each two groups, by their names."""

    column: str
    threshold: float
    chosen: str
    groups: list[Group]
    across: Group
    pairs_across: dict[tuple[str, str], Rate]
    unknown: int
    fmr_spread: Spread | None
    fnmr_spread: Spread | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "column": self.column,
            "threshold": threshold_json(self.threshold),
            "threshold_chosen": self.chosen,
            "groups": [
                {"name": group.name, "fmr": group.fmr.to_json(), "fnmr": group.fnmr.to_json()}
                for group in [*self.groups, self.across]
            ],
            "fmr_across": [{"groups": list(names), **rate.to_json()} for names, rate in self.pairs_across.items()],
            "pairs_of_unknown_group": self.unknown,
            **{
                name: None if spread is None else {**spread.__dict__, "sentence": spread.sentence(what)}
                for name, what, spread in (
                    ("largest_fmr_ratio", "False match rate", self.fmr_spread),
                    ("largest_fnmr_ratio", "False non-match rate", self.fnmr_spread),
                )
            },
            "notes": self.notes,
        }


def choose_threshold(result: VerificationResult, angle: float | None) -> tuple[float, str]:
    """The threshold as cosine, and how it was chosen: given in degrees; else that of the smallest FAR with `FEW` false
    accepts; else the one that answers most pairs correctly. InputError for pairs of one kind only."""
    if angle is not None:
        return float(np.cos(np.radians(angle))), f"given, {angle:g} degrees"
    if result.best_threshold is None:
        raise InputError(f"{result.set_name}: no threshold can be chosen on pairs of one kind; give --threshold")
    usable = [point for point in result.points if point.resolved and (point.false_accepts or 0) >= FEW]
    point = min(usable, key=lambda point: point.far, default=None)
    if point is None or point.threshold is None:
        return result.best_threshold, "most pairs answered correctly, over all groups"
    return point.threshold, f"FAR {point.far:g} over all pairs"


def by_group(
    result: VerificationResult,
    sides: np.ndarray | None,
    column: str,
    values: Sequence[tuple[str, str]],
    angle: float | None = None,
    seed: int = 0,
) -> Groups:
    """Error rates by group. `sides` int64 [P, 2]: who is on each side of each pair, None where nobody knows (then there
    are no intervals by person); `values`: the groups of both photos of each pair, "" for unknown."""
    threshold, chosen = choose_threshold(result, angle)
    first, second = (np.array([value[side].strip() for value in values]) for side in (0, 1))
    known = (first != "") & (second != "")
    names = sorted(set(first[known].tolist()) | set(second[known].tolist()), key=_order)
    if len(names) < 2:
        raise InputError(f"{result.set_name}: column {column} tells no groups apart (its values: {names or 'none'})")
    if len(names) > MOST_GROUPS:
        raise InputError(f"{result.set_name}: column {column} has {len(names)} values, more than {MOST_GROUPS}")
    wrong = (worst_scores(result.cosines, result.same) >= threshold) != result.same

    def rate(chosen_pairs: np.ndarray) -> Rate:
        errors, count = int(wrong[chosen_pairs].sum()), int(chosen_pairs.sum())
        if not count or sides is None or len(np.unique(sides[chosen_pairs])) < FEW_PEOPLE:
            return Rate(errors, count, None)
        found = pair_intervals(
            result.cosines[chosen_pairs], result.same[chosen_pairs], sides[chosen_pairs],
            correct=wrong[chosen_pairs], seed=seed,
        )  # fmt: skip
        return Rate(errors, count, found.accuracy)

    def group(name: str, inside: np.ndarray) -> Group:
        return Group(name, rate(inside & ~result.same), rate(inside & result.same))

    within = known & (first == second)
    groups = [group(name, within & (first == name)) for name in names]
    pairs_across = {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            between = ((first == one) & (second == other)) | ((first == other) & (second == one))
            if (between & ~result.same).any():
                pairs_across[one, other] = rate(between & ~result.same)
    notes = []
    for what, kind in (("two people", "fmr"), ("one person", "fnmr")):
        few = [group.name for group in groups if getattr(group, kind).pairs < FEW]
        if few:
            notes.append(f"fewer than {FEW} pairs of {what}, so rates that say little: {', '.join(few)}")
    if sides is None:
        notes.append("nobody knows who is in the pairs: no intervals by person, and no test")
    elif _shared(sides, first, second):
        notes.append(f"some people are in several groups of {column}: the test takes groups as having nobody in common")
    return Groups(
        column=column,
        threshold=threshold,
        chosen=chosen,
        groups=groups,
        across=group(ACROSS, known & (first != second)),
        pairs_across=pairs_across,
        unknown=int((~known).sum()),
        fmr_spread=_spread([(g.name, g.fmr) for g in groups], seed),
        fnmr_spread=_spread([(g.name, g.fnmr) for g in groups], seed),
        notes=notes,
    )


def _order(name: str) -> tuple[float, bool, str]:
    """Ranges of numbers by their lower ends, other names behind them by the alphabet."""
    found = re.match(r"(under )?(-?[0-9.]+(e[+-]?[0-9]+)?)( |$)", name)
    return (float(found[2]), found[1] is None, name) if found else (np.inf, True, name)


def _shared(sides: np.ndarray, first: np.ndarray, second: np.ndarray) -> bool:
    people, values = sides.T.ravel(), np.concatenate([first, second])
    return len(set(zip(people.tolist(), values.tolist(), strict=True))) > len(np.unique(people))


def _spread(rates: Sequence[tuple[str, Rate]], seed: int) -> Spread | None:
    """The two that differ most, and how often chance does as much; None with fewer than two with pairs and people."""
    usable = [(name, rate, rate.by_person) for name, rate in rates if rate.pairs >= FEW and rate.by_person is not None]
    if len(usable) < 2:
        return None
    value = np.array([rate.errors / rate.pairs for _, rate, _ in usable])
    ends = np.array([(by.low, by.high) for _, _, by in usable])
    place = np.arcsin(np.sqrt(value))
    # Half the width of a 95 % interval is 1.96 standard deviations.
    deviation = np.maximum(np.diff(np.arcsin(np.sqrt(ends)), axis=1)[:, 0] / 3.92, 1e-9)
    drawn = np.random.default_rng(seed).normal(size=(SIMULATIONS, len(usable))) * deviation
    chance, seen = _largest_difference(drawn, deviation), _largest_difference(place[None], deviation)[0]
    # The two that differ most beyond chance, of which p speaks; a group with few pairs may have a higher rate still.
    differences = np.abs(place[:, None] - place) / np.hypot(deviation[:, None], deviation)
    low, high = sorted(np.unravel_index(int(differences.argmax()), differences.shape), key=lambda k: value[k])
    return Spread(
        worst=usable[high][0],
        best=usable[low][0],
        ratio=float(value[high] / value[low]) if value[low] > 0 else (1.0 if value[high] == 0 else None),
        p=float((1 + np.count_nonzero(chance >= seen)) / (SIMULATIONS + 1)),
    )


def _largest_difference(places: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The largest studentised difference of any two columns: [n, g] -> [n]."""
    largest = np.zeros(len(places))
    for i in range(len(deviation)):
        spread = np.sqrt(deviation[i] ** 2 + deviation**2)
        largest = np.maximum(largest, (np.abs(places - places[:, i : i + 1]) / spread).max(axis=1))
    return largest


# --- what a person sees ---------------------------------------------------------------------------------------------


def table(found: Groups) -> str:
    """The figures as text."""
    rows = [("", "pairs", "FMR", "95 % by person", "pairs", "FNMR", "95 % by person")]
    for group in [*found.groups, found.across]:
        rows.append((group.name, *_cells(group.fmr), *_cells(group.fnmr)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"By {found.column}, at cosine {found.threshold:.4f} ({float(to_angle(found.threshold)):.1f}°; {found.chosen})"
    ]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for what, spread in (("False match rate", found.fmr_spread), ("False non-match rate", found.fnmr_spread)):
        lines += [spread.sentence(what)] if spread is not None else []
    if found.unknown:
        lines.append(f"{found.unknown} pairs with a photo of unknown {found.column} are left out")
    return "\n".join([*lines, *found.notes])


def _cells(rate: Rate) -> tuple[str, str, str]:
    if not rate.pairs:
        return "0", "-", "-"
    by = rate.by_person
    span = "-" if by is None else f"{100 * by.low:.3g} ... {100 * by.high:.3g} %"
    return f"{rate.pairs:,}", f"{100 * rate.errors / rate.pairs:.3g} %", span


def draw(path: Path, found: Groups, subject: str) -> None:
    """Both rates of all groups as dots with their intervals by person, the worst of each kind in red."""
    shown = [*found.groups, found.across]
    with plotting.drawing(path, 9, 1.7 + 0.34 * len(shown)) as figure:
        axes_of = figure.subplots(1, 2, sharey=True)
        for axes, kind, label in zip(
            axes_of, ("fmr", "fnmr"), ("false match rate", "false non-match rate"), strict=True
        ):
            rates = [getattr(group, kind) for group in shown]
            highest = max((r.errors / r.pairs for r in rates[:-1] if r.pairs), default=0)
            total = sum(r.errors for r in rates) / max(sum(r.pairs for r in rates), 1)
            for row, rate in enumerate(rates):
                if not rate.pairs:
                    axes.annotate("no pairs", (0, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
                    continue
                value = rate.errors / rate.pairs
                last = row == len(shown) - 1
                colour = plotting.BLACK if last else plotting.RED if value == highest > 0 else plotting.BLUE
                if rate.by_person is not None:
                    axes.plot(
                        [rate.by_person.low, rate.by_person.high], [row, row], color=colour, linewidth=2.5, alpha=0.4
                    )
                axes.plot(value, row, "o", color=colour)
                axes.annotate(
                    f"{100 * value:.3g} %",
                    (value, row),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],  # over the dashed line
                )
            axes.axvline(total, color=plotting.BLACK, linestyle="--", linewidth=0.8, zorder=0.9)
            axes.set_xlim(left=min(0, axes.get_xlim()[0]))
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axes.set_xlabel(f"{label} (dashed: all pairs)")
            spread: Spread | None = getattr(found, f"{kind}_spread")
            said = "too few pairs to compare" if spread is None else (
                f"{'differ' if spread.p < 0.05 else 'no proven difference'} (p = {spread.p:.2g})"
            )  # fmt: skip
            where = f"by {found.column}, at {float(to_angle(found.threshold)):.1f}°"
            head = subject if kind == "fmr" else where
            plotting.title(axes, head if len(head) <= _HEAD else head[: _HEAD - 1] + "…", said)
        axes_of[0].set_yticks(range(len(shown)), [group.name[:28] for group in shown])
        axes_of[0].set_ylim(len(shown) - 0.4, -0.7)
