"""MS-Celeb-1M's TSV files: one face per line, the image as base64 in the last column.

Faces-Aligned and Faces-Cropped have 7 columns (MID, search rank, image URL, page URL, face id, rectangle, image), the
development sets 6 (MID, name, image URL, face id, rectangle, image). Lines are split at TAB by hand: the URLs hold
quotes, which a CSV reader would take for quoting. A row that is not right is an error of that row alone, and its image
is only decoded when it is asked for, so that a restart passes over finished rows at the speed of the disk.
"""

import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

# The longest rows hold a 300x300 JPEG, about 100 kB; whatever is longer than this is no row.
MAX_LINE = 64 << 20

_ALIGNED, _DEVELOPMENT = 7, 6  # columns


@dataclass(frozen=True)
class FaceLine:
    """A row of the file. `name` is `<rank>-<face id>`, in the development sets `<line>-<face id>`.

    `mid` and `name` are as the file has them. Neither is safe as a file name: a damaged or hostile file can hold
    anything there.
    """

    line: int
    mid: str
    name: str
    encoded_rectangle: bytes
    encoded_image: bytes

    def image(self) -> bytes:
        """The encoded image; `ValueError` if the column is not base64."""
        if not self.encoded_image:
            raise ValueError("the image column is empty")
        return _decode(self.encoded_image, "the image")

    def rectangle(self) -> np.ndarray:
        """The face's box in the original photo: float32 [4], x1 y1 x2 y2 relative to its size; `ValueError` if none."""
        data = _decode(self.encoded_rectangle, "the rectangle")
        if len(data) != 16:
            raise ValueError(f"the rectangle has {len(data)} bytes, not 4 float32")
        return np.frombuffer(data, "<f4")


def _decode(column: bytes, what: str) -> bytes:
    try:
        return binascii.a2b_base64(column.strip(), strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"{what} is not base64: {error}") from error


def parse_line(text: bytes, line: int) -> FaceLine:
    """A line without its end; `ValueError` with the reason if it has not the columns of a face."""
    columns = text.split(b"\t")
    if len(columns) == _ALIGNED:
        mid, rank, _, _, face, rectangle, image = columns
    elif len(columns) == _DEVELOPMENT:
        mid, _, _, face, rectangle, image = columns
        rank = b"%d" % line
    else:
        raise ValueError(f"{len(columns)} columns instead of {_ALIGNED} or {_DEVELOPMENT}")
    if not mid.strip():
        raise ValueError("no MID in the first column")
    name = f"{_text(rank)}-{_text(face)}"
    return FaceLine(line, _text(mid), name, rectangle, image)


def _text(column: bytes) -> str:
    return column.strip().decode("utf-8", "surrogateescape")


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Line number (from 1) and bytes of each line of a binary file; LF or CRLF, with or without one at the end.

    A line longer than `MAX_LINE` comes as None: its bytes are passed over, not kept.
    """
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
            yield number, None
            continue
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


_MID = re.compile(rb"m\.\w+\t")  # Freebase's machine identifier of a person


def looks_like_faces(head: bytes) -> bool:
    """Whether the first bytes of a file (some 100 kB, to hold a row) can be such a TSV.

    One line with 6 or 7 columns that starts with a MID-like first column is enough: the others may be damaged.
    """
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return any(line.count(b"\t") in (_ALIGNED - 1, _DEVELOPMENT - 1) and _MID.match(line) for line in lines)
