"""The photos of stress.py: people in a reference photo and with one factor moved, kept as crops.

Each person is a file of its own under OUT/people-KEY: the crops (cut where the true landmarks are, so that no detector
is in play), whether the detector finds the face, and how far its landmarks are off. KEY is a hash of the settings
and of the code and packages that make and look at the photos: people of another seed, another size or an older
renderer are never mistaken for these.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import retinaface
import utils
from cropping.align import align_face
from cropping.faces import embedded_weights
from formats import cached
from processes import Shard
from retinaface import RetinaFace
from synthetic import dataset, factors
from synthetic.parameters import Identity, draw_identity
from synthetic.photo import encode
from synthetic.render import Renderer

CROP_QUALITY = 95  # JPEG, as in stage 2
DETECT_TOGETHER = 32
# What decides how the photos look, where they are cut and what the detector says of them.
CODE = (*dataset.CODE, *retinaface.CODE)
PACKAGES = ("anny", "warp-lang")
SEED = 20260101  # of what is random in pictures and cuts


@dataclass(frozen=True)
class Shot:
    """A photo of everybody: one factor at one level; both None for the reference photo."""

    factor: str | None = None
    level: int | None = None  # number of the level


@dataclass(frozen=True)
class Recorded:
    """A person as kept: crops uint8 RGB [K, 112, 112, 3], and per shot whether it was taken, whether the detector finds
    the face, and the mean error of the five landmarks as a share of the distance between the eyes (NaN: not found).
    """

    identity: Identity
    crops: np.ndarray
    taken: np.ndarray  # bool [K]
    found: np.ndarray  # bool [K]
    error: np.ndarray  # float32 [K]


class StressSet:
    """The people of a run. `names` are the factors; `size` pixels of a photo's side."""

    def __init__(self, out: Path, identities: int, seed: int, first: int, size: int, names: Sequence[str]) -> None:
        self.count, self.seed, self.first, self.size = identities, seed, first, size
        self.shots = [Shot()] + [Shot(name, k) for name in names for k in range(len(factors.FACTORS[name].levels))]
        levels = {name: factors.FACTORS[name].levels for name in names}
        # How many people there are is not part of it: more of them are added.
        self.settings = {"seed": seed, "size": size, "factors": levels, "code": utils.code_sha256(*CODE)}
        self.settings |= {"detector": embedded_weights(), "packages": {name: version(name) for name in PACKAGES}}
        self.settings["opencv"] = cv2.__version__
        self.key = cached.key_of(self.settings)
        self.folder = out / f"people-{self.key[:12]}"

    @property
    def images(self) -> int:
        """Photos of a person."""
        return len(self.shots)

    def working(self, shard: Shard) -> contextlib.AbstractContextManager[None]:
        """A section that one process per shard enters."""
        busy = f"{self.folder}: another process is working on shard {shard} here"
        return utils.locked(self.folder / f"shard-{shard.index + 1}-of-{shard.count}.lock", busy)

    def path(self, chunk: int) -> Path:
        """The file of a person."""
        return self.folder / f"{self.first + chunk:06d}.cache"

    def person_key(self, chunk: int) -> str:
        """What a person's file depends on."""
        return cached.key_of(self.settings, self.first + chunk)

    def missing(self) -> list[int]:
        """The people that are not there, or not unharmed."""
        return [k for k in range(self.count) if cached.read(self.path(k), self.person_key(k)) is None]

    def maker(self, device: str) -> Callable[[int], int]:
        """What photographs a person, for one process."""
        return _Maker(self, device)

    def load(self, chunk: int, head: Any) -> Recorded | None:
        """A person as kept; None if they are not there unharmed."""
        arrays = cached.read(self.path(chunk), self.person_key(chunk))
        if arrays is None:
            return None
        data, ends = arrays["jpegs"].tobytes(), arrays["ends"].tolist()
        starts = [0, *ends[:-1]]
        crops = np.stack([_decoded(data[start:end]) for start, end in zip(starts, ends, strict=True)])
        identity = draw_identity(self.seed, self.first + chunk, head)
        return Recorded(identity, crops, arrays["taken"], arrays["found"], arrays["error"])


def _decoded(jpeg: bytes) -> np.ndarray:
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    return decoded


def generator_of(factor: str, identity: Identity) -> np.random.Generator:
    """What is random in a factor's pictures or cuts of a person: one direction, sign or grain at all levels, as nothing
    but the level may move; another one for each person, so that the figures are of all directions.
    """
    return np.random.default_rng([SEED, sorted(factors.FACTORS).index(factor), identity.number])


