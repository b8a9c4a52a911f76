"""Training data: crops from RecordIO or from folders, in a reproducible order, decoded and augmented by CPU workers.

Decisions and their price:

* A worker turns a whole batch of crops into one uint8 array and augments each crop with OpenCV right after decoding it,
  while its 37 KB are in the cache. Vectorised float32 augmentation of whole batches was measured at 0.9 ms per crop
  on one core against 0.1 ms this way, so on CPU it would be the slower half of loading, and on a GPU the workers
  still outrun any network here. What goes to the device is uint8 [N, 112, 112, 3]; `normalise` makes it float there.
* Everything random is a pure function of (seed, epoch, index of the crop): a hash, not a generator's state. The number
  of workers, the number of ranks and restarts inside an epoch cannot change what a crop looks like or when it comes.
  The order of an epoch is one permutation of all crops, computed by every rank (8 bytes per crop of memory).
* Batches are full. What is left of an epoch's order after the last full batch (fewer crops than one batch, other ones
  in each epoch) is not seen in that epoch.
"""

import contextlib
import functools
import hashlib
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

import models
import photos
import recordio
import utils
from faces import escape, unescape
from utils import InputError, image_suffix

SIZE = 112  # pixels per side of every crop, the ArcFace template's
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# ITU-R 601 luma, what PIL's convert("L") and torchvision's grayscale use.
LUMA = np.array([0.299, 0.587, 0.114])


class Crops(Protocol):
    """What training reads: `recordio.CropSet` and `FolderCrops` both are one."""

    name: str
    identities: int
    labels: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]: ...


class FolderCrops:
    """Crops as files: `<root>/<identity>/<file>`, one folder per identity, labels in the sorted order of the folders.

    Every identity folder must hold an image; a file there that is no image by its suffix, a nested folder and an image
    beside the folders are errors, because guessing which files to leave out loses data silently. Dot files are left
    alone.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.name = str(root)
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        for entry in entries:
            if not entry.is_dir() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                raise InputError(f"{entry.path}: an image in no identity's folder; move it into one, or away")
        self.identity_names = folders
        self.files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            names = self._images_in(folder)
            self.files += [f"{folder}/{name}" for name in names]
            labels += [label] * len(names)
        self.labels = np.array(labels, np.int64)
        self.identities = len(folders)

    def _images_in(self, folder: str) -> list[str]:
        names = []
        for entry in os.scandir(self.root / folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                raise InputError(f"{entry.path}: not a crop; an identity's folder holds only images ({suffixes})")
            names.append(entry.name)
        if not names:
            raise InputError(f"{self.root / folder}: identity without a crop; remove the empty folder")
        return sorted(names)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop and its label."""
        return (self.root / self.files[index]).read_bytes(), int(self.labels[index])

    def describe(self, index: int) -> str:
        """How to find this crop again."""
        return str(self.root / self.files[index])


