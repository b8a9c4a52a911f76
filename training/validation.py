"""The verification sets of --val during training: each process embeds a share of the crops, rank 0 counts.

The figures are those of one process to the bit: the crops are cut into the same chunks whoever embeds them.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import utils
from embedding import Embedder
from training.run import Run
from utils import InputError
from verification import features
from verification.metrics import VerificationResult
from verification.sets import VerificationSet


def measure(run: Run, network: nn.Module, stopping: Callable[[], bool]) -> dict[str, VerificationResult] | None:
    """The results of all sets by name, on rank 0; nothing on the others. Collective.

    None, on all ranks, when `stopping()` became true on one of them meanwhile. Raises `InputError` when a feature is
    not finite, or when not even one crop fits into the device's memory.
    """
    embedder = Embedder.from_network(network, run.world.device, name=run.options.network)
    results = {}
    for pairs in run.sets:
        found = _embed(run, embedder, pairs, stopping)
        if found is None:
            return None
        if run.world.is_main:
            results[pairs.name] = features.result_of(found, pairs, embedder.name)
    return results


def _embed(run: Run, embedder: Embedder, pairs: VerificationSet, stopping: Callable[[], bool]) -> np.ndarray | None:
    """Features of all crops of a set that are there, on rank 0; of the others' shares elsewhere. Collective."""
    world = run.world
    chunks = features.chunks_of(pairs)
    own: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        bar = None
        if world.is_main:
            bar = stack.enter_context(utils.progress(sum(map(len, chunks)), f"{pairs.name}: features", unit="crop"))
        for first in range(0, len(chunks), world.size):
            if world.largest(int(stopping())):
                return None
            if first + world.rank < len(chunks):
                own.append(_features(run, embedder, pairs, chunks[first + world.rank]))
            if bar is not None:
                bar.update(sum(map(len, chunks[first : first + world.size])))
    shares = world.gather(own)
    return np.concatenate([shares[number % world.size][number // world.size] for number in range(len(chunks))])


def _features(run: Run, embedder: Embedder, pairs: VerificationSet, chunk: list[int]) -> np.ndarray:
    """Features of some crops; in smaller batches where the device's memory is short beside that of training."""
    crops = pairs.crops[chunk]
    while True:
        try:
            return embedder.features(crops)
        except torch.OutOfMemoryError as error:
            if embedder.batch_size == 1:
                raise InputError(f"--val {pairs.name}: {str(error).splitlines()[0]}") from error
            torch.cuda.empty_cache()
            embedder.batch_size = max(1, min(embedder.batch_size, len(crops)) // 2)
            run.log(f"note: measuring {pairs.name} in batches of {embedder.batch_size}, for want of memory")
