"""What a data set can come as, opened as a stream of members: zip, tar (plain, compressed, in parts, or shards of
WebDataset), folder, TSV, RecordIO, a list of labelled files, Parquet.

Nothing here writes. A source yields `Member`s in a fixed order, each with the place that it wants (identity and file
name) or the reason why it gets none, and hands out its bytes only when asked. Archives are foreign data, so:

* no library unpacks anything: members are read as bytes, links and devices are refused by their type, a path that is
  absolute or holds `..` is refused whatever it would lead to;
* a member is read up to `Limits.member_bytes`, and an archive that expands to more than `Limits.ratio` times the bytes
  that were consumed is given up (photos do not compress; bombs do);
* a tar is read through a stream that cannot go backwards and refuses absurd reads, which ends every known trick with
  negative sizes, endless loops and giant extended headers.

Whose photos these are: a source says of each photo an `identity`, and by `space` within which set of people that name
is meant. Sources that are parts of one set (`part1.zip` and `part2.zip`, shards, chunks) have the same space; the
people of different spaces are different, whatever they are called.

Price: a compressed tar can only be read from its start, so a restart decompresses what it passes over.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import lzma
import os
import re
import shlex
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

import zstandard

import utils
from formats import label_list, msceleb, parquet, recordio, webdataset, zips
from formats.names import is_litter, path_parts
from utils import InputError

_HEAD = 64  # bytes of a member that show whether it is an image
_RATIO_FROM = 64 << 20  # expanding up to this much is nobody's harm
_BLOCK = 512  # tar
_SPLIT_MARK = 4  # bytes that may stand in front of a zip that was once cut into volumes (APPNOTE 8.5.4)
_MAC_METADATA = b"\0\5\x16\7"  # AppleDouble: what a Mac packs as ._NAME beside a file, or below __MACOSX
_SNIFF = 1 << 20
_SPLIT = b"PK\7\x08"  # at the beginning of the first volume
_ZIP_STARTS = (b"PK\3\4", b"PK\5\6", _SPLIT)
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .jp2 .ppm .pgm .pnm .avif .heic .heif".split()
)


@dataclass(frozen=True)
class Limits:
    """What is still taken for a photo, and for an archive of photos."""

    member_bytes: int
    ratio: float


class NotTaken(Exception):
    """A member that is not extracted. `status` is skipped, refused or damaged; the message is the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Broken(Exception):
    """A source that cannot be read on; what it yielded before is good."""


@dataclass
class Member:
    """One thing in a source.

    `name` is what the source calls it, `identity` and `file` where it wants to be (not yet safe names). `read` gives
    its bytes or raises `NotTaken`, and must be called before the next member is asked for. `note` is a remark on one
    that is taken all the same. `position` is how far the source is read, in its own unit. `space` sets people of one
    name within the source apart.
    """

    name: str
    identity: str
    file: str
    read: Callable[[], bytes]
    position: int
    note: str = ""
    space: str = ""


class Source(Protocol):
    """A data set as it came.

    `total` is in `unit`s, for a progress bar; `fingerprint` tells whether it is the same; `space` is that of its people
    (see the module's docstring); `root` is whose the photos are that lie in no folder, "" if nobody's.
    """

    path: Path
    total: int
    unit: str
    fingerprint: str
    space: str
    root: str

    def members(self) -> Iterator[Member]:
        """All members in a fixed order; ends with `Broken` if the source is damaged beyond the last one."""
        ...