def open_training_set(path: str | Path, *, skip_unreadable: bool = False) -> Crops:
    """Open RecordIO (a folder with train.rec, or a .rec file) or a folder of identity folders, and check it.

    With `skip_unreadable`, damaged images do not matter yet. Raises `InputError` when there is nothing to train on: no
    crops, fewer than two identities, a label out of range, or an identity without a crop.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file() or (path / "train.rec").exists():
        crops: Crops = recordio.open_crops(path, skip_damaged=skip_unreadable)
    else:
        crops = FolderCrops(path)
    check(crops)
    return crops


def check(crops: Crops) -> None:
    """Raise `InputError` unless every label is one of the identities and every identity has a crop."""
    if len(crops) == 0:
        raise InputError(f"{crops.name}: no crops (neither train.rec nor folders of images)")
    low, high = int(crops.labels.min()), int(crops.labels.max())
    if low < 0 or high >= crops.identities:
        raise InputError(
            f"{crops.name}: labels {low} to {high}, but there are {crops.identities} identities (0 to one less)"
        )
    counts = np.bincount(crops.labels, minlength=crops.identities)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        named = ", ".join(map(str, empty[:10])) + (" ..." if len(empty) > 10 else "")
        raise InputError(f"{crops.name}: {len(empty)} identities without a crop: {named}")
    if crops.identities < 2:
        raise InputError(f"{crops.name}: one identity only; there is nothing to tell apart")


def fingerprint(crops: Crops, *, skip_unreadable: bool = False) -> str:
    """A hash by which a restart recognises its data: labels and evenly spread samples of the bytes.

    It costs the same for any size of set (256 crops are read), so it does not notice every change of a pixel. Raises
    the error of an unreadable crop unless these are to be skipped.
    """
    digest = hashlib.sha256(np.ascontiguousarray(crops.labels, dtype="<i8").tobytes())
    for index in np.linspace(0, len(crops) - 1, 256).astype(np.int64).tolist():
        try:
            digest.update(crops.read(index)[0])
        except (InputError, OSError):
            if not skip_unreadable:
                raise
    return digest.hexdigest()


def describe(crops: Crops, index: int) -> str:
    """Name one crop in a message so that it can be found again."""
    if hasattr(crops, "describe"):
        return crops.describe(index)
    return f"{crops.name}: crop {index}"


# --- randomness ------------------------------------------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that scrambles 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each crop, float64 [n, count], a pure function of (seed, epoch, index)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], np.int64).astype(np.uint64) + golden)
        key = _mix(key ^ (np.uint64(epoch) + np.uint64(1)) * golden)
        rows = _mix(key + (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * golden)
        bits = _mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(crops: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch sees its crops: a permutation of range(crops), int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(crops)


# --- augmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How a crop is changed before the network sees it. Probabilities per crop; the ranges are in each field's comment.

    `published` is the reference recipe: mirror and torchvision's ColorJitter(0.125, 0.125, 0.125). `strong` is for
    small sets of mixed origin, where an identity's photos share a source and with it black borders, sharpness and
    colours: whatever gives the source away is made random.
    """

    mirror: float = 0.5
    jitter: float = 0.125  # brightness, contrast, saturation: each factor uniform in 1 +- jitter
    grey: float = 0.0
    geometry: float = 0.0
    rotation: float = 0.0  # degrees, +-
    scale: float = 0.0  # natural logarithm of the zoom, +-
    shift: float = 0.0  # pixels, +-
    low_resolution: float = 0.0  # shrink to 1/1 ... 1/4 (log-uniform) and back
    blur: float = 0.0  # Gaussian, sigma 0.4 to 1.6 px
    noise: float = 0.0  # Gaussian, sigma 2 to 12 grey levels
    jpeg: float = 0.0  # recompressed at quality 25 to 90
    repaint: float = 0.0  # a black border (grown from black corners) takes a random colour
    border: float = 0.0  # black (mostly) or coloured borders cut in, each side up to 30 % deep, tilted up to 12 degrees
    erase: float = 0.0  # a rectangle of 15 to 45 % of each side, at a random place, in a random colour

    @classmethod
    def named(cls, name: Literal["published", "strong", "none"]) -> "Augmentation":
        """One of the recipes of `--augment`."""
        if name == "none":
            return cls(mirror=0.0, jitter=0.0)
        if name == "published":
            return cls()
        return cls(
            jitter=0.2,
            grey=0.1,
            geometry=0.6,
            rotation=8.0,
            scale=0.08,
            shift=4.0,
            low_resolution=0.4,
            blur=0.1,
            noise=0.1,
            jpeg=0.2,
            repaint=0.3,
            border=0.2,
            erase=0.1,
        )

    @property
    def only_mirror_and_colours(self) -> bool:
        """True for what `augment_on_device` can do."""
        rest = (
            self.geometry,
            self.low_resolution,
            self.blur,
            self.noise,
            self.jpeg,
            self.repaint,
            self.border,
            self.erase,
        )
        return not any(rest)


# What of a crop's numbers is used for what; the rest is taken by `_Draw`, one after the other.
_MIRROR, _BRIGHTNESS, _CONTRAST, _SATURATION, _GREY, _REST = range(6)
_NUMBERS = 64  # per crop; more than one ever takes


