"""What breaks a model? People who do not exist in a reference photo each, and with one thing moved, all else held.

    python stress.py --checkpoint A.onnx B.onnx --out stress
    python stress.py --checkpoint A.onnx --identities 60 --factors yaw blur "medical mask" --out stress
    python stress.py --checkpoint A.onnx --out stress --shard 3/16

Photographs --identities people under every level of every factor: pose, light, expression, age, what is worn or held,
hair, make-up, camera, and how exactly the crop is cut. That is done once: further models, and a run that was killed,
take what is there. For each level: the share of genuine pairs that is lost (false non-match rate, at the threshold that
gives --far among the reference photos), their mean angle, the false match rate, each with an interval over people, and
whether the detector finds the face. OUT gets results.json, stress.md, curves of all factors with numbers (curves.png)
and points of those with names (named.png), the detector's (detector.png) and a sheet of one person (people.png).

Crops are cut where the landmarks truly are: the figures are of the embedding alone, those of the detector apart. What
synthetic people can and cannot show is said in docs/stress.md. Needs `pip install -r requirements-synthetic.txt`.
"""

import passive_threads  # noqa: F401  # isort: skip

import dataclasses
import difflib
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

import config
import plotting
import synthetic
import utils
from embedding import Embedder, normalise, open_embedder
from formats import cached
from options import parse
from processes import Shard
from utils import InputError
from verification.stress import GROUPS, LOST, LevelResult, Subjects, half_lost

if TYPE_CHECKING:
    from synthetic.stress_set import Recorded, StressSet

TOGETHER = 512  # crops that are embedded, and kept, together
ACROSS = 5  # small multiples in a row


@utils.command
def main() -> None:
    """Photograph what is missing, embed, compare, report."""
    options = parse(config.Stress, __doc__)
    utils.refuse_training(options.out)
    labels = _labels(options)
    with synthetic.needed():
        from synthetic.dataset import make_people, worker_processes
        from synthetic.factors import FACTORS
        from synthetic.head import load_head
        from synthetic.stress_set import StressSet
    names = options.factors or list(FACTORS)
    for name in names:
        if name not in FACTORS:
            near = difflib.get_close_matches(name, FACTORS, 1, 0)[0]
            raise InputError(
                f"--factors {name}: no such factor; did you mean {near!r}? There are: {', '.join(FACTORS)}"
            )
    names = [name for name in FACTORS if name in names]
    device = utils.own_device(options.device)
    # Before an hour's work: what cannot be loaded is told now.
    embedders = [_open(options, checkpoint, device) for checkpoint in options.checkpoint]
    with synthetic.needed():
        people = StressSet(options.out, options.identities, options.seed, options.first, options.size, names)
    shard = Shard.parse(options.shard)
    missing = make_people(people, shard, device, worker_processes(device, options.workers))
    if missing:
        print(f"shard {shard} is done; {len(missing)} of {people.count} people are left to other shards")
        return
    head = load_head()
    taken, found, error, who = [], [], [], []
    embeddings: list[list[np.ndarray]] = [[] for _ in embedders]
    shown: Recorded | None = None
    with utils.progress(people.count * people.images * len(embedders), "embedding", unit="crop") as bar:
        for chunk in range(people.count):
            person = people.load(chunk, head)
            if person is None:
                raise InputError(f"{people.path(chunk)}: was there a moment ago and is not any more")
            taken.append(person.taken)
            found.append(person.found)
            error.append(person.error)
            who.append(person.identity.who | {"melanin": person.identity.melanin})
            if shown is None or person.taken.sum() > shown.taken.sum():
                shown = person  # of whom there are most photos
            for k, embedder in enumerate(embedders):
                embeddings[k].append(_embed(embedder, person.crops, people.folder / "embeddings"))
                bar.update(people.images)
    assert shown is not None
    models = [Subjects(np.stack(rows), np.stack(taken), options.far) for rows in embeddings]
    if not models[0].resolved:
        pairs = len(models[0].cosines)
        print(f"note: {pairs} pairs of two people cannot tell a rate of {options.far:g}; the threshold accepts none of "
              "them. Take more --identities", file=sys.stderr)  # fmt: skip
    results = [_levels(people, model, np.stack(found), np.stack(error)) for model in models]
    groups = [{name: model.group(np.array([test(one) for one in who])) for name, test in GROUPS} for model in models]
    if lacking := [name for name in names if name not in results[0]]:
        print(f"note: {', '.join(lacking)}: none of these people can have that", file=sys.stderr)
    report = {
        "far": options.far,
        "people": {"identities": people.count, "first": people.first, **people.settings},
        "detector": "the one of stage 2, on whole photos",
        "models": [
            {
                "label": label,
                **embedder.describe(),
                "threshold_cosine": model.threshold,
                "threshold_resolved": model.resolved,
                "factors": _factor_json(result),
                "groups": group,
            }
            for label, embedder, model, result, group in zip(labels, embedders, models, results, groups, strict=True)
        ],
        "environment": utils.environment(),
    }
    text = _text(options, people, labels, results, groups)
    # From here on files are replaced, by one run at a time; the results come last, so that none stand beside the
    # pictures of others.
    busy = f"{options.out}: another run is writing its results there; run the same command again"
    with utils.locked(options.out / ".report.lock", busy, leave=False):
        (options.out / "results.json").unlink(missing_ok=True)
        _sheet(options.out / "people.png", people, shown.crops, shown.taken)
        pictures = ["people.png", *_draw(options, people, labels, results)]
        utils.write_text(options.out / "stress.md", text)
        utils.write_json(options.out / "results.json", report)
    print(text)
    print(f"{options.out}: {', '.join(['results.json', 'stress.md', *pictures])}")


