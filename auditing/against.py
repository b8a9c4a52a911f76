"""People of test sets, whatever the sets come as, as lists of embeddings.

A `.bin` file says who is the same as whom only in pairs; people are then what its genuine pairs connect. A folder of
photos, or of crops, has a folder per person. IJB-B and IJB-C say in their lists of 1:N whose the templates are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from auditing.centres import groups, unit_rows
from auditing.measures import readable
from config import CROP_SIZE, DETECTION_SIDE
from cropping.photos import PhotoError, decode_crop, identity_of, list_photos, read_photo
from formats import crop_sets
from ijb.crops import FOLDER, cut_image
from ijb.lists import Lists, all_people, read_lists
from utils import InputError
from verification import lfw, sets
from verification.lazy import CropArray

WINDOW = 512  # crops that are embedded together
FRAMES = 16  # images of a person of IJB that are looked at: most are frames of a few videos


@dataclass
class Person:
    """Somebody of a test set: unit embeddings [n, D], and how each picture is found again."""

    set_name: str
    name: str
    embeddings: np.ndarray
    pictures: list[str]
    crop: Callable[[int], np.ndarray]  # one of the pictures as uint8 RGB [112, 112, 3]

    @property
    def mean(self) -> np.ndarray:
        """Their middle, float32 [D] of length 1; zero if no picture gave a direction."""
        return unit_rows(self.embeddings.sum(axis=0)[None])[0]


def people_of(
    path: Path,
    embed: Callable[[np.ndarray], np.ndarray],
    cache: Path,
    device: torch.device | str,
    left_out: list[str] | None = None,
) -> Iterator[Person]:
    """The people of a test set; `embed` gives features [n, D] of uint8 RGB crops. Raises InputError naming the set.

    Pictures without a face, or that cannot be read, are named in `left_out`.
    """
    left_out = [] if left_out is None else left_out
    if not path.exists():
        raise InputError(f"--against {path}: no such file or folder")
    if path.is_file() and path.suffix != ".rec":
        pairs = sets.open_set(path)
        identities = pairs.identities if pairs.identities is not None else np.arange(len(pairs.crops))
        yield from _people(path.stem, pairs.crops, identities, pairs.names, embed)
        return
    if path.is_file() or (path / "train.rec").exists():
        yield from _people_of_crops(path, embed, left_out)
        return
    if (path / "meta").is_dir() and (path / FOLDER).is_dir():
        yield from _people_of_ijb(path, embed, left_out)
        return
    files = [file for file in list_photos(path).files if identity_of(file)]
    if len({identity_of(file) for file in files}) == 1 and all(file.count("/") > 1 for file in files):
        path = path / identity_of(files[0])  # lfw/lfw-deepfunneled/PERSON: the folder in between is no person
        files = [file.split("/", 1)[1] for file in files]
    if not files:
        raise InputError(f"--against {path}: photos, but no folder of a person")
    if _is_crop(path / files[0]):
        found = sets.read_crops([path / file for file in files])
    else:
        found = lfw.crop_faces(
            [path / file for file in files], max_side=DETECTION_SIDE, device=device, cache_dir=cache, name=path.name
        )
    shown = np.array([index for index, row in enumerate(found.rows) if row.status == "crop"], np.int64)
    names = [files[index] for index in shown]
    left_out += [files[index] for index in np.setdiff1d(np.arange(len(files)), shown).tolist()]
    people, identities = np.unique([identity_of(file) for file in names], return_inverse=True)
    yield from _people(path.name, found.crops[shown], identities, names, embed, list(people))


def _is_crop(file: Path) -> bool:
    try:
        return read_photo(file).shape[:2] == (CROP_SIZE, CROP_SIZE)
    except PhotoError:
        return False


def _people(
    set_name: str,
    crops: CropArray,
    identities: np.ndarray,
    pictures: list[str],
    embed: Callable[[np.ndarray], np.ndarray],
    names: list[str] | None = None,
) -> Iterator[Person]:
    features = [embed(crops[start : start + WINDOW]) for start in range(0, len(crops), WINDOW)]
    unit = unit_rows(np.concatenate(features)) if features else np.zeros((0, 1), np.float32)
    for person, members in groups(identities, int(identities.max(initial=-1)) + 1):
        name = names[person] if names is not None else pictures[members[0]]

        def crop(picture: int, members: np.ndarray = members) -> np.ndarray:
            return crops[members[picture]]

        yield Person(set_name, name, unit[members], [pictures[index] for index in members], crop)


def _people_of_crops(path: Path, embed: Callable[[np.ndarray], np.ndarray], left_out: list[str]) -> Iterator[Person]:
    try:
        crops = crop_sets.open_training_set(path, skip_unreadable=True, labelled=False)
    except InputError as error:
        raise InputError(f"--against {error}") from error
    names = crops.identity_names
    for label, members in groups(crops.labels, crops.identities):
        pictures = {}
        for index in members.tolist():
            if (picture := readable(crops, index)) is None:
                left_out.append(crops.describe(index))
            else:
                pictures[index] = picture
        if not pictures:
            continue
        shown = list(pictures)

        def crop(picture: int, shown: list[int] = shown) -> np.ndarray:
            return decode_crop(crops.read(shown[picture])[0])

        unit = unit_rows(embed(np.stack(list(pictures.values()))))
        yield Person(crops.name, names[label], unit, [crops.describe(index) for index in shown], crop)


def _people_of_ijb(path: Path, embed: Callable[[np.ndarray], np.ndarray], left_out: list[str]) -> Iterator[Person]:
    """The subjects, each by some images of different media; images that cannot be aligned are left out."""
    lists = read_lists(path)
    subjects: dict[int, str] = {}
    for people in all_people(lists):
        subjects.update(zip(people.templates.tolist(), people.subjects.tolist(), strict=True))
    if not subjects:
        raise InputError(f"--against {path}: no list of 1:N says whose the templates are")
    images: dict[str, dict[str, tuple[int, int]]] = {}  # of each subject: {image: (media, number)}
    for number, (image, template, media) in enumerate(
        zip(lists.images, lists.templates.tolist(), lists.medias.tolist(), strict=True)
    ):
        if template in subjects:
            images.setdefault(subjects[template], {})[image] = media, number
    for subject, found in images.items():
        yield _subject(lists, path / FOLDER, subject, _spread(list(found.values())), embed, left_out)


def _spread(images: list[tuple[int, int]]) -> list[int]:
    """At most `FRAMES` numbers of (media, number), the media in turn."""
    media = np.array([media for media, _ in images])
    order = np.argsort(media, kind="stable")
    starts = np.flatnonzero(np.diff(media[order], prepend=media[order[0]] - 1))
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return [images[place][1] for place in order[np.argsort(turn, kind="stable")][:FRAMES].tolist()]


def _subject(
    lists: Lists, folder: Path, subject: str, numbers: list[int], embed: Callable[[np.ndarray], np.ndarray],
    left_out: list[str],
) -> Person:  # fmt: skip
    cut = [(number, cut_image(lists, folder, number)) for number in numbers]
    left_out += [lists.images[number] for number, crop in cut if crop is None]
    crops = [(number, crop) for number, crop in cut if crop is not None]
    unit = unit_rows(embed(np.stack([crop for _, crop in crops]))) if crops else np.zeros((0, 1), np.float32)
    pictures = [lists.images[number] for number, _ in crops]
    return Person(lists.subset, f"subject {subject}", unit, pictures, lambda picture: crops[picture][1])


def same_photo(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two uint8 RGB crops show one photo, as it is or mirrored, also when their alignments differ a little."""
    small = [
        cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (56, 56), interpolation=cv2.INTER_AREA)
        for rgb in (first, second)
    ]
    inner = small[0][8:-8, 8:-8]
    return any(
        float(cv2.matchTemplate(np.ascontiguousarray(other), inner, cv2.TM_CCOEFF_NORMED).max()) >= 0.97
        for other in (small[1], small[1][:, ::-1])
    )
