"""The official lists of IJB-B and IJB-C, read strictly: a benchmark that lost a few lines still gives a number.

    meta/ijbc_face_tid_mid.txt          image template media
    meta/ijbc_name_5pts_score.txt       image, five landmarks x y in the loosely cropped photo, the detector's score
    meta/ijbc_template_pair_label.txt   template template label
    meta/ijbc_1N_gallery_G1.csv, ..G2.csv, ijbc_1N_probe_mixed.csv    a header, then template, subject, image

IJB-B's are called `ijbb_` and its galleries `S1` and `S2`. Which of the two it is, the names of the files say.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from utils import InputError

SUBSETS = {"ijbc": ("IJB-C", ("G1", "G2")), "ijbb": ("IJB-B", ("S1", "S2"))}


@dataclass(frozen=True)
class Lists:
    """The images of a protocol, in the order of its lists.

    subset: IJB-B or IJB-C. meta: the folder. prefix: of the files' names. images: file names [n]. templates, medias:
    int64 [n]. landmarks: float32 [n, 5, 2], pixels of the loosely cropped photo. scores: float32 [n], the detector's.
    """

    subset: str
    meta: Path
    prefix: str
    images: list[str]
    templates: np.ndarray
    medias: np.ndarray
    landmarks: np.ndarray
    scores: np.ndarray

    @property
    def galleries(self) -> tuple[str, str]:
        """The names of the two galleries of 1:N."""
        return SUBSETS[self.prefix][1]

    def path(self, name: str) -> Path:
        """The file of this protocol with this rest of a name."""
        return self.meta / f"{self.prefix}_{name}"


@dataclass(frozen=True)
class Pairs:
    """Pairs to verify: numbers of templates, int64 [P] each, and whether they are of one person, bool [P]."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


@dataclass(frozen=True)
class People:
    """Templates and whose they are: numbers int64 [t], ascending, and the names of the subjects, str [t]."""

    templates: np.ndarray
    subjects: np.ndarray


def read_lists(folder: str | Path) -> Lists:
    """Open a protocol's folder (or its `meta` folder); `InputError` naming the file and line that is not as above."""
    folder = Path(folder)
    meta = folder / "meta" if (folder / "meta").is_dir() else folder
    if not meta.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = [prefix for prefix in SUBSETS if (meta / f"{prefix}_face_tid_mid.txt").is_file()]
    if len(found) != 1:
        what = "lists of IJB-B and of IJB-C; give a folder of one" if found else "no list *_face_tid_mid.txt"
        raise InputError(f"{meta}: {what}")
    prefix = found[0]
    path = meta / f"{prefix}_face_tid_mid.txt"
    rows = _table(path, 3)
    images = [row[0] for row in rows]
    numbers = _numbers(path, [row[1:] for row in rows], np.int64)
    faces = meta / f"{prefix}_name_5pts_score.txt"
    rows = _table(faces, 12)
    if len(rows) != len(images):
        raise InputError(f"{faces}: {len(rows)} lines, but {path.name} has {len(images)}")
    for number, (row, image) in enumerate(zip(rows, images, strict=True), 1):
        if row[0] != image:
            raise InputError(f"{faces}, line {number}: {row[0]}, but {path.name} has {image} there")
    values = _numbers(faces, [row[1:] for row in rows], np.float64)
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise InputError(f"{faces}, line {wrong[0] + 1}: a number that is not finite")
    return Lists(
        subset=SUBSETS[prefix][0],
        meta=meta,
        prefix=prefix,
        images=images,
        templates=numbers[:, 0].copy(),
        medias=numbers[:, 1].copy(),
        landmarks=values[:, :10].reshape(-1, 5, 2).astype(np.float32),
        scores=values[:, 10].astype(np.float32),
    )


def read_pairs(lists: Lists) -> Pairs:
    """The pairs of 1:1; `InputError` naming the line with a label other than 0 and 1 or a template without images."""
    path = lists.path("template_pair_label.txt")
    values = _numbers(path, utils.read_bytes(path), np.int64)
    labels = values[:, 2]
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise InputError(f"{path}, line {wrong[0] + 1}: label {labels[wrong[0]]}, neither 0 nor 1")
    known = np.unique(lists.templates)
    for column in (0, 1):
        _check_known(path, values[:, column], known, 1)
    first, second = values[:, 0].copy(), values[:, 1].copy()
    return Pairs(first, second, labels == 1)


