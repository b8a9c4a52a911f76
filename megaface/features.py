"""Feature files: the devkit's `.bin`, one per photo, and a packed store, one array for all photos.

A `.bin` file is 16 bytes of header and 2 KB of numbers, and a million of them cost more to open than to score. So
features are kept packed: one `.npy` that is read memory-mapped, and a table of names beside it. The devkit's files are
read and written for those who have or need them.

Reading is three system calls a file straight into the result, by several threads when the disk is slow. A file that is
not exactly as expected is looked at again, slowly, to say what is wrong.

A store is a folder: `features.npy` (float32 [n, d]; a row of NaN has no feature), `names.jsonl` (for each row a line
of JSON: its name and, if it has no feature, why), `origins.u64` (for each row eight bytes that stand for what it was
made from) and `info.json` (what made all of it, and a checksum for each `CHUNK` of rows, over that, the origins and the
features). While it is written the array is `features.partial` and `progress.json` says how many rows are safe;
`features.npy` appears when all are, so it is never half full. A killed run goes on from the last row that was safe.
Nothing is given out whose checksum does not fit: a writer computes the rows of such a chunk again, and those whose
origin has changed since. Price of that safety: an fsync every few seconds, and a second per two gigabytes to check.
"""

import contextlib
import hashlib
import json
import os
import stat
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

import utils
from utils import InputError

HEADER = struct.Struct("<4i")  # rows, columns, bytes per row, type
TYPES: dict[int, np.dtype[Any]] = {5: np.dtype("<f4"), 6: np.dtype("<f8")}  # OpenCV's CV_32F and CV_64F
LARGEST = 1 << 20  # more numbers than that are no feature
READERS = 8  # threads: enough to keep a disk or a network file system busy
FILES_PER_TASK = 256
SLOW_FILE = 1e-4  # seconds; one that is cached takes a tenth of it
COMMIT_SECONDS = 5.0
STORE_FORMAT = "face-features-2"
CHUNK = 256  # rows under one checksum: what is computed again when a bit has flipped
IDENTITY = ("format", "names_sha256", "dimensions", "settings")  # of info.json: what makes a store another

# ---------------------------------------------------------------------------------------------- .bin files


def bin_bytes(matrix: np.ndarray) -> bytes:
    """A vector [d] (as a column) or matrix [rows, columns] in the devkit's format, float32."""
    matrix = np.ascontiguousarray(matrix, "<f4")
    rows, columns = (len(matrix), 1) if matrix.ndim == 1 else matrix.shape
    return HEADER.pack(rows, columns, 4 * columns, 5) + matrix.tobytes()


def write_feature(path: str | Path, feature: np.ndarray) -> None:
    """Write one feature [d] for the devkit, whole or not at all."""
    utils.write_bytes(path, bin_bytes(feature))


