"""Aligned crops with identities, whatever they lie in: RecordIO in InsightFace's layout and its chunks, WebDataset's
shards, a list of files, or a folder per identity.

`open_training_set` opens any of them as `Crops`. `CropSet` is strict: whatever can be known without touching every
record is checked before the first step. `CropWriter` writes the layout that mxnet and every public loader read.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

import utils
from formats import archives, parquet, webdataset
from formats.crop_files import IMAGE_SUFFIXES, FolderCrops, ListCrops, LooseCrops, ShardCrops, renumbering
from formats.names import matching
from formats.recordio import FLOAT32_EXACT, HEADER, MAGIC, QUIET_SCAN, Keys, RecordHeader, RecordReader, frame, pack
from formats.tables import read_identities
from utils import InputError

_FIELDS = np.dtype([("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8")])  # `HEADER`
_FEW_LABELS = 1 << 20  # so that their place cannot overflow; no crop has more
_SCAN = 65_536  # records looked at together
_SAMPLES = 64  # images compared with the identity records when a set is opened


class _Layout(NamedTuple):
    """Which keys are images, and their labels, int64 [n]."""

    keys: Keys
    labels: np.ndarray


def _range_of(record: bytes) -> tuple[int, int] | None:
    """The two numbers of a header or identity record; None if it has not two labels or they are not whole numbers."""
    if len(record) < HEADER.size + 8 or HEADER.unpack_from(record)[0] != 2:
        return None
    first, end = struct.unpack_from("<2f", record, HEADER.size)
    return (int(first), int(end)) if first.is_integer() and end.is_integer() else None


def _from_zero(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that occur, and labels int64 [n] as positions among these; the same array if that changes none."""
    if int(labels.max()) < len(labels) and np.bincount(labels).min() > 0:
        return np.arange(int(labels.max()) + 1), labels
    numbers, positions = np.unique(labels, return_inverse=True)
    return numbers, positions.astype(np.int64)


def _is_finer(parts: np.ndarray, whole: np.ndarray) -> bool:
    """Whether each of the groups `parts` (int64 [n], a number for each crop) lies within one group of `whole`."""
    order = np.argsort(parts, kind="stable")
    same = parts[order][1:] == parts[order][:-1]
    return bool((whole[order][1:] == whole[order][:-1])[same].all())


