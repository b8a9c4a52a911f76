"""Aligned crops as they are passed on besides RecordIO: folders, text lists, shards of WebDataset.

Each class is a `crop_sets.Crops`. None guesses: what is not understood is an error that names it, because leaving out
files loses people silently. Only what systems leave behind (`Thumbs.db`, `__MACOSX`, ...) is passed over.
"""

import contextlib
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import utils
from formats import label_list, webdataset
from formats.names import is_litter
from utils import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_SHARD_IMAGES = (*sorted(IMAGE_SUFFIXES), ".bmp", ".gif", ".jp2", ".tif", ".tiff")
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_MOST = 256 << 20  # bytes of a crop's file, as of a photo's
_CHECKED = 64  # photos of a list that are looked for when it is opened
_INDEX = "shard-index-1"
_WORTH_KEEPING = 64 << 20  # bytes of a shard whose index is kept
_QUIET = 1 << 30  # bytes of shards that are indexed before a progress bar would be of use
_QUIET_FILES = 500_000  # files whose sizes are asked for before one would
_STATS, _TOGETHER = 8, 65_536  # threads that ask for sizes, and for how many at a time


def number_labels(texts: Sequence[str]) -> tuple[np.ndarray, list[str], str]:
    """Labels from 0 for the labels that a set has: int64 [n], the name of each, and a note if numbers were changed.

    Whole numbers are ordered as such, anything else as text.
    """
    numeric = all(text.isdecimal() and len(text) < 19 for text in texts)
    names = sorted(set(texts), key=(lambda text: (int(text), text)) if numeric else str)
    position = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((position[text] for text in texts), np.int64, len(texts))
    return labels, names, renumbering(names)


def renumbering(names: Sequence[str]) -> str:
    """A sentence about labels that do not count from 0 without a gap; "" if they do."""
    if not names or names == [str(label) for label in range(len(names))]:
        return ""
    if not all(name.isdecimal() for name in names):
        return f"the labels are names; numbered 0 to {len(names) - 1} (identities.tsv has the names)"
    return (
        f"the labels are {len(names)} of the numbers {names[0]} to {names[-1]}; numbered 0 to {len(names) - 1} "
        "(identities.tsv has the old ones)"
    )


