"""FaceScrub's annotations: who is where in which photo, and which file on disk a line speaks of.

The two lists (`facescrub_actors.txt`, `facescrub_actresses.txt`) have six TAB-separated columns: name, image_id,
face_id, url, bbox, sha256. A photo is stored as `NAME/NAME_FACEID.EXT`: the number is **face_id**, column 3, because a
photo with two annotated faces was stored twice. The extension comes from whoever downloaded the photo and says little,
so files are matched by name and face_id and nothing else.

Design: nothing in these files is evaluated or trusted. A line that is not an annotation is a problem that names file
and line; a line with an unusable box is an annotation without a box that says why. Names are compared after Unicode
composition and with underscores as blanks. Price: two people whose names differ by nothing but that would be one.
Columns are where the header, if there is one, says they are, and a cell may be in quotes, as spreadsheets write it.
"""

import codecs
import contextlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import utils
from utils import InputError

COLUMNS = ("name", "image_id", "face_id", "url", "bbox", "sha256")

LONGEST_NAME = 200  # bytes: with number and extension a file's name has at most 255
SHOWN = 40  # characters of a cell that a problem repeats

_NUMBER = re.compile(r"[-+]?[0-9]{1,9}(\.[0-9]*)?")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FILE_NAME = re.compile(r"(?P<name>.+)_(?P<face_id>[0-9]+)(\.[^_/]*)?")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}")

Key = tuple[str, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """One annotated face. `box` is xyxy in stored pixels of the photo; None with the reason in `box_problem`."""

    name: str
    image_id: int
    face_id: int
    url: str
    box: Box | None
    box_problem: str
    sha256: str
    where: str

    @property
    def key(self) -> Key:
        """What identifies the photo's file: see `file_key`."""
        return normal_name(self.name), self.face_id

    @property
    def file(self) -> str:
        """The relative path under which a downloader that goes by the URL's path stores this photo."""
        path = ""
        with contextlib.suppress(ValueError):  # not an address
            path = urlsplit(self.url).path
        extension = _EXTENSION.fullmatch(Path(path).suffix)
        return f"{self.name}/{self.name}_{self.face_id}{extension.group() if extension else ''}"


@dataclass(frozen=True)
class Annotations:
    """All annotations by key, and the lines (`FILE, line N: why`) that gave none."""

    faces: dict[Key, Annotation] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def normal_name(name: str) -> str:
    """A person's name for comparison: composed (NFC), underscores as blanks, single blanks."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def file_key(file: str) -> Key | None:
    """The key of a file called `NAME_FACEID`, with any extension or none; None for a file of another name."""
    match = _FILE_NAME.fullmatch(file.rsplit("/", 1)[-1])
    return (normal_name(match["name"]), int(match["face_id"])) if match else None


def read_annotations(paths: Iterable[str | Path]) -> Annotations:
    """Read annotation files: UTF-8, UTF-16 or Windows Latin, with or without BOM, header and CRLF.

    Of two lines for one face the first with a usable box counts; the other is a problem unless it says the same. A file
    without a single annotation is an `InputError`.
    """
    found = Annotations()
    for path in map(Path, paths):
        known, columns = len(found.faces), list(COLUMNS)
        for number, line in enumerate(_lines(utils.read_bytes(path)), start=1):
            cells = [_unquoted(cell.strip()) for cell in line.split("\t")]
            names = [cell.lower() for cell in cells]
            if set(COLUMNS) <= set(names):
                columns = names
            elif line:
                _add(found, cells, columns, f"{path}, line {number}")
        if len(found.faces) == known:
            raise InputError(f"{path}: holds no annotation of a new face (columns: {' '.join(COLUMNS)})")
    return found


def _lines(data: bytes) -> list[str]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return re.split("\r\n?|\n", data.decode("utf-16", "replace"))
    return [_decode(line) for line in re.split(b"\r\n?|\n", data.removeprefix(codecs.BOM_UTF8))]


def _decode(line: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return line.decode(encoding)
    return line.decode("latin-1")  # defined for every byte


def _unquoted(cell: str) -> str:
    match = _QUOTED.fullmatch(cell)
    return match[1].replace('""', '"').strip() if match else cell


def _add(found: Annotations, cells: list[str], columns: list[str], where: str) -> None:
    """Take one line's cells into `found`, as an annotation or as a problem."""
    if len(cells) != len(columns):
        found.problems.append(f"{where}: {len(cells)} columns instead of {len(columns)}")
        return
    name, image_id, face_id, url, bbox, sha256 = (cells[columns.index(column)] for column in COLUMNS)
    if not (_is_folder_name(name) and _is_id(image_id) and _is_id(face_id)):
        shown = ", ".join(repr(text[:SHOWN]) for text in (name, image_id, face_id))
        found.problems.append(f"{where}: name, image_id and face_id expected, not {shown}")
        return
    box, box_problem = parse_box(bbox)
    digest = sha256.lower() if _SHA256.fullmatch(sha256) else ""
    face = Annotation(name, int(image_id), int(face_id), url, box, box_problem, digest, where)
    other = found.faces.setdefault(face.key, face)
    if other is face:
        return
    if other.box is None and face.box is not None:
        found.faces[face.key] = face
    elif face.box is not None and face.box != other.box:
        found.problems.append(f"{where}: another box for the face of {other.where}, which counts")


def _is_folder_name(text: str) -> bool:
    """Whether a person's photos can lie in a folder of this name, and in no other."""
    return bool(text.strip(".")) and not set("/\0") & set(text) and len(text.encode()) <= LONGEST_NAME


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


def parse_box(text: str) -> tuple[Box | None, str]:
    """`"x1,y1,x2,y2"` as a box, or None and why not. A box may reach out of its photo: that shows in the photo."""
    if not text:
        return None, "no box"
    cells = [cell.strip() for cell in text.split(",")]
    if not all(_NUMBER.fullmatch(cell) for cell in cells):
        return None, "not numbers"
    if len(cells) != 4:
        return None, f"{len(cells)} numbers instead of 4"
    x1, y1, x2, y2 = map(float, cells)
    if x2 <= x1 or y2 <= y1:
        return None, "no area" if (x2, y2) == (x1, y1) else "corners in the wrong order"
    return (x1, y1, x2, y2), ""
