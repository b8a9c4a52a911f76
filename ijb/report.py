"""What a person sees of IJB: a table with both columns, a results.json, and the ROC of the usual treatment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import plotting
import utils
from ijb.lists import Lists
from ijb.one_to_many import CURVE, RANKS, Gallery, Identification
from ijb.one_to_one import Verification
from ijb.templates import USUAL, Templates
from verification.intervals import Interval
from verification.metrics import OperatingPoint

LISTED = 1000  # images that results.json names before it only counts
SHOWN = 5  # that the table names


def one_to_one_json(results: Sequence[Verification]) -> dict[str, Any]:
    """All treatments, by name."""
    return {
        result.treatment.name: {
            "as_printed": {f"{far:g}": tar for far, tar in result.printed.items()} | {"auc": result.area},
            "far_not_exceeded": [
                point.to_json()
                | {
                    "tar_interval_95_by_identity": _bounds(result.by_identity.get(point.far))
                    if point.resolved
                    else None
                }
                for point in result.points
            ],
        }
        for result in results
    }


def one_to_many_json(result: Identification) -> dict[str, Any]:
    """Both galleries and their mean, each as printed and as measured."""
    return {
        "treatment": USUAL.name,
        **{gallery.name: _gallery_json(gallery) for gallery in result.galleries},
        "as_printed": {
            **{f"top{rank}": share for rank, share in result.printed.items()},
            "mean_tpir": {f"{fpir:g}": result.printed_tpir[fpir] for fpir in CURVE[::25]},
        },
        "of_mated_probes": {f"rank_{rank}": _rate_json(rate) for rank, rate in result.rates.items()},
    }


def _gallery_json(gallery: Gallery) -> dict[str, Any]:
    return {
        "gallery": gallery.size,
        "probes": gallery.probes,
        "mated_probes": gallery.mated,
        "as_printed": {
            **{f"top{rank}": gallery.hits[rank] for rank in RANKS},
            "tpir": {f"{fpir:g}": gallery.printed[fpir] for fpir in CURVE[::25]},
            "threshold": {f"{fpir:g}": _finite(gallery.thresholds[fpir]) for fpir in CURVE[::25]},
        },
        "of_mated_probes": {f"rank_{rank}": _rate_json(rate) for rank, rate in gallery.rates.items()},
        "fpir_not_exceeded": [
            {
                "fpir": found.fpir,
                "resolved": found.tpir is not None,
                "probes_without_mate": found.others,
                "false_alarms": found.false_alarms,
                "tpir": found.tpir,
                "tpir_interval_95": found.binomial,
                "tpir_interval_95_by_identity": _bounds(found.by_identity),
                "threshold": None if found.threshold is None else _finite(found.threshold),
            }
            for found in gallery.detections
        ],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _rate_json(rate: Interval | None) -> dict[str, Any] | None:
    return None if rate is None else rate.to_json()


def lists_json(lists: Lists) -> dict[str, Any]:
    """What was measured on, with a hash of every list that is there."""
    files = sorted(lists.meta.glob(f"{lists.prefix}_*"))
    return {
        "meta": str(lists.meta),
        "sha256": {file.name: utils.sha256_of(file) for file in files if file.suffix in (".txt", ".csv")},
        "images": len(lists.images),
        "templates": len(np.unique(lists.templates)),
        "medias": len(np.unique(lists.medias)),
    }


def missing_json(lists: Lists, templates: Templates, gone: dict[int, str], zeros: int) -> dict[str, Any]:
    """How many images have no feature, their names with the reasons, and the templates that have lost all of theirs;
    and how many have a feature of zeros."""
    lost = templates.numbers[templates.lost].tolist()
    return {
        "images": len(gone),
        "of": len(lists.images),
        "reasons": [gone[number] for number in sorted(gone)[:LISTED]],
        "lost_templates": len(lost),
        "lost_template_numbers": lost[:LISTED],
        "zero_features": zeros,
    }


# --- text -----------------------------------------------------------------------------------------------------------


def table(
    lists: Lists,
    missing: dict[str, Any],
    verifications: Sequence[Verification],
    identification: Identification | None,
) -> str:
    """All figures as text, both columns; what is missing below."""
    lines: list[str] = []
    if verifications:
        pairs = verifications[0].points[0].impostors
        lines += [f"{lists.subset} 1:1, {pairs} impostor pairs. TAR in % as public code prints it (nearest FAR):"]
        lines += _grid(verifications, lambda result, far: f"{100 * result.printed[far]:.2f}")
        lines += ["", "TAR in % where FAR is not exceeded (-: too few impostor pairs):"]
        lines += _grid(verifications, lambda result, far: _tar(_point(result, far)))
        lines += ["", f"{USUAL.name} with intervals of 95 %: over pairs, by person; FAR and pairs accepted:"]
        usual = next(result for result in verifications if result.treatment == USUAL)
        lines += [_point_line(point, usual.by_identity.get(point.far)) for point in usual.points]
    if identification is not None:
        lines += ([""] if lines else []) + _identification_lines(lists, identification)
    if missing["images"]:
        lost = missing["lost_templates"]
        lines += ["", f"{missing['images']} of {missing['of']} images have no feature; {lost} templates have none left"]
        lines += [f"  {reason}" for reason in missing["reasons"][:SHOWN]]
        lines += ["  ..."] if missing["images"] > SHOWN else []
    if missing["zero_features"]:
        count = f"{missing['zero_features']} of {missing['of']} images"
        lines += ["", f"{count} have a feature of zeros, which counts in its template, as in public code"]
    return "\n".join(lines)


def _grid(results: Sequence[Verification], cell: Any) -> list[str]:
    levels = list(results[0].printed)
    head = "  treatment" + "".join(f"{f'{far:g}':>9}" for far in levels)
    return [head] + [f"  {r.treatment.name:9}" + "".join(f"{cell(r, far):>9}" for far in levels) for r in results]


def _point(result: Verification, far: float) -> OperatingPoint:
    return next(point for point in result.points if point.far == far)


def _tar(point: OperatingPoint) -> str:
    return utils.percent(point.tar, "")


def _range(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{100 * bounds[0]:.2f} ... {100 * bounds[1]:.2f}"


def _point_line(point: OperatingPoint, interval: Interval | None) -> str:
    if point.tar is None:
        return f"  FAR {point.far:<7g} not resolved by {point.impostors} impostor pairs"
    person = _range(None if interval is None else (interval.low, interval.high))
    return (
        f"  FAR {point.far:<7g} {utils.percent(point.tar):>8}   {_range(point.tar_interval):>17}   {person:>17}   "
        f"{point.false_accepts} of {point.impostors}"
    )


def _identification_lines(lists: Lists, result: Identification) -> list[str]:
    lines = [f"{lists.subset} 1:N, {USUAL.name}. In %; as public code prints it | over mated probes, 95 % by person:"]
    for rank in RANKS:
        rate = result.rates[rank]
        measured = "-" if rate is None else f"{utils.percent(rate.value, '')} ({_range((rate.low, rate.high))})"
        lines.append(f"  rank-{rank:<3} {100 * result.printed[rank]:7.2f} | {measured}")
    for fpir in (1e-2, 1e-1):
        printed = result.printed_tpir[min(CURVE, key=lambda point: abs(point - fpir))]
        cells = []
        for gallery in result.galleries:
            found = next(one for one in gallery.detections if one.fpir == fpir)
            bounds = None if found.by_identity is None else (found.by_identity.low, found.by_identity.high)
            value = "-" if found.tpir is None else f"{utils.percent(found.tpir, '')} ({_range(bounds)})"
            cells.append(f"{gallery.name} {value}")
        lines.append(f"  TPIR at FPIR {fpir:<5g} {100 * printed:7.2f} | not exceeded: {', '.join(cells)}")
    sizes = ", ".join(f"{g.name}: {g.size} people, {g.mated} of {g.probes} probes mated" for g in result.galleries)
    return [*lines, f"  {sizes}"]


def draw_roc(path: Path, lists: Lists, scores: np.ndarray, same: np.ndarray, result: Verification, model: str) -> None:
    """TAR over FAR of one treatment, with the points as printed and where FAR is not exceeded."""
    impostor, genuine = np.sort(scores[~same]), np.sort(scores[same])
    lowest = 10.0 ** np.floor(np.log10(1 / len(impostor)))
    counts = np.unique(np.geomspace(1, len(impostor), 400).astype(int))
    thresholds = impostor[len(impostor) - counts]
    tar = 1 - np.searchsorted(genuine, thresholds, "right") / len(genuine)
    with plotting.drawing(path, 7, 5) as figure:
        axes = figure.add_subplot(xlabel="false accept rate", ylabel="true accept rate")
        axes.plot(np.maximum((counts - 1) / len(impostor), lowest), tar, color=plotting.BLUE)
        plotting.log_rate_axis(axes, lowest)
        axes.plot(list(result.printed), list(result.printed.values()), "x", color=plotting.ORANGE, label="as printed")
        resolved = [point for point in result.points if point.resolved]
        for point in resolved:
            interval = result.by_identity.get(point.far)
            if interval is not None:
                axes.plot([point.far] * 2, [interval.low, interval.high], color=plotting.RED, linewidth=1)
        fars, tars = [point.far for point in resolved], [point.tar or 0.0 for point in resolved]
        axes.plot(fars, tars, "o", color=plotting.RED, label="FAR not exceeded, 95 % by person", markersize=4)
        bottom = plotting.rate_floor(float(min([*result.printed.values(), *(tar[tar > 0] if tar.any() else [0.0])])))
        axes.set_ylim(bottom, 1 + (1 - bottom) / 50)
        plotting.title(axes, f"{lists.subset} 1:1, {model}", f"{result.treatment.name}, {len(impostor)} impostor pairs")
        figure.legend(loc="outside lower center", ncols=2)