class Colours(NamedTuple):
    """Mirror and colour change of n crops: rgb -> linear @ rgb + luma_factor * (mean luma of the crop), clipped."""

    mirror: np.ndarray  # bool [n]
    linear: np.ndarray  # float64 [n, 3, 3]
    luma_factor: np.ndarray  # float64 [n]


def draw_colours(recipe: Augmentation, values: np.ndarray) -> Colours:
    """Mirror and colours from `uniforms` [n, at least 5].

    Brightness, contrast and saturation, in this order, as one affine map. Each step is torchvision's
    (`adjust_brightness`, ...): a blend with black, with the image's mean luma, with the pixel's own luma. Departures
    from torchvision's ColorJitter: the order is fixed, and values are rounded and clipped once at the end.
    """
    brightness, contrast, saturation = (1 + recipe.jitter * (2 * values[:, _BRIGHTNESS:_GREY].T - 1))[:, :, None, None]
    saturation = np.where(values[:, _GREY, None, None] < recipe.grey, 0.0, saturation)
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    return Colours(values[:, _MIRROR] < recipe.mirror, linear, (brightness * (1 - contrast))[:, 0, 0])


class _Draw:
    """Takes the numbers of one crop one after the other; every decision always takes its numbers, used or not."""

    def __init__(self, values: list[float]) -> None:
        self._values = iter(values)

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def colour(self) -> tuple[float, float, float]:
        return self.between(0, 255), self.between(0, 255), self.between(0, 255)


class Augmenter:
    """Changes the crops of one batch; `values` are `uniforms` [n, 64], a row for each crop."""

    def __init__(self, recipe: Augmentation, values: np.ndarray) -> None:
        self.recipe = recipe
        colours = draw_colours(recipe, values)
        self.mirror = colours.mirror.tolist()
        self.luma_factor = colours.luma_factor.tolist()
        self.matrices = np.concatenate([colours.linear, np.zeros((len(values), 3, 1))], axis=2)
        self.changes_colours = recipe.jitter > 0 or recipe.grey > 0
        self.rest = None if recipe.only_mirror_and_colours else values[:, _REST:].tolist()

    def __call__(self, position: int, rgb: np.ndarray, out: np.ndarray) -> None:
        """Write crop number `position` of the batch, uint8 [112, 112, 3], changed, to `out` of the same shape."""
        mirror = self.mirror[position]
        if self.rest is None:
            self._change_colours(position, cv2.flip(rgb, 1) if mirror else rgb, out)
            return
        draw = _Draw(self.rest[position])
        rgb = _repaint_border(rgb, self.recipe, draw)
        rgb = _move(rgb, self.recipe, draw, mirror)
        rgb = _lower_resolution(rgb, self.recipe, draw)
        self._change_colours(position, rgb, out)
        _add_noise(out, self.recipe, draw)
        _recompress(out, self.recipe, draw)
        _cut_border(out, self.recipe, draw)
        _erase(out, self.recipe, draw)

    def _change_colours(self, position: int, rgb: np.ndarray, out: np.ndarray) -> None:
        if not self.changes_colours:
            out[:] = rgb
            return
        red, green, blue, _ = cv2.sumElems(rgb)  # a third faster than cv2.mean
        luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        matrix = self.matrices[position]
        matrix[:, 3] = self.luma_factor[position] / (SIZE * SIZE) * luma
        cv2.transform(rgb, matrix, dst=out)


def pack_colours(recipe: Augmentation, values: np.ndarray) -> Tensor:
    """`draw_colours` as `augment_on_device` takes it, one float32 row for each crop: mirror, luma factor, matrix."""
    mirror, linear, luma_factor = draw_colours(recipe, values)
    packed = np.concatenate([mirror[:, None], luma_factor[:, None], linear.reshape(-1, 9)], axis=1)
    return torch.from_numpy(packed.astype(np.float32))


