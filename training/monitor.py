"""What people watch while a network trains: TensorBoard, the progress line, the log, and warnings before it is too
late.

Measurements stay on the device between two readings; a reading fetches everything of the steps since the last one in
a single transfer. The price: a loss that is not finite is noticed up to `--log-every` steps late (the step itself is
still named).
"""

import contextlib
import math
import os
import resource
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from config import CROP_SIZE, Train
from training import checkpoints, storage
from training.losses import LOSSES
from training.run import Run, State
from utils import InputError
from verification.metrics import VerificationResult, curve

# Steps after which a network that has learnt nothing at all is worth a warning.
PATIENCE = 1000
# Below this many identities margin and scale of the published recipe, made for 85 thousand, mostly teach nothing.
FEW_IDENTITIES = 5000
LARGE_COST = 20.0  # scale times what the margin takes: 36 for the published recipe, 9 for the one advised
USUAL_RATE = Train.lr / Train.batch_size  # per crop of a step; four times the published one is slower on few people
# Readings after which the time of a step is known, and how many times as long it has to take to be worth a line.
PACE_KNOWN, SLOWDOWN = 5, 3.0
# How many times its first level the mean feature norm may reach before it is called an explosion.
NORM_GROWTH = 20.0


@dataclass
class Reading:
    """What was measured in the steps from `first` to the present one."""

    first: int
    losses: list[float]
    hits: list[float]  # share of each step's crops that were nearest to their own centre (top-1)
    seconds: float
    waited: float  # seconds of them spent waiting for data
    stats: dict[str, Tensor]  # the margin head's, of the last step, still on the device

    @property
    def loss(self) -> float:
        """Mean loss of the steps."""
        return sum(self.losses) / len(self.losses)

    @property
    def top1(self) -> float:
        """Mean top-1 of the steps."""
        return sum(self.hits) / len(self.hits)

    @property
    def broken_step(self) -> int | None:
        """The first step whose loss is not finite."""
        return next((self.first + i for i, loss in enumerate(self.losses) if not math.isfinite(loss)), None)


