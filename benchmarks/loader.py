"""Loading crops: how fast JPEGs become augmented batches, per core and in workers.

    python benchmarks/loader.py data/crops              # about a minute
    python benchmarks/loader.py data/crops --workers 8 --crops 8192

Alternatives in the same run, all from encoded crops to RGB uint8 or further:

  decoder     the limit: torchvision's and OpenCV's bare decoders on bytes that are in memory already; the faster counts
  ours        what train.py does: read the RecordIO, decode, augment, a uint8 batch (one row for each --augment)
  PIL         the reference's way: PIL, torchvision's RandomHorizontalFlip and ColorJitter, ToTensor, Normalize
  torch       the published augmentation on whole batches in float32, as a GPU would do it, after the bare decoder

Per core: medians of interleaved passes, in CPU seconds (user and system) of one thread, so that other work on the
machine matters little. With workers: wall-clock, hence only meaningful on a quiet machine. With a GPU, also nvJPEG
with augmentation there.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # in front of this folder, which has modules of the same names

import data_gen
import models
from data_gen import BatchOrder, CropDataset
from formats import crop_sets
from training import augment
from training.augment import Augmentation

BATCH = 128


def cpu_seconds(run):
    began = time.process_time()
    run()
    return time.process_time() - began


def per_core(crops, indices, repeats):
    """Seconds per crop of each alternative on one thread: {name: median}."""
    payloads = [bytearray(crops.read(index)[0]) for index in indices.tolist()]
    batches = [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]
    reference = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.125, 0.125, 0.125),
            transforms.ToTensor(),
            transforms.Normalize(models.MEAN, models.STD),
        ]
    )

    def bare_torchvision():
        for payload in payloads:
            decode_jpeg(torch.frombuffer(payload, dtype=torch.uint8), mode=ImageReadMode.RGB)

    def bare_opencv():
        for payload in payloads:
            cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR_RGB)

    def ours(recipe):
        dataset = CropDataset(crops, Augmentation.named(recipe), 0)

        def run():
            for batch in batches:
                assert not dataset[(0, batch)].error

        return run

    def pil():
        for batch in batches:
            torch.stack([reference(Image.open(io.BytesIO(crops.read(index)[0])).convert("RGB")) for index in batch])

    def batched():
        recipe = Augmentation.named("published")
        for start in range(0, len(payloads), BATCH):
            decoded = [
                decode_jpeg(torch.frombuffer(payload, dtype=torch.uint8), mode=ImageReadMode.RGB)
                for payload in payloads[start : start + BATCH]
            ]
            images = torch.stack(decoded).permute(0, 2, 3, 1)
            colours = augment.pack_colours(recipe, augment.uniforms(0, 0, batches[start // BATCH], 64))
            augment.augment_on_device(images, colours)

    runs = {
        "decoder (torchvision)": bare_torchvision,
        "decoder (OpenCV)": bare_opencv,
        "ours, none": ours("none"),
        "ours, published": ours("published"),
        "ours, strong": ours("strong"),
        "PIL": pil,
        "torch": batched,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            spent = cpu_seconds(run)
            if repeat:  # the first pass warms caches
                seconds[name].append(spent / len(payloads))
    return {name: statistics.median(values) for name, values in seconds.items()}


def with_workers(crops, count, workers):
    """Crops per second of wall-clock that a training loop could take from its loader."""
    steps = max(count // BATCH, 4)
    order = BatchOrder(len(crops), min(BATCH, len(crops)), seed=0)
    dataset = CropDataset(crops, Augmentation.named("published"), 0)
    batches = iter(data_gen.make_loader(dataset, order, 0, steps + 4, workers=workers, pin_memory=False))
    for _ in range(4):  # workers start and fill their queues
        next(batches)
    began = time.perf_counter()
    taken = sum(len(batch.labels) for batch in batches)
    return taken / (time.perf_counter() - began)


def on_gpu(crops, indices):
    """Crops per second of wall-clock when a GPU decodes and augments."""
    device = torch.device("cuda")
    dataset = CropDataset(crops, Augmentation.named("published"), 0, encoded=True)
    requests = [dataset[(0, indices[start : start + BATCH])] for start in range(0, len(indices), BATCH)]
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in requests:
            data_gen.to_inputs(data_gen.to_device(batch, dataset, device)[0])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return len(indices) / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="crops as train.py takes them")
    parser.add_argument("--crops", type=int, default=2048, help="how many each pass loads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of workers to try; none: skip")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    crops = crop_sets.open_training_set(arguments.data)
    indices = np.random.default_rng(0).permutation(len(crops))[: arguments.crops]

    seconds = per_core(crops, indices, arguments.repeats)
    limit = min(seconds["decoder (torchvision)"], seconds["decoder (OpenCV)"])
    print(f"{len(indices)} crops, one thread, medians of {arguments.repeats} passes in CPU seconds")
    print(f"{'':24}{'us/crop':>9}{'crops/s':>9}{'of limit':>10}{'x PIL':>8}")
    for name, value in seconds.items():
        print(f"{name:24}{value * 1e6:9.1f}{1 / value:9.0f}{limit / value:10.2f}{seconds['PIL'] / value:8.1f}")
    for workers in arguments.workers:
        print(f"loader, published, {workers} workers: {with_workers(crops, arguments.crops * 4, workers):.0f} crops/s")
    if torch.cuda.is_available():
        print(f"nvJPEG and augmentation on {torch.cuda.get_device_name()}: {on_gpu(crops, indices):.0f} crops/s")


if __name__ == "__main__":
    main()
