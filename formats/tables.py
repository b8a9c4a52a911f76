"""Tables of faces and identities: `faces.tsv`, one row per photo, and `identities.tsv`, one row per label.

Cells are separated by tabs; a tab, a line end or a backslash inside a name is escaped, and names that are not UTF-8
keep their bytes. A table is written whole or not at all.
"""

import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from utils import InputError

# What became of a photo.
CROP = "crop"  # aligned on five detected landmarks
BOX_CROP = "box_crop"  # nothing was detected: cut around the annotated box
CENTRE_CROP = "centre_crop"  # nothing was detected: the largest square in the middle
NO_CROP = "no_crop"
STATUSES = (CROP, BOX_CROP, CENTRE_CROP, NO_CROP)

COLUMNS = ("identity", "file", "status", "reason", "faces", "box", "landmarks", "score", "width", "height", "sha256")
# Whoever knows more of an identity writes it into columns after these.
IDENTITY_COLUMNS = ("label", "identity", "crops")

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FaceRow:
    """One row of faces.tsv: what became of one photo.

    `reason` is "category" or "category: detail" for a photo without a crop, and a remark, if any, for one with a crop.
    `faces` counts the faces detected; `box` xyxy, `landmarks` (five (x, y)) and `score` are those of the chosen one, in
    pixels of the photo as read and exact to float32; None where no face was chosen. `width` and `height` are those of
    the photo as read, 0 where it was not, and `sha256` is that of its file, "" where that could not be read: by it a
    row is tied to its photo, whatever is later found under the same name.
    """

    identity: str
    file: str
    status: str
    reason: str = ""
    faces: int = 0
    box: tuple[float, ...] | None = None
    landmarks: tuple[tuple[float, float], ...] | None = None
    score: float | None = None
    width: int = 0
    height: int = 0
    sha256: str = ""

    def to_line(self) -> str:
        """The row as a line of the table, without the newline."""
        box = "" if self.box is None else _numbers(self.box)
        landmarks = "" if self.landmarks is None else " ".join(_numbers(point) for point in self.landmarks)
        score = "" if self.score is None else _numbers([self.score])
        texts = [escape(self.identity), escape(self.file), self.status, escape(self.reason)]
        sides = [str(side) if side else "" for side in (self.width, self.height)]
        return "\t".join([*texts, str(self.faces), box, landmarks, score, *sides, self.sha256])

    @staticmethod
    def from_line(line: str) -> "FaceRow":
        """Read a line that `to_line` wrote; `ValueError` if it is none."""
        cells = line.split("\t")
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} columns instead of {len(COLUMNS)}")
        identity, file, status, reason, faces, box, landmarks, score, width, height, sha256 = cells
        if status not in STATUSES:
            raise ValueError(f"unknown status {status!r}")
        points = landmarks.split()
        if len(points) not in (0, 5) or not faces.isdecimal():
            raise ValueError("five landmarks and a number of faces are expected")
        if not all(side == "" or side.isdecimal() for side in (width, height)):
            raise ValueError(f"{width!r} x {height!r}: the sides of a photo are expected")
        if sha256 and not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256[:80]!r}: a SHA-256 is expected")
        flat = _parse(",".join(points), 10) if points else ()
        return FaceRow(
            unescape(identity),
            unescape(file),
            status,
            unescape(reason),
            int(faces),
            _parse(box, 4) if box else None,
            tuple(zip(flat[::2], flat[1::2], strict=True)) or None,
            _parse(score, 1)[0] if score else None,
            int(width or 0),
            int(height or 0),
            sha256,
        )


def _numbers(values: Iterable[float]) -> str:
    """The shortest decimal texts that name these float32 values."""
    return ",".join(str(np.float32(value)) for value in values)


def _parse(text: str, count: int) -> tuple[float, ...]:
    values = np.array(text.split(","), dtype=np.float32)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{text!r}: expected {count} numbers")
    return tuple(values.tolist())


_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))


def escape(text: str) -> str:
    """A text as a cell of a table: tabs and line ends as \\t, \\n, \\r, and a backslash as two."""
    for plain, escaped in _ESCAPES:
        text = text.replace(plain, escaped)
    return text


