"""Which photos take part: the devkit's template lists, noise lists, and the names by which files are recognised.

A photo of FaceScrub may be called `Adam McKay_468.jpg` on disk, `Adam_McKay_468.png` in a list and `Adam_McKay_468.JPG`
in another; a cropped set ends in `.png`, the uncropped one in `.jpg`, and some files end in nothing. Comparing texts
loses such photos without a word, which is how a published result came to stand on 3,359 of 3,530 probes. So names are
always compared as `photo_key`: composed characters, underscores for blanks, without the extension of an image.
The price: two photos in one folder that differ in nothing but that cannot be told apart; `PhotoIndex` refuses them.
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

import utils
from utils import InputError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .tif .tiff .webp .jp2 .ppm .pgm .avif .heic .heif".split()
)

Key = tuple[str, ...]


@dataclass(frozen=True)
class TemplateList:
    """A devkit list `{"path": [...], "id": [...]}`; `ids` is None for distractors, which have no identity."""

    paths: list[str]
    ids: list[str] | None

    def __len__(self) -> int:
        return len(self.paths)


def read_template_list(path: str | Path, *, with_ids: bool = False) -> TemplateList:
    """Read a template list; `InputError` naming the file when it is none, is empty, or lacks ids that are wanted."""
    path = Path(path)
    try:
        content = utils.read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not _is_texts(content.get("path")):
        raise InputError(f'{path}: not a template list ({{"path": [...], "id": [...]}})')
    if not content["path"]:
        raise InputError(f"{path}: the list is empty")
    _check_names(path, content["path"])
    if not with_ids and "id" not in content:
        return TemplateList(content["path"], None)
    ids = content.get("id")
    if isinstance(ids, list):  # jsoncpp, which the devkit reads with, takes numbers for texts
        ids = [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in ids]
    if not _is_texts(ids) or len(ids) != len(content["path"]):
        raise InputError(f'{path}: "id" must be a list of texts, one for each of the {len(content["path"])} paths')
    _check_names(path, ids)
    return TemplateList(content["path"], ids)


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_names(path: Path, names: list[str]) -> None:
    """`InputError` for what JSON can escape but neither a file nor the devkit's byte order can have."""
    everything = "".join(names)
    try:
        everything.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: half a character, {everything[error.start]!a}, is no name") from error
    if "\0" in everything:
        raise InputError(f"{path}: a text with a NUL is no name")


def photo_key(path: str) -> Key:
    """What identifies a photo: its path's components in normal form, the last without image extensions.

    Only extensions of images are cut off, since names have dots of their own (`J. R. Dotted Jr._220`).
    """
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").replace(" ", "_").split("/")
    stem = parts[-1]
    while True:
        shorter, suffix = os.path.splitext(stem)  # noqa: PTH122 - millions of names
        if suffix.lower() not in IMAGE_SUFFIXES or not shorter:
            return (*(part for part in parts[:-1] if part not in ("", ".")), stem)
        stem = shorter


class PhotoIndex:
    """Files that can be looked up by any of their names."""

    def __init__(self, files: Iterable[str], folder: str | Path) -> None:
        """`files` are paths relative to `folder`, which is named in errors."""
        self.folder = Path(folder)
        self.files: dict[Key, str] = {}
        self.others: dict[Key, str] = {}
        for file in files:
            key = photo_key(file)
            if self.files.setdefault(key, file) is not file:
                self.others[key] = file

    def find(self, path: str) -> str | None:
        """The file that a list calls `path`, or None; `InputError` when two files could be meant."""
        key = photo_key(path)
        if key in self.others:
            raise InputError(f"{self.folder / self.others[key]}: {self.files[key]} has the same name but for its form")
        return self.files.get(key)


class NoiseList:
    """Photos that show somebody else, as published by the InsightFace project for FaceScrub and MegaFace.

    An entry has as many components as its author thought sufficient (`Adam_McKay_468.png`,
    `375/37531198@N00/4174611825_0.jpg`); it means every photo whose key ends in it.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.keys = {photo_key(entry) for entry in entries}
        self.depths = sorted({len(key) for key in self.keys})

    def __len__(self) -> int:
        return len(self.keys)

    def marks(self, paths: Sequence[str]) -> np.ndarray:
        """bool [n]: which of `paths` are noise."""
        return np.array([self._has(photo_key(path)) for path in paths], bool)

    def _has(self, key: Key) -> bool:
        return any(key[-depth:] in self.keys for depth in self.depths)


def read_noise_list(path: str | Path) -> NoiseList:
    """Read a noise list: one name a line, `#` begins a comment line; `InputError` when it has no name at all."""
    lines = utils.read_bytes(path).decode("utf-8-sig", "surrogateescape").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise InputError(f"{path}: holds no names")
    return NoiseList(names)
