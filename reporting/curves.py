"""The course of a training as a drawing: from the history of results.json, and finer from TensorBoard's files."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

import plotting
from reporting.facts import Run

Series = list[tuple[float, float]]
BY_STEP = ", by step"


def training_curves(runs: Sequence[Run]) -> dict[str, bytes]:
    """PNG of loss, top-1 and accuracy on each verification set over the epochs, by name, all runs in each."""
    panels: dict[str, list[tuple[str, Series]]] = {}
    for run in runs:
        for name, series in _series(run).items():
            panels.setdefault(name, []).append((run.label, series))
    # One epoch is a point, which says something beside the curve of another run only.
    panels = {name: lines for name, lines in panels.items() if any(len(series) > 1 for _, series in lines)}
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in panels.items():
            path = Path(folder) / "curve"
            with plotting.drawing(path, 5.5, 3.4) as figure:
                axes = figure.add_subplot(xlabel="step" if name.endswith(BY_STEP) else "epoch")
                axes.set_title(name, loc="left")
                for number, (label, series) in enumerate(lines):
                    x, y = zip(*series, strict=True)
                    marker = "." if len(series) < 40 else ""
                    axes.plot(x, y, **plotting.line_style(number), label=label, marker=marker)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                if len(runs) > 1:
                    axes.legend(fontsize=8)
            drawn[name] = path.with_suffix(".png").read_bytes()
    return drawn


def _series(run: Run) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for row in run.history:
        for key, name in (("loss", "loss"), ("top1", "top-1 on the training crops")):
            if isinstance(row.get(key), int | float):
                found.setdefault(name, []).append((row["epoch"], row[key]))
        for name, entry in (row.get("verification") or {}).items():
            found.setdefault(f"accuracy on {name}", []).append((row["epoch"], entry["accuracy"]))
    return found or _from_tensorboard(run.folder)


def _from_tensorboard(folder: Path) -> dict[str, Series]:
    """Scalars of a run that has no history yet; nothing where TensorBoard is not installed."""
    files = sorted(folder.glob("**/events.out.tfevents.*"))
    if not files:
        return {}
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 500})
    events.Reload()
    wanted = {"train/loss": "loss", "train/top1": "top-1 on the training crops"}
    return {
        f"{name}{BY_STEP}": [(event.step, event.value) for event in events.Scalars(tag)]
        for tag, name in wanted.items()
        if tag in events.Tags()["scalars"]
    }