def open_source(path: str | Path, limits: Limits, level: int = 1) -> Source:
    """The source at `path`, recognised by its contents and not by its name.

    `level` says which folder of a member's path names the identity: 1 the one that holds the photo, 2 the one above.
    Raises `InputError` if there is nothing at `path` or it is nothing of the known.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "train.rec").is_file():
            return RecordSource(path / "train.rec", limits)
        return FolderSource(path, limits, level)
    if not path.is_file():
        raise InputError(f"{path}: {'not a file or a folder' if path.exists() else 'no such file or folder'}")
    files = parts_of(path)
    with Joined(files) as file:
        head = file.read(_SNIFF)
    if not head:
        raise InputError(f"{path}: is empty")
    if head.startswith(recordio.MAGIC):
        return RecordSource(path, limits)
    if head.startswith(_ZIP_STARTS) and not (head.startswith(_SPLIT) and _is_volume(files)):
        return ZipSource(files, limits, level)
    if head.startswith(parquet.MAGIC):
        return ParquetSource(path, limits)
    packing = _packing(head)
    if _is_tar(_first_bytes(files, packing, _BLOCK) if packing else head):
        if _is_shard(files, packing, limits):
            return ShardSource(files, limits, packing)
        return TarSource(files, limits, level, packing)
    if packing:
        head = _first_bytes(files, packing, _SNIFF)
    first = first_part(path)
    if first is not None:
        raise InputError(f"{path}: goes on where another part ends; name the first one, {first}, and all are read")
    if msceleb.looks_like_faces(head):
        return FaceLinesSource(path, limits, packing)
    if label_list.looks_like_list(path, head):
        return ListSource(path, limits)
    if _is_volume(files):
        joined = f"zip -s 0 {shlex.quote(str(path.with_suffix('.zip')))} --out whole.zip"
        raise InputError(f"{path}: one volume of a split zip; `{joined}` joins them")
    raise InputError(
        f"{path}: neither a zip, a tar (plain, gz, bz2, xz, zst), an MS-Celeb TSV (6 or 7 columns), RecordIO (.rec), "
        "Parquet nor a list of images with labels"
    )


def _is_volume(files: Sequence[Path]) -> bool:
    with Joined(files) as file, io.BufferedReader(file) as buffered:
        return zips.is_volume(buffered)


def expand(path: Path) -> list[Path]:
    """The sources that a path means: itself, or what lies in a folder that holds nothing but data sets (shards, chunks
    of RecordIO, the parts of an archive). Parts of an archive after the first are left out, since that reads them.
    """
    if not path.is_dir() or (path / "train.rec").is_file():
        return [path]
    entries = sorted(entry.path for entry in os.scandir(path) if not entry.name.startswith("."))
    files = [Path(entry) for entry in entries if _is_data_set(Path(entry))]
    others = {Path(entry) for entry in entries} - set(files)
    parts = {part for file in files for part in parts_of(file)[1:]}
    beside = {".idx", ".lst", ".json", ".txt", ".md", ".csv"}  # what accompanies data sets
    if files and all(other in parts or (other.is_file() and _is_companion(other, beside)) for other in others):
        return [file for file in files if file not in parts]
    return [path]


def _is_companion(path: Path, suffixes: set[str]) -> bool:
    return path.suffix.lower() in suffixes or path.name == "property" or path.stat().st_size == 0


def is_archive(path: Path) -> bool:
    """Whether a file is a tar, plain or compressed, a zip, or Parquet, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
    known = head.startswith((parquet.MAGIC, *_ZIP_STARTS)) or bool(_packing(head))
    return known or (len(head) == _BLOCK and any(head) and _is_tar(head))


def _is_data_set(path: Path) -> bool:
    """Whether a file is a data set of its own, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(len(recordio.MAGIC)) == recordio.MAGIC:
            return True
    return is_archive(path)


# ------------------------------------------------------------------------------------------------- parts and sets

# What numbers the parts of a split file: x.tar.00, x.tar.aa, x_00, x.zip.001, x.part2.
_PART = re.compile(r"(?P<stem>.+?)(?P<mark>[._-](?:part)?)(?P<number>\d{1,4}|[a-z]{2})$")
# A number in a name that says "one of several": part1, shard-0003, 00012-of-00100, vol 2; or a name that is a number.
_NUMBERED = re.compile(r"(?i)(?<![a-z])(?:part|shard|split|chunk|vol|volume|disc|train)[ ._-]*(\d+)(?!\d)")
_NUMBER = re.compile(r"(\d+)$")
_OF = re.compile(r"(?i)(\d+)[ ._-]*of[ ._-]*\d+")


def parts_of(path: Path) -> list[Path]:
    """The files that a split archive was cut into, `path` being the first; `[path]` where nothing was split.

    They are numbered without a gap, and none but the first begins as an archive.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts, number = [path], match["number"]
    while True:
        number = _next_number(number)
        following = path.with_name(f"{match['stem']}{match['mark']}{number}")
        if not number or not following.is_file() or (following.stat().st_size and _is_data_set(following)):
            return parts
        parts.append(following)


