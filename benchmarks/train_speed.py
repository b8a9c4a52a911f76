"""A training step against the reference's way: crops/s, where its time and memory go, share of the device's arithmetic.

    python benchmarks/train_speed.py data/crops --network r101 --batch 256 --identities 85164      # a GPU
    python benchmarks/train_speed.py data/crops --network r101 --batch 256 --identities 2000000 --sample-rate 0.1 \
        --alternatives ours
    python benchmarks/train_speed.py data/crops --network mfn --embedding-size 128 --rounds 3      # CPU, some minutes
    python benchmarks/train_speed.py data/crops --network r18 mfn ir18 mbf vit_t --alternatives amp  # several

Alternatives, each in a process of its own, one after the other, `--rounds` times in turn; medians of the rounds:

  reference      the reference's way: float32 eager, NCHW, one-hot margin over all identities, plain SGD, loss and
                 accuracy fetched in every step, DataLoader workers with PIL and torchvision transforms
  channels-last  train.py's step (its head, fused SGD, loader) in float32 and channels-last
  amp            the same with bfloat16 autocast
  compile        channels-last with torch.compile
  small          compile, of crops shrunk to 64 pixels: train.py --compile --small-epochs
  ours           channels-last, bfloat16 autocast and torch.compile: train.py --amp --compile

The reference keeps 86 MB a crop for the backward pass of r101, ours 44: batches of 1024 need --reference-batch 512 on
a GPU of 80 GB.

Columns: crops/s of wall-clock over all steps; crops per CPU second of the training process (workers not counted: what
a step costs when other work shares the cores; on a GPU, what the host has to do); then milliseconds per step (medians)
of waiting for data and moving it, the backbone forward and backward, the head forward and backward, and the optimiser
with clipping; peak memory (on a GPU as its allocator counts it, on CPU resident memory); and the backbone's share of
the device's bfloat16 and float32 rate of matrix products, measured in the same run, counting three times the forward
pass's multiply-adds. On a GPU the parts are taken between events on the stream, read after the last step, and nothing
waits for the device inside "ours". On CPU they, and the products, are CPU time over the number of threads, so that a
busy machine does little harm (with --threads 1; idle threads of a larger team spin). Labels are spread over
`--identities`, whatever the crops' are.
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

# In front of this folder, which has modules of the same names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import passive_threads  # noqa: F401  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import data_gen
import models
import utils
from data_gen import BatchOrder, CropDataset
from formats import crop_sets
from training import distributed
from training.augment import Augmentation

SETTINGS = {  # channels-last, autocast, compile, side of the crops
    "channels-last": (True, False, False, 112),
    "amp": (True, True, False, 112),
    "compile": (True, False, True, 112),
    "small": (True, False, True, 64),
    "ours": (True, True, True, 112),
}
PARTS = ("data", "backbone", "head", "optimiser")


# --- the reference's way, as plainly as it is usually written ---------------------------------------------------------


class OneHotArcFace(nn.Module):
    """All centres, dense one-hot matrix, autograd through every step."""

    def __init__(self, size, identities, margin=0.5, scale=64.0):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(identities, size)))
        self.scale = scale
        self.cos, self.sin = np.cos(margin), np.sin(margin)
        self.threshold, self.drop = np.cos(np.pi - margin), np.sin(np.pi - margin) * margin

    def forward(self, features, labels):
        cosine = F.linear(F.normalize(features), F.normalize(self.weight))
        sine = torch.sqrt((1 - cosine**2).clamp(1e-9, 1))
        shifted = torch.where(cosine > self.threshold, cosine * self.cos - sine * self.sin, cosine - self.drop)
        one_hot = torch.zeros_like(cosine)
        one_hot.scatter_(1, labels[:, None], 1)
        return (one_hot * shifted + (1 - one_hot) * cosine) * self.scale


class PilCrops(torch.utils.data.Dataset):
    """One crop at a time through PIL and torchvision's transforms."""

    def __init__(self, crops, count):
        self.crops, self.count = crops, count
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.125, 0.125, 0.125),
                transforms.ToTensor(),
                transforms.Normalize(models.MEAN, models.STD),
            ]
        )

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        payload, label = self.crops.read(index % len(self.crops))
        return self.transform(Image.open(io.BytesIO(payload)).convert("RGB")), label


