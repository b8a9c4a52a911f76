"""Who takes part in a challenge: probes or distractors of a tree of crops, and what is known of each.

A side is named either by a devkit list or by the tree itself. Every name stays in the game: a photo that the list names
and the tree lacks, or that the alignment gave no crop, is missing with a reason, and it is for the caller to decide
what that means. A list may name photos by paths from a folder inside of the tree, as the official one does where
MegaFace was unpacked with its folder FlickrFinal2: that folder is found. Only annotations without a photo, which the
alignment of FaceScrub notes in its table, are no probes of a tree that has no list, because nobody ever had their
photos.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import utils
from cropping.chunks import PARTS
from cropping.photos import identity_of, list_photos
from formats.names import path_parts
from formats.tables import BOX_CROP, CENTRE_CROP, CROP, NO_CROP, FaceTable
from megaface.lists import Key, PhotoIndex, TemplateList, photo_key
from utils import InputError, sha256_of

UNKNOWN = "unknown"  # a crop without a table that says how it came about
NOT_THERE = "not in the tree"
SOME_NAMES = 2000  # of a list that are looked for to find the folder that they are paths from
NEVER_THERE = "missing"  # the reason in faces.tsv of an annotation without a photo


@dataclass(frozen=True)
class Side:
    """Probes or distractors, in the order in which they count."""

    folder: Path
    names: list[str]  # as in the list, or the crops' paths
    ids: list[str] | None  # identities of probes
    files: list[str | None]  # crop below `folder`; None where there is none
    statuses: list[str]  # `faces.STATUSES` or UNKNOWN
    reasons: dict[int, str]  # why there is no crop
    fingerprint: str  # of what the crops depend on, as far as it is known without reading them
    annotations_only: int  # annotations without a photo that a tree without a list left out
    below: str = ""  # the folder of the tree in which a list's photos lie, when it is not the tree's own

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> dict[str, int]:
        """How many crops came about in which way."""
        found = Counter(self.statuses)
        return {
            "detected": found[CROP],
            "fallback_from_box": found[BOX_CROP],
            "fallback_from_centre": found[CENTRE_CROP],
            "origin_unknown": found[UNKNOWN],
        }


def open_side(folder: Path, what: str, template: TemplateList | None, *, with_ids: bool) -> Side:
    """The probes or distractors (`what`, for errors) in a tree of crops, with or without a list."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of aligned {what}")
    path = folder / "faces.tsv"
    table = FaceTable(path) if path.is_file() else None
    _check_whole(folder, 0 if table is None else len(list(table)))
    if table is None and (folder / PARTS).is_dir():
        raise InputError(f"{folder}: stage 5 has not finished here, run it again; so far some {what} have no crop")
    if table is None:
        listing = list_photos(folder)
        files, fingerprint = listing.files, str(listing)
    else:
        made = [path, folder / "report.json"]  # the report has what the crops depend on besides the faces
        files, fingerprint = list(table), " ".join(sha256_of(file) for file in made if file.is_file())
    for file in files:
        if ".." in file or file.startswith("/"):
            _check_name(path if table else folder, file)
    if template is None:
        return _from_tree(folder, what, files, table, fingerprint, with_ids=with_ids)
    return _from_list(folder, template, files, table, fingerprint)


def _check_whole(folder: Path, rows: int) -> None:
    """`InputError` where the alignment says that it had another number of photos than faces.tsv has rows: half a table,
    or none, would be taken for a smaller challenge."""
    path = folder / "report.json"
    try:
        report = utils.read_json(path)
    except (FileNotFoundError, ValueError):  # crops of elsewhere
        return
    photos = report.get("photos") if isinstance(report, dict) else None
    if isinstance(photos, int) and photos != rows:
        raise InputError(
            f"{folder / 'faces.tsv'}: {rows:,} rows, but {path.name} beside it speaks of {photos:,} photos; bring both "
            f"from where they were made, or remove {folder} and run stage 5 again"
        )


def _from_tree(
    folder: Path, what: str, files: list[str], table: FaceTable | None, fingerprint: str, *, with_ids: bool
) -> Side:
    names: list[str] = []
    ids: list[str] = []
    found: list[str | None] = []
    statuses: list[str] = []
    reasons: dict[int, str] = {}
    annotations_only = 0
    for file in files:
        row = table.get(file) if table else None
        if with_ids and row is not None and row.status == NO_CROP and row.reason.split(":")[0] == NEVER_THERE:
            annotations_only += 1
            continue
        if row is not None and row.status == NO_CROP:
            reasons[len(names)] = row.reason
        names.append(file)
        ids.append(row.identity if row is not None and row.identity else identity_of(file))
        found.append(None if row is not None and row.status == NO_CROP else file)
        statuses.append(row.status if row is not None else UNKNOWN)
    if not names:
        raise InputError(f"{folder}: holds no {what}")
    return Side(folder, names, ids if with_ids else None, found, statuses, reasons, fingerprint, annotations_only)


def _check_name(where: Path, name: str) -> None:
    try:
        path_parts(name)
    except ValueError as error:
        raise InputError(f"{where}: {name!r} is no name: {error}") from None


def _from_list(
    folder: Path, template: TemplateList, files: list[str], table: FaceTable | None, fingerprint: str
) -> Side:
    index = PhotoIndex(files, folder)
    below = _folder_between(template.paths, index)
    found: list[str | None] = []
    statuses: list[str] = []
    reasons: dict[int, str] = {}
    for number, name in enumerate(template.paths):
        file = index.find(f"{below}/{name}" if below else name)
        row = table.get(file) if table and file else None
        status = UNKNOWN if row is None else row.status
        if file is None:
            file, status, reasons[number] = None, NO_CROP, NOT_THERE
        elif row is not None and status == NO_CROP:
            file, reasons[number] = None, row.reason
        found.append(file)
        statuses.append(status)
    names = hashlib.sha256("\0".join(template.paths).encode("utf-8", "surrogateescape")).hexdigest()
    return Side(folder, template.paths, template.ids, found, statuses, reasons, f"{fingerprint} {names}", 0, below)


def _folder_between(names: Sequence[str], index: PhotoIndex) -> str:
    """The folder of a tree from which the names of a list are paths; "" for the tree's own.

    Asked of some of the names, spread over the list, and only when the tree itself has few of them: the folder is the
    one in which most of them are, if no other has as many.
    """
    some = names[:: -(-len(names) // SOME_NAMES)]
    keys = {photo_key(name) for name in some}
    direct = sum(key in index.files for key in keys)
    if 2 * direct >= len(keys):
        return ""
    depths = {len(key) for key in keys}
    folders: Counter[Key] = Counter()
    for key in index.files:
        for depth in depths:
            if depth < len(key) and key[-depth:] in keys:
                folders[key[:-depth]] += 1
    ranking = folders.most_common(2)
    if not ranking or ranking[0][1] <= direct or (len(ranking) > 1 and ranking[0][1] == ranking[1][1]):
        return ""
    return "/".join(ranking[0][0])
