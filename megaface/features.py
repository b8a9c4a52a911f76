"""Feature files: the devkit's `.bin`, one per photo, and a packed store, one array for all photos.

A `.bin` file is 16 bytes of header and 2 KB of numbers, and a million of them cost more to open than to score. So
features are kept packed: one `.npy` that is read memory-mapped, and a table of names beside it. The devkit's files are
read and written for those who have or need them.

Reading is three system calls a file straight into the result, by several threads when the disk is slow. A file that is
not exactly as expected is looked at again, slowly, to say what is wrong.

A store is a folder: `features.npy` (float32 [n, d]; a row of NaN has no feature), `names.jsonl` (for each row a line
of JSON: its name and, if it has no feature, why), `info.json` (what made it). While it is written the array is
`features.partial` and `progress.json` says how many rows are safe; `features.npy` appears when all are, so it is never
half full. A killed run goes on from the last row that was safe. Price of that safety: an fsync every few seconds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import utils
from utils import InputError

HEADER = struct.Struct("<4i")  # rows, columns, bytes per row, type
TYPES = {5: np.dtype("<f4"), 6: np.dtype("<f8")}  # OpenCV's CV_32F and CV_64F
LARGEST = 1 << 20  # more numbers than that are no feature
READERS = 8  # threads: enough to keep a disk or a network file system busy
FILES_PER_TASK = 256
SLOW_FILE = 1e-4  # seconds; one that is cached takes a tenth of it
COMMIT_SECONDS = 5.0
STORE_FORMAT = "face-features-1"

# ---------------------------------------------------------------------------------------------- .bin files


def bin_bytes(matrix: np.ndarray) -> bytes:
    """A vector [d] (as a column) or matrix [rows, columns] in the devkit's format, float32."""
    matrix = np.ascontiguousarray(matrix, "<f4")
    rows, columns = (len(matrix), 1) if matrix.ndim == 1 else matrix.shape
    return HEADER.pack(rows, columns, 4 * columns, 5) + matrix.tobytes()


def write_bin(path: str | Path, feature: np.ndarray) -> None:
    """Write one feature [d] for the devkit, whole or not at all."""
    utils.write_bytes(path, bin_bytes(feature))


def read_bin(path: str | Path) -> np.ndarray:
    """One feature [d], float32 or float64 as stored; `InputError` naming the file and what is wrong with it."""
    with open(path, "rb") as file:
        data = file.read(HEADER.size + 16 * LARGEST)
    if len(data) < HEADER.size:
        raise InputError(f"{path}: {'empty' if not data else f'truncated, {len(data)} bytes'}, not a feature file")
    rows, columns, stride, kind = HEADER.unpack_from(data)
    if kind not in TYPES:
        raise InputError(f"{path}: type {kind}, neither 5 (float32) nor 6 (float64)")
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