def read_feature(path: str | Path) -> np.ndarray:
    """One feature [d], float32 or float64 as stored; `InputError` naming the file and what is wrong with it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a pipe would be waited for
        raise InputError(f"{path}: not a file")
    with open(path, "rb") as file:
        data = file.read(HEADER.size + 16 * LARGEST)
    if len(data) < HEADER.size:
        raise InputError(f"{path}: {'empty' if not data else f'truncated, {len(data)} bytes'}, not a feature file")
    rows, columns, stride, kind = HEADER.unpack_from(data)
    if kind not in TYPES:
        if 0 <= kind < 32:  # those that OpenCV has
            raise InputError(f"{path}: type {kind}, neither 5 (float32) nor 6 (float64)")
        raise InputError(f"{path}: not a feature file")
    numbers = TYPES[kind]
    if min(rows, columns) != 1 or not 0 < rows * columns <= LARGEST or stride < columns * numbers.itemsize:
        raise InputError(f"{path}: {rows} rows of {columns} numbers, {stride} bytes apart, are not a feature")
    payload = len(data) - HEADER.size
    if payload != rows * stride:
        what = "truncated" if payload < rows * stride else "too long"
        raise InputError(f"{path}: {what}, {payload} bytes of numbers instead of {rows * stride}")
    if stride % numbers.itemsize:
        raise InputError(f"{path}: rows {stride} bytes apart do not hold whole numbers")
    return np.frombuffer(data, numbers, offset=HEADER.size).reshape(rows, -1)[:, :columns].ravel()


@dataclass(frozen=True)
class _Problem:
    """Why a file cannot be used. `order` sorts missing files before damaged ones, as a user would look for them."""

    order: int
    path: str
    reason: str


def read_features(
    paths: Sequence[str], *, dimensions: int | None = None, advance: Callable[[int], object] = lambda files: None
) -> np.ndarray:
    """The features of many files, float32 [n, d]; float64 is rounded to float32.

    All have to be there, whole, finite and of `dimensions` numbers (None: as many as most of the first three that can
    be read);
    otherwise `InputError` names the first that is not, missing files before damaged ones, and says how many there are.
    `advance` is called with numbers of files.
    """
    if dimensions is None:
        dimensions = _usual_dimensions(paths)
    features = np.empty((len(paths), dimensions), "<f4")
    reader = _Reader(paths, features, dimensions)
    for start, problems in reader.tasks():
        reader.problems += problems
        advance(min(FILES_PER_TASK, len(paths) - start))
    if reader.problems:
        first = min(reader.problems, key=lambda problem: problem.order)
        others = len(reader.problems) - 1
        more = f" (and {others} more of {len(paths)} feature files cannot be used)" if others else ""
        raise InputError(f"{first.path}: {first.reason}{more}")
    return features


def _usual_dimensions(paths: Sequence[str]) -> int:
    found: list[int] = []
    for path in paths:
        with contextlib.suppress(InputError, OSError):
            found.append(len(read_feature(path)))
        if len(found) == 3:  # so that one wrong file, even the first, is the one that is named
            break
    return statistics.mode(found) if found else 1  # none can be read: the reader will say why


class _Reader:
    def __init__(self, paths: Sequence[str], features: np.ndarray, dimensions: int) -> None:
        self.paths, self.features, self.dimensions = paths, features, dimensions
        self.header = HEADER.pack(dimensions, 1, 4, 5)
        self.problems: list[_Problem] = []

    def tasks(self) -> Iterator[tuple[int, list[_Problem]]]:
        """Read everything, a task at a time: (start, problems).

        One thread as long as the files are in the page cache: several would only take the interpreter's lock from each
        other (six times as long). Many as soon as the disk is what everybody waits for.
        """
        starts = iter(range(0, len(self.paths), FILES_PER_TASK))
        for start in starts:
            began = time.perf_counter()
            problems = self.read(start)
            slow = time.perf_counter() - began > SLOW_FILE * FILES_PER_TASK
            yield start, problems
            if slow:
                break
        rest = list(starts)
        pool = ThreadPoolExecutor(READERS)
        try:
            yield from zip(rest, pool.map(self.read, rest), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, start: int) -> list[_Problem]:
        """Read a task's files into their rows; returns those that cannot be used."""
        rows = range(start, min(start + FILES_PER_TASK, len(self.paths)))
        problems = [problem for row in rows if (problem := self._read_row(row)) is not None]
        damaged = {problem.path for problem in problems}
        bad = ~np.isfinite(self.features[rows.start : rows.stop]).all(axis=1)
        not_finite = [self.paths[rows.start + i] for i in np.flatnonzero(bad).tolist()]
        return problems + [_Problem(1, path, "holds NaN or inf") for path in not_finite if path not in damaged]

    def _read_row(self, row: int) -> _Problem | None:
        path = self.paths[row]
        header, extra = bytearray(HEADER.size), bytearray(1)
        values = memoryview(self.features[row]).cast("B")
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                count = os.readv(handle, [header, values, extra])
            finally:
                os.close(handle)
            if count == len(header) + len(values) and header == self.header:
                return None
            feature = read_feature(path)
        except FileNotFoundError:
            return _Problem(0, path, "missing")
        except OSError as error:
            return _Problem(0, path, error.strerror or str(error))
        except InputError as error:
            return _Problem(1, path, str(error).removeprefix(f"{path}: "))
        if len(feature) != self.dimensions:
            return _Problem(1, path, f"{len(feature)} dimensions instead of {self.dimensions}")
        with np.errstate(over="ignore"):  # an overflow shows as inf
            self.features[row] = feature
        return None


