"""Train an embedding network with a margin head (stage 3).

    python train.py --data data/crops --network r101 --out runs/r101                       # one process: GPU or CPU
    torchrun --nproc_per_node=8 train.py --data data/crops --out runs/r101                 # one machine, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --data data/crops --out runs/r101                                         # on both of two machines

With --resume the same command goes on after any interruption.

The defaults are the published recipe: ArcFace with margin 0.6 and scale 64, SGD with Nesterov momentum 0.9, weight
decay 5e-4, batch 256, learning rate 0.1 divided by 10 at epochs 8, 16, 24, 32, gradient values clipped at 5, mirror
and colour jitter. It was made for 3.8 million crops of 85 thousand identities; for thousands of crops see the README.

The run's folder then holds: checkpoint.pt (the last state, and checkpoint-previous.pt the one before), best.pt (the
state with the best accuracy on --val), embedding.pt (the embedding network alone, of the best epoch if there is --val,
else the last), results.json, run.json (configuration, environment, hashes), log.txt, and the TensorBoard files.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import data_gen
import models
import utils
from config import Train
from data_gen import BatchOrder, CropDataset
from embedding import Embedder
from formats import crop_sets, tables
from formats.crop_sets import Crops
from options import parse
from training import checkpoints, distributed, monitor
from training.augment import Augmentation
from training.checkpoints import State
from training.distributed import World
from training.margin import MarginHead
from training.schedules import cost_of_margin, full_margin, learning_rate, margin_at
from utils import InputError
from verification import features
from verification.sets import VerificationSet, open_set

STOP, SAVE = 2, 1  # what the hosts agree on after a step; the larger one wins
SAMPLE_CROPS = 64  # shown in TensorBoard at the beginning of each epoch
HISTOGRAM_LOOKS = 10  # distributions go to TensorBoard at every tenth look
WAIT_WORTH_A_WORD = 0.1  # share of an epoch's time spent waiting for data


def check_options(options: Train, world: World) -> None:
    """Refuse what no run can use, before anything is opened."""
    if options.warmup >= options.epochs:
        raise InputError(f"--warmup {options.warmup:g} leaves nothing of --epochs {options.epochs}")
    full_margin(options)
    parts = options.accumulate * (1 if options.sync_bn else world.size)
    if options.batch_size == parts:
        raise InputError(f"--batch-size {options.batch_size}: batch norm needs more than one crop in each part of it")
    if options.decode == "gpu" and world.device.type != "cuda":
        raise InputError(f"--decode gpu: the network runs on {world.device}")
    if options.decode == "gpu" and not Augmentation.named(options.augment).only_mirror_and_colours:
        raise InputError(f"--decode gpu does mirror and colours only; --augment {options.augment} needs --decode cpu")
    if options.decode == "gpu":
        data_gen.check_decoder(world.device)
    if options.compile:
        distributed.check_compiler(world.device)
    check_out(options)


def check_out(options: Train) -> None:
    """Refuse a folder for the run that holds another one, or whose files would get among the crops."""
    if not options.resume and (options.out / checkpoints.CHECKPOINT).exists():
        raise InputError(f"{options.out}: holds a run; add --resume to go on with it, or choose another --out")
    try:
        str(options.out).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--out {options.out}: TensorBoard takes UTF-8 only; choose another name") from error
    crops, out = options.data.resolve(), options.out.resolve()
    if crops.is_file():
        crops = crops.parent
    in_records = (crops / "train.rec").exists() or options.data.is_file()
    if out == crops or (out.is_relative_to(crops) and not in_records):
        raise InputError(f"--out {options.out}: lies among the crops of --data {options.data}; choose another folder")


def build(options: Train, identities: int, steps_per_epoch: int, world: World) -> State:
    """Network, head and optimiser as they are before the first step; the same on every rank."""
    torch.manual_seed(options.seed)
    try:
        network = models.build_network(
            options.network,
            options.use_se,
            options.embedding_size,
            recompute=options.checkpoint_activations,
            drop_path=options.drop_path,
            token_mask=options.token_mask,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    if options.sync_bn:
        network = distributed.synchronise_batch_norm(network, world)
    network.to(world.device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    try:
        head = MarginHead(
            options.embedding_size,
            identities,
            loss=options.loss,
            margin=margin_at(math.inf, steps_per_epoch, options),  # the full one, so that it is checked
            scale=options.scale,
            sample_rate=options.sample_rate,
            focal_gamma=options.focal_gamma,
            rank=world.rank,
            world_size=world.size,
            seed=options.seed,
        ).to(world.device)
    except ValueError as error:
        raise InputError(str(error)) from error
    optimizer = torch.optim.SGD(
        [*network.parameters(), *head.parameters()],
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
        fused=True,
    )
    return State(network, head, optimizer)


def resume(options: Train, state: State, data: dict[str, Any], world: World, log: Callable[[str], None]) -> None:
    """Take over the last checkpoint of the run, if there is one yet. Collective."""
    found = checkpoints.load_last(options.out, log)
    if found is not None:
        checkpoints.check_same_run(options, data, *found)
        checkpoints.restore(state, *found, world)
    if world.largest(state.step) != -world.largest(-state.step):
        raise InputError(f"{options.out}: not all processes find the same checkpoint; the nodes must share this folder")
    if found is not None and world.is_main:
        checkpoints.keep(found[1])


def gradient_norm(state: State, world: World) -> Tensor:
    """L2 norm of the whole gradient, a scalar on the device. Collective: each rank holds a part of the head's."""
    head = [p.grad for p in (*state.head.parameters(), *state.head.sampled_leaves()) if p.grad is not None]
    network = [p.grad for p in state.network.parameters() if p.grad is not None]
    squares = world.sum(nn.utils.get_total_norm(head).square())
    return (squares + nn.utils.get_total_norm(network).square()).sqrt()


