"""Lists of verification pairs as people have them: LFW's format and its kin, lists of two files and a flag, tables.

What `read_pair_list` understands, each recognised by what is in the file, whatever it is called:

    LFW           `folds n`, `n` or `folds same different` in the first line, or no such line; then `identity a b` and
                  `identity a identity b`. Photo 7 of Zico is `Zico/Zico_0007.jpg`. RFW's lists are of this kind.
    two files     `a/1.jpg a/2.jpg 1`, the flag first or last (1, 0, -1, true, false, same, different)
    CPLFW, CALFW  two lines a pair, `file flag` each, both flags alike; 0 is two persons, any other number one
    table         comma, semicolon or TAB between, names of columns in the first line: two files (file1, file2; photo1,
                  path1, p1, first ...), `same` (label, issame ...) or two identities (id1, id2), and `fold` if there is
                  one. All further columns are groups: NAME1 and NAME2 speak of the first and second photo, any other
                  of the pair. BFW's table is of this kind.

What the first line of an LFW list says about its length has to be true, because a list that lost some lines still gives
a number. Every name is checked in one place: nothing outside of the folder of photos can be named. Every error names
the line.
"""

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import InputError
from verification import lfw

FOLDS = 10  # LFW's protocol, for lists that do not say theirs

_ONE = frozenset("1 true same yes genuine match positive t y".split())
_TWO = frozenset("0 -1 false different diff no impostor imposter mismatch nonmatch negative f n".split())
_WHOLE = re.compile(r"[0-9]{1,9}")
_FLAG = re.compile(r"[+-]?[0-9]{1,9}(\.0+)?")
# Names of columns as people write them, without case, blanks, hyphens and underscores.
_FILES = "file photo path image img p filename imagepath imgpath name".split()
_FIRST = [f"{stem}1" for stem in _FILES] + ["first", "filea", "patha", "imagea", "left", "a"]
_SECOND = [f"{stem}2" for stem in _FILES] + ["second", "fileb", "pathb", "imageb", "right", "b"]
_SAME = "same issame sameperson label target genuine match y".split()
_FOLD = ["fold"]
_IDENTITY = "identity id person subject".split()
_LFW_HEAD = {"name", "imagenum1", "imagenum2", ""}  # columns of the lists that Kaggle keeps of LFW


@dataclass(frozen=True)
class PairList:
    """What a list of pairs says.

    names: each photo once, in order of appearance, relative to the folder of photos, `/` between; those of LFW's format
    have no suffix. lines: where each was named first. pairs: int64 [P, 2], indices of names. same: bool [P]. folds:
    int64 [P] from 0. numbered: for LFW's format, (identity, number) of each photo. identities: whom each photo shows,
    where the list says so. columns: the groups, for each pair the values of its first and second photo. notes: what a
    reader should hear about.
    """

    names: list[str]
    lines: list[int]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    numbered: list[lfw.Numbered] | None = None
    identities: list[str] | None = None
    columns: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_pair_list(path: str | Path, folds: int = FOLDS) -> PairList:
    """Read a list of pairs of any of the kinds above; where it does not say its folds, each kind is cut into `folds`.

    Raises InputError naming file and line for anything else, for names that lead outside, a photo paired with itself,
    and a pair that is said to be of one person in one line and of two in another.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise InputError(f"{path}: holds no pairs")
    reader = _Reader(path, folds)
    head = lines[0][1].split()
    if 1 <= len(head) <= 3 and all(map(_WHOLE.fullmatch, head)):
        return reader.lfw_with_head([int(number) for number in head], lines[1:])
    rows = list(_cells(path, lines))
    table = reader.columns_of(rows[0][1])
    if table is not None:
        return reader.table(table, rows[0][1], rows[1:])
    if set(map(_plain, rows[0][1])) <= _LFW_HEAD and len(rows[0][1]) >= 3:
        rows = [(number, [cell for cell in cells if cell]) for number, cells in rows[1:]]
        lines = [(number, "\t".join(cells)) for number, cells in rows]
    if all(len(cells) == 2 and _FLAG.fullmatch(cells[1]) for _, cells in rows):
        return reader.two_lines(rows)
    flagged = _flag_side(rows[0][1])
    if flagged is not None:
        return reader.two_files(rows, flagged)
    return reader.lfw(lines, None)


def check_name(name: str, where: str) -> str:
    """A name of a photo, relative to its folder, in composed Unicode and with `/`; InputError if it leads elsewhere."""
    plain = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    while plain.startswith("./"):
        plain = plain[2:]
    parts = plain.split("/")
    absolute = plain.startswith("/") or re.match("[A-Za-z]:", plain) is not None
    if not plain or absolute or "\0" in plain or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{where}: {name[:80]!r} is not the name of a photo below the folder of photos")
    return plain


# --- lines and cells ------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank."""
    try:
        text = utils.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _cells(path: Path, lines: Sequence[tuple[int, str]]) -> Iterable[tuple[int, list[str]]]:
    """The cells of each line, stripped; the separator is that of the first line, blanks if it has no other."""
    first = lines[0][1]
    separator = next((mark for mark in "\t,;" if mark in first), None)
    for number, line in lines:
        if separator is None:
            yield number, line.split()
            continue
        try:
            (cells,) = csv.reader([line], delimiter=separator, strict=True)
        except (csv.Error, ValueError) as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        yield number, [cell.strip() for cell in cells]