class PackedNames:
    """Names of files, one after the other in one string of bytes.

    Of a list of strings each worker would get a copy of its own, little by little, because looking at a string counts
    its users in its own memory: 42 million of them are 4 GB for each worker. So they are some 30 bytes each, once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def file_sizes(folder: Path, files: PackedNames) -> np.ndarray:
    """Bytes of each file, int64 [n], -1 for one that is not there; by several threads, since file servers are slow."""

    def size(index: int) -> int:
        try:
            return (folder / files[index]).stat().st_size
        except OSError:
            return -1

    sizes = np.empty(len(files), np.int64)
    quiet = len(files) < _QUIET_FILES
    with (
        contextlib.nullcontext() if quiet else utils.progress(len(files), f"sizes in {folder}", unit="file") as bar,
        ThreadPoolExecutor(_STATS) as threads,  # none is left when the loader forks
    ):
        for start in range(0, len(files), _TOGETHER):
            part = range(start, min(start + _TOGETHER, len(files)))
            sizes[part.start : part.stop] = list(threads.map(size, part, chunksize=256))
            if bar is not None:
                bar.update(len(part))
    return sizes


class FolderCrops:
    """Crops as files: `<root>/<identity>/<file>`, labels in the sorted order of the folders.

    The folders of the identities may lie deeper, all at one depth (`<root>/0/<identity>/<file>`, as WebFace is passed
    on); an identity's name is then its path. Every identity folder must hold an image; a file there that is no image by
    its suffix and an image above the identities are errors. Dot files are left alone.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.name = str(root)
        self.notes: list[str] = []
        folders, images = self._look(self.root)
        if images:
            raise InputError(f"{self.root / images[0]}: an image in no identity's folder; move it into one, or away")
        depth = 1
        while folders and (deeper := self._below(folders)) is not None:
            folders, depth = deeper, depth + 1
        if depth > 1:
            self._check_splits(folders)
            self.notes.append(f"identities lie {depth} folders deep: {folders[0]} ...")
        self.identity_names = folders
        files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            names = self._images_in(folder)
            files += [f"{folder}/{name}" for name in names]
            labels += [label] * len(names)
        self.files = PackedNames(files)
        self.labels = np.array(labels, np.int64)
        self.identities = len(folders)

    def _look(self, folder: Path) -> tuple[list[str], list[str]]:
        """Names of the folders and of the images in a folder, sorted."""
        entries = [
            entry for entry in os.scandir(folder) if not entry.name.startswith(".") and not is_litter(entry.name)
        ]
        links = {entry.name: os.path.realpath(entry.path) for entry in entries if entry.is_symlink() and entry.is_dir()}
        ways = [folder, *(above for above in folder.parents if above.is_relative_to(self.root))] if links else []
        above = {os.path.realpath(way) for way in ways}  # a link to one of them goes in a circle
        folders = sorted(entry.name for entry in entries if entry.is_dir() and links.get(entry.name) not in above)
        images = [e.name for e in entries if not e.is_dir() and Path(e.name).suffix.lower() in IMAGE_SUFFIXES]
        return folders, sorted(images)

    def _below(self, folders: list[str]) -> list[str] | None:
        """The folders one level deeper, if that is where all images lie."""
        found: list[str] = []
        for folder in folders:
            inside, images = self._look(self.root / folder)
            if images or not inside:
                return None
            found += [f"{folder}/{name}" for name in inside]
        return sorted(found)

    def _check_splits(self, folders: list[str]) -> None:
        tops = {folder.split("/")[0].lower() for folder in folders}
        if len(tops) > 1 and tops <= _SPLITS:
            raise InputError(f"{self.root}: holds {' and '.join(sorted(tops))}; name the one to train on")

    def _images_in(self, folder: str) -> list[str]:
        names = []
        for entry in os.scandir(self.root / folder):
            if entry.name.startswith(".") or is_litter(entry.name):
                continue
            if entry.is_dir() or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                raise InputError(f"{entry.path}: not a crop; an identity's folder holds only images ({suffixes})")
            names.append(entry.name)
        if not names:
            raise InputError(f"{self.root / folder}: identity without a crop; remove the empty folder")
        return sorted(names)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop and its label."""
        return utils.read_bytes(self.root / self.files[index], _MOST), int(self.labels[index])

    def sizes(self) -> np.ndarray:
        """See `crop_sets.Crops`."""
        return file_sizes(self.root, self.files)

    def describe(self, index: int) -> str:
        """How to find this crop again."""
        return str(self.root / self.files[index])


class ListCrops:
    """Crops that a text list names, `path label` a line, relative to the folder of the list."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        files: list[str] = []
        texts: list[str] = []
        for number, line in label_list.read_lines(self.path):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                file, label = label_list.parse_line(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from error
            files.append(file)
            texts.append(label)
        self.files = PackedNames(files)
        for index in np.unique(np.linspace(0, max(0, len(self.files) - 1), _CHECKED).astype(int)).tolist():
            if files and not (self.path.parent / self.files[index]).is_file():
                raise InputError(f"{path}: names {self.files[index]}, which is not in {self.path.parent}")
        self.labels, self.identity_names, note = number_labels(texts)
        self.identities = len(self.identity_names)
        self.notes = [note] if note else []

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop and its label."""
        return utils.read_bytes(self.path.parent / self.files[index], _MOST), int(self.labels[index])

    def sizes(self) -> np.ndarray:
        """See `crop_sets.Crops`."""
        return file_sizes(self.path.parent, self.files)

    def describe(self, index: int) -> str:
        """How to find this crop again."""
        return str(self.path.parent / self.files[index])


class ShardCrops:
    """Crops in plain tars as WebDataset writes them, each with a label (see `webdataset`), read in any order.

    The headers of a shard are read once (50,000 to 100,000 members a second), and where its folder can be written to
    what they say is kept there, as `.NAME.index`, until the shard changes. 28 bytes per crop stay in memory; the crops
    are fetched with `pread`, as from RecordIO, whose order and speed they share. Compressed tars cannot be read in any
    order and are refused.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards)"
        self._stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        starts: list[np.ndarray] = []
        texts: list[str] = []
        total = sum(size for size, _ in self._stats)
        with (
            utils.progress(total, "index of the shards", unit="B")
            if total > _QUIET
            else contextlib.nullcontext() as bar
        ):
            for number, (path, (size, _)) in enumerate(zip(self.paths, self._stats, strict=True)):
                offsets, lengths, labels = self._indexed(path, size)
                starts.append(np.stack([np.full_like(offsets, number), offsets, lengths], axis=1))
                texts += labels
                if bar is not None:
                    bar.update(size)
        table = np.concatenate(starts) if starts else np.empty((0, 3), np.int64)
        self._shard, self._offset = table[:, 0].astype(np.int32), np.ascontiguousarray(table[:, 1])
        self._length = np.ascontiguousarray(table[:, 2])
        self.labels, self.identity_names, note = number_labels(texts)
        self.identities = len(self.identity_names)
        self.notes = [note] if note else []
        self._files: dict[int, int] = {}

    def _indexed(self, path: Path, size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Offset, size (int64 [n] each) and label of each crop of a shard, from its index if that is kept."""
        kept = path.with_name(f".{path.name}.index")
        key = f"{_INDEX} {size} {path.stat().st_mtime_ns}"
        # A damaged index is made anew; a zip's reader has many ways to say so.
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
            with np.load(kept, allow_pickle=False) as stored:
                offsets, lengths, codes = (stored[name] for name in ("offsets", "lengths", "codes"))
                names = json.loads(stored["names"].tobytes())
                same = str(stored["key"]) == key and len(offsets) == len(lengths) == len(codes)
            inside = len(offsets) == 0 or (offsets.min() >= 0 and (offsets + lengths).max() <= size)
            if same and inside and (len(codes) == 0 or 0 <= codes.min() <= codes.max() < len(names)):
                return offsets, lengths, [names[code] for code in codes.tolist()]
        found = self._index(path, size)
        table = np.array([(offset, length) for offset, length, _ in found], np.int64).reshape(-1, 2)
        labels = [label for _, _, label in found]
        if size >= _WORTH_KEEPING:
            codes, names, _ = number_labels(labels)
            text = np.frombuffer(json.dumps(names).encode("utf-8", "surrogatepass"), np.uint8)
            with contextlib.suppress(OSError), utils.atomic_path(kept) as temporary, open(temporary, "wb") as file:
                np.savez(file, key=key, offsets=table[:, 0], lengths=table[:, 1], codes=codes, names=text)
        return table[:, 0], table[:, 1], labels

    def _index(self, path: Path, size: int) -> list[tuple[int, int, str]]:
        """Offset, size and label of each crop of a shard."""
        crops: list[tuple[int, int, str]] = []
        interned: dict[str, str] = {}
        group: list[webdataset.Entry] = []

        def take() -> None:
            images = [entry for entry in group if entry.name.lower().endswith(_SHARD_IMAGES)]
            others = [entry.name for entry in group if not webdataset.is_label(entry.name)]
            if not images and (not others or not any(entry.name.lower().endswith(".cls") for entry in group)):
                return
            if not images:
                raise InputError(f"{path}: {others[0]}: has a label, but is no image ({', '.join(_SHARD_IMAGES)})")
            sidecars = {
                name: data[offset : offset + min(length, webdataset.MAX_LABEL)]
                for name, offset, length in group
                if webdataset.is_label(name)
            }
            try:
                label = webdataset.label_of(sidecars)
            except ValueError as error:
                raise InputError(f"{path}: {images[0].name}: {error}") from error
            crops.extend((offset, length, interned.setdefault(label, label)) for _, offset, length in images)

        key = ""
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        try:
            for entry in webdataset.index(data):
                if (own := webdataset.key_of(entry.name)) != key:
                    take()
                    group.clear()
                    key = own
                group.append(entry)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        take()
        return crops

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def _file(self, shard: int) -> int:
        """The descriptor of a shard, which must still be the one that was indexed. Shared over `fork`."""
        if shard not in self._files:
            path = self.paths[shard]
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != self._stats[shard]:
                os.close(descriptor)
                raise InputError(f"{path}: has changed since it was indexed")
            self._files[shard] = descriptor
        return self._files[shard]

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop and its label."""
        length, offset = int(self._length[index]), int(self._offset[index])
        data = os.pread(self._file(int(self._shard[index])), length, offset)
        if len(data) != length:
            raise InputError(f"{self.describe(index)}: the file became shorter while it was read")
        return data, int(self.labels[index])

    def sizes(self) -> np.ndarray:
        """See `crop_sets.Crops`."""
        return self._length

    def describe(self, index: int) -> str:
        """How to find this crop again: shard, member and offset."""
        path, offset = self.paths[int(self._shard[index])], int(self._offset[index])
        with open(path, "rb") as file:
            file.seek(offset - webdataset.BLOCK)
            name = webdataset.name_in(file.read(webdataset.BLOCK))
        return f"{path}: {name} at offset {offset}"


class LooseCrops:
    """Every image in a folder and the folders inside it, in sorted order, without identities: all have the label 0."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.name = str(root)
        self.notes: list[str] = []
        self.identities, self.identity_names = 1, ["0"]
        files: list[str] = []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if not name.startswith(".") and not is_litter(name)]
            names = [name for name in names if not name.startswith(".") and not is_litter(name)]
            images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
            files += [os.path.relpath(Path(folder) / name, root) for name in images]
        self.files = PackedNames(sorted(files))
        self.labels = np.zeros(len(self.files), np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes of a crop, and 0."""
        return utils.read_bytes(self.root / self.files[index], _MOST), 0

    def sizes(self) -> np.ndarray:
        """See `crop_sets.Crops`."""
        return file_sizes(self.root, self.files)

    def describe(self, index: int) -> str:
        """How to find this crop again."""
        return str(self.root / self.files[index])
