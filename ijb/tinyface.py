"""TinyFace: closed-set search for faces of twenty pixels among 153,428 strangers.

The gallery is the matches and the distractors; a file's subject is the number before `_` in its name, and distractors
match nobody. Embeddings have length 1. Rank-k is the share of the probes that have a mate with one among the k best, as
CVLface's evaluation prints it in percent; where scores are equal it sorts, which puts what comes later in the gallery
first, so that a distractor beats a mate. mAP is the mean over probes of the precision at each mate's place (equal
scores of others count as better). A probe or mate whose photo gives nothing fails.

Lists are the official .mat files, a JSON file with the keys of `Lists`, or a text file a list, one name a line.

Faces of this size are not found as they are: the photo is enlarged and given surroundings, the face nearest to its
middle is aligned, and where none is found the whole picture is resized, which is counted.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy.io

import utils
from config import CROP_SIZE
from cropping.align import AlignmentError, align_face, choose_face, warp
from cropping.faces import Detector
from cropping.photos import COMPANIONS, PhotoError, read_photo
from ijb.crops import Cut
from utils import InputError
from verification.intervals import REPLICATES, Interval, rate_interval

RANKS = (1, 5, 20)
ALIGNED, WHOLE = 1.0, 0.0  # remarks on crops: on landmarks, the whole picture resized

_MOST_MISSING = 0.5  # of probes, matches or distractors: a distractor without a feature is nobody's nearest
_VIEW, _PICTURE = 320, 200  # pixels of the view to detect in, and of the picture's longer side in its middle
_PROBES = 64  # probes that are compared with the whole gallery together
_NAMES = ("probe", "gallery_match", "gallery_distractor")
_FOLDERS = dict(zip(_NAMES, ("Probe", "Gallery_Match", "Gallery_Distractor"), strict=True))
_MAT = {
    "probe": ("probe_img_ID_pairs.mat", "probe_set"),
    "gallery_match": ("gallery_match_img_ID_pairs.mat", "gallery_set"),
}


@dataclass(frozen=True)
class Lists:
    """File names of the three sets, in their order, and what they were read from."""

    probe: list[str]
    gallery_match: list[str]
    gallery_distractor: list[str]
    files: list[Path]

    @property
    def names(self) -> list[str]:
        """All of them: probes, matches, distractors."""
        return [*self.probe, *self.gallery_match, *self.gallery_distractor]

    def notes(self) -> list[str]:
        """What a reader should hear about: names that stand in a list twice, or in that of the probes and a gallery."""
        gallery = [*self.gallery_match, *self.gallery_distractor]
        found = []
        for what, names in (("probes", self.probe), ("the gallery", gallery)):
            if again := len(names) - len(set(names)):
                found.append(f"{again} names stand in {what} again; each counts")
        if both := sorted(set(self.probe) & set(gallery)):
            found.append(f"{len(both)} probes are in the gallery, too, and may find themselves; the first is {both[0]}")
        return found

    def paths(self, folder: Path) -> list[Path]:
        """The photos of all of them: in the official folders below `folder`, or in it."""
        result = []
        for name in _NAMES:
            own = folder / _FOLDERS[name]
            result += [(own if own.is_dir() else folder) / file for file in getattr(self, name)]
        return result


def read_lists(path: str | Path) -> Lists:
    """Read the lists in a folder (.mat, lists.json or .txt) or in a JSON file; InputError naming what is wrong.

    Without a list of distractors they are the files of the folder Gallery_Distractor.
    """
    path = Path(path)
    if path.is_dir() and not any(_candidates(path, "probe")) and (path / "Testing_Set").is_dir():
        path /= "Testing_Set"
    if path.is_dir() and (path / "lists.json").is_file():
        path /= "lists.json"
    if path.is_dir():
        probe, match, distractor = (_read_list(path, name) for name in _NAMES)
        lists = Lists(probe[0], match[0], distractor[0], [probe[1], match[1], distractor[1]])
    else:
        try:
            content = utils.read_json(path)
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: not an object with {', '.join(_NAMES)}")
        for name in _NAMES:
            names = content.get(name)
            if not isinstance(names, list) or not all(isinstance(file, str) for file in names):
                raise InputError(f"{path}: {name} is not a list of file names")
        lists = Lists(content["probe"], content["gallery_match"], content["gallery_distractor"], [path])
    for name in _NAMES[:2]:
        if not getattr(lists, name):
            raise InputError(f"{path}: the list {name} is empty")
    for file in lists.names:
        if not file or Path(file).name != file:
            raise InputError(f"{path}: {file!r} is not the name of a file")
    subjects(lists.probe), subjects(lists.gallery_match)
    return lists


def _candidates(folder: Path, name: str) -> list[Path]:
    names = [_MAT[name][0]] if name in _MAT else []
    return [folder / file for file in (*names, f"{name}.txt", "lists.json") if (folder / file).is_file()]


def _read_list(folder: Path, name: str) -> tuple[list[str], Path]:
    for path in _candidates(folder, name):
        if path.suffix == ".txt":
            try:
                lines = utils.read_bytes(path).decode("utf-8-sig").splitlines()
                return [name for line in lines if (name := line.strip())], path
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
        try:
            content = scipy.io.loadmat(path, variable_names=[_MAT[name][1]])
            return [str(np.ravel(cell)[0]) for cell in np.ravel(content[_MAT[name][1]])], path
        except Exception as error:  # foreign bytes make the reader raise nearly anything
            raise InputError(f"{path}: not a .mat file with the cells {_MAT[name][1]}") from error
    place = folder / _FOLDERS[name]
    if name == "gallery_distractor" and place.is_dir():
        names = sorted(file.name for file in place.iterdir() if _is_photo(file))
        if not names:
            raise InputError(f"{place}: holds no photos; without distractors every model finds the mates")
        return names, place
    wanted = " or ".join([*([_MAT[name][0]] if name in _MAT else [_FOLDERS[name]]), f"{name}.txt", "lists.json"])
    raise InputError(f"{folder}: no list {name} ({wanted})")


def _is_photo(file: Path) -> bool:
    """Whether a file of Gallery_Distractor/ is a distractor; Thumbs.db and the like are not."""
    return not file.name.startswith(".") and file.suffix.lower() not in COMPANIONS and not file.is_dir()


def subjects(names: Sequence[str]) -> np.ndarray:
    """The number before `_` in each file's name, int64; InputError for a name without one."""
    numbers = [name.split("_", 1)[0] for name in names]
    for name, number in zip(names, numbers, strict=True):
        if "_" not in name or not number.isascii() or not number.isdigit() or len(number) > 18:
            raise InputError(f"{name}: no number of a subject before a _ in this name")
    return np.array(numbers, np.int64).reshape(-1)


