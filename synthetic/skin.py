"""Skin, brows, lips and stubble, painted per person in the head's own coordinates.

The canvas is a sphere around the head, seen through a map that gives the face's front three times the texels of the
back (0.5 mm in front). A texel knows the canonical surface point behind it, so paint is described in centimetres on an
average face and lands on the same features of every head, in every view and expression. The price of a sphere over an
unwrapped mesh: surfaces that hide behind others (nostrils, behind the ears) share the paint of what hides them.

Colour follows two pigments. Light skin's reflectance is dimmed by melanin with an absorption that saturates
differently per channel (fitted to photographs of light, tan and dark skin: see `reflectance`) and by blood, which
absorbs green and blue. Everything that makes a face personal is laid over that: blotches, freckles, moles, shadow
under the eyes, lip colour, wrinkles (also as relief), beard shadow, scalp hair, brow hairs one by one.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
import warp as wp

from synthetic import kernels
from synthetic.head import SKIN, HeadModel, load_head, mask_image, sample_mask
from synthetic.parameters import Identity

HEIGHT, WIDTH = 704, 896

# Linear RGB of skin with hardly any melanin and little blood.
PALE = np.array([0.83, 0.63, 0.49], np.float32)
# exp(-MELANIN * m ** MELANIN_POWER): through light (0), tan (0.35) and very dark (1) skin.
MELANIN = np.array([2.06, 2.54, 3.10], np.float32)
MELANIN_POWER = np.array([1.69, 1.15, 0.87], np.float32)
# Oxygenated blood absorbs green most (540 nm), then blue, red hardly (Prahl's tables, averaged over sRGB primaries).
BLOOD = np.array([0.10, 0.80, 0.62], np.float32)


def reflectance(melanin: np.ndarray, blood: np.ndarray) -> np.ndarray:
    """Linear RGB [..., 3] of skin; both pigments [...] in about [0, 1.3]."""
    m = np.maximum(melanin, 0)[..., None].astype(np.float32)
    return PALE * np.exp(-MELANIN * m**MELANIN_POWER - BLOOD * np.maximum(blood, 0)[..., None].astype(np.float32))


_TABLE = np.linspace(0, 1.6, 4096, dtype=np.float32)
_BY_MELANIN = np.ascontiguousarray(reflectance(_TABLE, np.zeros_like(_TABLE)).T)
_BY_BLOOD = np.exp(-BLOOD[:, None] * _TABLE)


def _convert(values: np.ndarray, scale: float, offset: float, depth: int) -> np.ndarray:
    """`values * scale + offset`, rounded and held within the range of OpenCV's unsigned `depth`, in one pass."""
    return cv2.addWeighted(values, scale, values, 0, offset, dtype=depth)


def _coloured(melanin: np.ndarray, blood: np.ndarray) -> np.ndarray:
    """`reflectance` by table, channels first (pigments are held within 0 and 1.6, rounded down to 1/2560)."""
    scale = float((len(_TABLE) - 1) / _TABLE[-1])
    first, second = (_convert(pigment, scale, -0.5, cv2.CV_16U).astype(np.intp) for pigment in (melanin, blood))
    return np.stack(
        [
            dark.take(first, mode="clip") * red.take(second, mode="clip")
            for dark, red in zip(_BY_MELANIN, _BY_BLOOD, strict=True)
        ]
    )