class CropSet:
    """Aligned crops with the identity of each, from RecordIO: the InsightFace layout, or plain image records.

    With a header record (key 0, two labels [a, b], no payload) the images are the keys 1 .. a-1, the identity records
    a .. b-1, each with the half-open range of its images; b is exclusive too. Labels are then taken from the identity
    records without touching the images, and compared with an image's own label whenever one is read. Without a header,
    or where the identity records describe another order of the images (a set shuffled afterwards), all labels are read
    once from the images.

    Labels that begin at 1 or leave gaps are numbered anew from 0, and identity records that split a person (face2rec
    writes one for each run of crops) give way to the crops' own labels.

    `identities` is their number, `labels` int64 [n] in 0 .. identities-1, `numbers` int64 [identities] the label that
    the file has for each, `keys` int64 [n], `name` the folder's name, `notes` what a user should hear about
    (sentences). Raises `InputError` for an identity record without images, a label that is negative or fractional,
    ranges that overlap, leave images out or hold two people, an `.idx` that does not fit. A few images are looked at; a
    damaged one is an `InputError`, too, unless `skip_damaged`: then `read` will find it.
    """

    def __init__(self, rec_path: str | Path, *, skip_damaged: bool = False) -> None:
        self.path = Path(rec_path)
        self._skip_damaged = skip_damaged
        self.name = self.path.resolve().parent.name
        self.notes: list[str] = []
        self.reader = RecordReader(self.path)
        self.reader.check_index()
        if len(self.reader) == 0:
            raise InputError(f"{self.path}: holds no records")
        layout = self._from_header() or self._from_images(Keys(self.reader.keys))
        if not len(layout.keys):
            raise InputError(f"{self.path}: holds no images, only records of the size of identity records")
        self._keys = layout.keys
        self.numbers, self.labels = _from_zero(layout.labels)
        self._as_in_file = self.labels is layout.labels
        self.identities = len(self.numbers)
        self.renumbered = renumbering(list(map(str, self.numbers.tolist())))
        if self.renumbered:
            self.notes.append(self.renumbered)
        self._ids_are_keys = self._compare_ids()
        if self.reader.unlisted:
            self.notes.append(f"{self.reader.unlisted} records follow the last one of {self.reader.idx_path}; not used")
        self._check_property()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> np.ndarray:
        """The RecordIO key of each image, int64 [n]."""
        return self._keys.array()

    def read(self, index: int) -> tuple[bytes, int]:
        """Payload (the encoded crop) and label of image `index` in 0 .. len-1. Raises `InputError` if it is damaged."""
        key = self._keys[index]
        record = self.reader.read(key)
        label = int(self.labels[index])
        start, own, id = self._header_of(record, len(record), key)
        if own != (label if self._as_in_file else self.numbers[label]):
            self._fail(key, f"its label is {own:g}, but its identity record says {self.numbers[label]}")
        if self._ids_are_keys and id != key:
            self._fail(key, f"the record found there has id {id}: the .idx points to the wrong record")
        return record[start:], label

    def sizes(self) -> np.ndarray:
        """See `Crops`; here of the whole records, as the .idx has them."""
        return self.reader.sizes(np.searchsorted(self.reader.keys, self.keys))

    @property
    def identity_names(self) -> list[str]:
        """What the identities are called, by label: as pre_process.py wrote beside its train.rec, else the numbers.

        A table of another number of identities is of another set and left alone.
        """
        table = self.path.with_name("identities.tsv")
        if table.is_file() and not self.renumbered:
            names = read_identities(table)
            if len(names) == self.identities:
                return names
        return list(map(str, self.numbers.tolist()))

    def describe(self, index: int) -> str:
        """Where a crop lies: file, key and offset."""
        key = self._keys[index]
        return f"{self.path}: record {key} at offset {int(self.reader.offsets[self.reader.position(key)])}"

    def _fail(self, key: int, reason: str) -> NoReturn:
        self.reader.fail(key, int(self.reader.offsets[self.reader.position(key)]), reason)

    def _header_of(self, record: bytes, length: int, key: int) -> tuple[int, float, int]:
        """Where the payload starts, the first label and the id; `record` may be only the first bytes of `length`."""
        if len(record) < HEADER.size:
            self._fail(key, f"{length} bytes, too short for the {HEADER.size}-byte image header")
        flag, label, id, _ = HEADER.unpack_from(record)
        start = HEADER.size + 4 * flag
        if start > length:
            self._fail(key, f"announces {flag} labels, but only {length - HEADER.size} bytes follow its header")
        if start == length:
            self._fail(key, "holds no image")
        return start, struct.unpack_from("<f", record, HEADER.size)[0] if flag else label, id

    def _peek(self, key: int) -> tuple[float, int]:
        """The first label and the id of an image."""
        head, length = self.reader.peek(key)
        return self._header_of(head, length, key)[1:]

    def _peek_at(self, keys: Keys) -> dict[int, tuple[float, int]]:
        """What `_peek` says of a sample of the images, by index; without the damaged ones if these are left alone."""
        found = {}
        for index in np.unique(np.linspace(0, len(keys) - 1, _SAMPLES).astype(np.int64)).tolist():
            try:
                found[index] = self._peek(keys[index])
            except InputError:
                if not self._skip_damaged:
                    raise
        return found

    def _from_header(self) -> _Layout | None:
        """The layout that record 0 describes; None if record 0 is absent or an image."""
        if 0 not in self.reader:
            return None
        record = self.reader.read(0)
        if len(record) != HEADER.size + 8 or HEADER.unpack_from(record)[0] != 2:
            return None
        bounds = _range_of(record)
        if bounds is None or not 1 < bounds[0] < bounds[1]:
            numbers = list(struct.unpack_from("<2f", record, HEADER.size))
            self._fail(0, f"the header's numbers {numbers} are not the first identity's key and the end of the keys")
        first, end = bounds
        if end >= FLOAT32_EXACT:
            return self._from_frame_sizes(end)
        count = len(self.reader)
        if self.reader.keys_count_from != 0 or count < end:
            missing = np.setdiff1d(np.arange(max(count, end)), self.reader.keys)[0]
            reason = f"the header announces the keys 0 .. {end - 1}, but {self.reader.source} has no key {missing}"
            self._fail(0, reason)
        if count > end:
            # Writers that took b for the last identity instead of one past it exist; the ranges must still fit.
            self.notes.append(f"the header ends the identities before key {end}, the .idx goes on to key {count - 1}")
        return self._from_identities(first, count)

    def _from_identities(self, first: int, end: int) -> _Layout:
        ranges = np.empty((end - first, 2), np.int64)
        for row, key in enumerate(range(first, end)):
            bounds = _range_of(self.reader.read(key))
            if bounds is None:
                self._fail(key, "is not an identity record, which has two whole numbers as its label")
            if not 1 <= bounds[0] <= bounds[1] <= first:
                self._fail(key, f"the identity's range {list(bounds)} leaves the images 1 .. {first - 1}")
            if bounds[0] == bounds[1]:
                self._fail(key, f"identity {row} has no images")
            ranges[row] = bounds
        order = np.argsort(ranges[:, 0], kind="stable")
        starts, ends = ranges[order, 0], ranges[order, 1]
        gaps = np.flatnonzero(np.append(starts, first) != np.append(1, ends))
        if len(gaps):
            at = min(int(gaps[0]), len(order) - 1)
            self._fail(
                first + int(order[at]),
                f"the identity's range {ranges[order[at]].tolist()} overlaps another or leaves images without identity",
            )
        return self._confirm(_Layout(Keys.counting(1, first), np.repeat(order, ends - starts)))

    def _confirm(self, layout: _Layout) -> _Layout:
        """Compare a sample of the images with their identity records."""
        sample = self._peek_at(layout.keys)
        wrong = [
            (layout.keys[index], label, int(layout.labels[index]))
            for index, (label, _) in sample.items()
            if label != layout.labels[index]
        ]
        if not wrong:
            return layout
        own = self._from_images(layout.keys) if len(wrong) * 2 > len(sample) or not self._skip_damaged else None
        if own is not None and (len(wrong) * 2 > len(sample) or _is_finer(layout.labels, own.labels)):
            self.notes.append("the identity records do not fit the images' own labels; the latter were read instead")
            return own
        if self._skip_damaged:
            return layout
        key, label, expected = wrong[0]
        self._fail(key, f"its label is {label:g}, but its identity record says {expected}")

    def _from_frame_sizes(self, end: int) -> _Layout:
        """More than 2^24 records: the header's float32 are rounded, so identity records are told by their size."""
        spacing = float(np.spacing(np.float32(end)))
        if abs(len(self.reader) - end) > spacing:
            self._fail(0, f"the header announces {end} records, but the .idx lists {len(self.reader)}")
        offsets = self.reader.offsets
        order = np.argsort(offsets, kind="stable")
        sizes = np.empty_like(offsets)
        sizes[order] = np.diff(offsets[order], append=self.reader.size)
        self.notes.append("more than 2^24 records: labels were read from the images, since ranges are rounded float32")
        empty = 8 + HEADER.size + 8
        return self._from_images(Keys(self.reader.keys[sizes != empty]))

    def _from_images(self, keys: Keys) -> _Layout:
        """Read the label of every image, in the order of the file."""
        labels = np.empty(len(keys), np.int64)
        positions = np.searchsorted(self.reader.keys, keys.array())
        order = np.argsort(self.reader.offsets[positions], kind="stable")
        quiet = len(keys) < QUIET_SCAN
        bar = None if quiet else utils.progress(len(keys), f"labels of {self.name}", unit="record")
        for start in range(0, len(order), _SCAN):
            part = order[start : start + _SCAN]
            heads, lengths = self.reader.peek_all(positions[part])
            fields = np.ascontiguousarray(heads[:, : HEADER.size]).view(_FIELDS)[:, 0]
            more = np.ascontiguousarray(heads[:, HEADER.size :]).view("<f4")[:, 0]
            found = np.where(fields["flag"] > 0, more, fields["label"])
            sound = (fields["flag"] < _FEW_LABELS) & (HEADER.size + 4 * fields["flag"].astype(np.int64) < lengths)
            sound &= (found >= 0) & (found < FLOAT32_EXACT) & (found == np.floor(found))
            labels[part] = np.where(sound, found, 0)
            for index in part[~sound].tolist():
                key = keys[index]
                label = self._peek(key)[0]
                if not 0 <= label < FLOAT32_EXACT or label != int(label):
                    self._fail(key, f"its label {label:g} is not the number of an identity")
                labels[index] = int(label)
            if bar is not None:
                bar.update(len(part))
        if bar is not None:
            bar.close()
        return _Layout(keys, labels)

    def _compare_ids(self) -> bool:
        """Whether the records' ids are their keys, as in most sets; then a single exception is a wrong .idx line."""
        sample = self._peek_at(self._keys)
        wrong = [(self._keys[index], id) for index, (_, id) in sample.items() if id != self._keys[index]]
        few = len(wrong) * 4 < len(sample)
        if wrong and few and not self._skip_damaged:
            key, id = wrong[0]
            self._fail(key, f"the record found there has id {id}: the .idx points to the wrong record")
        return few or not wrong

    def _check_property(self) -> None:
        """`property` ("identities,height,width") is only compared: the numbers come from the records."""
        path = self.path.with_name("property")
        if not path.is_file():
            return
        text = utils.read_bytes(path, 1 << 20)[:200].decode("utf-8", "replace").strip()
        fields = text.split(",")
        if not all(field.strip().isdecimal() for field in fields):
            self.notes.append(f"{path}: {text[:40]!r} is not 'identities,height,width'; not needed, so ignored")
        elif int(fields[0]) != self.identities:
            self.notes.append(f"{path}: says {fields[0]} identities, the records hold {self.identities}")


