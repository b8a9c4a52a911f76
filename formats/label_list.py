"""Text lists of labelled images, `path label` a line, as FaceX-Zoo and TFace read them.

A blank, a TAB or a comma stands between path and label; the label is what follows the last of them. Paths are relative
to the folder of the list, and none may lead out of it. Blank lines and lines that begin with `#` say nothing.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from formats.names import relative_path

MAX_LINE = 1 << 16  # bytes

_LINE = re.compile(r"(?P<path>.*\S)[ \t,]+(?P<label>[^ \t,]+)")
_TRIED = 20  # lines looked at to see what a file is


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line; a line longer than `MAX_LINE` is cut off."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            whole = line
            while not whole.endswith(b"\n") and len(whole) == MAX_LINE:
                whole = file.readline(MAX_LINE)
            yield number, line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def parse_line(line: str) -> tuple[str, str]:
    """Path (with `/`, safe to join to a folder) and label of a line; `ValueError` with the reason if it has none."""
    if not line.strip() or line.startswith("#"):
        raise ValueError("a blank line or a remark")
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{line[:60]!r} is not 'path label'")
    if match["label"].startswith("-") and match["label"][1:].isdecimal():
        raise ValueError(f"the label {match['label']}, which is nobody's")
    return relative_path(match["path"].strip().strip('"')), match["label"]


def looks_like_list(path: Path, head: bytes) -> bool:
    """Whether a file that begins with these bytes is a list: among its first lines one names a file that is there."""
    lines = head[: _TRIED * 1024].removeprefix(b"\xef\xbb\xbf").split(b"\n")[:_TRIED]
    for line in lines:
        try:
            file, _ = parse_line(line.decode("utf-8", "surrogateescape"))
            if os.path.isfile(path.parent / file):  # noqa: PTH113 - false, not an error, for a name too long
                return True
        except ValueError:
            continue
    return False