def _plain(column: str) -> str:
    return re.sub(r"[\s_.-]+", "", column).lower()


def _flag(cell: str) -> bool | None:
    """Whether a cell says one person; None if it says neither."""
    word = cell.strip().lower()
    if _FLAG.fullmatch(word):
        word = str(int(float(word)))
    return True if word in _ONE else False if word in _TWO else None


def _flag_side(cells: Sequence[str]) -> int | None:
    """Where the flag of a line `file file flag` or `flag file file` is; None if it is no such line."""
    if len(cells) != 3:
        return None
    sides = [side for side in (2, 0) if _flag(cells[side]) is not None]
    files = [side for side in sides if not all(_WHOLE.fullmatch(cells[other]) for other in (1, 2 - side))]
    # `Zico 1 2` is of LFW's format: two numbers behind a name. A file is told by a dot or a slash.
    return next(
        (side for side in files if any(mark in cells[1] or mark in cells[2 - side] for mark in "./\\")),
        None,
    )


# --- kinds of lists -------------------------------------------------------------------------------------------------


class _Reader:
    """Collects pairs of one file, and gives every error its place."""

    def __init__(self, path: Path, folds: int) -> None:
        self.path, self.folds = path, folds
        self.index: dict[str, int] = {}
        self.first_lines: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.same: list[bool] = []
        self.said: dict[tuple[int, int], tuple[bool, int]] = {}
        self.repeated = 0
        self.notes: list[str] = []

    def at(self, line: int) -> str:
        return f"{self.path}: line {line}"

    def add(self, line: int, names: Sequence[str], same: bool) -> None:
        """One pair: names of two photos, checked already."""
        if names[0] == names[1]:
            raise InputError(f"{self.at(line)}: pairs a photo with itself: {names[0]!r}")
        for name in names:
            if name not in self.index:
                self.index[name] = len(self.index)
                self.first_lines.append(line)
        first, second = (self.index[name] for name in names)
        before = self.said.setdefault((min(first, second), max(first, second)), (same, line))
        if before[0] != same:
            raise InputError(f"{self.at(line)}: {names[0]} and {names[1]} are said to be otherwise in line {before[1]}")
        self.repeated += before[1] != line
        self.pairs.append((first, second))
        self.same.append(same)

    def finish(
        self,
        folds: np.ndarray | None = None,
        *,
        numbered: list[lfw.Numbered] | None = None,
        identities: list[str] | None = None,
        columns: dict[str, list[tuple[str, str]]] | None = None,
    ) -> PairList:
        if not self.pairs:
            raise InputError(f"{self.path}: holds no pairs")
        same = np.array(self.same, dtype=bool)
        if self.repeated:
            self.notes.append(f"{self.path.name}: {self.repeated} pairs stand there more than once")
        return PairList(
            names=list(self.index),
            lines=self.first_lines,
            pairs=np.array(self.pairs, dtype=np.int64),
            same=same,
            folds=cut_folds(same, self.folds) if folds is None else folds,
            numbered=numbered,
            identities=identities,
            columns=columns or {},
            notes=self.notes,
        )

    # LFW's format

    def lfw_with_head(self, head: list[int], lines: Sequence[tuple[int, str]]) -> PairList:
        if 0 in head[:2]:
            raise InputError(f"{self.at(1)}: a number of folds or pairs is 0")
        folds = head[0] if len(head) > 1 else 1
        sizes = (head[1], head[2]) if len(head) == 3 else (head[-1], head[-1])
        if len(lines) != folds * sum(sizes):
            raise InputError(
                f"{self.path}: {len(lines)} pairs; line 1 promises {folds} folds of {sizes[0]} + {sizes[1]}, that is "
                f"{folds * sum(sizes)}; if the list is meant to be shorter, remove line 1"
            )
        found = self.lfw(lines, np.repeat(np.arange(folds), sum(sizes)))
        genuine = np.bincount(found.folds, weights=found.same, minlength=folds).astype(int)
        if (genuine != sizes[0]).any():
            fold = int(np.flatnonzero(genuine != sizes[0])[0])
            self.notes.append(
                f"{self.path.name}: fold {fold + 1} has {genuine[fold]} pairs of one identity, line 1 says {sizes[0]}"
            )
        return found

    def lfw(self, lines: Sequence[tuple[int, str]], folds: np.ndarray | None) -> PairList:
        numbered: dict[str, lfw.Numbered] = {}
        for line, text in lines:
            photos = lfw.read_line(self.path, line, text)
            names = [check_name(lfw.photo_name(*photo), self.at(line)) for photo in photos]
            numbered |= dict(zip(names, photos, strict=True))
            self.add(line, names, photos[0][0] == photos[1][0])
        every = [numbered[name] for name in self.index]
        return self.finish(folds, numbered=every, identities=[identity for identity, _ in every])

    # files and flags

    def two_lines(self, rows: Sequence[tuple[int, list[str]]]) -> PairList:
        if len(rows) % 2:
            raise InputError(f"{self.path}: {len(rows)} lines; with a file and a flag in each, a pair takes two lines")
        for (line, first), (next_line, second) in zip(rows[::2], rows[1::2], strict=True):
            flags = [int(float(cells[1])) for cells in (first, second)]
            if flags[0] != flags[1]:
                raise InputError(f"{self.at(next_line)}: flag {second[1]}, but that of the line before is {first[1]}")
            names = [check_name(first[0], self.at(line)), check_name(second[0], self.at(next_line))]
            self.add(next_line, names, flags[0] > 0)
        return self.finish()

    def two_files(self, rows: Sequence[tuple[int, list[str]]], side: int) -> PairList:
        for line, cells in rows:
            same = _flag(cells[side]) if len(cells) == 3 else None
            if same is None:
                raise InputError(f"{self.at(line)}: two files and a flag are expected, as in line {rows[0][0]}")
            names = [check_name(cells[other], self.at(line)) for other in ((0, 1) if side == 2 else (1, 2))]
            self.add(line, names, same)
        return self.finish()

    # tables

    def columns_of(self, head: Sequence[str]) -> dict[str, int] | None:
        """Where the columns that matter are; None if this line does not name two files."""
        plain = [_plain(cell) for cell in head]
        found: dict[str, int] = {}
        for role, words in (("first", _FIRST), ("second", _SECOND), ("same", _SAME), ("fold", _FOLD)):
            places = [plain.index(word) for word in words if word in plain]
            if places:
                found[role] = places[0]
        for stem in _IDENTITY:
            if f"{stem}1" in plain and f"{stem}2" in plain:
                found |= {"id1": plain.index(f"{stem}1"), "id2": plain.index(f"{stem}2")}
                break
        if not {"first", "second"} <= found.keys():
            return None
        doubled = sorted({head[place] for place, cell in enumerate(plain) if cell and plain.count(cell) > 1})
        if doubled:
            raise InputError(f"{self.at(1)}: two columns are called {doubled[0]!r}")
        if "same" not in found and "id1" not in found:
            raise InputError(f"{self.at(1)}: no column says who is who: same (1 or 0), or id1 and id2")
        return found

    def table(self, where: dict[str, int], head: list[str], rows: Sequence[tuple[int, list[str]]]) -> PairList:
        groups = _group_columns(head, set(where.values()))
        columns: dict[str, list[tuple[str, str]]] = {name: [] for name in groups}
        persons: dict[str, tuple[str, int]] = {}
        folds: list[str] = []
        for line, cells in rows:
            if len(cells) != len(head):
                raise InputError(f"{self.at(line)}: {len(cells)} columns, the first line names {len(head)}")
            names = [check_name(cells[where[role]], self.at(line)) for role in ("first", "second")]
            self.add(line, names, self._same(line, cells, where))
            for role, name in (("id1", names[0]), ("id2", names[1])):
                if role in where:
                    person = persons.setdefault(name, (cells[where[role]], line))
                    if person[0] != cells[where[role]]:
                        raise InputError(f"{self.at(line)}: {name} is another identity than in line {person[1]}")
            for name, sides in groups.items():
                columns[name].append((cells[sides[0]], cells[sides[1]]))
            if "fold" in where:
                folds.append(cells[where["fold"]])
        identities = [persons[name][0] for name in self.index] if persons else None
        return self.finish(_numbers_of(folds) if folds else None, identities=identities, columns=columns)

    def _same(self, line: int, cells: list[str], where: dict[str, int]) -> bool:
        by_id = None
        if "id1" in where:
            if not (cells[where["id1"]] and cells[where["id2"]]):
                raise InputError(f"{self.at(line)}: an identity is empty: nobody knows who that is")
            by_id = cells[where["id1"]] == cells[where["id2"]]
        if "same" not in where:
            return bool(by_id)
        flag = _flag(cells[where["same"]])
        if flag is None:
            raise InputError(f"{self.at(line)}: {cells[where['same']][:40]!r} says neither one person nor two")
        if by_id is not None and flag != by_id:
            raise InputError(f"{self.at(line)}: the flag says {'one person' if flag else 'two'}, the identities do not")
        return flag


