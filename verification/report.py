"""What a person sees of a verification: a table, a results.json, the list of wrong pairs and three pictures.

Every wrong pair is in the list; the sheet of pictures shows the worst of them and says how many there are.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from PIL import Image

import plotting
import utils
from cropping.photos import PhotoError, read_photo
from embedding import Embedder
from verification import scores
from verification.intervals import result_intervals
from verification.metrics import (
    OperatingPoint,
    VerificationResult,
    accuracy_at,
    curve,
    threshold_json,
    to_angle,
    worst_scores,
)
from verification.sets import VerificationSet

FALSE_ACCEPT, FALSE_REJECT, NO_FACE = "false_accept", "false_reject", "no_face"
_KINDS = {True: ("one person", plotting.BLUE), False: ("two persons", plotting.RED)}


@dataclass(frozen=True)
class Errors:
    """Pairs answered wrongly at a threshold, as indices into the set's pairs, the worst first."""

    threshold: float
    false_accepts: np.ndarray
    false_rejects: np.ndarray
    no_face: np.ndarray


def errors_at(result: VerificationResult, threshold: float) -> Errors:
    """All pairs that `threshold` answers wrongly, and those without two faces."""
    found = ~np.isnan(result.cosines)
    accepted = result.cosines >= threshold
    false_accepts = np.flatnonzero(found & accepted & ~result.same)
    false_rejects = np.flatnonzero(found & ~accepted & result.same)
    return Errors(
        threshold=threshold,
        false_accepts=false_accepts[np.argsort(-result.cosines[false_accepts], kind="stable")],
        false_rejects=false_rejects[np.argsort(result.cosines[false_rejects], kind="stable")],
        no_face=np.flatnonzero(~found),
    )


# --- text -----------------------------------------------------------------------------------------------------------