def first_part(path: Path) -> Path | None:
    """The first of the parts that `path` is a later one of, or None."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return None
    beside = sorted(other for other in path.parent.iterdir() if other.name.startswith(match["stem"] + match["mark"]))
    return next((other for other in beside if other != path and path in parts_of(other)), None)


def unpack_command(path: Path) -> str:
    """How to unpack an archive by hand into a folder."""
    files = parts_of(path)
    with Joined(files) as file:
        head = file.read(_BLOCK)
    names = " ".join(shlex.quote(str(part)) for part in files)
    if head.startswith(_ZIP_STARTS):
        joined = shlex.quote(f"{path.name}.zip")
        return f"unzip {names} -d FOLDER" if len(files) == 1 else f"cat {names} > {joined} && unzip {joined} -d FOLDER"
    tar = {"gz": "tar -xzf", "bz2": "tar -xjf", "xz": "tar -xJf", "zst": "tar --zstd -xf"}.get(
        _packing(head), "tar -xf"
    )
    make = "mkdir -p FOLDER && "
    return f"{make}{tar} {names} -C FOLDER" if len(files) == 1 else f"{make}cat {names} | {tar} - -C FOLDER"


def _next_number(number: str) -> str:
    """01 after 00, ab after aa; "" after the last."""
    if number.isdecimal():
        return str(int(number) + 1).zfill(len(number))
    first, second = tuple(number)
    if second < "z":
        return first + chr(ord(second) + 1)
    return chr(ord(first) + 1) + "a" if first < "z" else ""


def set_of(path: Path) -> str:
    """What the files of one set have in common: their path with the number of the part replaced by `#`.

    A number counts as one of a part by the word before it, by `of` behind it, as the whole name, or where it is padded
    with zeros in this or another file of the folder. `lfw1.zip` and `lfw2.zip` are two sets.
    """
    path = path.resolve()
    name = path.name
    stem, dot, suffixes = name.partition(".")
    for found in (_OF.search(stem), _NUMBERED.search(stem), _NUMBER.match(stem)):
        if found is not None:
            return str(path.with_name(stem[: found.start(1)] + "#" + stem[found.end(1) :] + dot + suffixes))
    numbers = list(re.finditer(r"\d+", stem))
    if not numbers or len(numbers[-1][0]) < 2:
        return str(path)
    before, after = name[: numbers[-1].start()], name[numbers[-1].end() :]
    padded = re.compile(f"{re.escape(before)}0\\d{{{len(numbers[-1][0]) - 1}}}{re.escape(after)}")
    if any(padded.fullmatch(entry.name) for entry in os.scandir(path.parent)):
        return str(path.with_name(before + "#" + after))
    return str(path)


class Joined(io.RawIOBase):
    """Several files, read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115 - closed by close()
        sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self._ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, count: int = -1) -> bytes:
        """As much as was asked for, less only at the end."""
        left = max(0, self._ends[-1] - self._at) if count < 0 else count
        pieces = []
        while left:
            index = next((index for index, end in enumerate(self._ends) if self._at < end), None)
            if index is None:
                break
            file, end = self._files[index], self._ends[index]
            begin = self._ends[index - 1] if index else 0
            piece = os.pread(file.fileno(), min(left, end - self._at), self._at - begin)
            if not piece:
                break
            pieces.append(piece)
            self._at += len(piece)
            left -= len(piece)
        return b"".join(pieces)

    def read1(self, count: int = -1) -> bytes:
        return self.read(count)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


# ---------------------------------------------------------------------------------------------- places of members


# Folders that cut a set into parts and name no set of their own.
_SPLITS = frozenset("train training val valid validation dev test testing query gallery images imgs data".split())


def place(name: str, level: int, root: str) -> tuple[str, str, str]:
    """Identity, file name and space of a member by its path; `root` is the identity of what lies in no folder deep
    enough, and "" if that is nobody.

    People whose names are numbers are told apart by the folders above them: `lfw/7` and `casia/7` are two, `train/7`
    and `val/7` are one.
    """
    try:
        parts = path_parts(name)
    except ValueError as error:
        raise NotTaken("refused", str(error)) from error
    if len(parts) <= level:
        if not root:
            raise NotTaken("refused", NOBODY)
        return root, "_".join(parts), ""
    identity, above = parts[-level - 1], parts[: -level - 1]
    space = "/".join(part for part in above if part.lower() not in _SPLITS) if identity.isdecimal() else ""
    return identity, "_".join(parts[-level:]), space


NESTED = "a data set inside a data set; unpack it and name it as a source of its own"

# Why a photo is nobody's.
NOBODY = "lies in no folder that names an identity, and has no label; --identity NAME says whose it is"


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
        return True  # zeros: an archive of nothing
    except tarfile.HeaderError:
        return False
    return True


