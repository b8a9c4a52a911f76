"""Train an embedding network with a margin head (stage 3).

    python train.py --data data/crops --network r101 --out runs/r101                       # one process: GPU or CPU
    torchrun --nproc_per_node=8 train.py --data data/crops --out runs/r101                 # one machine, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --data data/crops --out runs/r101                                         # on both of two machines

With --resume the same command goes on after any interruption. With --init FILE it begins with somebody's weights, not
with noise (docs/networks.md):

    python train.py --data data/crops --network ir50 --init backbone.pth --lr 0.01 --head-lr 0.1 --out runs/tuned

The defaults are the published recipe: ArcFace with margin 0.6 and scale 64, SGD with Nesterov momentum 0.9, weight
decay 5e-4, batch 256, learning rate 0.1 divided by 10 at epochs 8, 16, 24, 32, gradient values clipped at 5, mirror
and colour jitter. It was made for 3.8 million crops of 85 thousand identities; for thousands of crops see the README.

The run's folder then holds: checkpoint.pt (the last state, and checkpoint-previous.pt the one before), best.pt (the
state with the best accuracy on --val), embedding.pt (the embedding network alone, of the best epoch if there is --val,
else the last), results.json, run.json (configuration, environment, hashes), log.txt, identities.tsv and tensorboard/.
"""

import passive_threads  # noqa: F401  # isort: skip

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import data_gen
import models
import utils
from config import CROP_SIZE, Train
from data_gen import BatchOrder, CropDataset
from formats import crop_sets, tables
from formats.selection import select
from options import parse, plain_options, refuse_useless
from training import checkpoints, distributed, finetune, monitor, reporting, storage, validation
from training.augment import Augmentation
from training.distillation import Distillation, NoHead, OnlineTeacher, StoredTeacher, Teacher, open_teacher
from training.distributed import World
from training.margin import BETAS, EPSILON, MarginHead
from training.run import Run, State
from training.schedules import Schedule
from utils import InputError
from verification.metrics import VerificationResult
from verification.sets import VerificationSet, open_set

STOP, SAVE = 2, 1  # what the hosts agree on after a step; the larger one wins
SAMPLE_CROPS = 64  # shown in TensorBoard at the beginning of each epoch
# What may differ among the processes of a run.
OWN_OPTIONS = frozenset("data exclude val init teacher teacher_embeddings out workers decode device".split())
# What only a margin head understands; margin and scale are not among them, since a recipe may go on without labels.
HEAD_ONLY = ("filter", "sub_centres", "focal_gamma", "sample_rate", "head_lr", "init_head")


def check_options(options: Train, world: World) -> None:
    """Refuse what no run can use, before anything is opened."""
    if options.warmup >= options.epochs:
        raise InputError(f"--warmup {options.warmup:g} leaves nothing of --epochs {options.epochs}")
    Schedule(options, 1)  # checks the margin
    parts = options.accumulate * (1 if options.sync_bn else world.size)
    if options.batch_size == parts:
        raise InputError(f"--batch-size {options.batch_size}: batch norm needs more than one crop in each part of it")
    if options.sync_bn and options.compile:
        raise InputError("--sync-bn: synchronised batch norm breaks what --compile compiles into pieces; leave one out")
    if options.small_epochs >= options.epochs:
        raise InputError(f"--small-epochs {options.small_epochs:g} leaves no whole crops to --epochs {options.epochs}")
    if options.small_epochs and not models.takes_side(options.network, options.small_side):
        raise InputError(f"--small-epochs: {options.network} takes crops of {CROP_SIZE} pixels only")
    if options.decode == "gpu" and world.device.type != "cuda":
        raise InputError(f"--decode gpu: the network runs on {world.device}")
    if options.decode == "gpu" and not Augmentation.named(options.augment).only_mirror_and_colours:
        raise InputError(f"--decode gpu does mirror and colours only; --augment {options.augment} needs --decode cpu")
    if options.decode == "gpu":
        data_gen.check_decoder(world.device)
    if options.compile:
        distributed.check_compiler(world.device)
    if options.loss == "none" and options.teacher is None:
        raise InputError("--loss none: without a margin loss there has to be a --teacher to learn from")
    check_beginning(options)
    check_unused(options)
    check_out(options)


