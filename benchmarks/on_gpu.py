"""The parts of on_gpu.sh: correctness on a GPU against the CPU, then speed, then a result.

    python benchmarks/on_gpu.py --show
    python benchmarks/on_gpu.py --only head sigterm          # some parts
    python benchmarks/on_gpu.py --device cpu --tiny          # all of them in small

Each part runs in a process of its own with a time limit, prints one line, and leaves `benchmarks/results/gpu-PART.json`
with its figures, its command and the machine. `--data` are crops to train on and `--lfw` photos with pairs; without
them crops are invented, which suffices for all but the last part.
"""

import contextlib
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import passive_threads  # noqa: F401  # isort: skip

import cv2
import numpy as np
import torch

import utils
from options import option, parse
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared"))


class Skipped(Exception):
    """A part that cannot run here; the message says why."""


@dataclass
class OnGpu:
    """What to run on what."""

    device: str = option("cuda", "cuda or cpu", group="machine")
    tiny: bool = option(False, "everything in small: does the script work?", group="machine")
    only: list[str] = option([], "these parts alone", group="parts", metavar="PART")
    show: bool = option(False, "show the parts and their limits", group="parts")
    minutes: float = option(10.0, "begin no part that would end after this", group="parts", above=0)
    data: Path | None = option(
        None, "crops to train on; none means ../shared/faces_large, or invented ones", group="data"
    )
    lfw: Path | None = option(None, "photos with pairs.txt; none means ../shared/lfw if it is there", group="data")
    out: Path = option(ROOT / "benchmarks" / "results", "folder of the results", group="results", metavar="DIR")
    scratch: Path = option(Path("runs/on_gpu"), "folder for what is made on the way", group="results", metavar="DIR")
    part: str | None = option(None, "run this part in this process (used by the script itself)", group="parts")


@dataclass(frozen=True)
class Part:
    """A part: what it does, and how many seconds it may take."""

    run: Callable[[OnGpu], dict[str, Any]]
    seconds: int

    @property
    def what(self) -> str:
        return (inspect.getdoc(self.run) or "").splitlines()[0]


PARTS: dict[str, Part] = {}


def part(seconds: int) -> Callable[[Callable[[OnGpu], dict[str, Any]]], Callable[[OnGpu], dict[str, Any]]]:
    """Add a function to `PARTS` under its name with dashes."""

    def add(run: Callable[[OnGpu], dict[str, Any]]) -> Callable[[OnGpu], dict[str, Any]]:
        PARTS[run.__name__.replace("_", "-")] = Part(run, seconds)
        return run

    return add


# --- what the parts share -------------------------------------------------------------------------


