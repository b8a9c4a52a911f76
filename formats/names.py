"""Names that others chose, in archives, lists, annotations and tables: what may become a path here, and how.

Whatever is foreign passes `relative_path` before it is joined to a folder, and `safe_name` before it becomes the name
of a file or folder that we write. Neither asks what a name means, only what a file system would make of it.
"""

import math
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import InputError

MAX_NAME = 200  # bytes; file systems hold 255, and room is needed for "~2" and temporary names
MAX_PATH = 4096  # bytes; Linux's PATH_MAX

# What systems put into folders of photos: thumbnails, settings of a view, remains of another system.
_LITTER = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
    | {"system volume information", "lost+found", "folder.jpg.db", "iphotolock.data"}
)

# Characters that no file name or table should hold: separators, controls, halves of a surrogate pair.
_UNSAFE = {ord(c): "_" for c in "/\\"} | dict.fromkeys([*range(32), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "_")
_ESCAPED = {ord("\\"): "\\\\"} | {c: f"\\x{c:02x}" for c in [*range(32), *range(0x7F, 0xA0)]}


def path_parts(name: str) -> list[str]:
    """The parts of a foreign path, `/` or `\\` between them, without empty ones and `.`.

    Raises `ValueError` with the reason for a path that would not stay below the folder it is joined to: an absolute
    one, one with `..`, one that ends in nothing; and for one that no file system takes (NUL, too long).
    """
    path = name.replace("\\", "/")
    if "\0" in path:
        raise ValueError("a path with a NUL")
    if path.startswith("/") or (len(path) > 1 and path[1] == ":"):
        raise ValueError("an absolute path")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("a path with '..'")
    if not parts:
        raise ValueError("a path without a name")
    if len(path.encode("utf-8", "surrogatepass")) > MAX_PATH:
        raise ValueError(f"a path of more than {MAX_PATH} bytes")
    return parts


def relative_path(name: str) -> str:
    """A foreign path with `/` between its parts, which stays below whatever folder it is joined to.

    Raises `ValueError` as `path_parts` does. Whether the folder holds links that lead out is not looked at.
    """
    return "/".join(path_parts(name))


def safe_name(name: str) -> str:
    """`name` as a single, visible file name: no separators, control characters, leading dot or excessive length.

    Different names may become one; whoever needs them apart compares the results by `same_name`.
    """
    clean = name.translate(_UNSAFE) or "_"
    if clean.startswith("."):
        clean = "_" + clean[1:]
    stem, suffix = os.path.splitext(clean)  # noqa: PTH122 - a bare name
    room = MAX_NAME - len(suffix.encode())
    if len(stem.encode()) <= room:
        return clean
    if room < 1:
        return clean.encode()[:MAX_NAME].decode("utf-8", "ignore")
    return stem.encode()[:room].decode("utf-8", "ignore") + suffix


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set, but something that a system left there."""
    return name.lower() in _LITTER


def same_name(name: str) -> str:
    """What names are compared by: some file systems ignore case, some how accents are composed, those of Windows also
    dots and blanks at the end."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).rstrip(". ") or name


_WHOLE = re.compile(r"[+-]?\d+(?:\.0*)?")


def label_text(value: Any) -> str:
    """A label as text, a whole number in its shortest form; "" for one that nobody has: none, NaN, an infinite one."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if (isinstance(value, float) and not math.isfinite(value)) or text == "nan":  # as pandas writes what is not there
        return ""
    return str(int(float(text))) if _WHOLE.fullmatch(text) and len(text) < 16 else text


def is_nobodys(label: str) -> bool:
    """Whether a label's text is a number below zero, which several libraries give to photos of nobody."""
    return label.startswith("-") and label[1:].isdecimal()


def printable(text: str) -> str:
    """A foreign text as one that neither a terminal nor a table obeys: controls become `\\xNN`, a backslash two."""
    return text.translate(_ESCAPED).encode("utf-8", "backslashreplace").decode()


class TakenNames:
    """Names that are taken, as file systems compare them."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {same_name(name) for name in names}
        self._next: dict[str, int] = {}  # where to look for the next free number of a name that came often

    def add(self, name: str) -> None:
        """Take a name."""
        self._names.add(same_name(name))

    def free(self, name: str, ending: bool = True) -> str:
        """`name`, or the first of `name~2.ext`, `name~3.ext` ... that is not taken; without an `ending`, as folders
        have none, of `name.ext~2` ..."""
        plain = same_name(name)
        if plain not in self._names:
            return name
        stem, suffix = os.path.splitext(name) if ending else (name, "")  # noqa: PTH122 - a bare name
        number = self._next.get(plain, 2)
        while same_name(candidate := f"{stem}~{number}{suffix}") in self._names:
            number += 1
        self._next[plain] = number + 1
        return candidate


def matching(pattern: Path) -> list[Path]:
    """The files whose names match a pattern's last part, sorted; `InputError` for one that is no pattern."""
    try:
        return sorted(pattern.parent.glob(pattern.name))
    except ValueError as error:
        raise InputError(f"{pattern}: {error}") from error