def _group_columns(head: list[str], taken: set[int]) -> dict[str, tuple[int, int]]:
    """Columns by name, each as the places of the first and the second photo's value."""
    free = {name: place for place, name in enumerate(head) if place not in taken and name}
    groups: dict[str, tuple[int, int]] = {}
    for name, place in free.items():
        other = free.get(name[:-1] + "2") if name.endswith("1") else None
        if other is not None:
            groups[name[:-1].rstrip("_- ") or name] = (place, other)
        elif not (name.endswith("2") and name[:-1] + "1" in free):
            groups[name] = (place, place)
    return groups


def _numbers_of(folds: list[str]) -> np.ndarray:
    """int64 [P] from 0: folds in the order of their numbers, or of their names."""
    names = set(folds)
    key: Callable[[str], Any] = int if all(map(_WHOLE.fullmatch, names)) else str
    order = {name: position for position, name in enumerate(sorted(names, key=key))}
    return np.array([order[name] for name in folds], dtype=np.int64)


def cut_folds(same: np.ndarray, folds: int) -> np.ndarray:
    """int64 [P]: the pairs of each kind, in their order, cut into `folds` runs whose lengths differ by at most one.

    For lists that state no folds. Of LFW's own pairs it makes LFW's folds, and those of CALFW's and CPLFW's lists keep
    both kinds in each.
    """
    result = np.zeros(len(same), dtype=np.int64)
    for kind in (same, ~same):
        count = int(kind.sum())
        if count:
            result[kind] = np.arange(count) * min(folds, count) // count
    return result