# --- crops ----------------------------------------------------------------------------------------------------------


def cutter(paths: Sequence[Path], detector: Detector | None) -> Callable[[Sequence[int]], list[Cut]]:
    """What takes numbers of photos to crops, each with the remark ALIGNED or WHOLE.

    Without a detector the photos are aligned crops already, resized where they have another size.
    """
    # On a GPU the threads take turns.
    alone = threading.Lock() if str(getattr(detector, "device", "cpu")) != "cpu" else contextlib.nullcontext()

    def cut(numbers: Sequence[int]) -> list[Cut]:
        pictures = [_read(paths[number]) for number in numbers]
        if detector is None:
            return [(None if bgr is None else _resized(bgr), (ALIGNED,)) for bgr in pictures]
        there = [bgr for bgr in pictures if bgr is not None]
        views = [_view(bgr) for bgr in there]
        with alone:
            found = iter(detector.detect([warp(bgr, matrix, _VIEW) for bgr, matrix in zip(there, views, strict=True)]))
        turned = iter(views)
        return [(None, (WHOLE,)) if bgr is None else _best(bgr, next(turned), next(found)) for bgr in pictures]

    return cut


def _read(path: Path) -> np.ndarray | None:
    try:
        return read_photo(path)
    except PhotoError:
        return None


def _view(bgr: np.ndarray) -> np.ndarray:
    """The matrix [2, 3] that puts a picture, enlarged, into the middle of the view."""
    height, width = bgr.shape[:2]
    scale = _PICTURE / max(height, width)
    shift = _VIEW / 2 - scale * np.array([width, height]) / 2
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])


