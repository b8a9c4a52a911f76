"""What a run says of itself while it goes on: measurements every few steps, a report for each epoch, its results."""

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

import utils
from training import checkpoints, monitor, storage
from training.augment import Augmentation
from training.run import Run, State, Sums
from utils import InputError
from verification.metrics import VerificationResult

HISTOGRAM_READINGS = 10  # distributions go to TensorBoard at every tenth reading
WAIT_WORTH_A_WORD = 0.1  # share of an epoch's time spent waiting for data


class Reporter:
    """Reads the measurements every few steps: stops the run when a loss is not finite, and shows it on rank 0."""

    def __init__(self, run: Run, state: State) -> None:
        self.run, self.state = run, state
        self.window = monitor.Window(state.step)
        # Each micro-batch draws its own sample of centres.
        crops = run.options.batch_size // run.options.accumulate
        self.watch = monitor.Watch(state.head.centres_seen(crops), 0.0)
        self.pace = monitor.Pace()
        self.board: monitor.Board | None = None
        self.bar: Any = None  # there is one where there is a board
        if run.world.is_main:
            self.board = monitor.Board(monitor.board_folder(run.options.out), state.step + 1 if state.step else 0)
            self.bar = utils.progress(run.steps, "train", initial=state.step, unit="step")

    def read(self, norm: Tensor | None = None) -> None:
        """Fetch the measurements since the last reading; with the gradient's `norm`, also write them to TensorBoard.

        Raises `InputError` when a loss was not finite.
        """
        reading = self.window.read()
        if reading is None:
            return
        if reading.broken_step is not None:
            self._stop(reading, reading.broken_step)
        for measured in zip(reading.losses, reading.hits, strict=True):
            self.state.epoch_sums.add_step(*measured)
            self.state.shown_sums.add_step(*measured)
        self.state.epoch_sums.seconds += reading.seconds
        self.state.epoch_sums.waited += reading.waited
        shown = self.state.shown_sums
        if norm is not None:
            self.state.shown_sums = Sums()
        if self.board is None:
            return
        options, schedule = self.run.options, self.run.schedule
        feature_norm = float(reading.stats["feature_norm"].mean())
        step = self.state.step - 1
        rate = schedule.learning_rate(step)
        self.watch.margin_cost = self.state.head.cost_of_margin(feature_norm)
        for text in self.watch.warnings(reading, feature_norm, rate / options.lr):
            self.run.log(f"warning: {text}")
        if note := self.pace.note(reading, schedule.side(step)):
            self.run.log(f"note: {note}")
        values = {
            "train/loss": shown.loss / shown.steps,
            "train/top1": shown.top1 / shown.steps,
            "train/rate": rate,
            "train/norm_of_features": feature_norm,
            "train_speed/crops_per_second": len(reading.losses) * options.batch_size / reading.seconds,
            "train_speed/data_wait": reading.waited / reading.seconds,
            "train_speed/memory_gb": monitor.memory_in_use(self.run.world.device),
        }
        self._show(schedule.epoch(step), values)
        if norm is not None:
            self.board.scalars(self.state.step, values | {"train/norm_of_gradient": float(norm)})
            if self.state.step // options.log_every % HISTOGRAM_READINGS == 1:
                self.board.distributions(self.state.step, reading.stats)

    def _show(self, epoch: int, values: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"epoch {epoch}/{self.run.options.epochs}, loss {values['train/loss']:.3f}, "
            f"top-1 {values['train/top1']:.1%}, rate {values['train/rate']:.3g}, "
            f"{values['train_speed/crops_per_second']:.0f} crops/s, "
            f"waited for data {values['train_speed/data_wait']:.1%}",
            refresh=False,  # the update decides whether it is time for a line
        )
        self.bar.update(self.state.step - self.bar.n)

    def _stop(self, reading: monitor.Reading, step: int) -> None:
        rate = self.run.schedule.learning_rate(step)
        names = [self.run.crops.describe(index) for index in self.run.order.global_batch(step).tolist()]
        listing = self.run.options.out / f"broken-step-{step}.txt"
        if self.run.world.is_main:
            utils.write_text(listing, "".join(f"{name}\n" for name in names))
        raise InputError(
            f"step {step}: the loss is {reading.losses[step - reading.first]} at learning rate {rate:g}; its batch is "
            f"{', '.join(names[:3])}, ... (all {len(names)} in {listing}). "
            f"{checkpoints.way_out_of_a_broken_step(self.run.options)}"
        )

    def end_epoch(self) -> None:
        """Add the epoch's report to the history; what it is verified by comes later (see `show_epoch`)."""
        options, sums = self.run.options, self.state.epoch_sums
        report: dict[str, Any] = {
            "epoch": self.run.schedule.epoch(self.state.step - 1),
            "step": self.state.step,
            "loss": sums.loss / sums.steps,
            "top1": sums.top1 / sums.steps,
            "seconds": sums.seconds,
            "crops_per_second": sums.steps * options.batch_size / sums.seconds,
            "data_wait": sums.waited / sums.seconds,
            "sets": {},
            "verification": {},
        }
        self.state.epoch_sums = Sums()
        self.state.history.append(report)

    def show_epoch(self, results: dict[str, VerificationResult]) -> None:
        """Add what was measured to the last epoch's report, and show both on rank 0."""
        options, report = self.run.options, self.state.history[-1]
        report["sets"] = {pairs.name: pairs.sha256 for pairs in self.run.sets}
        if self.board is None:
            return
        for name, result in results.items():
            report["verification"][name] = {"accuracy": result.accuracy} | result.to_json()
            self.board.verification(self.state.step, name, result)
        figures = "".join(f", {name} {result['accuracy']:.2%}" for name, result in report["verification"].items())
        self.run.log(
            f"epoch {report['epoch']}/{options.epochs}: loss {report['loss']:.3f}, top-1 {report['top1']:.1%}, "
            f"{report['crops_per_second']:.0f} crops/s{figures}"
        )
        if report["data_wait"] > WAIT_WORTH_A_WORD:
            advice = advice_for_slow_input(self.run)
            self.run.log(f"the step waited for data {report['data_wait']:.0%} of the time: {advice}")

    def show_result(self) -> None:
        """Write hyper-parameters and what came of them to TensorBoard."""
        if self.board is None:
            return
        best = best_report(self.state)
        metrics = {f"val_best/{name}": result["accuracy"] for name, result in best["verification"].items()}
        metrics["val_best/loss"] = best["loss"]
        self.board.result(checkpoints.plain_options(self.run.options), metrics)

    def close(self) -> None:
        """End the progress line, flush TensorBoard."""
        if self.board is not None:
            self.bar.close()
            self.board.close()