# --- photos and people ----------------------------------------------------------------------------------------------


def find_files(folder: str | Path, pairs: PairList, path: str | Path) -> list[Path]:
    """The file of every photo of a list, in its order.

    Photos of LFW's format are looked for as `lfw.find_photos` does. Paths are relative to `folder`, or to a folder at
    most two levels below it (CPLFW's `images`, CALFW's `aligned images`); a photo may have another suffix than in the
    list, or lie in a folder of its identity as LFW's do. Raises InputError listing the photos that are not there.
    """
    folder = Path(folder)
    if pairs.numbered is not None:
        numbered = lfw.Pairs(pairs.numbered, pairs.lines, pairs.pairs, pairs.same, pairs.folds)
        return lfw.find_photos(folder, numbered, path)
    roots = [root for root in _roots(folder) if _find(root, pairs.names[0], {}) is not None]
    listings: dict[Path, dict[str, Path]] = {}
    found = [[_find(root, name, listings) for name in pairs.names] for root in roots or [folder]]
    best = min(found, key=lambda files: files.count(None))
    if len({tuple(files) for files in found if files.count(None) == best.count(None)}) > 1:
        names = ", ".join(str(root.relative_to(folder)) for root in roots)
        raise InputError(f"{folder}: the photos of {path} are there more than once (in {names}); name one")
    missing = [index for index, file in enumerate(best) if file is None]
    if missing:
        listed = "".join(f"\n  {pairs.names[index]} (line {pairs.lines[index]})" for index in missing[: lfw.LISTED])
        rest = f"\n  and {len(missing) - lfw.LISTED} more" if len(missing) > lfw.LISTED else ""
        raise InputError(f"{path}: names {len(missing)} photos that are not in {folder}:{listed}{rest}")
    return [file for file in best if file is not None]