def _labels(options: config.Stress) -> list[str]:
    named = [Path(name).stem for name in options.checkpoint]
    if len(set(named)) < len(named):  # most are called embedding.pt; what tells them apart is the run's folder
        named = [f"{Path(name).parent.name}/{Path(name).stem}".lstrip("/") for name in options.checkpoint]
    labels = [" ".join(label.split()) for label in options.labels or named]
    if len(labels) != len(options.checkpoint):
        raise InputError(f"--labels: {len(labels)} labels for {len(options.checkpoint)} models")
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, start=1)]
    return labels


def _open(options: config.Stress, checkpoint: str, device: Any) -> Embedder:
    fed = {field.name: getattr(options, field.name) for field in dataclasses.fields(config.Feeding)}
    return open_embedder(config.Model(checkpoint=checkpoint, **fed), device)


def _embed(embedder: Embedder, crops: np.ndarray, folder: Path) -> np.ndarray:
    """Embeddings float32 [K, D] of a person's crops, kept under the key of model and crops."""
    key = cached.key_of(embedder.fingerprint, crops)
    path = folder / f"{key}.cache"
    kept = None if embedder.fingerprint is None else cached.read(path, key)
    if kept is not None:
        return kept["embeddings"]
    parts = [embedder.features(crops[start : start + TOGETHER]) for start in range(0, len(crops), TOGETHER)]
    embeddings = normalise(np.concatenate(parts)).astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise InputError(f"{embedder.name}: gives no finite feature other than zero for a crop")
    if embedder.fingerprint is not None:
        cached.write(path, key, {"embeddings": embeddings})
    return embeddings


# ---------------------------------------------------------------------------------------------- figures

Levels = dict[str, list[LevelResult]]


def _levels(people: "StressSet", model: Subjects, found: np.ndarray, error: np.ndarray) -> Levels:
    results: Levels = {}
    for number, shot in enumerate(people.shots):
        if shot.factor is not None and model.taken[:, number].any():
            level = model.level(number, found[:, number], error[:, number])
            results.setdefault(shot.factor, []).append(level)
    return results


def _factor_json(results: Levels) -> dict[str, Any]:
    from synthetic.factors import CUTS, FACTORS

    said: dict[str, Any] = {}
    for name, levels in results.items():
        factor = FACTORS[name]
        entries = [{"level": level, **found.to_json()} for level, found in zip(factor.levels, levels, strict=True)]
        if name in CUTS:  # the photo is the reference photo: the detector was asked once
            for entry in entries:
                entry["detector_found"] = entry["landmark_error_of_eye_distance"] = None
        already = levels[0].fnmr.value >= LOST and not _is_named(name)  # the true level is milder than the first
        said[name] = {"unit": factor.unit, "half_lost_at": _half(name, levels), "half_lost_before": already}
        said[name]["levels"] = entries
    return said


