"""RecordIO on one core: reading 4 KB records, and opening a set of faces_emore's size.

    python benchmarks/recordio.py                     # both, about 2 minutes and 900 MB of scratch space
    python benchmarks/recordio.py --big 0             # reading only

Alternatives in the same run: `plain`, the reader one writes in ten lines (a dict of offsets from a loop over the .idx
lines, then seek, read 8 bytes, read the rest, struct), and `floor`, a bare `os.pread` of offsets and lengths that are
known already, which is as fast as records can come out of Python one by one. mxnet cannot be installed any more; its
C++ reader was measured elsewhere on records of the same size (one core of a busy machine, +-20 %) and is quoted.
Every figure is the median of repeated, interleaved passes over a warm file on one core. Seconds are CPU seconds, user
and system: with a warm file nothing waits, and what else the machine does then matters least.
"""

import argparse
import multiprocessing
import os
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # in front of this folder, where this file has that name

from formats import crop_sets, recordio

MXNET = {"in sequence": 119_706, "by key": 93_132, "shuffled": 69_378, "shuffled, unpacked": 54_940}
EMORE_IMAGES, EMORE_IDENTITIES = 5_822_653, 85_742


class Plain:
    """RecordIO as in many repositories: no checks, no multi-part records."""

    def __init__(self, path):
        self.offsets = {}
        for line in open(path.with_suffix(".idx")):  # noqa: SIM115 - as they do it
            key, offset = line.split("\t")
            self.offsets[int(key)] = int(offset)
        self.file = open(path, "rb")  # noqa: SIM115

    def record(self):
        head = self.file.read(8)
        if not head:
            return None
        length = struct.unpack("<II", head)[1] & 0x1FFFFFFF
        data = self.file.read(length)
        self.file.read(-length % 4)
        return data

    def read(self, key):
        self.file.seek(self.offsets[key])
        return self.record()

    def sequence(self):
        self.file.seek(0)
        while self.record() is not None:
            pass

    @staticmethod
    def unpack(record):
        flag, label, id, id2 = struct.unpack("<IfQQ", record[:24])
        if flag:
            label = np.frombuffer(record, np.float32, flag, 24)
        return (flag, label, id, id2), record[24 + 4 * flag :]


