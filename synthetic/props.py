"""What is worn or held in front of a face: glasses, hats, scarves, hands, phones. Small meshes, made anew per photo.

Everything is placed on the person's own head (eye distance, brow, radius field), in the head's frame.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from synthetic import skin
from synthetic.hair import CENTRE, RadiusField
from synthetic.head import CENTIMETRES, data_folder, read_obj
from synthetic.parameters import PhotoParameters

PLAIN, KNITTED, WOVEN, PRINTED = 0.0, 1.0, 2.0, 3.0


@dataclass
class Piece:
    """A mesh with a colour per vertex; `info` [N, 3] is (pattern, gloss, is it skin)."""

    points: np.ndarray
    faces: np.ndarray
    colours: np.ndarray
    info: np.ndarray


def piece(points: np.ndarray, faces: np.ndarray, colour: Any, pattern: float = PLAIN, gloss: float = 0.0,
          skin_like: bool = False) -> Piece:  # fmt: skip
    """A one-coloured (or per-vertex coloured) mesh."""
    count = len(points)
    colours = np.broadcast_to(np.asarray(colour, np.float32), (count, 3))
    info = np.broadcast_to(np.array([pattern, gloss, float(skin_like)], np.float32), (count, 3))
    return Piece(np.asarray(points, np.float32), np.asarray(faces, np.int32).reshape(-1, 3), colours, info)


def join(pieces: list[Piece]) -> Piece:
    """One mesh of several."""
    starts = np.cumsum([0] + [len(part.points) for part in pieces[:-1]])
    faces = np.concatenate([part.faces + start for part, start in zip(pieces, starts, strict=True)])
    return Piece(
        np.concatenate([part.points for part in pieces]),
        faces.astype(np.int32),
        np.concatenate([part.colours for part in pieces]),
        np.concatenate([part.info for part in pieces]),
    )


def _grid_faces(rows: int, columns: int, wrap: bool) -> np.ndarray:
    """Triangles of a [rows, columns] vertex grid; `wrap` closes the columns into a ring."""
    index = np.arange(rows * columns).reshape(rows, columns)
    right = np.roll(index, -1, 1) if wrap else index
    if not wrap:
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    else:
        a, b, c, d = index[:-1], right[:-1], index[1:], right[1:]
    return np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])


def tube(
    path: np.ndarray, radius: float | np.ndarray, closed: bool = False, sides: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of a tube around a polyline [K, 3]."""
    path = np.asarray(path, np.float64)
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    ahead /= np.maximum(np.linalg.norm(ahead, axis=1, keepdims=True), 1e-9)
    helper = np.where(np.abs(ahead[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]])
    a = np.cross(ahead, helper)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b = np.cross(ahead, a)
    turn = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    ring = a[:, None] * np.cos(turn)[None, :, None] + b[:, None] * np.sin(turn)[None, :, None]
    points = path[:, None] + ring * np.reshape(radius, (-1, 1, 1))
    if closed:
        points = np.concatenate([points, points[:1]])
    return points.reshape(-1, 3), _grid_faces(len(points), sides, wrap=True)


def _outline(shape: str, size: float) -> np.ndarray:
    """Outline [32, 2] of a spectacle lens around its centre, nose on the negative x side, in centimetres."""
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    half_width, half_height, power = {
        "round": (2.35, 2.3, 1.0),
        "oval": (2.6, 1.8, 1.0),
        "square": (2.55, 1.85, 0.5),
        "wide": (2.75, 1.65, 0.6),
        "aviator": (2.8, 2.4, 0.8),
    }[shape]
    c, s = np.cos(turn), np.sin(turn)
    x = np.sign(c) * np.abs(c) ** power * half_width
    y = np.sign(s) * np.abs(s) ** power * half_height
    if shape == "aviator":
        x, y = x - 0.35 * (y < 0) * y / half_height, y - 0.15
    return np.stack([x, y], -1) * size