def _half(name: str, levels: list[LevelResult]) -> float | None:
    from synthetic.factors import FACTORS

    numbers = [level for level in FACTORS[name].levels if not isinstance(level, str)]
    if len(numbers) < len(levels):
        return None
    return half_lost(numbers, [level.fnmr.value for level in levels])


def _is_named(name: str) -> bool:
    from synthetic.factors import FACTORS

    return isinstance(FACTORS[name].levels[0], str)


def _draw(options: config.Stress, people: "StressSet", labels: list[str], results: list[Levels]) -> list[str]:
    """Draw what there is to draw, remove pictures of an earlier run besides, and return the names of those drawn."""
    from synthetic.factors import CUTS

    numbered = [name for name in results[0] if not _is_named(name)]
    seen = [name for name in numbered if name not in CUTS]
    named = [name for name in results[0] if _is_named(name)]
    subject = f"{people.count} people who do not exist, threshold at FAR {options.far:g}"
    labels = [f" {label}" if label.startswith("_") else label for label in labels]  # else Matplotlib hides them
    if numbered:
        lost = "genuine pairs lost (%)"
        _multiples(options.out / "curves", numbered, labels, results, f"{lost}: {subject}", _curve_of_loss)
    if named:
        _points(options.out / "named", named, labels, results, subject)
    if seen:
        said = f"faces found by the detector (%), of {people.count} people who do not exist"
        _multiples(options.out / "detector", seen, ["detector"], results[:1], said, _curve_of_detector)
    drawn = {"curves": bool(numbered), "named": bool(named), "detector": bool(seen)}
    for name, there in drawn.items():
        for suffix in (".png", ".svg") if not there else ():
            (options.out / name).with_suffix(suffix).unlink(missing_ok=True)
    return [f"{name}.png" for name, there in drawn.items() if there]


def _curve_of_loss(axes: Axes, x: list[float], levels: list[LevelResult], label: str, colour: str) -> None:
    rates = [100 * level.fnmr.value for level in levels]
    low, high = ([100 * getattr(level.fnmr, side) for level in levels] for side in ("low", "high"))
    axes.plot(x, rates, "o-", color=colour, label=label, markersize=3)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _curve_of_detector(axes: Axes, x: list[float], levels: list[LevelResult], label: str, colour: str) -> None:
    axes.plot(x, [100 * level.found for level in levels], "o-", color=colour, label=label, markersize=3)


def _multiples(path: Path, names: list[str], labels: list[str], results: list[Levels], title: str, curve: Any) -> None:
    """One small chart a factor, all with the same vertical axis; levels evenly spaced, as they are written."""
    from synthetic.factors import FACTORS

    rows = -(-len(names) // ACROSS)
    across = min(ACROSS, len(names))
    width = max(2.5 * across, 5)
    with plotting.drawing(path, width, 2.05 * rows + 0.9) as figure:
        # About eleven letters to an inch.
        figure.suptitle(textwrap.fill(title, int(11 * width)), x=0.01, ha="left", fontsize=11)
        for number, name in enumerate(names):
            axes = figure.add_subplot(rows, across, number + 1)
            factor = FACTORS[name]
            for k, result in enumerate(results):
                x = [float(place) for place in range(len(result[name]))]
                curve(axes, x, result[name], labels[k], plotting.COLOURS[k % len(plotting.COLOURS)])
            axes.set_title(name, loc="left", fontsize=10)
            axes.set_xticks(range(len(factor.levels)), [f"{level:g}" for level in factor.levels], fontsize=8)
            axes.set_xlabel(factor.unit, fontsize=8)
            axes.set_ylim(-4, 104)
            axes.set_yticks([0, 50, 100])
        if len(labels) > 1:
            handles, texts = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, texts, loc="outside lower center", ncols=min(4, len(texts)))