class Window:
    """Collects losses and top-1 on the device until they are read."""

    def __init__(self, step: int) -> None:
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.first = step
        self.losses: list[Tensor] = []
        self.top1: list[Tensor] = []
        self.stats: dict[str, Tensor] = {}
        self.waited = 0.0
        self.since = time.perf_counter()

    def add(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """Note one step; no synchronisation with the device."""
        self.losses.append(loss)
        self.top1.append(stats["top1"])
        self.stats = stats

    def read(self) -> Reading | None:
        """Fetch what was collected since the last reading and start anew; None when there was no step."""
        if not self.losses:
            return None
        losses, hits = torch.stack([torch.stack(self.losses), torch.stack(self.top1).to(self.losses[0].dtype)]).tolist()
        seconds = time.perf_counter() - self.since
        reading = Reading(self.first, losses, hits, seconds, self.waited, self.stats)
        self._begin(self.first + len(self.losses))
        return reading


@dataclass
class Watch:
    """Looks for runs that will come to nothing. Each warning is given once."""

    identities: float  # that a step tells apart: of a sampled head, those it sees
    margin_cost: float  # what scale and present margin add to the loss of a network that knows nothing
    patience: int = PATIENCE
    given: set[str] = field(default_factory=set)
    steps: int = 0
    effort: float = 0.0  # the same, each counted by its share of the full learning rate: a warm-up needs time
    hits: float = 0.0
    first_norm: float | None = None

    def warnings(self, reading: Reading, norm: float, rate_share: float = 1.0) -> list[str]:
        """New warnings after a reading; `norm` is the mean feature norm of its last step, `rate_share` that step's
        share of the full learning rate.
        """
        self.steps += len(reading.losses)
        self.effort += len(reading.losses) * rate_share
        self.hits += reading.top1
        found = []
        chance = math.log(self.identities)
        if self.effort >= self.patience:
            near_chance = abs(reading.loss - chance) < 0.02 * chance or reading.loss > 0.98 * (
                chance + self.margin_cost
            )
            if near_chance and reading.top1 < max(0.01, 2 / self.identities):
                found.append(
                    f"stuck: after {self.steps} steps the loss is {reading.loss:.2f}, that of guessing (log of "
                    f"{self.identities:.0f} identities is {chance:.2f}); usually the learning rate is too high or has "
                    "no --warmup, or the margin is too large to begin with (--margin-warmup)"
                )
            if self.hits == 0:
                found.append(
                    f"no hit: top-1 is 0 after {self.steps} steps; usually the labels do not belong to the images, the "
                    "margin is too large to begin with (--margin-warmup), or the rate is too high"
                )
        if self.first_norm is None:
            self.first_norm = norm
        elif not norm < NORM_GROWTH * self.first_norm:
            found.append(
                f"explosion: feature norms grew from {self.first_norm:.3g} to {norm:.3g}; usually the learning rate is "
                "too high, or --weight-decay or --grad-clip was switched off"
            )
        new = [text for text in found if text.split(":")[0] not in self.given]
        self.given.update(text.split(":")[0] for text in new)
        return new


@dataclass
class Pace:
    """Notices when steps take several times what they did: another program has come, a disk or a GPU is throttled."""

    usual: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # seconds per step of the last readings
    slow: bool = False
    side: int = CROP_SIZE  # of the crops of those steps

    def note(self, reading: Reading, side: int = CROP_SIZE) -> str | None:
        """A line when the steps have become slow, and one when they are as fast as before again.

        Crops of another side (`--small-epochs`) take another time: what is usual for them is found out anew.
        """
        if side != self.side:
            self.usual.clear()
            self.side, self.slow = side, False
        steps = len(reading.losses)
        seconds = reading.seconds / steps
        if len(self.usual) < PACE_KNOWN:
            self.usual.append(seconds)
            return None
        median = statistics.median(self.usual)
        if seconds > SLOWDOWN * median:
            known, self.slow = self.slow, True
            if known:
                return None
            cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
            return (
                f"a step takes {seconds:.2g} s, {seconds / median:.1f} times what it did ({median:.2g} s); of these "
                f"{reading.waited / steps:.2g} s are waiting for data, and {load:.1f} programs want the {cores} cores "
                "of this machine"
            )
        self.usual.append(seconds)
        if not self.slow or seconds > 1.5 * median:
            return None
        self.slow = False
        return f"a step takes {seconds:.2g} s again"


def advice_for_few_identities(run: Run) -> str | None:
    """A warning when margin and scale are those of a large set and the identities are few, with what fits."""
    options, identities = run.options, run.crops.identities
    if options.loss == "none":
        return None
    cost = options.scale * LOSSES[options.loss]().cost(run.schedule.full_margin)
    if identities >= FEW_IDENTITIES or cost < LARGE_COST or options.margin_warmup > 0:
        return None
    margin = "--margin 0.3 " if options.loss == "arcface" else ""
    strong = "" if options.augment == "strong" else " --augment strong"
    usual = USUAL_RATE * options.batch_size
    rate = f" --lr {usual:.2g}" if options.optimizer == "sgd" and options.lr > 2 * usual else ""
    return (
        f"{identities} identities, and a margin and a scale for tens of thousands: on few, the loss often stays where "
        f"it begins. What fits: {margin}--scale 32 --margin-warmup 4 --warmup 1 --schedule cosine{strong}{rate}"
    )


class RunLog:
    """Lines to a file, with date and time, and above the progress bar to standard error; silent until it is opened.

    The file is locked until the end of a `with` block, not by the forked loader workers, which may outlive the trainer.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file = None
        self._held.close()

    def open(self, path: Path) -> None:
        """Begin, or add to, the file; `InputError` if another process has it, which then trains into that folder."""
        busy = f"{path.parent}: another process is training into this folder"
        self._held.enter_context(utils.locked(path, busy, forks=True))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._held.callback(os.close, self._file)

    def __call__(self, text: str) -> None:
        """Write one line."""
        if self._file is None:
            return
        tqdm.write(text, file=sys.stderr)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
        os.write(self._file, line.encode("utf-8", "backslashreplace"))


def board_folder(out: Path) -> Path:
    """Where a run's TensorBoard files lie: a folder by the run's name, which is what TensorBoard calls it."""
    folder = out / "tensorboard"
    begun = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return begun[0] if begun else folder / (out.resolve().name or "run")


class Board:
    """The run in TensorBoard. `purge_step` drops what an interrupted run wrote after its last checkpoint.

    TensorBoard sorts by name, so the names are such that train/loss comes first.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that only rank 0 should pay

        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers under their names."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def distributions(self, step: int, stats: dict[str, Tensor]) -> None:
        """Histograms of the angles (degrees) to the own and to the nearest other centre, and of the feature norms."""
        for key, name in (
            ("target_angle", "train_angle/target"),
            ("other_angle", "train_angle/nearest_other"),
            ("feature_norm", "train_norm/features"),
        ):
            values = stats[key].float().flatten()
            values = values[torch.isfinite(values)]
            if len(values):
                self.writer.add_histogram(name, values.cpu(), step)

    def crops(self, step: int, pictures: Tensor) -> None:
        """A sheet of crops as the network sees them, [N, 3, 112, 112] in [0, 1]."""
        from torchvision.utils import make_grid

        self.writer.add_image("train_crops", make_grid(pictures[:64].cpu(), nrow=8, padding=2), step)

    def verification(self, step: int, name: str, result: VerificationResult) -> None:
        """Accuracy, AUC and EER of a verification set, and its ROC as a picture."""
        values = {"accuracy": result.accuracy, "auc": result.auc, "eer": result.eer}
        self.scalars(step, {f"val/{name}/{key}": value for key, value in values.items() if value is not None})
        if result.auc is not None:
            self.writer.add_figure(f"val_roc/{name}", _roc(result), step)

    def result(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The hyper-parameters with what came of them."""
        plain = {key: value if isinstance(value, int | float) else _printable(value) for key, value in settings.items()}
        self.writer.add_hparams(plain, metrics, run_name=".")

    def close(self) -> None:
        """Flush everything to disk."""
        self.writer.close()


def _printable(value: Any) -> str:
    """As text that protocol buffers take, also for a path that is not UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _roc(result: VerificationResult) -> Any:
    from matplotlib.figure import Figure

    counts = curve(result.cosines, result.same)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="false accept rate", ylabel="true accept rate", title=result.set_name)
    lowest = 0.5 / max(counts.impostors, 1)
    axes.semilogx(counts.far.clip(lowest), counts.tar)
    axes.set_xlim(lowest, 1)
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.3)
    return figure


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GB: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def write_run(run: Run, state: State, changes: dict[str, list[Any]]) -> None:
    """`run.json`: configuration, data and environment; one environment for each time that the run was started.

    `changes` are the options that are other ones from the present step on (see `checkpoints.check_same_run`).
    """
    path = run.options.out / storage.RUN
    try:
        before = utils.read_json(path) if path.exists() else {"environments": [], "changes": []}
        environments, earlier = list(before["environments"]), list(before["changes"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not written by train.py, or damaged; choose another --out, or remove it") from error
    environments.append(utils.environment() | {"device": str(run.world.device), "processes": run.world.size})
    change = {"step": state.step, "options": changes}
    if changes and change not in earlier:  # a run killed before its next checkpoint finds the same change again
        earlier.append(change)
    content = {
        "options": checkpoints.plain_options(run.options),
        "begun_from": state.begun_from,
        "data": run.data,
        "verification_sha256": {pairs.name: pairs.sha256 for pairs in run.sets},
        "changes": earlier,
        "environments": environments,
    }
    utils.write_json(path, content)