def augment_on_device(images: Tensor, colours: Tensor) -> Tensor:
    """What `Augmenter` does with mirror and colours, for uint8 [n, 112, 112, 3] on any device; the same to one grey
    level. `colours` [n, 11] is of `pack_colours`, on that device.
    """
    mirror, luma_factor, linear = colours[:, 0] > 0, colours[:, 1], colours[:, 2:].view(-1, 3, 3)
    pixels = images.flatten(1, 2).float()
    luma = sum(share * mean for share, mean in zip(LUMA.tolist(), pixels.mean(1).unbind(1), strict=True))
    offset = luma_factor * luma
    pixels = torch.baddbmm(offset[:, None, None], pixels, linear.mT).round_().clamp_(0, 255)
    pixels = pixels.to(torch.uint8).view(images.shape)
    return torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)


def _repaint_border(rgb: np.ndarray, recipe: Augmentation, draw: _Draw) -> np.ndarray:
    """Give black corners and all black that is connected to them one random colour."""
    wanted, colour = draw.chance(recipe.repaint), draw.colour()
    if not wanted:
        return rgb
    last = SIZE - 1
    corners = [(x, y) for x in (0, last) for y in (0, last) if rgb[y, x].max() < 12]
    if not corners:
        return rgb
    rgb = rgb.copy()
    for corner in corners:
        if rgb[corner[1], corner[0]].max() < 12:  # else the fill that began at another corner has been here
            cv2.floodFill(rgb, None, corner, colour, (20, 20, 20), (20, 20, 20), cv2.FLOODFILL_FIXED_RANGE | 4)
    return rgb


def _move(rgb: np.ndarray, recipe: Augmentation, draw: _Draw, mirror: bool) -> np.ndarray:
    """Mirror, rotate, zoom and shift in one bilinear warp."""
    wanted, black = draw.chance(recipe.geometry), draw.chance(0.3)
    angle = math.radians(draw.between(-recipe.rotation, recipe.rotation))
    zoom = math.exp(draw.between(-recipe.scale, recipe.scale))
    shift = (draw.between(-recipe.shift, recipe.shift), draw.between(-recipe.shift, recipe.shift))
    if not wanted:
        return cv2.flip(rgb, 1) if mirror else rgb
    centre = (SIZE - 1) / 2
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
    offset = centre + np.array(shift) - linear @ [centre, centre]
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    border = cv2.BORDER_CONSTANT if black else cv2.BORDER_REPLICATE
    return cv2.warpAffine(rgb, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=border)


def _lower_resolution(rgb: np.ndarray, recipe: Augmentation, draw: _Draw) -> np.ndarray:
    """Shrink and enlarge, or blur."""
    shrink, side = draw.chance(recipe.low_resolution), round(SIZE * math.exp(-draw.between(0, math.log(4))))
    smooth = draw.chance(0.5)
    blur, sigma = draw.chance(recipe.blur), draw.between(0.4, 1.6)
    if shrink:
        small = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC if smooth else cv2.INTER_LINEAR)
    if blur:
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    return rgb


@functools.cache
def _noise_bank() -> np.ndarray:
    """One fixed plate of unit Gaussian noise times 16, int16 [224, 224, 3]; crops take windows of it at random
    places.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    return np.round(16 * generator.standard_normal((2 * SIZE, 2 * SIZE, 3), np.float32)).astype(np.int16)


def _add_noise(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    wanted, sigma = draw.chance(recipe.noise), draw.between(2, 12)
    left, top, grey = int(draw.between(0, SIZE)), int(draw.between(0, SIZE)), draw.chance(0.3)
    if not wanted:
        return
    noise = _noise_bank()[top : top + SIZE, left : left + SIZE]
    if grey:
        noise = np.repeat(noise[:, :, :1], 3, axis=2)
    cv2.addWeighted(out, 1.0, np.ascontiguousarray(noise), sigma / 16, 0.0, dst=out, dtype=cv2.CV_8U)


def _recompress(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    wanted, quality = draw.chance(recipe.jpeg), round(draw.between(25, 90))
    if not wanted:
        return
    bgr = cv2.cvtColor(out, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    out[:] = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)


def _cut_border(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    """Cut away the sides of the crop along lines that share one tilt, as an alignment near a photo's edge leaves it."""
    wanted, tilt = draw.chance(recipe.border), math.radians(draw.between(-12, 12))
    coloured, colour = draw.chance(0.2), draw.colour()
    sides = [(draw.chance(0.4), draw.between(0, 0.3 * SIZE)) for _ in range(4)]
    if not wanted:
        return
    fill = colour if coloured else (0.0, 0.0, 0.0)
    centre = (SIZE - 1) / 2
    for turn, (cut, depth) in enumerate(sides):
        if not cut:
            continue
        angle = tilt + turn * math.pi / 2
        across, outward = np.array([math.cos(angle), math.sin(angle)]), np.array([math.sin(angle), -math.cos(angle)])
        near, far = centre - depth, 2 * SIZE
        corners = [centre + a * across * far + b * outward for a, b in ((-1, near), (1, near), (1, far), (-1, far))]
        cv2.fillConvexPoly(out, np.round(corners).astype(np.int32), fill)


