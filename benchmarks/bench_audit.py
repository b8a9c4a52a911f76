"""The audit's comparisons on invented features, against the plain product of all crops and all centres.

    python benchmarks/bench_audit.py                                     # a million crops of 85,164 people
    python benchmarks/bench_audit.py --crops 50000 --identities 5000     # a minute

Counted: the choice of a space, robust centres, the nearest other centre of each crop and of each centre, thresholds,
findings about crops and identities, from mapped features. The alternative in the same run is the float32 product alone,
block by block, with its row maxima. Duplicates are counted apart, since nothing plain compares with them. Results go to
`benchmarks/results/audit.json`.
"""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from auditing.centres import BLOCK_CENTRES, BLOCK_CROPS, unit_rows
from auditing.findings import compare, find_merges, find_splits, judge_crops
from auditing.space import Placed, choose
from options import option, parse

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class BenchAudit:
    """The size of the set."""

    crops: int = option(1_000_000, "crops", at_least=100)
    identities: int = option(85_164, "identities", at_least=2)
    dim: int = option(512, "dimensions", at_least=2)
    wrong: float = option(0.1, "share of wrong labels", at_least=0, below=1)
    device: str = option("cpu", "cpu or cuda")
    scratch: Path | None = option(None, "folder for the mapped features; none means a temporary one", metavar="DIR")
    out: Path = option(RESULTS / "audit.json", "where the figures go", metavar="FILE")


def invent(options: BenchAudit, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features [crops, dim], mapped, and labels of which a share is wrong."""
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, options.identities, options.crops))
    middles = unit_rows(random.standard_normal((options.identities, options.dim), np.float32))
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (options.crops, options.dim))
    for start in range(0, options.crops, 65536):
        part = labels[start : start + 65536]
        noise = random.standard_normal((len(part), options.dim), np.float32)
        features[start : start + len(part)] = middles[part] + noise * np.float32(1.2 / options.dim**0.5)
    features.flush()
    wrong = random.permutation(options.crops)[: round(options.wrong * options.crops)]
    labels[wrong] = (labels[wrong] + random.integers(1, options.identities, len(wrong))) % options.identities
    del features
    return np.load(folder / "features.npy", mmap_mode="r"), labels


def audit(features: np.ndarray, labels: np.ndarray, identities: int, device: str) -> dict[str, int]:
    """Everything that depends on the number of crops times the number of identities, and what follows from it."""
    space, _ = choose(features, labels, identities, 0.05, 0.01, device)
    rows = features if space is None else Placed(features, space)
    compared = compare(rows, labels, identities, 0.05, 0.01, device)
    found, bounds = compared.centres, compared.bounds
    names = [str(label) for label in range(identities)]
    kinds, _, _ = judge_crops(labels, found, compared.other, compared.nearest, bounds, names)
    near = compared.near_centre, compared.near_cosine
    merges, splits = (
        find_merges(rows, labels, found, *near, bounds, names),
        find_splits(rows, labels, found, bounds, names),
    )
    return {"crops": sum(map(bool, kinds)), "merges": len(merges), "splits": len(splits)}


def plain_product(features: np.ndarray, identities: int, device: str) -> None:
    """The product of all crops and as many centres, with its row maxima."""
    centres = torch.from_numpy(unit_rows(features[:identities])).to(device)
    if len(centres) < identities:
        centres = centres.repeat(-(-identities // len(centres)), 1)[:identities]
    for start in range(0, len(features), BLOCK_CROPS):
        rows = torch.from_numpy(np.array(features[start : start + BLOCK_CROPS])).to(device)
        for first in range(0, identities, BLOCK_CENTRES):
            (rows @ centres[first : first + BLOCK_CENTRES].T).amax(dim=1).cpu()


@utils.command
def main() -> None:
    options = parse(BenchAudit, __doc__)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        features, labels = invent(options, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        found = audit(features, labels, options.identities, options.device)
        ours = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        plain_product(features, options.identities, options.device)
        plain = time.perf_counter() - began
    figures = {
        "crops": options.crops, "identities": options.identities, "dim": options.dim, "device": options.device,
        "seconds": ours, "plain_product_seconds": plain, "ratio": ours / plain, "peak_gb": memory / 1e6,
        "peak_gb_before": before / 1e6, "findings": found, "environment": utils.environment(),
    }  # fmt: skip
    utils.write_json(options.out, figures)
    print(f"audit {ours:.1f} s, product alone {plain:.1f} s: {ours / plain:.2f} times")
    print(f"peak memory {memory / 1e6:.2f} GB, mapped pages included; findings {found}")


if __name__ == "__main__":
    sys.exit(main())