def read_people(lists: Lists, name: str) -> People:
    """A list of 1:N, such as `1N_gallery_G1`: a template once, with its subject. `InputError` naming file and line."""
    path = lists.path(f"{name}.csv")
    head, *lines = _text(path).split("\n")
    rows = [line.split(",") for line in lines if line.strip()]
    columns = head.count(",") + 1
    for number, row in enumerate(rows, 2):
        if len(row) < 2 or not row[1].strip():
            raise InputError(f"{path}, line {number}: neither a template nor a subject")
        if len(row) < columns:  # a line that is cut off may end in the middle of a subject's number
            raise InputError(f"{path}, line {number}: {len(row)} fields instead of {columns}")
    if not rows:
        raise InputError(f"{path}: no template")
    numbers = _numbers(path, [row[:1] for row in rows], np.int64, header=1)[:, 0]
    _check_known(path, numbers, np.unique(lists.templates), 2)
    subjects = np.array([row[1].strip() for row in rows])
    templates, first = np.unique(numbers, return_index=True)
    several = np.flatnonzero(subjects != subjects[first][np.searchsorted(templates, numbers)])
    if len(several):
        row = several[0]
        raise InputError(f"{path}, line {row + 2}: template {numbers[row]} has another subject than in a line above")
    return People(templates, subjects[first])


def all_people(lists: Lists) -> list[People]:
    """The lists of 1:N that are there: they say whose the templates are."""
    return [read_people(lists, name) for name in _lists_of_people(lists) if lists.path(f"{name}.csv").is_file()]


def check_others(lists: Lists, protocols: Sequence[str]) -> None:
    """An error for a list of `protocols` (1:1, 1:N) that is not there or, of 1:N, damaged: before features are computed
    for hours, not after. The long list of pairs is only looked for."""
    if "1:1" in protocols:
        lists.path("template_pair_label.txt").stat()
    if "1:N" in protocols:
        for name in _lists_of_people(lists):
            read_people(lists, name)
    else:
        all_people(lists)  # 1:1 asks those that are there whose the templates are


def _lists_of_people(lists: Lists) -> list[str]:
    return [*(f"1N_gallery_{gallery}" for gallery in lists.galleries), "1N_probe_mixed"]


def _check_known(path: Path, numbers: np.ndarray, known: np.ndarray, first_line: int) -> None:
    places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
    unknown = np.flatnonzero(known[places] != numbers)
    if len(unknown):
        row = unknown[0]
        raise InputError(f"{path}, line {row + first_line}: template {numbers[row]} has no image in the lists")


def _text(path: Path) -> str:
    try:
        return utils.read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _table(path: Path, columns: int) -> list[list[str]]:
    """The fields of each line; every line has the same number of them."""
    rows = [line.split() for line in _text(path).rstrip().split("\n")]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise InputError(f"{path}, line {number}: {len(row)} fields instead of {columns}")
    return rows


def _numbers(path: Path, source: "list[list[str]] | bytes", kind: type, *, header: int = 0) -> np.ndarray:
    """All fields as numbers [lines, columns]: of rows of texts, or of the bytes of a file with three to a line.

    Parsed in one go, 15 million lines a few seconds; where that does not give every number the lines are looked at one
    by one to say which is wrong.
    """
    if isinstance(source, bytes):
        text, lines, columns = source, source.count(b"\n") + (not source.endswith(b"\n")), 3
    else:
        text, lines, columns = " ".join(map(" ".join, source)).encode(), len(source), len(source[0])
    with warnings.catch_warnings():  # text that is no number: NumPy warns and stops, or raises
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            values: np.ndarray = np.fromstring(text, kind, sep=" ")
        except ValueError:
            values = np.zeros(0, kind)
    if len(values) == lines * columns and lines:
        return values.reshape(lines, columns)
    if isinstance(source, bytes):
        rows = [line.split() for line in source.decode("utf-8", "replace").split("\n")]
    else:
        rows = source
    for number, row in enumerate(rows, 1 + header):
        if not row and number == len(rows):
            break
        if len(row) != columns:
            raise InputError(f"{path}, line {number}: {len(row)} fields instead of {columns}")
        for field in row:
            try:
                kind(field)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {field!r} is not a number") from error
    raise InputError(f"{path}: holds no lines" if not lines or not text.strip() else f"{path}: not a list of numbers")
