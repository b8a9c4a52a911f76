"""Fine-tuning: a network that begins with somebody's weights, a head that begins with means, parts that stay frozen.

The head begins with the mean embedding of each identity, computed by one pass over the crops without augmentation. The
pass is kept in chunks in the run's folder while it lasts, so that it goes on where it was killed and every process does
its share, and its result until the run's first checkpoint.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import models
import utils
from data_gen import CropDataset
from download import checkpoint_path
from embedding import Embedder, normalise
from formats.crop_sets import Crops
from formats.embeddings import EmbeddingStore
from networks.catalogue import NETWORKS
from networks.files import not_finite, read_state
from training.augment import Augmentation
from training.distributed import World
from training.margin import CENTRE_STD, MarginHead
from utils import InputError

SCRATCH = ("init-embeddings-", "init-means-")  # folders in the run's, each followed by a hash of what it was made from
# How far from the mean the further sub-centres of an identity begin, as a share of its length: equal ones stay equal.
SPREAD = 0.1
DECODERS = 4  # threads


# --- where the network begins ----------------------------------------------------------------------------------------


def load_weights(network: nn.Module, init: str, name: str, embedding_size: int) -> dict[str, Any]:
    """Give a freshly built `network`, called `name` in the catalogue, the weights in --init.

    Returns where they came from, for the run's records. Raises InputError, naming the file, where they do not fit.
    """
    path = checkpoint_path(init)
    if path.suffix.lower() == ".onnx":
        raise InputError(
            f"--init {path}: is ONNX, which is not trained; give the weights that it was made from (.pt, .pth, .ckpt)"
        )
    state, prefix = read_state(path)
    try:
        found = models.name_of(state)
        weights = models.network_from_state(state).state_dict()
    except ValueError as error:
        raise InputError(f"--init {path}: {error}") from error
    if found is None or NETWORKS[found] != NETWORKS[name]:
        raise InputError(f"--init {path}: holds {found}, not {name}; give --network {found}")
    if NETWORKS[found].family == "adaface" and "net." in prefix:
        raise InputError(
            f"--init {path}: as CVLface writes it, which may want RGB where {found} is fed BGR; take the prefix "
            f"{prefix} off its keys first (docs/networks.md)"
        )
    wanted = network.state_dict()
    if weights.keys() != wanted.keys():  # all else that a name leaves open
        has = any(".se." in key for key in weights)
        raise InputError(
            f"--init {path}: its {found} is {'with' if has else 'without'} squeeze-and-excitation; give "
            f"--{'' if has else 'no-'}use-se"
        )
    size = next((len(weights[key]) for key in reversed(wanted) if weights[key].shape != wanted[key].shape), None)
    if size is not None:
        raise InputError(
            f"--init {path}: its embedding has {size} dimensions, not {embedding_size}; give --embedding-size {size}"
        )
    broken = not_finite(weights)
    if broken is not None:
        raise InputError(f"--init {path}: {broken} is not finite; the run that left it was broken")
    network.load_state_dict(weights)
    return {"file": str(path), "sha256": utils.sha256_of(path), "network": found}


# --- where the head begins -------------------------------------------------------------------------------------------


def begin_with_means(
    head: MarginHead, network: nn.Module, crops: Crops, key: dict[str, Any], folder: Path, world: World, skip: bool
) -> None:
    """Set the centres to the directions of the mean embeddings of their identities. Collective.

    `key` (JSON) names all that the embeddings depend on besides the code: weights, crops. Centres keep the length that
    random ones have, and identities without a usable crop keep their random one. With `skip`, unreadable crops do not
    count; without, they are an InputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    means = EmbeddingStore(folder / f"{SCRATCH[1]}{stamp}", key, crops.identities, head.embedding_size)
    missing = means.missing(world.rank, world.size)
    if world.largest(len(missing)):
        every = EmbeddingStore(folder / f"{SCRATCH[0]}{stamp}", key, len(crops), head.embedding_size, "float16")
        embed = CropEmbedding(Embedder.from_network(network, world.device), crops, skip, head.embedding_size)
        every.fill(every.missing(world.rank, world.size), embed, "embedding all crops for the head")
        world.wait()
        means.fill(missing, _Means(every.values(), crops), "mean embeddings")
        world.wait()
    known = _set_centres(head, np.array(means.values()[head.first : head.last]))
    if not world.largest(known):
        raise InputError("--init-head means: the network of --init gives no finite embedding of any crop")