class Reference:
    def __init__(self, options, device):
        self.device = device
        self.network = models.build_network(options.network[0], embedding_size=options.embedding_size).to(device)
        self.head = OneHotArcFace(options.embedding_size, options.identities).to(device)
        self.parameters = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=False
        )
        self.identities = options.identities

    def batches(self, crops, options, steps):
        dataset = PilCrops(crops, steps * options.batch)
        return torch.utils.data.DataLoader(
            dataset, options.batch, shuffle=True, drop_last=True, num_workers=options.workers, pin_memory=False
        )

    def inputs(self, batch, step):
        images, labels = batch
        return images.to(self.device), spread(labels, self.identities, step).to(self.device)

    def features(self, images):
        return self.network(images)

    def loss(self, features, labels):
        logits = self.head(features, labels)
        loss = F.cross_entropy(logits, labels)
        loss.item()
        (logits.argmax(1) == labels).float().mean().item()
        return loss

    def update(self):
        for parameter in self.parameters:
            gradient = parameter.grad
            assert gradient is not None
            gradient.data.clamp_(-5, 5)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, options, device):
        self.channels_last, self.amp, compiled, self.side = SETTINGS[options.child]
        self.device = device
        distributed.prepare_device(device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        network = models.build_network(
            options.network[0], embedding_size=options.embedding_size, recompute=options.recompute
        )
        self.network = network.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        self.run = torch.compile(self.network) if compiled else self.network
        self.head = models.MarginHead(
            options.embedding_size,
            options.identities,
            loss="arcface",
            margin=0.5,
            scale=64.0,
            sample_rate=options.sample_rate,
        ).to(device)
        self.parameters = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        self.identities = options.identities

    def batches(self, crops, options, steps):
        self.dataset = CropDataset(crops, Augmentation.named("published"), 0, encoded=options.decode == "gpu")
        order = BatchOrder(len(crops), options.batch, seed=0)
        pin = self.device.type == "cuda"
        return data_gen.make_loader(self.dataset, order, 0, steps, workers=options.workers, pin_memory=pin)

    def inputs(self, batch, step):
        assert not batch.error, batch.error
        batch = batch._replace(labels=spread(batch.labels, self.identities, step))
        images, labels, _ = data_gen.to_device(batch, self.dataset, self.device)
        feeding = models.feeding_of(self.network)
        return data_gen.to_inputs(images, feeding, channels_last=self.channels_last, side=self.side), labels

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def features(self, images):
        with self.autocast():
            return self.run(images)

    def loss(self, features, labels):
        with self.autocast():
            return self.head(features, labels)[0]

    def update(self):
        nn.utils.clip_grad_value_([*self.parameters, *self.head.sampled_leaves()], 5.0)
        self.optimizer.step()
        self.head.step(0.01)
        self.optimizer.zero_grad()
        self.head.zero_grad()


def spread(labels, identities, step):
    """Labels over all identities of the head, however few the crops have."""
    return (labels * 2_654_435_761 + step * 40_503) % identities


# --- measuring -------------------------------------------------------------------------------------------------------


def busy_seconds():
    """CPU seconds of this process per thread: wall-clock when its threads have the cores to themselves."""
    return time.process_time() / torch.get_num_threads()


class Clock:
    """Marks in time: events on a GPU's stream, read at the end; on CPU both clocks."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        self.marks = []

    def mark(self):
        event = None
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((time.perf_counter(), busy_seconds(), event))

    def between(self, first, *, waiting=False):
        """Milliseconds from a mark to the next; `waiting` counts time in which nothing is computed. Device finished."""
        (wall, busy, event), (wall_later, busy_later, event_later) = self.marks[first : first + 2]
        if self.gpu and not waiting:
            return event.elapsed_time(event_later)
        return ((wall_later - wall) if waiting else (busy_later - busy)) * 1e3


def train_steps(way, crops, options, device):
    """Times of `options.steps` steps after as many warm-up steps as compiling and caches need."""
    clock = Clock(device)
    total = options.warmup + options.steps
    batches = iter(way.batches(crops, options, total))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(total):
        if step == options.warmup:
            synchronise(device)
            clock.marks.clear()
            began, cpu_began = time.perf_counter(), time.process_time()
        clock.mark()
        images, labels = way.inputs(next(batches), step)
        clock.mark()
        features = way.features(images)
        clock.mark()
        # The head's gradient is taken apart from the backbone's, at no cost, so that both can be timed.
        leaf = features.detach().requires_grad_()
        way.loss(leaf, labels).backward()
        clock.mark()
        features.backward(leaf.grad)
        clock.mark()
        way.update()
        clock.mark()
    synchronise(device)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    assert next(batches, None) is None  # used up, so that its workers end: the program would wait for them for ever
    spans = []
    for start in range(0, len(clock.marks), 6):
        forward, head, backward, update = (clock.between(start + i) for i in range(1, 5))
        spans.append((clock.between(start, waiting=True), forward + backward, head, update))
    medians = [statistics.median(column) for column in zip(*spans, strict=True)]
    return {
        "batch": options.batch,
        "crops/s": options.batch * options.steps / wall,
        "crops/CPU s": options.batch * options.steps / cpu,
        "memory": peak_memory(device),
        **dict(zip(PARTS, medians, strict=True)),
    }


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_rate(device, dtype):
    """FLOP/s of large square matrix products: the best of several.

    As large as the device fills its units with; where one takes long all the same, it has been measured.
    """
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 8 and sum(seconds) < 1:
        synchronise(device)
        now = time.perf_counter if device.type == "cuda" else busy_seconds
        began = now()
        left @ right
        synchronise(device)
        seconds.append(now() - began)
    return 2 * size**3 / min(seconds)


def forward_flop(options, network, side):
    """Floating-point operations of the backbone's forward pass of one crop (2 per multiply-add)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models.build_network(network, embedding_size=options.embedding_size).eval()(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


def run_child(name, network):
    """One alternative in a process of its own: its figures, or why there are none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--network", network]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return {"failed": lines[-1][:160] if lines else f"ended with {result.returncode} (out of memory?)"}


def child(options, device):
    crops = crop_sets.open_training_set(options.data)
    torch.manual_seed(0)
    if options.child == "reference" and options.reference_batch:
        options.batch = options.reference_batch
    way = (Reference if options.child == "reference" else Ours)(options, device)
    print(json.dumps(train_steps(way, crops, options, device)))


def show(results, rates, flop):
    """`flop`: of the forward pass of a crop, by the side of the crop."""
    bf16, f32 = rates
    print(f"{'':15}{'batch':>6}{'crops/s':>9}{'/CPU s':>8}" + "".join(f"{part:>11}" for part in PARTS), end="")
    print(f"{'memory':>10}{'of bf16':>9}{'of f32':>8}")
    middle = {}
    for name, rounds in results.items():
        good = [figures for figures in rounds if "failed" not in figures]
        if not good:
            print(f"{name:15} {rounds[-1]['failed']}")
            continue
        figures = middle[name] = {key: statistics.median(figures[key] for figures in good) for key in good[0]}
        side = SETTINGS[name][3] if name in SETTINGS else 112
        rate = 3 * flop[side] * figures["batch"] / (figures["backbone"] / 1e3)
        print(f"{name:15}{figures['batch']:6.0f}{figures['crops/s']:9.1f}{figures['crops/CPU s']:8.1f}", end="")
        print("".join(f"{figures[part]:8.1f} ms" for part in PARTS), end="")
        print(f"{figures['memory'] / 2**30:7.2f} GB{rate / bf16:9.1%}{rate / f32:8.1%}")
    base = middle.pop("reference", None)
    if base is None:
        return
    for name, figures in middle.items():
        wall, cpu = (figures[key] / base[key] for key in ("crops/s", "crops/CPU s"))
        print(f"{name} / reference: {wall:.2f} x the crops/s, {cpu:.2f} x the crops per CPU second")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="crops as train.py takes them")
    parser.add_argument("--network", nargs="+", default=["mfn"], choices=list(models.NETWORKS))
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--reference-batch", type=int, help="of the reference, where --batch does not fit for it")
    parser.add_argument("--identities", type=int, default=85_164, help="centres of the head")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="of the head, not for the reference")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, not for the reference")
    parser.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="where JPEGs are decoded")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(14, utils.worker_count() - 2)), help="that load, for each alternative"
    )
    parser.add_argument("--steps", type=int, help="none means 8 on a CPU, on a GPU twice what is loaded ahead")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="of the training process on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alternatives", nargs="+", default=["reference", "ours"], choices=["reference", *SETTINGS])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.steps is None:
        # Batches that lie ready when the clock starts make a loader look faster than it is: let them be half at most.
        options.steps = 8 if device.type == "cpu" else max(20, 2 * data_gen.PREFETCH * options.workers)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        child(options, device)
        return
    rates = [product_rate(device, dtype) for dtype in (torch.bfloat16, torch.float32)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; matrix products: bfloat16 {rates[0] / 1e12:.2f}, float32 {rates[1] / 1e12:.2f} TFLOP/s")
    print(
        f"batch {options.batch}, {options.identities} identities, sample rate {options.sample_rate:g}, medians of "
        f"{options.rounds} rounds of {options.steps} steps",
        flush=True,
    )
    results: dict[str, dict[str, list[dict]]] = {
        network: {name: [] for name in options.alternatives} for network in options.network
    }
    for _ in range(options.rounds):  # in turn, so that a machine that slows down does so for all
        for network in options.network:
            for name in options.alternatives:
                print(f"{network} {name} ...", file=sys.stderr, flush=True)
                results[network][name].append(run_child(name, network))
    for network in options.network:
        sides = {setting[3] for name, setting in SETTINGS.items() if name in options.alternatives} | {112}
        flop = {side: forward_flop(options, network, side) for side in sides}
        print(f"\n{network}, {flop[112] / 1e9:.2f} GFLOP forward per crop")
        show(results[network], rates, flop)


if __name__ == "__main__":
    main()