def _erase(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    wanted, colour = draw.chance(recipe.erase), draw.colour()
    width, height = round(draw.between(0.15, 0.45) * SIZE), round(draw.between(0.15, 0.45) * SIZE)
    left, top = int(draw.between(0, SIZE - width)), int(draw.between(0, SIZE - height))
    if wanted:
        cv2.rectangle(out, (left, top), (left + width, top + height), colour, thickness=-1)


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchOrder:
    """Which crops the optimiser's step number `step` sees on this rank: a pure function, so any step can be resumed at.

    The global batch of a step is a slice of the epoch's order; it is cut into `accumulate` micro-batches and each of
    these into one part per rank, so ranks and accumulation together see exactly what one process would.
    """

    crops: int
    batch_size: int  # crops per optimiser step over all ranks
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            raise InputError(
                f"--batch-size {self.batch_size} must be a multiple of {parts} ({self.world_size} processes times "
                f"--accumulate {self.accumulate})"
            )
        if self.batch_size > self.crops:
            raise InputError(f"--batch-size {self.batch_size} is more than the {self.crops} crops of the training set")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.crops // self.batch_size

    def global_batch(self, step: int) -> np.ndarray:
        """Indices of all crops of a step over all ranks, int64 [batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.crops, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def micro_batches(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, indices int64 [local size]) of this rank from step `start` up to, not including, step `stop`."""
        micro = self.batch_size // self.accumulate
        local = micro // self.world_size
        current, order = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.crops, self.seed, epoch)
            for part in range(self.accumulate):
                first = position * self.batch_size + part * micro + self.rank * local
                yield epoch, order[first : first + local]


class Batch(NamedTuple):
    """What a worker hands over. Plain tensors, so that it goes through shared memory and can be pinned."""

    images: Tensor  # uint8 RGB [n, 112, 112, 3], augmented; or, still encoded, uint8 [bytes of all crops]
    labels: Tensor  # int64 [n]
    indices: Tensor  # int64 [n] positions in the training set
    sizes: Tensor  # int64 [n] bytes of each encoded crop; [0] when the images are decoded
    colours: Tensor  # float32 [n, 11] what is to be changed of encoded crops; [0] when they are decoded
    skipped: Tensor  # int64 [k] unreadable crops that were replaced by the next readable one
    error: str  # not empty: the run must stop with this message


_NOTHING = torch.empty(0)

PREFETCH = 4  # batches that a worker makes ahead
SHARED_MEMORY = "/dev/shm"  # through which workers hand batches over
ENCODED_CROP = 16_384  # bytes of an encoded crop, rather too many


def decode_crop(encoded: bytes) -> np.ndarray:
    """An encoded crop as RGB uint8 [112, 112, 3]. Raises `ValueError` with the reason when it cannot be used."""
    if not encoded:
        raise ValueError("empty")
    try:
        rgb = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        rgb = None
    if rgb is None:
        kind = image_suffix(encoded)
        raise ValueError("not an image" if kind is None else f"{kind[1:]} image, but damaged or cut short")
    if rgb.shape != (SIZE, SIZE, 3):
        raise ValueError(f"{rgb.shape[1]}x{rgb.shape[0]} pixels, not {SIZE}x{SIZE}; align it with pre_process.py")
    return rgb