def _points(path: Path, names: list[str], labels: list[str], results: list[Levels], subject: str) -> None:
    """A line for each named level, with a point and an interval for each model."""
    from synthetic.factors import FACTORS

    lines = [(name, k, str(level)) for name in names for k, level in enumerate(FACTORS[name].levels)]
    with plotting.drawing(path, 7.5, 0.19 * len(lines) + 1.4) as figure:
        axes = figure.add_subplot(xlabel="genuine pairs lost (%)")
        for model, result in enumerate(results):
            colour = plotting.COLOURS[model % len(plotting.COLOURS)]
            offset = 0.6 * ((model + 0.5) / len(results) - 0.5)
            found = [result[name][k].fnmr for name, k, _ in lines]
            y = [line + offset for line in range(len(lines))]
            value = np.array([100 * one.value for one in found])
            spread = [value - [100 * one.low for one in found], [100 * one.high for one in found] - value]
            axes.errorbar(value, y, xerr=spread, fmt="o", color=colour, markersize=4, label=labels[model], linewidth=1)
        axes.set_yticks(range(len(lines)), [f"{name}: {level}" for name, _, level in lines], fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        plotting.title(axes, subject, "what is worn, held, grown or pulled")
        figure.legend(loc="outside lower center", ncols=3)


def _sheet(path: Path, people: "StressSet", crops: np.ndarray, taken: np.ndarray) -> None:
    """One person in all photos, a line a factor."""
    shots = {number: shot.factor for number, shot in enumerate(people.shots) if taken[number]}
    names = list(dict.fromkeys(shots.values()))
    rows = [[number for number, factor in shots.items() if factor == name] for name in names]
    wide, left, side = max(map(len, rows)), 150, crops.shape[1] // 2 + 16
    sheet = Image.new("RGB", (left + wide * side, len(rows) * side), "white")
    for y, (name, numbers) in enumerate(zip(names, rows, strict=True)):
        plotting.draw_text(sheet, (6, y * side + side // 2 - 8), name or "reference", size=13, width=left - 12)
        for x, number in enumerate(numbers):
            crop = Image.fromarray(crops[number]).resize((side - 2, side - 2), Image.Resampling.LANCZOS)
            sheet.paste(crop, (left + x * side, y * side))
    plotting.save_png(path, sheet)


# ---------------------------------------------------------------------------------------------- text


def _text(
    options: config.Stress,
    people: "StressSet",
    labels: list[str],
    results: list[Levels],
    groups: list[dict[str, Any]],
) -> str:
    """The tables, in Markdown."""
    lines = [
        f"# {people.count} people who do not exist, one thing moved at a time",
        "",
        f"Threshold at FAR {options.far:g} among the reference photos. Half of the genuine pairs are lost at ...",
        "",
        *_table(["factor", *labels], [[name, *(_said(name, result) for result in results)] for name in results[0]]),
        "",
        "By group, at the same threshold: false matches among reference photos, and lost pairs over the photos that "
        "there are of everybody; 95 % intervals over people.",
        "",
    ]
    rows = []
    for name in groups[0]:
        cells = [name]
        for group in groups:
            found = group[name]
            if found is None:
                cells += ["too few", "too few"]
            else:
                cells += [_rate(found["fmr"]), _rate(found["fnmr"])]
        rows.append(cells)
    heads = [f"{label}: {kind}" for label in labels for kind in ("FMR", "FNMR")]
    lines += _table(["group", *heads], rows)
    lines += [
        "",
        "Synthetic people show what a factor does when nothing else changes, and how models rank under it. They do not "
        "show how often a model fails on real people, nor prove fairness: see docs/stress.md.",
    ]
    return "\n".join(lines) + "\n"


def _said(name: str, result: Levels) -> str:
    """Where half of the pairs are lost, in words."""
    from synthetic.factors import FACTORS

    levels, unit = result[name], FACTORS[name].unit
    if _is_named(name):
        rates = {str(level): found.fnmr.value for level, found in zip(FACTORS[name].levels, levels, strict=True)}
        if lost := [level for level, rate in rates.items() if rate >= LOST]:
            return ", ".join(lost)
        most = max(rates.values())
        worst = ", ".join(level for level, rate in rates.items() if rate == most)
        return f"none; most at {worst} ({100 * most:.0f} %)" if most else "none; nothing is lost"
    numbers = [float(level) for level in FACTORS[name].levels]
    half = _half(name, levels)
    if half is None:
        return f"beyond {numbers[-1]:g} {unit}".rstrip() + f" ({100 * levels[-1].fnmr.value:.0f} % there)"
    milder = "at most " if numbers[0] < numbers[-1] else "at least "
    return f"{milder if levels[0].fnmr.value >= LOST else ''}{half:.3g} {unit}".rstrip()


def _rate(interval: dict[str, Any]) -> str:
    low, high = interval["interval_95"]
    return f"{utils.percent(interval['value'])} ({100 * low:.2f} to {100 * high:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