def _roots(folder: Path) -> list[Path]:
    """The folder and what is at most two levels below it; folders of hundreds of identities are not looked into."""
    roots, level = [folder], [folder]
    for _ in range(2):
        level = [below for path in level for below in lfw.folders_in(path).values()]
        if len(level) > 300:
            break
        roots += level
    return roots


def _find(root: Path, name: str, listings: dict[Path, dict[str, Path]]) -> Path | None:
    file = root / name
    if file.is_file():
        return file
    stem = os.path.splitext(file.name)[0]  # noqa: PTH122 - a Path drops what looks like a suffix in a name without one
    places = [(file.parent, file.name), (file.parent, stem)]
    if "/" not in name:
        places.append((root / stem.rpartition("_")[0], stem))
    for parent, wanted in places:
        if parent not in listings:
            listings[parent] = lfw.photos_in(parent) if parent.is_dir() else {}
        if wanted in listings[parent]:
            return listings[parent][wanted]
    return None


@dataclass(frozen=True)
class PhotoPairs:
    """One or several lists with the files of their photos; see `PairList`. identities: int64 [M] from 0.

    by_chains: neither list nor folders say who people are, so that only chains of same pairs make photos one person's.
    """

    files: list[Path]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    identities: np.ndarray
    columns: dict[str, list[tuple[str, str]]]
    notes: list[str]
    by_chains: bool = False