def _empty_images(count: int) -> Tensor:
    """uint8 [count, 112, 112, 3]; in a worker of a loader, in the shared memory that the batch will be sent through.

    As torch's own collate function does it: filling private memory first would cost a copy of the batch.
    """
    shape = (count, SIZE, SIZE, 3)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


class CropDataset(torch.utils.data.Dataset):
    """Maps (epoch, indices) to a `Batch`, decoded and augmented. An unreadable crop stops the run or is replaced.

    With `skip_unreadable` an unreadable crop's place is taken by the next readable one of the set with its own label,
    and its index is reported in `Batch.skipped`; the shape of batches and the order of all others stay as they are.
    With `encoded` the crops are only read, for a device that decodes.
    """

    def __init__(
        self, crops: Crops, recipe: Augmentation, seed: int, *, skip_unreadable: bool = False, encoded: bool = False
    ) -> None:
        self.crops = crops
        self.recipe = recipe
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = request
        values = uniforms(self.seed, epoch, indices, _NUMBERS)
        skipped: list[int] = []
        try:
            if self.encoded:
                return self._encoded(indices, values)
            images = _empty_images(len(indices))
            rgb = images.numpy()
            labels = np.empty(len(indices), np.int64)
            change = Augmenter(self.recipe, values)
            for position, index in enumerate(indices.tolist()):
                crop, labels[position] = self.readable(index, skipped)
                change(position, crop, rgb[position])
        except InputError as error:
            return Batch(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, str(error))
        labels, indices = torch.from_numpy(labels), torch.from_numpy(indices)
        return Batch(images, labels, indices, _NOTHING, _NOTHING, torch.tensor(skipped, dtype=torch.int64), "")

    def _encoded(self, indices: np.ndarray, values: np.ndarray) -> Batch:
        crops = [self._read(index) for index in indices.tolist()]
        images = torch.frombuffer(bytearray(b"".join(crop for crop, _ in crops)), dtype=torch.uint8)
        labels = torch.tensor([label for _, label in crops])
        sizes = torch.tensor([len(crop) for crop, _ in crops])
        colours = pack_colours(self.recipe, values)
        return Batch(images, labels, torch.from_numpy(indices), sizes, colours, _NOTHING, "")

    def _read(self, index: int) -> tuple[bytes, int]:
        """The encoded crop and its label; no bytes for one that is left to the CPU.

        Those are crops that cannot be read and are to be replaced, and those that EXIF turns, as OpenCV does and
        nvJPEG does not.
        """
        try:
            encoded, label = self.crops.read(index)
            turned = b"Exif\0\0" in encoded[:64] and photos.orientation(encoded) != 1
            return b"" if turned else encoded, label
        except (ValueError, OSError, InputError):
            self.readable(index, [])  # raises, unless such crops are replaced
            return b"", int(self.crops.labels[index])

    def readable(self, index: int, skipped: list[int]) -> tuple[np.ndarray, int]:
        """Crop `index` as RGB uint8 [112, 112, 3], and its label; or the next readable one, noting in `skipped` why.

        Raises `InputError` naming the crop when it cannot be read and must not be replaced.
        """
        total = len(self.crops)
        for candidate in range(index, index + total):
            try:
                encoded, label = self.crops.read(candidate % total)
                return decode_crop(encoded), label
            except (ValueError, OSError, InputError) as error:
                if not self.skip_unreadable:
                    reason = (
                        str(error) if isinstance(error, InputError) else f"{describe(self.crops, candidate)}: {error}"
                    )
                    raise InputError(f"{reason} (--skip-unreadable replaces such crops and counts them)") from error
                skipped.append(candidate % total)
        raise InputError(f"{self.crops.name}: none of the {total} crops is readable")