def write_features(
    paths: Sequence[str | Path], features: np.ndarray, advance: Callable[[int], object] = lambda files: None
) -> None:
    """Write features [n, d] as one `.bin` file each; folders are made."""
    for folder in {os.path.dirname(path) for path in paths}:  # noqa: PTH120 - millions of paths
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103

    def write(start: int) -> int:
        rows = range(start, min(start + FILES_PER_TASK, len(paths)))
        for row in rows:
            # Not fsynced one by one: a million of them would take hours. What is renamed is whole but for power cuts.
            temporary = f"{paths[row]}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                file.write(bin_bytes(features[row]))
            os.replace(temporary, paths[row])
        return len(rows)

    with ThreadPoolExecutor(READERS) as pool:
        for count in pool.map(write, range(0, len(paths), FILES_PER_TASK)):
            advance(count)


def write_matrix(path: str | Path, rows: int, columns: int, blocks: Iterable[np.ndarray]) -> None:
    """Write a score matrix [rows, columns] in the devkit's format from consecutive blocks of rows."""
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(HEADER.pack(rows, columns, 4 * columns, 5))
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)


# ---------------------------------------------------------------------------------------------- packed store


@dataclass(frozen=True)
class Store:
    """A finished store: `features` float32 [n, d], memory-mapped; `names` [n]; `problems`, why a row is NaN."""

    folder: Path
    names: list[str]
    features: np.ndarray
    problems: dict[int, str]
    settings: dict[str, Any]


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of a list of names, in order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def open_store(folder: str | Path) -> Store:
    """Open a finished store; `InputError` naming the file that is missing, damaged or does not fit the others."""
    folder = Path(folder)
    store, info = _open_unchecked(folder)
    origins = read_origins(folder, len(store.names))
    damaged = _damaged_chunks(info, info["checksums"], origins, store.features)
    if damaged:
        first = damaged[0] * CHUNK
        raise InputError(f"{folder / 'features.npy'}: damaged from row {first} on, the checksum does not fit")
    return store


def is_finished(folder: Path, names: Sequence[str], dimensions: int, settings: dict[str, Any]) -> bool:
    """Whether a store of these names and settings is there with all its rows; the rows themselves are not looked at."""
    try:
        info = _open_unchecked(folder)[1]
    except (InputError, OSError):
        return False
    return {key: info.get(key) for key in IDENTITY} == _identity(names, dimensions, settings)


def _identity(names: Sequence[str], dimensions: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": STORE_FORMAT,
        "names_sha256": names_hash(names),
        "dimensions": dimensions,
        "settings": settings,
    }