def glasses(photo: PhotoParameters, vertices: np.ndarray, eyes: np.ndarray) -> tuple[Piece, np.ndarray, np.ndarray]:
    """Frame, and the lenses' points and triangles; `eyes` [2, 3] are the eyes' centres (right, left)."""
    what = photo.glasses
    assert what is not None
    x, y, z = vertices.T
    brow = (np.abs(y - 0.3) < 2.0) & (np.abs(x) < 5.0) & (np.abs(x) > 1.0)
    bridge = (np.abs(y + 0.3) < 0.5) & (np.abs(x) < 0.4)
    front = max(np.quantile(z[brow], 0.97) - 0.35, z[bridge].max() + 0.05 if bridge.any() else 2.0) + 0.35
    drop = -0.35 + what["drop"]
    half = max(abs(eyes[0, 0]), abs(eyes[1, 0]), 2.6) + 0.3
    parts, lens_faces = [], []
    lens_points: list[np.ndarray] = []
    outline = _outline(what["shape"], what["size"])

    def bend(points: np.ndarray) -> np.ndarray:
        return np.stack([points[:, 0], points[:, 1] + drop, front - 0.022 * points[:, 0] ** 2], -1)

    colour, gloss = what["colour"], what["gloss"]
    for side in (-1, 1):
        ring = bend(outline * [side, 1] + [side * half, 0.0])
        parts.append(piece(*tube(ring, what["rim"], closed=True), colour, gloss=gloss))
        start = sum(len(points) for points in lens_points)
        lens_points.append(np.concatenate([ring, ring.mean(0, keepdims=True)]))
        count = len(ring)
        fan = np.stack([np.arange(count), (np.arange(count) + 1) % count, np.full(count, count)], -1)
        lens_faces.append(fan + start)
        hinge = bend(np.array([[side * (half + outline[:, 0].max()), 0.5]]))[0]
        # Along the temples to the ears, which begin at z -6.
        temple, ear = (np.median(np.abs(x[(np.abs(y) < 1.5) & (np.abs(z - at) < 0.8)])) + 0.15 for at in (-3.0, -5.5))
        arm = np.stack([hinge, [side * max(temple, abs(hinge[0])), 0.45, -3.0], [side * max(ear, temple), 0.3, -7.0]])
        parts.append(piece(*tube(arm, what["rim"] * 0.9), colour, gloss=gloss))
    inner = half - outline[:, 0].max()
    span = np.linspace(-inner, inner, 5)
    arch = bend(np.stack([span, 0.45 + 0.15 * np.cos(span)], -1))
    parts.append(piece(*tube(arch, what["rim"] * 0.9), colour, gloss=gloss))
    return join(parts), np.concatenate(lens_points).astype(np.float32), np.concatenate(lens_faces).astype(np.int32)


HAT_EDGE_THETA = np.array([0, 50, 90, 130, 180], np.float32)
HAT_EDGE_PHI = {
    "beanie": np.array([40, 36, 16, 2, -8], np.float32),
    "cap": np.array([44, 40, 28, 14, 6], np.float32),
    "brim": np.array([42, 40, 30, 20, 14], np.float32),
    "band": np.array([46, 46, 46, 46, 46], np.float32),
}


def hat_edge(photo: PhotoParameters, azimuth: np.ndarray) -> np.ndarray:
    """Elevation in degrees of a hat's lower edge at azimuths in degrees."""
    hat = photo.hat
    assert hat is not None
    return np.interp(np.abs(azimuth), HAT_EDGE_THETA, HAT_EDGE_PHI[hat["kind"]]) + 10 * hat["height"] - 4


def hat_piece(photo: PhotoParameters, field: RadiusField) -> Piece:
    """A hat that rests on the head."""
    hat = photo.hat
    assert hat is not None
    kind = hat["kind"]
    columns, rows = 48, 12
    azimuth = np.linspace(-180, 180, columns, endpoint=False)
    low = hat_edge(photo, azimuth)
    t = np.linspace(0, 1, rows)[:, None]
    high = np.minimum(low + 14, 75) if kind == "band" else np.full_like(low, 89.0)
    elevation = low[None] * (1 - t) + high[None] * t
    direction = skin.unit(np.radians(np.broadcast_to(azimuth, elevation.shape)), np.radians(elevation)).reshape(-1, 3)
    radius = field(direction).reshape(rows, columns)
    # Cloth spans dents of the skull: at least the average of its ring.
    radius = np.maximum(radius, radius.mean(1, keepdims=True) * 0.96)
    roomy = {"beanie": 1.0, "cap": 1.0, "brim": 1.1, "band": 0.6}[kind]
    crown = {"beanie": 1.6 * hat["height"], "cap": 0.6, "brim": 2.5, "band": 0.0}[kind]
    radius = radius + roomy + crown * t**0.6
    points = (CENTRE + direction.reshape(rows, columns, 3) * radius[..., None]).reshape(-1, 3)
    pattern = {"beanie": KNITTED, "cap": WOVEN, "brim": WOVEN, "band": PRINTED}[kind]
    colours = np.broadcast_to(np.array(hat["colour"], np.float32), (rows, columns, 3)).copy()
    if kind in ("beanie", "brim"):
        colours[: 3 if kind == "beanie" else 2] = hat["second"]
    info = np.tile(np.array([[pattern, 0.05, 0.0]], np.float32), (rows * columns, 1))
    faces = _grid_faces(rows, columns, wrap=True).astype(np.int32)
    parts = [Piece(points.astype(np.float32), faces, colours.reshape(-1, 3), info)]
    edge = points.reshape(rows, columns, 3)[0]
    if kind == "cap":
        sector = np.abs((azimuth - hat["turn"] * 0.3 + 180) % 360 - 180) < 62
        rim = edge[sector]
        bend = np.cos(np.radians(azimuth[sector]) * 1.3)[:, None]
        shade = np.stack([rim + bend * s * np.array([0.0, -0.9, 6.2]) + [0, 0.1, 0] for s in np.linspace(0, 1, 5)])
        parts.append(piece(shade.reshape(-1, 3), _grid_faces(5, len(rim), wrap=False), hat["second"], WOVEN))
    if kind == "brim":
        outward = edge - CENTRE
        outward[:, 1] = 0
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        wave = 0.8 * np.cos(np.radians(azimuth) * 2)[:, None] * np.array([[0, 1.0, 0]])
        ring = np.stack([edge + (outward * 6.0 - wave - [0, 0.7, 0]) * s for s in np.linspace(0, 1, 5)])
        parts.append(piece(ring.reshape(-1, 3), _grid_faces(5, columns, wrap=True), hat["colour"], WOVEN))
    return join(parts)


