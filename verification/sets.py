"""Sets of pairs of crops with the answers: `.bin` files, and folders of photos with a list of pairs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import utils
from config import CROP_SIZE, DETECTION_SIDE
from cropping import faces
from cropping.align import Rule
from cropping.contents import photos_hash
from cropping.faces import as_photo
from cropping.photos import PhotoError, read_crop, read_file
from formats import tables, verification_bin
from formats.tables import FaceRow
from utils import InputError
from verification import lfw
from verification.lazy import CropArray, LazyCrops
from verification.pairs import FOLDS, PhotoPairs, connected, open_lists


@dataclass
class VerificationSet:
    """Pairs of crops with the answers.

    crops: uint8 RGB [M, 112, 112, 3], each image once however many pairs it is in, decoded when they are wanted: what
    stays in memory is a `.bin` file's encoded images (a tenth of the pixels), of photos with a cache nothing, without
    one the crops, for which there is no other place. names: what messages call them.
    pairs: int64 [P, 2], indices of crops. same: bool [P]. folds: int64 [P], the fold of each pair, from 0.
    missing: crops that could not be had (index -> reason); their pixels are zero. sha256: of the data as given.
    source: where it came from, for reports. photos, faces: for a folder of photos, the file and the row of each crop.
    identities: int64 [M], whom each crop shows, None where the list contradicts itself. columns: groups by name, for
    each pair the values of its first and second photo. notes: what a reader should hear about.
    """

    name: str
    crops: CropArray
    names: list[str]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    sha256: str
    missing: dict[int, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    photos: list[Path] | None = None
    faces: list[FaceRow] | None = None
    identities: np.ndarray | None = None
    columns: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
    pairs: Path | Sequence[Path] | None = None,
    folds: int = FOLDS,
    aligned: bool = False,
    rule: Rule = "central",
    detector_weights: str | Path | None = None,
    max_side: int | None = DETECTION_SIDE,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> VerificationSet:
    """Read a set of pairs: a `.bin` file, or a folder of photos with a list of pairs, or several.

    The pairs of a `.bin` file are cut into `folds` runs of equal length. For a folder the folds are those of the list
    `pairs` (default: `pairs.txt` in the folder; see `pairs.read_pair_list` for the kinds), or cut into `folds` where it
    states none. Faces are detected on `device` (in photos shrunk to `max_side` pixels), chosen by `rule` and aligned by
    `workers` threads (see `utils.worker_count`), and kept in `cache_dir`; `aligned` photos are crops already. Raises
    InputError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        paths = [path / "pairs.txt"] if pairs is None else [pairs] if isinstance(pairs, Path) else list(pairs)
        lists = open_lists(path, paths, folds)
        if aligned:
            return _open_folder(path, paths, lists, read_crops(lists.files), {"aligned": True})
        detection: dict[str, Any] = {"rule": rule, "weights": detector_weights, "max_side": max_side, "device": device}
        name = path.resolve().name
        found = lfw.crop_faces(lists.files, name=name, cache_dir=cache_dir, workers=workers, **detection)
        lists.notes.extend(look_aligned(lists.files))
        way = {"detector_sha256": found.detector, "face_rule": rule, "max_side": max_side, "aligned": False}
        return _open_folder(path, paths, lists, found, way)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return _open_bin(path, folds, workers)


def _open_folder(
    folder: Path, paths: Sequence[Path], lists: PhotoPairs, found: lfw.Faces, way: dict[str, Any]
) -> VerificationSet:
    names = [f"{file.parent.name}/{file.name}" for file in lists.files]
    pairs_sha256 = [utils.sha256_of(path) for path in paths]
    photos_sha256 = photos_hash(found.sha256, names)
    fits = ((lists.identities[lists.pairs[:, 0]] == lists.identities[lists.pairs[:, 1]]) == lists.same).all()
    return VerificationSet(
        name=folder.resolve().name,
        crops=found.crops,
        names=names,
        pairs=lists.pairs,
        same=lists.same,
        folds=lists.folds,
        sha256=hashlib.sha256("".join([*pairs_sha256, photos_sha256]).encode()).hexdigest(),
        missing={index: row.reason for index, row in enumerate(found.rows) if row.status != tables.CROP},
        photos=lists.files,
        faces=found.rows,
        identities=lists.identities if fits else None,
        columns=lists.columns,
        notes=lists.notes,
        source={
            "folder": str(folder),
            "pairs": str(paths[0]) if len(paths) == 1 else [str(path) for path in paths],
            "pairs_sha256": pairs_sha256[0] if len(paths) == 1 else pairs_sha256,
            "photos": len(lists.files),
            "photos_sha256": photos_sha256,
            "people_by_chains": lists.by_chains,
            **way,
        },
    )