def report(
    embedder: Embedder, sets: Sequence[VerificationSet], results: Sequence[VerificationResult]
) -> dict[str, Any]:
    """The whole results.json: the model with its hash, and every figure of every set with the hash of its data."""
    return {
        "model": embedder.describe(),
        "sets": [
            _set_report(embedder, pairs, result) | {"scores": scores.describe(stem, pairs, result)}
            for stem, pairs, result in zip(scores.stems(sets), sets, results, strict=True)
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }


def _set_report(embedder: Embedder, pairs: VerificationSet, result: VerificationResult) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": pairs.name, "sha256": pairs.sha256, "source": pairs.source} | result.to_json()
    entry["without_face"] = [
        {
            "pair": int(index),
            "same": bool(pairs.same[index]),
            "photos": [pairs.names[photo] for photo in pairs.pairs[index]],
            "reasons": {
                pairs.names[photo]: pairs.missing[photo] for photo in pairs.pairs[index] if photo in pairs.missing
            },
        }
        for index in np.flatnonzero(pairs.missing_pairs())
    ]
    people = pairs.identities
    entry["by_identity"] = None if people is None else result_intervals(result, people[pairs.pairs]).to_json()
    own = own_threshold(embedder)
    if own is not None:
        entry["model_threshold"] = (threshold_json(own) or {}) | rates_at(own, result)
    return entry


def intervals_text(content: dict[str, Any]) -> str:
    """The intervals by person of a results.json, a line for each set and figure."""
    lines = []
    for entry in content["sets"]:
        found = entry["by_identity"]
        if found is None:
            continue
        rows = [(_accuracy_of(entry), found["accuracy"]), ("EER", found["eer"])]
        rows += [(f"TAR at FAR {far}", row) for far, row in found["tar_at_far"].items()]
        rows = [(label, row) for label, row in rows if row is not None]
        if rows:
            lines.append(f"{entry['name']}: 95 % intervals by person ({people_text(entry, rows[0][1]['identities'])})")
        for label, row in rows:
            low, high = row["interval_95"]
            lines.append(f"  {label:<18} {utils.percent(row['value'])} [{100 * low:.2f} ... {100 * high:.2f}]")
        if rows and entry.get("source", {}).get("people_by_chains"):
            lines.append(f"  {CHAINED}")
    return "\n".join(lines)


CHAINED = (
    "who the people are is known by pairs of one person alone: there are fewer of them, and intervals by person may be "
    "too narrow"
)


def people_text(entry: dict[str, Any], count: int) -> str:
    """How many people a set of results.json has, as far as that is known."""
    chained = entry.get("source", {}).get("people_by_chains", False)
    return f"{'at most ' if chained else ''}{count:,} people"


def _accuracy_of(entry: dict[str, Any]) -> str:
    """What the accuracy with an interval is: it counts pairs, and the mean over folds counts folds."""
    if entry["accuracy_kfold_mean"] is None:
        return "accuracy at the best threshold"
    value = entry["by_identity"]["accuracy"]
    same = value is None or "value" not in value or abs(value["value"] - entry["accuracy_kfold_mean"]) < 1e-9
    return "accuracy" if same else "accuracy of all pairs"


def own_threshold(embedder: Embedder) -> float | None:
    """The threshold (cosine) that a model file states in its metadata; None if it is fed otherwise than that says."""
    stated = embedder.metadata.get("threshold") if embedder.as_stated else None
    return float(stated["cosine"]) if isinstance(stated, dict) and "cosine" in stated else None


def rates_at(threshold: float, result: VerificationResult) -> dict[str, float | None]:
    """Accuracy, FAR and TAR at a given cosine; pairs without a face are wrong."""
    accepted = worst_scores(result.cosines, result.same) >= threshold
    return {
        "accuracy": accuracy_at(threshold, result.cosines, result.same),
        "far": float(accepted[~result.same].mean()) if (~result.same).any() else None,
        "tar": float(accepted[result.same].mean()) if result.same.any() else None,
    }


def table(embedder: Embedder, results: Sequence[VerificationResult]) -> str:
    """The figures as text: one row per figure, one column per set, notes below."""
    rows = [["", *(result.set_name for result in results)]]
    for label, cell in _table_rows(embedder, results):
        rows.append([label, *(cell(result) for result in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    notes = [f"{result.set_name}: {note}" for result in results for note in result.notes]
    return "\n".join([_model_line(embedder), "", *lines, *([""] if notes else []), *notes])


def _model_line(embedder: Embedder) -> str:
    return (
        f"{embedder.name}: {embedder.dim} dimensions, sha256 {embedder.sha256}\n"
        f"fed with {embedder.feeding}; {embedder.engine}"
    )


def _table_rows(embedder: Embedder, results: Sequence[VerificationResult]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [
        ("pairs of one person + two persons", lambda r: f"{r.same.sum()} + {(~r.same).sum()}"),
        ("  without a face (counted as wrong)", lambda r: str(np.isnan(r.cosines).sum())),
        ("accuracy over folds", _kfold_cell),
        ("  threshold, mean of folds", lambda r: _threshold_cell(r.kfold_threshold)),
        ("accuracy at the best threshold", lambda r: utils.percent(r.best_accuracy)),
        ("  that threshold", lambda r: _threshold_cell(r.best_threshold)),
        ("AUC", lambda r: "-" if r.auc is None else f"{r.auc:.5f}"),
        ("EER", lambda r: utils.percent(r.eer)),
    ]
    levels = next((result.points for result in results if result.points), [])
    for index, point in enumerate(levels):
        for label, cell in (
            (f"TAR at FAR {point.far:g}", _point_cell),
            ("  threshold", lambda p: _threshold_cell(p.threshold)),
            ("  FAR there, 95 % interval", _interval_cell),
        ):
            rows.append((label, lambda r, i=index, cell=cell: cell(r.points[i]) if r.points else "-"))
    own = own_threshold(embedder)
    if own is not None:
        rows.append((f"at the model's own cosine {own:.4f}", lambda r: _rates_cell(own, r)))
    return rows


def _kfold_cell(result: VerificationResult) -> str:
    if result.kfold_mean is None or result.kfold_std is None:
        return "-"
    return f"{utils.percent(result.kfold_mean)} ± {100 * result.kfold_std:.2f} ({len(result.folds)} folds)"


def _threshold_cell(cosine: float | None) -> str:
    return "-" if cosine is None else f"cosine {cosine:.4f}, {to_angle(cosine):.2f}°"


def _point_cell(point: OperatingPoint) -> str:
    if not point.resolved:
        return f"not resolved by {point.impostors} pairs"
    return f"{utils.percent(point.tar)} ({point.false_accepts} of {point.impostors} accepted)"


def _interval_cell(point: OperatingPoint) -> str:
    return "-" if point.far_interval is None else " to ".join(f"{100 * end:.2g} %" for end in point.far_interval)


def _rates_cell(threshold: float, result: VerificationResult) -> str:
    rates = rates_at(threshold, result)
    return f"{utils.percent(rates['accuracy'])}, FAR {utils.percent(rates['far'])}, TAR {utils.percent(rates['tar'])}"


def errors_table(pairs: VerificationSet, result: VerificationResult, errors: Errors) -> str:
    """Tab-separated, one line per wrong pair: kind, pair from 0, fold from 1, images, cosine, angle, reason."""
    lines = ["kind\tpair\tfold\tfirst\tsecond\tcosine\tangle\treason"]
    for kind, indices in (
        (FALSE_ACCEPT, errors.false_accepts),
        (FALSE_REJECT, errors.false_rejects),
        (NO_FACE, errors.no_face),
    ):
        for index in indices:
            first, second = pairs.pairs[index]
            reason = "; ".join(pairs.missing[photo] for photo in (first, second) if photo in pairs.missing)
            cosine = result.cosines[index]
            numbers = ("", "") if np.isnan(cosine) else (f"{cosine:.6f}", f"{to_angle(cosine):.3f}")
            place = (kind, str(index), str(pairs.folds[index] + 1))
            lines.append("\t".join([*place, pairs.names[first], pairs.names[second], *numbers, reason]))
    return "\n".join(lines) + "\n"


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_angles(path: Path, result: VerificationResult, model: str) -> None:
    """Distribution of the angles of both kinds of pairs, with fitted normals and the best single threshold."""
    with plotting.drawing(path, 8, 4.5) as figure:
        axes = figure.add_subplot(
            xlabel="angle between two embeddings (degrees)", ylabel="share of the pairs per degree"
        )
        edges = _histogram_edges(np.concatenate([result.angles(True), result.angles(False)]))
        for same, (label, colour) in _KINDS.items():
            angles = result.angles(same)
            if len(angles):
                _draw_distribution(axes, angles, edges, f"{label}, {len(angles)} pairs", colour)
        if result.best_threshold is not None:
            angle = float(to_angle(result.best_threshold))
            text = f"threshold {angle:.1f}° (cosine {result.best_threshold:.3f})"
            axes.axvline(angle, color=plotting.BLACK, linestyle="--", linewidth=1.2, label=text)
        axes.set_xlim(edges[0], edges[-1])
        plotting.title(axes, f"{result.set_name}, {model}", _headline(result))
        figure.legend(loc="outside lower center", ncols=2)


def _histogram_edges(angles: np.ndarray) -> np.ndarray:
    """Bins over all angles and a little more: the square root of the pairs in number, from 10 to 60."""
    low, high = max(np.floor(angles.min()) - 2, 0.0), min(np.ceil(angles.max()) + 2, 180.0)
    return np.linspace(low, high, int(np.clip(np.sqrt(len(angles)), 10, 60)) + 1)


def _draw_distribution(axes: Axes, angles: np.ndarray, edges: np.ndarray, label: str, colour: str) -> None:
    axes.hist(angles, edges.tolist(), density=True, color=colour, alpha=0.35)
    mean, deviation = float(angles.mean()), float(angles.std())
    label = f"{label}: {mean:.1f}° ± {deviation:.1f}°"
    if deviation < 0.01:  # all angles equal but for rounding: the curve would be a needle
        axes.axvline(mean, color=colour, label=label)
        return
    x = np.linspace(edges[0], edges[-1], 400)
    axes.plot(
        x, np.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi)), color=colour, label=label
    )


def _headline(result: VerificationResult) -> str:
    if result.kfold_mean is not None:
        return f"accuracy {_kfold_cell(result)}"
    if result.best_accuracy is not None:
        return f"accuracy {utils.percent(result.best_accuracy)} at the best threshold"
    return "one kind of pairs, no accuracy"


def draw_roc(path: Path, result: VerificationResult, model: str) -> None:
    """True over false accept rate, the latter logarithmic, with the measured operating points."""
    counts = curve(result.cosines, result.same)
    finest = 1 / counts.impostors
    lowest = min(10 ** np.floor(np.log10(finest)), 0.1)
    with plotting.drawing(path, 7, 5) as figure:
        axes = figure.add_subplot(xlabel="false accept rate", ylabel="true accept rate")
        # A rate of zero has no place on a logarithmic axis: it is drawn at the left border.
        axes.step(np.maximum(counts.far, lowest), counts.tar, where="post", color=plotting.BLUE)
        plotting.log_rate_axis(axes, lowest)
        if finest > lowest * 1.001:
            axes.axvspan(lowest, finest, color="#eeeeee", label=f"finer than {counts.impostors} pairs can tell")
        resolved = [(point.far, point.tar) for point in result.points if point.tar is not None]
        if resolved:
            label = "TAR at FAR " + ", ".join(f"{far:g}" for far, _ in resolved)
            axes.plot([far for far, _ in resolved], [tar for _, tar in resolved], "o", color=plotting.RED, label=label)
        assert result.eer is not None
        axes.plot(result.eer, 1 - result.eer, "s", color=plotting.ORANGE, label="EER")
        visible = counts.tar[np.maximum(counts.far, lowest) >= finest]
        bottom = plotting.rate_floor(float(visible.min()))
        axes.set_ylim(bottom, 1 + (1 - bottom) / 50)
        for far, tar in resolved:
            # The curve only rises: there is room above it on the left and, near the top, below it on the right.
            below = tar > bottom + 0.8 * (1 - bottom)
            offset, side = ((6, -14), "left") if below else ((-6, 6), "right")
            axes.annotate(utils.percent(tar), (far, tar), offset, textcoords="offset points", ha=side, fontsize=9)
        plotting.title(axes, f"{result.set_name}, {model}", f"AUC {result.auc:.4f}, EER {utils.percent(result.eer)}")
        figure.legend(loc="outside lower center", ncols=3)


# Pixels of the sheet.
_CELL, _GAP, _PAIR_GAP, _MARGIN, _CAPTION, _HEAD = 112, 4, 14, 20, 26, 78


def draw_errors(
    path: Path,
    pairs: VerificationSet,
    result: VerificationResult,
    errors: Errors,
    model: str,
    *,
    most: int,
    statement: str | None = None,
    heads: tuple[str, str] | None = None,
) -> None:
    """A PNG of the worst false accepts (left) and false rejects (right): photo with the chosen face, and crop.

    `statement` and `heads` replace what stands above all, and above the two columns.
    """
    across = 1 if pairs.photos is not None else 2
    tile = _tile_width(pairs)
    half = across * tile + (across - 1) * _MARGIN
    lists = {"false accepts": errors.false_accepts, "false rejects": errors.false_rejects}
    rows = max(-(-min(len(indices), most) // across) for indices in lists.values())
    height = _HEAD + max(rows, 1) * (_CELL + _CAPTION) + _MARGIN
    sheet = Image.new("RGB", (2 * half + 4 * _MARGIN, height), "white")
    statement = statement or f"wrong at the threshold {to_angle(errors.threshold):.1f}°"
    title = f"{result.set_name}, {model}: {statement}"
    plotting.draw_text(sheet, (_MARGIN, 14), title, size=18, bold=True, width=sheet.width - 2 * _MARGIN)
    for column, (label, indices) in enumerate(lists.items()):
        left = _MARGIN + column * (half + 2 * _MARGIN)
        shown = indices[:most]
        head = f"{label}: {len(indices)}" + (f", the worst {len(shown)}" if len(shown) < len(indices) else "")
        head = head if heads is None else heads[column]
        plotting.draw_text(sheet, (left, 48), head, size=15, width=half, colour=(plotting.RED, plotting.BLUE)[column])
        for position, index in enumerate(shown):
            x = left + position % across * (tile + _MARGIN)
            y = _HEAD + position // across * (_CELL + _CAPTION)
            _paste_pair(sheet, (x, y), pairs, result, int(index))
    plotting.save_png(path, sheet)


def _tile_width(pairs: VerificationSet) -> int:
    side = _CELL if pairs.photos is None else 2 * _CELL + _GAP
    return 2 * side + _PAIR_GAP


def _paste_pair(
    sheet: Image.Image, xy: tuple[int, int], pairs: VerificationSet, result: VerificationResult, index: int
) -> None:
    x, y = xy
    width = _tile_width(pairs)
    first, second = pairs.pairs[index]
    for image, left in ((first, x), (second, x + (width + _PAIR_GAP) // 2)):
        if pairs.photos is not None:
            sheet.paste(_photo(pairs, image), (left, y))
            left += _CELL + _GAP
        sheet.paste(Image.fromarray(pairs.crops[image]), (left, y))
    angle = f"{to_angle(result.cosines[index]):.1f}°"
    # The images of a .bin file have no names of their own, and some names no font; the list has both by their number.
    names = f"pair {index}"
    if pairs.photos is not None:
        # Where people's photos are called alike, their folders tell them apart.
        alike = len({photo.stem for photo in pairs.photos}) < len(pairs.photos)
        photos = [pairs.photos[image] for image in (first, second)]
        stems = " / ".join(f"{photo.parent.name}/{photo.stem}" if alike else photo.stem for photo in photos)
        names = stems if plotting.legible(stems) == stems else names
    room = int(plotting.font(12).getlength(angle)) + 8
    plotting.draw_text(sheet, (x, y + _CELL + 3), names, size=12, width=width - room)
    plotting.draw_text(sheet, (x + width - room + 8, y + _CELL + 3), angle, size=12)


def _photo(pairs: VerificationSet, image: int) -> Image.Image:
    assert pairs.photos is not None and pairs.faces is not None
    try:
        bgr = read_photo(pairs.photos[image])
    except PhotoError:  # it was readable a moment ago: gone since, the crop is there still
        return Image.new("RGB", (_CELL, _CELL), "#eeeeee")
    box = pairs.faces[image].box
    return plotting.fit(bgr[..., ::-1], _CELL, [] if box is None else [np.array(box)])


def write_set(
    out: Path, stem: str, pairs: VerificationSet, result: VerificationResult, model: str, *, most: int
) -> None:
    """The list of wrong pairs and the pictures of one set, as `out`/`stem`-*; `model` is the name in the titles.

    A set with one kind of pairs has no threshold, therefore no wrong pairs and no ROC: only its angles are drawn.
    """
    draw_angles(out / f"{stem}-angles", result, model)
    if result.best_threshold is None:
        for name in ("roc.png", "roc.svg", "errors.png", "errors.tsv"):  # of other pairs that lay there before
            (out / f"{stem}-{name}").unlink(missing_ok=True)
        return
    errors = errors_at(result, result.best_threshold)
    draw_roc(out / f"{stem}-roc", result, model)
    draw_errors(out / f"{stem}-errors.png", pairs, result, errors, model, most=most)
    utils.write_text(out / f"{stem}-errors.tsv", errors_table(pairs, result, errors))
