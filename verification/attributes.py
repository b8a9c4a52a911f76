"""What is known of photos and people beside their pictures: tables of attributes, and their values as groups.

A table (comma, semicolon or TAB between) has a column `file` (a path that ends as the photo's does) or `identity` (the
name of the person's folder), and any others. A column `parameters` of JSON, as synthesize.py writes, gives a column for
each number or word in it, named by its last key (`gender`, `years`, `melanin` ...).

Numbers with more than `DISTINCT` values become ranges: at the borders given (`age:30,50`), else thirds of the photos.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import InputError

DISTINCT = 6
FILE_COLUMNS = ("file", "photo", "path", "image", "filename")
IDENTITY_COLUMNS = ("identity", "person", "name", "subject", "id")


@dataclass
class Attributes:
    """Values by photo (the last parts of its path, the longest known first) and by identity."""

    by_file: dict[str, dict[str, str]] = field(default_factory=dict)
    by_identity: dict[str, dict[str, str]] = field(default_factory=dict)

    def columns(self) -> list[str]:
        """All names of columns, sorted."""
        rows = [*self.by_file.values(), *self.by_identity.values()]
        return sorted({column for row in rows for column in row})

    def value(self, photo: Path, column: str) -> str:
        """The value for a photo, "" if nobody knows it."""
        for depth in (3, 2, 1):
            row = self.by_file.get("/".join(photo.parts[-depth:]))
            if row is not None and column in row:
                return row[column]
        return self.by_identity.get(photo.parent.name, {}).get(column, "")


def read_attributes(paths: Sequence[Path]) -> Attributes:
    """Read tables; InputError naming file and line for what is none, or says two things of one photo or person."""
    found = Attributes()
    for path in paths:
        try:
            lines = utils.read_bytes(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
        separator = next((mark for mark in "\t,;" if lines and mark in lines[0]), ",")
        # JSON cells have quotes of their own; they are written between tabs.
        quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        csv.field_size_limit(1 << 24)
        rows = csv.reader(lines, delimiter=separator, quoting=quoting)  # type: ignore[arg-type]
        _read(found, path, [cell.strip() for cell in next(rows, [])], rows)
    return found


def _read(found: Attributes, path: Path, head: list[str], rows: Iterator[list[str]]) -> None:
    plain = [cell.lower() for cell in head]
    file_at = next((plain.index(name) for name in FILE_COLUMNS if name in plain), None)
    person_at = next((plain.index(name) for name in IDENTITY_COLUMNS if name in plain), None)
    if file_at is None and person_at is None:
        raise InputError(f"{path}: line 1: no column is called {FILE_COLUMNS[0]} or {IDENTITY_COLUMNS[0]}")
    known = found.by_identity if file_at is None else found.by_file
    for number, cells in enumerate(rows, 2):
        if not any(cells):
            continue
        if len(cells) != len(head):
            raise InputError(f"{path}: line {number}: {len(cells)} columns, the first line names {len(head)}")
        values: dict[str, str] = {}
        for place, (column, cell) in enumerate(zip(head, cells, strict=True)):
            if column == "parameters" and cell.startswith("{"):
                values |= _scalars(cell, f"{path}: line {number}")
            elif place not in (file_at, person_at) and column:
                values[column] = cell.strip()
        key = cells[person_at if file_at is None else file_at].strip().replace("\\", "/")  # type: ignore[index]
        # A photo is known by the last parts of its path; its folder is a person's, so two parts tell photos apart.
        key = key if file_at is None else "/".join(key.split("/")[-2:])
        before = known.setdefault(key, {})
        if any(before.get(column, value) != value for column, value in values.items()):
            raise InputError(f"{path}: line {number}: says something else of {key}")
        before |= values


def _scalars(text: str, where: str) -> dict[str, str]:
    try:
        content = utils.parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: parameters are not JSON ({error})") from error
    values: dict[str, str] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, key)
        elif isinstance(value, str | int | float | bool) and name:
            values.setdefault(name, str(value))

    collect(content, "")
    return values


def as_groups(values: Sequence[str], borders: Sequence[float] | None = None) -> list[str]:
    """Values as names of groups: numbers of many values, or with `borders`, as ranges; "" stays unknown, and so does
    "nan" among numbers."""
    known, given = sorted({value for value in values if value}), borders is not None
    numbers = {}
    for value in known:
        try:
            numbers[value] = float(value)
        except ValueError:
            if borders is not None:
                raise InputError(f"borders are given, but {value[:40]!r} is no number") from None
            return list(values)
    if any(map(math.isfinite, numbers.values())):
        values = [value if math.isfinite(numbers.get(value, 0)) else "" for value in values]
        known = sorted({value for value in values if value})
    if borders is None:
        if len(known) <= DISTINCT:
            return list(values)
        borders = np.unique(np.quantile([numbers[value] for value in values if value], [1 / 3, 2 / 3])).tolist()
    edges = sorted(borders)
    shown = _as_texts(edges, exactly=given)
    names = [
        f"under {shown[0]}",
        *(f"{low} to {high}" for low, high in itertools.pairwise(shown)),
        f"{shown[-1]} and more",
    ]
    return [names[int(np.searchsorted(edges, numbers[value], side="right"))] if value else "" for value in values]


def _as_texts(borders: Sequence[float], *, exactly: bool) -> list[str]:
    """Borders in as few digits as tell them apart without an exponent; or `exactly`, as somebody gave them."""
    texts: list[str] = []
    for digits in range(3, 18):
        texts = [f"{border:.{digits}g}" for border in borders]
        apart = len(set(texts)) == len(texts) and not any("e" in text for text in texts)
        if all(float(text) == border for text, border in zip(texts, borders, strict=True)) or (apart and not exactly):
            break
    return texts


def parse_column(text: str) -> tuple[str, list[float] | None]:
    """`age` or `age:30,50`: the name of a column, and borders of ranges."""
    name, colon, borders = text.partition(":")
    if not colon:
        return name, None
    try:
        numbers = [float(border) for border in borders.split(",")]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return name, numbers
    except ValueError:
        raise InputError(f"--groups {text}: borders are numbers, as in {name}:30,50") from None