def read_crops(files: Sequence[Path]) -> lfw.Faces:
    """Photos that are aligned crops already: square, resized to 112 pixels where they have another size.

    A file that cannot be read is a row without a crop; one that is not square is an InputError, since it is no crop.
    """
    rows: list[FaceRow] = []
    hashes: list[str] = []
    for file in files:
        photo = as_photo(file)
        try:
            data = read_file(file)
            read_crop(data, resize=True)
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error
        except PhotoError as error:
            hashes.append("")
            rows.append(FaceRow(photo.identity, photo.file, tables.NO_CROP, error.reason))
            continue
        hashes.append(hashlib.sha256(data).hexdigest())
        rows.append(FaceRow(photo.identity, photo.file, tables.CROP))

    def read(index: int) -> np.ndarray:
        if not hashes[index]:
            return np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8)
        data = utils.read_bytes(files[index])
        if hashlib.sha256(data).hexdigest() != hashes[index]:
            raise InputError(f"{files[index]}: changed since this run began; run the same command again")
        return _decode(data, str(files[index]))

    return lfw.Faces(LazyCrops(len(files), read), rows, hashes, "")


def look_aligned(files: Sequence[Path]) -> list[str]:
    """A remark if some of the photos, spread over all, have 112x112 pixels each, as crops do."""
    for file in files[:: max(1, len(files) // 8)]:
        try:
            with Image.open(file) as image:
                if image.size != (CROP_SIZE, CROP_SIZE):
                    return []
        except (OSError, ValueError):
            return []
    return [f"the photos have {CROP_SIZE}x{CROP_SIZE} pixels, as crops do: if they are aligned already, give --aligned"]


def _open_bin(path: Path, folds: int, workers: int | None) -> VerificationSet:
    images, same = verification_bin.read_bin(path)
    if len(same) == 0:
        raise InputError(f"{path}: holds no pairs")
    # In lfw.bin a third of the images are repetitions of others.
    index: dict[bytes, int] = {}
    first_seen: list[int] = []
    for position, image in enumerate(images):
        if index.setdefault(image, len(first_seen)) == len(first_seen):
            first_seen.append(position)
    names = [f"image {position} (pair {position // 2})" for position in first_seen]
    pairs, same = np.array([index[image] for image in images]).reshape(-1, 2), np.asarray(same, dtype=bool)
    identities, notes = connected(len(first_seen), pairs, same)
    contradicts = bool(notes)
    alone = int((pairs[:, 0] == pairs[:, 1]).sum())
    if alone:
        notes.append(f"{alone} of {len(pairs)} pairs are of a picture and itself")
    if repeated := len(pairs) - len(np.unique(np.sort(pairs, axis=1), axis=0)):
        notes.append(f"{repeated} of {len(pairs)} pairs are there before: folds and intervals count them anew")

    def decode(row: int) -> np.ndarray:
        return _decode(images[first_seen[row]], f"{path}: {names[row]}")

    # A damaged image is told now, not in the middle of an evaluation or a training.
    parts = faces.windows(range(len(first_seen)))
    for _ in faces.ordered_map(lambda part: [decode(row) for row in part], parts, utils.worker_count(workers)):
        pass
    return VerificationSet(
        name=path.stem,
        crops=LazyCrops(len(first_seen), decode),
        names=names,
        pairs=pairs,
        same=same,
        identities=None if contradicts else identities,
        notes=notes,
        folds=contiguous_folds(len(same), folds),
        sha256=utils.sha256_of(path),
        source={
            "bin": str(path),
            "images": len(images),
            "different_images": len(first_seen),
            "people_by_chains": True,
        },
    )


def contiguous_folds(pairs: int, folds: int) -> np.ndarray:
    """int64 [pairs]: folds one after the other, sizes differing by at most one, the larger ones first.

    The same cut as scikit-learn's KFold without shuffling, which the known readers of `.bin` files use.
    """
    folds = min(folds, pairs)
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def _decode(data: bytes, name: str) -> np.ndarray:
    """Encoded image -> uint8 RGB [112, 112, 3]; other square sizes are resized."""
    try:
        return read_crop(data, resize=True)
    except PhotoError as error:
        raise InputError(f"{name}: {error.reason}") from error
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