def _best(bgr: np.ndarray, matrix: np.ndarray, found: Any) -> Cut:
    index = choose_face(found.boxes, found.scores, (_VIEW, _VIEW), "central")
    if index is not None:
        try:
            return align_face(bgr, (found.landmarks[index] - matrix[:, 2]) / matrix[0, 0])[..., ::-1], (ALIGNED,)
        except AlignmentError:
            pass
    return _resized(bgr), (WHOLE,)


def _resized(bgr: np.ndarray) -> np.ndarray:
    """The whole picture as a crop uint8 RGB, its shape forgotten as CVLface's preparation forgets it."""
    return cv2.resize(bgr, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)[..., ::-1]


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """printed: rank-k in percent as public code prints it, by k. rates: where a mate beats all others but k - 1, with
    intervals by person; mean_precision: mAP likewise. Shares of the `probes` that have a mate, of all `given`."""

    given: int
    probes: int
    gallery: int
    printed: dict[int, float]
    rates: dict[int, Interval]
    mean_precision: Interval


def refuse_gaps(lists: Lists, embeddings: np.ndarray) -> None:
    """`InputError` where most of the probes, matches or distractors have no feature (a row of NaN): the figures of the
    rest would mean nothing, and without distractors they would be too good."""
    start = 0
    for name in _NAMES:
        files = getattr(lists, name)
        gone = np.flatnonzero(np.isnan(embeddings[start : start + len(files), 0]))
        if len(gone) > _MOST_MISSING * len(files):
            said = f"{len(gone):,} of {len(files):,} of {name} have no feature, the first is {files[gone[0]]}"
            raise InputError(f"{lists.files[0]}: {said}; no figure of the rest would mean anything")
        start += len(files)


def search(lists: Lists, embeddings: np.ndarray, replicates: int = REPLICATES) -> Search:
    """All probes against the gallery: embeddings [n, D] of length 1 in the order of `lists.names`, NaN where a photo
    gives nothing."""
    count = len(lists.probe)
    mine, theirs = subjects(lists.probe), subjects(lists.gallery_match)
    mated = np.flatnonzero(np.isin(mine, theirs))
    if not len(mated):
        raise InputError(f"{lists.files[0]}: no probe has a mate in the gallery")
    gallery, probes = embeddings[count:], embeddings[:count][mated]
    lost, nothing = np.isnan(gallery[:, 0]), np.isnan(probes[:, 0])
    gallery, probes = np.nan_to_num(gallery), np.nan_to_num(probes)
    printed_rank, rank = np.full((2, len(mated)), np.inf)
    precision = np.zeros(len(mated))
    for start in range(0, len(mated), _PROBES):
        scores = probes[start : start + _PROBES] @ gallery.T
        scores[:, lost] = -np.inf
        for row, line in enumerate(scores, start):
            wanted = np.flatnonzero(theirs == mine[mated[row]])
            mates = wanted[~lost[wanted]]
            if len(mates) and not nothing[row]:
                printed_rank[row], rank[row], precision[row] = _judge(line, mates)
                precision[row] *= len(mates) / len(wanted)  # one without a photo is never found
    people = mine[mated]
    return Search(
        given=count,
        probes=len(mated),
        gallery=len(gallery),
        # DIR_FAR keeps the shares as float32.
        printed={k: float(np.float32(np.mean(printed_rank <= k)) * np.float32(100)) for k in RANKS},
        rates={k: rate_interval(rank <= k, people, replicates=replicates) for k in RANKS},
        mean_precision=rate_interval(precision, people, replicates=replicates),
    )


def _judge(scores: np.ndarray, mates: np.ndarray) -> tuple[float, float, float]:
    """Of one probe: the best mate's rank as printed and with ties against it, and the average precision."""
    own = scores[mates]
    others = scores.copy()
    others[mates] = -np.inf
    best = own.max()
    last = mates[own == best].max()
    ahead = np.count_nonzero(others > best)
    level = np.flatnonzero(others == best)
    better = np.sort(others[others >= own.min()])
    ranks = 1 + np.arange(len(own)) + len(better) - np.searchsorted(better, np.sort(own)[::-1], "left")
    precision = float(np.mean((1 + np.arange(len(own))) / ranks))
    return 1.0 + ahead + np.count_nonzero(level > last), 1.0 + ahead + len(level), precision