@dataclass
class Canvas:
    """The texel grid [H, W]: canonical surface points, direction angles and fixed regions."""

    place: np.ndarray  # [H, W, 3] canonical position in centimetres
    theta: np.ndarray  # [H, W] azimuth in degrees, 0 in front, positive to the person's left
    phi: np.ndarray  # [H, W] elevation in degrees
    lips: np.ndarray  # [H, W] MakeHuman's masks, float32 in [0, 1]
    lids: np.ndarray
    ears: np.ndarray
    masks: np.ndarray  # [H, W, 4] uint8: lips, eye shadow, cheeks, oily zone; what photos recolour
    zones: dict[str, np.ndarray]  # [H, W] soft regions of the face: flush, socket, upper lid, sun, pores, hollows
    face: tuple[slice, slice]  # rows and columns outside of which lips, sockets, lids and hollows are zero
    tiles: np.ndarray  # [3, H, W] float32 noise with zero mean: fine (1 texel), medium (3), coarse (9)

    @staticmethod
    def texel(place: np.ndarray) -> np.ndarray:
        """Texel coordinates [..., 2] (x, y) of canonical positions [..., 3]; mirrors `kernels.canvas_uv`."""
        x, y, z = place[..., 0], place[..., 1] - kernels.CENTRE_Y, place[..., 2] - kernels.CENTRE_Z
        t = np.abs(np.arctan2(x, z)) / np.pi
        u = 0.5 + 0.5 * np.sign(x) * (1.5 * t - 0.5 * t * t)
        v = (kernels.PHI_TOP - np.arctan2(y, np.hypot(x, z))) / kernels.PHI_RANGE
        return np.stack([u * WIDTH - 0.5, v * HEIGHT - 0.5], -1)


def directions() -> tuple[np.ndarray, np.ndarray]:
    """Azimuth and elevation in radians of every texel's centre, [H, W] each."""
    u = 2 * (np.arange(WIDTH) + 0.5) / WIDTH - 1
    theta = np.sign(u) * np.pi * (1.5 - np.sqrt(2.25 - 2 * np.abs(u)))
    phi = kernels.PHI_TOP - (np.arange(HEIGHT) + 0.5) / HEIGHT * kernels.PHI_RANGE
    return np.broadcast_to(theta, (HEIGHT, WIDTH)), np.broadcast_to(phi[:, None], (HEIGHT, WIDTH))