def unescape(text: str) -> str:
    """Undo `escape`."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    for plain, escaped in _ESCAPES[1:]:
        parts = [part.replace(escaped, plain) for part in parts]
    return "\\".join(parts)


def row_text(row: FaceRow) -> bytes:
    """A line of faces.tsv with its newline. File names that are not UTF-8 keep their bytes."""
    return (row.to_line() + "\n").encode("utf-8", "surrogateescape")


def table_text(rows: Iterable[FaceRow]) -> bytes:
    """A whole faces.tsv."""
    return ("\t".join(COLUMNS) + "\n").encode() + b"".join(map(row_text, rows))


def parse_table(data: bytes, name: object) -> list[FaceRow]:
    """The rows of a faces.tsv; `InputError` naming `name` and the line if it is not one."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    if lines[0] != "\t".join(COLUMNS):
        raise InputError(f"{name}: not a table of faces (its first line must be {' '.join(COLUMNS)})")
    if lines[-1]:
        raise InputError(f"{name}: the last line is cut off")
    rows = []
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            rows.append(FaceRow.from_line(line))
        except ValueError as error:
            raise InputError(f"{name}, line {number}: {error}") from error
    return rows


def iterate_faces(path: str | Path) -> Iterator[FaceRow]:
    """The rows of a faces.tsv one after another, in little memory; `InputError` as `read_faces`."""
    with open(path, "rb") as file:
        head = file.readline()
        parse_table(head, path)
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                raise InputError(f"{path}: the last line is cut off")
            try:
                yield FaceRow.from_line(line[:-1].decode("utf-8", "surrogateescape"))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error


def read_faces(path: str | Path) -> list[FaceRow]:
    """Read a faces.tsv; `InputError` naming file and line if it is damaged."""
    return parse_table(utils.read_bytes(path), path)


class FaceTable:
    """Rows of a faces.tsv by file name, parsed when asked for, so that millions of rows cost 0.2 KB of memory each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        head = ("\t".join(COLUMNS) + "\n").encode()
        if self._data[: len(head)] != head:
            raise InputError(f"{path}: not a table of faces (its first line must be {' '.join(COLUMNS)})")
        self._offsets: dict[str, int] = {}
        at = len(head)
        while at < size:
            end = self._data.find(b"\n", at)
            if end < 0:
                raise InputError(f"{path}: the last line is cut off")
            cells = self._data[at:end].split(b"\t", 2)
            file_name = unescape(cells[1].decode("utf-8", "surrogateescape")) if len(cells) == 3 else ""
            if not file_name or "\0" in file_name or file_name in self._offsets:
                problem = f"a second row for {file_name}" if file_name in self._offsets else "no file name"
                raise InputError(f"{path}, line {self._line(at)}: {problem}")
            self._offsets[file_name] = at
            at = end + 1

    def _line(self, offset: int) -> int:
        return self._data[:offset].count(b"\n") + 1

    def __iter__(self) -> Iterator[str]:
        """The file names, in the order of the table."""
        return iter(self._offsets)

    def get(self, file: str) -> FaceRow | None:
        """The row of a file, or None; `InputError` naming the line if it is damaged."""
        at = self._offsets.get(file)
        if at is None:
            return None
        line = self._data[at : self._data.find(b"\n", at)].decode("utf-8", "surrogateescape")
        try:
            return FaceRow.from_line(line)
        except ValueError as error:
            raise InputError(f"{self.path}, line {self._line(at)}: {error}") from error


def read_identities(path: Path) -> list[str]:
    """Names by label from an identities.tsv; columns after label and identity are passed over.

    Raises `InputError` for another table, and naming the line where the labels do not count from 0.
    """
    lines = utils.read_bytes(path).decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    if tuple(lines[0].split("\t")[:2]) != IDENTITY_COLUMNS[:2]:
        raise InputError(f"{path}: not a table of identities (its first line must begin with label and identity)")
    names: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) < 2 or cells[0] != str(len(names)):
            raise InputError(
                f"{path}: line {number}: {line[:60]!r} does not begin with label {len(names)} and an identity"
            )
        names.append(unescape(cells[1]))
    return names


def identity_line(label: int, name: str, crops: int | None, *others: str) -> str:
    """A line of an identities.tsv with its newline. `others`, cells of more columns, are written as they are."""
    return "\t".join([str(label), escape(name), "" if crops is None else str(crops), *others]) + "\n"


def write_identities(path: str | Path, names: Sequence[str], crops: Sequence[int] | None = None) -> None:
    """Names by label, and the number of crops of each where it is known, as an identities.tsv."""
    counts = [None] * len(names) if crops is None else crops
    rows = (identity_line(label, name, count) for label, (name, count) in enumerate(zip(names, counts, strict=True)))
    text = "".join(["\t".join(IDENTITY_COLUMNS) + "\n", *rows])
    utils.write_bytes(path, text.encode("utf-8", "surrogateescape"))
