"""Train an embedding network with a margin head (stage 3).

    python train.py --data data/crops --network r101 --out runs/r101                      one process, GPU or CPU
    torchrun --nproc_per_node=8 train.py --data data/crops --out runs/r101                one machine, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...    on both
    machines python train.py ... --out runs/r101 --resume                                          goes on after any
    interruption

The defaults are the published recipe: ArcFace with margin 0.6 and scale 64, SGD with Nesterov momentum 0.9, weight
decay 5e-4, batch 256, learning rate 0.1 divided by 10 at epochs 8, 16, 24, 32, gradient values clipped at 5, mirror
and colour jitter. It was made for 3.8 million crops of 85 thousand identities; for thousands of crops see the README.

The run's folder then holds: checkpoint.pt (the last state, and checkpoint-previous.pt the one before), best.pt (the
state with the best accuracy on --val), embedding.pt (the embedding network alone, of the best epoch if there is --val,
else the last), results.json, run.json (configuration, environment, hashes), log.txt, and the TensorBoard files.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import config
import data_gen
import distributed
import models
import monitor
import utils
import verification
from config import Train
from data_gen import Augmentation, BatchOrder, CropDataset, Crops
from distributed import World
from embedding import Embedder
from margin import MarginHead
from utils import InputError

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint-previous.pt", "best.pt"

DEFAULT_MARGINS = {"arcface": (0.6,), "cosface": (0.35,), "combined": (1.0, 0.3, 0.2), "adaface": (0.4,)}

# Options that may differ when a run goes on: none of them changes what is computed from one step to the next.
FREE_OPTIONS = {
    "out",
    "resume",
    "data",
    "val",
    "val_every",
    "workers",
    "device",
    "save_every",
    "log_every",
    "skip_unreadable",
}

HISTOGRAM_LOOKS = 10  # distributions go to TensorBoard at every tenth look
SAMPLE_CROPS = 64

STOP, SAVE = 2, 1  # what the hosts agree on after a step; the larger one wins


# --- schedules -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps_per_epoch: int, options: Train) -> float:
    """The rate of a step: a pure function, so a restart needs no state.

    Warm-up is linear and starts one part above zero: step 0 of n warm-up steps has 1 / (n + 1) of the full rate.
    `cosine` and `poly` (power 2, as in InsightFace's recipes) go to 0 at the end of the last epoch; their time begins
    after the warm-up.
    """
    epoch = step / steps_per_epoch
    if epoch < options.warmup:
        return options.lr * (step + 1) / (options.warmup * steps_per_epoch + 1)
    if options.schedule == "steps":
        return options.lr * 0.1 ** sum(epoch >= milestone for milestone in options.milestones)
    done = (epoch - options.warmup) / (options.epochs - options.warmup)
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (1 - done) ** 2


def margin_at(step: int, steps_per_epoch: int, options: Train) -> float | tuple[float, ...]:
    """The margin of a step: grows linearly from nothing over `--margin-warmup` epochs."""
    full = full_margin(options)
    share = min(1.0, step / (options.margin_warmup * steps_per_epoch)) if options.margin_warmup > 0 else 1.0
    if options.loss == "combined":
        return 1 + (full[0] - 1) * share, full[1] * share, full[2] * share
    return full[0] * share


def full_margin(options: Train) -> tuple[float, ...]:
    """`--margin`, or the default of the loss."""
    margin = tuple(options.margin) if options.margin else DEFAULT_MARGINS[options.loss]
    if len(margin) != len(DEFAULT_MARGINS[options.loss]):
        wanted = len(DEFAULT_MARGINS[options.loss])
        raise InputError(f"--margin {' '.join(map(str, margin))}: {options.loss} takes {wanted} number(s)")
    return margin


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    """Everything that changes while training."""

    network: nn.Module  # without the wrappers of data-parallel training and compilation
    head: MarginHead
    optimizer: torch.optim.SGD
    step: int = 0  # optimiser steps done
    epoch_sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 4)  # of loss, top-1, steps, seconds
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # a report for each finished epoch
    skipped: set[int] = dataclasses.field(default_factory=set)  # unreadable crops that were replaced


def checkpoint_of(
    state: State, options: Train, order: BatchOrder, world: World, data: dict[str, Any]
) -> dict[str, Any] | None:
    """The state as plain tensors that any number of processes can go on from; None but on rank 0. Collective."""
    distributed.average_statistics(state.network, world)
    head = state.head.full_state()
    momentum = {
        name: buffer.cpu()
        for name, p in state.network.named_parameters()
        if (buffer := _momentum(state.optimizer, p)) is not None
    }
    head_momentum = None
    if not state.head.sampled and (buffer := _momentum(state.optimizer, state.head.weight)) is not None:
        head_momentum = state.head.gather_rows(buffer)
    if not world.is_main:
        return None
    return {
        "network": {"name": options.network, "use_se": options.use_se, "embedding_size": options.embedding_size},
        "model": {key: value.cpu() for key, value in state.network.state_dict().items()},
        "head": head,
        "optimizer": {"momentum": momentum, "head_momentum": head_momentum},
        "scheduler": {"name": options.schedule, "lr": learning_rate(state.step, order.steps_per_epoch, options)},
        "epoch": state.step // order.steps_per_epoch,
        "step": state.step,
        "steps_per_epoch": order.steps_per_epoch,
        # Random numbers of a step are seeded by (seed, step, rank), those of a crop by (seed, epoch, index).
        "rng": {"seed": options.seed},
        "epoch_sums": list(state.epoch_sums),
        "history": state.history,
        "skipped": sorted(state.skipped),
        "data": data,
        "config": plain_options(options),
    }


def _momentum(optimizer: torch.optim.SGD, parameter: nn.Parameter) -> Tensor | None:
    return optimizer.state.get(parameter, {}).get("momentum_buffer")


def restore(state: State, content: dict[str, Any], path: Path) -> None:
    """Take over a checkpoint's content; every rank takes its own part of the head."""
    try:
        state.network.load_state_dict(content["model"])
        state.head.load_full_state(content["head"])
        for name, parameter in state.network.named_parameters():
            if name in content["optimizer"]["momentum"]:
                buffer = torch.empty_like(parameter).copy_(content["optimizer"]["momentum"][name])
                state.optimizer.state[parameter]["momentum_buffer"] = buffer
        whole = content["optimizer"]["head_momentum"]
        if whole is not None and not state.head.sampled:
            buffer = torch.empty_like(state.head.weight).copy_(state.head.own_rows(whole))
            state.optimizer.state[state.head.weight]["momentum_buffer"] = buffer
        state.step = content["step"]
        state.epoch_sums = list(content["epoch_sums"])
        state.history = content["history"]
        state.skipped = set(content["skipped"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: does not fit this run ({str(error).splitlines()[0]})") from error


def check_same_run(options: Train, data: dict[str, Any], content: dict[str, Any], path: Path) -> None:
    """Raise `InputError` naming every option that must not change inside a run and did."""
    saved, now = content["config"], plain_options(options)
    changed = [key for key in now if key not in FREE_OPTIONS and saved.get(key) != now[key]]
    if changed:
        named = ", ".join(f"--{key.replace('_', '-')} was {saved.get(key)}, now {now[key]}" for key in changed)
        raise InputError(f"{path}: cannot go on with other options: {named}")
    if content["data"] != data:
        raise InputError(
            f"{path}: was trained on other data than --data: {_data_line(content['data'])}; now {_data_line(data)}"
        )


def _data_line(data: dict[str, Any]) -> str:
    return f"{data['crops']} crops of {data['identities']} identities, fingerprint {data['fingerprint'][:12]}"


def last_checkpoint(folder: Path, log: Any) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint that loads; None when there is none yet. A damaged one is named and the one before is
    taken.
    """
    paths = [path for name in (CHECKPOINT, PREVIOUS) if (path := folder / name).exists()]
    for path in paths:
        try:
            content = utils.load_checkpoint(path, mmap=True)
            if "format" not in content:
                raise InputError(f"{path}: weights alone, not a training checkpoint")
            return content, path
        except InputError as error:
            if path == paths[-1]:
                raise
            log(f"warning: {error}; going back to {paths[-1].name}")
    return None


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Replace checkpoint.pt; what it was becomes checkpoint-previous.pt."""
    path = folder / CHECKPOINT
    if path.exists():
        link(path, folder / PREVIOUS)
    utils.save_checkpoint(path, content)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, in one step (both are replaced whole, never written to)."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def write_embedding(path: Path, network: nn.Module) -> None:
    """The embedding network alone: a plain state_dict under the released key names, float32, on CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with utils.atomic_path(path) as temporary:
        torch.save(state, temporary)


# --- what a run is ---------------------------------------------------------------------------------------------------


def plain_options(options: Train) -> dict[str, Any]:
    """The options as JSON and checkpoints can hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, bool | int | float | str | type(None)) else str(value)

    return {field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def environment(world: World) -> dict[str, Any]:
    """Where and with what the run is computed."""
    root = Path(__file__).resolve().parent
    sources = hashlib.sha256()
    for path in sorted(root.glob("*.py")) + sorted(root.glob("retinaface/*.py")):
        sources.update(path.name.encode() + b"\0" + path.read_bytes())

    def git(*words: str) -> str | None:
        run = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else None

    with contextlib.suppress(OSError):
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(world.device),
        "gpu": gpu,
        "processes": world.size,
        "commit": commit,
        "uncommitted_changes": bool(changes) if changes is not None else None,
        "source_sha256": sources.hexdigest(),
    }


def check_options(options: Train) -> None:
    """Refuse values that no run can use, before anything is opened."""
    for name in ("epochs", "batch_size", "accumulate", "log_every", "val_every", "embedding_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    for name in ("warmup", "margin_warmup", "weight_decay", "grad_clip", "focal_gamma", "momentum"):
        if not getattr(options, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must not be negative")
    if not options.lr > 0 or not math.isfinite(options.lr):
        raise InputError(f"--lr {options.lr} must be above 0")
    if options.warmup >= options.epochs:
        raise InputError(f"--warmup {options.warmup} leaves nothing of --epochs {options.epochs}")
    full_margin(options)


class Termination:
    """Notes a SIGTERM instead of dying of it, so that the step can be finished and a checkpoint written."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.received = True


def choose_workers(options: Train, world: World) -> int:
    """Worker processes of this rank. On CPU the network needs the cores itself, and decoding is a percent of its
    work.
    """
    if options.workers is not None:
        return options.workers
    if world.device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (len(os.sched_getaffinity(0)) - 1) // local))


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GB: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- the run ---------------------------------------------------------------------------------------------------------


def build(options: Train, identities: int, steps_per_epoch: int, world: World) -> State:
    """Network, head and optimiser as they are before the first step; the same on every rank."""
    torch.manual_seed(options.seed)
    network = models.build_network(
        options.network, options.use_se, options.embedding_size, recompute=options.checkpoint_activations
    )
    if options.sync_bn:
        network = distributed.synchronise_batch_norm(network, world)
    network.to(world.device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    try:
        head = MarginHead(
            options.embedding_size,
            identities,
            loss=options.loss,
            margin=margin_at(0, steps_per_epoch, options),
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


class Reporter:
    """Looks at the run every few steps: stops it when the loss is not finite, and shows it on rank 0."""

    def __init__(self, options: Train, state: State, order: BatchOrder, crops: Crops, world: World, log: Any) -> None:
        self.options, self.state, self.order = options, state, order
        self.crops, self.world, self.log = crops, world, log
        self.window = monitor.Window(state.step)
        angle_margin = full_margin(options)[0] if options.loss == "arcface" else 0.0
        self.watch = monitor.Watch(crops.identities, options.scale * math.sin(angle_margin))
        self.looks = 0
        self.board, self.bar = None, None
        if world.is_main:
            steps = options.epochs * order.steps_per_epoch
            self.board = monitor.Board(options.out, state.step or None)
            self.bar = utils.progress(steps, "train", initial=state.step, unit="step")

    def look(self, norm: Tensor | None = None) -> None:
        """Fetch the measurements since the last look. Raises `InputError` when a loss was not finite."""
        look = self.window.look()
        if look is None:
            return
        if look.broken_step is not None:
            self._stop_broken(look)
        sums = (sum(look.losses), look.top1 * len(look.losses), len(look.losses), look.seconds)
        self.state.epoch_sums = [total + part for total, part in zip(self.state.epoch_sums, sums, strict=True)]
        if self.board is None:
            return
        self.bar.update(self.state.step - self.bar.n)
        feature_norm = float(look.stats["feature_norm"].mean())
        for text in self.watch.warnings(look, feature_norm):
            self.log(f"warning: {text}")
        rate = learning_rate(self.state.step - 1, self.order.steps_per_epoch, self.options)
        speed = len(look.losses) * self.order.batch_size / look.seconds
        wait = look.waited / look.seconds
        epoch = (self.state.step - 1) // self.order.steps_per_epoch + 1
        self.bar.set_postfix_str(
            f"epoch {epoch}/{self.options.epochs}, loss {look.loss:.3f}, top-1 {look.top1:.1%}, rate {rate:.3g}, "
            f"{speed:.0f} crops/s, waited for data {wait:.1%}"
        )
        if norm is None:
            return
        self.board.scalars(
            self.state.step,
            {
                "train/loss": look.loss,
                "train/top1": look.top1,
                "train/learning_rate": rate,
                "train/gradient_norm": float(norm),
                "train/feature_norm": feature_norm,
                "train/margin": _last(self.state.head.margin),
                "speed/crops_per_second": speed,
                "speed/data_wait": wait,
                "speed/memory_gb": memory_in_use(self.world.device),
            },
        )
        if self.looks % HISTOGRAM_LOOKS == 0:
            self.board.distributions(self.state.step, look.stats)
        self.looks += 1

    def _stop_broken(self, look: monitor.Look) -> None:
        """The loss was not finite: name the step, its crops and its rate."""
        step = look.broken_step
        rate = learning_rate(step, self.order.steps_per_epoch, self.options)
        names = [data_gen.describe(self.crops, index) for index in self.order.global_batch(step).tolist()]
        listing = self.options.out / f"broken-step-{step}.txt"
        if self.world.is_main:
            utils.write_text(listing, "".join(f"{name}\n" for name in names))
        raise InputError(
            f"step {step}: the loss is {look.losses[step - look.first]}, learning rate {rate:g}; its batch: "
            f"{', '.join(names[:4])}, ... (all {len(names)} in {listing}). Usually the rate is too high; the last "
            "checkpoint is from before"
        )

    def close(self) -> None:
        """Flush TensorBoard and leave the progress line standing."""
        if self.world.is_main:
            self.bar.close()
            self.board.close()


def _last(margin: float | tuple[float, ...]) -> float:
    return margin[-1] if isinstance(margin, tuple) else margin


def finish_epoch(
    options: Train, state: State, sets: Sequence[verification.VerificationSet], reporter: Reporter, order: BatchOrder
) -> None:
    """On rank 0, measure the verification sets and add the epoch's report to the history."""
    loss, top1, steps, seconds = state.epoch_sums
    state.epoch_sums = [0.0] * 4
    report: dict[str, Any] = {
        "epoch": state.step // order.steps_per_epoch,
        "step": state.step,
        "loss": loss / steps,
        "top1": top1 / steps,
        "seconds": seconds,
        "crops_per_second": steps * order.batch_size / seconds,
        "verification": {},
    }
    state.history.append(report)
    if reporter.board is None:
        return
    embedder = Embedder.from_network(state.network, reporter.world.device, name=options.network)
    due = report["epoch"] % options.val_every == 0 or report["epoch"] == options.epochs
    for pairs in sets if due else ():
        result = verification.verify(embedder, pairs)
        report["verification"][pairs.name] = result.to_json() | {"accuracy": result.accuracy}
        reporter.board.verification(state.step, pairs.name, result)
    figures = "".join(f", {name} {result['accuracy']:.2%}" for name, result in report["verification"].items())
    reporter.log(
        f"epoch {report['epoch']}/{options.epochs}: loss {report['loss']:.3f}, top-1 {report['top1']:.1%}, "
        f"{report['crops_per_second']:.0f} crops/s{figures}"
    )


def score(report: dict[str, Any]) -> float:
    """What the best epoch is chosen by: mean accuracy over the verification sets; -1 when none was measured."""
    accuracies = [result["accuracy"] for result in report["verification"].values()]
    return sum(accuracies) / len(accuracies) if accuracies else -1.0


def best_report(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch with the best score; the last of equals, hence the last one without verification sets."""
    return max(history, key=lambda report: (score(report), report["epoch"]))


def publish(options: Train, state: State, crops: Crops, data: dict[str, Any]) -> None:
    """After an epoch's checkpoint: best.pt and embedding.pt if it is the best one, and results.json. Idempotent."""
    best = best_report(state.history)
    if best["epoch"] == state.history[-1]["epoch"]:
        link(options.out / CHECKPOINT, options.out / BEST)
        write_embedding(options.out / "embedding.pt", state.network)
    utils.write_json(
        options.out / "results.json",
        {
            "finished": len(state.history) == options.epochs,
            "epochs": options.epochs,
            "best_epoch": best["epoch"],
            "best": best,
            "last": state.history[-1],
            "history": state.history,
            "data": data,
            "unreadable_crops": [data_gen.describe(crops, index) for index in sorted(state.skipped)],
        },
    )


def train(options: Train, world: World) -> int:
    """Run from the start or the last checkpoint to the end. Returns the exit code."""
    check_options(options)
    folder = options.out
    if not options.resume and (folder / CHECKPOINT).exists():
        raise InputError(f"{folder}: holds a run already; add --resume to go on with it, or choose another --out")
    crops = data_gen.open_training_set(options.data)
    order = BatchOrder(len(crops), options.batch_size, options.seed, world.rank, world.size, options.accumulate)
    data = {"crops": len(crops), "identities": crops.identities, "fingerprint": data_gen.fingerprint(crops)}
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    log = monitor.RunLog(folder / "log.txt" if world.is_main else None)
    sets = (
        [verification.open_set(path, folder / "val", device=world.device) for path in options.val]
        if world.is_main
        else []
    )
    termination = Termination()

    amp = options.amp if options.amp is not None else world.device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    state = build(options, crops.identities, order.steps_per_epoch, world)
    resumed = last_checkpoint(folder, log) if options.resume else None
    if resumed is not None:
        check_same_run(options, data, *resumed)
        restore(state, *resumed)
        del resumed
    model = distributed.data_parallel(state.network, world)
    if options.compile:
        model = torch.compile(model)
    model.train()

    steps = options.epochs * order.steps_per_epoch
    log(
        f"{crops.name}: {len(crops)} crops of {crops.identities} identities, {order.steps_per_epoch} steps of "
        f"{options.batch_size} an epoch ({len(crops) % options.batch_size} crops of each epoch's order left over), "
        f"{options.network} on {world.size} x {world.device}, bfloat16 {'on' if amp else 'off'}"
        + (f"; goes on at step {state.step} of {steps}" if state.step else "")
    )
    if world.is_main:
        run = {"options": plain_options(options), "data": data, "environment": environment(world)}
        utils.write_json(folder / "run.json", run)
        if state.history and state.step % order.steps_per_epoch == 0:
            publish(options, state, crops, data)  # in case the run was killed just after this checkpoint

    dataset = CropDataset(
        crops, Augmentation.named(options.augment), options.seed, skip_unreadable=options.skip_unreadable
    )
    loader = data_gen.make_loader(
        dataset,
        order,
        state.step,
        steps,
        workers=choose_workers(options, world),
        pin_memory=world.device.type == "cuda",
    )
    batches = iter(loader)
    reporter = Reporter(options, state, order, crops, world, log)
    window = reporter.window
    saved_at = time.monotonic()
    while state.step < steps:
        step = state.step
        rate = learning_rate(step, order.steps_per_epoch, options)
        state.head.margin = margin_at(step, order.steps_per_epoch, options)
        torch.manual_seed(step_seed(options.seed, step, world.rank))
        step_loss, step_stats = torch.zeros((), device=world.device), {}
        for part in range(options.accumulate):
            began = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - began
            accept(batch, state, crops, log)
            inputs = data_gen.normalise(batch.images.to(world.device, non_blocking=True))
            labels = batch.labels.to(world.device, non_blocking=True)
            if reporter.board is not None and part == 0 and step % order.steps_per_epoch == 0:
                reporter.board.crops(step, data_gen.denormalise(inputs[:SAMPLE_CROPS]))
            last = part == options.accumulate - 1
            with contextlib.nullcontext() if last or world.size == 1 else model.no_sync():
                with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                    loss, stats = state.head(model(inputs), labels)
                (loss / options.accumulate).backward()
            step_loss += loss.detach() / options.accumulate
            step_stats = stats
        looking = (step + 1) % options.log_every == 0
        norm = gradient_norm(state, world) if looking else None
        apply_gradients(state, options, rate)
        state.step += 1
        window.add(step_loss, step_stats)
        if looking:
            reporter.look(norm)

        epoch_ends = state.step % order.steps_per_epoch == 0
        decision = world.largest(what_next(options, state.step, time.monotonic() - saved_at, termination))
        if epoch_ends:
            reporter.look()
            distributed.average_statistics(state.network, world)
            state.skipped = world.union(state.skipped)
            finish_epoch(options, state, sets, reporter, order)
        if epoch_ends or decision:
            reporter.look()
            content = checkpoint_of(state, options, order, world, data)
            if content is not None:
                write_checkpoint(folder, content)
                if epoch_ends:
                    publish(options, state, crops, data)
            del content
            world.wait()
            saved_at = time.monotonic()
            window.since = time.perf_counter()
        if decision == STOP and state.step < steps:
            log(f"terminated after step {state.step} of {steps}; the same command with --resume goes on")
            reporter.close()
            return 128 + signal.SIGTERM
    if reporter.board is not None:
        best = best_report(state.history)
        metrics = {f"best/{name}": result["accuracy"] for name, result in best["verification"].items()}
        reporter.board.result(plain_options(options), metrics | {"best/loss": best["loss"]})
    reporter.close()
    log(f"done: {steps} steps; {folder / 'embedding.pt'} is epoch {best_report(state.history)['epoch']}")
    return 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout in one step on one rank."""
    return (seed * 1_000_003 + step) * 4_096 + rank & (1 << 63) - 1


def what_next(options: Train, step: int, seconds: float, termination: Termination) -> int:
    """This host's wish after a step: `STOP`, `SAVE` or neither (0)."""
    if termination.received:
        return STOP
    every = options.save_every
    due = step % every.steps == 0 if every.steps else seconds >= every.seconds
    return SAVE if due else 0


def accept(batch: data_gen.Batch, state: State, crops: Crops, log: Any) -> None:
    """Stop for an unreadable crop; note the ones that were replaced, each once."""
    if batch.error:
        raise InputError(batch.error)
    for index in batch.skipped.tolist():
        if index not in state.skipped:
            state.skipped.add(index)
            log(f"warning: {data_gen.describe(crops, index)}: unreadable, replaced")


@utils.command
def main() -> int:
    """See the file's docstring."""
    options = config.parse(Train, __doc__)
    with distributed.join(options.device) as world:
        return train(options, world)


if __name__ == "__main__":
    sys.exit(main())
