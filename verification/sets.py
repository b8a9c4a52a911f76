"""Sets of pairs of crops with the answers: `.bin` files, and folders of photos with a list of pairs."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import utils
from config import CROP_SIZE, DETECTION_SIDE
from cropping.align import Rule
from cropping.photos import PhotoError, read_photo
from formats import tables, verification_bin
from formats.tables import FaceRow
from utils import InputError
from verification import lfw

FOLDS = 10  # LFW's protocol; .bin files do not say theirs, every known reader cuts them into ten


@dataclass
class VerificationSet:
    """Pairs of crops, decoded, with the answers.

    crops: uint8 RGB [M, 112, 112, 3], each image once however many pairs it is in. names: what messages call them.
    pairs: int64 [P, 2], indices of crops. same: bool [P]. folds: int64 [P], the fold of each pair, from 0.
    missing: crops that could not be had (index -> reason); their pixels are zero. sha256: of the data as given.
    source: where it came from, for reports. photos, faces: for a folder of photos, the file and the row of each crop.
    """

    name: str
    crops: np.ndarray
    names: list[str]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    sha256: str
    missing: dict[int, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    photos: list[Path] | None = None
    faces: list[FaceRow] | None = None

    def missing_pairs(self) -> np.ndarray:
        """bool [P]: pairs of which at least one crop is missing."""
        gone = np.zeros(len(self.crops), dtype=bool)
        gone[list(self.missing)] = True
        return gone[self.pairs].any(axis=1)


# --- sets of pairs --------------------------------------------------------------------------------------------------


def open_set(
    path: str | Path,
    cache_dir: Path | None = None,
    *,
    pairs: Path | None = None,
    folds: int = FOLDS,
    rule: Rule = "central",
    detector_weights: str | Path | None = None,
    max_side: int | None = DETECTION_SIDE,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> VerificationSet:
    """Read a set of pairs: a `.bin` file, or a folder of photos in LFW's layout.

    The pairs of a `.bin` file are cut into `folds` runs of equal length. For a folder the folds are those of the pairs
    file `pairs` (default: `pairs.txt` in the folder); faces are detected on `device` (in photos shrunk to `max_side`
    pixels), chosen by `rule` and aligned by `workers` threads (see `utils.worker_count`), and kept in `cache_dir`.
    Raises InputError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        detection = {"rule": rule, "weights": detector_weights, "max_side": max_side, "device": device}
        return _open_folder(path, pairs or path / "pairs.txt", cache_dir=cache_dir, workers=workers, **detection)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return _open_bin(path, folds)


def _open_folder(folder: Path, pairs_path: Path, **detection: Any) -> VerificationSet:
    pairs = lfw.read_pairs(pairs_path)
    files = lfw.find_photos(folder, pairs, pairs_path)
    name = folder.resolve().name
    found = lfw.crop_faces(files, name=name, **detection)
    names = [f"{file.parent.name}/{file.name}" for file in files]
    pairs_sha256 = utils.sha256_of(pairs_path)
    listing = "".join(f"{sha256}  {name}\n" for sha256, name in sorted(zip(found.sha256, names, strict=True)))
    photos_sha256 = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return VerificationSet(
        name=name,
        crops=found.crops,
        names=names,
        pairs=pairs.pairs,
        same=pairs.same,
        folds=pairs.folds,
        sha256=hashlib.sha256((pairs_sha256 + photos_sha256).encode()).hexdigest(),
        missing={index: row.reason for index, row in enumerate(found.rows) if row.status != tables.CROP},
        photos=files,
        faces=found.rows,
        source={
            "folder": str(folder),
            "pairs": str(pairs_path),
            "pairs_sha256": pairs_sha256,
            "photos": len(files),
            "photos_sha256": photos_sha256,
            "detector_sha256": found.detector,
            "face_rule": detection["rule"],
        },
    )


def _open_bin(path: Path, folds: int) -> VerificationSet:
    images, same = verification_bin.read_bin(path)
    if len(same) == 0:
        raise InputError(f"{path}: holds no pairs")
    # In lfw.bin a third of the images are repetitions of others.
    index: dict[bytes, int] = {}
    first_seen = []
    for position, image in enumerate(images):
        if index.setdefault(image, len(first_seen)) == len(first_seen):
            first_seen.append(position)
    names = [f"image {position} (pair {position // 2})" for position in first_seen]
    crops = np.zeros((len(first_seen), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
    for row, position in enumerate(first_seen):
        crops[row] = _decode_crop(images[position], f"{path}: {names[row]}")
    return VerificationSet(
        name=path.stem,
        crops=crops,
        names=names,
        pairs=np.array([index[image] for image in images]).reshape(-1, 2),
        same=np.asarray(same, dtype=bool),
        folds=contiguous_folds(len(same), folds),
        sha256=utils.sha256_of(path),
        source={"bin": str(path), "images": len(images), "different_images": len(first_seen)},
    )


def contiguous_folds(pairs: int, folds: int) -> np.ndarray:
    """int64 [pairs]: folds one after the other, sizes differing by at most one, the larger ones first.

    The same cut as scikit-learn's KFold without shuffling, which the known readers of `.bin` files use.
    """
    folds = min(folds, pairs)
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def _decode_crop(data: bytes, name: str) -> np.ndarray:
    """Encoded image -> uint8 RGB [112, 112, 3]; other square sizes are resized."""
    try:
        bgr = read_photo(data)
    except PhotoError as error:
        raise InputError(f"{name}: {error.reason}") from error
    height, width = bgr.shape[:2]
    if height != width:
        raise InputError(f"{name}: {width}x{height} pixels, not a square crop")
    if width != CROP_SIZE:
        interpolation = cv2.INTER_AREA if width > CROP_SIZE else cv2.INTER_LINEAR
        bgr = cv2.resize(bgr, (CROP_SIZE, CROP_SIZE), interpolation=interpolation)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