def open_lists(folder: str | Path, paths: Sequence[Path], folds: int = FOLDS) -> PhotoPairs:
    """Read lists and find their photos below `folder`. One file is one photo, whichever lists name it.

    Several lists make one set: its folds are cut anew, and its column `list` says which list a pair is from (the
    file's name without suffix and without `_pairs`, as RFW's are called). Person 1 of one list is person 1 of another
    only where both name a photo of theirs: each list may count on its own.
    """
    lists = [read_pair_list(path, folds) for path in paths]
    labels = [re.sub(r"[_-]?pairs$", "", path.stem, flags=re.IGNORECASE) or path.stem for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    index: dict[Path, int] = {}
    claims: list[tuple[int, tuple[str, str]]] = []  # photo, and who a list says it shows
    pairs: list[np.ndarray] = []
    columns: dict[str, list[tuple[str, str]]] = {name: [] for one in lists for name in one.columns}
    origin: list[tuple[str, str]] = []
    for one, path, label in zip(lists, paths, labels, strict=True):
        files = find_files(folder, one, path)
        for position, file in enumerate(files):
            photo = index.setdefault(file, len(index))
            if one.numbered:  # by folders: RFW keeps those of a group in a folder of its own
                claims.append((photo, ("", str(file.parent))))
            elif one.identities:
                claims.append((photo, (str(path), one.identities[position])))
        pairs.append(np.array([index[file] for file in files], dtype=np.int64)[one.pairs])
        for column, values in columns.items():
            values += one.columns.get(column, [("", "")] * len(one.same))
        origin += [(label, label)] * len(one.same)
    both, same = np.concatenate(pairs), np.concatenate([one.same for one in lists])
    itself = np.flatnonzero(both[:, 0] == both[:, 1])
    if len(itself):
        raise InputError(f"{paths[0]}: pairs {list(index)[both[itself[0], 0]]} with itself, under two names")
    known = _identities(_united(claims, len(index)), list(index), both, same)
    numbers, notes = connected(len(index), both, same) if known is None else (known, [])
    return PhotoPairs(
        files=list(index),
        pairs=both,
        same=same,
        folds=lists[0].folds if len(lists) == 1 else cut_folds(same, folds),
        identities=numbers,
        columns=columns | ({"list": origin} if len(lists) > 1 else {}),
        notes=[note for one in lists for note in one.notes] + notes,
        by_chains=known is None,
    )


def _united(claims: Sequence[tuple[int, tuple[str, str]]], photos: int) -> list[str | None]:
    """A name for the person of each photo, None where no list says who it is; people who share a photo are one."""
    people = {person: photos + number for number, person in enumerate(dict.fromkeys(person for _, person in claims))}
    links = np.array([(photo, people[person]) for photo, person in claims], dtype=np.int64).reshape(-1, 2)
    numbers, _ = connected(photos + len(people), links, np.ones(len(links), dtype=bool))
    told = {photo for photo, _ in claims}
    return [str(number) if photo in told else None for photo, number in enumerate(numbers[:photos].tolist())]


def _identities(
    known: Sequence[str | None], files: Sequence[Path], pairs: np.ndarray, same: np.ndarray
) -> np.ndarray | None:
    """Whom each photo shows, int64 [M] from 0: as the list says, else by the photos' folders; None where neither fits
    every flag.
    """
    for names in (known, [str(file.parent) for file in files]):
        if None not in names:
            numbers = _numbers([str(name) for name in names])
            if ((numbers[pairs[:, 0]] == numbers[pairs[:, 1]]) == same).all():
                return numbers
    return None


def connected(photos: int, pairs: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Identities int64 [photos] by chains of same pairs, and a remark if a pair of two persons is in one chain."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = pairs[same]
    graph = coo_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(photos, photos))
    _, numbers = connected_components(graph, directed=False)
    wrong = int((numbers[pairs[:, 0]] == numbers[pairs[:, 1]])[~same].sum())
    notes = [f"{wrong} pairs of two persons are of one by a chain of same pairs: the list contradicts itself"]
    return numbers.astype(np.int64), notes if wrong else []


def _numbers(names: Sequence[str]) -> np.ndarray:
    index: dict[str, int] = {}
    return np.array([index.setdefault(name, len(index)) for name in names], dtype=np.int64)