def apply_gradients(state: State, options: Train, rate: float) -> None:
    """Clip, update network and head, forget the gradients."""
    if options.grad_clip > 0:
        parameters = [*state.network.parameters(), *state.head.parameters(), *state.head.sampled_leaves()]
        nn.utils.clip_grad_value_(parameters, options.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.head.step(rate, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.momentum > 0)
    state.optimizer.zero_grad()
    state.head.zero_grad()


def check_finite(state: State, world: World) -> None:
    """Raise `InputError` if a weight or centre is not finite, which the next loss would be the first to show.

    Collective.
    """
    sums = torch.stack([values.detach().sum() for values in (*state.network.parameters(), state.head.centres)])
    if world.largest(int(not sums.isfinite().all())):
        raise InputError(
            f"step {state.step - 1}: it left weights that are not finite. Usually the rate is too high; the last "
            "checkpoint is from before"
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout in one step on one rank: with it, a restart needs no generator's state."""
    return (seed * 1_000_003 + step) * 4_096 + rank & (1 << 63) - 1


class Termination:
    """Notes SIGTERM and the first Ctrl-C instead of dying of them: the step is finished and a checkpoint written."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number


def next_action(options: Train, step: int, seconds: float, termination: Termination) -> int:
    """What this host wants after `step` steps, `seconds` after the last checkpoint: `STOP`, `SAVE` or nothing (0)."""
    if termination.received:
        return STOP
    every = options.save_every
    due = step % every.steps == 0 if every.steps else seconds >= every.seconds
    return SAVE if due else 0


def choose_workers(options: Train, world: World) -> int:
    """Worker processes of this rank. On CPU the network needs the cores itself: decoding is a percent of its work."""
    if options.workers is not None:
        return options.workers
    if world.device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (len(os.sched_getaffinity(0)) - 1) // local))


def advice_for_slow_input(options: Train, device: torch.device) -> str:
    """What helps against waiting for data here."""
    on_gpu = device.type == "cuda" and Augmentation.named(options.augment).only_mirror_and_colours
    return "more --workers, or --decode gpu" if on_gpu and options.decode == "cpu" else "more --workers"


class Reporter:
    """Looks at the run every few steps: stops it when the loss is not finite, and shows it on rank 0."""

    def __init__(
        self,
        options: Train,
        state: State,
        order: BatchOrder,
        crops: Crops,
        world: World,
        log: Callable[[str], None],
    ) -> None:
        self.options, self.state, self.order = options, state, order
        self.crops, self.world, self.log = crops, world, log
        self.window = monitor.Window(state.step)
        # Each micro-batch draws its own sample of centres.
        self.watch = monitor.Watch(state.head.centres_seen(options.batch_size // options.accumulate), 0.0)
        self.board, self.bar = None, None
        if world.is_main:
            steps = options.epochs * order.steps_per_epoch
            self.board = monitor.Board(options.out, state.step + 1 if state.step else 0)
            self.bar = utils.progress(steps, "train", initial=state.step, unit="step")

    def look(self, norm: Tensor | None = None) -> None:
        """Fetch the measurements since the last look; with the gradient's `norm`, also write them to TensorBoard.

        Raises `InputError` when a loss was not finite.
        """
        look = self.window.look()
        if look is None:
            return
        if look.broken_step is not None:
            self._stop(look, look.broken_step)
        epoch, since = self.state.epoch_sums, self.state.look_sums
        for measured in zip(look.losses, look.hits, strict=True):  # one by one: looks between change no rounding
            for sums in (epoch, since):
                sums[:3] = (total + value for total, value in zip(sums, (*measured, 1.0), strict=False))
        epoch[3] += look.seconds
        epoch[4] += look.waited
        loss, top1 = since[0] / since[2], since[1] / since[2]
        if norm is not None:
            self.state.look_sums = [0.0] * 3
        if self.board is None:
            return
        feature_norm = float(look.stats["feature_norm"].mean())
        step = self.state.step - 1
        rate = learning_rate(step, self.order.steps_per_epoch, self.options)
        self.watch.margin_cost = self.options.scale * cost_of_margin(self.options.loss, self.state.head.margin)
        for text in self.watch.warnings(look, feature_norm, rate / self.options.lr):
            self.log(f"warning: {text}")
        values = {
            "train/loss": loss,
            "train/top1": top1,
            "train/learning_rate": rate,
            "train/feature_norm": feature_norm,
            "speed/crops_per_second": len(look.losses) * self.order.batch_size / look.seconds,
            "speed/data_wait": look.waited / look.seconds,
            "speed/memory_gb": monitor.memory_in_use(self.world.device),
        }
        self._show(step // self.order.steps_per_epoch + 1, values)
        if norm is not None:
            self.board.scalars(self.state.step, values | {"train/gradient_norm": float(norm)})
            if self.state.step // self.options.log_every % HISTOGRAM_LOOKS == 1:
                self.board.distributions(self.state.step, look.stats)

    def _show(self, epoch: int, values: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"epoch {epoch}/{self.options.epochs}, loss {values['train/loss']:.3f}, top-1 {values['train/top1']:.1%}, "
            f"rate {values['train/learning_rate']:.3g}, {values['speed/crops_per_second']:.0f} crops/s, "
            f"waited for data {values['speed/data_wait']:.1%}",
            refresh=False,  # the update decides whether it is time for a line
        )
        self.bar.update(self.state.step - self.bar.n)

    def _stop(self, look: monitor.Look, step: int) -> None:
        rate = learning_rate(step, self.order.steps_per_epoch, self.options)
        names = [crop_sets.describe(self.crops, index) for index in self.order.global_batch(step).tolist()]
        listing = self.options.out / f"broken-step-{step}.txt"
        if self.world.is_main:
            utils.write_text(listing, "".join(f"{name}\n" for name in names))
        raise InputError(
            f"step {step}: the loss is {look.losses[step - look.first]} at learning rate {rate:g}; its batch is "
            f"{', '.join(names[:3])}, ... (all {len(names)} in {listing}). Usually the rate is too high; the last "
            "checkpoint is from before"
        )

    def end_epoch(self, sets: list[VerificationSet]) -> None:
        """Add the epoch's report to the history; on rank 0, measure the verification sets first if it is their turn."""
        loss, top1, steps, seconds, waited = self.state.epoch_sums
        report: dict[str, Any] = {
            "epoch": self.state.step // self.order.steps_per_epoch,
            "step": self.state.step,
            "loss": loss / steps,
            "top1": top1 / steps,
            "seconds": seconds,
            "crops_per_second": steps * self.order.batch_size / seconds,
            "data_wait": waited / seconds,
            "verification": {},
        }
        self.state.epoch_sums = [0.0] * 5
        self.state.history.append(report)
        if self.board is None:
            return
        due = report["epoch"] % self.options.val_every == 0 or report["epoch"] == self.options.epochs
        embedder = Embedder.from_network(self.state.network, self.world.device, name=self.options.network)
        for pairs in sets if due else []:
            result = features.verify(embedder, pairs)
            report["verification"][pairs.name] = {"accuracy": result.accuracy} | result.to_json()
            self.board.verification(self.state.step, pairs.name, result)
        figures = "".join(f", {name} {result['accuracy']:.2%}" for name, result in report["verification"].items())
        self.log(
            f"epoch {report['epoch']}/{self.options.epochs}: loss {report['loss']:.3f}, top-1 {report['top1']:.1%}, "
            f"{report['crops_per_second']:.0f} crops/s{figures}"
        )
        if report["data_wait"] > WAIT_WORTH_A_WORD:
            advice = advice_for_slow_input(self.options, self.world.device)
            self.log(f"the step waited for data {report['data_wait']:.0%} of the time: {advice}")

    def show_result(self) -> None:
        """Write hyper-parameters and what came of them to TensorBoard."""
        if self.board is None:
            return
        best = best_report(self.state)
        metrics = {f"best/{name}": result["accuracy"] for name, result in best["verification"].items()}
        metrics["best/loss"] = best["loss"]
        self.board.result(checkpoints.plain_options(self.options), metrics)

    def close(self) -> None:
        """End the progress line, flush TensorBoard."""
        if self.board is not None:
            self.bar.close()
            self.board.close()


def best_report(state: State) -> dict[str, Any]:
    """The epoch with the best mean accuracy over the verification sets; the last one where none was measured."""

    def score(report: dict[str, Any]) -> tuple[float, int]:
        accuracies = [result["accuracy"] for result in report["verification"].values()]
        return (sum(accuracies) / len(accuracies) if accuracies else -1.0), report["epoch"]

    return max(state.history, key=score)


def publish(options: Train, state: State, crops: Crops, data: dict[str, Any]) -> None:
    """After an epoch's checkpoint: best.pt and embedding.pt if it is the best one, and results.json. Idempotent."""
    best = best_report(state)
    if best["epoch"] == state.history[-1]["epoch"]:
        checkpoints.write_best(options.out, state.network)
    results = {
        "finished": len(state.history) == options.epochs,
        "epochs": options.epochs,
        "best_epoch": best["epoch"],
        "best": best,
        "last": state.history[-1],
        "history": state.history,
        "data": data,
        "unreadable_crops": [crop_sets.describe(crops, index) for index in sorted(state.skipped)],
    }
    utils.write_json(options.out / checkpoints.RESULTS, results)


def note_skipped(skipped: Iterable[int], state: State, crops: Crops, log: Callable[[str], None]) -> None:
    """Name crops that were replaced because they cannot be read, each once."""
    for index in sorted(set(skipped) - state.skipped):
        state.skipped.add(index)
        log(f"warning: {crop_sets.describe(crops, index)}: unreadable, replaced by the next crop")


def train(options: Train, world: World) -> int:
    """Run from the start or the last checkpoint to the end. Returns the exit code."""
    check_options(options, world)
    termination = Termination()
    skip = options.skip_unreadable
    crops = crop_sets.open_training_set(options.data, skip_unreadable=skip)
    if options.decode == "gpu":
        data_gen.check_jpeg(crops)
    order = BatchOrder(len(crops), options.batch_size, options.seed, world.rank, world.size, options.accumulate)
    fingerprint = crop_sets.fingerprint(crops, skip_unreadable=skip)
    data = {"crops": len(crops), "identities": crops.identities, "fingerprint": fingerprint}
    world.check_same(fingerprint, f"{options.data}: the processes do not see the same crops there")
    log = monitor.RunLog(options.out / "log.txt" if world.is_main else None)
    val_sets = options.val if world.is_main else []
    sets = [open_set(path, options.out / "val", device=world.device) for path in val_sets]

    names = [pairs.name for pairs in sets]
    if len(set(names)) < len(names):
        raise InputError(f"--val: two sets have the same name ({', '.join(names)}); rename one")

    amp = options.amp if options.amp is not None else world.device.type == "cuda"
    distributed.prepare_device(world.device)
    state = build(options, crops.identities, order.steps_per_epoch, world)
    if options.resume:
        resume(options, state, data, world, log)
    model = distributed.data_parallel(state.network, world)
    if options.compile:
        model = torch.compile(model)
    model.train()
    feeding = models.feeding_of(state.network)

    steps = options.epochs * order.steps_per_epoch
    log(
        f"{crops.name}: {len(crops)} crops of {crops.identities} identities, {order.steps_per_epoch} steps of "
        f"{options.batch_size} an epoch ({len(crops) % options.batch_size} crops of each epoch's order left over), "
        f"{options.network} on {world.size} x {world.device}, bfloat16 {'on' if amp else 'off'}"
        + (f"; goes on at step {state.step} of {steps}" if state.step else "")
    )
    for note in getattr(crops, "notes", []):
        log(f"note: {note}")
    if world.is_main:
        monitor.write_run(options.out, checkpoints.plain_options(options), data, sets, world)
        tables.write_identities(options.out / checkpoints.IDENTITIES, crop_sets.identity_names(crops))
        checkpoints.remove_leftovers(options.out)
    if state.history and state.history[-1]["step"] == state.step:
        with distributed.averaged_statistics(state.network, world):
            if world.is_main:
                publish(options, state, crops, data)  # in case the run was killed just after this checkpoint

    recipe = Augmentation.named(options.augment)
    dataset = CropDataset(crops, recipe, options.seed, skip_unreadable=skip, encoded=options.decode == "gpu")
    wanted, pin = choose_workers(options, world), world.device.type == "cuda"
    workers, _ = data_gen.workers_that_fit(dataset, order, wanted)
    if workers < wanted:
        log(f"note: {data_gen.SHARED_MEMORY} has room for the batches of {workers} of {wanted} workers")
    with (
        # Workers are forked before the reporter has threads.
        data_gen.loading(dataset, order, state.step, steps, workers=workers, pin_memory=pin) as batches,
        contextlib.closing(Reporter(options, state, order, crops, world, log)) as reporter,
    ):
        window = reporter.window
        saved_at = time.monotonic()
        while state.step < steps:
            step = state.step
            rate = learning_rate(step, order.steps_per_epoch, options)
            state.head.margin = margin_at(step, order.steps_per_epoch, options)
            torch.manual_seed(step_seed(options.seed, step, world.rank))
            total = torch.zeros((), device=world.device)
            for part in range(options.accumulate):
                began = time.perf_counter()
                batch = next(batches)
                window.waited += time.perf_counter() - began
                if batch.error:
                    raise InputError(batch.error)
                images, labels, skipped = data_gen.to_device(batch, dataset, world.device)
                note_skipped([*batch.skipped.tolist(), *skipped], state, crops, log)
                inputs = data_gen.normalise(images, feeding, channels_last=options.channels_last)
                if reporter.board and part == 0 and step % order.steps_per_epoch == 0:
                    reporter.board.crops(step, data_gen.denormalise(inputs[:SAMPLE_CROPS], feeding))
                last = part == options.accumulate - 1
                with contextlib.nullcontext() if last or world.size == 1 else model.no_sync():
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                        loss, stats = state.head(model(inputs), labels)
                    (loss / options.accumulate).backward()
                total += loss.detach() / options.accumulate
            looking = (step + 1) % options.log_every == 0
            norm = gradient_norm(state, world) if looking else None
            apply_gradients(state, options, rate)
            window.add(total, stats)
            state.step += 1
            if looking:
                reporter.look(norm)

            action = world.largest(next_action(options, state.step, time.monotonic() - saved_at, termination))
            epoch_ends = state.step % order.steps_per_epoch == 0
            if not action and not epoch_ends:
                continue
            reporter.look()  # a checkpoint of a broken state must not be written
            check_finite(state, world)
            note_skipped(world.union(state.skipped), state, crops, log)
            with distributed.averaged_statistics(state.network, world) as statistics:
                if epoch_ends:
                    reporter.end_epoch(sets)
                content = checkpoints.collect(state, options, order.steps_per_epoch, data, world, statistics)
                if content is not None:
                    checkpoints.write_last(options.out, content)
                    del content
                    if epoch_ends:
                        publish(options, state, crops, data)
            world.wait()
            saved_at = time.monotonic()
            window.since = time.perf_counter()
            if action == STOP and state.step < steps:
                log(f"stopped after step {state.step} of {steps}; the same command with --resume goes on")
                return 128 + termination.received if termination.received else 128 + signal.SIGTERM
        reporter.show_result()
        log(f"done: {steps} steps; {options.out / checkpoints.EMBEDDING} is of epoch {best_report(state)['epoch']}")
        return 0


@utils.command
def main() -> int:
    """See the file's docstring."""
    options = parse(Train, __doc__)
    with distributed.join(options.device) as world:
        try:
            return train(options, world)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"--batch-size {options.batch_size}: {str(error).splitlines()[0]} Parts of a batch (--accumulate 2), "
                "--checkpoint-activations and --sample-rate need less"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
