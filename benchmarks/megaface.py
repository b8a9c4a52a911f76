"""Challenge 1 against the plain matrix product of the same size: time, and memory resident.

    python benchmarks/megaface.py                                   # 10,000, 100,000 and 1,000,000 distractors
    python benchmarks/megaface.py --sizes 10000 100000 --rounds 5

Random unit vectors: 3,530 probes of 80 identities (as many as the official list has), each identity's vectors around
one direction with --spread (0.8 gives mates the likeness of a middling network's; larger is the expensive case: many
distractors lie beyond a mate and have to be counted), and distractors on the whole sphere, memory-mapped float32.

Alternative in the same run, interleaved: `product`, torch's float32 product of the probes with the same distractors,
read in blocks, results thrown away. That is also the limit: 2 x probes x distractors x dimensions operations.
Ours gives all three curves and the matches, every decision as the official devkit makes it.
"""

import argparse
import math
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

# In front of this folder, which has a file of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaface.protocol import identification

BLOCK = 8192


class Memory:
    """The largest resident memory seen while the block runs, in GB: anonymous pages, and mapped files besides."""

    def __enter__(self):
        self.anonymous, self.mapped, self._over = 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) / 1e6 for line in lines if line.startswith("Rss")}
            self.anonymous = max(self.anonymous, found["RssAnon"])
            self.mapped = max(self.mapped, found["RssFile"])


def make_probes(count, identities, dimensions, spread, rng):
    """Unit vectors [count, dimensions] and their identities."""
    centres = rng.standard_normal((identities, dimensions), np.float32)
    labels = np.sort(np.arange(count) % identities)
    vectors = centres[labels] + spread * math.sqrt(2) * rng.standard_normal((count, dimensions), np.float32)
    return unit(vectors), [f"identity{label}" for label in labels]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_distractors(path, count, dimensions, rng):
    """Unit vectors in a .npy file, returned memory-mapped for reading."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (count, dimensions))
    for start in range(0, count, 65_536):
        size = min(65_536, count - start)
        file[start : start + size] = unit(rng.standard_normal((size, dimensions), np.float32))
    file.flush()
    return np.load(path, mmap_mode="r")


def product(probes, distractors):
    """The plain way to all scores, blockwise."""
    left = torch.from_numpy(probes)
    out = torch.empty(len(probes), BLOCK)
    for start in range(0, len(distractors), BLOCK):
        block = torch.from_numpy(np.array(distractors[start : start + BLOCK]))
        torch.mm(left, block.T, out=out[:, : len(block)] if len(block) == BLOCK else None)


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--probes", type=int, default=3530)
    parser.add_argument("--identities", type=int, default=80)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--spread", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions of each (default: 3)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    probes, ids = make_probes(arguments.probes, arguments.identities, arguments.dimensions, arguments.spread, rng)
    print(f"{arguments.probes} probes, {arguments.dimensions} dimensions, {torch.get_num_threads()} threads")
    columns = ("distractors", "product", "ours", "ratio", "GFLOP/s", "anonymous", "mapped")
    print(
        "".join(f"{name:>{width}}" for name, width in zip(columns, (12, 10, 10, 8, 9, 11, 9), strict=True)), " rank 1"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            distractors = write_distractors(Path(folder) / f"{size}.npy", size, arguments.dimensions, rng)
            identification(probes[:200], ids[:200], distractors[:2000], [2000])  # what only the first call pays
            plain, ours, results = [], [], []

            def run(results=results, distractors=distractors, size=size):
                results.append(identification(probes, ids, distractors, [size])[0])

            with Memory() as memory:
                for _ in range(arguments.rounds):
                    plain.append(timed(lambda distractors=distractors: product(probes, distractors)))
                    ours.append(timed(run))
            ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
            first, second = statistics.median(plain), statistics.median(ours)
            rate = 2e-9 * arguments.probes * size * arguments.dimensions / first
            print(
                f"{size:>12,}{first:>9.2f}s{second:>9.2f}s{ratio:>8.2f}{rate:>9.0f}"
                f"{memory.anonymous:>9.2f}GB{memory.mapped:>7.2f}GB  {results[-1].rate_at_rank(1):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
