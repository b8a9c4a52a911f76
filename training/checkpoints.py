"""The state of a training run: gathered into one file of plain tensors, and split again over any number of processes.

A run's folder holds `checkpoint.pt`, the last state, and `checkpoint-previous.pt`, the one before; both are whole at
any moment. `best.pt` is the state after the best epoch and `embedding.pt` its network alone. The price of one file for
all ranks: rank 0 collects the head's blocks one after the other, and all nodes must see the folder to go on.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import utils
from config import Train
from options import plain_options
from training.distributed import World, restore_statistics
from training.run import Run, State, Sums
from utils import InputError

CHECKPOINT, PREVIOUS, BEST, EMBEDDING = "checkpoint.pt", "checkpoint-previous.pt", "best.pt", "embedding.pt"
IDENTITIES, RESULTS, RUN = "identities.tsv", "results.json", "run.json"

# Options that may differ when a run goes on. The first change nothing of what is computed from one step to the next;
# the second change how the run goes on, and are written into the log and run.json. All others are the run itself:
# another network, head, loss, batch or seed is another run.
FREE_OPTIONS = frozenset(
    "out resume data val val_every workers decode device save_every log_every skip_unreadable "
    "teacher teacher_embeddings".split()
)
CHANGEABLE_OPTIONS = frozenset(
    "augment margin margin_warmup scale focal_gamma filter epochs lr schedule milestones warmup momentum weight_decay "
    "grad_clip accumulate amp channels_last compile checkpoint_activations sync_bn drop_path token_mask teacher_weight "
    "teacher_online freeze freeze_epochs head_lr".split()
)

# What SGD and AdamW keep for a parameter, by its name in a checkpoint.
_KEPT = {
    "momentum": "momentum_buffer",
    "mean_gradients": "exp_avg",
    "mean_squares": "exp_avg_sq",
    "optimizer_steps": "step",
}


def collect(run: Run, state: State, statistics: Tensor | None) -> dict[str, Any] | None:
    """The state as plain tensors that any number of processes can go on from; None but on rank 0. Collective.

    `statistics` is what `distributed.averaged_statistics` gave, inside which this is to be called. There is no
    generator's state: the random numbers of a step are seeded by (seed, step, rank), those of a crop by (seed, epoch,
    index), those of the head by (seed, step).
    """
    options, steps_per_epoch = run.options, run.schedule.steps_per_epoch
    head = state.head.full_state()
    head_kept = _kept_for_head(state)
    if not run.world.is_main:
        return None
    return {
        "network": {"name": options.network, "use_se": options.use_se, "embedding_size": options.embedding_size},
        "model": {key: value.cpu() for key, value in state.network.state_dict().items()},
        "statistics": None if statistics is None else statistics.cpu(),
        "head": head,
        "optimizer": _kept(state, state.network) | head_kept,
        "distillation": _distillation(state),
        "scheduler": {"name": options.schedule, "step": state.step, "steps_per_epoch": steps_per_epoch},
        "epoch": state.step // steps_per_epoch,
        "step": state.step,
        "rng": {"seed": options.seed, "step": state.step},
        "epoch_sums": dataclasses.asdict(state.epoch_sums),
        "shown_sums": dataclasses.asdict(state.shown_sums),
        "history": state.history,
        "skipped": sorted(state.skipped),
        "begun_from": state.begun_from,
        "data": run.data,
        "config": plain_options(options),
    }


def _distillation(state: State) -> dict[str, Any] | None:
    """The map between student and teacher, where there is one, and what the optimiser keeps for it."""
    if state.distillation is None:
        return None
    model = {key: value.cpu() for key, value in state.distillation.state_dict().items()}
    return {"model": model} | _kept(state, state.distillation)


def _kept(state: State, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimiser keeps for the parameters of a module: {name in the file: {parameter: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in _KEPT}
    for parameter_name, parameter in module.named_parameters():
        values = state.optimizer.state.get(parameter, {})
        for name, key in _KEPT.items():
            if key in values:
                found[name][parameter_name] = values[key].cpu()
    return found


def _kept_for_head(state: State) -> dict[str, Tensor | None]:
    """The same for a full head, of all identities; None for what there is not. Collective."""
    found: dict[str, Tensor | None] = {f"head_{name}": None for name in _KEPT}
    if not state.head.sampled:
        values = state.optimizer.state.get(state.head.weight, {})
        for name, key in _KEPT.items():
            if key in values:
                whole = state.head.gather_rows(values[key]) if values[key].dim() else values[key].cpu()
                found[f"head_{name}"] = whole
    return found


def restore(state: State, content: dict[str, Any], path: Path, world: World) -> None:
    """Take over what `collect` gave; every rank takes its own part of the head. Raises `InputError` if it does not
    fit.
    """
    try:
        state.network.load_state_dict(content["model"])
        restore_statistics(state.network, content["statistics"], world)
        state.head.load_full_state(content["head"])
        _restore_kept(state, state.network, content["optimizer"])
        for name, key in _KEPT.items():
            whole = content["optimizer"].get(f"head_{name}")
            if whole is not None and not state.head.sampled:
                _keep(state, state.head.weight, key, state.head.own_rows(whole) if whole.dim() else whole)
        if state.distillation is not None:
            state.distillation.load_state_dict(content["distillation"]["model"])
            _restore_kept(state, state.distillation, content["distillation"])
        state.step = content["step"]
        state.epoch_sums = Sums(**content["epoch_sums"])
        state.shown_sums = Sums(**content["shown_sums"])
        state.history = content["history"]
        state.skipped = set(content["skipped"])
        state.begun_from = content.get("begun_from")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not fit this run ({str(error).splitlines()[0]})") from error


def _restore_kept(state: State, module: nn.Module, content: dict[str, Any]) -> None:
    for name, key in _KEPT.items():
        kept = content.get(name, {})
        for parameter_name, parameter in module.named_parameters():
            if parameter_name in kept:
                _keep(state, parameter, key, kept[parameter_name])


def _keep(state: State, parameter: nn.Parameter, key: str, values: Tensor) -> None:
    # Like the parameter in memory layout: the fused optimiser asks for that. A number of steps has none.
    like = torch.empty_like(parameter) if values.dim() else torch.empty_like(values, device=parameter.device)
    state.optimizer.state[parameter][key] = like.copy_(values).detach()


def check_same_run(run: Run, content: dict[str, Any], path: Path) -> dict[str, list[Any]]:
    """The options that are other ones from now on, as {name: [before, now]}.

    Raises `InputError` naming every one that must not change inside a run and did, and for other data.
    """
    # A checkpoint of before an option was introduced is of its default.
    saved, now = _default_options() | content["config"], plain_options(run.options)
    changed = {key: [saved.get(key), now[key]] for key in now if key not in FREE_OPTIONS and saved.get(key) != now[key]}
    refused = {key: values for key, values in changed.items() if key not in CHANGEABLE_OPTIONS}
    if refused:
        raise InputError(
            f"{path}: cannot go on with {describe_changes(refused)}: that is another run; give it another --out, or "
            "leave the option as it was"
        )
    if content["data"] != run.data:
        raise InputError(
            f"{path}: was trained on other data than --data: {_data_line(content['data'])}; now {_data_line(run.data)}"
        )
    if content["epoch"] > run.options.epochs:
        raise InputError(f"{path}: --epochs {run.options.epochs}, but {content['epoch']} are done")
    return changed


def describe_changes(changes: dict[str, list[Any]]) -> str:
    """As people would type the options: `--lr 0.01 (was 0.1)`."""

    def words(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(
        f"--{key.replace('_', '-')} {words(now)} (was {words(before)})" for key, (before, now) in changes.items()
    )


def way_out_of_a_broken_step(options: Train) -> str:
    """What to do about a step that left numbers which are not finite."""
    path = options.out / CHECKPOINT
    if path.exists():
        return f"Usually the rate is too high; {path} is from before: go on from it with --resume and a lower --lr"
    return "Usually the rate is too high; there is no checkpoint yet: begin again with a lower --lr, or with --warmup"


def _data_line(data: dict[str, Any]) -> str:
    teacher = f", --teacher {data['teacher'][:12]}" if "teacher" in data else ""
    return f"{data['crops']} crops of {data['identities']} identities, fingerprint {data['fingerprint'][:12]}{teacher}"


def load_last(folder: Path, log: Callable[[str], None]) -> tuple[dict[str, Any], Path] | None:
    """The newest training checkpoint of a run that loads, and its path; None when there is none yet.

    A damaged one is named in the log and the one before it is taken. Raises `InputError` when no other is left.
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


