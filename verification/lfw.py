"""LFW: verification pairs as its text files state them, the photos they speak of, and the faces in these photos.

A pairs file (http://vis-www.cs.umass.edu/lfw/README.txt) opens with a line `folds<TAB>n`, or `n` alone for a single
fold. Each fold has n lines `identity<TAB>a<TAB>b` (photos a and b of one person) and n lines
`identity<TAB>a<TAB>other<TAB>b`. Photo 7 of Zico is `Zico/Zico_0007.jpg` under the photo folder.

The file is read strictly: what it says about its own length has to be true, because a benchmark that lost a few lines
still gives a number. Every error names the line.

Crops are kept in windows of photos, each in a file named by a hash of everything it was made from: the bytes of the
photos, the detector's weights, the code in between and the libraries' versions. A photo replaced, another detector or
a repaired alignment is therefore noticed without asking; the price is that all photos are hashed at each start (LFW:
about a second).
"""

import functools
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import utils
from config import CROP_SIZE
from cropping import faces
from cropping.align import Rule
from cropping.faces import FaceFinder
from formats import cached, tables
from formats.tables import FaceRow
from retinaface import RetinaFace
from retinaface.weights import load_weights
from utils import InputError
from verification.lazy import CropArray, LazyCrops

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # in this order, should one photo exist twice
LISTED = 100  # photos that an error names before it only counts
LEVELS = 3  # below the folder given, where folders of identities are looked for

_NUMBER = re.compile("[0-9]{1,9}")
# Fields separated by blanks instead of TABs, for names that hold blanks themselves.
_ONE_PERSON = re.compile(r"(.+?)\s+([0-9]{1,9})\s+([0-9]{1,9})")
_TWO_PERSONS = re.compile(r"(.+?)\s+([0-9]{1,9})\s+(.+?)\s+([0-9]{1,9})")

Numbered = tuple[str, int]  # a photo as lists name it: identity and number


@dataclass(frozen=True)
class Pairs:
    """What a pairs file says.

    photos: (identity, number) of each photo, once, in order of appearance; lines: where each was named first.
    pairs: int64 [P, 2], indices of photos. same: bool [P], folds: int64 [P] from 0.
    """

    photos: list[Numbered]
    lines: list[int]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray


def read_pairs(path: str | Path) -> Pairs:
    """Read a pairs file; InputError with the line's number for anything that is not as described above."""
    path = Path(path)
    try:
        lines = utils.read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    while lines and not lines[-1].strip():
        lines.pop()
    folds, size = _read_head(path, lines)
    expected = 1 + folds * 2 * size
    if len(lines) != expected:
        raise InputError(
            f"{path}: {len(lines)} lines; line 1 promises {folds} folds of {size} + {size} pairs, that is {expected}"
        )
    index: dict[Numbered, int] = {}
    first_named: list[int] = []
    pairs = np.zeros((expected - 1, 2), dtype=np.int64)
    same = np.zeros(expected - 1, dtype=bool)
    for row, line in enumerate(lines[1:]):
        photos = read_line(path, row + 2, line)
        for side, photo in enumerate(photos):
            if photo not in index:
                index[photo] = len(index)
                first_named.append(row + 2)
            pairs[row, side] = index[photo]
        same[row] = photos[0][0] == photos[1][0]
    fold_of = np.repeat(np.arange(folds), 2 * size)
    _check_balance(path, same.reshape(folds, -1), size)
    return Pairs(list(index), first_named, pairs, same, fold_of)


def _read_head(path: Path, lines: list[str]) -> tuple[int, int]:
    fields = lines[0].split() if lines else []
    if len(fields) not in (1, 2) or not all(_NUMBER.fullmatch(field) and int(field) > 0 for field in fields):
        found = repr(lines[0][:60]) if lines else "nothing"
        raise InputError(
            f"{path}: line 1: has to be the number of folds and of pairs, or of pairs alone; it is {found}"
        )
    numbers = [int(field) for field in fields]
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def read_line(path: Path, number: int, line: str) -> tuple[Numbered, Numbered]:
    """The two photos of a line `identity a b` or `identity a identity b`; InputError naming file and line otherwise."""
    fields = _split(line)
    if len(fields) == 3:
        fields.insert(2, fields[0])
    elif len(fields) == 4 and fields[0] == fields[2]:
        raise InputError(f"{path}: line {number}: four fields but one identity: {line[:80]!r}")
    if len(fields) != 4 or not (_NUMBER.fullmatch(fields[1]) and _NUMBER.fullmatch(fields[3])):
        raise InputError(
            f"{path}: line {number}: neither 'identity a b' nor 'identity a identity b', TAB between: {line[:80]!r}"
        )
    photos = (fields[0], int(fields[1])), (fields[2], int(fields[3]))
    for identity, _ in photos:
        if identity in ("", ".", "..") or any(mark in identity for mark in "/\\\0"):
            raise InputError(f"{path}: line {number}: {identity!r} cannot be the name of a folder of photos")
    if photos[0] == photos[1]:
        raise InputError(f"{path}: line {number}: pairs a photo with itself: {line[:80]!r}")
    return photos


