"""From loosely cropped photos and the landmarks of the list to the features of all images, streamed and kept.

Crops are cut by threads a few windows ahead of the network and are nowhere kept; features lie in a mapped file
(`formats.embeddings`), each row the feature of an image and that of its mirror image, with a checksum for every 256.
Its folder is named by what everything depends on: the model and how it is fed, the images and landmarks of the lists,
the sizes and times of the photos, the code that cuts. So another photo or model begins anew, the same command goes on
after a kill, and a second run computes nothing. Price: 4 KB an image at 512 dimensions, 1.9 GB for IJB-C.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import utils
from config import CROP_SIZE
from cropping import align, faces, photos
from cropping.align import AlignmentError, align_face
from cropping.photos import PhotoError, read_photo
from embedding import Embedder
from formats.embeddings import EmbeddingStore
from ijb.lists import Lists
from ijb.templates import ImageFeatures
from utils import InputError

FOLDER = "loose_crop"


def embed_images(
    lists: Lists, folder: Path, embedder: Embedder, cache: Path, workers: int | None = None
) -> tuple[ImageFeatures, dict[int, str]]:
    """Features of all images of `lists`, whose photos lie in `folder`, kept below `cache`; and why some have none.

    Images are numbered as in the lists. InputError if not a single one gives a feature.
    """
    plain = embedder.with_preprocessing(mirror=False)
    key = {
        "model": plain.fingerprint,
        "images": _hash("\0".join(lists.images).encode(), lists.landmarks.tobytes()),
        "photos": _stamps(lists, folder),
        "code": _hash(*(Path(module.__file__ or "").read_bytes() for module in (align, photos))),
    }
    place = cache / f"features-{_hash(repr(sorted(key.items())).encode())[:16]}"
    store = EmbeddingStore(place, key, len(lists.images), 2 * embedder.dim)
    todo = store.missing()
    if todo:
        numbers = [number for chunk in todo for number in store.numbers(chunk)]
        crops = _crops(lists, folder, numbers, workers)
        store.fill(todo, lambda part: _features(plain, crops, len(part)), f"{lists.subset}: features")
    rows = store.values()
    gone = {number: _reason(lists, folder, number) for number in np.flatnonzero(np.isnan(rows[:, 0])).tolist()}
    if len(gone) == len(rows):
        raise InputError(f"{folder}: not one of {len(rows)} images gives a feature; the first, {gone[0]}")
    return ImageFeatures.of_rows(rows, gone), gone


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _stamps(lists: Lists, folder: Path) -> str:
    """A hash of the size and time of every photo."""
    stamps = np.full((len(lists.images), 2), -1)
    for number, image in enumerate(lists.images):
        try:
            status = os.stat(folder / image)  # noqa: PTH116 - half a million of them
            stamps[number] = status.st_size, status.st_mtime_ns
        except OSError:  # missing: said later
            continue
    return _hash(stamps.tobytes())


def _crops(lists: Lists, folder: Path, numbers: list[int], workers: int | None) -> Iterator[np.ndarray | None]:
    """The crop of each image, uint8 RGB [112, 112, 3], or None, in order."""

    def cut(window: list[int]) -> list[np.ndarray | None]:
        return [_crop(lists, folder, number) for number in window]

    for window in faces.ordered_map(cut, faces.windows(numbers), utils.worker_count(workers)):
        yield from window


def _crop(lists: Lists, folder: Path, number: int) -> np.ndarray | None:
    try:
        # The landmarks refer to the pixels as they are stored.
        return align_face(read_photo(folder / lists.images[number], orient=False), lists.landmarks[number])[..., ::-1]
    except (PhotoError, AlignmentError):
        return None


def _reason(lists: Lists, folder: Path, number: int) -> str:
    """Why an image has no feature: its name and the reason."""
    image = lists.images[number]
    try:
        align_face(read_photo(folder / image, orient=False), lists.landmarks[number])
    except PhotoError as error:
        return f"{image}: {error.reason}"
    except AlignmentError as error:
        return f"{image}: not alignable: {error}"
    return f"{image}: the network gives no finite feature"


def _features(embedder: Embedder, crops: Iterator[np.ndarray | None], count: int) -> np.ndarray:
    """float32 [count, 2 D] of the next crops; rows of NaN where there is no crop or no finite feature."""
    rows = np.full((count, 2 * embedder.dim), np.nan, np.float32)
    batch = np.zeros((count, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    there = np.zeros(count, bool)
    for row in range(count):
        crop = next(crops)
        if crop is not None:
            batch[row], there[row] = crop, True
    if there.any():
        found = batch[there]
        rows[there] = np.hstack([embedder.features(found), embedder.features(found[:, :, ::-1])])
        rows[~np.isfinite(rows).all(axis=1)] = np.nan
    return rows


def read_features(path: Path, lists: Lists) -> tuple[ImageFeatures, dict[int, str]]:
    """Features made elsewhere: an .npz with arrays `embs` and `embs_f` [n, D], of the images and of their mirror
    images in the order of the lists. An image with a number that is not finite has no feature."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[name] for name in ("embs", "embs_f")]
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: has no array {error.args[0].split()[0]}; embs and embs_f are expected") from error
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        raise InputError(f"{path}: not an .npz file, or damaged") from error
    for name, array in zip(("embs", "embs_f"), arrays, strict=True):
        if array.dtype.kind != "f" or array.ndim != 2 or array.shape != arrays[0].shape or not array.size:
            raise InputError(f"{path}: {name} is {array.dtype} {array.shape}, not features [images, dimensions]")
        if len(array) != len(lists.images):
            raise InputError(f"{path}: {name} has {len(array)} rows, but the lists have {len(lists.images)} images")
    features = ImageFeatures.of_arrays(*arrays)
    if not features.there.any():
        raise InputError(f"{path}: not one row is finite")
    gone = np.flatnonzero(~features.there).tolist()
    return features, {number: f"{lists.images[number]}: a number that is not finite" for number in gone}