def scarf_piece(photo: PhotoParameters, field: RadiusField, rng: np.random.Generator) -> Piece:
    """A scarf wound around the neck; drawn up further than it hangs, it goes around chin and mouth."""
    scarf = photo.scarf
    assert scarf is not None
    turn = np.linspace(0, 4 * np.pi, 72)
    bulge = scarf["size"] * (2.0 + 0.35 * np.sin(turn * 3.1 + rng.uniform(0, 6)) + 0.2 * rng.normal(size=72))
    path = np.stack(
        [
            np.sin(turn) * (7.6 + 0.5 * np.sin(turn * 0.5)),
            -17.0 + scarf["rise"] + 1.0 * np.sin(turn * 0.5) - 1.2 * np.cos(turn),
            -7.5 + np.cos(turn) * 7.4,
        ],
        -1,
    )
    if scarf["rise"] > 0:
        arm = path - CENTRE
        reach = np.linalg.norm(arm, axis=1)
        out = np.maximum(field(arm / reach[:, None]) + 0.5 * bulge - reach, 0)
        # In front alone: at the sides there are shoulders in these directions.
        out *= np.clip((arm[:, 2] / np.hypot(arm[:, 0], arm[:, 2]) - 0.4) / 0.3, 0, 1)
        path = CENTRE + arm * (1 + out / reach)[:, None]
    points, faces = tube(path, bulge, sides=10)
    return piece(points, faces, scarf["colour"], KNITTED)


@lru_cache(maxsize=1)
def _hand() -> tuple[np.ndarray, np.ndarray]:
    """MakeHuman's right hand, fingers towards +y, their tips at y 0, palm towards -z, with the forearm, in cm."""
    vertices, _, quads, _, groups = read_obj(data_folder() / "mpfb2" / "3dobjs" / "base.obj")
    body = quads[groups == "body"]
    arm = body[(vertices[body][:, :, 0] > 3.55).all(1)]
    kept, index = np.unique(arm, return_inverse=True)
    index = index.reshape(-1, 4)
    points = vertices[kept] * CENTIMETRES
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    axes[0] *= np.sign((points[points[:, 0].argmax()] - points.mean(0)) @ axes[0])  # towards the finger tips
    axes[2] = np.cross(axes[1], axes[0])
    points = centred @ np.stack([axes[1], axes[0], axes[2]]).T
    points[:, 1] -= points[:, 1].max()
    faces = np.concatenate([index[:, [0, 1, 2]], index[:, [0, 2, 3]]])
    return points.astype(np.float32), faces.astype(np.int32)


def _box(size: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float) * np.array(size) / 2
    sides = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([[a, b, c] for a, b, c, _ in sides] + [[a, c, d] for a, _, c, d in sides])
    return corners[faces].reshape(-1, 3), np.arange(36).reshape(-1, 3)  # split corners keep the edges sharp