def _split(line: str) -> list[str]:
    if "\t" in line:
        return [unicodedata.normalize("NFC", field.strip()) for field in line.split("\t")]
    line = unicodedata.normalize("NFC", line.strip())
    words = line.split()
    if len(words) in (3, 4) and all(_NUMBER.fullmatch(word) for word in (words[1], words[-1])):
        return words
    match = _ONE_PERSON.fullmatch(line) or _TWO_PERSONS.fullmatch(line)
    return list(match.groups()) if match else words


def _check_balance(path: Path, same: np.ndarray, size: int) -> None:
    genuine = same.sum(axis=1)
    wrong = np.flatnonzero(genuine != size)
    if len(wrong) == 0:
        return
    fold = int(wrong[0])
    start = 2 + fold * same.shape[1]
    raise InputError(
        f"{path}: fold {fold + 1} (lines {start} to {start + same.shape[1] - 1}) has {genuine[fold]} pairs of one "
        f"identity and {same.shape[1] - genuine[fold]} of two; line 1 promises {size} of each"
    )


def find_photos(folder: str | Path, pairs: Pairs, pairs_path: str | Path) -> list[Path]:
    """The file of every photo of `pairs`, in their order.

    `folder` holds the folders of the identities, or has, at most three levels below, one folder that does
    (`lfw-deepfunneled`; RFW's `data/African`). Names are compared in Unicode's composed form, because file systems and
    text files differ in it. Raises InputError listing the photos that are not there.
    """
    identities = {identity for identity, _ in pairs.photos}
    root, folders = _photo_root(Path(folder), identities)
    listings: dict[str, dict[str, Path]] = {}
    files: list[Path] = []
    missing: list[str] = []
    for (identity, number), line in zip(pairs.photos, pairs.lines, strict=True):
        if identity not in listings:
            listings[identity] = photos_in(folders[identity]) if identity in folders else {}
        name = photo_name(identity, number)
        file = listings[identity].get(name.rpartition("/")[2])
        if file is None:
            missing.append(f"{name}.jpg (line {line})")
        else:
            files.append(file)
    if missing:
        listed = "".join(f"\n  {name}" for name in missing[:LISTED])
        rest = f"\n  and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise InputError(f"{pairs_path}: names {len(missing)} photos that are not in {root}:{listed}{rest}")
    return files


def photo_name(identity: str, number: int) -> str:
    """LFW's name of a photo under the photo folder, without its suffix."""
    return f"{identity}/{identity}_{number:04d}"


def _photo_root(folder: Path, identities: set[str]) -> tuple[Path, dict[str, Path]]:
    """The folder of identity folders, and these by name: the nearest level that has any of them."""
    level = {folder: folders_in(folder)}
    for _ in range(1 + LEVELS):
        roots = [path for path, inside in level.items() if identities & inside.keys()]
        if len(roots) > 1:  # RFW keeps its groups side by side: of several, the only one with everybody
            roots = [path for path in roots if identities <= level[path].keys()] or roots
        if len(roots) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in roots)
            raise InputError(f"{folder}: several folders of photos ({names}); name one")
        if roots:
            return roots[0], level[roots[0]]
        level = {path: folders_in(path) for inside in level.values() for path in inside.values()}
    raise InputError(
        f"{folder}: neither here nor one level below, nor up to {LEVELS}, is a folder of any identity that is wanted"
    )


def folders_in(folder: Path) -> dict[str, Path]:
    """The folders in a folder by their names in composed Unicode, sorted."""
    return {
        unicodedata.normalize("NFC", entry.name): Path(entry.path)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.is_dir()
    }


def photos_in(folder: Path) -> dict[str, Path]:
    """The photos in a folder by their names without suffix, in composed Unicode."""
    found: dict[str, Path] = {}
    for path in (Path(entry.path) for entry in os.scandir(folder) if entry.is_file()):
        stem, suffix = unicodedata.normalize("NFC", path.stem), path.suffix.lower()
        if suffix not in SUFFIXES:
            continue
        if stem not in found or SUFFIXES.index(suffix) < SUFFIXES.index(found[stem].suffix.lower()):
            found[stem] = path
    return found