def open_crops(path: str | Path, *, skip_damaged: bool = False) -> CropSet:
    """The crops in a folder that holds `train.rec`, or in a `.rec` file.

    Raises `InputError` if there is none or it does not hold together; see `CropSet`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "train.rec"
    if not path.is_file():
        raise InputError(f"{path}: no such RecordIO file")
    return CropSet(path, skip_damaged=skip_damaged)


class CropWriter:
    """Writes crops in the InsightFace layout: `train.rec`, `train.idx`, `property`, readable by mxnet.

    Use it as a context manager and call `write` with the images of one identity after another. The three files appear
    in `out_dir` when the block ends without an exception, `train.rec` last; before that there is no `train.rec`. The
    same images give the same bytes. Partial files of a killed run (`.train.*.partial`) are overwritten by the next.

    Header and identity records are float32: above 2^24 records their ranges are rounded (`CropSet` reads such a set all
    the same, InsightFace's own loader does not).
    """

    def __init__(self, out_dir: str | Path, height: int = 112, width: int = 112) -> None:
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._shape = (height, width)
        self._stack = contextlib.ExitStack()
        busy = f"{self.out_dir}: another process is writing crops there"
        self._stack.enter_context(utils.locked(self.out_dir / ".writing.lock", busy, leave=False))
        self._partial = {name: self.out_dir / f".{name}.partial" for name in ("train.rec", "train.idx", "property")}
        self._starts: list[int] = []  # key of the first image of each identity
        self._key = 0
        self._rec = self._partial["train.rec"].open("wb", buffering=1 << 20)
        self._idx = self._partial["train.idx"].open("wb", buffering=1 << 20)
        self._offset = 0
        self._put([0.0, 0.0], b"")  # room for the header, whose numbers are known at the end

    def _put(self, label: float | list[float], payload: bytes) -> None:
        data = frame(_crop_record(label, self._key, payload))
        self._idx.write(b"%d\t%d\n" % (self._key, self._offset))
        self._rec.write(data)
        self._offset += len(data)
        self._key += 1

    def write(self, payload: bytes, label: int) -> int:
        """Add an encoded crop of identity `label` and return its key.

        Labels start at 0 and never fall or skip: `ValueError` otherwise, and for an empty payload.
        """
        if not payload:
            raise ValueError(f"identity {label}: an empty image")
        if label == len(self._starts):
            self._starts.append(self._key)
        elif label != len(self._starts) - 1:
            raise ValueError(
                f"identity {label} after {len(self._starts) - 1}: crops must come grouped and in ascending order"
            )
        self._put(float(label), payload)
        return self._key - 1

    def __enter__(self) -> "CropWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failed:
            error = failed
            raise
        finally:
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say of which file
                error.filename = str(self.out_dir / "train.rec")
            for file in (self._rec, self._idx):
                with contextlib.suppress(OSError):  # on a full disk, closing writes again and fails again
                    file.close()
            for path in self._partial.values():
                path.unlink(missing_ok=True)
            self._stack.close()

    def _finish(self) -> None:
        if not self._starts:
            raise InputError(f"{self.out_dir}: not one crop to write")
        images_end = self._key
        ends = [*self._starts[1:], images_end]
        for start, end in zip(self._starts, ends, strict=True):
            self._put([float(start), float(end)], b"")
        self._rec.seek(0)
        self._rec.write(frame(_crop_record([float(images_end), float(self._key)], 0, b"")))
        height, width = self._shape
        self._partial["property"].write_text(f"{len(self._starts)},{height},{width}\n")
        for file in (self._rec, self._idx):
            file.flush()
            os.fsync(file.fileno())
        # Without train.rec nothing looks whole, so it goes first and comes last.
        (self.out_dir / "train.rec").unlink(missing_ok=True)
        for name in ("property", "train.idx", "train.rec"):
            os.replace(self._partial[name], self.out_dir / name)
        utils.fsync_directory(self.out_dir)


def _crop_record(label: float | list[float], key: int, payload: bytes) -> bytes:
    numbers = label if isinstance(label, list) else [label]
    flag = len(numbers) if isinstance(label, list) else 0
    return pack(RecordHeader(flag, np.array(numbers, np.float32), key), payload)


@contextlib.contextmanager
def claimed(folder: Path, record: str, recipe: dict[str, Any]) -> Iterator[bool]:
    """A section that one process at a time enters: whether a folder holds the set that `recipe` (JSON) makes; else it
    is noted there that it is going to.

    `record` is the name of that note. Raises `InputError` if the folder holds another set: none is overwritten.
    """
    recipe = json.loads(json.dumps(recipe))
    with utils.locked(folder / ".claim.lock", f"{folder}: another process is writing crops there", leave=False):
        there = (folder / "train.rec").exists()
        if there:
            try:
                same = utils.read_json(folder / record) == recipe
            except (OSError, ValueError):
                same = False
            if not same:
                raise InputError(f"{folder}: holds another set of crops; give another folder")
        else:
            utils.write_json(folder / record, recipe)
        yield there


def write_crops(out_dir: str | Path, items: Iterable[tuple[bytes, int]], height: int = 112, width: int = 112) -> int:
    """Write (encoded crop, label) pairs, grouped by ascending label, with `CropWriter`; returns the number of crops."""
    count = 0
    with CropWriter(out_dir, height, width) as writer:
        for payload, label in items:
            writer.write(payload, label)
            count += 1
    return count


class Crops(Protocol):
    """Aligned crops with identities, whatever they lie in: what training reads.

    `name` is what the set is called, `identities` their number, `labels` int64 [n] in 0 .. identities-1, `notes` what a
    user should hear about (sentences).
    """

    name: str
    identities: int
    labels: np.ndarray
    notes: list[str]

    @property
    def identity_names(self) -> list[str]:
        """What the identities are called, by label: the label as text where the data has no names."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded crop and its label. `InputError` or OSError if it cannot be had."""

    def sizes(self) -> np.ndarray:
        """Bytes that each crop takes where it lies, int64 [n]; -1 if it is not there. Nothing is read for it."""

    def describe(self, index: int) -> str:
        """Where a crop lies, so that it can be found again: file, and in a file of many key and offset."""


class ChunkedCrops:
    """Several RecordIO files that are one set (`train_0.rec`, `train_1.rec`, as im2rec's --chunks writes them)."""

    def __init__(self, paths: Sequence[Path], *, skip_damaged: bool = False) -> None:
        self._parts = [CropSet(path, skip_damaged=skip_damaged) for path in paths]
        self.name = f"{paths[0].parent} ({len(paths)} chunks)"
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        numbers = np.concatenate([part.numbers[part.labels] for part in self._parts])
        self._numbers, self.labels = np.unique(numbers, return_inverse=True)
        self.labels = self.labels.astype(np.int64)
        self.identities = len(self._numbers)
        self.notes = [note for part in self._parts for note in part.notes if note != part.renumbered]
        if note := renumbering(self.identity_names):
            self.notes.append(note)

    @property
    def identity_names(self) -> list[str]:
        return list(map(str, self._numbers.tolist()))

    def __len__(self) -> int:
        return len(self.labels)

    def _place(self, index: int) -> tuple[CropSet, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part], index - int(self._starts[part])

    def read(self, index: int) -> tuple[bytes, int]:
        part, position = self._place(index)
        return part.read(position)[0], int(self.labels[index])

    def sizes(self) -> np.ndarray:
        """See `Crops`."""
        return np.concatenate([part.sizes() for part in self._parts])

    def describe(self, index: int) -> str:
        part, position = self._place(index)
        return part.describe(position)


def open_training_set(path: str | Path, *, skip_unreadable: bool = False, labelled: bool = True) -> Crops:
    """Open aligned crops and check them: RecordIO (a folder with train.rec, a .rec file, a folder of its chunks),
    WebDataset's shards (a folder of tars, a tar, a pattern such as `shards/*.tar`), a text list of `path label`, or a
    folder of identity folders.

    With `skip_unreadable`, damaged images do not matter yet. Unless `labelled`, identities are of no interest, and any
    folder of images will do. Raises `InputError` when there is nothing to train on: no crops, fewer than two
    identities, a label out of range, or an identity without a crop.
    """
    path = Path(path)
    if not path.exists():
        found = matching(path) if any(mark in path.name for mark in "*?[") else []
        if not found:
            raise InputError(f"{path}: no such file or folder")
        crops = _open_files(path, found, skip_unreadable)
    elif path.is_file():
        crops = _open_files(path, [path], skip_unreadable)
    elif (path / "train.rec").exists():
        crops = open_crops(path, skip_damaged=skip_unreadable)
    else:
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".rec", ".tar"))
        if files and (person := _with_images(path)):
            both = f"{files[0].name} beside folders of images ({person})"
            raise InputError(f"{path}: holds {both}; name the one or the other")
        crops = _open_files(path, files, skip_unreadable) if files else _open_folder(path, labelled)
    check(crops, labelled=labelled)
    return crops


