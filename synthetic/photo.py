"""What a camera adds to linear light: what stands behind the person, exposure, tone, blur, noise, JPEG.

Runs in NumPy and OpenCV on the host, about 3 ms per photo of 256 px.
"""

from functools import lru_cache

import cv2
import numpy as np

from synthetic.parameters import PhotoParameters


def _palette(rng: np.random.Generator, count: int, level: float) -> np.ndarray:
    """Related linear colours [count, 3] of a mean brightness."""
    hue, spread, saturation = rng.uniform(0, 6), rng.uniform(0.2, 2.5), rng.beta(1.2, 3.2)
    hues = (hue + rng.normal(0, spread, count)) % 6
    ramp = np.clip(np.abs((hues[:, None] + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    value = level * np.exp(rng.normal(0, 0.7, (count, 1)))
    return (value * (1 - saturation + saturation * ramp)).astype(np.float32)


def background(photo: PhotoParameters, size: int) -> np.ndarray:
    """Linear RGB float32 [size, size, 3]: an invented, mostly defocused place, in its own light or in that of `light`
    (a factor for each colour).
    """
    what = photo.background
    rng = np.random.default_rng(what["seed"])
    side = 96
    colours = _palette(rng, 8, what["level"])
    canvas: np.ndarray = np.empty((side, side, 3), np.float32)
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    if rng.random() < 0.5:
        t: np.ndarray = ramp[:, None, None]
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
        grain = np.zeros((side, side), np.float32)
        for cells in (4, 12, 40):
            knots = rng.normal(0, 0.22 if kind == "noise" else 0.08, (cells, cells)).astype(np.float32)
            grain += cv2.resize(knots, (side, side), interpolation=cv2.INTER_CUBIC)
        canvas *= cv2.merge([np.exp(grain)] * 3)
    canvas = cv2.GaussianBlur(canvas, (0, 0), float(np.clip(what["blur"], 0.4, 9)))
    canvas = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_CUBIC)
    if "light" in what:
        canvas *= np.array(what["light"], np.float32)
    return np.clip(canvas, 0, 2.5, out=canvas)


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


LUMA = np.array([0.2126, 0.7152, 0.0722])
# sRGB codes of light in steps of 1 / _STEPS, up to the 16 that 16 bits hold.
_STEPS = 4095
_LIGHT = np.arange(1 << 16) / _STEPS
# A shoulder instead of clipping: linear below 0.6, approaching 1 above.
_LIGHT = np.where(_LIGHT > 0.6, 1 - 0.4 * np.exp(np.minimum(0.6 - _LIGHT, 0) / 0.4), _LIGHT)
# IEC 61966-2-1: linear to sRGB.
_SRGB = np.where(_LIGHT <= 0.0031308, 12.92 * _LIGHT, 1.055 * _LIGHT ** (1 / 2.4) - 0.055).astype(np.float32)


def _motion_kernel(length: float, angle: float) -> np.ndarray:
    size = int(length) * 2 + 3
    kernel = np.zeros((size, size), np.float32)
    middle = size // 2
    dx, dy = np.cos(np.radians(angle)) * length / 2, np.sin(np.radians(angle)) * length / 2
    ends = [(round((middle + s * dx) * 16), round((middle + s * dy) * 16)) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, 4)
    return kernel / kernel.sum()


def develop(linear: np.ndarray, exposure: np.ndarray, photo: PhotoParameters) -> np.ndarray:
    """Linear RGB [S, S, 3] and exposure factors [3] to sRGB uint8 BGR [S, S, 3]."""
    camera = photo.camera
    size = linear.shape[0]
    rng = np.random.default_rng([photo.seed, 5])
    gain = np.array(camera["balance"], np.float32) * exposure * np.float32(2.0 ** camera["exposure"])
    image = cv2.transform(linear, np.diag(gain))
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
        image *= cv2.merge([1 - camera["vignette"] * (ramp[:, None] ** 2 + ramp[None] ** 2)] * 3)
    # Photon noise grows with the root of light; read noise does not.
    strength = np.sqrt(np.maximum(image, 0))
    strength += 0.35
    strength *= camera["noise"]
    image += strength * _noise(rng, image.shape[0])
    saturation = 0.0 if camera["grey"] else camera["saturation"]
    mixed = saturation * np.eye(3) + (1 - saturation) * LUMA
    image = cv2.transform(image, mixed[::-1])  # BGR from here on
    # OpenCV rounds and saturates as it converts: a tenth of NumPy's time for scale, clip and cast.
    index = cv2.addWeighted(image, _STEPS, image, 0, 0, dtype=cv2.CV_16U)
    codes = ((_SRGB - 0.45) * camera["contrast"] + 0.45).take(index)
    if image.shape[0] != size:
        codes = cv2.resize(codes, (size, size), interpolation=cv2.INTER_CUBIC)
    sharpen = camera["sharpen"]
    soft = cv2.GaussianBlur(codes, (0, 0), 1.2) if sharpen > 0 else codes
    return cv2.addWeighted(codes, 255 * (1 + sharpen), soft, -255 * sharpen, 0, dtype=cv2.CV_8U)


def encode(bgr: np.ndarray, quality: int) -> bytes:
    """JPEG bytes."""
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
