"""Files of weights as people have them: where in the file the embedding network lies.

A plain state_dict, this repository's training checkpoints, arcface_torch's (`state_dict_backbone`), Lightning's
(`state_dict`, the network behind the prefix `model.` and a head beside it), each perhaps with the prefixes that data
parallelism or torch.compile put in front. Which network it is, is for models.network_from_state to say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import utils
from utils import InputError

# Under which keys a file that is no plain state_dict holds one; the first that is there counts.
_CONTAINERS = ("state_dict_backbone", "state_dict", "model_state_dict", "model", "backbone", "network", "net")
_DEEPEST = 4  # of these inside one another
# DistributedDataParallel, torch.compile, and the names that trainers give to the network inside of theirs.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "network.", "net.")
# What may lie beside a network, with a prefix or without: the margin head, of no use here.
_HEADS = ("head.", "margin.", "classifier.", "loss.", "loss_fn.", "criterion.", "arcface.")


def read_state(path: str | Path) -> tuple[dict[str, Any], str]:
    """The state_dict of the embedding network in a file, and the prefixes that were taken off its keys (`module.`).

    Its tensors stay on disk until used. Raises InputError, naming the file, where it holds none.
    """
    content = utils.read_tensors(path, mmap=True, stand_ins=True)  # most of a checkpoint is of no interest here
    name, state = _inside(content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path}: holds no network" + (f" under {name!r}" if name else ""))
    if not state or (name is None and not all(isinstance(value, Tensor) for value in state.values())):
        raise InputError(
            f"{path}: holds no network: its keys are {', '.join(map(utils.shown, list(state)[:5])) or 'none'}"
            + (f" under {name!r}" if name else "")
            + "; where it was made, save it with torch.save(model.state_dict(), FILE)"
        )
    return _without_prefixes(state)


def _inside(content: dict[str, Any]) -> tuple[str | None, Any]:
    """The state_dict and the key under which it lies; None where the file is one itself."""
    if "format" in content:
        return "model", content.get("model")
    name, state = None, content
    for _ in range(_DEEPEST):
        inside = [key for key in _CONTAINERS if isinstance(state, dict) and key in state]
        inside = [key for key in inside if not isinstance(state[key], Tensor)]
        if not inside:
            break
        name, state = inside[0], state[inside[0]]
    return name, state


def _without_prefixes(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    removed = ""
    while True:
        for prefix in _PREFIXES:
            inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if inner and all(key.startswith((prefix, *_HEADS)) for key in state):
                state, removed = inner, removed + prefix
                break
        else:
            return {key: value for key, value in state.items() if not key.startswith(_HEADS)} or state, removed


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The first key whose values are not all finite; None if there is none."""
    return next((key for key, value in state.items() if not value.isfinite().all()), None)
