"""How far Challenge 1 is from its limit, the matrix product of all probes with all distractors.

    python benchmarks/megaface.py --scratch /tmp/megaface                                  # some ten minutes
    python benchmarks/megaface.py --scratch /tmp/megaface --distractors 10000 --probes random
    python benchmarks/megaface.py --scratch /tmp/megaface --files 100000

3,530 probes of 80 identities and random unit distractors, 512 dimensions, memory-mapped float32. `identities` draws
probes around a centre per identity, some further out than others, so that a few pairs in a hundred are missed among a
million; `random` are random unit vectors, the hardest input: genuine scores lie in the middle of the impostors, and
every score has to be sorted in among some fifty thresholds.

The alternative in the same run is the plain float32 product of the same size, read from the same file in blocks of
whichever size is fastest here, its result thrown away: no program that scores everything can be faster. Ours includes
both results files as text. Each measurement runs in a process of its own, warm (libraries loaded, threads started, the
file in the page cache); the two alternate, and medians are compared. Memory is the largest seen, anonymous pages and
those of the mapped file apart: the latter are the page cache's, and go when others need them.

--files measures the reading of that many .bin files, against `cat` on the same files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from megaface.devkit_json import cmc_text, matches_text
from megaface.features import read_features, write_features
from megaface.protocol import identification

PROBES, IDENTITIES, DIMENSIONS = 3530, 80, 512
BLOCKS = 1024, 4096, 16384  # distractors of one plain product


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


class Memory:
    """The largest resident memory seen while the block runs, in GB."""

    def __enter__(self):
        self.anonymous, self.mapped, self._over = 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) / 1e6 for line in lines if line.startswith("Rss")}
            self.anonymous = max(self.anonymous, found["RssAnon"])
            self.mapped = max(self.mapped, found["RssFile"])


def make_probes(kind):
    """Probes [3530, 512] and identities."""
    rng = np.random.default_rng(0)
    person = np.sort(rng.integers(0, IDENTITIES, PROBES))
    probes = rng.standard_normal((PROBES, DIMENSIONS), dtype=np.float32)
    if kind == "identities":
        spread = 1.2 * np.exp(0.25 * rng.standard_normal((PROBES, 1), dtype=np.float32))
        probes = rng.standard_normal((IDENTITIES, DIMENSIONS), dtype=np.float32)[person] + spread * probes
    return unit(probes).astype(np.float32), [f"id{number}" for number in person]


def distractors(scratch, count):
    """Random unit vectors [count, 512], memory-mapped; made at first use."""
    path = scratch / f"distractors-{count}.npy"
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, (count, DIMENSIONS))
        rng = np.random.default_rng(1)
        for start in range(0, count, 1 << 14):
            rows = min(1 << 14, count - start)
            array[start : start + rows] = unit(rng.standard_normal((rows, DIMENSIONS), dtype=np.float32))
        array.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def product(probes, gallery, block, device):
    """The plain matrix product in blocks."""
    left, out = torch.from_numpy(probes).to(device), torch.empty(len(probes), block, device=device)
    for start in range(0, len(gallery), block):
        right = torch.from_numpy(np.array(gallery[start : start + block])).to(device)
        torch.mm(left, right.t(), out=out) if len(right) == block else torch.mm(left, right.t())
    if device != "cpu":
        torch.cuda.synchronize()


def timed(function):
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(arguments):
    """One measurement in this process, printed as JSON."""
    torch.set_num_threads(arguments.threads)
    (kind,) = arguments.probes
    probes, ids = make_probes(kind)
    gallery = distractors(arguments.scratch, arguments.one)
    said: dict[str, Any] = {}
    device = arguments.device
    if arguments.part == "product":
        some = gallery[: max(BLOCKS)]
        product(probes, some, max(BLOCKS), device)
        said["block"] = min(BLOCKS, key=lambda block: timed(lambda: product(probes, some, block, device)))
        job = lambda: product(probes, gallery, said["block"], device)  # noqa: E731
    else:
        identification(probes[:200], ids[:200], gallery[:2000], [2000], device=device)

        def job():
            (result,) = identification(probes, ids, gallery, [len(gallery)], device=device)
            texts = cmc_text(result), matches_text(result)
            said.update(rank1=float(result.cmc[0]), recomputed=result.recomputed, bytes=sum(map(len, texts)))

    with Memory() as memory:
        wall, cpu = timed(job)
    print(json.dumps({"wall": wall, "cpu": cpu, "anonymous": memory.anonymous, "mapped": memory.mapped, **said}))


def start(arguments, kind, part, count):
    command = [sys.executable, __file__, "--scratch", arguments.scratch, "--part", part, "--one", count]
    command += ["--probes", kind, "--threads", arguments.threads, "--device", arguments.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def challenge(arguments, kind, count):
    """Alternate both parts and print the ratio of the medians."""
    gallery = distractors(arguments.scratch, count)
    for first in range(0, count, 1 << 14):  # into the page cache
        gallery[first : first + (1 << 14)].sum()
    runs: dict[str, list[dict[str, Any]]] = {"product": [], "challenge": []}
    for _ in range(arguments.repeat):
        for part, list_of in runs.items():
            list_of.append(start(arguments, kind, part, count))
    limit, ours = (
        {key: statistics.median(run[key] for run in list_of) for key in ("wall", "cpu", "anonymous", "mapped")}
        for list_of in runs.values()
    )
    last = runs["challenge"][-1]
    print(
        f"{count:>9,} {kind:>10}: product {limit['wall']:.2f} s ({limit['cpu']:.2f} CPU, blocks of "
        f"{runs['product'][-1]['block']}), challenge {ours['wall']:.2f} s ({ours['cpu']:.2f} CPU): "
        f"{ours['wall'] / limit['wall']:.2f} x wall, {ours['cpu'] / limit['cpu']:.2f} x CPU; "
        f"{ours['anonymous']:.2f} GB + {ours['mapped']:.2f} GB mapped; "
        f"{100 * last['recomputed'] / (PROBES * count):.3f} % recomputed; rank 1 {last['rank1']:.4f}",
        flush=True,
    )


def files(arguments):
    """Reading .bin files against `cat`."""
    folder = arguments.scratch / f"bins-{arguments.files}"
    paths = [str(folder / f"{number % 997}" / f"{number}.bin") for number in range(arguments.files)]
    if not folder.exists():
        rng = np.random.default_rng(2)
        for first in range(0, len(paths), 1 << 14):
            part = paths[first : first + (1 << 14)]
            write_features(part, rng.standard_normal((len(part), DIMENSIONS), dtype=np.float32))
    times: dict[str, list[float]] = {"read_features": [], "cat": []}
    for _ in range(arguments.repeat):
        began = time.perf_counter()
        subprocess.run(["xargs", "-0", "cat"], input="\0".join(paths), stdout=subprocess.DEVNULL, text=True, check=True)
        times["cat"].append(time.perf_counter() - began)
        began = time.perf_counter()
        read_features(paths)
        times["read_features"].append(time.perf_counter() - began)
    ours, theirs = (statistics.median(times[name]) / len(paths) * 1e6 for name in ("read_features", "cat"))
    print(f"{len(paths):,} files: {ours:.1f} us a file, cat {theirs:.1f}: {ours / theirs:.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the distractors (2 GB for a million)")
    parser.add_argument("--distractors", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    kinds = ("identities", "random")
    parser.add_argument("--probes", choices=kinds, nargs="+", default=kinds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for both; memory is the host's")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--files", type=int, default=0, help="measure the reading of so many .bin files instead")
    parser.add_argument("--part", choices=("product", "challenge"), help=argparse.SUPPRESS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        measure(arguments)
    elif arguments.files:
        files(arguments)
    else:
        for count in arguments.distractors:
            for kind in arguments.probes:
                challenge(arguments, kind, count)


if __name__ == "__main__":
    main()