def script(*words: Any, **environment: str) -> str:
    """Run a script of the repository to its end; its output. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Invented crops, uint8 RGB [count, 112, 112, 3]: smooth colours and some noise."""
    random = np.random.default_rng(seed)
    made = np.empty((count, 112, 112, 3), np.uint8)
    for index in range(count):
        coarse = random.integers(0, 255, (7, 7, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC).astype(int)
        made[index] = (smooth + random.integers(-20, 20, smooth.shape)).clip(0, 255)
    return made


def training_set(options: OnGpu) -> Path:
    """Crops to train on: given, shared, or invented once."""
    if options.data is not None:
        return options.data
    if not options.tiny and (SHARED / "faces_large" / "train.rec").exists():
        return SHARED / "faces_large"
    from formats.crop_sets import write_crops

    folder = options.scratch / ("tiny" if options.tiny else "invented")
    if not (folder / "train.rec").exists():
        identities, each = (4, 4) if options.tiny else (400, 20)
        images = pictures(identities * each)
        encoded = [cv2.imencode(".jpg", image[..., ::-1])[1].tobytes() for image in images]
        write_crops(folder, [(data, index // each) for index, data in enumerate(encoded)])
    return folder


def network(options: OnGpu, name: str = "r18") -> torch.nn.Module:
    """A network with the weights of seed 0, on the CPU."""
    from models import build_network

    torch.manual_seed(0)
    return build_network("mfn" if options.tiny else name, True, 64 if options.tiny else 512)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run`, after one run that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(one.astype(np.float64) - other).max() / max(float(np.abs(other).max()), 1e-12))


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


# --- is it right? ---------------------------------------------------------------------------------


@part(40)
def detector(options: OnGpu) -> dict[str, Any]:
    """Photos of many sizes, twice: boxes, scores and landmarks equal the CPU's, and the first run's."""
    from cropping.photos import read_photo
    from retinaface import RetinaFace

    random = np.random.default_rng(0)
    folder = SHARED / "photos"
    files = sorted(folder.glob("*.jpg"))[: 2 if options.tiny else 22] if folder.is_dir() else []
    photos = [read_photo(file) for file in files] or list(pictures(2))
    sizes = random.integers(80, 200 if options.tiny else 900, (4 if options.tiny else 64, 2))
    images = [cv2.resize(photos[index % len(photos)], tuple(size.tolist())) for index, size in enumerate(sizes)]
    there, here = RetinaFace(device=options.device), RetinaFace(device="cpu")
    began = time.perf_counter()
    first, second, expected = there.detect(images), there.detect(images), here.detect(images)
    faces, worst = 0, 0.0
    for one, again, other in zip(first, second, expected, strict=True):
        expect(np.array_equal(one.boxes, again.boxes), "the second run gave other boxes")
        expect(len(one.boxes) == len(other.boxes), f"{len(one.boxes)} faces, on the CPU {len(other.boxes)}")
        faces += len(one.boxes)
        for field in ("boxes", "scores", "landmarks"):
            if len(one.boxes):
                worst = max(worst, float(np.abs(getattr(one, field) - getattr(other, field)).max()))
    expect(worst < 0.05, f"differs from the CPU by {worst:.3f} pixels")
    return {"photos": len(images), "faces": faces, "largest_difference": worst, "seconds": time.perf_counter() - began}


@part(30)
def embedding(options: OnGpu) -> dict[str, Any]:
    """Features of one network: the GPU's equal the CPU's to float32's rounding."""
    from embedding import Embedder

    crops = pictures(4 if options.tiny else 32)
    model = network(options)
    expected = Embedder.from_network(model, "cpu").features(crops)
    found = Embedder.from_network(model.to(options.device), options.device).features(crops)
    difference = largest_difference(found, expected)
    expect(difference < 1e-4, f"features differ by {difference:.1e} of the largest")
    return {"crops": len(crops), "largest_difference": difference}


@part(40)
def head(options: OnGpu) -> dict[str, Any]:
    """Every loss: values and gradients in float64, float32 and bfloat16 against the CPU in float64."""
    from training.losses import LOSSES
    from training.margin import MarginHead

    random = torch.Generator().manual_seed(0)
    batch, identities, dim = (8, 30, 16) if options.tiny else (64, 5000, 128)
    features = torch.randn(batch, dim, generator=random, dtype=torch.float64) * 3
    labels = torch.randint(0, identities, (batch,), generator=random)
    worst: dict[str, float] = {}

    def gradients(loss: str, device: str, dtype: torch.dtype, autocast: bool) -> tuple[float, torch.Tensor]:
        made = MarginHead(dim, identities, loss=loss, scale=32.0, seed=0).to(device, dtype)
        rows = features.detach().clone().to(device, dtype).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value, _ = made(rows, labels.to(device))
        value.backward()
        assert rows.grad is not None
        return float(value.detach()), rows.grad.double().cpu()

    for loss in LOSSES:
        if loss == "none":
            continue
        expected, direction = gradients(loss, "cpu", torch.float64, False)
        for name, dtype, autocast, tolerance in (
            ("float64", torch.float64, False, 1e-9),
            ("float32", torch.float32, False, 1e-3),
            ("bfloat16", torch.float32, True, 5e-2),
        ):
            value, gradient = gradients(loss, options.device, dtype, autocast)
            apart = float((gradient - direction).norm() / direction.norm())
            worst[name] = max(worst.get(name, 0.0), apart, abs(value - expected) / max(abs(expected), 1.0))
            expect(worst[name] < tolerance, f"{loss} in {name} differs by {worst[name]:.1e}")
    return {"losses": [loss for loss in LOSSES if loss != "none"], "largest_difference": worst}


@part(40)
def no_waiting(options: OnGpu) -> dict[str, Any]:
    """No step of any loss waits for the GPU: PyTorch raises where one would."""
    from training.losses import LOSSES
    from training.margin import MarginHead

    if options.device != "cuda":
        raise Skipped("only a GPU can be waited for")
    checked = []
    for loss in (name for name in LOSSES if name != "none"):
        for rate in (1.0, 0.5):
            made = MarginHead(64, 1000, loss=loss, scale=32.0, sample_rate=rate).cuda()
            rows = torch.randn(32, 64, device="cuda", requires_grad=True)
            labels = torch.randint(0, 1000, (32,), device="cuda")
            made(rows, labels)[0].backward()  # the first call may compile
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                made(rows, labels)[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            checked.append(f"{loss} {rate:g}")
    return {"checked": checked}


@part(60)
def challenge(options: OnGpu) -> dict[str, Any]:
    """MegaFace Challenge 1: both results, as text, are the CPU's to the byte."""
    from megaface.devkit_json import cmc_text
    from megaface.protocol import identification

    random = np.random.default_rng(0)
    probes, distractors = (12, 200) if options.tiny else (400, 50_000)
    centres = random.standard_normal((probes // 4, 64))
    features = np.repeat(centres, 4, axis=0) + random.standard_normal((probes, 64))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    others = random.standard_normal((distractors, 64)).astype(np.float32)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    ids = [f"person{index // 4}" for index in range(probes)]
    texts, seconds = [], []
    for device in ("cpu", options.device):
        began = time.perf_counter()
        results = identification(features, ids, others, [10, distractors], device=device)
        seconds.append(time.perf_counter() - began)
        texts.append(["".join(cmc_text(result)) for result in results])
    expect(texts[0] == texts[1], "the results differ from the CPU's")
    return {"probes": probes, "distractors": distractors, "cpu_seconds": seconds[0], "seconds": seconds[1]}


@part(40)
def decoding(options: OnGpu) -> dict[str, Any]:
    """Crops decoded on the GPU: within two grey levels of the CPU's; damaged ones and PNGs are named, not shown."""
    if options.device != "cuda":
        raise Skipped("decoding on a GPU needs one")
    from torchvision.io import decode_jpeg

    import data_gen

    data_gen.check_decoder(torch.device("cuda"))
    images = pictures(64)
    encoded = [cv2.imencode(".jpg", image[..., ::-1])[1] for image in images]
    there = decode_jpeg([torch.from_numpy(data.ravel()) for data in encoded], device="cuda")
    here = [cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) for data in encoded]
    worst = max(
        float(np.abs(one.permute(1, 2, 0).cpu().numpy().astype(int) - other).mean())
        for one, other in zip(there, here, strict=True)
    )
    expect(worst < 2, f"decoded pixels differ by {worst:.1f} grey levels in the mean")
    return {"crops": len(images), "mean_difference_of_the_worst": worst}


def _training(options: OnGpu, out: Path, **changes: Any) -> list[str]:
    values = {
        "data": training_set(options), "out": out, "device": options.device, "network": "mfn", "embedding-size": 64,
        "batch-size": 8 if options.tiny else 64, "epochs": 2, "lr": 0.02, "margin": 0.2, "scale": 24,
        "workers": 0 if options.tiny else 2, "save-every": 2,
    } | changes  # fmt: skip
    words = ["train.py", "--resume"]
    for name, value in values.items():
        words += [f"--{name}", *([] if value is True else [str(value)])]
    return words


@part(90)
def sigterm(options: OnGpu) -> dict[str, Any]:
    """SIGTERM writes a checkpoint (exit code 143), --resume ends the run; its features are the CPU's."""
    from embedding import load_embedder

    out = options.scratch / f"sigterm-{os.getpid()}"
    words = _training(options, out, **{"epochs": 4})
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    errors = process.stderr.read() if process.stderr else ""
    expect(code in (143, 0), f"ended with {code}: {errors[-500:]}")
    script(*words)
    crops = pictures(8)
    found = load_embedder(out / "embedding.pt", options.device).features(crops)
    difference = largest_difference(found, load_embedder(out / "embedding.pt", "cpu").features(crops))
    expect(difference < 1e-3, f"features differ between devices by {difference:.1e}")
    return {"exit_code": code, "largest_difference": difference}


@part(90)
def processes(options: OnGpu) -> dict[str, Any]:
    """torchrun: one rank, as it is, with --compile and with --checkpoint-activations, each to its end."""
    ways: dict[str, dict[str, Any]] = {"recomputed": {"checkpoint-activations": True}}
    if not options.tiny:
        ways |= {"eager": {}, "compiled": {"compile": True}}
    seconds = {}
    for name, changes in ways.items():
        began = time.perf_counter()
        words = _training(options, options.scratch / f"one-{name}-{os.getpid()}", epochs=1, **changes)
        script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *words)
        seconds[name] = time.perf_counter() - began
    return {"seconds": seconds}


@part(60)
def two_ranks(options: OnGpu) -> dict[str, Any]:
    """Two processes on this one device (gloo between them) compute the loss and gradients of one."""
    output = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "--part", "_rank",
        "--device", options.device, "--tiny" if options.tiny else "--no-tiny",
    )  # fmt: skip
    return json.loads(output.strip().splitlines()[-1])


def _rank(options: OnGpu) -> None:
    """One of the two processes of `two_ranks`; rank 0 prints the differences."""
    import torch.distributed as dist

    from training.margin import MarginHead

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    features, labels = torch.randn(16, 32), torch.randint(0, 100, (16,))
    values = []
    for size in (2, 1):
        made = MarginHead(32, 100, loss="arcface", scale=32.0, rank=rank if size == 2 else 0, world_size=size, seed=0)
        made = made.to(options.device)
        part_of = slice(rank * 8, rank * 8 + 8) if size == 2 else slice(None)
        rows = features[part_of].clone().to(options.device).requires_grad_()
        loss, _ = made(rows, labels[part_of].to(options.device))
        loss.backward()
        assert rows.grad is not None
        gradient = rows.grad.cpu()
        values.append((float(loss.detach()), gradient if size == 2 else gradient[rank * 8 : rank * 8 + 8]))
    worst = max(abs(values[0][0] - values[1][0]), float((values[0][1] - values[1][1]).abs().max()))
    if rank == 0:
        print(json.dumps({"largest_difference": worst}), flush=True)
    dist.destroy_process_group()
    expect(worst < 1e-4, f"two processes differ from one by {worst:.1e}")


@part(60)
def synthetic(options: OnGpu) -> dict[str, Any]:
    """Synthetic people, twice: equal bytes; and photos per second."""
    try:
        import anny  # noqa: F401
        import warp  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed (requirements-synthetic.txt)") from error
    people, images = (1, 1) if options.tiny else (8, 20)
    listings = []
    for name in ("a", "b"):
        out = options.scratch / f"people-{name}-{os.getpid()}"
        words = ["synthesize.py", "--identities", people, "--images", images, "--out", out, "--device", options.device]
        if options.tiny:
            words += ["--size", "64"]
            if name == "b":
                break  # a minute of compiling is no test of the script
        script(*words)
        listings.append({path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.jpg"))})
    expect(len(listings) == 1 or listings[0] == listings[1], "the second run gave other photos")
    return {"photos": len(listings[0])}


# --- how fast is it? ------------------------------------------------------------------------------


@part(30)
def products(options: OnGpu) -> dict[str, Any]:
    """The device's rate of matrix products, the limit of everything below (TFLOP/s, two per multiply-add)."""
    rates = {}
    side = 256 if options.tiny else 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        one, other = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
        rates[name] = 2 * side**3 / timed(options.device, functools.partial(torch.matmul, one, other), 5) / 1e12
    return {"tflops": rates}


def _speed(options: OnGpu, *words: Any, small: Sequence[Any] = ()) -> dict[str, Any]:
    """Run train_speed.py with `words`; in small, two steps of the smallest network without compiling, and `small`."""
    if options.tiny:
        words = ("--network", "mfn", "--embedding-size", 64, "--batch", 4, "--identities", 100, "--steps", 1)
        words += ("--warmup", 1, "--workers", 0, "--alternatives", "channels-last", *small)
    else:
        words += ("--warmup", 8)
    data = training_set(options)
    text = script("benchmarks/train_speed.py", data, "--device", options.device, *words)
    return {"command": " ".join(map(str, words)), "table": text.strip().splitlines()}


@part(150)
def train_r101(options: OnGpu) -> dict[str, Any]:
    """A training step of r101, 85,164 identities, batch 256, against the reference's way."""
    return _speed(options, "--network", "r101", "--batch", 256, "--identities", 85_164)


@part(90)
def train_r101_large_batch(options: OnGpu) -> dict[str, Any]:
    """The same with batch 1,024 (the reference with 512, which is what it has memory for)."""
    if options.tiny:
        raise Skipped("the same as train-r101 in small")
    words = ("--network", "r101", "--batch", 1024, "--reference-batch", 512, "--identities", 85_164, "--steps", 40)
    return _speed(options, *words)


@part(90)
def train_two_million(options: OnGpu) -> dict[str, Any]:
    """2,000,000 identities at sample rate 0.1, ours alone."""
    sampled = ("--sample-rate", 0.1)
    words = ("--network", "r101", "--batch", 256, "--identities", 2_000_000, "--alternatives", "ours", *sampled)
    return _speed(options, *words, small=sampled)


@part(90)
def train_others(options: OnGpu) -> dict[str, Any]:
    """ir100 and vit_b, 85,164 identities, batch 256, ours alone."""
    if options.tiny:
        raise Skipped("the same as train-r101 in small")
    words = ("--network", "ir100", "vit_b", "--batch", 256, "--identities", 85_164, "--alternatives", "ours")
    return _speed(options, *words, "--steps", 40)


@part(60)
def loader(options: OnGpu) -> dict[str, Any]:
    """Crops per second from the disk to augmented batches, with one worker and with sixteen."""
    words = ["--crops", 64, "--repeats", 1, "--workers", 1] if options.tiny else ["--workers", 1, 16, "--repeats", 3]
    return {"table": script("benchmarks/loader.py", training_set(options), *words).strip().splitlines()}


@part(40)
def embed_speed(options: OnGpu) -> dict[str, Any]:
    """Crops per second of r101 without its mirror image: float32, and bfloat16 as training uses it."""
    model = network(options, "r101").eval()
    model.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    count = 4 if options.tiny else 256
    batch = torch.randn(count, 3, 112, 112, device=options.device).contiguous(memory_format=torch.channels_last)
    rates = {}
    with torch.inference_mode(), utils.true_float32(torch.device(options.device)):
        rates["float32"] = count / timed(options.device, lambda: model(batch), 3)
    with torch.inference_mode(), torch.autocast(options.device, torch.bfloat16):
        rates["bfloat16"] = count / timed(options.device, lambda: model(batch), 3)
    return {"crops_per_second": rates}


@part(40)
def detect_speed(options: OnGpu) -> dict[str, Any]:
    """Photos per second of the detector alone: 250x250 and 800x600 pixels, and 64 photos of as many sizes."""
    from retinaface import RetinaFace

    found = RetinaFace(device=options.device)
    rates = {}
    for height, width in ((64, 64),) if options.tiny else ((250, 250), (600, 800)):
        photos = [
            np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
            for index in range(2 if options.tiny else 64)
        ]
        rates[f"{width}x{height}"] = len(photos) / timed(options.device, functools.partial(found.detect, photos), 3)
    sides = np.random.default_rng(0).integers(*((40, 70) if options.tiny else (300, 800)), (len(photos), 2))
    resized = [cv2.resize(photo, tuple(side.tolist())) for photo, side in zip(photos, sides, strict=True)]
    rates["many sizes"] = len(resized) / timed(options.device, lambda: found.detect(resized), 3)
    return {"photos_per_second": rates}


@part(120)
def challenge_speed(options: OnGpu) -> dict[str, Any]:
    """Challenge 1 with one and ten million distractors against the plain product."""
    words = [
        "--scratch",
        options.scratch / "megaface",
        "--device",
        options.device,
        "--repeat",
        1,
        "--probes",
        "identities",
    ]
    words += ["--distractors", *([1000] if options.tiny else [1_000_000, 10_000_000])]
    return {"table": script("benchmarks/megaface.py", *words).strip().splitlines()}


@part(90)
def synthetic_speed(options: OnGpu) -> dict[str, Any]:
    """Synthetic photos per second."""
    if options.tiny:
        raise Skipped("the part synthetic renders in small")
    words = ["--device", options.device, "--identities", 40]
    return {"table": script("benchmarks/synthesize.py", *words).strip().splitlines()}


# --- what does it learn? --------------------------------------------------------------------------


@part(240)
def result(options: OnGpu) -> dict[str, Any]:
    """ir50 on the crops with strong augmentation for three minutes; accuracy after each epoch where LFW is there."""
    out = options.scratch / f"result-{os.getpid()}"
    lfw = options.lfw or (SHARED / "lfw" if (SHARED / "lfw").is_dir() and not options.tiny else None)
    changes: dict[str, Any] = {"epochs": 1} if options.tiny else {
        "network": "ir50", "embedding-size": 512, "batch-size": 256, "epochs": 40, "lr": 0.1, "warmup": 2,
        "schedule": "cosine", "margin": 0.4, "margin-warmup": 8, "scale": 32, "augment": "strong",
        "save-every": "60s", "compile": True, "workers": 14,
    }  # fmt: skip
    words = _training(options, out, **changes)
    if lfw is not None:
        words += ["--val", str(lfw), "--val-every", "5"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60 if options.tiny else 200)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    errors = process.stderr.read() if process.stderr else ""
    expect(process.wait() in (0, 143), errors[-500:])
    return {"command": " ".join(words), "log": (out / "log.txt").read_text().splitlines()[-12:]}


# --- the script -----------------------------------------------------------------------------------


def run_part(name: str, options: OnGpu, left: float) -> dict[str, Any]:
    """Run a part in a process of its own within its limit and what is left; what it found, or why not."""
    seconds = min(240 if options.tiny else PARTS[name].seconds, left)  # a small part waits for busy cores alone
    command = [sys.executable, __file__, "--part", name, "--device", options.device, "--out", str(options.out),
               "--scratch", str(options.scratch), "--tiny" if options.tiny else "--no-tiny"]  # fmt: skip
    for flag, value in (("--data", options.data), ("--lfw", options.lfw)):
        command += [] if value is None else [flag, str(value)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"status": "failed", "why": f"not done after {seconds:.0f} s"}
    found: dict[str, Any]
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = {"status": "failed", "why": (errors or output).strip()[-800:] or f"exit code {process.returncode}"}
    return found | {"took": time.perf_counter() - began}


def in_this_process(name: str, options: OnGpu) -> None:
    """Run a part and print one line of JSON."""
    try:
        found = {"status": "passed", **PARTS[name].run(options)}
    except Skipped as reason:
        found = {"status": "skipped", "why": str(reason)}
    except (RuntimeError, InputError) as error:
        found = {"status": "failed", "why": str(error)}
    print(json.dumps(found, default=str))


def headline(found: dict[str, Any]) -> str:
    """The numbers of a part in some words."""
    if "why" in found:
        return str(found["why"]).splitlines()[-1][:110] if str(found["why"]) else ""
    numbers = {key: value for key, value in found.items() if key not in ("status", "took", "command", "table", "log")}
    text = ", ".join(f"{key} {_short(value)}" for key, value in numbers.items())
    lines = found.get("table") or found.get("log") or []
    return (text or (lines[-1].strip() if lines else ""))[:160]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(len(value) if isinstance(value, list) else value)


def chosen_parts(options: OnGpu) -> Iterator[str]:
    """The parts that were asked for, in their order."""
    unknown = set(options.only) - PARTS.keys()
    if unknown:
        raise InputError(f"--only {' '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    yield from (name for name in PARTS if not options.only or name in options.only)


@utils.command
def main() -> int:
    """See the file's docstring."""
    options = parse(OnGpu, __doc__)
    if options.part == "_rank":
        _rank(options)
        return 0
    if options.part is not None:
        in_this_process(options.part, options)
        return 0
    if options.show:
        for name, this in PARTS.items():
            print(f"{name:24} {this.seconds:4} s  {this.what}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; --device cpu --tiny shows whether the script works")
    began = time.perf_counter()
    failed = []
    for name in chosen_parts(options):
        left = 60 * options.minutes - (time.perf_counter() - began)
        if left < 10:
            print(f"{'left out':8} {name:24} no time left (--minutes {options.minutes:g})")
            continue
        found = run_part(name, options, left)
        where = {"part": name, "what": PARTS[name].what, "environment": utils.environment()}
        if options.device == "cuda":
            where["gpu"] = torch.cuda.get_device_name()
        utils.write_json(
            options.out / f"gpu-{name}.json", where | {"tiny": options.tiny, "device": options.device} | found
        )
        failed += [name] if found["status"] == "failed" else []
        print(f"{found['status']:8} {name:24} {found.get('took', 0):5.0f} s  {headline(found)}", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}; why is in {options.out}/gpu-*.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