class CropEmbedding:
    """Embeddings of crops by their numbers, float32 [n, D], of length 1; NaN for those that cannot be read.

    Without `skip` those are an InputError.
    """

    def __init__(self, embedder: Embedder, crops: Crops, skip: bool, dim: int) -> None:
        self.embedder, self.skip, self.dim = embedder, skip, dim
        self.crops = CropDataset(crops, Augmentation.named("none"), 0)

    def __call__(self, numbers: range) -> np.ndarray:
        with ThreadPoolExecutor(DECODERS) as threads:  # none is left when the loader forks
            crops = list(threads.map(self._decode, numbers))
        rows = np.full((len(numbers), self.dim), np.nan, np.float32)
        readable = [position for position, crop in enumerate(crops) if crop is not None]
        if readable:
            rows[readable] = normalise(self.embedder.features(np.stack([crop for crop in crops if crop is not None])))
        return rows

    def _decode(self, index: int) -> np.ndarray | None:
        try:
            return self.crops.readable(index, [])[0]
        except InputError:
            if not self.skip:
                raise
            return None


class _Means:
    """Mean embeddings of identities by their numbers, float32 [n, D]; 0 where an identity has no usable crop."""

    def __init__(self, embeddings: np.ndarray, crops: Crops) -> None:
        self.embeddings = embeddings
        self.order = np.argsort(crops.labels, kind="stable")
        self.bounds = np.searchsorted(crops.labels[self.order], np.arange(crops.identities + 1))

    def __call__(self, numbers: range) -> np.ndarray:
        means = np.zeros((len(numbers), self.embeddings.shape[1]), np.float32)
        for position, identity in enumerate(numbers):
            own = self.order[self.bounds[identity] : self.bounds[identity + 1]]
            rows = self.embeddings[own].astype(np.float64)
            rows = rows[np.isfinite(rows).all(axis=1)]
            if len(rows):
                means[position] = rows.mean(axis=0)
        return means


def _set_centres(head: MarginHead, means: np.ndarray) -> int:
    """Set the centres [identities of this rank] to directions of means that are not 0; returns how many these are."""
    lengths = np.linalg.norm(means, axis=1)
    known = torch.from_numpy(np.flatnonzero(lengths > 0))
    directions = torch.from_numpy(means / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None])[known]
    centres = head.centres
    known, directions = known.to(centres.device), directions.to(centres.device)
    if centres.dim() == 3:
        directions = directions[:, None].expand(-1, centres.shape[1], -1).clone()
        directions[:, 1:] += SPREAD * nn.functional.normalize(centres[known, 1:], dim=-1)
        directions = nn.functional.normalize(directions, dim=-1)
    centres[known] = directions * (CENTRE_STD * math.sqrt(head.embedding_size))
    return len(known)


def remove_leftovers(folder: Path) -> None:
    """Delete what the head began with: once there is a checkpoint nobody needs it."""
    for prefix in SCRATCH:
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


# --- what stays as it is ---------------------------------------------------------------------------------------------


class Freezing:
    """Which part of a network is left alone, and for how many steps.

    Frozen parameters have no gradient, and frozen modules are in evaluation mode: their batch norms use the statistics
    that they came with and leave these as they are, and nothing is dropped at random in them.
    """

    def __init__(self, network: nn.Module, words: Sequence[str], steps: float) -> None:
        """`words` as --freeze takes them; `steps` from the beginning of the run. Raises InputError."""
        self.network, self.steps = network, steps
        self.prefixes = frozen_parts(network, words)
        self.trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}

    def ends_at(self, step: int) -> bool:
        """True at the step before which `apply` has to be called again."""
        return bool(self.prefixes) and step == self.steps

    def apply(self, step: int) -> None:
        """Put the network into training mode, except for what is frozen in this step."""
        prefixes = self.prefixes if step < self.steps else ()
        self.network.train("" not in prefixes)
        for name, module in self.network.named_modules():
            if name and _is_part(name, prefixes):
                module.eval()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in self.trained and not _is_part(name, prefixes))


def frozen_parts(network: nn.Module, words: Sequence[str]) -> tuple[str, ...]:
    """Names of the modules and parameters that `--freeze WORDS` means; ("",) for all of them."""
    if list(words) == ["none"]:
        return ()
    if list(words) == ["all"]:
        return ("",)
    stages: Sequence[Sequence[str]] = getattr(network, "stages", ())
    if len(words) == 2 and words[0] == "stages" and words[1].isdecimal() and 1 <= int(words[1]) <= len(stages):
        return tuple(name for stage in stages[: int(words[1])] for name in stage)
    raise InputError(
        f"--freeze {' '.join(words)}: none, all, or stages and a number; this network has {len(stages)} stages"
    )


def _is_part(name: str, prefixes: Sequence[str]) -> bool:
    return any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