def _open_unchecked(folder: Path) -> tuple[Store, dict[str, Any]]:
    """A finished store and its info.json, whose parts fit together; the features themselves are not looked at."""
    path = folder / "info.json"
    info = _read_json(path)
    if info.get("format") != STORE_FORMAT:
        raise InputError(f"{path}: not of a store of features ({STORE_FORMAT})")
    rows, dimensions, checksums = (info.get(key) for key in ("rows", "dimensions", "checksums"))
    if not _is_count(rows) or not _is_count(dimensions) or not isinstance(info.get("settings"), dict):
        raise InputError(f"{path}: damaged, does not say how many rows and dimensions there are and what made them")
    if not _are_checksums(checksums, rows):
        raise InputError(f"{path}: damaged, does not hold a checksum for each {CHUNK} rows")
    try:
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{folder / 'features.npy'}: damaged: {error}") from error
    if not isinstance(features, np.ndarray) or features.shape != (rows, dimensions) or features.dtype != np.float32:
        found = f"{features.dtype} {features.shape}" if isinstance(features, np.ndarray) else "an archive"
        raise InputError(f"{folder / 'features.npy'}: {found} does not fit info.json")
    path = folder / "names.jsonl"
    try:
        names, reasons = zip(*map(utils.parse_json, utils.read_bytes(path).splitlines()), strict=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not all(isinstance(text, str) for text in (*names, *reasons)):
        raise InputError(f"{path}: damaged: not texts")
    if len(names) != rows or names_hash(names) != info.get("names_sha256"):
        raise InputError(f"{path}: does not fit info.json")
    problems = {row: reason for row, reason in enumerate(reasons) if reason}
    return Store(folder, list(names), features, problems, info["settings"]), info


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_checksums(value: object, rows: int) -> bool:
    """Whether a JSON value is a list of texts, one for each chunk of so many rows."""
    return isinstance(value, list) and len(value) == -(-rows // CHUNK) and all(isinstance(one, str) for one in value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = utils.read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what a store of features holds")
    return content


def read_origins(folder: Path, rows: int) -> np.ndarray:
    """uint64 [rows]: what stands for the source of each row of a store."""
    data = utils.read_bytes(folder / "origins.u64")
    if len(data) < 8 * rows:
        raise InputError(f"{folder / 'origins.u64'}: truncated, {len(data)} bytes for {rows} rows")
    return np.frombuffer(data, "<u8", rows)


def _checksum(info: dict[str, Any], origins: np.ndarray, rows: np.ndarray) -> str:
    """Of a chunk: what made it (`info` as in info.json), the origins uint64 [k] and the features float32 [k, d]."""
    key = json.dumps([info[name] for name in IDENTITY], sort_keys=True)
    digest = hashlib.sha256(key.encode())
    digest.update(np.ascontiguousarray(origins, "<u8").data)
    digest.update(np.ascontiguousarray(rows, "<f4").data)
    return digest.hexdigest()[:32]


def _damaged_chunks(info: dict[str, Any], checksums: list[str], origins: np.ndarray, rows: np.ndarray) -> list[int]:
    """The numbers of the chunks whose checksum does not fit."""
    damaged = []
    for number, wanted in enumerate(checksums):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        if _checksum(info, origins[part], rows[part]) != wanted:
            damaged.append(number)
    return damaged


class StoreWriter:
    """Writes a store row by row, from where an interrupted run with the same names and settings stopped.

    Use as a context manager; `done` is how many rows are there already, `append` adds the next ones, `finish` makes
    the store readable. `stale` are rows that are there, but damaged or made from something else than what `origins`
    says now: they have to be given to `replace` before anything is appended or finished. Leaving without `finish` keeps
    what was written for the next run.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        dimensions: int,
        settings: dict[str, Any],
        origins: np.ndarray | None = None,
    ) -> None:
        """`settings` (plain JSON) is all that the features depend on besides the names and what `origins` uint64 [n]
        stand for, which are equal for equal sources of a row (None: all are)."""
        self.folder, self.names, self.dimensions, self.settings = Path(folder), names, dimensions, settings
        self.origins = np.zeros(len(names), "<u8") if origins is None else np.asarray(origins, "<u8")
        self.done = 0
        self.problems: dict[int, str] = {}
        self.stale: list[int] = []
        self.damaged = 0  # rows among them that did not fit their checksum
        self._identity = _identity(names, dimensions, settings)
        self._checksums: list[str] = []
        self._kept = np.empty(0, "<u8")  # the origins that stand in origins.u64
        self._tail = np.empty((0, dimensions), "<f4")  # rows of the last chunk, which is not full
        self._file: BinaryIO | None = None
        self._stack = contextlib.ExitStack()  # holds the lock
        self._committed = time.monotonic()

    @property
    def _partial(self) -> Path:
        return self.folder / "features.partial"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"

    def __enter__(self) -> "StoreWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(
            utils.locked(self.folder / ".lock", f"{self.folder}: another process is writing here")
        )
        if not self._open_finished():
            for old in ("info.json", "features.npy", "names.jsonl"):
                (self.folder / old).unlink(missing_ok=True)
            self._resume()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._commit()
            self._file.close()
            self._file = None
        self._stack.close()

    # ------------------------------------------------------------------------------------------ what is there

    def _open_finished(self) -> bool:
        """Take over a finished store of the same names and settings."""
        try:
            store, info = _open_unchecked(self.folder)
            origins = read_origins(self.folder, len(store.names))
        except (InputError, OSError):
            return False
        if not self._is_mine(info):
            return False
        self.done, self.problems = len(store.names), store.problems
        self._take_over(info["checksums"], origins, store.features)
        return True

    def _resume(self) -> None:
        """Open the partial array behind its last safe row, or start a new one."""
        head, rows = self._head(), 0
        checksums: list[str] = []
        problems: dict[int, str] = {}
        try:
            progress = _read_json(self._progress)
            if self._is_mine(progress):
                rows, checksums, problems = _read_progress(self._progress, progress, len(self.names))
                kept = read_origins(self.folder, rows)
                if self._partial.stat().st_size < len(head) + rows * 4 * self.dimensions:
                    rows = 0
        except (InputError, OSError):
            rows = 0
        self._file = open(self._partial, "r+b" if rows else "wb")  # noqa: SIM115 - closed by __exit__
        if rows:
            self.done, self.problems = rows, problems
            there = np.memmap(self._partial, "<f4", "r", len(head), (rows, self.dimensions))
            self._take_over(checksums, kept, there)
        else:
            self._file.write(head)
        self._file.seek(len(head) + self.done * 4 * self.dimensions)
        self._file.truncate()

    def _is_mine(self, info: dict[str, Any]) -> bool:
        return {key: info.get(key) for key in IDENTITY} == self._identity

    def _take_over(self, checksums: list[str], origins: np.ndarray, rows: np.ndarray) -> None:
        """Find what is stale among the rows that are there."""
        self._checksums, self._kept = list(checksums), np.array(origins)
        stale = origins != self.origins[: self.done]
        damaged = np.zeros(self.done, bool)
        for number in _damaged_chunks(self._identity, checksums, origins, rows):
            damaged[number * CHUNK : (number + 1) * CHUNK] = True
        self.stale, self.damaged = np.flatnonzero(stale | damaged).tolist(), int(damaged.sum())
        self._read_tail(rows)

    def _read_tail(self, rows: np.ndarray) -> None:
        self._tail = np.array(rows[self.done // CHUNK * CHUNK : self.done], "<f4")

    def _head(self) -> bytes:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), self.dimensions)}
        text = str(header).encode()
        text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    # ------------------------------------------------------------------------------------------ what is written

    def append(self, rows: np.ndarray, problems: dict[int, str] | None = None) -> None:
        """Add features [k, d]; `problems` says why rows of it (0 is the first of these) have none, and are NaN."""
        if self._file is None or self.stale:
            raise ValueError("a finished store, or one with stale rows")
        for row, reason in (problems or {}).items():
            self.problems[self.done + row] = reason
        rows = np.ascontiguousarray(rows, "<f4")
        self._file.write(rows.data)
        first = self.done - len(self._tail)
        self._tail = np.concatenate([self._tail, rows])
        self.done += len(rows)
        del self._checksums[first // CHUNK :]
        while len(self._tail) >= CHUNK:
            self._checksums.append(self._sum(first, self._tail[:CHUNK]))
            first, self._tail = first + CHUNK, self._tail[CHUNK:]
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def _sum(self, first: int, rows: np.ndarray) -> str:
        return _checksum(self._identity, self.origins[first : first + len(rows)], rows)

    def replace(self, features: dict[int, np.ndarray], problems: dict[int, str] | None = None) -> None:
        """Put features [d] in the place of rows that are there: stale ones, or such as had a problem; `problems` says
        why a row has none, and is NaN.

        A finished store becomes an unfinished one that lacks no row. What a kill leaves half replaced does not fit its
        checksum, and is stale for the next run.
        """
        if not features:
            return
        self._reopen()
        assert self._file is not None
        size, start = 4 * self.dimensions, len(self._head())
        for row, feature in features.items():
            self._file.seek(start + row * size)
            self._file.write(np.ascontiguousarray(feature, "<f4").data)
            self.problems.pop(row, None)
            self._kept[row] = self.origins[row]
        self.problems |= problems or {}
        self._file.flush()
        replaced = set(features)
        self.stale = [row for row in self.stale if row not in replaced]
        there = np.memmap(self._partial, "<f4", "r", start, (self.done, self.dimensions))
        for number in {row // CHUNK for row in features}:
            part = slice(number * CHUNK, (number + 1) * CHUNK)
            still = [row for row in self.stale if part.start <= row < part.stop]
            # As long as others of it are stale, a chunk is none that fits.
            sound = "" if still else _checksum(self._identity, self._kept[part], there[part])
            self._checksums[number : number + 1] = [sound]
        self._read_tail(there)
        self._file.seek(0, os.SEEK_END)
        self._commit()

    def _reopen(self) -> None:
        """Make a finished store an unfinished one."""
        if self._file is not None:
            return
        self._write_progress()
        os.replace(self.folder / "features.npy", self._partial)
        for old in ("info.json", "names.jsonl"):
            (self.folder / old).unlink(missing_ok=True)
        self._file = open(self._partial, "r+b")  # noqa: SIM115 - closed by __exit__

    def _commit(self) -> None:
        """Make all rows so far safe, then say so."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._write_progress()
        self._committed = time.monotonic()

    def _write_progress(self) -> None:
        full = self.done // CHUNK
        if len(self._tail) and len(self._checksums) == full:  # else it is that of stale rows
            self._checksums.append(self._sum(full * CHUNK, self._tail))
        self._kept = np.concatenate([self._kept, self.origins[len(self._kept) : self.done]])
        with utils.atomic_path(self.folder / "origins.u64") as temporary:
            temporary.write_bytes(self._kept.tobytes())
        problems = {str(row): reason for row, reason in self.problems.items()}
        said = {"rows": self.done, "checksums": self._checksums, "problems": problems}
        utils.write_json(self._progress, {**self._identity, **said})

    def finish(self) -> Store:
        """Check that all rows are there and make the store readable."""
        if self.done != len(self.names) or self.stale:
            raise ValueError(f"{self.done} of {len(self.names)} rows, {len(self.stale)} of them stale")
        if self._file is not None:
            self._commit()
            self._file.close()
            self._file = None
            # Names that are not UTF-8 survive as escapes of lone surrogates.
            lines = (json.dumps([name, self.problems.get(row, "")]) + "\n" for row, name in enumerate(self.names))
            utils.write_text(self.folder / "names.jsonl", "".join(lines))
            info = {**self._identity, "rows": self.done, "checksums": self._checksums}
            utils.write_json(self.folder / "info.json", info)
            os.replace(self._partial, self.folder / "features.npy")
            utils.fsync_directory(self.folder)
        self._progress.unlink(missing_ok=True)
        return _open_unchecked(self.folder)[0]  # its checksums were compared or computed above


def _read_progress(path: Path, progress: dict[str, Any], most: int) -> tuple[int, list[str], dict[int, str]]:
    """Rows, checksums and problems of an unfinished store; `InputError` if it does not say that."""
    rows, checksums, problems = (progress.get(key) for key in ("rows", "checksums", "problems"))
    if not _is_count(rows) or rows > most or not _are_checksums(checksums, rows) or not isinstance(problems, dict):
        raise InputError(f"{path}: damaged")
    try:
        return rows, list(checksums or []), {int(row): str(reason) for row, reason in problems.items()}
    except ValueError as error:
        raise InputError(f"{path}: damaged") from error