def advice_for_slow_input(run: Run) -> str:
    """What helps against waiting for data here."""
    options = run.options
    on_gpu = run.world.device.type == "cuda" and Augmentation.named(options.augment).only_mirror_and_colours
    return "more --workers, or --decode gpu" if on_gpu and options.decode == "cpu" else "more --workers"


def best_report(state: State) -> dict[str, Any]:
    """The epoch with the best mean accuracy over the verification sets; the last one where none was measured.

    Only epochs since --val last changed are compared: accuracies on other sets say nothing about each other. For those
    whose weights are lost see `forget_lost_epochs`.
    """
    same = itertools.takewhile(lambda report: report["sets"] == state.history[-1]["sets"], state.history[::-1])
    candidates = [report for report in same if not report.get("lost")]

    def score(report: dict[str, Any]) -> tuple[float, int]:
        accuracies = [result["accuracy"] for result in report["verification"].values()]
        return (sum(accuracies) / len(accuracies) if accuracies else -1.0), report["epoch"]

    return max(candidates, key=score)


def due(run: Run, state: State) -> bool:
    """Whether the epoch that has just ended is to be verified."""
    epoch = state.history[-1]["epoch"]
    return epoch % run.options.val_every == 0 or epoch == run.options.epochs


def recall(run: Run, state: State) -> bool:
    """Take the last epoch's verification over from results.json; whether it was there.

    A checkpoint is written before its epoch is verified. What is recalled is of this very epoch (the times that the
    report holds are no other's) and of the sets of --val as they are now.
    """
    try:
        measured = utils.read_json(run.options.out / storage.RESULTS)["last"]
        if _unverified(measured) != state.history[-1]:
            return False
        if measured["sets"] != {pairs.name: pairs.sha256 for pairs in run.sets}:
            return False
        if run.sets and due(run, state) and not measured["verification"]:
            return False
        state.history[-1].update(sets=dict(measured["sets"]), verification=dict(measured["verification"]))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return True


def _unverified(report: dict[str, Any]) -> dict[str, Any]:
    """An epoch's report as it is before its epoch is verified."""
    return {**report, "sets": {}, "verification": {}}


def forget_lost_epochs(run: Run, state: State) -> str:
    """After a restart: if the best epoch so far is one that is done anew, earlier ones are not the best any more.

    That happens where the last checkpoint was damaged and the one before is gone on from. The published network is the
    discarded epoch's then, and of the epochs before it only the last one's weights are left, in that checkpoint. What
    there is to tell the user of it, or nothing.
    """
    try:
        best = _unverified(utils.read_json(run.options.out / storage.RESULTS)["best"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    if any(_unverified(report) == best for report in state.history):
        return ""
    for report in state.history:
        if report["step"] < state.step:
            report["lost"] = True
    return f"note: epoch {best.get('epoch')}, the best one, is done anew; the best is chosen among those from here on"


def publish(run: Run, state: State) -> None:
    """After an epoch's checkpoint: best.pt and embedding.pt if it is the best one, and results.json. Idempotent."""
    out, best = run.options.out, best_report(state)
    if best["epoch"] == state.history[-1]["epoch"]:
        storage.write_best(out, state.network)
    results = {
        "finished": len(state.history) == run.options.epochs,
        "epochs": run.options.epochs,
        "best_epoch": best["epoch"],
        "best": best,
        "embedding_sha256": utils.sha256_of(out / storage.EMBEDDING),  # whose figures "best" are
        "last": state.history[-1],
        "history": state.history,
        "data": run.data,
        "unreadable_crops": [run.crops.describe(index) for index in sorted(state.skipped)],
    }
    utils.write_json(out / storage.RESULTS, results)


def note_skipped(skipped: Iterable[int], run: Run, state: State) -> None:
    """Name crops that were replaced because they cannot be read, each once."""
    for index in sorted(set(skipped) - state.skipped):
        state.skipped.add(index)
        run.log(f"warning: {run.crops.describe(index)}: unreadable, replaced by the next crop")