# --- crops ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faces:
    """What became of the photos of a set: crops uint8 RGB [M, 112, 112, 3], zero where `rows` has no crop.

    rows: one per photo. sha256: of each photo's bytes, "" for what cannot be read. detector: hash of the detector's
    weights and of the code between photo and crop.
    """

    crops: CropArray
    rows: list[FaceRow]
    sha256: list[str]
    detector: str


def crop_faces(
    files: Sequence[Path],
    *,
    rule: Rule = "central",
    weights: str | Path | None = None,
    max_side: int | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    cache_dir: Path | None = None,
    name: str = "faces",
) -> Faces:
    """Detect, choose by `rule` and align the face of every photo; what is in `cache_dir` already is not done again.

    Photos longer than `max_side` pixels are shrunk for detection. A photo that cannot be read, or shows no face, is a
    row without a crop. Without `cache_dir` the crops stay in memory, with it they are read from there when wanted.
    """
    finder = CachedFinder(rule, weights, max_side, device, cache_dir)
    made = list(crop_windows(files, finder, workers, name))
    return Faces(
        LazyCrops(len(files), lambda photo: made[photo // faces.WINDOW].crops[photo % faces.WINDOW]),
        [row for window in made for row in window.rows],
        [digest for window in made for digest in window.sha256],
        finder.detector,
    )


def crop_windows(
    files: Sequence[Path], finder: Callable[[Sequence[Path]], Faces], workers: int | None = None, name: str = "faces"
) -> Iterator[Faces]:
    """What `finder` makes of the photos, a window at a time, in their order; shows progress."""
    with utils.progress(len(files), f"{name}: faces", unit="photo") as bar:
        for window in faces.ordered_map(finder, faces.windows(files, path_of=Path), utils.worker_count(workers)):
            yield window
            bar.update(len(window.rows))


class CachedFinder:
    """Takes a window of photos to `Faces`, from the cache where it can; safe to call from several threads."""

    def __init__(
        self,
        rule: Rule,
        weights: str | Path | None,
        max_side: int | None,
        device: torch.device | str,
        cache_dir: Path | None,
    ) -> None:
        self.rule, self.weights, self.max_side = rule, weights, max_side
        self.device, self.cache_dir = device, cache_dir
        self.detector = detector_hash(weights, torch.device(device).type)
        self._lock = threading.Lock()
        self._finder: FaceFinder | None = None

    def __call__(self, files: Sequence[Path]) -> Faces:
        """The crops and rows of one window of photos."""
        hashes = [_hash_of(file) for file in files]
        if self.cache_dir is None or "" in hashes:  # what cannot be read may be readable next time
            crops, rows = self._find(files)
            return Faces(crops, rows, hashes, self.detector)
        key = cached.key_of(self.detector, self.rule, self.max_side, hashes)
        path = self.cache_dir / "faces" / f"{key}.cache"
        found = cached.read(path, key)
        if found is None:
            crops, rows = self._find(files)
            table = np.frombuffer(tables.table_text(rows), dtype=np.uint8)
            cached.write(path, key, {"rows": table, "crops": crops})
        else:
            # The photos may have moved since.
            names = [faces.as_photo(file) for file in files]
            stored = tables.parse_table(found["rows"].tobytes(), path)
            rows = [
                replace(row, file=name.file, identity=name.identity) for row, name in zip(stored, names, strict=True)
            ]
        return Faces(LazyCrops(len(files), lambda row: _stored_crops(path, key)[row]), rows, hashes, self.detector)

    def _find(self, files: Sequence[Path]) -> tuple[np.ndarray, list[FaceRow]]:
        with self._lock:  # made when first needed: a run from the cache needs no detector
            if self._finder is None:
                detector = RetinaFace(self.weights, self.device, max_side=self.max_side)
                self._finder = FaceFinder(detector, self.rule)
        results = self._finder([faces.as_photo(file) for file in files])
        crops = np.zeros((len(files), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
        for index, (_, bgr) in enumerate(results):
            if bgr is not None:
                crops[index] = bgr[..., ::-1]
        return crops, [row for row, _ in results]


def _hash_of(file: Path) -> str:
    try:
        return utils.sha256_of(file)
    except (OSError, InputError):  # its row will say why
        return ""


@functools.lru_cache(maxsize=4)  # neighbours are asked for one after the other
def _stored_crops(path: Path, key: str) -> np.ndarray:
    found = cached.read(path, key)
    if found is None:
        raise InputError(f"{path}: gone or damaged since this run began; run the same command again")
    return found["crops"]


def detector_hash(weights: str | Path | None, device: str) -> str:
    """A hash of all that decides the crop of a photo, but for the rule."""
    digest = hashlib.sha256()
    for name, arrays in sorted(load_weights(weights).items()):
        digest.update(name.encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps([faces.made_by(), device]).encode())
    return digest.hexdigest()