def _with_images(path: Path) -> str:
    """The name of a folder in `path` that holds an image; "" if there is none."""
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir()):
            return folder.name
    return ""


def _open_folder(path: Path, labelled: bool) -> Crops:
    crops: Crops = FolderCrops(path) if labelled else LooseCrops(path)
    if not len(crops):
        archive = next((file for file in sorted(path.iterdir()) if file.is_file() and archives.is_archive(file)), None)
        if archive is not None:
            raise InputError(_unpack_first(archive))
    return crops


def _open_files(given: Path, files: list[Path], skip_unreadable: bool) -> Crops:
    """The crops in some files that are one set; `given` is what the user called them."""
    kinds = {_kind_of(path) for path in files}
    if len(kinds) > 1:
        raise InputError(f"{given}: files of different kinds ({', '.join(sorted(kinds))}); name those of one")
    kind = kinds.pop()
    # Shards are numbered in any way (a0.tar, a1.tar); other names are other people's labels.
    names = {archives.set_of(path) if kind == "RecordIO" else re.sub(r"\d+", "#", path.name) for path in files}
    if kind in ("tar", "RecordIO") and len(names) > 1:
        raise InputError(f"{given}: several sets ({', '.join(path.name for path in files[:5])}); name one of them")
    if kind == "tar":
        crops: Crops = ShardCrops(files)
        if not len(crops):
            raise InputError(f"{given}: no image has a label; {_unpack_first(files[0])}")
        return crops
    if kind == "RecordIO" and len(files) > 1:
        return ChunkedCrops(files, skip_damaged=skip_unreadable)
    if kind == "RecordIO":
        return open_crops(files[0], skip_damaged=skip_unreadable)
    if len(files) > 1:
        raise InputError(f"{given}: several files ({', '.join(path.name for path in files[:5])}); name one of them")
    if archives.is_archive(files[0]):
        raise InputError(_unpack_first(files[0]))
    if kind == "binary":
        raise InputError(f"{files[0]}: neither RecordIO, a tar nor a list of images and labels")
    return ListCrops(files[0])


