"""The curves of Challenge 1: CMC over a logarithmic rank, ROC over a logarithmic false accept rate; PNG and SVG.

    python megaface/curves.py results/cmc_facescrub_megaface_r101_1000000_1.json --out curves
    python megaface/curves.py raw.json cleaned.json other.json --labels raw cleaned "other model" --out curves

FILES are cmc_*.json files, of the devkit or of this repository. They hold only points where a curve has risen by 0.01,
and nothing is said between them, so they are drawn as stairs that never promise more than the file. megaface_eval.py
draws the full curves, several treatments of noise in one figure.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a script from any folder

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import config
import plotting
import utils
from megaface.protocol import Identification
from options import parse
from utils import InputError

LOWEST_FAR = 1e-8  # no challenge resolves less: a hundred probes, a million distractors
HEIGHT, LINE = 4.6, 0.2  # inches: the figure, and each line of its legend
LONGEST_LABEL = 60  # characters that fit below the axes


@dataclass(frozen=True)
class Curves:
    """One result: stairs given by the points where they rise."""

    label: str
    ranks: np.ndarray  # 1 is best, ascending
    identification: np.ndarray  # share of pairs found at that rank or better
    false_accepts: np.ndarray  # rates, ascending
    verification: np.ndarray
    finest: float = 0.0  # the rate of a single impostor; 0 where that is not known

    @property
    def rank_1(self) -> float:
        """Share of pairs that no distractor beats."""
        return float(self.identification[0])


def from_result(result: Identification, label: str) -> Curves:
    """The full curves of a result."""
    rises = np.flatnonzero(np.diff(result.cmc, prepend=np.float32(-1)) > 0)
    ranks, rates = rises + 1, result.cmc[rises]
    accepts = result.roc.accepts / result.roc.impostors
    finest = 1 / result.roc.impostors
    return Curves(
        label, np.append(ranks, len(result.cmc)), np.append(rates, rates[-1]), accepts, result.roc.rates, finest
    )


def read_curves(path: Path, label: str) -> Curves:
    """The curves in a cmc_*.json; `InputError` naming the file when it is none."""
    try:
        content = utils.read_json(path)
        (ranks, identification), (accepts, verification) = (
            (np.array(axis, float) for axis in content[name]) for name in ("cmc", "roc")
        )
        axes = (ranks, identification, accepts, verification)
        if any(axis.ndim != 1 or not len(axis) or not np.isfinite(axis).all() for axis in axes):
            raise ValueError("empty or not numbers")
        if len(ranks) != len(identification) or len(accepts) != len(verification):
            raise ValueError("axes of different lengths")
        if any((np.diff(axis) < 0).any() or axis[0] < 0 for axis in axes) or max(axis[-1] for axis in axes[1:]) > 1:
            raise ValueError("ranks or rates that fall or are none")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a cmc_*.json of Challenge 1: {error!r}") from error
    return Curves(label, ranks + 1, identification, accepts, verification)


def draw(folder: Path, curves: Sequence[Curves], subject: str) -> None:
    """Write cmc.png, cmc.svg, roc.png and roc.svg with all curves; `subject` is the pictures' first line."""
    _draw_cmc(folder / "cmc", curves, subject)
    _draw_roc(folder / "roc", curves, subject)


def _draw_cmc(path: Path, curves: Sequence[Curves], subject: str) -> None:
    last = max(curve.ranks[-1] for curve in curves)
    with plotting.drawing(path, 7, HEIGHT + LINE * len(curves)) as figure:
        axes = figure.add_subplot(xlabel="rank", ylabel="identification rate (%)")
        for number, curve in enumerate(curves):
            label = f"{_label(curve.label)}: rank 1 {utils.percent(curve.rank_1)}"
            _stairs(axes, curve.ranks, curve.identification, label, number, left=1.0, right=last)
        axes.set_xscale("log")
        axes.set_xlim(1, max(last, 10))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
        _finish(axes, [curve.identification for curve in curves])
        plotting.title(axes, subject, "probability that a mate is among the first r")
        _legend(figure, axes)


def _draw_roc(path: Path, curves: Sequence[Curves], subject: str) -> None:
    smallest = min(curve.finest or _smallest(curve) for curve in curves)
    lowest = min(max(10 ** np.floor(np.log10(smallest)), LOWEST_FAR), 0.1)
    with plotting.drawing(path, 7, HEIGHT + LINE * len(curves)) as figure:
        axes = figure.add_subplot(xlabel="false accept rate", ylabel="verification rate (%)")
        for number, curve in enumerate(curves):
            _stairs(axes, curve.false_accepts, curve.verification, _label(curve.label), number, left=lowest, right=1.0)
        plotting.log_rate_axis(axes, lowest)
        unresolved = min(curve.finest for curve in curves)
        if unresolved > lowest * 1.001:
            axes.axvspan(lowest, unresolved, color="#eeeeee", label="finer than these impostors can tell")
        _finish(axes, [curve.verification[curve.false_accepts >= lowest] for curve in curves])
        plotting.title(axes, subject, "genuine pairs accepted; impostors: distractors of up to 100 probes")
        _legend(figure, axes)


def _smallest(curve: Curves) -> float:
    """The smallest false accept rate above zero that a curve speaks of."""
    positive = curve.false_accepts[curve.false_accepts > 0]
    return float(positive[0]) if len(positive) else 1.0


def _stairs(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, number: int, *, left: float, right: float) -> None:
    """A curve that holds each value until the next point. What lies left of the axis is drawn at its border."""
    x = np.append(np.maximum(x, left), right)
    axes.step(x, 100 * np.append(y, y[-1]), where="post", label=label, **plotting.line_style(number))


def _finish(axes: Axes, rates: Sequence[np.ndarray]) -> None:
    bottom = 100 * plotting.rate_floor(min((float(rate.min()) for rate in rates if len(rate)), default=0.0))
    axes.set_ylim(bottom, 100 + (100 - bottom) / 50)


def _legend(figure: Figure, axes: Axes) -> None:
    """All curves below the axes, also those whose labels begin with an underscore, which matplotlib would leave out."""
    lines = [*axes.get_lines(), *axes.patches]
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=1)


def _label(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


@utils.command
def main() -> None:
    """Read the files and draw them."""
    options = parse(config.MegafaceCurves, __doc__)
    labels = options.labels or [path.stem for path in options.files]
    if len(labels) != len(options.files):
        raise InputError(f"--labels: {len(labels)} labels for {len(options.files)} files")
    curves = [read_curves(path, label) for path, label in zip(options.files, labels, strict=True)]
    draw(options.out, curves, options.title)
    print(f"{options.out}: cmc.png, cmc.svg, roc.png, roc.svg")


if __name__ == "__main__":
    sys.exit(main())
