"""The parts of torch that are used here and that torch calls private: another version may move them.

Nothing else in data_gen.py and training/ uses a name of torch's with an underscore; `tests/test_torch_internals.py`
says which one has moved.
"""

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # what all of torch's batch norms are

__all__ = ["BatchNorm", "end_workers", "shared_memory"]


def shared_memory(size: int) -> torch.UntypedStorage:
    """`size` bytes in the memory through which a loader's worker hands its batch over, as torch's collate takes them.

    A tensor that fills it is sent without a copy.
    """
    return torch.UntypedStorage._new_shared(size, device="cpu")


def end_workers(batches: Any) -> None:
    """End the worker processes of a DataLoader's iterator: what its destructor does, without waiting for that."""
    batches._shutdown_workers()