def _kind_of(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(webdataset.BLOCK)
    if head.startswith(MAGIC) or path.suffix == ".rec":
        return "RecordIO"
    if webdataset.name_in(head):
        return "tar"
    return "binary" if b"\0" in head else "text"


def _unpack_first(path: Path) -> str:
    if parquet.is_parquet(path):
        return f"{path}: Parquet cannot be read in any order; python extract.py {path} --out data/raw makes folders"
    return (
        f"{path}: an archive cannot be read in any order; python extract.py {path} --out data/raw makes folders of its "
        f"photos, and if it holds RecordIO: {archives.unpack_command(path)}"
    )


def check(crops: Crops, *, labelled: bool = True) -> None:
    """Raise `InputError` unless every label is one of the identities and every identity has a crop.

    Of a set that is not to be `labelled`, unless it has a crop.
    """
    if len(crops) == 0:
        raise InputError(f"{crops.name}: no crops (neither train.rec nor folders of images)")
    if not labelled:
        return
    low, high = int(crops.labels.min()), int(crops.labels.max())
    if low < 0 or high >= crops.identities:
        raise InputError(
            f"{crops.name}: labels {low} to {high}, but there are {crops.identities} identities (0 to one less)"
        )
    counts = np.bincount(crops.labels, minlength=crops.identities)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        named = ", ".join(map(str, empty[:10])) + (" ..." if len(empty) > 10 else "")
        raise InputError(f"{crops.name}: {len(empty)} identities without a crop: {named}")
    if crops.identities < 2:
        raise InputError(f"{crops.name}: one identity only; there is nothing to tell apart")


def fingerprint(crops: Crops, *, skip_unreadable: bool = False) -> str:
    """A hash by which a restart recognises its data: labels and sizes of all crops, bytes of evenly spread ones.

    256 crops are read, whatever the size of the set. Another photo in the place of one hardly ever has its size; one
    that does, as a changed pixel in a file that is not compressed, is not noticed unless it is among those read. Raises
    the error of an unreadable crop unless these are to be skipped.
    """
    digest = hashlib.sha256(np.ascontiguousarray(crops.labels, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(crops.sizes(), dtype="<i8").tobytes())
    for index in np.linspace(0, len(crops) - 1, 256).astype(np.int64).tolist():
        try:
            digest.update(crops.read(index)[0])
        except (InputError, OSError):
            if not skip_unreadable:
                raise
    return digest.hexdigest()