def keep(path: Path) -> None:
    """Make the checkpoint that a run goes on from its last one, in place of a damaged one.

    Else the damaged one would take the place of the whole one before it as soon as the next is written.
    """
    if path.name != CHECKPOINT:
        _link(path, path.with_name(CHECKPOINT))


def write_last(folder: Path, content: dict[str, Any]) -> None:
    """Replace `checkpoint.pt`; what it was becomes `checkpoint-previous.pt`."""
    path = folder / CHECKPOINT
    if path.exists():
        _link(path, folder / PREVIOUS)
    utils.save_checkpoint(path, content)


def write_best(folder: Path, network: nn.Module) -> None:
    """Make the last checkpoint the best one, and write its network alone under the released key names."""
    _link(folder / CHECKPOINT, folder / BEST)
    write_embedding(folder / EMBEDDING, network.state_dict())


def write_embedding(path: Path, state: dict[str, Tensor]) -> None:
    """A plain state_dict of an embedding network: contiguous float32 tensors on the CPU."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    utils.save_tensors(path, plain)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote; each may be as large as a checkpoint."""
    for name in (CHECKPOINT, PREVIOUS, BEST, EMBEDDING, IDENTITIES, RESULTS, RUN):
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step; neither is ever written to, only replaced."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    utils.fsync_directory(target.parent)


def _default_options() -> dict[str, Any]:
    nothing = Path()
    return plain_options(Train(data=nothing, out=nothing))