def check_same_options(options: Train, world: World) -> None:
    """Refuse processes with command lines that differ in what they do together: each would train another network.

    Where a machine has its files, and how it reads them, is its own affair; what is in them is compared elsewhere.
    Collective.
    """
    every = world.gather({key: value for key, value in plain_options(options).items() if key not in OWN_OPTIONS})
    for key in every[0]:
        values = list(dict.fromkeys(str(given.get(key)) for given in every))
        if len(values) > 1:
            raise InputError(
                f"--{key.replace('_', '-')}: not the same for all processes ({', '.join(values)}); "
                "start all of them with the same command line"
            )


def check_beginning(options: Train) -> None:
    """Refuse what does not go together in fine-tuning."""
    if options.init is None and options.init_head == "means":
        raise InputError("--init-head means: the embeddings of a network without --init mean nothing")
    if options.init is None and options.freeze != ["none"]:
        raise InputError(f"--freeze {' '.join(options.freeze)}: there is nothing to keep without --init")
    if options.freeze_epochs is not None and options.freeze == ["none"]:
        raise InputError("--freeze-epochs: nothing is frozen; give --freeze all, or stages and a number")
    if options.freeze == ["all"] and options.loss == "none":
        raise InputError("--freeze all: with --loss none there is nothing else to train")
    if options.freeze == ["all"] and options.teacher is not None and options.freeze_epochs is None:
        raise InputError("--teacher: --freeze all leaves no network that could learn from it; give --freeze-epochs")


def check_unused(options: Train) -> None:
    """Refuse what was given and would do nothing: whoever gave it wanted something else."""
    foreign = options.network in models.NETWORKS and models.NETWORKS[options.network].family != "released"
    of_teacher = ("weight", "online", "embeddings", "mean", "std", "channels")
    useless: list[tuple[bool, str, Sequence[str]]] = [
        (options.teacher is None, "there is no --teacher", [f"teacher_{name}" for name in of_teacher]),
        (options.exclude is None, "there is no audit to --exclude by", ["relabel"]),
        (not options.val, "there is no --val", ["val_every"]),
        (options.teacher_online, "with --teacher-online none are kept", ["teacher_embeddings"]),
        (options.loss == "none", "--loss none has no head", HEAD_ONLY),
        (options.schedule != "steps", f"--schedule {options.schedule} has none", ["milestones"]),
        (not options.small_epochs, "without --small-epochs all crops are whole", ["small_side"]),
        (options.optimizer == "adamw", "is of --optimizer sgd", ["momentum"]),
        (foreign, f"{options.network} is not of the released family", ["use_se"]),
    ]
    refuse_useless(options, useless)


def check_out(options: Train) -> None:
    """Refuse a folder for the run that holds another one, or whose files would get among the crops."""
    if not options.resume and (options.out / storage.CHECKPOINT).exists():
        raise InputError(f"{options.out}: holds a run; add --resume to go on with it, or choose another --out")
    try:
        str(options.out).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--out {options.out}: TensorBoard takes UTF-8 only; choose another name") from error
    crops = options.data.resolve()
    if crops.is_file():
        crops = crops.parent
    in_records = (crops / "train.rec").exists() or options.data.is_file()
    for name, folder in (("--out", options.out), ("--teacher-embeddings", options.teacher_embeddings)):
        place = (folder or options.out).resolve()
        if place == crops or (place.is_relative_to(crops) and not in_records):
            raise InputError(f"{name} {folder}: lies among the crops of --data {options.data}; choose another folder")


def build_network(options: Train, world: World) -> nn.Module:
    """The network as it is before the first step, on its device."""
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
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return network.to(world.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it


def build_head(options: Train, identities: int, schedule: Schedule, world: World) -> MarginHead | NoHead:
    """This rank's part of the head as it is before the first step, on its device."""
    if options.loss == "none":
        return NoHead(options.embedding_size, world.device)
    try:
        return MarginHead(
            options.embedding_size,
            identities,
            loss=options.loss,
            margin=schedule.full_margin,  # so that it is checked
            scale=options.scale,
            sub_centres=options.sub_centres,
            filter=options.filter,
            sample_rate=options.sample_rate,
            focal_gamma=options.focal_gamma,
            optimizer=options.optimizer,
            rank=world.rank,
            world_size=world.size,
            seed=options.seed,
        ).to(world.device)
    except ValueError as error:
        raise InputError(str(error)) from error


def build_optimizer(options: Train, network: nn.Module, head: nn.Module, *others: nn.Module) -> torch.optim.Optimizer:
    """What updates the network, a map to the teacher among `others`, and a full head; a sampled head updates itself.

    The second group, where there is one, is the head's.
    """
    groups = [[parameter for module in (network, *others) for parameter in module.parameters()], [*head.parameters()]]
    parameters = [{"params": group} for group in groups if group]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=options.lr, betas=BETAS, eps=EPSILON, weight_decay=options.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
        fused=True,
    )


