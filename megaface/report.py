"""What is said about a challenge: counts before figures, raw and cleaned side by side, and a sheet of the misses.

No figure stands without the numbers of probes, distractors and pairs that it was computed from. Verification rates are
given twice: from the full curve, and as they would be read off the points that the devkit writes, which keep only rises
of 0.01 and can therefore lie that much lower.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

import plotting
import utils
from cropping.photos import PhotoError, read_crop
from megaface.noise import Entrants
from megaface.participants import Side
from megaface.protocol import Identification
from verification.intervals import rate_interval


@dataclass(frozen=True)
class Outcome:
    """One result with all that a report says about it."""

    entrants: Entrants
    result: Identification
    noisy_probes: int  # of all probes
    noisy_distractors: int  # of those before the next that would take part
    missing_distractors: int  # of those that take part

    @property
    def name(self) -> str:
        """What tells it apart from the others of one report."""
        return f"{self.entrants.treatment}, {self.result.distractors:,} distractors"

    def at_far(self, far: float) -> dict[str, Any]:
        """The verification rate at a false accept rate, both ways; `resolved`: one impostor is less than that rate."""
        roc = self.result.roc
        rates, values = roc.subsampled()
        below = int(np.searchsorted(rates, np.float32(far), side="right"))
        return {
            "far": far,
            "rate": roc.rate_at(far),
            "as_the_devkit_writes_it": float(values[below - 1]) if below else 0.0,
            "resolved": far * roc.impostors >= 1,
        }

    def _interval(self, rank: int) -> dict[str, Any]:
        """The interval of the identification rate by person: all pairs of a person are drawn together."""
        people = np.array(self.result.ids)[self.result.pairs[:, 0]]
        return rate_interval(self.result.ranks < rank, people).to_json()

    def to_json(self, far_levels: list[float]) -> dict[str, Any]:
        """Everything, ready for results.json."""
        result, entrants = self.result, self.entrants
        return {
            "noise": entrants.treatment,
            "size": result.size,
            "probes": len(result.ids),
            "identities": len(set(result.ids)),
            "distractors": result.distractors,
            "pairs": len(result.pairs),
            "noisy_probes": self.noisy_probes,
            "noisy_distractors": self.noisy_distractors,
            "probes_replaced_by_means": entrants.replaced,
            "missing_probes": int(entrants.absent.sum()),
            "missing_distractors": self.missing_distractors,
            "distractors_that_match_nothing": int(entrants.ignored[: result.distractors].sum()),
            "impostor_probes": result.impostor_probes,
            "impostor_scores": result.roc.impostors,
            "rank_1": result.rate_at_rank(1),
            "rank_10": result.rate_at_rank(10),
            "rank_1_by_identity": self._interval(1),
            "rank_10_by_identity": self._interval(10),
            "verification": [self.at_far(far) for far in far_levels],
            "scores_recomputed_in_the_devkits_order": result.recomputed,
        }


def table(outcomes: list[Outcome], sides: tuple[Side, Side], far_levels: list[float]) -> str:
    """The report as text: a line for each outcome, raw and cleaned of one size next to each other."""
    head = ["distractors", "noise", "probes", "pairs", "noisy", "missing", "rank 1", "rank 10"]
    rows = [[*head, *(f"VR at FAR {far:g}" for far in far_levels)]]
    treatments = list(dict.fromkeys(outcome.entrants.treatment for outcome in outcomes))
    for outcome in sorted(outcomes, key=lambda o: (_position(o, outcomes), treatments.index(o.entrants.treatment))):
        rows.append(_cells(outcome, far_levels))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    heads = [_side_line(side, what) for side, what in zip(sides, ("probes", "distractors"), strict=True)]
    notes = [
        "noisy, missing: probes + distractors; a missing probe fails in every pair, a missing distractor matches none.",
        "VR: verification rate from the full curve (in brackets: as the devkit writes it, in steps of 0.01).",
        "*: there are too few impostor scores for this rate, none of them is accepted.",
    ]
    return "\n".join([*heads, "", *lines, "", *notes])


def _position(outcome: Outcome, outcomes: list[Outcome]) -> int:
    """Which size of its treatment this is: exclusion makes the largest a little smaller."""
    return [o for o in outcomes if o.entrants.treatment == outcome.entrants.treatment].index(outcome)


def _cells(outcome: Outcome, far_levels: list[float]) -> list[str]:
    result, entrants = outcome.result, outcome.entrants
    points = [outcome.at_far(far) for far in far_levels]
    return [
        f"{result.distractors:,}",
        entrants.treatment,
        f"{len(result.ids):,}",
        f"{len(result.pairs):,}",
        f"{outcome.noisy_probes:,} + {outcome.noisy_distractors:,}",
        f"{int(entrants.absent.sum()):,} + {outcome.missing_distractors:,}",
        utils.percent(result.rate_at_rank(1)),
        utils.percent(result.rate_at_rank(10)),
        *map(_rate_cell, points),
    ]


def _rate_cell(point: dict[str, Any]) -> str:
    star = "" if point["resolved"] else "*"
    return f"{utils.percent(point['rate'])} ({utils.percent(point['as_the_devkit_writes_it'])}){star}"


def _side_line(side: Side, what: str) -> str:
    parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in side.counts().items() if count]
    if side.reasons:
        parts.append(f"{len(side.reasons):,} without a crop")
    line = f"{len(side):,} {what}: {', '.join(parts)}"
    if side.annotations_only:
        line += f" (and {side.annotations_only:,} annotations without a photo, which are no probes)"
    return line


# ---------------------------------------------------------------------------------------------- misses

_CELL, _GAP, _MARGIN, _HEAD = 112, 6, 22, 84  # pixels
_SIZE, _LINE = 11, 15  # of the names below the crops


@dataclass(frozen=True)
class Miss:
    """A probe whose mate is beaten by a distractor."""

    probe: int  # numbers among the entrants
    mate: int
    winner: int
    rank: int
    score: float
    winning_score: float


def worst_misses(result: Identification, most: int) -> list[Miss]:
    """The pairs that lose by most to the best distractor, worst first; no probe, no mate and no pair is shown twice."""
    probe, mate = result.pairs.T
    lost = np.flatnonzero((result.ranks > 0) & np.isfinite(result.scores))
    margin = result.best_score[probe[lost], 0].astype(np.float64) - result.scores[lost]
    misses: list[Miss] = []
    probes, mates = set(), set()
    pairs: set[frozenset[int]] = set()
    for k in lost[np.argsort(-margin, kind="stable")]:
        a, b = int(probe[k]), int(mate[k])
        if len(misses) < most and a not in probes and b not in mates and frozenset((a, b)) not in pairs:
            scores = float(result.scores[k]), float(result.best_score[a, 0])
            misses.append(Miss(a, b, int(result.best_index[a, 0]), int(result.ranks[k]), *scores))
            pairs.add(frozenset((a, b)))
            probes.add(a)
            mates.add(b)
    return misses


def misses_sheet(outcome: Outcome, probes: Side, distractors: Side, model: str, most: int) -> Image.Image:
    """Probe, mate and the distractor that won, for the worst misses; scores as cosines (embeddings have length 1)."""
    misses = worst_misses(outcome.result, most)
    across = 2 if len(misses) > 3 else 1
    tile = 3 * _CELL + 2 * _GAP
    captions = [_captions(miss, outcome.entrants, probes, distractors, tile) for miss in misses]
    lines = [sum(len(text) for text, _ in some) for some in captions]
    heights = [_CELL + _LINE * (max(lines[start : start + across]) + 1) + 20 for start in range(0, len(misses), across)]
    width = max(across * (tile + _MARGIN) + _MARGIN, 560)
    sheet = Image.new("RGB", (width, _HEAD + max(sum(heights), _CELL) + _MARGIN), "white")
    lost = int((outcome.result.ranks > 0).sum())
    width = sheet.width - 2 * _MARGIN
    plotting.draw_text(sheet, (_MARGIN, 12), f"{model}: {outcome.name}", size=17, bold=True, width=width)
    said = f"{lost:,} of {len(outcome.result.pairs):,} pairs are missed at rank 1"
    plotting.draw_text(sheet, (_MARGIN, 40), said, size=14, width=width)
    if misses:
        said = f"the worst {len(misses)}: probe, mate, winner; numbers are cosines to the probe"
        plotting.draw_text(sheet, (_MARGIN, 60), said, size=13, width=width)
    for number, miss in enumerate(misses):
        x = _MARGIN + number % across * (tile + _MARGIN)
        y = _HEAD + sum(heights[: number // across])
        _paste_miss(sheet, (x, y), miss, outcome.entrants, probes, distractors)
        below = y + _CELL + _LINE + 3
        for text, colour in captions[number]:
            for line in text:
                plotting.draw_text(sheet, (x, below), line, size=_SIZE, colour=colour)
                below += _LINE
    return sheet


_Place = tuple[Side, int, str]  # a side, one of its rows, and the colour in which it is spoken of


def _places(miss: Miss, entrants: Entrants, probes: Side, distractors: Side) -> list[_Place]:
    return [
        (probes, int(entrants.probe_rows[miss.probe]), "black"),
        (probes, int(entrants.probe_rows[miss.mate]), plotting.BLUE),
        (distractors, int(entrants.distractor_rows[miss.winner]), plotting.RED),
    ]


def _captions(
    miss: Miss, entrants: Entrants, probes: Side, distractors: Side, width: int
) -> list[tuple[list[str], str]]:
    """The whole names of probe, mate and winner in lines of `width` pixels, and their colours."""
    places = _places(miss, entrants, probes, distractors)
    return [(_wrapped(side.names[row], width), colour) for side, row, colour in places]


def _wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, broken anywhere: names of files have no better places."""
    font, lines = plotting.font(_SIZE), [""]
    for character in " ".join(text.split()):
        if lines[-1] and font.getlength(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines


def _paste_miss(
    sheet: Image.Image, xy: tuple[int, int], miss: Miss, entrants: Entrants, probes: Side, distractors: Side
) -> None:
    x, y = xy
    texts = ["", f"{_cosine(miss.score):.3f}, rank {miss.rank + 1:,}", f"{_cosine(miss.winning_score):.3f}"]
    places = _places(miss, entrants, probes, distractors)
    for column, ((side, row, colour), text) in enumerate(zip(places, texts, strict=True)):
        left = x + column * (_CELL + _GAP)
        sheet.paste(_crop(side, row), (left, y))
        plotting.draw_text(sheet, (left, y + _CELL + 3), text, size=_SIZE, width=_CELL, colour=colour)


def _cosine(score: float) -> float:
    return 1 + score / 2


def _crop(side: Side, row: int) -> Image.Image:
    file = side.files[row]
    try:
        if file is not None:
            return plotting.fit(read_crop(side.folder / file), _CELL)
    except (PhotoError, ValueError):  # it was readable a moment ago
        pass
    return Image.new("RGB", (_CELL, _CELL), "#eeeeee")  # a noisy probe that became a mean has no crop of its own