def unit(theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Unit vectors [..., 3] of azimuth and elevation in radians."""
    return np.stack([np.sin(theta) * np.cos(phi), np.sin(phi), np.cos(theta) * np.cos(phi)], -1)


def outermost(vertices: np.ndarray, faces: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Face [N], barycentric weights [N, 3] and distance [N] of the outermost surface along rays from the centre."""
    mesh = wp.Mesh(
        wp.array(vertices, dtype=wp.vec3, device="cpu"), wp.array(faces.reshape(-1), dtype=wp.int32, device="cpu")
    )
    count = len(rays)
    face = wp.empty(count, dtype=wp.int32, device="cpu")
    bary = wp.zeros(count, dtype=wp.vec2, device="cpu")
    radius = wp.empty(count, dtype=float, device="cpu")
    wp.launch(
        kernels.surface_from_outside,
        count,
        [
            mesh.id,
            wp.array(rays.astype(np.float32), dtype=wp.vec3, device="cpu"),
            wp.vec3(0.0, kernels.CENTRE_Y, kernels.CENTRE_Z),
            face,
            bary,
            radius,
        ],
        device="cpu",
    )
    two = bary.numpy()
    return face.numpy(), np.concatenate([two, 1 - two.sum(1, keepdims=True)], 1), radius.numpy()


def _noise(rng: np.random.Generator, cells: float) -> np.ndarray:
    """Smooth noise [H, W] with unit deviation and about `cells` texels between its knots."""
    shape = (int(HEIGHT / cells) + 3, int(WIDTH / cells) + 3)
    return cv2.resize(rng.normal(size=shape).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def _window(*layers: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the smallest window that holds all that is not zero in layers [H, W], and a margin."""
    used = np.any([layer != 0 for layer in layers], axis=0)
    ends = [np.nonzero(used.any(axis))[0][[0, -1]] + (-margin, margin + 1) for axis in (1, 0)]
    rows, columns = (slice(max(0, int(first)), int(last)) for first, last in ends)
    return rows, columns


@lru_cache(maxsize=1)
def load_canvas() -> Canvas:
    """Wrap the canonical head on the canvas (about a second)."""
    head = load_head()
    theta, phi = directions()
    skin = head.faces[head.material == SKIN]
    face, bary, radius = outermost(head.canonical, skin, unit(theta, phi).reshape(-1, 3))
    uv = head.uv[head.material == SKIN]
    place = unit(theta, phi) * np.where(radius > 0, radius, 12.0).reshape(HEIGHT, WIDTH, 1)
    place = (place + np.array([0, kernels.CENTRE_Y, kernels.CENTRE_Z])).astype(np.float32)
    at = np.einsum("nk,nkc->nc", bary, uv[np.maximum(face, 0)])

    def region(name: str) -> np.ndarray:
        values = np.where(face >= 0, sample_mask(mask_image(name), at), 0.0)
        return cv2.GaussianBlur(values.reshape(HEIGHT, WIDTH).astype(np.float32), (0, 0), 1.2)

    lips, lids, ears = region("lips"), region("eyelids"), region("ears")
    x, y, z = np.moveaxis(place, -1, 0)
    side = np.abs(x)
    above_eye = np.exp(-(((side - 3.1) / 1.9) ** 2) - ((y - 0.75) / 0.75) ** 2) * (z > -3)
    cheeks = np.exp(-(((side - 4.6) / 2.0) ** 2) - ((y + 3.2) / 1.7) ** 2)
    oily = np.exp(-((side / 1.6) ** 2) - ((y + 1.5) / 3.0) ** 2) + np.exp(-((side / 3.8) ** 2) - ((y - 5.0) / 2.2) ** 2)
    masks = np.stack([lips, np.clip(above_eye, 0, 1), cheeks, np.clip(oily, 0, 1)], -1)
    front = z > -3
    zones = {
        "flush": 0.8 * np.exp(-(((side - 4.2) / 2.2) ** 2) - ((y + 3.3) / 2.0) ** 2)
        + 0.7 * np.exp(-((side / 1.5) ** 2) - ((y + 3.3) / 1.4) ** 2)
        + 0.6 * ears,
        "socket": np.exp(-(((side - 2.7) / 1.7) ** 2) - ((y + 1.2) / 0.75) ** 2) * front,
        "upper": np.exp(-(((side - 2.9) / 1.8) ** 2) - ((y - 0.5) / 0.9) ** 2) * front,
        # Dark skin's upper lip is nearly as dark as the skin around it, the lower one lighter.
        "lip_melanin": np.where(y > -6.72, 0.92, 0.78),
        "sun": np.clip((y - 1) / 8, -0.6, 0.8) + 0.5 * np.exp(-((side / 2) ** 2) - ((y + 2) / 2) ** 2),
        "pores": 0.5 + 0.5 * np.exp(-((side / 4) ** 2)),
        # Where little light gets in and vertices are too few to say so: between the lips, their corners, the nostrils.
        "hollows": 0.75 * np.exp(-(((y + 6.72) / 0.11) ** 2) - (side / 2.25) ** 8) * front
        + 0.55 * np.exp(-(((side - 2.3) / 0.22) ** 2) - ((y + 6.74) / 0.18) ** 2) * front
        + 0.6 * np.exp(-(((side - 0.64) / 0.34) ** 2) - ((y + 4.42) / 0.2) ** 2) * front,
    }
    # Exact zeros in place of the bells' tails: denormal numbers are a hundred times as slow to multiply.
    zones = {name: np.where(np.abs(zone) < 1e-4, 0, zone).astype(np.float32) for name, zone in zones.items()}
    rng = np.random.default_rng(7)
    fine = rng.normal(size=(HEIGHT, WIDTH)).astype(np.float32)
    tiles = np.stack([cv2.GaussianBlur(fine, (0, 0), 0.7) * 2.4, _noise(rng, 3), _noise(rng, 9)])
    return Canvas(
        place=place,
        theta=np.degrees(theta).astype(np.float32),
        phi=np.degrees(phi).astype(np.float32),
        lips=lips,
        lids=lids,
        ears=ears,
        masks=np.ascontiguousarray((masks * 255).astype(np.uint8)),
        zones=zones,
        face=_window(lips, *(zones[name] for name in ("socket", "upper", "hollows"))),
        tiles=tiles,
    )


# The edge of scalp hair: elevation in degrees at azimuths 0 (forehead) ... 180 (nape), for an average head.
HAIRLINE_THETA = np.array([0, 20, 38, 52, 62, 72, 84, 100, 115, 130, 150, 180], np.float32)
HAIRLINE_PHI = np.array([47, 47, 45, 38, 24, 8, 6, 10, -4, -22, -33, -36], np.float32)


def scalp(identity: Identity, theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """How far inside the hair-covered scalp a direction lies, in degrees (negative: outside); angles in degrees."""
    hair = identity.hair
    azimuth = np.abs(theta)
    edge = np.interp(azimuth, HAIRLINE_THETA, HAIRLINE_PHI)
    front = np.clip(1 - azimuth / 75, 0, 1)
    edge = edge + front * (2.2 * hair["hairline"])
    edge = edge + 22 * hair["recession"] * np.exp(-(((azimuth - 34) / 14) ** 2))
    edge = edge - 3.5 * hair["peak"] * np.exp(-((azimuth / 9) ** 2))
    inside = phi - edge
    if hair["style"] == "horseshoe":
        top = np.interp(azimuth, [0, 60, 80, 120, 180], [40, 40, 30, 28, 26])
        inside = np.minimum(inside, (top + 6 * hair["recession"]) - phi)
        inside = np.where(azimuth < 62, -10, inside)
    return inside.astype(np.float32)


# Trimmed hair is finer than a pixel: it is painted. Full beards get ribbons as well.
PAINTED_BEARDS = ("none", "stubble", "moustache", "goatee", "circle", "short_boxed", "sideburns")


def beard_region(style: str, place: np.ndarray, lips: np.ndarray | None = None) -> np.ndarray:
    """Density [..] in [0, 1] of a beard style at canonical positions [..., 3]."""
    x, y, z = np.abs(place[..., 0]), place[..., 1], place[..., 2]

    def inside(value: np.ndarray, soft: float = 0.5) -> np.ndarray:
        return np.clip(value / soft + 0.5, 0, 1)

    chin = inside(-7.9 - y - 0.0 * x) * inside(3.0 - x, 0.8) * inside(y + 14.0, 1.0)
    under_lip = inside(0.9 - x, 0.4) * inside(-7.7 - y, 0.3) * inside(y + 9.0, 0.5)
    moustache = inside(y + 6.2, 0.35) * inside(-5.1 - y - 0.12 * x, 0.35) * inside(1.9 - x, 1.1)
    drooping = np.maximum(moustache, inside(x - 2.25, 0.3) * inside(3.1 - x, 0.4) * inside(-5.6 - y) * inside(y + 8.5))
    jaw_line = -3.4 - 0.9 * np.clip(7.2 - x, 0, 5.5)
    jaw = inside(jaw_line - y, 1.2) * inside(x - 2.3, 0.8) * inside(y + 14.5, 1.5) * inside(z + 7.5, 1.0)
    sideburn = inside(x - 6.2, 0.5) * inside(z + 6.5, 0.8) * inside(-1.0 - z, 1.0) * inside(0.5 - y) * inside(y + 6.5)
    # Beards are trimmed where they would hang over the mouth's corners.
    corner = np.clip(np.hypot((x - 2.4) / 0.75, (y + 6.8) / 0.6) - 0.5, 0, 1)
    parts = {
        "moustache": moustache,
        "goatee": np.maximum(chin * inside(2.2 - x, 0.6), under_lip),
        "circle": np.maximum.reduce([drooping, chin * inside(2.9 - x, 0.6), under_lip]),
        "short_boxed": np.maximum.reduce([moustache, chin, under_lip, jaw, sideburn]),
        "full": np.maximum.reduce([drooping, chin, under_lip, jaw, sideburn]),
        "stubble": np.maximum.reduce([moustache, chin, under_lip, jaw, sideburn]),
        "sideburns": np.maximum(sideburn, jaw * inside(x - 4.8, 0.8)),
        "none": np.zeros_like(x),
    }
    density = parts[style] * (z > -9) * corner
    return density if lips is None else density * (1 - np.clip(lips * 2, 0, 1))


@cache
def _beard_window() -> tuple[slice, slice]:
    canvas = load_canvas()
    return _window(beard_region("full", canvas.place, canvas.lips), margin=8)  # holds the other styles; blurred by 2


@cache
def _beard_on_canvas(style: str) -> np.ndarray:
    """Density of a beard style in `_beard_window`."""
    canvas, window = load_canvas(), _beard_window()
    return beard_region(style, canvas.place[window], canvas.lips[window]).astype(np.float32)


def _curve(layer: np.ndarray, points: np.ndarray, width: float, value: float) -> None:
    """Draw a polyline through canonical positions [N, 3] onto a float32 layer, antialiased by supersampled shift."""
    texels = (Canvas.texel(points) * 16).round().astype(np.int32)
    cv2.polylines(layer, [texels.reshape(-1, 1, 2)], False, float(value), max(1, round(width)), cv2.LINE_AA, 4)


def _surface(canvas: Canvas, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Canonical positions [N, 3] on the front of the face at given x and y (z by looking it up on the canvas)."""
    guess = np.stack([x, y, np.full_like(x, 3.0)], -1)
    for _ in range(4):
        texel = Canvas.texel(guess)
        column = np.clip(texel[:, 0].round().astype(int), 0, WIDTH - 1)
        row = np.clip(texel[:, 1].round().astype(int), 0, HEIGHT - 1)
        guess[:, 2] = canvas.place[row, column, 2]
    return guess


def _wrinkles(identity: Identity, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Relief [H, W] in [-1, 0]: furrows of forehead, eyes, nose-to-mouth folds, glabella, mouth corners."""
    layer = np.zeros((HEIGHT, WIDTH), np.float32)
    age = identity.wrinkles

    furrows: list[tuple[float, float, np.ndarray, np.ndarray]] = []

    def furrow(x: np.ndarray, y: np.ndarray, width: float, depth: float) -> None:
        furrows.append((depth, width, x, y))

    steps = np.linspace(0, 1, 12)
    count = int(rng.integers(2, 6))
    for i in range(count):
        y = 3.4 + 0.75 * i + rng.normal(0, 0.15)
        half = rng.uniform(2.2, 4.8)
        x = (steps * 2 - 1) * half + rng.normal(0, 0.5)
        wave = 0.18 * np.sin(steps * rng.uniform(5, 9) + rng.uniform(0, 6)) + 0.12 * rng.normal()
        furrow(x, y + wave - 0.25 * (x / 4) ** 2, 2, age * rng.uniform(0.2, 0.9))
    deep = rng.uniform(0.3, 1.0)
    for side in (-1, 1):
        for i in range(int(rng.integers(2, 5))):
            tilt = -0.9 + 0.55 * i + rng.normal(0, 0.12)
            x0, length = 4.75 + rng.normal(0, 0.12), rng.uniform(0.8, 2.0)
            furrow(side * (x0 + steps * length), -0.25 + tilt * (0.25 + steps * length * 0.55), 1, age * 0.8 * deep)
        bend = rng.normal(0.35, 0.15)
        fold = (0.25 + age) * rng.uniform(0.5, 1.0)
        x = 1.75 + steps * 1.15 + bend * np.sin(steps * np.pi)
        furrow(side * x, -3.7 - steps * 3.1, 2, fold * 0.75)
        if rng.random() < age:
            furrow(side * (2.75 + 0.2 * steps), -7.2 - steps * 1.6, 2, age * rng.uniform(0.2, 0.7))
        bag = rng.uniform(0.25, 0.9) * (0.2 + age)
        furrow(side * (1.5 + steps * 2.6), -1.15 - 0.75 * np.sin(steps * np.pi) - 0.1 * steps, 2, bag * 0.6)
        if rng.random() < 0.6:
            furrow(side * (0.45 + 0.15 * steps), 1.6 + steps * 1.5, 1, age * rng.uniform(0.2, 0.9))
    furrow(np.linspace(-1.3, 1.3, 12), -8.75 + 0.1 * np.cos(np.linspace(-1.5, 1.5, 12)), 2, rng.uniform(0.05, 0.35))
    furrows.sort(key=lambda furrow: furrow[0])  # the deepest is drawn over the others
    depths, widths, x, y = zip(*furrows, strict=True)
    lines = _surface(canvas, np.concatenate(x), np.concatenate(y)).reshape(len(furrows), -1, 3)
    for points, width, depth in zip(lines, widths, depths, strict=True):
        _curve(layer, points, width, depth)
    return -cv2.GaussianBlur(layer, (0, 0), 1.1 + 0.6 * age)


def _brow_box() -> np.ndarray:
    """Texels (left, top), (right, bottom) [2, 2] of the part of the canvas that brows may cover."""
    return Canvas.texel(np.array([[-7.5, 5.5, 0.0], [7.5, -1.5, 0.0]])).astype(int)


def _brows(identity: Identity, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Opacity of the brows, hair by hair, over `_brow_box`."""
    brow = identity.brow
    scale = 2  # strokes thinner than a texel: draw at twice the size
    (left, top), (right, bottom) = _brow_box()
    layer = np.zeros(((bottom - top) * scale, (right - left) * scale), np.float32)
    count = int(190 * brow["density"] * (0.6 + 0.4 * brow["thickness"]))
    for side in (-1, 1):
        along = np.sort(rng.beta(1.1, 1.15, count))
        profile = np.sin(np.pi * np.clip(along * 0.9 + 0.12, 0, 1)) ** 0.6 * (1 - 0.55 * along)
        across = rng.normal(0, 0.5, count).clip(-1, 1) * 0.42 * brow["thickness"] * profile
        x = 1.15 - 0.25 * brow["gap"] + along * 4.1 * brow["length"]
        ridge = 1.75 + brow["height"] + 0.75 * brow["arch"] * np.sin(np.pi * np.clip(along * 0.78, 0, 1)) ** 1.5
        y = ridge - 0.9 * along**2 + 0.4 * brow["tilt"] * (along - 0.4) + across
        # Hairs rise at the inner end and lie outwards at the tail; the lower ones rise more.
        angle = np.radians(75 - 85 * along**0.6 - 20 * (across > 0)) + rng.normal(0, 0.2, count)
        length = rng.uniform(0.35, 0.75, count) * (0.7 + 0.3 * brow["thickness"])
        start = Canvas.texel(_surface(canvas, side * x, y))
        end = Canvas.texel(_surface(canvas, side * (x + np.cos(angle) * length), y + np.sin(angle) * length))
        strength = rng.uniform(0.45, 1.0, count)
        lines = ((np.stack([start, end], 1) + 0.5 - [left, top]) * scale * 16).round().astype(np.int32)
        for line, value in zip(lines, strength, strict=True):
            cv2.line(layer, tuple(map(int, line[0])), tuple(map(int, line[1])), float(value), 1, cv2.LINE_AA, 4)
    small = cv2.resize(layer, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return np.clip(small * 1.5 + cv2.GaussianBlur(small, (0, 0), 2.5) * 0.55, 0, 1)


def _spots(centres: np.ndarray, sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Soft discs at canonical positions [N, 3] with radii in texels and strengths, as one layer [H, W]."""
    layer = np.zeros((HEIGHT, WIDTH), np.float32)
    for (x, y), size, value in zip((Canvas.texel(centres) * 16).round().astype(int), sizes, values, strict=True):
        cv2.circle(layer, (int(x), int(y)), max(1, int(size * 16)), float(value), -1, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(layer, (0, 0), 0.7)


def paint(identity: Identity, off: frozenset[str] = frozenset()) -> np.ndarray:
    """The person's texture, uint8 [H, W, 4]: square root of linear RGB reflectance, and relief around 128.

    With "texture" in `off` everybody gets the same even skin and brows (shape alone tells them apart).
    """
    canvas = load_canvas()
    rng = np.random.default_rng([identity.seed, identity.number, 1 << 20])
    if "texture" in off:
        x, y, z = np.moveaxis(canvas.place, -1, 0)
        side = np.abs(x)
        melanin, blood = np.full((HEIGHT, WIDTH), 0.2, np.float32), np.full((HEIGHT, WIDTH), 0.3, np.float32)
        colour = _coloured(melanin, blood + 0.5 * canvas.lips)
        brow = np.exp(-(((side - 3.1) / 1.9) ** 4) - ((y - 2.0) / 0.35) ** 2) * 0.7 * (z > -3)
        return _encode(colour * (1 - brow) + 0.03 * brow, np.zeros((HEIGHT, WIDTH), np.float32))

    fine, medium, coarse = (np.roll(tile, tuple(rng.integers(0, (HEIGHT, WIDTH))), (0, 1)) for tile in canvas.tiles)
    # Below the chin the sphere sees skin at a grazing angle: noise would be stretched to streaks.
    level = np.clip((canvas.phi[:, :1] + 58) / 20, 0.05, 1)
    fine, medium, coarse = fine * level, medium * level, coarse * level
    blotch = identity.blotches * level
    zones, face = canvas.zones, canvas.face
    melanin = cv2.addWeighted(coarse, 0.025, medium, 0.015, 1)
    melanin += blotch * 0.07 * _noise(rng, 30)
    melanin *= identity.melanin
    melanin += zones["sun"] * (0.04 * identity.tan * (0.3 + identity.melanin))
    blood = cv2.addWeighted(coarse, 0.02, fine, 0.02, 0.12 + 0.30 * identity.haemoglobin)
    blood += blotch * 0.10 * _noise(rng, 26)
    blood += zones["flush"] * (rng.uniform(0.05, 0.38) * (0.4 + identity.haemoglobin))
    # Views: what is done in place to them is done to the canvas.
    face_melanin, face_blood = melanin[face], blood[face]
    socket, upper, lips = zones["socket"][face], zones["upper"][face], canvas.lips[face]
    face_melanin += (socket * 0.55 + upper * 0.35) * (identity.under_eye * (0.10 + 0.22 * identity.melanin))
    face_blood += (socket + 0.7 * upper) * (identity.under_eye * 0.22)
    lip_melanin = identity.melanin * (zones["lip_melanin"][face] + 0.10 * identity.lip_colour) + 0.02
    face_melanin += lips * (lip_melanin + 0.02 * medium[face] - face_melanin)
    lip_blood = cv2.addWeighted(coarse[face], 0.05, fine[face], 0.04, 0.70 + 0.14 * identity.lip_colour)
    face_blood += lips * (lip_blood - face_blood)
    if identity.freckles > 0.12:
        count = int(420 * identity.freckles)
        fx = np.concatenate([rng.normal(0, 3.4, count)])
        fy = rng.normal(-2.2, 1.9, count)
        spots = _spots(_surface(canvas, fx, fy), rng.uniform(0.4, 1.5, count), rng.uniform(0.2, 1, count))
        melanin += 0.20 * spots * (1 - canvas.lips)
    mole_x, mole_y = rng.normal(0, 4.0, identity.moles), rng.normal(-4, 4.5, identity.moles)
    mole_size = np.exp(rng.normal(0.35, 0.45, identity.moles))
    moles = _spots(_surface(canvas, mole_x, mole_y), mole_size, rng.uniform(0.4, 1.0, identity.moles))
    melanin += 0.45 * moles
    if identity.wrinkles > 0.45:
        age_spots = np.clip(coarse + (0.8 * identity.wrinkles - 2.1), 0, 1)
        melanin += age_spots * (0.25 * (identity.wrinkles - 0.45))
    relief = _wrinkles(identity, canvas, rng)
    blood -= 0.10 * relief
    melanin -= relief * (0.03 * (0.3 + identity.melanin))
    if identity.marks:  # one scar or birthmark
        start = np.array([rng.uniform(-4, 4), rng.uniform(-8, 5)])
        line = start + np.linspace(0, 1, 6)[:, None] * rng.normal(0, 1.0, 2)
        scar = np.zeros_like(relief)
        _curve(scar, _surface(canvas, line[:, 0], line[:, 1]), 2, 1.0)
        relief += 0.4 * cv2.GaussianBlur(scar, (0, 0), 0.8)
        melanin -= 0.1 * identity.melanin * scar
        blood += 0.12 * scar
    face_melanin += 1.1 * zones["hollows"][face]
    face_blood += 0.4 * zones["hollows"][face]
    colour = _coloured(melanin, blood)

    hair = identity.hair
    root = np.array(hair["root"], np.float32) * (1 - hair["grey"]) + 0.35 * hair["grey"]
    inside = scalp(identity, canvas.theta[:1], canvas.phi[:, :1]) + cv2.addWeighted(medium, 1.6, coarse, 1.2, 0)
    cover = np.clip(inside / 4.0, 0, 1) * (1 - canvas.ears)
    bare = {"bald": 0.0, "buzz": 0.78}.get(hair["style"], 0.98)
    if hair["style"] == "bald" and "hair" not in off:
        bare = 0.30 * identity.beard["shadow"]
    cropped = hair["style"] in ("bald", "buzz")
    strand = np.clip(0.9 + 0.16 * fine, 0.2, 1) if cropped else np.clip(0.97 + 0.05 * fine, 0.7, 1)
    _cover(colour, np.minimum(root, 0.25), cover * bare * strand)

    beard = identity.beard
    if beard["shadow"] > 0 or beard["style"] != "none":
        tint = np.minimum(np.array(beard["colour"], np.float32), 0.12)
        tint = tint * (1 - beard["grey"]) + 0.22 * beard["grey"]
        shadow = _beard_on_canvas("stubble") * np.float32(beard["shadow"] * 0.30)
        opaque = {"none": 0.0, "stubble": 0.42, "full": 0.6, "moustache": 1.0}.get(beard["style"], 0.8)
        cut = opaque * beard["density"]
        shadow = np.maximum(shadow, _beard_on_canvas(beard["style"]) * np.float32(cut))
        window = _beard_window()
        hairs = np.clip(cv2.addWeighted(fine[window], 0.55, medium[window], 0.2, 0.62), 0, 1.3)
        opacity = np.clip(cv2.GaussianBlur(shadow, (0, 0), 2) * hairs, 0, 0.92)
        _cover(colour[:, *window], tint, opacity)

    brow_colour = np.minimum(np.array(hair["root"], np.float32), 0.16) * identity.brow["darkness"] * 0.8
    brow_colour = brow_colour * (1 - 0.7 * hair["grey"]) + 0.25 * 0.7 * hair["grey"]
    (left, top), (right, bottom) = _brow_box()
    _cover(colour[:, top:bottom, left:right], brow_colour, _brows(identity, canvas, rng) * 0.9)

    pores = cv2.addWeighted(fine, 0.05, medium, 0.015, 0)
    pores *= zones["pores"]
    relief = cv2.addWeighted(relief, 1.1, pores, 1, 0)
    relief[face] += lips * 0.08 * medium[face]
    return _encode(colour, relief)


def _cover(colour: np.ndarray, by: np.ndarray, opacity: np.ndarray) -> None:
    """Lay a colour [3] over colours [3, h, w] in place, by its opacity [h, w] in [0, 1]."""
    for channel, value in zip(colour, by, strict=True):
        channel += (np.float32(value) - channel) * opacity


def _encode(colour: np.ndarray, relief: np.ndarray) -> np.ndarray:
    """The texture [H, W, 4] of colours [3, H, W] and relief [H, W]."""
    channels = [_convert(np.sqrt(channel), 255, 0, cv2.CV_8U) for channel in colour]
    return cv2.merge([*channels, _convert(relief, 100, 149.5, cv2.CV_8U)])


def skin_tone(identity: Identity) -> tuple[float, float, float]:
    """Average reflectance, for hands."""
    tone = reflectance(np.array(identity.melanin), np.array(0.22 + 0.3 * identity.haemoglobin))
    red, green, blue = (float(c) for c in tone)
    return red, green, blue


def average_surface(head: HeadModel, vertices: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance [N] of a person's outermost skin from the canvas's centre along unit rays [N, 3]."""
    return outermost(vertices, head.faces[head.material == SKIN], rays)[2]
