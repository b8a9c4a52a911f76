"""Crops of one side of a challenge -> a packed store of embeddings (length 1), restartable.

Crops are read and decoded by threads, a few batches ahead of the network, so that neither waits for the other; memory
is bounded by those batches. A crop that cannot be read, has another size, or for which the network gives nothing finite
has a row of NaN and a reason; the next run looks at it again, in case somebody has brought it back. So it does with
crops that were changed since: a crop is recognised by its name, size and times of change, in nanoseconds.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import utils
from config import CROP_SIZE
from cropping.photos import PhotoError, read_crop
from embedding import Embedder, normalise
from megaface.features import CHUNK, Store, StoreWriter, is_finished, open_store, read_origins
from megaface.participants import Side
from processes import Shard
from utils import InputError

PART = 64 * CHUNK  # crops that a shard takes at a time
PARTS = "parts"
AHEAD = 3  # batches that are decoded before they are needed

Decoded = tuple[np.ndarray, dict[int, str]]


def embed(side: Side, folder: Path, embedder: Embedder, what: str, workers: int) -> Store:
    """Embeddings of all crops of a side, in its order; what is there already, from an earlier run or from shards, is
    kept."""
    with _writer(side, folder, embedder) as writer:
        _look_again(side, writer, embedder, what)
        with utils.progress(len(side), f"embedding {what}", initial=writer.done, unit="crop") as bar:
            for number in range(writer.done // PART, -(-len(side) // PART)):
                _take_over(writer, number, *_part(side, folder, number), embedder.dim, bar.update)
                _fill(side, writer, min((number + 1) * PART, len(side)), embedder, workers, bar.update)
        store = writer.finish()
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return store


def embed_share(side: Side, folder: Path, embedder: Embedder, what: str, workers: int, shard: Shard) -> int:
    """Embed a shard's parts of a side, then those of others that no process is working on; returns how many are left.

    Each part is a store of its own in FOLDER/parts, until `embed` puts them together. A machine that is lost leaves its
    part unlocked and its rows so far in it: whoever comes next goes on with it.
    """
    count = -(-len(side) // PART)
    with utils.progress(len(side), f"embedding {what}, shard {shard}", unit="crop") as bar:
        for number in sorted(range(count), key=lambda number: not shard.owns(number)):
            part, place = _part(side, folder, number)
            if not _is_there(side, folder, embedder) and not _is_there(part, place, embedder):
                with contextlib.suppress(utils.Busy), _writer(part, place, embedder) as writer:
                    _look_again(part, writer, embedder, what)
                    _fill(part, writer, len(part), embedder, workers, lambda rows: None)
                    writer.finish()
            bar.update(len(part))
    if _is_there(side, folder, embedder):
        return 0
    return sum(not _is_there(*_part(side, folder, number), embedder) for number in range(count))


def _settings(side: Side, embedder: Embedder) -> dict[str, Any]:
    return {"model": embedder.fingerprint, "crops": side.fingerprint}


def _writer(side: Side, folder: Path, embedder: Embedder) -> StoreWriter:
    return StoreWriter(folder, side.names, embedder.dim, _settings(side, embedder), origins(side))


def _is_there(side: Side, folder: Path, embedder: Embedder) -> bool:
    return is_finished(folder, side.names, embedder.dim, _settings(side, embedder))


def _part(side: Side, folder: Path, number: int) -> tuple[Side, Path]:
    """A part of a side and the folder of its store."""
    start, stop = number * PART, min((number + 1) * PART, len(side))
    part = dataclasses.replace(
        side,
        names=side.names[start:stop],
        ids=None if side.ids is None else side.ids[start:stop],
        files=side.files[start:stop],
        statuses=side.statuses[start:stop],
        reasons={row - start: reason for row, reason in side.reasons.items() if start <= row < stop},
    )
    return part, folder / PARTS / f"{number:06d}"


def _take_over(
    writer: StoreWriter, number: int, part: Side, place: Path, dimensions: int, advance: Callable[[int], object]
) -> None:
    """Append what a shard has embedded of a part, from the first row that is not there yet, if it is sound."""
    if not is_finished(place, part.names, dimensions, writer.settings):
        return
    try:
        store, made_from = open_store(place), read_origins(place, len(part))
    except (InputError, OSError):
        return  # damaged, and computed again
    start = writer.done - number * PART
    if np.array_equal(made_from, writer.origins[number * PART :][: len(part)]):
        problems = {row - start: reason for row, reason in store.problems.items() if row >= start}
        writer.append(store.features[start:], problems)
        advance(len(part) - start)


def _fill(
    side: Side, writer: StoreWriter, stop: int, embedder: Embedder, workers: int, advance: Callable[[int], object]
) -> None:
    """Append the rows up to `stop` that are not there yet."""
    for crops, problems in _read_ahead(side, writer.done, stop, embedder.batch_size, workers):
        rows = _embeddings(embedder, crops, problems)
        writer.append(rows, problems)
        advance(len(rows))


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


def _read_ahead(side: Side, start: int, stop: int, batch: int, workers: int) -> Iterator[Decoded]:
    """Batches of crops, uint8 RGB [k, 112, 112, 3], of the numbers `start` to `stop`, in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[np.ndarray | str]]] = deque()
        for first in range(start, stop, batch):
            rows = range(first, min(first + batch, stop))
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
