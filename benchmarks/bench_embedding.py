"""Embedding on a CPU: crops/s of every way to compute a network, its share of the limit, and what it changes.

    python benchmarks/bench_embedding.py                              # r101 with random weights, some minutes
    python benchmarks/bench_embedding.py --checkpoint FILE --data data/crops
    python benchmarks/bench_embedding.py --network mfn --ways exact bf16

Ways, in turn in one process, batches of `--batch` crops without their mirror images:

  nchw        plain PyTorch: float32, channels first
  exact       what every stage does: float32, channels last
  compile     the same by torch.compile
  bf16        --precision bf16: bfloat16 autocast, the last layers in float32
  onnx        export.py's graph in onnxruntime, float32
  int8        the same with 8-bit convolutions, ranges from the first half of the crops (export.py --variants int8)

Columns: crops per CPU second of a thread (what a busy machine does little harm to) times the number of threads; the
share of the rate of large products of the same type (for int8: of float32's), measured in the same run; first call,
with whatever it compiles, in seconds; the least and the mean cosine to `exact` on the crops. Random weights say nothing
about the loss of int8; take a checkpoint and crops for that.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# In front of this folder, which has modules of the same names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import passive_threads  # noqa: F401  # isort: skip

import numpy as np
import torch

import export
import models
from cropping.photos import decode_crop
from embedding import Preprocessing, embedder_of_onnx, load_network, normalise
from formats import crop_sets

WAYS = ("nchw", "exact", "compile", "bf16", "onnx", "int8")


def open_network(options):
    if options.checkpoint is not None:
        return load_network(options.checkpoint)
    torch.manual_seed(0)
    return models.build_network(options.network, embedding_size=512).eval()


def open_crops(options):
    """uint8 RGB [count, 112, 112, 3]: from a training set, or of noise."""
    if options.data is None:
        return np.random.default_rng(0).integers(0, 255, (options.crops, 112, 112, 3), dtype=np.uint8)
    crops = crop_sets.open_training_set(options.data)
    chosen = np.linspace(0, len(crops) - 1, options.crops).astype(int)
    return np.stack([decode_crop(crops.read(index)[0]) for index in chosen.tolist()])


def way_of(name, network, batches, scratch):
    """A function from a float32 batch [n, 3, 112, 112] to features [n, D]."""
    if name in ("onnx", "int8"):
        graph = export.to_onnx(export.ExportedNetwork(network, None, mirror=False))
        if name == "int8":
            graph = export.to_int8(graph, iter([batch.numpy() for batch in batches[: len(batches) // 2 or 1]]), scratch)
        way = Preprocessing.of(models.feeding_of(network))
        graph = export.with_metadata(graph, {**way.to_metadata(), "mirror": "none"})
        return embedder_of_onnx(graph, f"{name}.onnx").model.run
    network = copy.deepcopy(network).to(
        memory_format=torch.contiguous_format if name == "nchw" else torch.channels_last
    )
    run: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network) if name == "compile" else network

    def features(batch):
        batch = batch.contiguous() if name == "nchw" else batch.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            return run(batch).float()

    return features


def busy_seconds(run):
    """CPU seconds of a call per thread, and what it returns."""
    began = time.process_time()
    found = run()
    return (time.process_time() - began) / torch.get_num_threads(), found


def product_rate(dtype):
    """FLOP/s of a large matrix product or a large 3x3 convolution, whichever is faster here; the best of several.

    The two come from different libraries, and MKL's products keep to AVX2 on AMD's processors.
    """
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    maps = torch.randn(16, 256, 28, 28).to(dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    tries = (
        (2 * 2048**3, lambda: left @ right),
        (2 * maps.numel() * kernel[0].numel(), lambda: torch.conv2d(maps, kernel, padding=1)),
    )
    rates = []
    for flop, run in tries:
        seconds: list[float] = []
        while len(seconds) < 8 and sum(seconds) < 1:
            seconds.append(busy_seconds(run)[0])
        rates.append(flop / min(seconds))
    return max(rates)


def forward_flop(network):
    """Floating-point operations of one crop (2 per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, 112, 112))
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="r101", choices=list(models.NETWORKS))
    parser.add_argument("--checkpoint", type=Path, help="weights instead of random ones")
    parser.add_argument("--data", type=Path, help="crops as train.py takes them, instead of noise")
    parser.add_argument("--crops", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench_embedding"), help="folder that int8 needs")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    network = open_network(options)
    pixels = Preprocessing.of(models.feeding_of(network))(torch.from_numpy(open_crops(options)))
    batches = list(pixels.split(options.batch))
    rates = {dtype: product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    flop = forward_flop(network)
    print(
        f"{options.checkpoint or options.network}, {flop / 1e9:.2f} GFLOP a crop; {torch.get_num_threads()} threads; "
        f"large products: float32 {rates[torch.float32] / 1e12:.3f}, bfloat16 {rates[torch.bfloat16] / 1e12:.3f} "
        "TFLOP/s"
    )
    ways, first, features = {}, {}, {}
    seconds: dict[str, list[float]] = {}
    for name in options.ways:
        try:
            ways[name] = way_of(name, network, batches, options.scratch)
            first[name], _ = busy_seconds(lambda name=name: ways[name](batches[0]))
            seconds[name] = []
        except Exception as error:  # a way that this machine lacks
            ways.pop(name, None)
            print(f"{name:8} not here: {(str(error).strip() or type(error).__name__).splitlines()[0][:100]}")
    for _ in range(options.rounds):  # in turn, so that a machine that slows down does so for all
        for name, run in ways.items():
            taken, rows = busy_seconds(lambda run=run: [run(batch) for batch in batches])
            seconds[name].append(taken)
            features[name] = normalise(torch.cat(rows).numpy())
    print(f"{'':8}{'crops/s':>9}{'of limit':>10}{'x exact':>9}{'first':>9}{'least cosine':>14}{'mean':>10}")
    base = statistics.median(seconds["exact"]) if "exact" in seconds else None
    for name in ways:
        middle = statistics.median(seconds[name])
        rate = len(pixels) / middle
        limit = rates[torch.bfloat16 if name == "bf16" else torch.float32] / flop
        line = f"{name:8}{rate:9.1f}{rate / limit:10.0%}"
        if base is not None:
            cosines = (features[name] * features["exact"]).sum(1)
            line += f"{base / middle:9.2f}{first[name]:7.1f} s{cosines.min():14.5f}{cosines.mean():10.5f}"
        print(line)


if __name__ == "__main__":
    main()
