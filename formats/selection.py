"""Which crops of a set take part, and as whom: what an audit found, applied to the crops without copying them.

`audit.tsv` has one row per crop, `audit_identities.tsv` one per identity or pair of identities; `audit.json` beside
them says of which crops they speak. A row's `action` is what training does with it: `keep`, `drop`, or `move` (to the
label in `to`) for a crop; `merge`, `split`, `drop` or `keep` for identities. Whoever disagrees edits the action, or
rejects the finding on the audit's page.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from formats.crop_sets import Crops, check
from formats.tables import escape, unescape
from utils import InputError

CROPS, IDENTITIES, RECORD = "audit.tsv", "audit_identities.tsv", "audit.json"
CROP_COLUMNS = (
    "index", "crop", "label", "identity", "kind", "score", "own", "other", "other_identity", "action", "to",
    "norm", "face", "landmarks", "mirror", "shift", "sharpness", "resolution", "filled", "reason",
)  # fmt: skip
IDENTITY_COLUMNS = ("kind", "label", "identity", "other", "other_identity", "score", "action", "crops", "reason")
CROP_ACTIONS = ("keep", "drop", "move")
IDENTITY_ACTIONS = ("keep", "drop", "merge", "split")


@dataclass
class Selection:
    """What to do with each crop of a set: `keep` bool [crops], and the label each has then, int64 [crops].

    Labels are those of the set (a part that is split off gets one behind the last); `sha256` of all that decided.
    """

    keep: np.ndarray
    labels: np.ndarray
    counts: dict[str, int]
    sha256: str


class SelectedCrops:
    """Some crops of a set, some of them under other labels, without a copy; labels are made to run from 0 again."""

    def __init__(self, crops: Crops, selection: Selection) -> None:
        names = crops.identity_names
        self.crops = crops
        self.name: str = crops.name
        self.indices = np.flatnonzero(selection.keep)
        if not len(self.indices):
            raise InputError(f"{crops.name}: the audit leaves not one crop")
        used, labels = np.unique(selection.labels[self.indices], return_inverse=True)
        self.labels = labels.astype(np.int64)
        self.identities = len(used)
        self.identity_names = [
            names[label] if label < len(names) else f"{names[origin]} (part)"
            for label, origin in zip(used.tolist(), self._origins(crops.labels, selection, used), strict=True)
        ]
        gone = crops.identities - len(set(used.tolist()) & set(range(crops.identities)))
        counted = ", ".join(f"{count} {what}" for what, count in selection.counts.items() if count)
        self.notes: list[str] = [
            *crops.notes,
            f"audit: {counted or 'nothing to do'}; {gone} labels without a crop left",
        ]

    @staticmethod
    def _origins(labels: np.ndarray, selection: Selection, used: np.ndarray) -> list[int]:
        first: dict[int, int] = {}
        for index in np.flatnonzero(selection.keep).tolist():
            first.setdefault(int(selection.labels[index]), int(labels[index]))
        return [first[label] for label in used.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop and the label that it has here."""
        return self.crops.read(int(self.indices[index]))[0], int(self.labels[index])

    def sizes(self) -> np.ndarray:
        """See `crop_sets.Crops`."""
        return self.crops.sizes()[self.indices]

    def describe(self, index: int) -> str:
        """How to find this crop again in the set itself."""
        return self.crops.describe(int(self.indices[index]))


def rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of a table, one after the other; `InputError` naming file and line
    if it is none."""
    with open(path, "rb") as file:
        if file.readline().rstrip(b"\r\n").decode("utf-8", "replace").split("\t") != list(columns):
            raise InputError(f"{path}: not a table of an audit (its first line must be {' '.join(columns)})")
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                raise InputError(f"{path}: the last line is cut off")
            cells = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape").split("\t")
            if len(cells) != len(columns):
                raise InputError(f"{path}, line {number}: {len(cells)} columns instead of {len(columns)}")
            yield number, {name: unescape(cell) for name, cell in zip(columns, cells, strict=True)}


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[list[Any]]) -> None:
    """Write a table whole or not at all; numbers as their shortest text, None and NaN as an empty cell."""
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(("\t".join(columns) + "\n").encode())
        for row in rows:
            line = "\t".join(escape(_text(cell)) for cell in row) + "\n"
            file.write(line.encode("utf-8", "surrogateescape"))


def _text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float | np.floating) and np.isnan(cell)):
        return ""
    return f"{float(cell):.6g}" if isinstance(cell, float | np.floating) else str(cell)


def read_selection(
    path: Path, labels: np.ndarray, identities: int, fingerprint: str, *, relabel: bool = False
) -> Selection:
    """What the audit in `path` (audit.tsv, or its folder) says of the crops with these labels and this fingerprint.

    Without `relabel` what would be moved, or lies in an identity of two people, is left out instead, and nothing is
    merged. Raises InputError if the audit is of other crops, or damaged.
    """
    path = path / CROPS if path.is_dir() else path
    record_path = path.with_name(RECORD)
    try:
        record = utils.read_json(record_path)
        of = record["data"]["fingerprint"]
    except OSError as error:
        raise InputError(f"{record_path}: {error.strerror}; it says of which crops {path.name} speaks") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{record_path}: not written by audit.py, or damaged") from error
    if of != fingerprint:
        raise InputError(f"{path}: an audit of other crops ({record['data'].get('name')}); run audit.py on these")
    keep, new = np.ones(len(labels), bool), labels.astype(np.int64).copy()
    moved = _apply_crops(path, keep, new, identities, relabel)
    table = path.with_name(IDENTITIES)
    # A crop that was moved follows its new identity into a merger.
    parts = _apply_identities(table, keep, new, labels, identities, relabel)
    counts = {"dropped": int((~keep).sum()), "moved": int((keep & moved).sum())}
    counts |= {"merged labels": parts.merged, "split labels": parts.split}
    digest = utils.sha256_of(path) + utils.sha256_of(table) + str(relabel)
    return Selection(keep, new, counts, hashlib.sha256(digest.encode()).hexdigest())


def select(crops: Crops, fingerprint: str, path: Path, *, relabel: bool) -> tuple[SelectedCrops, str]:
    """What the audit in `path` leaves of a set, and the fingerprint of that; see `read_selection`."""
    chosen = read_selection(path, crops.labels, crops.identities, fingerprint, relabel=relabel)
    kept = SelectedCrops(crops, chosen)
    check(kept)
    return kept, hashlib.sha256((fingerprint + chosen.sha256).encode()).hexdigest()


def _number(text: str, end: int) -> int | None:
    """A whole number from 0 to below `end`; None for anything else, however long."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 and int(text) < end else None


def _apply_crops(path: Path, keep: np.ndarray, new: np.ndarray, identities: int, relabel: bool) -> np.ndarray:
    """Note what happens to single crops in `keep` and `new`; bool [crops]: moved."""
    moved = np.zeros(len(keep), bool)
    index = -1
    for index, (number, row) in enumerate(rows(path, CROP_COLUMNS)):
        if index >= len(keep):
            break
        action = row["action"]
        if row["index"] != str(index) or action not in CROP_ACTIONS:
            raise InputError(f"{path}, line {number}: expected crop {index} with one of {', '.join(CROP_ACTIONS)}")
        if action == "drop" or (action == "move" and not relabel):
            keep[index] = False
        elif action == "move":
            to = _number(row["to"], identities)
            if to is None:
                raise InputError(f"{path}, line {number}: moves to {row['to'][:40]!r}, which is no label of the set")
            new[index], moved[index] = to, True
    if index != len(keep) - 1:
        raise InputError(f"{path}: not one row for each of {len(keep)} crops")
    return moved


@dataclass
class _Parts:
    union: np.ndarray  # int64 [identities]: the label that each has after mergers
    merged: int = 0
    split: int = 0


def _apply_identities(
    path: Path,
    keep: np.ndarray,
    new: np.ndarray,
    labels: np.ndarray,
    identities: int,
    relabel: bool,
) -> _Parts:
    parts, dropped = _Parts(np.arange(identities)), []
    for number, row in rows(path, IDENTITY_COLUMNS):
        action, label = row["action"], _number(row["label"], identities)
        if action not in IDENTITY_ACTIONS or label is None:
            what = f"{action[:40]!r} of label {row['label'][:40]!r}"
            raise InputError(f"{path}, line {number}: {what} is nothing that can be done")
        if action == "drop":
            dropped.append(label)
        elif action == "split":
            named = [_number(word, len(labels)) for word in row["crops"].split()]
            members = np.array([index for index in named if index is not None], np.int64)
            if not len(members) or None in named or (labels[members] != label).any():
                raise InputError(f"{path}, line {number}: names crops that are not of label {label}")
            still = members[new[members] == label]  # but for those that are somebody else's
            if relabel:
                new[still] = identities + parts.split
                parts.split += 1
            else:
                keep[still] = False
        elif action == "merge" and relabel:
            other = _number(row["other"], identities)
            if other is None:
                raise InputError(
                    f"{path}, line {number}: merges with {row['other'][:40]!r}, which is no label of the set"
                )
            first, second = parts.union[label], parts.union[other]
            if first != second:
                parts.union[parts.union == max(first, second)] = min(first, second)
                parts.merged += 1
    inside = new < identities
    new[inside] = parts.union[new[inside]]
    # Whoever is left out goes with all crops that show them: those moved to them, and either part of a split.
    keep[np.isin(new, parts.union[dropped]) | (~inside & np.isin(labels, dropped))] = False
    return parts