def check_decoder(device: torch.device) -> None:
    """Raise `InputError` if a device cannot decode JPEG: `to_device` would decode every batch on the CPU instead."""
    _, encoded = cv2.imencode(".jpg", np.full((SIZE, SIZE, 3), 127, np.uint8))
    try:
        _decode_on(device, [torch.from_numpy(encoded)])
    except RuntimeError as error:
        raise InputError(f"--decode gpu: {device} does not decode: {str(error).splitlines()[0]}") from error


def check_jpeg(crops: Crops) -> None:
    """Raise `InputError` for crops that are no JPEG, by a sample: `to_device` would decode every batch on the CPU."""
    kinds = set()
    for index in np.linspace(0, len(crops) - 1, 16).astype(np.int64).tolist():
        with contextlib.suppress(InputError, OSError):  # for `CropDataset` to complain of
            kinds.add(image_suffix(crops.read(index)[0]))
    if kinds and ".jpg" not in kinds:
        raise InputError(f"--decode gpu: {crops.name} holds no JPEG, and nothing else is decoded there")


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _decode_on(device: torch.device, encoded: list[Tensor]) -> list[Tensor]:
    """JPEGs, flat uint8 tensors in main memory, as RGB uint8 [3, height, width] on the device.

    nvJPEG writes at once, whatever is in the queue of the stream it is called in (pytorch/vision pull request 9606).
    But memory that the host has given back may still be read by kernels in the queue, as training never waits for
    them. So pictures are put into memory of a stream with nothing in its queue, which gets it back when the present
    stream has read it.
    """
    if device.type == "cpu":
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    present, decoding = torch.cuda.current_stream(device), _decoding_stream(device)
    with torch.cuda.stream(decoding):
        decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    present.wait_stream(decoding)
    for image in decoded:
        image.record_stream(present)
    return decoded


