"""MXNet RecordIO, read and written without mxnet: single records, the `.idx`, and the InsightFace layout of crops.

Decisions and their price:

* Records are fetched with `pread`, not through a memory map. It costs one system call (about 1 us) per record and buys
  that a file which shrinks or a disk that fails is an exception instead of SIGBUS, that forked loader workers share
  one descriptor safely, and that resident memory does not grow with the part of the file that was read.
* `RecordReader` fails record by record: a damaged file still gives every record that is whole. `CropSet`, what training
  reads, is strict: whatever can be known without touching every record is checked before the first step.
* The `.idx` is parsed by numpy in blocks: 8 bytes per record stay in memory (keys that count upwards are not stored).
* Nothing is allocated from a length that was not compared with the size of the file first.

The frame, as dmlc-core's `recordio.h` writes it: u32 magic, u32 (cflag << 29 | length), payload, zeros up to a multiple
of 4. Where the magic stands at a payload offset divisible by 4 the writer splits the record there, drops those 4 bytes
from the file and numbers the parts cflag 1, 2, ..., 2, 3; an unsplit record has cflag 0.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from utils import InputError

MAGIC_NUMBER = 0xCED7230A  # dmlc-core, recordio.h
MAGIC = struct.pack("<I", MAGIC_NUMBER)
MAX_RECORD = (1 << 29) - 1  # the length field has 29 bits

_FRAME = struct.Struct("<II")
HEADER = struct.Struct("<IfQQ")  # mxnet/recordio.py: IRHeader(flag, label, id, id2)
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)  # cflag
_MAX_HINT = 1 << 18  # a record of up to this size is fetched together with its frame, with one system call
_INDEX_BLOCK = 1 << 20  # bytes of .idx text parsed at once
_WINDOW = 1 << 20  # bytes read at once when the file is read in sequence
FLOAT32_EXACT = 1 << 24  # labels are float32: larger integers are rounded
QUIET_SCAN = 200_000  # a scan of fewer records is over before a progress bar would be of use


class RecordHeader(NamedTuple):
    """The header of an image record.

    `flag` 0: `label` is one float32 kept inside the 24 bytes; `flag` k > 0: k float32 follow them (k = 1 too).
    `label` is float32 [k] or, for flag 0, [1]. `id` and `id2` are unsigned 64-bit.
    """

    flag: int
    label: np.ndarray
    id: int
    id2: int = 0


def unpack(record: bytes) -> tuple[RecordHeader, bytes]:
    """Split a record into its header and its payload (an encoded image, or nothing for header and identity records).

    Raises `ValueError` when the record is too short for the header or for the labels that it announces.
    """
    if len(record) < HEADER.size:
        raise ValueError(f"{len(record)} bytes, too short for the {HEADER.size}-byte image header")
    flag, label, id, id2 = HEADER.unpack_from(record)
    if flag == 0:
        return RecordHeader(0, np.array([label], np.float32), id, id2), record[HEADER.size :]
    start = HEADER.size + 4 * flag
    if start > len(record):
        raise ValueError(f"announces {flag} labels, but only {len(record) - HEADER.size} bytes follow its header")
    return RecordHeader(flag, np.frombuffer(record, "<f4", flag, HEADER.size), id, id2), record[start:]


def pack(header: RecordHeader, payload: bytes) -> bytes:
    """The record of `header` and `payload`, byte for byte as mxnet's `recordio.pack` makes it.

    With `flag` 0 the one label is stored inside the header; otherwise all of `label` follow it and the field holds 0.
    """
    label = np.asarray(header.label, "<f4").reshape(-1)
    if header.flag != (len(label) if header.flag else 0) or (header.flag == 0 and len(label) != 1):
        raise ValueError(f"flag {header.flag} does not fit a label of {len(label)} numbers")
    if header.flag == 0:
        return HEADER.pack(0, label[0], header.id, header.id2) + payload
    return HEADER.pack(header.flag, 0.0, header.id, header.id2) + label.tobytes() + payload


def frame(record: bytes) -> bytes:
    """A record as it stands in the file: split at aligned magics, each part with its 8 bytes in front, padded to 4."""
    if len(record) > MAX_RECORD:
        raise ValueError(f"a record of {len(record)} bytes; RecordIO holds at most {MAX_RECORD}")
    if MAGIC not in record:
        return _FRAME.pack(MAGIC_NUMBER, len(record)) + record + bytes(-len(record) % 4)
    parts = []
    start = 0
    at = record.find(MAGIC)
    while at >= 0:
        if at % 4:
            at = record.find(MAGIC, at + 1)
            continue
        parts.append(record[start:at])
        start = at + 4
        at = record.find(MAGIC, start)
    parts.append(record[start:])
    flags = [_WHOLE] if len(parts) == 1 else [_FIRST, *[_MIDDLE] * (len(parts) - 2), _LAST]
    framed = [_FRAME.pack(MAGIC_NUMBER, flag << 29 | len(part)) + part for flag, part in zip(flags, parts, strict=True)]
    return b"".join(framed) + bytes(-len(record) % 4)


def _parse_index_block(block: bytes, path: Path, first_line: int) -> np.ndarray:
    """Key and offset of each line of a block of whole lines (ending in a newline): int64 [n, 2]."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    lines = block.count(b"\n")
    shape_is_right = block.translate(None, b"0123456789") == b"\t\n" * lines
    if shape_is_right and not (block[:1] == b"\t" or b"\n\t" in block or b"\t\n" in block):
        numbers = np.fromstring(block, np.int64, sep=" ")  # text mode: any white space separates
        if len(numbers) == 2 * lines and numbers.max() < np.iinfo(np.int64).max:
            return numbers.reshape(-1, 2)
    for number, line in enumerate(block.split(b"\n"), first_line):
        fields = line.split(b"\t")
        if len(fields) != 2 or not all(field.isdigit() and len(field) < 19 for field in fields):
            shown = line[:60].decode("ascii", "backslashreplace")
            raise InputError(f"{path}: line {number}: {shown!r} is not 'key<TAB>offset'")
    raise AssertionError("unreachable: the block was refused, but each of its lines is sound")