def _crop(shot: Shot, image: np.ndarray, landmarks: np.ndarray, identity: Identity) -> np.ndarray:
    """The crop of a photo; cut by other landmarks, and of a photo that goes on, where the cut is what is moved."""
    if shot.factor in factors.CUTS and shot.level is not None:
        level, side = float(factors.FACTORS[shot.factor].levels[shot.level]), len(image)
        landmarks = factors.wrong_landmarks(shot.factor, level, landmarks, generator_of(shot.factor, identity)) + side
        image = cv2.copyMakeBorder(image, side, side, side, side, cv2.BORDER_REPLICATE)
    return align_face(np.ascontiguousarray(image), landmarks)


class _Maker:
    """Photographs one person after the other."""

    def __init__(self, people: StressSet, device: str) -> None:
        self.people = people
        self.renderer = Renderer(torch.device(device))
        self.detector = RetinaFace(device=torch.device(device))

    def __call__(self, chunk: int) -> int:
        people, head = self.people, self.renderer.head
        identity = draw_identity(people.seed, people.first + chunk, head)
        images, landmarks, taken = self._photographs(identity)
        found, error = self._detected(images, landmarks)
        jpegs = [
            encode(_crop(shot, image, points, identity), CROP_QUALITY)
            for shot, image, points in zip(people.shots, images, landmarks, strict=True)
        ]
        arrays: dict[str, np.ndarray] = {
            "jpegs": np.frombuffer(b"".join(jpegs), np.uint8),
            "ends": np.cumsum([len(jpeg) for jpeg in jpegs]).astype(np.int64),
            "taken": taken,
            "found": found,
            "error": error,
        }
        cached.write(people.path(chunk), people.person_key(chunk), arrays)
        return len(people.shots)

    def _photographs(self, identity: Identity) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Photos uint8 BGR and true landmarks [5, 2] of all shots, and which of them make sense for this person."""
        scene = factors.reference(identity, self.renderer.head)
        # Photos of an identity as it is are taken together; what changes the identity (age, hair) is another's photo.
        groups: list[tuple[Identity, list[int], list[Any]]] = []
        taken = np.ones(len(self.people.shots), bool)
        for number, shot in enumerate(self.people.shots):
            who, photo = scene
            if shot.factor in factors.SCENES and shot.level is not None:
                taken[number] = factors.has(shot.factor, shot.level, identity)
                if taken[number]:
                    who, photo = factors.SCENES[shot.factor][1][shot.level](scene)
            elif shot.factor is not None:
                continue
            for other, numbers, photos in groups:
                if other == who:
                    numbers.append(number)
                    photos.append(photo)
                    break
            else:
                groups.append((who, [number], [photo]))
        images: dict[int, np.ndarray] = {}
        landmarks: dict[int, np.ndarray] = {}
        for who, numbers, photos in groups:
            pictures, truths = self.renderer.photograph(who, photos, self.people.size)
            for number, picture, truth in zip(numbers, pictures, truths, strict=True):
                images[number], landmarks[number] = picture, truth.landmarks.astype(np.float64)
        ratio = float(np.linalg.norm(landmarks[0][1] - landmarks[0][0])) / factors.EYES_IN_CROP
        for number, shot in enumerate(self.people.shots):
            if number in images:
                continue
            image = images[0]
            if shot.factor in factors.PICTURES and shot.level is not None:
                factor, change = factors.PICTURES[shot.factor]
                image = change(image, ratio, float(factor.levels[shot.level]), generator_of(factor.name, identity))
            images[number], landmarks[number] = image, landmarks[0]
        order = range(len(self.people.shots))
        return [images[k] for k in order], [landmarks[k] for k in order], taken

    def _detected(self, images: list[np.ndarray], landmarks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """bool [K] and float32 [K]: whether the best face is the one that is there, and its landmarks' error."""
        found, error = np.zeros(len(images), bool), np.full(len(images), np.nan, np.float32)
        eyes = float(np.linalg.norm(landmarks[0][1] - landmarks[0][0]))
        different = [k for k, shot in enumerate(self.people.shots) if k == 0 or shot.factor not in factors.CUTS]
        for start in range(0, len(different), DETECT_TOGETHER):
            part = different[start : start + DETECT_TOGETHER]
            for k, faces in zip(part, self.detector.detect([images[k] for k in part]), strict=True):
                if not len(faces):
                    continue
                distance = np.linalg.norm(faces.landmarks[0] - landmarks[k], axis=1).mean() / eyes
                found[k] = distance < 1  # else it is something else that was taken for a face
                error[k] = distance if found[k] else np.nan
        return found, error
