"""From loosely cropped photos and the landmarks of the list to the features of all images, streamed and kept.

Crops are cut by threads a few windows ahead of the network and are nowhere kept; features lie in a mapped file
(`formats.embeddings`), each row the feature of an image and that of its mirror image, with a checksum for every 256.
Its folder is named by what everything depends on: the model and how it is fed, the images and landmarks of the lists,
the sizes and times of the photos, the code that cuts. So another photo or model begins anew, the same command goes on
after a kill, and a second run computes nothing. Price: 4 KB an image at 512 dimensions, 1.9 GB for IJB-C.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import utils
from config import CROP_SIZE
from cropping import align, faces, photos
from cropping.align import AlignmentError, align_face
from cropping.contents import stamps
from cropping.photos import PhotoError, read_photo
from embedding import Embedder
from formats.embeddings import EmbeddingStore
from ijb.lists import Lists
from ijb.templates import ImageFeatures
from utils import InputError

FOLDER = "loose_crop"

Cut = tuple[np.ndarray | None, Sequence[float]]  # a crop uint8 RGB [112, 112, 3], or None, and remarks on it


def embed_images(
    lists: Lists, folder: Path, embedder: Embedder, cache: Path, workers: int | None = None
) -> tuple[ImageFeatures, dict[int, str]]:
    """Features of all images of `lists`, whose photos lie in `folder`, kept below `cache`; and why some have none.

    Images are numbered as in the lists. InputError if not a single one gives a feature.
    """
    files = [folder / image for image in lists.images]

    def cut(window: Sequence[int]) -> list[Cut]:
        return [(cut_image(lists, folder, number), ()) for number in window]

    code = {"landmarks": _hash(lists.landmarks.tobytes()), "code": code_key(align, photos)}
    rows = embed_all(files, cut, code, embedder, cache, lists.subset, workers)
    gone = {number: _reason(lists, folder, number) for number in np.flatnonzero(np.isnan(rows[:, 0])).tolist()}
    return ImageFeatures.of_rows(rows, gone), gone


def embed_all(
    files: Sequence[Path],
    cut: Callable[[Sequence[int]], list[Cut]],
    way: dict[str, Any],
    embedder: Embedder,
    cache: Path,
    name: str,
    workers: int | None = None,
    remarks: int = 0,
) -> np.ndarray:
    """float32 [n, 2 D + remarks], mapped: each file's feature, that of its mirror image, and the numbers that `cut`
    remarked on its crop. Rows of NaN have no crop or no finite feature; InputError if no other is there.

    `cut` takes numbers of files to crops and is called by several threads; `way` (JSON) is what it depends on besides
    the files.
    """
    plain = embedder.with_preprocessing(mirror=False)
    key = {"model": plain.fingerprint, "files": stamps(files), **way}
    place = cache / f"features-{_hash(repr(sorted(key.items())).encode())[:16]}"
    store = EmbeddingStore(place, key, len(files), 2 * embedder.dim + remarks)
    todo = store.missing()
    if todo:
        numbers = [number for chunk in todo for number in store.numbers(chunk)]
        windows = faces.ordered_map(
            cut, faces.windows(numbers, path_of=lambda number: files[number]), utils.worker_count(workers)
        )
        crops = (crop for window in windows for crop in window)
        store.fill(todo, lambda part: _features(plain, crops, len(part), store.dim), f"{name}: features")
    rows = store.values()
    if np.isnan(rows[:, 0]).all():
        raise InputError(f"{files[0]}: neither this nor any of {len(files)} images gives a feature")
    return rows


def code_key(*modules: ModuleType) -> list[Any]:
    """What stands for the code that cuts: a hash of the modules, versions of the libraries."""
    libraries = utils.versions("opencv-python", "opencv-python-headless", "pillow")
    return [utils.code_sha256(*(module.__file__ for module in modules)), libraries]


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def cut_image(lists: Lists, folder: Path, number: int) -> np.ndarray | None:
    """The crop of an image by the landmarks of the lists, uint8 RGB [112, 112, 3]; None where it has none."""
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


def _features(embedder: Embedder, crops: Iterator[Cut], count: int, width: int) -> np.ndarray:
    """float32 [count, width] of the next crops; rows of NaN where there is no crop or no finite feature."""
    rows = np.full((count, width), np.nan, np.float32)
    numbers = 2 * embedder.dim
    batch = np.zeros((count, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    there = np.zeros(count, bool)
    for row in range(count):
        crop, rows[row, numbers:] = next(crops)
        if crop is not None:
            batch[row], there[row] = crop, True
    if there.any():
        found = batch[there]
        rows[there, :numbers] = np.hstack([embedder.features(found), embedder.features(found[:, :, ::-1])])
    rows[~np.isfinite(rows).all(axis=1)] = np.nan
    return rows


def read_features(path: Path, lists: Lists) -> tuple[ImageFeatures, dict[int, str]]:
    """Features made elsewhere: an .npz with arrays `embs` and `embs_f` [n, D], of the images and of their mirror
    images in the order of the lists. An image with a number that is not finite, or beyond 1e18, has no feature."""
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
        raise InputError(f"{path}: not one row is finite and below 1e18")
    gone = np.flatnonzero(~features.there).tolist()
    return features, {number: f"{lists.images[number]}: a number that is not finite, or beyond 1e18" for number in gone}
