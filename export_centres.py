"""Take a training checkpoint apart: the embedding network alone, and the head's centres by identity.

    python export_centres.py --checkpoint runs/NAME/best.pt --out exports/NAME

Writes embedding.pt (plain state_dict under the released key names, float32), centres.npy (float32 [identities, D], row
i the L2-normalised centre of the identity with label i, comparable with embeddings by cosine; of a head with K
sub-centres [identities, K, D]) and identities.tsv (label, identity; from the run's folder). Which identities look
alike, or stand twice in the data, shows in the centres' cosines.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import utils
from config import ExportCentres
from formats import tables
from options import parse
from training import checkpoints, storage
from utils import InputError


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(ExportCentres, __doc__)
    found = storage.open_stored(options.checkpoint)
    checkpoints.check_kinds(found)
    content = found.content
    if options.out.resolve() == options.checkpoint.resolve().parent:
        raise InputError(f"--out {options.out}: the folder of the run, whose {storage.EMBEDDING} would be replaced")
    centres = _centres(options.checkpoint, content["head"])
    if not content["model"] or not all(map(storage.is_dense, content["model"].values())):
        raise InputError(f"{options.checkpoint}: its model is no network's weights")
    table = options.checkpoint.with_name(storage.IDENTITIES)
    names = tables.read_identities(table) if table.is_file() else [str(label) for label in range(len(centres))]
    if len(names) != len(centres):
        raise InputError(f"{table}: {len(names)} identities, but the checkpoint has {len(centres)} centres")
    storage.write_embedding(options.out / storage.EMBEDDING, content["model"])
    with utils.atomic_path(options.out / "centres.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, centres.numpy())
    tables.write_identities(options.out / storage.IDENTITIES, names)
    *count, dimensions = centres.shape
    classes = " x ".join(map(str, count))
    print(f"{options.out}: network of step {content['step']}, {classes} centres of {dimensions} dimensions")


def _centres(path: Path, head: dict[str, Any]) -> torch.Tensor:
    """float32 [identities, D] or [identities, K, D], each of length 1; `InputError` if they are no such vectors."""
    stored = head.get("centres")
    if not (isinstance(stored, storage.Rows) or storage.is_dense(stored)) or stored.dim() not in (2, 3):
        raise InputError(f"{path}: its head has no centres, [identities, D] or [identities, K, D]")
    centres = stored[:].float()
    if len(centres) == 0:
        raise InputError(f"{path}: trained without labels (--loss none), so there are no centres")
    lengths = centres.norm(dim=-1)
    unusable = ~(torch.isfinite(lengths) & (lengths > 0))
    if unusable.any():
        label = int(unusable.nonzero()[0, 0])
        raise InputError(
            f"{path}: {int(unusable.sum())} centres are zero or not finite; the first is that of label {label}"
        )
    return torch.nn.functional.normalize(centres, dim=-1)


if __name__ == "__main__":
    sys.exit(main())