def build(options: Train, identities: int, schedule: Schedule, world: World, teacher: Teacher | None = None) -> State:
    """Network, head and optimiser as they are before the first step; the same on every rank."""
    torch.manual_seed(options.seed)
    network = build_network(options, world)
    head = build_head(options, identities, schedule, world)
    if teacher is None:
        return State(network, head, build_optimizer(options, network, head))
    distillation = Distillation(teacher, options.embedding_size, options.teacher_weight, world).to(world.device)
    return State(network, head, build_optimizer(options, network, head, distillation), distillation)


def resume(run: Run, state: State) -> dict[str, list[Any]]:
    """Take over the last checkpoint of the run, if there is one yet. Collective.

    Returns the options that are other ones from here on, as {name: [before, now]}.
    """
    changes: dict[str, list[Any]] = {}
    options, world = run.options, run.world
    found = storage.find_last(options.out, world, run.log)
    if found is not None:
        changes = checkpoints.check_same_run(run, found)
        checkpoints.restore(state, found, world)
        if note := reporting.forget_lost_epochs(run, state):
            run.log(note)
        if world.is_main:
            storage.keep(found.path)
    return changes


def loss_of(
    state: State, features: Tensor, labels: Tensor, images: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What to differentiate on this rank, the loss of the global batch, and what is worth watching. Collective.

    `images` uint8 [n, 112, 112, 3] and `indices` [n] of the crops are the teacher's, if there is one.
    """
    loss, stats = state.head(features, labels)
    if state.distillation is None:
        return loss, loss, stats
    share, distance, by_teacher = state.distillation(features, images, indices)
    return loss + share, loss + distance, stats or by_teacher


def begin_from(run: Run, state: State) -> None:
    """Give the network the weights of --init, and the head the means of the identities. Collective."""
    options, world, size = run.options, run.world, run.options.embedding_size
    state.begun_from = finetune.load_weights(state.network, str(options.init), options.network, size)
    digest = state.begun_from["sha256"]
    world.check_same(digest, f"--init {options.init}: the processes do not see the same file there")
    run.log(f"begins with {state.begun_from['network']} of {state.begun_from['file']} (SHA-256 {digest[:12]} ...)")
    if options.init_head != "random" and isinstance(state.head, MarginHead):
        key = {"weights": digest, "network": options.network, "crops": run.data["fingerprint"]}
        skip = options.skip_unreadable
        finetune.begin_with_means(state.head, state.network, run.crops, key, options.out, world, skip)


def ready_to_train(state: State, freezing: finetune.Freezing, options: Train, world: World) -> Any:
    """The network in training mode as far as it is not frozen now, behind data parallelism and compilation."""
    freezing.apply(state.step)
    model = distributed.data_parallel(state.network, world)
    return torch.compile(model, dynamic=False) if options.compile else model


def gradient_norm(state: State, world: World) -> Tensor:
    """L2 norm of the whole gradient, a scalar on the device. Collective: each rank holds a part of the head's."""
    head = [p.grad for p in (*state.head.parameters(), *state.head.sampled_leaves()) if p.grad is not None]
    network = [p.grad for p in replicated(state) if p.grad is not None]
    squares = world.sum(nn.utils.get_total_norm(head).square().to(world.device))
    return (squares + nn.utils.get_total_norm(network).square()).sqrt()


def replicated(state: State) -> list[nn.Parameter]:
    """The parameters that every rank has: the network's, and those of a map to the teacher."""
    return [*state.network.parameters(), *(state.distillation.parameters() if state.distillation else ())]


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a momentum of zero to what is trained for the first time beside what has one, as after `--freeze-epochs`.

    It is what SGD begins with anyway; but the fused one takes momenta for all parameters of a group or for none.
    """
    for group in optimizer.param_groups:
        trained = [values for values in group["params"] if values.grad is not None]
        new = [values for values in trained if optimizer.state.get(values, {}).get("momentum_buffer") is None]
        for values in new if group.get("momentum") and len(new) < len(trained) else ():
            optimizer.state[values]["momentum_buffer"] = torch.zeros_like(values)


def apply_gradients(state: State, options: Train, rate: float) -> None:
    """Clip, update network and head, forget the gradients."""
    if options.grad_clip > 0:
        parameters = [*replicated(state), *state.head.parameters(), *state.head.sampled_leaves()]
        nn.utils.clip_grad_value_(parameters, options.grad_clip)
    head_rate = rate if options.head_lr is None else rate * (options.head_lr / options.lr)
    for group, group_rate in zip(state.optimizer.param_groups, (rate, head_rate), strict=False):
        group["lr"] = group_rate
    begin_momentum(state.optimizer)
    state.optimizer.step()
    state.head.step(
        head_rate, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.momentum > 0
    )
    state.optimizer.zero_grad()
    state.head.zero_grad()


def check_finite(state: State, options: Train, world: World) -> None:
    """Raise `InputError` if a weight or centre is not finite, which the next loss would be the first to show.

    Collective.
    """
    sums = torch.stack([values.detach().sum() for values in (*replicated(state), state.head.centres)])
    if world.largest(int(not sums.isfinite().all())):
        raise InputError(
            f"step {state.step - 1}: it left weights that are not finite. "
            f"{checkpoints.way_out_of_a_broken_step(options)}"
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
    due = step % every.steps == 0 if every.steps else every.seconds is not None and seconds >= every.seconds
    return SAVE if due else 0


def choose_workers(options: Train, world: World) -> int:
    """Worker processes of this rank. On CPU the network needs the cores itself: decoding is a percent of its work."""
    if options.workers is not None:
        return options.workers
    if world.device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (len(os.sched_getaffinity(0)) - 1) // local))


def open_run(options: Train, world: World, log: monitor.RunLog) -> Run:
    """Open the data and the log: everything that does not change. Collective."""
    # An audit speaks of crops with labels, and drops those that cannot be read.
    labelled = options.loss != "none" or options.exclude is not None
    skip = options.skip_unreadable or options.exclude is not None
    crops = crop_sets.open_training_set(options.data, skip_unreadable=skip, labelled=labelled)
    fingerprint = crop_sets.fingerprint(crops, skip_unreadable=skip)
    if options.exclude is not None:
        crops, fingerprint = select(crops, fingerprint, options.exclude, relabel=options.relabel)
    if options.decode == "gpu":
        data_gen.check_jpeg(crops)
    order = BatchOrder(len(crops), options.batch_size, options.seed, world.rank, world.size, options.accumulate)
    world.check_same(fingerprint, f"{options.data}: the processes do not see the same crops there")
    data: dict[str, Any] = {"crops": len(crops), "identities": crops.identities, "fingerprint": fingerprint}
    if world.is_main:
        log.open(options.out / "log.txt")
    sets = open_verification_sets(options, world)
    schedule = Schedule(options, order.steps_per_epoch)
    return Run(options, world, crops, data, order, schedule, sets, log)


def find_teacher(run: Run) -> Teacher:
    """The teacher, not yet prepared; a restart recognises it by its hash. Collective."""
    options, world = run.options, run.world
    embedder = open_teacher(options, world.device)
    run.data["teacher"] = embedder.sha256
    world.check_same(str(embedder.sha256), f"--teacher {options.teacher}: not the same for all processes")
    if options.teacher_online:
        return OnlineTeacher(embedder)
    return StoredTeacher(options, run.crops, run.data["fingerprint"], world, embedder)


def open_verification_sets(options: Train, world: World) -> list[VerificationSet]:
    """The sets of --val; raises `InputError` if two have the same name. Collective.

    Rank 0 comes first: it finds the faces of folders of photos, and the others take them from the cache.
    """
    sets: list[VerificationSet] = []
    for turn in (True, False):
        if world.is_main == turn:
            sets = [open_set(path, options.out / "val", device=world.device) for path in options.val]
            names = [pairs.name for pairs in sets]
            if len(set(names)) < len(names):
                raise InputError(f"--val: two sets have the same name ({', '.join(names)}); rename one")
        world.wait()
    return sets


def begin(run: Run, state: State, changes: dict[str, list[Any]], amp: bool) -> None:
    """Say what is trained on what, and write what a run's folder holds from its start. Collective.

    `changes` is what `resume` gave.
    """
    options, world, crops, size = run.options, run.world, run.crops, run.options.batch_size
    people = "without labels" if options.loss == "none" else f"of {crops.identities} identities"
    run.log(
        f"{crops.name}: {len(crops)} crops {people}, {run.order.steps_per_epoch} steps of "
        f"{size} an epoch ({len(crops) % size} crops of each epoch's order left over), "
        f"{options.network} on {world.size} x {world.device}, bfloat16 {'on' if amp else 'off'}"
        + (f"; goes on at step {state.step} of {run.steps}" if state.step else "")
    )
    if amp and utils.emulates_bfloat16(world.device):
        run.log(
            "warning: --amp: this processor has no bfloat16 of its own; without it a step takes a fraction of the time"
        )
    for note in crops.notes:
        run.log(f"note: {note}")
    if changes:
        run.log(f"note: goes on with {checkpoints.describe_changes(changes)}")
    past = [report["sets"] for report in state.history if report["step"] < state.step]
    if past and past[-1] != {pairs.name: pairs.sha256 for pairs in run.sets}:
        run.log("note: --val changed; which epoch is the best is decided anew among those to come")
    if advice := monitor.advice_for_few_identities(run):
        run.log(f"warning: {advice}")
    if world.is_main:
        monitor.write_run(run, state, changes)
        counts = np.bincount(crops.labels, minlength=crops.identities).tolist()
        tables.write_identities(options.out / storage.IDENTITIES, crops.identity_names, counts)
        storage.remove_leftovers(options.out)


def save(
    run: Run, state: State, reporter: reporting.Reporter, writer: storage.Writer, termination: Termination, ends: bool
) -> bool:
    """Have a checkpoint written, and after it verify and publish an epoch that `ends`. Collective.

    Returns False if a signal came while the epoch was verified: it is done anew when the run goes on.
    """
    reporter.read()  # a checkpoint of a broken state must not be written
    check_finite(state, run.options, run.world)
    reporting.note_skipped(run.world.union(state.skipped), run, state)
    with distributed.averaged_statistics(state.network, run.world) as statistics:
        if ends:
            reporter.end_epoch()
        writer.submit(checkpoints.collect(run, state, statistics))
        finished = not ends or verify(run, state, reporter, writer, termination)
    run.world.wait()
    return finished


def verify(
    run: Run, state: State, reporter: reporting.Reporter, writer: storage.Writer, termination: Termination
) -> bool:
    """Measure --val if it is its turn, publish the epoch; False if a signal came meanwhile. Collective.

    To be called with the averaged statistics, and with the epoch's checkpoint on its way.
    """
    results: dict[str, VerificationResult] | None = {}
    if reporting.due(run, state):
        results = validation.measure(run, state.network, lambda: termination.received is not None)
    if results is None:
        return False
    reporter.show_epoch(results)
    writer.wait()
    if run.world.is_main:
        finetune.remove_leftovers(run.options.out)
        reporting.publish(run, state)
    return True


def make_good(
    run: Run, state: State, reporter: reporting.Reporter, writer: storage.Writer, termination: Termination
) -> bool:
    """Verify and publish an epoch whose checkpoint is the last thing that was done for it. As `verify`. Collective."""
    if not state.history or state.history[-1]["step"] != state.step:
        return True
    with distributed.averaged_statistics(state.network, run.world):
        if run.world.shared(reporting.recall(run, state)):
            if run.world.is_main:
                reporting.publish(run, state)
            return True
        return verify(run, state, reporter, writer, termination)


def train(options: Train, world: World, log: monitor.RunLog) -> int:
    """Run from the start or the last checkpoint to the end. Returns the exit code."""
    check_options(options, world)
    check_same_options(options, world)
    run = open_run(options, world, log)
    order, schedule = run.order, run.schedule
    amp = options.amp if options.amp is not None else world.device.type == "cuda"
    distributed.prepare_device(world.device)
    teacher = find_teacher(run) if options.teacher is not None else None
    state = build(options, run.crops.identities, schedule, world, teacher)
    # What refuses comes before the long passes over all crops: those for the head's means and the teacher's.
    changes = resume(run, state) if options.resume else {}
    freezing = finetune.Freezing(state.network, options.freeze, schedule.freeze_steps)
    if options.init is not None and state.step == 0:  # the first checkpoint is of a later step
        begin_from(run, state)
    if teacher is not None:
        teacher.prepare()
    model = ready_to_train(state, freezing, options, world)
    begin(run, state, changes, amp)
    termination = Termination()  # until here a signal simply ends the process: what is kept is written whole
    feeding = models.feeding_of(state.network)

    recipe, encoded = Augmentation.named(options.augment), options.decode == "gpu"
    dataset = CropDataset(run.crops, recipe, options.seed, skip_unreadable=options.skip_unreadable, encoded=encoded)
    wanted, pin = choose_workers(options, world), world.device.type == "cuda"
    workers, _ = data_gen.workers_that_fit(dataset, order, wanted)
    if workers < wanted:
        run.log(f"note: {data_gen.SHARED_MEMORY} has room for the batches of {workers} of {wanted} workers")
    with (
        # Workers are forked before the reporter has threads.
        data_gen.loading(dataset, order, state.step, run.steps, workers=workers, pin_memory=pin) as batches,
        contextlib.closing(reporting.Reporter(run, state)) as reporter,
        contextlib.closing(storage.Writer(options.out, world)) as writer,
    ):
        window = reporter.window
        finished = make_good(run, state, reporter, writer, termination)
        saved_at = time.monotonic()
        window.since = time.perf_counter()
        while finished and state.step < run.steps:
            step = state.step
            if freezing.ends_at(step):
                del model  # what it hung on the parameters has to go before another one comes
                model = ready_to_train(state, freezing, options, world)
                run.log(f"step {step}: nothing is frozen any more")
            state.head.margin = schedule.margin(step)
            torch.manual_seed(step_seed(options.seed, step, world.rank))
            total, top1 = torch.zeros((), device=world.device), torch.zeros((), device=world.device)
            for part in range(options.accumulate):
                began = time.perf_counter()
                batch = next(batches)
                window.waited += time.perf_counter() - began
                if batch.error:
                    raise InputError(batch.error)
                images, labels, skipped = data_gen.to_device(batch, dataset, world.device)
                reporting.note_skipped([*batch.skipped.tolist(), *skipped], run, state)
                layout, side = options.channels_last, schedule.side(step)
                inputs = data_gen.to_inputs(images, feeding, channels_last=layout, side=side)
                if reporter.board and part == 0 and schedule.starts_epoch(step):
                    reporter.board.crops(step, data_gen.to_pixels(inputs[:SAMPLE_CROPS], feeding))
                last = part == options.accumulate - 1
                # A network that is frozen as a whole has no gradients to wait with.
                with contextlib.nullcontext() if last else getattr(model, "no_sync", contextlib.nullcontext)():
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                        share, loss, stats = loss_of(state, model(inputs), labels, images, batch.indices)
                    (share / options.accumulate).backward()
                total += loss.detach() / options.accumulate
                top1 += stats["top1"] / options.accumulate
            if state.distillation is not None:
                state.distillation.sum_gradients()
            shown = (step + 1) % options.log_every == 0
            norm = gradient_norm(state, world) if shown else None
            apply_gradients(state, options, schedule.learning_rate(step))
            window.add(total, stats | {"top1": top1})
            state.step += 1
            if shown:
                reporter.read(norm)

            writer.check()
            action = world.largest(next_action(options, state.step, time.monotonic() - saved_at, termination))
            epoch_ends = schedule.starts_epoch(state.step)
            if not action and not epoch_ends:
                continue
            finished = save(run, state, reporter, writer, termination, epoch_ends)
            saved_at = time.monotonic()
            window.since = time.perf_counter()
            if action == STOP:
                break
        writer.wait()
        if not finished or state.step < run.steps:
            run.log(f"stopped after step {state.step} of {run.steps}; the same command with --resume goes on")
            return 128 + (termination.received or signal.SIGTERM)
        reporter.show_result()
        best = reporting.best_report(state)["epoch"]
        run.log(f"done: {run.steps} steps; {options.out / storage.EMBEDDING} is of epoch {best}")
        return 0


@utils.command
def main() -> int:
    """See the file's docstring."""
    options = parse(Train, __doc__)
    with distributed.join(options.device) as world, monitor.RunLog() as log:
        try:
            return train(options, world, log)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"--batch-size {options.batch_size}: {str(error).splitlines()[0]} Parts of a batch (--accumulate 2), "
                "--checkpoint-activations and --sample-rate need less"
            ) from error


if __name__ == "__main__":
    distributed.leave(main)
