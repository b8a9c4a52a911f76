"""The state of a training run as plain tensors, and back; what may change when a run goes on.

`training.storage` writes and reads the files.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from config import Train
from options import plain_options
from training.distributed import World, restore_statistics
from training.margin import MarginHead
from training.run import Run, State, Sums
from training.storage import CHECKPOINT, Stored
from utils import InputError

# Options that may differ when a run goes on. The first change nothing of what is computed from one step to the next;
# the second change how the run goes on, and are written into the log and run.json. All others are the run itself:
# another network, head, loss, batch or seed is another run.
FREE_OPTIONS = frozenset(
    "out resume data val val_every workers decode device save_every log_every skip_unreadable "
    "teacher teacher_embeddings".split()
)
CHANGEABLE_OPTIONS = frozenset(
    "augment margin margin_warmup scale focal_gamma filter epochs lr schedule milestones warmup small_epochs "
    "small_side momentum weight_decay grad_clip accumulate amp channels_last compile checkpoint_activations sync_bn "
    "drop_path token_mask teacher_weight teacher_online freeze freeze_epochs head_lr".split()
)

# What SGD and AdamW keep for a parameter, by its name in a checkpoint.
_KEPT = {
    "momentum": "momentum_buffer",
    "mean_gradients": "exp_avg",
    "mean_squares": "exp_avg_sq",
    "optimizer_steps": "step",
}


_KINDS = {
    "model": dict,
    "head": dict,
    "optimizer": dict,
    "scheduler": dict,
    "data": dict,
    "config": dict,
    "history": list,
    "step": int,
    "epoch": int,
}


def check_kinds(found: Stored) -> None:
    """`InputError` for a checkpoint whose sections are not of the kinds that `collect` makes, or contradict others."""
    content = found.content
    problem = ""
    for name, kind in _KINDS.items():
        if type(content.get(name)) is not kind:
            problem = f"{name} is {'missing' if name not in content else 'a ' + type(content[name]).__name__}"
            break
    else:
        step, epoch, scheduler = content["step"], content["epoch"], content["scheduler"]
        each = scheduler.get("steps_per_epoch")
        if scheduler.get("step") != step or step < 0 or type(each) is not int or each < 1 or epoch != step // each:
            problem = f"step {step}, epoch {epoch} and scheduler {scheduler} contradict each other"
        elif not all(isinstance(report, dict) and {"step", "sets"} <= report.keys() for report in content["history"]):
            problem = "its history is no list of reports"
    if problem:
        raise InputError(f"{found.path}: not a checkpoint as train.py writes it: {problem}")


def collect(run: Run, state: State, statistics: Tensor | None) -> dict[str, Any]:
    """The state as copies on the host, of the head this rank's rows: what `storage.Writer` takes.

    `statistics` is what `distributed.averaged_statistics` gave, inside which this is to be called. There is no
    generator's state: the random numbers of a step are seeded by (seed, step, rank), those of a crop by (seed, epoch,
    index), those of the head by (seed, step).
    """
    options, steps_per_epoch = run.options, run.schedule.steps_per_epoch
    return {
        "network": {"name": options.network, "use_se": options.use_se, "embedding_size": options.embedding_size},
        "model": {key: copy_on_host(value) for key, value in state.network.state_dict().items()},
        "statistics": None if statistics is None else copy_on_host(statistics),
        "head": state.head.own_state(),
        "optimizer": _kept(state, state.network) | _kept_for_head(state),
        "distillation": _distillation(state),
        "scheduler": {"name": options.schedule, "step": state.step, "steps_per_epoch": steps_per_epoch},
        "epoch": state.step // steps_per_epoch,
        "step": state.step,
        "rng": {"seed": options.seed, "step": state.step},
        "epoch_sums": dataclasses.asdict(state.epoch_sums),
        "shown_sums": dataclasses.asdict(state.shown_sums),
        "history": copy.deepcopy(state.history),
        "skipped": sorted(state.skipped),
        "begun_from": state.begun_from,
        "data": run.data,
        "config": plain_options(options),
    }


def _distillation(state: State) -> dict[str, Any] | None:
    """The map between student and teacher, where there is one, and what the optimiser keeps for it."""
    if state.distillation is None:
        return None
    model = {key: copy_on_host(value) for key, value in state.distillation.state_dict().items()}
    return {"model": model} | _kept(state, state.distillation)


def _kept(state: State, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimiser keeps for the parameters of a module: {name in the file: {parameter: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in _KEPT}
    for parameter_name, parameter in module.named_parameters():
        values = state.optimizer.state.get(parameter, {})
        for name, key in _KEPT.items():
            if key in values:
                found[name][parameter_name] = copy_on_host(values[key])
    return found


def _kept_for_head(state: State) -> dict[str, Tensor]:
    """The same for this rank's rows of a full head; what there is not is missing."""
    head = state.head
    values: dict[str, Any] = {}
    if isinstance(head, MarginHead) and not head.sampled:
        values = state.optimizer.state.get(head.weight, {})
    return {f"head_{name}": copy_on_host(values[key]) for name, key in _KEPT.items() if key in values}


