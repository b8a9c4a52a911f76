"""Crops of one side of a challenge -> a packed store of embeddings (length 1), restartable.

Crops are read and decoded by threads, a few batches ahead of the network, so that neither waits for the other; memory
is bounded by those batches. A crop that cannot be read, has another size, or for which the network gives nothing finite
has a row of NaN and a reason; the next run looks at it again, in case somebody has brought it back. So it does with
crops that were changed since: a crop is recognised by its name, size and times of change, in nanoseconds.
"""

import contextlib
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

import utils
from config import CROP_SIZE
from cropping.photos import PhotoError, read_crop
from embedding import Embedder, normalise
from megaface.features import CHUNK, Store, StoreWriter
from megaface.participants import Side

AHEAD = 3  # batches that are decoded before they are needed

Decoded = tuple[np.ndarray, dict[int, str]]


def embed(side: Side, folder: Path, embedder: Embedder, what: str, workers: int) -> Store:
    """Embeddings of all crops of a side, in its order; what is there already from an earlier run is kept."""
    settings = {"model": embedder.fingerprint, "crops": side.fingerprint}
    with StoreWriter(folder, side.names, embedder.dim, settings, origins(side)) as writer:
        _look_again(side, writer, embedder, what)
        with utils.progress(len(side), f"embedding {what}", initial=writer.done, unit="crop") as bar:
            for crops, problems in _read_ahead(side, writer.done, embedder.batch_size, workers):
                rows = _embeddings(embedder, crops, problems)
                writer.append(rows, problems)
                bar.update(len(rows))
        return writer.finish()


def origins(side: Side) -> np.ndarray:
    """uint64 [n]: what each crop is recognised by, 0 where there is none. A file of the same name, size and times of
    change (of its contents, which tools can set, and of its status, which the system keeps) counts as the same."""
    found = np.zeros(len(side), np.uint64)
    for row, file in enumerate(side.files):
        if file is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(side.folder / file)  # noqa: PTH116 - a million of them
            text = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
            digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            found[row] = int.from_bytes(digest, "little")
    return found


def _look_again(side: Side, writer: StoreWriter, embedder: Embedder, what: str) -> None:
    """Embed what changed or was damaged since an earlier run, and what could not be embedded then and can be now."""
    if writer.damaged:
        print(
            f"{writer.folder}: {writer.damaged} stored features are damaged; they are computed again", file=sys.stderr
        )
    stale = set(writer.stale)
    rows = sorted(stale | {row for row in writer.problems if side.files[row] is not None})
    if not rows:
        return
    together = max(CHUNK, embedder.batch_size)
    with utils.progress(len(rows), f"embedding {what} again", unit="crop") as bar:
        for start in range(0, len(rows), together):
            part = rows[start : start + together]
            crops, problems = _stack([_read(side, row) for row in part])
            features = _embeddings(embedder, crops, problems)
            reasons = {part[number]: reason for number, reason in problems.items()}
            # A row that still has its problem is only said to have it, lest a finished store be opened for it.
            wanted = {row: features[number] for number, row in enumerate(part) if row in stale or row not in reasons}
            writer.problems |= reasons
            writer.replace(wanted, {row: reason for row, reason in reasons.items() if row in wanted})
            bar.update(len(part))


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
    file = side.files[row]
    if file is None:
        return side.reasons[row]
    try:
        return read_crop(side.folder / file)
    except PhotoError as error:
        return f"crop: {error.reason}"
    except ValueError as error:
        return f"crop: {error}"
