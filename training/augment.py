"""How a training crop is changed before the network sees it, and the numbers that decide it.

Decisions and their price:

* Everything random is a pure function of (seed, epoch, index of the crop): a hash, not a generator's state. The number
  of workers, the number of ranks and restarts inside an epoch cannot change what a crop looks like.
* A crop is augmented with OpenCV right after it was decoded, while its 37 KB are in the cache. Vectorised float32
  augmentation of whole batches was measured at 0.9 ms per crop on one core against 0.1 ms this way. Mirror and colours
  alone can be done on the device (`augment_on_device`), which is what decoding on a GPU leaves room for.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from config import CROP_SIZE

# ITU-R 601 luma, what PIL's convert("L") and torchvision's grayscale use.
LUMA = np.array([0.299, 0.587, 0.114])


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


# --- augmentation ----------------------------------------------------------------------------------------------------


ON_DEVICE = ("mirror", "jitter", "grey")  # what of a recipe `augment_on_device` does
AMOUNTS = ("rotation", "scale", "shift")  # how much `geometry` moves; without it they mean nothing


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
    def named(cls, name: str) -> "Augmentation":
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
        return not any(getattr(self, part.name) for part in fields(self) if part.name not in ON_DEVICE + AMOUNTS)


# What of a crop's numbers is used for what; the rest is taken by `_Draw`, one after the other.
_MIRROR, _BRIGHTNESS, _CONTRAST, _SATURATION, _GREY, _REST = range(6)
NUMBERS = 64  # per crop; more than one ever takes


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
        matrix[:, 3] = self.luma_factor[position] / (CROP_SIZE * CROP_SIZE) * luma
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
    last = CROP_SIZE - 1
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
    centre = (CROP_SIZE - 1) / 2
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
    offset = centre + np.array(shift) - linear @ [centre, centre]
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    border = cv2.BORDER_CONSTANT if black else cv2.BORDER_REPLICATE
    return cv2.warpAffine(rgb, matrix, (CROP_SIZE, CROP_SIZE), flags=cv2.INTER_LINEAR, borderMode=border)


def _lower_resolution(rgb: np.ndarray, recipe: Augmentation, draw: _Draw) -> np.ndarray:
    """Shrink and enlarge, or blur."""
    shrink, side = draw.chance(recipe.low_resolution), round(CROP_SIZE * math.exp(-draw.between(0, math.log(4))))
    smooth = draw.chance(0.5)
    blur, sigma = draw.chance(recipe.blur), draw.between(0.4, 1.6)
    if shrink:
        small = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_CUBIC if smooth else cv2.INTER_LINEAR)
    if blur:
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    return rgb


@functools.cache
def _noise_bank() -> np.ndarray:
    """One fixed plate of unit Gaussian noise times 16, int16 [224, 224, 3]; crops take windows of it at random
    places.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    return np.round(16 * generator.standard_normal((2 * CROP_SIZE, 2 * CROP_SIZE, 3), np.float32)).astype(np.int16)


def _add_noise(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    wanted, sigma = draw.chance(recipe.noise), draw.between(2, 12)
    left, top, grey = int(draw.between(0, CROP_SIZE)), int(draw.between(0, CROP_SIZE)), draw.chance(0.3)
    if not wanted:
        return
    noise = _noise_bank()[top : top + CROP_SIZE, left : left + CROP_SIZE]
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
    sides = [(draw.chance(0.4), draw.between(0, 0.3 * CROP_SIZE)) for _ in range(4)]
    if not wanted:
        return
    fill = colour if coloured else (0.0, 0.0, 0.0)
    centre = (CROP_SIZE - 1) / 2
    for turn, (cut, depth) in enumerate(sides):
        if not cut:
            continue
        angle = tilt + turn * math.pi / 2
        across, outward = np.array([math.cos(angle), math.sin(angle)]), np.array([math.sin(angle), -math.cos(angle)])
        near, far = centre - depth, 2 * CROP_SIZE
        corners = [centre + a * across * far + b * outward for a, b in ((-1, near), (1, near), (1, far), (-1, far))]
        cv2.fillConvexPoly(out, np.round(corners).astype(np.int32), fill)


def _erase(out: np.ndarray, recipe: Augmentation, draw: _Draw) -> None:
    wanted, colour = draw.chance(recipe.erase), draw.colour()
    width, height = round(draw.between(0.15, 0.45) * CROP_SIZE), round(draw.between(0.15, 0.45) * CROP_SIZE)
    left, top = int(draw.between(0, CROP_SIZE - width)), int(draw.between(0, CROP_SIZE - height))
    if wanted:
        cv2.rectangle(out, (left, top), (left + width, top + height), colour, thickness=-1)