def to_device(batch: Batch, dataset: CropDataset, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Augmented images uint8 [n, 112, 112, 3] and labels [n] on the device, and crops that had to be replaced for it.

    Encoded crops are decoded and augmented there (nvJPEG on a GPU). nvJPEG does not say which crop of a batch it cannot
    decode, and takes only JPEG: such a batch is decoded once more on the CPU, which names the crop or replaces it.
    """
    labels = batch.labels.to(device, non_blocking=True)
    if not dataset.encoded:
        return batch.images.to(device, non_blocking=True), labels, []
    skipped: list[int] = []
    try:
        sizes = batch.sizes.tolist()
        if 0 in sizes:
            raise RuntimeError("a crop for the CPU")
        parts = list(batch.images.split(sizes))
        decoded = _decode_on(device, parts)
        if any(image.shape != (3, SIZE, SIZE) for image in decoded):
            raise RuntimeError("not all of the size of a crop")
        images = torch.stack(decoded).permute(0, 2, 3, 1)
    except RuntimeError:
        pairs = [dataset.readable(index, skipped) for index in batch.indices.tolist()]
        images = torch.from_numpy(np.stack([crop for crop, _ in pairs])).to(device)
        labels = torch.tensor([label for _, label in pairs], device=device)
    return augment_on_device(images, batch.colours.to(device, non_blocking=True)), labels, skipped


class _Requests(torch.utils.data.Sampler):
    """The loader's sampler: requests of (epoch, indices) from one step to another."""

    def __init__(self, order: BatchOrder, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.order.accumulate

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self.order.micro_batches(self.start, self.stop)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    # A signal to the whole process group is for the trainer, which writes a checkpoint first; workers end with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Batch) -> Batch:
    return batch


def workers_that_fit(dataset: CropDataset, order: BatchOrder, workers: int) -> tuple[int, int]:
    """How many of `workers` processes, and how many batches ahead each, there is shared memory for.

    A container has 64 MB of it unless it was started with more, and 15 workers want ten times as much. Raises
    `InputError` when not even one batch can be made while another is handed over.
    """
    if not workers:
        return 0, 0
    crop = ENCODED_CROP if dataset.encoded else SIZE * SIZE * 3
    size = order.batch_size // order.accumulate // order.world_size * crop
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not a Linux that we know; torch will say what it lacks
        return workers, PREFETCH
    room = int(0.9 * free) // size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1  # one is being handed over
    if room < 1:
        raise InputError(
            f"{SHARED_MEMORY}: {free / 1e6:.0f} MB free, and two batches for each process take {2 * size / 1e6:.0f}; "
            "start the container with more (docker run --shm-size=8g, or --ipc=host), or take --workers 0"
        )
    # Two each rather than more workers that wait for one another.
    workers = min(workers, max(1, room // 2))
    return workers, min(PREFETCH, room // workers)


def make_loader(
    dataset: CropDataset, order: BatchOrder, start: int, stop: int, *, workers: int, pin_memory: bool
) -> torch.utils.data.DataLoader:
    """One loader over all micro-batches from step `start` to `stop`, across epochs, so that workers never drain
    between them.

    `workers` processes decode ahead, fewer where `workers_that_fit` says so; 0 decodes in the caller. Iterating raises
    nothing for a bad crop: look at `Batch.error`.
    """
    workers, ahead = workers_that_fit(dataset, order, workers)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=_Requests(order, start, stop),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        prefetch_factor=ahead or None,
        # A forked worker is a child of the trainer and ends when that is killed; one from a fork server never notices.
        multiprocessing_context="fork" if workers else None,
    )


@contextlib.contextmanager
def loading(
    dataset: CropDataset, order: BatchOrder, start: int, stop: int, *, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """The batches of `make_loader`; its workers have ended when the block is left, however that happens.

    Without this they end when nothing refers to the iterator any more. If something still does at the end of the
    program, multiprocessing sends the workers SIGTERM, which they ignore, and waits for them for ever.
    """
    batches = iter(make_loader(dataset, order, start, stop, workers=workers, pin_memory=pin_memory))
    try:
        yield batches
    finally:
        if workers:
            batches._shutdown_workers()  # what its destructor does; there is no public name for it


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the networks' input, [3] on a device; kept, because copying them waits for it."""
    return torch.tensor(models.MEAN, device=device), torch.tensor(models.STD, device=device)


def normalise(images: Tensor, *, channels_last: bool = True) -> Tensor:
    """uint8 RGB [N, 112, 112, 3] to the network's input float32 [N, 3, 112, 112], in memory as asked for.

    Convolutions take the layout of their input: one in channels-last would give the whole network that layout.
    """
    mean, std = _statistics(images.device)
    inputs = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    return inputs if channels_last else inputs.contiguous()


def denormalise(inputs: Tensor) -> Tensor:
    """The network's input [N, 3, 112, 112] as RGB pictures with values in [0, 1], for people to look at."""
    mean, std = _statistics(inputs.device)
    return (inputs.permute(0, 2, 3, 1) * std + mean).clamp(0, 1).permute(0, 3, 1, 2)


def identity_names(crops: Crops) -> list[str]:
    """What the identities are called, by label: folder names, or what pre_process.py wrote beside its train.rec.

    The label as text where the data has no names, or has an identities.tsv of another number of identities.
    """
    if isinstance(crops, FolderCrops):
        return crops.identity_names
    table = Path(getattr(crops, "path", crops.name)).with_name("identities.tsv")
    if table.is_file():
        names = read_identities(table)
        if len(names) == crops.identities:
            return names
    return [str(label) for label in range(crops.identities)]


def read_identities(path: Path) -> list[str]:
    """Names by label from an identities.tsv (label, identity, ...; a header line). Raises `InputError` on a wrong
    line.
    """
    names = []
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    for number, line in enumerate(lines[1:-1], 2):
        cells = line.split("\t")
        if len(cells) < 2 or cells[0] != str(len(names)):
            raise InputError(
                f"{path}: line {number}: {line[:60]!r} does not begin with label {len(names)} and an identity"
            )
        names.append(unescape(cells[1]))
    return names


def write_identities(path: Path, names: Sequence[str]) -> None:
    """Names by label as an identities.tsv."""
    lines = ["label\tidentity", *(f"{label}\t{escape(name)}" for label, name in enumerate(names))]
    utils.write_bytes(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