def is_image_name(file: str) -> bool:
    """Whether a file name ends as those of images do."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - not a path of this file system


def _photo(file: IO[bytes] | zipfile.ZipExtFile, name: str, declared: int, limits: Limits) -> bytes:
    """The bytes of a member that is an image by its name or by its contents; `NotTaken` for anything else."""
    if declared > limits.member_bytes:
        raise NotTaken("refused", f"{declared} bytes, more than {limits.member_bytes} (--max-file-mb)")
    head = file.read(_HEAD)
    if head.startswith(_MAC_METADATA):
        raise NotTaken("skipped", "a Mac's metadata of another file")
    if utils.image_suffix(head) is None and not is_image_name(name):
        if _is_source(head, name):
            raise NotTaken("skipped", NESTED)
        raise NotTaken("skipped", "not an image" if head else "an empty file")
    data = head + file.read(limits.member_bytes + 1 - len(head))
    if len(data) > limits.member_bytes:
        raise NotTaken("refused", f"more than {limits.member_bytes} bytes (--max-file-mb)")
    return data


def _is_source(head: bytes, name: str) -> bool:
    """Whether a member is itself something that `open_source` would open, by its first bytes or its name."""
    known = head.startswith((recordio.MAGIC, *_ZIP_STARTS)) or bool(_packing(head))
    return known or name.lower().endswith((".tar", ".tsv"))


def _fingerprint(*paths: Path) -> str:
    """A digest of the files' sizes and of their first and last MiB: enough to notice another file of the same name."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size}\0".encode())
            for start in (0, max(0, size - _SNIFF)):
                file.seek(start)
                digest.update(file.read(_SNIFF))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- streams


class _Zstandard(io.RawIOBase):
    """Zstandard frames as a file. The library's own reader takes a cut-off frame for the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ready = b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # 4 KiB of input expand to 128 MiB at the very worst, so a bomb cannot fill the memory at once.
            data = self._file.read(4096)
            if not data:
                if self._frame is not None:
                    raise EOFError("cut off inside a zstd frame")
                return 0
            while data:
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                self._ready += self._frame.decompress(data)
                data = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


_PACKINGS: dict[str, tuple[bytes | tuple[bytes, ...], Callable[[Any], Any]]] = {
    "gz": (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    "bz2": (b"BZh", bz2.BZ2File),
    "xz": (b"\xfd7zXZ\0", lzma.LZMAFile),
    # pzstd puts a skippable frame in front of each frame.
    "zst": ((b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"), lambda file: io.BufferedReader(_Zstandard(file), 1 << 16)),
}
_STREAM_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def _packing(head: bytes) -> str:
    return next((name for name, (magic, _) in _PACKINGS.items() if head.startswith(magic)), "")


def _first_bytes(files: Sequence[Path], packing: str, count: int) -> bytes:
    """The beginning of what a compressed file holds: `count` bytes and some more, as far as they can be had."""
    head = b""
    with Joined(files) as file:
        stream = _PACKINGS[packing][1](file)
        try:
            # read1, not read: what came before damage is given out before the damage is met.
            while len(head) < count and (data := stream.read1(1 << 16)):
                head += data
        except _STREAM_ERRORS as error:
            if not head:
                raise InputError(f"{files[0]}: {packing} data that cannot be decompressed: {error}") from error
    return head


class _Forward(io.RawIOBase):
    """A possibly compressed file that is read once, forwards; damage and bombs end it with `Broken`."""

    def __init__(self, files: Sequence[Path], packing: str, limits: Limits) -> None:
        self._file = io.BufferedReader(Joined(files), 1 << 18)
        self._stream = _PACKINGS[packing][1](self._file) if packing else self._file
        self._ratio = limits.ratio if packing else 0
        self._most = limits.member_bytes + _SNIFF
        self._at = 0
        self._back = b""  # given back by `unread`
        self._damage: Exception | None = None  # met behind bytes that were good
        self.last = b""  # what the latest read gave

    def readable(self) -> bool:
        return True

    def consumed(self) -> int:
        """Bytes of the file itself that were read."""
        return self._file.tell()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise Broken(f"corrupt: a header at {self._at} leads backwards")
        while self._at < offset and self.read(min(offset - self._at, 1 << 20)):
            pass
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, count: int = -1) -> bytes:
        """`count` bytes, fewer only at the end of the file or in front of damage, which the next call raises."""
        if not 0 <= count <= self._most:
            raise Broken(f"a header at {self._at} announces {count} bytes")
        parts, self._back = [self._back[:count]], self._back[count:]
        left = count - len(parts[0])
        try:
            while left and self._damage is None and (data := self._stream.read1(left)):
                parts.append(data)
                left -= len(data)
        except _STREAM_ERRORS as error:
            self._damage = error
        self.last = b"".join(parts)
        if self._damage is not None and not self.last:
            raise Broken(f"cut off or corrupt after {self._at} bytes of contents: {self._damage}")
        self._at += len(self.last)
        if self._ratio and self._at > max(_RATIO_FROM, self._ratio * self.consumed()):
            raise Broken(f"expands to more than {self._ratio:g} times its size; no photos do")
        return self.last

    def unread(self, data: bytes) -> None:
        """Give back the end of the latest read, to be read again."""
        self._back = data
        self._at -= len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _is_shard(files: Sequence[Path], packing: str, limits: Limits) -> bool:
    """Whether a tar is one of WebDataset's shards; only a compressed one is read where it is stepped over."""
    with _Forward(files, packing, limits) if packing else Joined(files) as stream:

        def read(at: int, count: int) -> bytes:
            try:
                stream.seek(at)
                return stream.read(count)
            except Broken:  # said when it is extracted
                return b""

        return webdataset.has_labels(read)


