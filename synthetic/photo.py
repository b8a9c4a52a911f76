"""What a camera adds to linear light: what stands behind the person, exposure, tone, blur, noise, JPEG.

Runs in NumPy and OpenCV on the host, about 5 ms per photo of 256 px.
"""

from functools import lru_cache

import cv2
import numpy as np

from synthetic.parameters import Photo


def _palette(rng: np.random.Generator, count: int, level: float) -> np.ndarray:
    """Related linear colours [count, 3] of a mean brightness."""
    hue, spread, saturation = rng.uniform(0, 6), rng.uniform(0.2, 2.5), rng.beta(1.2, 3.2)
    hues = (hue + rng.normal(0, spread, count)) % 6
    ramp = np.clip(np.abs((hues[:, None] + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    value = level * np.exp(rng.normal(0, 0.7, (count, 1)))
    return (value * (1 - saturation + saturation * ramp)).astype(np.float32)


def background(photo: Photo, size: int) -> np.ndarray:
    """Linear RGB float32 [size, size, 3]: an invented, mostly defocused place."""
    what = photo.background
    rng = np.random.default_rng(what["seed"])
    side = 96
    colours = _palette(rng, 8, what["level"])
    canvas = np.empty((side, side, 3), np.float32)
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    if rng.random() < 0.5:
        t = ramp[:, None, None]
    else:
        t = ((ramp[:, None] + ramp[None]) / 2)[..., None]
    canvas[:] = colours[0] * (1 - t) + colours[1] * t
    kind = what["kind"]

    def rectangle(colour: np.ndarray, tall: bool) -> None:
        x, y = rng.integers(-10, side, 2)
        w, h = rng.integers(4, 26), rng.integers(12, 80)
        if not tall:
            w, h = h, w
        cv2.rectangle(canvas, (int(x), int(y)), (int(x + w), int(y + h)), tuple(map(float, colour)), -1)

    if kind == "blobs":
        for _ in range(int(rng.integers(5, 40))):
            centre = tuple(map(int, rng.integers(0, side, 2)))
            cv2.circle(canvas, centre, int(rng.integers(2, 16)), tuple(map(float, colours[rng.integers(8)] * 1.3)), -1)
    elif kind == "indoor":
        for _ in range(int(rng.integers(4, 14))):
            rectangle(colours[rng.integers(8)], bool(rng.random() < 0.6))
    elif kind == "stripes":
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(6, 40)
        phase = (np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None]) * side / pitch * 2 * np.pi
        t = (np.sin(phase) * 0.5 + 0.5)[..., None]
        canvas = canvas * (1 - t) + colours[2] * t
    elif kind == "scene":
        horizon = int(rng.uniform(0.3, 0.8) * side)
        canvas[:horizon] = colours[0] * 1.5 * (1 - t[:horizon] if t.shape[0] == side else 1)
        canvas[horizon:] = colours[3] * 0.7
        for _ in range(int(rng.integers(3, 12))):
            rectangle(colours[rng.integers(8)] * 0.8, True)
    if kind in ("noise", "scene", "blobs", "indoor"):
        for cells in (4, 12, 40):
            grain = rng.normal(0, 0.22 if kind == "noise" else 0.08, (cells, cells, 1)).astype(np.float32)
            grain = cv2.resize(grain, (side, side), interpolation=cv2.INTER_CUBIC)
            canvas *= np.exp(grain)[..., None]
    canvas = cv2.GaussianBlur(canvas, (0, 0), float(np.clip(what["blur"], 0.4, 9)))
    return np.clip(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_CUBIC), 0, 2.5)


_GRAIN = 1024


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """White noise [_GRAIN, _GRAIN] of unit deviation; photos take three windows of it each, a tenth of drawing anew."""
    return np.random.default_rng(11).standard_normal((_GRAIN, _GRAIN), dtype=np.float32)


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise [size, size, 3]: windows of the common table at random places (drawn anew where it is too small)."""
    if size > _GRAIN // 2:
        return rng.standard_normal((size, size, 3), dtype=np.float32)
    places = rng.integers(0, _GRAIN - size, (3, 2))
    return cv2.merge([_grain()[y : y + size, x : x + size] for y, x in places])


_STEPS = 4096
_CODES = np.linspace(0, 1, _STEPS)
# IEC 61966-2-1: linear to sRGB.
_SRGB = np.where(_CODES <= 0.0031308, 12.92 * _CODES, 1.055 * _CODES ** (1 / 2.4) - 0.055).astype(np.float32)


def _motion_kernel(length: float, angle: float) -> np.ndarray:
    size = int(length) * 2 + 3
    kernel = np.zeros((size, size), np.float32)
    middle = size // 2
    dx, dy = np.cos(np.radians(angle)) * length / 2, np.sin(np.radians(angle)) * length / 2
    ends = [(round((middle + s * dx) * 16), round((middle + s * dy) * 16)) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, 4)
    return kernel / kernel.sum()


def develop(linear: np.ndarray, exposure: np.ndarray, photo: Photo) -> np.ndarray:
    """Linear RGB [S, S, 3] and exposure factors [3] to sRGB uint8 BGR [S, S, 3]."""
    camera = photo.camera
    size = linear.shape[0]
    rng = np.random.default_rng([photo.seed, 5])
    gain = np.array(camera["balance"], np.float32) * exposure * np.float32(2.0 ** camera["exposure"])
    image = linear * gain
    if camera["downscale"] < 1:
        small = max(64, round(size * camera["downscale"]))
        image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    scale = image.shape[0] / 256
    if camera["blur"] > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), camera["blur"] * max(scale, 0.5))
    if camera["motion"] > 0:
        image = cv2.filter2D(image, -1, _motion_kernel(camera["motion"] * scale, camera["motion_angle"]))
    if camera["vignette"] > 0:
        ramp = np.linspace(-1, 1, image.shape[0], dtype=np.float32)
        image *= (1 - camera["vignette"] * (ramp[:, None] ** 2 + ramp[None] ** 2))[..., None]
    # Photon noise grows with the root of light; read noise does not.
    grain = _noise(rng, image.shape[0])
    image = image + grain * (camera["noise"] * (0.35 + np.sqrt(np.maximum(image, 0))))
    if camera["saturation"] != 1 or camera["grey"]:
        grey = image @ np.array([0.2126, 0.7152, 0.0722], np.float32)
        image = grey[..., None] + (image - grey[..., None]) * (0.0 if camera["grey"] else camera["saturation"])
    # A shoulder instead of clipping: linear below 0.6, approaching 1 above.
    image = np.where(image > 0.6, 1 - 0.4 * np.exp(np.minimum(0.6 - image, 0) / 0.4), image)
    codes = _SRGB.take((np.clip(image, 0, 1) * (_STEPS - 1) + 0.5).astype(np.uint16))  # twice as fast as an index
    codes = (codes - 0.45) * camera["contrast"] + 0.45
    if image.shape[0] != size:
        codes = cv2.resize(codes, (size, size), interpolation=cv2.INTER_CUBIC)
    if camera["sharpen"] > 0:
        codes = codes + camera["sharpen"] * (codes - cv2.GaussianBlur(codes, (0, 0), 1.2))
    return (np.clip(codes, 0, 1) * 255 + 0.5).astype(np.uint8)[..., ::-1]


def encode(bgr: np.ndarray, quality: int) -> bytes:
    """JPEG bytes."""
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
