"""Hair as ribbons: grown from the scalp, combed, weighed down, kept off the face, bent around the head.

A ribbon is a lock a few millimetres to a centimetre wide whose strands the ray tracer cuts out (`kernels.strand_cut`).
600 to 1,500 of them, 4 to 14 segments each, make a head of hair: geometry, so it casts shadows, parts, curls and has a
silhouette, at a tenth of the triangles that single strands would need. All ribbons of a head grow at once, one vector
operation per segment. The price: no strand is thinner than a pixel, so a single fly-away hair cannot be seen.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from synthetic import kernels, skin
from synthetic.head import SKIN, HeadModel, load_head
from synthetic.parameters import Identity

CENTRE = np.array([0.0, kernels.CENTRE_Y, kernels.CENTRE_Z], np.float32)
FIELD_AZIMUTH, FIELD_ELEVATION = 72, 40  # grid of the radius field
# Cuts whose hair is trimmed towards the nape.
TRIMMED = ("crop", "horseshoe", "side_part", "slick_back", "quiff", "curly_short", "afro", "fringe")


@dataclass
class Ribbons:
    """A set of ribbons ready for the mesh: float32 arrays over vertices, int32 triangles."""

    points: np.ndarray  # [N, 3]
    normals: np.ndarray  # [N, 3]
    tangents: np.ndarray  # [N, 3]
    strand: np.ndarray  # [N, 3] across (0..1), along (0..1), seed
    open_sky: np.ndarray  # [N] share of ambient light that arrives
    roots: np.ndarray  # [N] head vertex whose motion the ribbon follows
    faces: np.ndarray  # [F, 3]


def empty_ribbons() -> Ribbons:
    """No hair at all."""
    nothing = np.zeros((0, 3), np.float32)
    return Ribbons(nothing, nothing, nothing, nothing, np.zeros(0, np.float32), np.zeros(0, np.int64),
                   np.zeros((0, 3), np.int32))  # fmt: skip


class RadiusField:
    """How far a person's skin lies from the canvas's centre in any direction: what hair and hats rest on."""

    def __init__(self, head: HeadModel, vertices: np.ndarray) -> None:
        azimuth = np.linspace(-np.pi, np.pi, FIELD_AZIMUTH, endpoint=False)
        elevation = np.linspace(-np.pi / 2 + 0.05, np.pi / 2, FIELD_ELEVATION)
        grid = np.meshgrid(azimuth, elevation, indexing="ij")
        radius = skin.average_surface(head, vertices, skin.unit(*grid).reshape(-1, 3).astype(np.float32))
        radius = radius.reshape(FIELD_AZIMUTH, FIELD_ELEVATION)
        radius[radius <= 0] = 10.0
        self.table = np.minimum(radius, 26.0)

    def __call__(self, direction: np.ndarray) -> np.ndarray:
        """Radius [N] in centimetres along unit vectors [N, 3]."""
        x = (np.arctan2(direction[:, 0], direction[:, 2]) + np.pi) / (2 * np.pi) * FIELD_AZIMUTH
        low = -np.pi / 2 + 0.05
        y = (np.arcsin(np.clip(direction[:, 1], -1, 1)) - low) / (np.pi / 2 - low) * (FIELD_ELEVATION - 1)
        y = np.clip(y, 0, FIELD_ELEVATION - 1.001)
        i, j = np.floor(x).astype(int), y.astype(int)
        fx, fy = x - i, y - j
        i0, i1 = i % FIELD_AZIMUTH, (i + 1) % FIELD_AZIMUTH
        table = self.table
        return (table[i0, j] * (1 - fx) + table[i1, j] * fx) * (1 - fy) + (
            table[i0, j + 1] * (1 - fx) + table[i1, j + 1] * fx
        ) * fy


@lru_cache(maxsize=1)
def _root_candidates() -> dict[str, np.ndarray]:
    """Evenly spread points of the canonical skin: direction angles (degrees), faces, weights, positions."""
    head = load_head()
    count = 9000
    k = np.arange(count) + 0.5
    elevation = np.arcsin(1 - 1.75 * k / count)  # golden spiral from the crown down to 49 degrees below the horizon
    azimuth = (k * 2.39996323) % (2 * np.pi) - np.pi
    rays = skin.unit(azimuth, elevation).astype(np.float32)
    which = np.nonzero(head.material == SKIN)[0]
    face, bary, _ = skin.outermost(head.canonical, head.faces[which], rays)
    found = face >= 0
    face, bary, rays = which[face[found]], bary[found], rays[found]
    place = np.einsum("nk,nkc->nc", bary, head.canonical[head.faces[face]])
    canvas = skin.load_canvas()
    texel = skin.Canvas.texel(place).round().astype(int)
    row, column = np.clip(texel[:, 1], 0, skin.HEIGHT - 1), np.clip(texel[:, 0], 0, skin.WIDTH - 1)
    order = np.random.default_rng(3).permutation(len(face))  # any prefix of it is spread evenly
    return {
        "azimuth": np.degrees(azimuth[found])[order],
        "elevation": np.degrees(elevation[found])[order],
        "face": face[order],
        "bary": bary[order].astype(np.float32),
        "place": place[order],
        "ear": canvas.ears[row, column][order],
        "lip": canvas.lips[row, column][order],
    }


def _tangent(direction: np.ndarray, normal: np.ndarray) -> np.ndarray:
    along = direction - normal * (direction * normal).sum(-1, keepdims=True)
    return along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-6)


@dataclass
class Cut:
    """A haircut over the roots: arrays [N] unless said otherwise."""

    length: np.ndarray
    comb: np.ndarray  # [N, 3] direction the hair is combed, before gravity
    lift: np.ndarray  # 0 lies flat .. 1 stands up
    fall: np.ndarray  # pull of gravity, 0 .. 1
    layer: float  # thickness of the whole in centimetres
    curl: float  # radius of waves in centimetres
    pitch: float  # waves per centimetre
    width: float
    segments: int
    bangs: np.ndarray  # bool: may hang over the forehead
    count: int


def _cut(identity: Identity, azimuth: np.ndarray, elevation: np.ndarray, normal: np.ndarray,
         rng: np.random.Generator) -> Cut:  # fmt: skip
    hair = identity.hair
    style, size, volume = hair["style"], hair["length"], hair["volume"]
    count = len(azimuth)
    side = np.sign(azimuth + 1e-6)
    away = np.abs(azimuth)
    x = np.sin(np.radians(azimuth)) * np.cos(np.radians(elevation)) * 10
    across = np.where(x > hair["part"], 1.0, -1.0)
    top = np.clip((elevation - 35) / 25, 0, 1)
    front = np.clip((75 - away) / 40, 0, 1)
    ones = np.ones(count)

    def vector(dx: Any, dy: Any, dz: Any) -> np.ndarray:
        return np.stack([dx * ones, dy * ones, dz * ones], -1)

    down = vector(0.25 * side, -1.0, -0.15)
    back = vector(0.0, 0.1, -1.0)
    forward = vector(0.15 * side, -0.1, 1.0)
    parted = vector(across, 0.1, -0.25 - 0.45 * front)
    # From the brow up: how long a strand at this height may be to end above the eyes.
    to_brow = np.clip(0.165 * (elevation - 21), 2.0, 11.0) / size
    random = rng.normal(size=(count, 3))
    blend = top[:, None]
    none = np.zeros(count, bool)
    mild = 0.08 + 0.5 * hair["curl"] ** 2

    def cut(length: Any, comb: np.ndarray, lift: Any, fall: Any, layer: float, curl: float = 0.0, pitch: float = 0.2,
            width: float = 0.55, segments: int = 6, bangs: np.ndarray = none, roots: int = 800) -> Cut:  # fmt: skip
        return Cut(length * ones * size, comb, lift * ones, fall * ones, layer * volume, curl, pitch, width, segments,
                   bangs, roots)  # fmt: skip

    if style == "crop":
        return cut(1.2 + 2.2 * top, forward * blend + down * (1 - blend), 0.35 + 0.3 * top, 0.15, 0.7, 0.1,
                   width=0.22, segments=3, bangs=front > 0, roots=1700)  # fmt: skip
    if style == "horseshoe":
        return cut(1.4, down, 0.2, 0.3, 0.4, 0.05, width=0.2, segments=3, roots=1200)
    if style == "side_part":
        return cut(2.2 + 5.5 * top, parted * blend + down * (1 - blend), 0.25 + 0.2 * top, 0.3, 1.3, mild,
                   segments=6, roots=800)  # fmt: skip
    if style == "slick_back":
        return cut(4.5 + 6 * top, back * (0.3 + blend) + down * 0.3 * (1 - blend), 0.1, 0.25, 0.9, 0.05,
                   segments=7, roots=800)  # fmt: skip
    if style == "quiff":
        rise = front * top
        upward = vector(0.3 * across, 0.5 + 0.8 * rise, 0.5 * rise - 0.6)
        return cut(1.8 + 5.5 * top, upward * blend + down * (1 - blend),
                   0.3 + 0.5 * rise, 0.15, 1.8, mild * 0.6, segments=6, roots=850)  # fmt: skip
    if style == "curly_short":
        return cut(4.0 + 2 * top, random + 0.6 * down, 0.7, 0.25, 2.2, 0.5 + 0.3 * hair["curl"], 0.35, 0.5, 7,
                   roots=800)  # fmt: skip
    if style == "afro":
        return cut(4.6 + 1.5 * top, random * 0.8, 1.0, 0.02, 4.5, 0.9, 0.55, 0.24, 6, roots=1800)
    if style == "fringe":
        return cut(np.where(front > 0.1, to_brow, 7.0), forward * blend + down * (1 - blend), 0.2, 0.5, 1.4, mild * 0.5,
                   segments=7, bangs=front > 0.1, roots=800)  # fmt: skip
    if style == "bob":
        return cut(15 + 4 * top, parted * blend + down * (1 - blend), 0.15, 0.75, 1.7, mild * 0.5,
                   width=0.8, segments=11, roots=560)  # fmt: skip
    if style == "bangs_long":
        bangs = (front > 0.15) & (elevation > 45)
        comb = np.where(bangs[:, None], forward, parted * blend + down * (1 - blend))
        return cut(np.where(bangs, to_brow, 30), comb, 0.12, 0.8, 1.6, mild * 0.5, width=0.85, segments=13, bangs=bangs,
                   roots=560)  # fmt: skip
    if style.startswith("long"):
        curl, pitch = {"long_straight": (0.1, 0.1), "long_wavy": (0.75, 0.11), "long_curly": (1.15, 0.14)}[style]
        return cut(30 + 6 * top, parted * blend + down * (1 - blend), 0.15 + 0.15 * (curl > 0.5), 0.75, 1.6 + curl,
                   curl, pitch, 0.9, 17 if curl > 0.5 else 12, roots=560)  # fmt: skip
    if style in ("ponytail", "bun"):
        knot = np.array([0.0, 4.5 if style == "ponytail" else 8.0, -16.5])
        root = CENTRE + normal * 10
        return cut(np.linalg.norm(knot - root, axis=-1) * 1.02, knot - root, 0.02, 0.0, 0.5, 0.04, width=0.9,
                   segments=8, roots=560)  # fmt: skip
    if style == "dreads":
        return cut(14 + 4 * top, random * 0.35 + parted * blend + down * (1 - blend) + 0.3 * back, 0.35, 0.7, 2.2, 0.25,
                   0.25, 0.75, 10, roots=420)  # fmt: skip
    raise ValueError(f"no such hair style: {style}")


def _ribbons(path: np.ndarray, width: np.ndarray, outward: np.ndarray, seeds: np.ndarray, open_sky: np.ndarray,
             roots: np.ndarray) -> Ribbons:  # fmt: skip
    """Ribbons along paths [N, K, 3] with half widths [N, K], facing `outward` [N, K, 3]."""
    count, length = path.shape[:2]
    tangent = np.gradient(path, axis=1)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=-1, keepdims=True), 1e-6)
    across = np.cross(tangent, outward)
    across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-6)
    normal = np.cross(across, tangent)
    points = np.stack([path - across * width[..., None], path + across * width[..., None]], 2)
    # The two edges lean apart, so that light runs around a lock as around a cylinder.
    normals = np.stack([normal - 0.45 * across, normal + 0.45 * across], 2)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    along = np.broadcast_to(np.linspace(0, 1, length)[None, :, None], (count, length, 2))
    sides = np.broadcast_to(np.array([0.0, 1.0])[None, None], (count, length, 2))
    seed = np.broadcast_to(seeds[:, None, None], (count, length, 2))
    index = np.arange(count * length * 2, dtype=np.int32).reshape(count, length, 2)
    a, b, c, d = index[:, :-1, 0], index[:, :-1, 1], index[:, 1:, 0], index[:, 1:, 1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)])
    repeat = np.broadcast_to(tangent[:, :, None], points.shape)
    return Ribbons(
        points=points.reshape(-1, 3).astype(np.float32),
        normals=normals.reshape(-1, 3).astype(np.float32),
        tangents=repeat.reshape(-1, 3).astype(np.float32),
        strand=np.stack([sides, along, seed], -1).reshape(-1, 3).astype(np.float32),
        open_sky=np.broadcast_to(open_sky[:, None, None], (count, length, 2)).reshape(-1).astype(np.float32),
        roots=np.broadcast_to(roots[:, None, None], (count, length, 2)).reshape(-1),
        faces=faces.astype(np.int32),
    )


def join(parts: list[Ribbons]) -> Ribbons:
    """One set of several."""
    starts = np.cumsum([0] + [len(part.points) for part in parts[:-1]])
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("points", "normals", "tangents", "strand", "open_sky", "roots")
    }
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)])
    return Ribbons(**joined, faces=faces.astype(np.int32))


def grow_hair(identity: Identity, head: HeadModel, vertices: np.ndarray, field: RadiusField) -> Ribbons:
    """The hair of a person whose rest shape is `vertices` [V, 3]; no ribbons for bald and buzz cuts."""
    hair = identity.hair
    if hair["style"] in ("bald", "buzz"):
        return empty_ribbons()
    rng = np.random.default_rng([identity.seed, identity.number, 1 << 21])
    roots = _root_candidates()
    inside = skin.scalp(identity, roots["azimuth"], roots["elevation"])
    inside += rng.normal(0, 1.2, len(inside))
    chosen = np.nonzero((inside > 0.5) & (roots["ear"] < 0.3))[0]
    azimuth, elevation = roots["azimuth"][chosen], roots["elevation"][chosen]
    normal = skin.unit(np.radians(azimuth), np.radians(elevation)).astype(np.float32)
    cut = _cut(identity, azimuth, elevation, normal, rng)
    # Roots near the edge of the scalp are the ones a viewer sees: keep more of them.
    keep = np.argsort(rng.random(len(chosen)) * np.where(inside[chosen] < 7, 0.45, 1.0), kind="stable")[: cut.count]
    for name in ("length", "comb", "lift", "fall", "bangs"):
        setattr(cut, name, getattr(cut, name)[keep])
    chosen, azimuth, elevation, normal = chosen[keep], azimuth[keep], elevation[keep], normal[keep]
    count = len(chosen)
    corner = head.faces[roots["face"][chosen]]
    start = np.einsum("nk,nkc->nc", roots["bary"][chosen], vertices[corner])
    edge = np.clip(inside[chosen] / 12, 0.12, 1)

    layer = rng.random(count) ** 0.7
    length = cut.length * rng.uniform(0.75, 1.12, count) * (0.55 + 0.45 * edge)
    if hair["style"] in ("ponytail", "bun"):
        length = cut.length
    if hair["style"] in TRIMMED:
        length = length * np.clip((elevation + 38) / 36, 0.25, 1)
    comb = _tangent(cut.comb + rng.normal(0, 0.08 + 0.16 * hair["messy"], (count, 3)), normal)
    if hair["style"] in ("ponytail", "bun"):
        comb = _tangent(cut.comb, normal)
    step = (length / cut.segments)[:, None]
    thick = cut.layer * (0.25 + 0.75 * edge) * layer
    limit = np.radians(rng.uniform(54, 80, count))
    path = np.empty((count, cut.segments + 1, 3), np.float32)
    path[:, 0] = start - normal * 0.15
    phase, turn = rng.uniform(0, 2 * np.pi, count), cut.pitch * 2 * np.pi * rng.uniform(0.8, 1.2, count)
    clump = np.sin(azimuth * 0.35 + elevation * 0.21) * 1.2  # neighbours wave together
    place = start.copy()
    knot = np.array([0.0, 4.5 if hair["style"] == "ponytail" else 8.0, -16.5])
    for k in range(cut.segments):
        t = (k + 0.5) / cut.segments
        outward = place - CENTRE
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        if hair["style"] in ("ponytail", "bun"):
            along = knot - place
            along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 0.3)
        else:
            pull = np.clip(cut.fall * (0.25 + 1.6 * t), 0, 1.5)[:, None]
            stand = (cut.lift * (1.3 - t))[:, None]
            along = _tangent(comb, outward) * (1 - 0.5 * pull) + outward * stand + np.array([0, -1.0, 0]) * pull
            along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
        place = place + along * step
        place = _settle(place, field, 0.15 + thick * min(1.0, 0.35 + 2.5 * t), cut, limit)
        swing = cut.curl * min(1.0, 0.2 + 2.2 * t)
        angle = phase + clump + turn * (k + 1) * step[:, 0]
        side = np.cross(along, outward)
        path[:, k + 1] = place + swing * (
            side * np.sin(angle)[:, None] + outward * (0.6 * np.cos(angle) + 0.4)[:, None]
        )
    outward = path - CENTRE
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    outward = outward + rng.normal(0, 0.12, (count, 1, 3))
    taper = np.interp(np.linspace(0, 1, cut.segments + 1), [0, 0.15, 0.75, 1], [0.7, 1.0, 0.9, 0.45])
    if hair["style"] == "dreads":
        taper = np.ones_like(taper)
    width = cut.width * rng.uniform(0.6, 1.3, count)[:, None] * taper[None]
    parts = [_ribbons(path, width, outward, rng.uniform(1, 99, count), 0.35 + 0.65 * layer, corner[:, 0])]
    if hair["style"] == "ponytail":
        parts.append(_tail(identity, rng, knot, corner[0, 0]))
    if hair["style"] == "bun":
        parts.append(_bun(rng, knot, corner[0, 0], hair["volume"]))
    return join(parts)


def _settle(place: np.ndarray, field: RadiusField, above: np.ndarray, cut: Cut, limit: np.ndarray) -> np.ndarray:
    """Push points [N, 3] out of the head and, unless they are bangs, sideways off the face."""
    offset = place - CENTRE
    radius = np.linalg.norm(offset, axis=1)
    azimuth = np.arctan2(offset[:, 0], offset[:, 2])
    elevation = np.arcsin(np.clip(offset[:, 1] / radius, -1, 1))
    away = np.abs(azimuth)
    edge = np.interp(np.degrees(away), skin.HAIRLINE_THETA, skin.HAIRLINE_PHI) - 3
    over_face = (np.degrees(elevation) < edge) & (away < limit) & ~cut.bangs
    short = cut.length < 12
    away = np.where(over_face & ~short, np.minimum(limit, away + 0.3), away)
    elevation = np.where(over_face & short, np.radians(edge), elevation)
    azimuth = np.where(azimuth < 0, -away, away)
    direction = skin.unit(azimuth, elevation)
    radius = np.maximum(radius, field(direction) + above)
    return (CENTRE + direction * radius[:, None]).astype(np.float32)


def _tail(identity: Identity, rng: np.random.Generator, knot: np.ndarray, root: int) -> Ribbons:
    count, segments = 110, 10
    t = np.linspace(0, 1, segments + 1)[None, :, None]
    length = 22 * identity.hair["length"] * rng.uniform(0.7, 1.1, (count, 1, 1))
    spread = rng.normal(0, 1.0, (count, 1, 3)) * (0.8 + 1.6 * t)
    down, behind = 1.2 * np.sin(3 * t) - length * t**1.4, -4.5 * np.sin(1.7 * t) + 0 * length
    curve = knot + np.concatenate([0 * down, down, behind], -1)
    wave = 0.8 * identity.hair["curl"] * np.sin(6 * t + rng.uniform(0, 6, (count, 1, 1)))
    path = curve + spread + wave
    outward = path - (knot + np.array([0, -8.0, 0]))
    outward = outward / np.linalg.norm(outward, axis=-1, keepdims=True)
    width = np.broadcast_to(np.linspace(0.8, 0.35, segments + 1)[None], (count, segments + 1))
    return _ribbons(path, width, outward, rng.uniform(1, 99, count), rng.uniform(0.5, 1, count), np.full(count, root))


def _bun(rng: np.random.Generator, knot: np.ndarray, root: int, volume: float) -> Ribbons:
    count, segments = 90, 9
    t = np.linspace(0, 1, segments + 1)[None, :]
    tilt, start = rng.uniform(-0.9, 0.9, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
    radius = 3.2 * min(1.5, volume) * rng.uniform(0.85, 1.0, (count, 1))
    angle = start + 2.6 * t
    ring = np.stack([np.cos(angle), np.sin(angle), tilt + 0 * angle], -1)
    ring /= np.linalg.norm(ring, axis=-1, keepdims=True)
    path = knot + np.array([0, 0.5, -1.0]) + ring * radius[..., None]
    width = np.full((count, segments + 1), 0.7)
    return _ribbons(path, width, ring, rng.uniform(1, 99, count), rng.uniform(0.6, 1, count), np.full(count, root))


def grow_beard(identity: Identity, head: HeadModel, vertices: np.ndarray) -> Ribbons:
    """Beard and moustache longer than stubble; their ribbons follow the skin they grow on."""
    beard = identity.beard
    if beard["style"] in skin.PAINTED_BEARDS:
        return empty_ribbons()
    rng = np.random.default_rng([identity.seed, identity.number, 1 << 22])
    roots = _root_candidates()
    density = skin.beard_region(beard["style"], roots["place"], roots["lip"])
    # The candidates are as sparse as scalp hair needs; beards take each of them several times, jittered.
    repeat = np.repeat(np.nonzero(density > 0.25)[0], 4)
    corner = head.faces[roots["face"][repeat]]
    weights = roots["bary"][repeat] + rng.uniform(-0.5, 0.5, (len(repeat), 3))
    weights = np.clip(weights, 0.02, 1)
    weights /= weights.sum(1, keepdims=True)
    start = np.einsum("nk,nkc->nc", weights, vertices[corner])
    above_lip = (roots["place"][repeat][:, 1] > -6.4) & (np.abs(start[:, 0]) < 3)
    length = 1.9 * beard["length"] * rng.uniform(0.6, 1.2, len(repeat))
    length = np.where(above_lip, np.minimum(length, 0.5), length)
    # Beards are trimmed towards the ears.
    length *= np.clip(1.25 - 0.14 * np.abs(start[:, 0]), 0.3, 1.0)
    count, segments = len(repeat), 3
    normal = start - np.array([0, -4.5, -4.0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    side = np.sign(start[:, :1])
    down = np.concatenate([0.35 * side, -np.ones_like(side), 0.1 * np.ones_like(side)], 1)
    down += rng.normal(0, 0.25, (count, 3))
    path = np.empty((count, segments + 1, 3), np.float32)
    path[:, 0] = start - normal * 0.05
    place = start
    for k in range(segments):
        along = _tangent(down, normal) + normal * (0.55 - 0.35 * k / segments)
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        place = place + along * (length / segments)[:, None]
        path[:, k + 1] = place
    taper = np.array([0.9, 1.0, 0.8, 0.35])
    width = rng.uniform(0.05, 0.11, (count, 1)) * taper[None] * 1.27
    outward = np.repeat(normal[:, None], segments + 1, 1)
    return _ribbons(path, width, outward, rng.uniform(1, 99, count), rng.uniform(0.55, 1, count), corner[:, 0])