def copy_on_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, also of what is there already: it is written while training goes on."""
    return tensor.detach().to("cpu", copy=True)


def restore(state: State, found: Stored, world: World) -> None:
    """Take over what `collect` gave; every rank takes its rows of the head. Raises `InputError` if it does not fit."""
    content = found.content
    try:
        state.network.load_state_dict(content["model"])
        restore_statistics(state.network, content["statistics"], world)
        state.head.load_full_state(content["head"])
        if not content["optimizer"].keys() & _KEPT.keys():
            raise ValueError("nothing of the optimiser is in it")
        _restore_kept(state, state.network, content["optimizer"])
        for name, key in _KEPT.items():
            whole = content["optimizer"].get(f"head_{name}")
            head = state.head
            if whole is not None and isinstance(head, MarginHead) and not head.sampled:
                _keep(state, head.weight, key, head.own_rows(whole) if whole.dim() else whole)
        if state.distillation is not None:
            state.distillation.load_state_dict(content["distillation"]["model"])
            _restore_kept(state, state.distillation, content["distillation"])
        state.step = content["step"]
        state.epoch_sums = Sums(**content["epoch_sums"])
        state.shown_sums = Sums(**content["shown_sums"])
        state.history = content["history"]
        state.skipped = set(content["skipped"])
        state.begun_from = content["begun_from"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{found.path}: does not fit this run ({str(error).splitlines()[0]})") from error


def _restore_kept(state: State, module: nn.Module, content: dict[str, Any]) -> None:
    for name, key in _KEPT.items():
        kept = content[name]
        for parameter_name, parameter in module.named_parameters():
            if parameter_name in kept:
                _keep(state, parameter, key, kept[parameter_name])


def _keep(state: State, parameter: nn.Parameter, key: str, values: Tensor) -> None:
    # Like the parameter in memory layout: the fused optimiser asks for that. A number of steps has none.
    like = torch.empty_like(parameter) if values.dim() else torch.empty_like(values, device=parameter.device)
    state.optimizer.state[parameter][key] = like.copy_(values).detach()


def check_same_run(run: Run, found: Stored) -> dict[str, list[Any]]:
    """The options that are other ones from now on, as {name: [before, now]}.

    Raises `InputError` naming every one that must not change inside a run and did, and for other data.
    """
    check_kinds(found)
    content, path = found.content, found.path
    saved, now = content["config"], plain_options(run.options)
    if saved.keys() != now.keys():
        raise InputError(
            f"{path}: was written by another version of train.py, whose options are others "
            f"({', '.join(sorted(saved.keys() ^ now.keys()))}); go on with that version, or begin with --init"
        )
    changed = {key: [saved[key], now[key]] for key in now if key not in FREE_OPTIONS and saved[key] != now[key]}
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
    return (
        f"{data.get('crops')} crops of {data.get('identities')} identities, "
        f"fingerprint {str(data.get('fingerprint'))[:12]}{teacher}"
    )
