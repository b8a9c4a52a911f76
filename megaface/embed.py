"""Crops of one side of a challenge -> a packed store of embeddings (length 1), restartable.

Crops are read and decoded by threads, a few batches ahead of the network, so that neither waits for the other; memory
is bounded by those batches. A crop that cannot be read, has another size, or for which the network gives nothing finite
has a row of NaN and a reason; the next run looks at it again, in case somebody has brought it back.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

import utils
from config import CROP_SIZE
from cropping.photos import PhotoError, read_photo
from embedding import Embedder, normalise
from megaface.features import Store, StoreWriter
from megaface.participants import Side

AHEAD = 3  # batches that are decoded before they are needed

Decoded = tuple[np.ndarray, dict[int, str]]


def embed(side: Side, folder: Path, embedder: Embedder, what: str, workers: int) -> Store:
    """Embeddings of all crops of a side, in its order; what is there already from an earlier run is kept."""
    settings = {"model": embedder.fingerprint, "crops": side.fingerprint}
    with StoreWriter(folder, side.names, embedder.dim, settings) as writer:
        _look_again(side, writer, embedder)
        with utils.progress(len(side), f"embedding {what}", initial=writer.done, unit="crop") as bar:
            for crops, problems in _read_ahead(side, writer.done, embedder.batch_size, workers):
                rows = _embeddings(embedder, crops, problems)
                writer.append(rows, problems)
                bar.update(len(rows))
        return writer.finish()


def _look_again(side: Side, writer: StoreWriter, embedder: Embedder) -> None:
    """Embed what could not be embedded in an earlier run and can be now."""
    rows = [row for row in sorted(writer.problems) if side.files[row] is not None]
    features: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), embedder.batch_size):
        part = rows[start : start + embedder.batch_size]
        crops, problems = _stack([_read(side, row) for row in part])
        for row, feature in zip(part, _embeddings(embedder, crops, problems), strict=True):
            features[row] = feature
        writer.problems |= {part[number]: reason for number, reason in problems.items()}
    writer.repair({row: feature for row, feature in features.items() if np.isfinite(feature).all()})


def _embeddings(embedder: Embedder, crops: np.ndarray, problems: dict[int, str]) -> np.ndarray:
    """float32 [k, d] of length 1; rows without a crop are NaN, and so are those for which `problems` gets a reason."""
    rows = np.full((len(crops), embedder.dim), np.nan, np.float32)
    there = np.array([row for row in range(len(crops)) if row not in problems], int)
    if len(there):
        rows[there] = normalise(embedder.features(crops[there]))
        for row in there[~np.isfinite(rows[there]).all(axis=1)]:
            problems[int(row)] = "the network gives no finite feature"
            rows[row] = np.nan
    return rows


def _read_ahead(side: Side, start: int, batch: int, workers: int) -> Iterator[Decoded]:
    """Batches of crops, uint8 RGB [k, 112, 112, 3], from number `start` on, in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[np.ndarray | str]]] = deque()
        for first in range(start, len(side), batch):
            rows = range(first, min(first + batch, len(side)))
            waiting.append([pool.submit(_read, side, row) for row in rows])
            if len(waiting) > AHEAD:
                yield _stack([future.result() for future in waiting.popleft()])
        while waiting:
            yield _stack([future.result() for future in waiting.popleft()])


def _stack(found: list["np.ndarray | str"]) -> Decoded:
    crops = np.zeros((len(found), CROP_SIZE, CROP_SIZE, 3), np.uint8)
    problems = {}
    for row, crop in enumerate(found):
        if isinstance(crop, str):
            problems[row] = crop
        else:
            crops[row] = crop
    return crops, problems


def _read(side: Side, row: int) -> "np.ndarray | str":
    """A crop, uint8 RGB, or why there is none."""
    if side.files[row] is None:
        return side.reasons[row]
    try:
        bgr = read_photo(side.folder / side.files[row], orient=False)
    except PhotoError as error:
        return f"crop: {error.reason}"
    height, width = bgr.shape[:2]
    if (height, width) != (CROP_SIZE, CROP_SIZE):
        return f"crop: {width}x{height} instead of {CROP_SIZE}x{CROP_SIZE}"
    return bgr[..., ::-1]