def make_set(folder, records):
    """`records` crops of 4,099 bytes on average (as the quoted figures were taken on), 50 per identity."""
    rng = np.random.default_rng(0)
    sizes = rng.normal(4075, 400, records).clip(500).astype(int)
    crop_sets.write_crops(
        folder, ((b"\xff\xd8\xff" + rng.bytes(size), i // 50) for i, size in enumerate(sizes.tolist()))
    )
    return folder / "train.rec"


def measure(passes, repeats):
    """Seconds of each named function: the median of `repeats` rounds through all of them."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in passes}
    for _ in range(repeats + 1):  # the first round warms up
        for name, function in passes.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def reading(path, records, repeats):
    crops = crop_sets.open_crops(path)
    reader, plain = crops.reader, Plain(path)
    keys = list(range(1, records + 1))
    shuffled = (np.random.default_rng(1).permutation(records) + 1).tolist()
    indices = [key - 1 for key in shuffled]
    offsets = reader.offsets.tolist()
    spans = [(offsets[key], offsets[key + 1] - offsets[key]) for key in shuffled]
    descriptor = os.open(path, os.O_RDONLY)
    read, other, unpack, pread = reader.read, plain.read, recordio.unpack, os.pread

    passes = {
        ("in sequence", "ours"): lambda: [None for _ in reader],
        ("in sequence", "plain"): plain.sequence,
        ("by key", "ours"): lambda: [None for key in keys if read(key) is None],
        ("by key", "plain"): lambda: [None for key in keys if other(key) is None],
        ("shuffled", "ours"): lambda: [None for key in shuffled if read(key) is None],
        ("shuffled", "plain"): lambda: [None for key in shuffled if other(key) is None],
        ("shuffled", "floor"): lambda: [None for at, size in spans if pread(descriptor, size, at) is None],
        ("shuffled, unpacked", "ours"): lambda: [None for key in shuffled if unpack(read(key)) is None],
        ("shuffled, unpacked", "plain"): lambda: [None for key in shuffled if plain.unpack(other(key)) is None],
        ("as training reads", "ours"): lambda: [None for index in indices if crops.read(index) is None],
    }
    seconds = measure(passes, repeats)
    mean = path.stat().st_size / records
    floor = records / seconds["shuffled", "floor"]
    print(f"{records} records of {mean:.0f} bytes, one core, warm: records/s (MB/s)")
    print(f"{'':22}{'ours':>20}{'plain':>20}{'ours/plain':>12}{'mxnet (quoted)':>16}{'ours/mxnet':>12}")
    for name in dict.fromkeys(name for name, _ in passes):
        rates = {who: records / seconds[name, who] for who in ("ours", "plain") if (name, who) in seconds}
        cells = [*(f"{rate:,.0f} ({rate * mean / 1e6:.0f})" for rate in rates.values()), ""]
        ratio = f"{rates['ours'] / rates['plain']:.2f}" if "plain" in rates else ""
        quoted = f"{MXNET[name]:,}" if name in MXNET else ""
        share = f"{rates['ours'] / MXNET[name]:.1f}" if name in MXNET else ""
        print(f"{name:22}{cells[0]:>20}{cells[1]:>20}{ratio:>12}{quoted:>16}{share:>12}")
    print(f"floor (bare pread, shuffled): {floor:,.0f} records/s ({floor * mean / 1e6:.0f} MB/s)")
    for name in ("shuffled", "shuffled, unpacked", "as training reads"):
        print(f"  share of the floor reached, {name}: {records / seconds[name, 'ours'] / floor:.0%}")


def make_big(folder, images, identities):
    """A set of so many records in InsightFace's layout with 4-byte images: opening one never looks at the images."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, images), identities - 1, replace=False))
    starts, ends = np.append(0, cuts) + 1, np.append(cuts, images) + 1
    frame = [("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")]
    crops = np.zeros(images, [*frame, ("image", "S4")])
    crops["magic"], crops["length"] = recordio.MAGIC_NUMBER, 28
    crops["label"], crops["id"] = np.repeat(np.arange(identities), ends - starts), np.arange(1, images + 1)
    crops["image"] = b"\xff\xd8\xff\xe0"
    ranges = np.zeros(identities + 1, [*frame, ("first", "<f4"), ("end", "<f4")])
    ranges["magic"], ranges["length"], ranges["flag"] = recordio.MAGIC_NUMBER, 32, 2
    ranges["id"] = np.append(0, np.arange(identities) + images + 1)
    ranges["first"], ranges["end"] = np.append(images + 1, starts), np.append(images + 1 + identities, ends)
    with open(folder / "train.rec", "wb") as file:
        ranges[:1].tofile(file)
        crops.tofile(file)
        ranges[1:].tofile(file)
    offsets = np.concatenate([[0], 40 + 36 * np.arange(images), 40 + 36 * images + 40 * np.arange(identities)])
    with open(folder / "train.idx", "w") as file:
        for start in range(0, len(offsets), 100_000):
            block = offsets[start : start + 100_000].tolist()
            file.write("".join(f"{key}\t{offset}\n" for key, offset in enumerate(block, start)))
    return folder / "train.rec"


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _open(function, path, results):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    start = time.process_time()
    kept = function(path)
    seconds = time.process_time() - start
    results.put((seconds, _status("VmRSS") - before, _status("VmHWM") - before))
    del kept


def opening(path, repeats):
    size = path.with_suffix(".idx").stat().st_size / 1e6
    print(
        f"\nopening {EMORE_IMAGES + EMORE_IDENTITIES + 1:,} records (.idx of {size:.0f} MB): "
        "CPU seconds, MB kept, MB at most"
    )
    ways = {
        "ours, records": recordio.RecordReader,
        "ours, as training": crop_sets.open_crops,
        "plain (a dict)": Plain,
    }
    context = multiprocessing.get_context("fork")
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            results = context.Queue()
            process = context.Process(target=_open, args=(function, path, results))
            process.start()
            figures[name].append(results.get())
            process.join()
    for name, values in figures.items():
        seconds, kept, peak = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:22}{seconds:8.2f} s{kept:10.0f} MB{peak:10.0f} MB")
    print("as training: identities and labels known and compared with the records, images not touched")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000, help="records to read (default: 50000)")
    parser.add_argument("--big", type=int, default=1, help="0: do not open the large set (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="passes per figure (default: 5)")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the sets (default: a temporary one)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = make_set(Path(folder) / "small", options.records)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        reading(path, options.records, options.repeats)
        if options.big:
            (big := Path(folder) / "big").mkdir()
            opening(make_big(big, EMORE_IMAGES, EMORE_IDENTITIES), min(3, options.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