def mask_piece(photo: PhotoParameters, field: RadiusField) -> Piece:
    """A medical mask: cloth from the bridge of the nose to below the chin and halfway to the ears, and its loops."""
    what = photo.occluder
    assert what is not None
    columns, rows = 25, 17
    azimuth = np.linspace(-72, 72, columns)
    side = np.abs(azimuth) / 72
    top, bottom = 15 - 20 * side**1.5, -52 + 16 * side**2
    t = np.linspace(0, 1, rows)[:, None]
    elevation = bottom[None] * (1 - t) + top[None] * t
    direction = skin.unit(np.radians(np.broadcast_to(azimuth, elevation.shape)), np.radians(elevation)).reshape(-1, 3)
    radius: np.ndarray = field(direction).reshape(rows, columns).astype(np.float32)
    # Cloth spans the hollows beside nose and mouth.
    radius = np.maximum(radius, cv2.GaussianBlur(radius, (0, 0), 2.5, borderType=cv2.BORDER_REPLICATE)) + 0.45
    points = CENTRE + direction.reshape(rows, columns, 3) * radius[..., None]
    colours = np.array(what["colour"]) * (1 - 0.12 * (np.arange(rows) % 4 == 0))[:, None, None]  # pleats
    colours = np.broadcast_to(colours, points.shape).reshape(-1, 3)
    # Seen from both sides: the tracer takes what it meets.
    cloth = piece(points.reshape(-1, 3), _grid_faces(rows, columns, wrap=False), colours, WOVEN)
    loops = []
    for column in (0, columns - 1):
        ear = (
            CENTRE + skin.unit(np.array(np.sign(azimuth[column]) * np.radians(100)), np.array(np.radians(-14.0))) * 8.6
        )
        for row in (1, rows - 2):
            loops.append(piece(*tube(np.stack([points[row, column], ear]), 0.09), (0.8, 0.8, 0.8)))
    return join([cloth, *loops])


ANCHORS = {
    "chin": (1.5, -10.5, 3.2),
    "cheek": (5.6, -5.0, 1.2),
    "side": (7.5, -2.5, -2.0),
    "mouth": (2.2, -8.2, 4.2),
}


def occluder_piece(photo: PhotoParameters) -> Piece:
    """A hand or an object close to the face; it leaves at least one eye and most of the nose free."""
    what = photo.occluder
    assert what is not None
    kind, side = what["kind"], what["side"]
    anchor = np.array(ANCHORS[what["place"]]) * [side, 1, 1] + np.array(what["jitter"])
    lean = np.radians(what["turn"])
    spin = np.array([[np.cos(lean), -np.sin(lean), 0], [np.sin(lean), np.cos(lean), 0], [0, 0, 1.0]])
    if kind == "hand":
        points, faces = _hand()
        points = points * [side, 1, 1]
        if side < 0:
            faces = faces[:, ::-1]
        # Finger tips rest beside and a little above the anchor: they reach the cheek or the chin.
        points = (points + np.array([0, 3.0, 0])) @ spin.T + anchor + [side * 2.5, -1.5, 1.2]
        return piece(points, faces, (1.0, 1.0, 1.0), skin_like=True)
    if kind == "phone":
        points, faces = _box((7.2, 14.5, 0.9))
        return piece(points @ spin.T + anchor + [side * 3.0, -3.5, 1.5], faces, what["colour"], gloss=0.8)
    if kind == "microphone":
        turn, rise = np.meshgrid(np.linspace(0, 2 * np.pi, 16, endpoint=False), np.linspace(-np.pi / 2, np.pi / 2, 10))
        ball = skin.unit(turn, rise).reshape(-1, 3) * 2.3
        top = anchor * [0.6, 1, 1] + [0, -2.2, 3.0]
        stick = np.stack([top, top + np.array([side * 1.5, -16.0, 3.0])])
        return join([piece(ball + top, _grid_faces(10, 16, wrap=True), (0.05, 0.05, 0.055), WOVEN),
                     piece(*tube(stick, 1.3, sides=10), what["colour"], gloss=0.4)])  # fmt: skip
    if kind == "cup":
        top = anchor * [0.5, 1, 1] + [0, -2.5, 4.0]
        wall = np.stack([top, top + np.array([0, -9.0, 0.5])])
        return piece(*tube(wall, np.array([3.9, 3.1]), sides=20), what["colour"], gloss=0.6)
    pole = np.stack([[side * 9.0, 30.0, 9.0], [side * 10.5, -40.0, 9.0]]) + np.array(what["jitter"])
    return piece(*tube(pole, 1.4, sides=10), what["colour"], gloss=0.2)


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a rotation vector in radians."""
    return cv2.Rodrigues(np.asarray(vector, np.float64))[0]
