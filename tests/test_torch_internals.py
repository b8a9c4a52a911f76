"""torch still has the private parts that are used here; when this fails, torch has moved one of them."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers.training import ROOT

from training import torch_internals

PLACES = [ROOT / "train.py", ROOT / "data_gen.py", *sorted((ROOT / "training").glob("*.py"))]
PLACES.remove(Path(torch_internals.__file__))
OWN = {"_buffers", "_margin", "_exit"}  # a module's, the head's, the operating system's


def test_all_of_torchs_batch_norms_are_one_kind():
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
    assert all(issubclass(kind, torch_internals.BatchNorm) for kind in kinds)
    assert not issubclass(torch.nn.LayerNorm, torch_internals.BatchNorm)


def test_shared_memory_is_shared_and_of_the_size_asked_for():
    storage = torch_internals.shared_memory(1000)
    assert storage.is_shared() and storage.nbytes() == 1000
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(7)
    assert bytes(storage) == b"\7" * 1000


def test_workers_end_when_they_are_told_to():
    batches = iter(torch.utils.data.DataLoader(range(100), num_workers=2, multiprocessing_context="fork"))
    next(batches)
    workers = list(batches._workers)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    torch_internals.end_workers(batches)
    assert not any(worker.is_alive() for worker in workers)


def private_names(path):
    """Names with one underscore that a file takes from elsewhere: imported, or of something other than itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in OWN:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from [] if own else [node.attr]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_training_names_private_parts_nowhere_else(path):
    assert not list(private_names(path))
