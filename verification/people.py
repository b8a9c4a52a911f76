"""Folders of people to embeddings: one folder a person, photos of any name below it, any number of them.

Crops are never held all at once: a window of photos is found, aligned and embedded before the next, each step from the
cache where it can. So a killed run goes on where it was, and a second model needs no second detection.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import utils
from cropping.contents import photos_hash
from cropping.photos import identity_of, list_photos, note_on_depth
from embedding import Embedder, normalise
from formats.tables import CROP
from utils import InputError
from verification.all_pairs import Side
from verification.features import CHUNK, cached_features
from verification.lfw import CachedFinder, Faces, crop_windows
from verification.sets import look_aligned, read_crops

NAMED = 5  # photos that a note names before it only counts


@dataclass
class People:
    """Photos of people, embedded.

    files: paths relative to `folder`, by person and name. persons: the folder of each, which is whom it shows.
    embeddings: float32 [N, D] of length 1, NaN where a photo gave no crop. reasons: why, by the photo's number. sha256:
    of all photos and their names. notes: what a reader should hear about.
    """

    folder: Path
    files: list[str]
    persons: list[str]
    embeddings: np.ndarray
    reasons: dict[int, str]
    sha256: str
    detector: str
    hashes: list[str]  # SHA-256 of each photo, "" where it could not be read
    notes: list[str] = field(default_factory=list)

    def side(self, numbers: dict[str, int]) -> Side:
        """The photos with numbers for their people; people without one get the next.

        A name counts in composed letters: a disk of macOS may hold the other way of writing the same one.
        """
        names = [unicodedata.normalize("NFC", person) for person in self.persons]
        return Side(self.embeddings, np.array([numbers.setdefault(name, len(numbers)) for name in names]))

    def path(self, index: int) -> Path:
        """The file of a photo."""
        return self.folder / self.files[index]


def embed_people(
    embedder: Embedder,
    folder: Path,
    cache: Path,
    *,
    finder: CachedFinder | None,
    workers: int | None = None,
) -> People:
    """Embed all photos of all people in `folder`; with `finder` None the photos are crops already.

    Raises InputError if there are no folders of people, or a feature is not finite or zero.
    """
    listing = list_photos(folder)
    files = [file for file in listing.files if identity_of(file)]
    notes = []
    if not files:
        raise InputError(f"{folder}: holds photos but no folders of people (expected {folder}/PERSON/PHOTO)")
    if len(files) < len(listing.files):
        loose = len(listing.files) - len(files)
        notes.append(f"{loose} photos in {folder} are in no person's folder and are left out")
    paths = [folder / file for file in files]
    if finder is not None:
        notes += look_aligned(paths)
    windows = _crops(paths, folder.name) if finder is None else crop_windows(paths, finder, workers, folder.name)
    rows: list[np.ndarray] = []
    hashes: list[str] = []
    reasons: dict[int, str] = {}
    for window in windows:
        start = len(hashes)
        good = np.array([row.status == CROP for row in window.rows])
        reasons |= {start + i: row.reason for i, row in enumerate(window.rows) if not good[i]}
        embeddings = np.full((len(good), embedder.dim), np.nan, dtype=np.float32)
        if good.any():
            embeddings[good] = normalise(cached_features(embedder, window.crops[good], cache))
        for index in np.flatnonzero(good & np.isnan(embeddings).any(axis=1)):
            raise InputError(f"{paths[start + index]}: {embedder.name} gives no finite feature other than zero")
        rows.append(embeddings)
        hashes += window.sha256
    persons = [identity_of(file) for file in files]
    if note := note_on_depth(files):
        notes.append(note)
    notes += _repeated(files, persons, hashes)
    return People(
        folder=folder,
        files=files,
        persons=persons,
        embeddings=np.concatenate(rows),
        reasons=reasons,
        sha256=photos_hash(hashes, files),
        detector="" if finder is None else finder.detector,
        hashes=hashes,
        notes=notes,
    )


def _crops(paths: Sequence[Path], name: str) -> Iterator[Faces]:
    with utils.progress(len(paths), f"{name}: crops", unit="photo") as bar:
        for start in range(0, len(paths), CHUNK):
            yield read_crops(paths[start : start + CHUNK])
            bar.update(len(paths[start : start + CHUNK]))


def _repeated(files: Sequence[str], persons: Sequence[str], hashes: Sequence[str]) -> list[str]:
    """Notes about photos that are there more than once, byte for byte."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(hashes):
        if digest:
            places[digest].append(index)
    repeated = [indices for indices in places.values() if len(indices) > 1]
    torn = [indices for indices in repeated if len({persons[index] for index in indices}) > 1]
    notes = []
    for kind, groups in (("in folders of different people", torn), ("more than once", repeated)):
        if groups:
            named = "; ".join(" = ".join(files[index] for index in indices[:3]) for indices in groups[:NAMED])
            rest = f" and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
            notes.append(f"{len(groups)} photos are there {kind}, byte for byte: {named}{rest}")
    return notes


def in_both(gallery: People, probes: People) -> list[str]:
    """A note about probes that are photos of the gallery, byte for byte: they find themselves."""
    places = {digest: index for index, digest in enumerate(gallery.hashes) if digest}
    found = [(places[digest], index) for index, digest in enumerate(probes.hashes) if digest in places]
    if not found:
        return []
    named = "; ".join(f"{gallery.path(one)} = {probes.path(other)}" for one, other in found[:NAMED])
    rest = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return [f"{len(found)} probes are in the gallery, too, byte for byte, and find themselves: {named}{rest}"]


def check_apart(first: Path, second: Path) -> None:
    """InputError if one folder lies in the other: its photos would be somebody's."""
    one, other = first.resolve(), second.resolve()
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        raise InputError(f"{first} and {second}: one lies in the other")