def read_bins(
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
            found.append(len(read_bin(path)))
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
        not_finite = [self.paths[rows.start + i] for i in np.flatnonzero(bad)]
        return problems + [_Problem(1, path, "holds NaN or inf") for path in not_finite if path not in damaged]

    def _read_row(self, row: int) -> _Problem | None:
        path = self.paths[row]
        header, extra = bytearray(HEADER.size), bytearray(1)
        values = memoryview(self.features[row]).cast("B")
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                count = os.readv(handle, [header, values, extra])
            finally:
                os.close(handle)
            if count == len(header) + len(values) and header == self.header:
                return None
            feature = read_bin(path)
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


def write_bins(
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
    """Open a finished store; `InputError` naming the file that is missing or does not fit the others."""
    folder = Path(folder)
    info = _read_json(folder / "info.json")
    if info.get("format") != STORE_FORMAT:
        raise InputError(f"{folder / 'info.json'}: not of a store of features ({STORE_FORMAT})")
    try:
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{folder / 'features.npy'}: damaged: {error}") from error
    if features.shape != (info["rows"], info["dimensions"]) or features.dtype != np.float32:
        raise InputError(f"{folder / 'features.npy'}: {features.dtype} {features.shape} does not fit info.json")
    try:
        names, reasons = zip(*map(json.loads, (folder / "names.jsonl").read_bytes().splitlines()), strict=True)
    except ValueError as error:
        raise InputError(f"{folder / 'names.jsonl'}: damaged: {error}") from error
    if names_hash(names) != info["names_sha256"]:
        raise InputError(f"{folder / 'names.jsonl'}: does not fit info.json")
    problems = {row: reason for row, reason in enumerate(reasons) if reason}
    return Store(folder, list(names), features, problems, info["settings"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not what a store of features holds")
    return content


class StoreWriter:
    """Writes a store row by row, from where an interrupted run with the same names and settings stopped.

    Use as a context manager; `done` is how many rows are there already, `append` adds the next ones, `finish` makes
    the store readable. Leaving without `finish` keeps what was written for the next run.
    """

    def __init__(self, folder: str | Path, names: Sequence[str], dimensions: int, settings: dict[str, Any]) -> None:
        """`settings` (plain JSON) is all that the features depend on besides the names."""
        self.folder, self.names, self.dimensions, self.settings = Path(folder), names, dimensions, settings
        self.done = 0
        self.problems: dict[int, str] = {}
        self._names_sha256 = names_hash(names)
        self._file: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._committed = time.monotonic()

    @property
    def _partial(self) -> Path:
        return self.folder / "features.partial"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"

    def __enter__(self) -> "StoreWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"{self.folder}: another process is writing this store") from None
        if self._is_finished():
            self.done = len(self.names)
            return self
        for stale in ("info.json", "features.npy", "names.jsonl"):
            (self.folder / stale).unlink(missing_ok=True)
        self._resume()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._commit()
            self._file.close()
            self._file = None
        self._lock.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "format": STORE_FORMAT,
            "names_sha256": self._names_sha256,
            "dimensions": self.dimensions,
            "settings": self.settings,
        }

    def _is_finished(self) -> bool:
        try:
            store = open_store(self.folder)
            info = _read_json(self.folder / "info.json")
        except (InputError, OSError):
            return False
        self.problems = store.problems
        return {key: info.get(key) for key in self._identity()} == self._identity()

    def _resume(self) -> None:
        """Open the partial array behind its last safe row, or start a new one."""
        head = self._head()
        try:
            progress = _read_json(self._progress)
            same = {key: progress.get(key) for key in self._identity()} == self._identity()
            if same and self._partial.stat().st_size >= len(head) + progress["rows"] * 4 * self.dimensions:
                self.done = progress["rows"]
                self.problems = {int(row): why for row, why in progress["problems"].items()}
        except (InputError, OSError):
            pass
        self._file = open(self._partial, "r+b" if self.done else "wb")  # noqa: SIM115 - closed by __exit__
        if not self.done:
            self._file.write(head)
        self._file.seek(len(head) + self.done * 4 * self.dimensions)
        self._file.truncate()

    def _head(self) -> bytes:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), self.dimensions)}
        text = str(header).encode()
        text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    def append(self, rows: np.ndarray, problems: dict[int, str] | None = None) -> None:
        """Add features [k, d]; `problems` says why rows of it (0 is the first of these) have none, and are NaN."""
        for row, reason in (problems or {}).items():
            self.problems[self.done + row] = reason
        self._file.write(np.ascontiguousarray(rows, "<f4").data)
        self.done += len(rows)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def repair(self, features: dict[int, np.ndarray]) -> None:
        """Put features [d] in the place of rows that had a problem.

        The features come first and then the word that they are there, so a kill in between leaves them for the next
        run.
        """
        if not features:
            return
        with contextlib.ExitStack() as stack:
            file = self._file or stack.enter_context(open(self.folder / "features.npy", "r+b"))
            for row, feature in features.items():
                file.seek(len(self._head()) + row * 4 * self.dimensions)
                file.write(np.ascontiguousarray(feature, "<f4").data)
                self.problems.pop(row, None)
            file.seek(0, os.SEEK_END)
            file.flush()
            os.fsync(file.fileno())
        if self._file is None:
            self._write_names()
        else:
            self._commit()

    def _write_names(self) -> None:
        # Names that are not UTF-8 survive as escapes of lone surrogates.
        lines = (json.dumps([name, self.problems.get(row, "")]) + "\n" for row, name in enumerate(self.names))
        utils.write_text(self.folder / "names.jsonl", "".join(lines))

    def _commit(self) -> None:
        """Make all rows so far safe, then say so."""
        self._file.flush()
        os.fsync(self._file.fileno())
        problems = {str(row): reason for row, reason in self.problems.items()}
        utils.write_json(self._progress, {**self._identity(), "rows": self.done, "problems": problems})
        self._committed = time.monotonic()

    def finish(self) -> Store:
        """Check that all rows are there and make the store readable."""
        if self.done != len(self.names):
            raise ValueError(f"{self.done} of {len(self.names)} rows")
        if self._file is not None:
            self._commit()
            self._file.close()
            self._file = None
            self._write_names()
            utils.write_json(self.folder / "info.json", {**self._identity(), "rows": self.done})
            os.replace(self._partial, self.folder / "features.npy")
            utils.fsync_directory(self.folder)
            self._progress.unlink()
        return open_store(self.folder)