def read_index(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets of an `.idx` (`key<TAB>offset` per line; LF or CRLF; the last newline may be missing).

    Returns int64 [n] twice, in ascending order of the keys. Raises `InputError` with the line number of anything else
    (blank lines, blanks for TAB, signs, fractions) and for a key that stands twice, since either line may be wrong.
    """
    path = Path(path)
    keys, offsets = np.empty(0, np.int64), np.empty(0, np.int64)

    def append(block: bytes) -> None:
        pairs = _parse_index_block(block, path, len(keys) + 1)
        for column, values in ((keys, pairs[:, 0]), (offsets, pairs[:, 1])):
            column.resize(len(column) + len(values), refcheck=False)  # grows in place: never two copies in memory
            column[-len(values) :] = values

    with open(path, "rb") as file:
        tail = b""
        while block := file.read(_INDEX_BLOCK):
            head, newline, tail = (tail + block).rpartition(b"\n")
            if newline:
                append(head + newline)
            elif len(tail) > _INDEX_BLOCK:
                raise InputError(f"{path}: line {len(keys) + 1}: longer than {_INDEX_BLOCK} bytes; not an .idx")
        if tail:
            append(tail.removesuffix(b"\r") + b"\n")
    if np.all(keys[1:] > keys[:-1]):
        return keys, offsets
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        first, second = order[twice[0]] + 1, order[twice[0] + 1] + 1
        raise InputError(f"{path}: key {keys[twice[0]]} stands twice, in lines {first} and {second}")
    return keys, offsets


class Keys:
    """Ascending keys, int64 [n]. Those that count upwards by one, as in almost every set, take no memory."""

    @classmethod
    def counting(cls, first: int, end: int) -> "Keys":
        """The keys first .. end-1."""
        keys = cls(np.empty(0, np.int64))
        keys.first, keys.count = first, end - first
        return keys

    def __init__(self, keys: np.ndarray) -> None:
        self.first = int(keys[0]) if len(keys) else 0
        self.count = len(keys)
        counts_up = self.count == 0 or int(keys[-1]) - self.first == self.count - 1
        self._stored = None if counts_up else keys

    @property
    def gapless(self) -> bool:
        return self._stored is None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.count:
            raise IndexError(f"{position} is not in 0 .. {self.count - 1}")
        return self.first + position if self._stored is None else int(self._stored[position])

    def position(self, key: int) -> int | None:
        """Where `key` stands, or None."""
        if self._stored is None:
            position = key - self.first
            return position if 0 <= position < self.count else None
        position = int(np.searchsorted(self._stored, key))
        return position if position < self.count and self._stored[position] == key else None

    def array(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.count) if self._stored is None else self._stored


class RecordReader:
    """The records of a `.rec`, by key or in the order of the file.

    `idx_path` None: the `.idx` beside the file; when there is none, the file is walked through once and the keys are
    the records' own ids if these are all different, otherwise 0, 1, 2, ...

    `len()` is the number of keys, iterating gives each record (bytes) in the order of the file, `read(key)` one of
    them. Every complaint is an `InputError` with the file, the record's key and the offset. Safe to share over `fork`;
    pickles with its index and opens the file again, which must not have changed its size by then.
    """

    def __init__(self, rec_path: str | Path, idx_path: str | Path | None = None) -> None:
        self.path = Path(rec_path)
        self.idx_path: Path | None = Path(idx_path) if idx_path else self.path.with_suffix(".idx")
        if idx_path is None and not self.idx_path.exists():
            self.idx_path = None
        self._open()
        if self.idx_path is None:
            keys, offsets = self._walk_for_index()
        else:
            keys, offsets = read_index(self.idx_path)
        self._take_index(keys, offsets)

    def _open(self) -> None:
        self._descriptor = -1
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def _take_index(self, keys: np.ndarray, offsets: np.ndarray) -> None:
        self._keys = Keys(keys)
        self._offsets = offsets
        self._stops = None  # where each record must have ended: the next offset of the .idx in the order of the file
        if len(offsets) and not np.all(offsets[1:] > offsets[:-1]):
            bounds = np.append(np.unique(offsets), self.size)
            self._stops = bounds[np.searchsorted(bounds[:-1], offsets, side="right")]
        self.unlisted = 0  # records after the last one of the .idx, as far as `check_index` has found them
        self._views()

    def _views(self) -> None:
        """Memory views give Python integers several times faster than indexing a numpy array does."""
        self._offset_at = self._offsets.data
        self._stop_at = None if self._stops is None else self._stops.data

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_descriptor", "_offset_at", "_stop_at")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        size = self.size
        self._open()
        if self.size != size:
            raise InputError(f"{self.path}: changed from {size} to {self.size} bytes while it was in use")
        self._views()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "RecordReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def source(self) -> Path:
        """The file that the keys come from."""
        return self.idx_path or self.path

    @property
    def keys(self) -> np.ndarray:
        """All keys, int64 [n], ascending (whatever the order of the lines)."""
        return self._keys.array()

    @property
    def keys_count_from(self) -> int | None:
        """The first key if the keys count upwards by one from it, else None."""
        return self._keys.first if self._keys.gapless else None

    @property
    def offsets(self) -> np.ndarray:
        """The offset of each of `keys`, int64 [n]."""
        return self._offsets

    def __contains__(self, key: int) -> bool:
        return self._keys.position(key) is not None

    def position(self, key: int) -> int:
        """Where `key` stands in `keys` and `offsets`."""
        position = self._keys.position(key)
        if position is None:
            raise InputError(f"{self.source}: no record with key {key}")
        return position

    def fail(self, key: int | str, offset: int, reason: str) -> NoReturn:
        """Raise the `InputError` of a record."""
        raise InputError(f"{self.path}: record {key} at offset {offset}: {reason}")

    def read(self, key: int) -> bytes:
        """The record of `key`, its parts joined. Raises `InputError` if it is damaged or unknown."""
        return self._read(self.position(key), key)

    def _read(self, position: int, key: int) -> bytes:
        offset = self._offset_at[position]
        stop = self._stop(position)
        span = stop - offset
        if 8 <= span <= _MAX_HINT:
            try:
                data = os.pread(self._descriptor, span, offset)
            except OSError:
                data = b""  # read again below, where the reason is told
            if len(data) == span:
                magic, length = _FRAME.unpack_from(data)
                # A flag would make the length exceed the span. That the frame ends where the next one starts makes all
                # further checks needless.
                if magic == MAGIC_NUMBER and 8 + length + (-length & 3) == span:
                    return data[8 : 8 + length]
        return self._read_with_care(key, offset, stop)

    def _stop(self, position: int) -> int:
        """The next offset of the .idx in the order of the file, or the size of the file."""
        if self._stop_at is not None:
            stop = self._stop_at[position]
        elif position + 1 < len(self._offset_at):
            stop = self._offset_at[position + 1]
        else:
            return self.size
        return stop if stop < self.size else self.size

    def _read_with_care(self, key: int, offset: int, stop: int) -> bytes:
        """Any record that is not one plain frame reaching exactly to the next: in parts, or unindexed neighbours."""
        if offset >= self.size:
            self.fail(
                key,
                offset,
                f"the .idx points past the end of the file ({self.size} bytes): "
                "the file is cut off, or the .idx belongs to another",
            )
        if offset % 4:
            self.fail(key, offset, "the .idx points to an offset that is not a multiple of 4; no record starts there")
        record, end = self._join(offset, key)
        if end > stop:
            self.fail(key, offset, f"its length leads to offset {end}, past the start of the next record at {stop}")
        if end < stop < self.size:  # a record that the .idx does not list must start there
            magic, field = _FRAME.unpack(self._fetch(end, 8)) if end + 8 <= self.size else (0, 0)
            if magic != MAGIC_NUMBER or field >> 29 not in (_WHOLE, _FIRST):
                self.fail(key, offset, f"its length leads to offset {end}, where no record starts")
        return record

    def _join(self, offset: int, key: int | str) -> tuple[bytes, int]:
        """The record at `offset`, its parts joined, and the offset after it."""
        parts: list[bytes] = []
        at = offset
        while True:
            cflag, length = self._frame_at(at, key, offset)
            expected = (_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)
            if cflag not in expected:
                reason = f"part {len(parts) + 1} has flag {cflag}, expected {expected[0]} or {expected[1]}"
                self.fail(key, offset, reason)
            parts.append(self._fetch(at + 8, length))
            at += 8 + length + (-length & 3)
            if cflag in (_WHOLE, _LAST):
                return MAGIC.join(parts), at

    def _frame_at(self, at: int, key: int | str, offset: int) -> tuple[int, int]:
        """Flag and length of the frame at `at`, which lies wholly inside the file."""
        if at + 8 > self.size:
            self.fail(key, offset, f"cut off: {self.size - at} of the 8 bytes before a part are left in the file")
        magic, field = _FRAME.unpack(self._fetch(at, 8))
        if magic != MAGIC_NUMBER:
            where = "" if at == offset else f" of a further part (offset {at})"
            self.fail(key, offset, f"starts{where} with {magic:#010x} instead of the magic {MAGIC_NUMBER:#x}")
        cflag, length = field >> 29, field & MAX_RECORD
        there = self.size - at - 8
        if length + (-length & 3) > there:
            self.fail(
                key,
                offset,
                f"its length field says {length} bytes, but the file ends after {there}: cut off or corrupt",
            )
        return cflag, length

    def _fetch(self, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise InputError(f"{self.path}: offset {offset}: {error.strerror}") from error
        while len(data) < count:  # a signal, a network file system, or a file that has just become shorter
            more = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not more:
                raise InputError(f"{self.path}: offset {offset}: the file became shorter while it was read")
            data += more
        return data

    def peek(self, key: int) -> tuple[bytes, int]:
        """The first bytes of a record (at least its image header with one label, if it is that long) and its length.

        Much cheaper than `read` when only the label is wanted; the rest of the record is not looked at.
        """
        position = self.position(key)
        offset = self._offset_at[position]
        if offset % 4 == 0 and offset + 8 <= self.size:
            data = self._fetch(offset, min(8 + HEADER.size + 8, self.size - offset))
            magic, length = _FRAME.unpack_from(data)
            if magic == MAGIC_NUMBER and offset + 8 + length + (-length & 3) <= self._stop(position):
                return data[8 : 8 + length], length
        record = self._read(position, key)
        return record, len(record)

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Bytes from each record's offset to the next one of the .idx or the end of the file, int64 [n].

        `positions` are those in `keys`.
        """
        if self._stops is None:
            last = len(self._offsets) - 1
            stops = np.where(positions < last, self._offsets[np.minimum(positions + 1, last)], self.size)
        else:
            stops = self._stops[positions]
        return np.minimum(stops, self.size) - self._offsets[positions]

    def peek_all(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first bytes, uint8 [n, 28], and lengths, int64 [n], of many records, by `positions` in `keys`.

        Much cheaper than to `peek` at one after the other where they lie close together: the file is read in large
        pieces. The length is -1 where only `peek` can tell what the record is, or what is wrong with it.
        """
        head = 8 + HEADER.size + 4
        at, room = self._offsets[positions], self.sizes(positions)
        frames = np.zeros((len(at), head), np.uint8)
        plain = (at % 4 == 0) & (room >= head)
        todo = np.flatnonzero(plain)
        todo = todo[np.argsort(at[todo], kind="stable")]
        ends = at[todo] + head
        first = 0
        while first < len(todo):
            begin = int(ends[first]) - head
            stop = int(np.searchsorted(ends, max(begin + _WINDOW, begin + head), side="right"))
            now = todo[first:stop]
            window = np.frombuffer(self._fetch(begin, int(ends[stop - 1]) - begin), np.uint8)
            frames[now] = window[(at[now] - begin)[:, None] + np.arange(head)]
            first = stop
        magic, field = np.ascontiguousarray(frames[:, :8]).view("<u4").T.astype(np.int64)
        # A flag of a record in parts makes the length larger than any room.
        plain &= (magic == MAGIC_NUMBER) & (8 + field + (-field & 3) <= room)
        return frames[:, 8:], np.where(plain, field, -1)

    def __iter__(self) -> Iterator[bytes]:
        for _, record in self.walk():
            yield record

    def walk(self) -> Iterator[tuple[int, bytes]]:
        """Offset and record, in the order of the file, whatever the `.idx` says.

        At the end the `.idx` is compared with what was met: a file cut off exactly between two records shows only
        there. Raises `InputError` at the first frame that is damaged and at bytes after the last record.
        """
        offsets = (np.sort(self._offsets) if self.idx_path is not None else np.empty(0, np.int64)).data
        at = number = listed = 0
        window, begins = b"", 0  # the part of the file that is in memory, and its offset
        while at < self.size:
            start = at
            if at - begins + 8 > len(window):
                window, begins = self._fetch(at, min(_WINDOW, self.size - at)), at
            record, at = self._next(window, at - begins, start, f"number {number}")
            while listed < len(offsets) and offsets[listed] <= start:
                if offsets[listed] < start:
                    self._fail_index(offsets[listed], "where no record starts")
                listed += 1
            yield start, record
            number += 1
        if listed < len(offsets):
            self._fail_index(
                offsets[listed],
                f"but the file ends at {self.size} after {number} records ({len(offsets) - listed} of them missing)",
            )

    def _next(self, window: bytes, begin: int, offset: int, name: str) -> tuple[bytes, int]:
        """The record at `begin` of `window`, which is `offset` of the file, and the offset after it."""
        if begin + 8 <= len(window):
            magic, length = _FRAME.unpack_from(window, begin)
            end = begin + 8 + length
            if magic == MAGIC_NUMBER and end + (-length & 3) <= len(window):  # a flag would make it far longer
                return window[begin + 8 : end], offset + 8 + length + (-length & 3)
        return self._join(offset, name)

    def _fail_index(self, offset: int, reason: str) -> NoReturn:
        key = int(self.keys[np.flatnonzero(self._offsets == offset)[0]])
        raise InputError(f"{self.path}: record {key}: {self.idx_path} points to offset {offset}, {reason}")

    def _walk_for_index(self) -> tuple[np.ndarray, np.ndarray]:
        self._take_index(np.empty(0, np.int64), np.empty(0, np.int64))
        offsets, ids = [], []
        for offset, record in self.walk():
            offsets.append(offset)
            ids.append(HEADER.unpack_from(record)[2] if len(record) >= HEADER.size else -1)
        keys = np.array(ids if ids and min(ids) >= 0 and max(ids) < FLOAT32_EXACT**2 else [], np.int64)
        if len(np.unique(keys)) != len(offsets):
            keys = np.arange(len(offsets))
        order = np.argsort(keys)
        return keys[order], np.array(offsets, np.int64)[order]

    def check_index(self) -> None:
        """Compare the `.idx` with the file as far as that goes without touching every record.

        Raises `InputError` for offsets outside the file or not divisible by 4, for two keys with one offset, for a
        last record that is cut off and for bytes after it. Whole records there are counted in `unlisted`.
        """
        offsets = self._offsets
        self.unlisted = 0
        if not len(offsets):
            if self.size:
                raise InputError(f"{self.path}: {self.size} bytes, but {self.idx_path} lists no record")
            return
        odd = np.flatnonzero(offsets % 4)
        if len(odd):
            self.read(int(self.keys[odd[0]]))
        inside = np.flatnonzero(offsets < self.size)
        beyond = np.flatnonzero(offsets >= self.size)
        if len(beyond):
            first_bad = beyond[np.argmin(offsets[beyond])]
            suspects = [inside[np.argmax(offsets[inside])], first_bad] if len(inside) else [first_bad]
            try:
                for position in suspects:
                    self._read(int(position), int(self.keys[position]))
            except InputError as error:
                raise InputError(f"{error} ({len(beyond)} of {len(offsets)} records start past the end)") from error
        if self._stops is not None:
            order = np.argsort(offsets, kind="stable")
            same = np.flatnonzero(offsets[order[1:]] == offsets[order[:-1]])
            if len(same):
                one, other = self.keys[order[same[0] : same[0] + 2]]
                self.fail(int(one), int(offsets[order[same[0]]]), f"key {other} of {self.idx_path} points to it too")
            last = int(order[-1])
        else:
            last = len(offsets) - 1
        self._check_tail(last)

    def _check_tail(self, last: int) -> None:
        """The physically last record of the .idx must be whole, and only whole records may follow it."""
        key = int(self.keys[last])
        self._read(last, key)
        _, at = self._join(self._offset_at[last], key)
        while at < self.size:
            try:
                _, at = self._join(at, key)
            except InputError as error:
                raise InputError(
                    f"{self.path}: {self.size - at} bytes after the last record (key {key}) are no record"
                ) from error
            self.unlisted += 1