# ------------------------------------------------------------------------------------------------------- sources


class FolderSource:
    """A folder of photos, by sorted path; links are not followed. What lies in none of its folders is its own."""

    unit = "file"

    def __init__(self, path: Path, limits: Limits, level: int) -> None:
        self.path, self._limits, self._level = path, limits, level
        self._entries = sorted(_walk(path))
        self.total = len(self._entries)
        self.space = str(path.resolve())
        self.root = path.resolve().name
        digest = hashlib.sha256()
        for name, *status in self._entries:
            digest.update(f"{name}\0{status}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def members(self) -> Iterator[Member]:
        """The files, links and special files below the folder."""
        for position, (name, *_) in enumerate(self._entries, 1):
            yield _placed(name, self._level, self.root, functools.partial(self._read, name), position)

    def _read(self, name: str) -> bytes:
        return _read_file(self.path, name, self._limits)


def _read_file(folder: Path, name: str, limits: Limits) -> bytes:
    """A photo below a folder; links, devices and pipes are refused without being opened or waited for."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise NotTaken("refused", "a link" if stat.S_ISLNK(mode) else "not a regular file")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return _photo(file, name, os.fstat(file.fileno()).st_size, limits)
    except OSError as error:
        why = f"cannot be read: {error.strerror}; once it can, extract it into another folder"
        raise NotTaken("damaged", why) from error


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Relative path, size and time of change (mtime, ns) of all that is no folder."""
    waiting = [(str(root), "")]
    while waiting:
        folder, prefix = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    status = entry.stat(follow_symlinks=False)
                    yield f"{prefix}{entry.name}", status.st_size, status.st_mtime_ns


def _placed(name: str, level: int, root: str, read: Callable[[], bytes], position: int) -> Member:
    """A member at the place that its path gives, or one whose `read` says why it has none."""
    try:
        identity, file, space = place(name, level, root)
    except NotTaken as refusal:
        return _refusal(name, refusal, position, read)
    return Member(name, identity, file, read, position, space=space)


def _refusal(name: str, refusal: NotTaken, position: int, attempt: Callable[[], bytes] | None = None) -> Member:
    """A member that is not taken; with `attempt`, only if that gives a photo, for which there is no place."""

    def read() -> bytes:
        if attempt is not None and str(refusal) == NOBODY:
            attempt()
        raise refusal

    return Member(name, "", "", read, position)


class TarSource:
    """A tar, plain or compressed with gzip, bzip2, xz or Zstandard, in one file or in parts."""

    unit = "B"

    def __init__(self, files: Sequence[Path], limits: Limits, level: int, packing: str) -> None:
        self.path, self._files, self._limits, self._level, self._packing = files[0], files, limits, level, packing
        self.total = sum(path.stat().st_size for path in files)
        self.fingerprint = _fingerprint(*files)
        self.space = set_of(files[0]) if len(files) == 1 else str(files[0].resolve())
        self.root = ""

    def members(self) -> Iterator[Member]:
        """The files, links and devices of the archive, in its order; folders are only part of their paths."""
        for name, read, position in self._entries():
            yield _placed(name, self._level, self.root, read, position)

    def _entries(self) -> Iterator[tuple[str, Callable[[], bytes], int]]:
        """Name, reader and position of all members."""
        with _Forward(self._files, self._packing, self._limits) as stream:
            yield from self._one(stream)
            while self._another(stream):
                yield from self._one(stream)

    def _one(self, stream: _Forward) -> Iterator[tuple[str, Callable[[], bytes], int]]:
        """The members of the tar that begins here, up to its end mark."""
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # not in the stubs; it would keep every header
                    if not info.isdir():
                        read = lambda info=info, tar=tar: self._read(tar, info)  # noqa: E731
                        yield info.name, read, stream.consumed()
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise Broken(f"cut off or corrupt: {error}") from error  # extended headers in a row are a recursion
        if stream.last != bytes(_BLOCK):
            raise Broken(f"cut off or corrupt at {stream.tell()}: no end-of-archive mark")

    def _another(self, stream: _Forward) -> bool:
        """Whether another tar follows (`cat 1.tar 2.tar`); reads to the end, where compressed data has its checksum."""
        while block := stream.read(_BLOCK):
            if not any(block):
                continue
            if not _is_tar(block):
                raise Broken(f"something that is no tar follows its end, at {stream.tell() - len(block)}")
            stream.unread(block)
            return True
        return False

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
        if info.issym() or info.islnk():
            raise NotTaken("refused", f"a {'symbolic' if info.issym() else 'hard'} link")
        if not info.isreg() or info.issparse():
            raise NotTaken("refused", "not a regular file (device, pipe, sparse or unknown type)")
        if info.size < 0:
            raise NotTaken("refused", f"a size of {info.size} bytes")
        file = tar.extractfile(info)
        assert file is not None  # regular files have contents
        try:
            return self._bytes_of(file, info)
        except tarfile.TarError as error:
            raise Broken(f"cut off inside {info.name!r}") from error

    def _bytes_of(self, file: IO[bytes], info: tarfile.TarInfo) -> bytes:
        return _photo(file, info.name, info.size, self._limits)


class ShardSource(TarSource):
    """A shard of WebDataset: the label of `KEY.jpg` stands in `KEY.cls` or `KEY.json` beside it.

    Whole numbers become `<set>-<label>`, the set being the folder of the shards; any other label is a name. What
    belongs to one key is kept in memory until the next one begins.
    """

    def __init__(self, files: Sequence[Path], limits: Limits, packing: str) -> None:
        super().__init__(files, limits, 1, packing)
        self.space = set_of(files[0])

    def members(self) -> Iterator[Member]:
        """The members in their order, each with the label of its key."""
        group: list[tuple[str, bytes | NotTaken, int]] = []
        key, held = "", 0
        for name, read, position in self._entries():
            if group and webdataset.key_of(name) != key:
                yield from self._labelled(group)
                group, held = [], 0
            key = webdataset.key_of(name)
            data: bytes | NotTaken
            try:
                data = read()
                held += len(data)
            except NotTaken as outcome:
                data = outcome
            if held > self._limits.member_bytes:
                raise Broken(f"more than {self._limits.member_bytes} bytes of the key {key!r} (--max-file-mb)")
            if len(group) == webdataset.MAX_GROUP:
                raise Broken(f"more than {webdataset.MAX_GROUP} members of the key {key!r}")
            group.append((name, data, position))
        yield from self._labelled(group)

    def _bytes_of(self, file: IO[bytes], info: tarfile.TarInfo) -> bytes:
        if webdataset.is_label(info.name):
            return file.read(webdataset.MAX_LABEL)
        return super()._bytes_of(file, info)

    def _labelled(self, group: list[tuple[str, bytes | NotTaken, int]]) -> Iterator[Member]:
        sidecars = {name: data for name, data, _ in group if webdataset.is_label(name) and isinstance(data, bytes)}
        try:
            label, problem = webdataset.label_of(sidecars), None
        except ValueError as error:
            label, problem = "", NotTaken("damaged", str(error))
        for name, data, position in group:
            if isinstance(data, NotTaken):
                yield _refusal(name, data, position)
            elif name in sidecars:
                yield _refusal(name, NotTaken("skipped", "what is said of a photo"), position)
            elif problem is not None:
                yield _refusal(name, problem, position)
            else:
                identity = labelled(self.path, label)
                file = name.replace("\\", "/").rpartition("/")[2]
                yield Member(name, identity, file, functools.partial(bytes, data), position)


def labelled(path: Path, label: str) -> str:
    """The identity of a label: `<folder>-<number>` for a whole number, otherwise the label itself."""
    return f"{path.resolve().parent.name}-{int(label):07d}" if label.isdecimal() and len(label) < 20 else label


class ZipSource:
    """A zip. One whose directory at the end is lost (a cut-off download) is read from its local headers instead."""

    unit = "file"

    def __init__(self, files: Sequence[Path], limits: Limits, level: int) -> None:
        self.path, self._files, self._limits, self._level = files[0], files, limits, level
        self.fingerprint = _fingerprint(*files)
        self.space = set_of(files[0]) if len(files) == 1 else str(files[0].resolve())
        self.root = ""
        self._size = sum(path.stat().st_size for path in files)
        self._directory: zips.Directory | None = None
        self._why = ""
        with self._opened() as file:
            try:
                self._directory = zips.find_directory(file)
            except (zipfile.BadZipFile, struct.error) as error:
                self._why = str(error)
        self.total = self._directory.count if self._directory else 0

    def members(self) -> Iterator[Member]:
        """The files and links of the archive, in the order of its directory."""
        with self._opened() as file:
            if self._directory is None:
                yield from self._salvaged(file)
                raise Broken(f"cut off or corrupt ({self._why}); its files were searched one after another")
            yield from self._listed(file, self._directory)

    def _opened(self) -> io.BufferedReader:
        """The file, opened only as long as it is read: there may be more zips than files that can be open."""
        return io.BufferedReader(Joined(self._files), 1 << 18)

    def _listed(self, file: io.BufferedReader, directory: zips.Directory) -> Iterator[Member]:
        read_bytes, begins = 0, directory.start
        try:
            for position, info in enumerate(zips.entries(file, directory), 1):
                begins = min(begins, info.header_offset)
                if info.filename.endswith("/"):
                    continue
                read_bytes += 0 if self._is_absurd(info) else info.file_size
                if read_bytes > max(_RATIO_FROM, self._limits.ratio * self._size):
                    raise Broken(f"expands to more than {self._limits.ratio:g} times its size; no photos do")
                read = functools.partial(self._read, file, info)
                yield _placed(info.filename, self._level, self.root, read, position)
        except zipfile.BadZipFile as error:
            raise Broken(f"corrupt: {error}") from error
        if begins > _SPLIT_MARK:
            raise Broken(f"{begins} bytes in front of its first file are in no directory (several zips in one file?)")

    def _is_absurd(self, info: zipfile.ZipInfo) -> bool:
        return info.file_size > max(_RATIO_FROM, self._limits.ratio * info.compress_size)

    def _read(self, file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise NotTaken("refused", "a symbolic link" if kind == stat.S_IFLNK else "not a regular file")
        if info.flag_bits & 1:
            raise NotTaken("refused", "encrypted")
        if self._is_absurd(info):
            raise NotTaken("refused", f"{info.file_size} bytes out of {info.compress_size}; no photo expands so far")
        try:
            with zips.open_entry(file, info) as entry:
                return _photo(entry, info.filename, info.file_size, self._limits)
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError, struct.error) as error:
            raise NotTaken("damaged", f"corrupt: {error}") from error
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise NotTaken("refused", f"cannot be read: {error}") from error

    def _salvaged(self, file: io.BufferedReader) -> Iterator[Member]:
        for number, (name, read) in enumerate(_local_entries(file, self._limits), 1):
            if not name.endswith("/"):
                yield _placed(name, self._level, self.root, read, number)


def _local_entries(file: BinaryIO, limits: Limits) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and readers of the whole entries of a zip without its directory, by their local headers (APPNOTE 4.3.7)."""
    while True:
        fixed = file.read(30)
        if len(fixed) < 30 or not fixed.startswith(b"PK\3\4"):
            return
        flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack("<4x2xHHHHIIIHH", fixed)
        raw_name, extra = file.read(name_length), file.read(extra_length)
        if size == 0xFFFFFFFF and extra[:2] == b"\x01\0" and len(extra) >= 20:  # zip64
            size, packed = struct.unpack_from("<QQ", extra, 4)
        # Sizes that follow the data, encryption and rare methods cannot be stepped over without the directory.
        if flags & 0b1001 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or packed > limits.member_bytes:
            return
        data = file.read(packed)
        if len(data) < packed:
            return
        name = zips.name_of(raw_name, flags, extra)
        yield name, functools.partial(_entry, data, name, method, size, crc, limits)


def _entry(data: bytes, name: str, method: int, size: int, crc: int, limits: Limits) -> bytes:
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, limits.member_bytes + 1)
        except zlib.error as error:
            raise NotTaken("damaged", f"corrupt: {error}") from error
    photo = _photo(io.BytesIO(data), name, len(data), limits)
    if len(photo) != size or zlib.crc32(photo) != crc:
        raise NotTaken("damaged", "corrupt: wrong checksum")
    return photo


class FaceLinesSource:
    """An MS-Celeb-1M TSV, plain or compressed. The identity is the MID, the file `<rank>-<face id>.<ext>`."""

    unit = "B"
    root = ""

    def __init__(self, path: Path, limits: Limits, packing: str) -> None:
        self.path, self._limits, self._packing = path, limits, packing
        self.total = path.stat().st_size
        self.fingerprint = _fingerprint(path)
        self.space = "MID"  # Freebase's: one person, whatever the file

    def members(self) -> Iterator[Member]:
        """The rows, by their line number."""
        with _Forward([self.path], self._packing, self._limits) as stream:
            for number, line in msceleb.read_lines(io.BufferedReader(stream, 1 << 18)):
                yield self._member(number, line, stream.consumed())

    def _member(self, number: int, line: bytes | None, position: int) -> Member:
        name = f"line {number}"
        try:
            if line is None:
                raise NotTaken("refused", f"longer than {msceleb.MAX_LINE} bytes")
            if not line.strip(b" \r"):
                raise NotTaken("skipped", "a blank line")
            face = msceleb.parse_line(line, number)
        except NotTaken as refusal:
            return _refusal(name, refusal, position)
        except ValueError as error:
            return _refusal(name, NotTaken("damaged", str(error)), position)
        note = ""
        try:
            face.rectangle()
        except ValueError as error:
            note = str(error)
        return Member(f"{name}: {face.mid}", face.mid, face.name, lambda: self._read(face), position, note)

    def _read(self, face: msceleb.FaceLine) -> bytes:
        for part in (face.mid, face.name):
            if ".." in part.replace("\\", "/").split("/"):
                raise NotTaken("refused", "a path with '..'")
        try:
            data = face.image()
        except ValueError as error:
            raise NotTaken("damaged", str(error)) from error
        if len(data) > self._limits.member_bytes:
            raise NotTaken("refused", f"{len(data)} bytes, more than {self._limits.member_bytes} (--max-file-mb)")
        if utils.image_suffix(data) is None:
            raise NotTaken("damaged", f"the image column holds {len(data)} bytes that are no image")
        return data


class RecordSource:
    """A RecordIO pair. The identity is `<set>-<label>`, the file `<key>.<ext>`: labels of two sets are other people."""

    unit = "record"
    root = ""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self._reader = recordio.RecordReader(path)
        self.total = len(self._reader)
        self.fingerprint = _fingerprint(*[p for p in (path, self._reader.idx_path) if p])
        self.space = set_of(path)

    def members(self) -> Iterator[Member]:
        """The records by key; header and identity records, which hold no image, are skipped."""
        for position, key in enumerate(self._reader.keys.tolist(), 1):
            yield self._member(key, position)
        try:
            self._reader.check_index()
        except InputError as error:
            raise Broken(str(error).removeprefix(f"{self.path}: ")) from error
        if self._reader.unlisted:
            raise Broken(f"{self._reader.unlisted} records follow the last one of {self._reader.idx_path}")

    def _member(self, key: int, position: int) -> Member:
        try:
            header, payload = recordio.unpack(self._reader.read(key))
        except (InputError, ValueError) as error:
            return _refusal(f"record {key}", NotTaken("damaged", str(error)), position)
        if not payload:
            kind = "a header or identity record" if header.flag == 2 else "no image"
            return _refusal(f"record {key}", NotTaken("skipped", kind), position)
        label = float(header.label[0])
        if not label.is_integer() or not 0 <= label < recordio.FLOAT32_EXACT:
            reason = f"its label {label:g} is not the number of an identity"
            return _refusal(f"record {key}", NotTaken("damaged", reason), position)
        if utils.image_suffix(payload) is None:
            return _refusal(f"record {key}", NotTaken("damaged", f"{len(payload)} bytes that are no image"), position)
        read = lambda: _photo(io.BytesIO(payload), "", len(payload), self._limits)  # noqa: E731
        return Member(f"record {key}", labelled(self.path, str(int(label))), f"{key:08d}", read, position)


class ListSource:
    """A text list of images with the label of each; the images lie below the list's folder."""

    unit = "line"
    root = ""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self.total, digest = 0, hashlib.sha256(utils.sha256_of(path).encode())
        for self.total, line in label_list.read_lines(path):
            with contextlib.suppress(ValueError, OSError):  # what is missing or wrong is told when it is its turn
                status = (path.parent / label_list.parse_line(line)[0]).stat()
                digest.update(f"{self.total} {status.st_size} {status.st_mtime_ns}\n".encode())
        self.fingerprint = digest.hexdigest()
        self.space = str(path.resolve())

    def members(self) -> Iterator[Member]:
        """The lines, in their order."""
        for number, line in label_list.read_lines(self.path):
            name = f"line {number}"
            try:
                file, label = label_list.parse_line(line)
            except ValueError as error:
                said = line.strip() and not line.startswith("#")
                yield _refusal(name, NotTaken("damaged" if said else "skipped", str(error)), number)
                continue
            read = lambda file=file: _read_file(self.path.parent, file, self._limits)  # noqa: E731
            yield Member(f"{name}: {file}", labelled(self.path, label), file.replace("/", "_"), read, number)


class ParquetSource:
    """A Parquet file as Hugging Face's hub writes it. A label becomes the name that the file gives it, if any."""

    unit = "row"
    root = ""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self._table = parquet.open_table(path)
        self.total = self._table.rows
        self.fingerprint = _fingerprint(path)
        self.space = set_of(path)

    def members(self) -> Iterator[Member]:
        """The rows, in their order."""
        try:
            for number, row in enumerate(self._table.read(), 1):
                name = f"row {number}"
                if row.data is None or row.label is None:
                    what = "image" if row.data is None else "label"
                    yield _refusal(name, NotTaken("damaged", f"no {what}"), number)
                    continue
                read = lambda data=row.data: _photo(io.BytesIO(data), "", len(data), self._limits)  # noqa: E731
                yield Member(name, labelled(self.path, row.label), row.file or f"{number:08d}", read, number)
        except ValueError as error:
            raise Broken(str(error)) from error
