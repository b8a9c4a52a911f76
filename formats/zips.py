"""The directory of a zip, entry by entry: 8 million members cost no memory, where `zipfile` keeps 550 bytes of each.

The layout is that of PKWARE's APPNOTE 6.3 (4.3.7 local header, 4.3.12 directory, 4.3.14 to 4.3.16 its ends). Members
are unpacked by `zipfile.ZipExtFile`, which checks their CRC.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import BadZipFile

_END = struct.Struct("<4s4H2IH")  # 4.3.16
_LOCATOR = struct.Struct("<4sIQI")  # 4.3.15
_END64 = struct.Struct("<4sQ2H2I4Q")  # 4.3.14
_ENTRY = struct.Struct("<4s6H3I5H2I")  # 4.3.12
_LOCAL = struct.Struct("<4s5H3I2H")  # 4.3.7
_UTF8, _PATCHED, _STRONG_ENCRYPTION = 0x800, 0x20, 0x40
_UNICODE_PATH = 0x7075
_FULL = 0xFFFFFFFF  # the number stands in the zip64 field instead
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Directory:
    """Where the directory of a zip lies: `count` entries in `size` bytes from `start`. `prefix` bytes stand in front of
    the zip (a program that unpacks itself); offsets do not count them."""

    count: int
    start: int
    size: int
    prefix: int


def _find_end(file: BinaryIO) -> tuple[int, tuple]:
    """Where the end of the directory lies, and its fields; `BadZipFile` if there is none."""
    length = file.seek(0, 2)
    file.seek(max(0, length - _END.size - 0xFFFF))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise BadZipFile("no directory at the end")
    return length - len(tail) + at, _END.unpack_from(tail, at)


def is_volume(file: BinaryIO) -> bool:
    """Whether a file is one of those that `zip -s` cut a zip into: the last by the number of the disk in its end, the
    first by the mark in front (8.5.4). Those in between have neither."""
    file.seek(0)
    marked = file.read(4) == b"PK\7\x08"
    try:
        _, fields = _find_end(file)
    except BadZipFile:
        return marked
    return fields[1] not in (0, 0xFFFF)


def find_directory(file: BinaryIO) -> Directory:
    """Look for the directory at the end of a file; `BadZipFile` if there is none."""
    end, (_, _, _, _, count, size, offset, _) = _find_end(file)
    file.seek(max(0, end - _LOCATOR.size))
    locator = file.read(_LOCATOR.size)
    if len(locator) == _LOCATOR.size and locator.startswith(b"PK\6\7"):
        start64 = end - _LOCATOR.size - _END64.size
        file.seek(max(0, start64))
        record = file.read(_END64.size)
        if len(record) < _END64.size or not record.startswith(b"PK\6\6"):
            raise BadZipFile("the end of the zip64 directory is not where it should be")
        _, _, _, _, _, _, _, count, size, offset = _END64.unpack(record)
        end = start64
    start = end - size
    if start < 0 or start < offset:
        raise BadZipFile("the directory lies outside of the file")
    return Directory(count, start, size, start - offset)


def entries(file: BinaryIO, directory: Directory) -> Iterator[zipfile.ZipInfo]:
    """The entries of a directory in their order; `BadZipFile` where it is damaged. `header_offset` counts from the
    beginning of the file. The file may be read elsewhere in between."""
    at, left, ready = directory.start, directory.size, b""

    def take(count: int) -> bytes:
        nonlocal at, left, ready
        if len(ready) < count:
            file.seek(at)
            more = file.read(min(max(_BLOCK, count), left))
            at, left, ready = at + len(more), left - len(more), ready + more
        taken, ready = ready[:count], ready[count:]
        if len(taken) < count:
            raise BadZipFile("the directory is cut off")
        return taken

    seen = 0
    while left or ready:
        fields = _ENTRY.unpack(take(_ENTRY.size))
        if fields[0] != b"PK\1\2":
            raise BadZipFile("a damaged entry in the directory")
        name, extra, _ = take(fields[10]), take(fields[11]), take(fields[12])
        yield _entry(fields, name, extra, directory.prefix)
        seen += 1
    # Without zip64 the count has 16 bits, and some programs go on with more entries all the same.
    if (seen - directory.count) & 0xFFFF and directory.count != 0xFFFF:
        raise BadZipFile(f"the directory holds {seen} entries instead of {directory.count}")


def _entry(fields: tuple, name: bytes, extra: bytes, prefix: int) -> zipfile.ZipInfo:
    _, made, _, flags, method, _, _, crc, packed, size, _, _, _, _, _, attributes, offset = fields
    text = name_of(name, flags, extra)
    numbers = _zip64(extra)
    size, packed, offset = (next(numbers, _FULL) if value == _FULL else value for value in (size, packed, offset))
    info = zipfile.ZipInfo(text)
    info.orig_filename, info.extra = text, extra
    info.create_system = made >> 8
    info.flag_bits, info.compress_type, info.CRC = flags, method, crc
    info.compress_size, info.file_size = packed, size
    info.external_attr, info.header_offset = attributes, offset + prefix
    return info


def name_of(raw: bytes, flags: int, extra: bytes) -> str:
    """The name of an entry: UTF-8 where the flag says so or it can be nothing else, as the Finder of a Mac writes it
    without the flag; otherwise cp437 (appendix D). A field of the name in Unicode (4.6.9) goes before."""
    if flags & _UTF8:
        return raw.decode("utf-8", "surrogateescape")
    field = _field(extra, _UNICODE_PATH)
    if len(field) > 5 and field[:5] == struct.pack("<BI", 1, zlib.crc32(raw)):
        return field[5:].decode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _zip64(extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of the extra field 1 (4.5.3)."""
    field = _field(extra, 1)
    yield from struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8])


def _field(extra: bytes, wanted: int) -> bytes:
    """The contents of one of the extra fields, b"" if it is not there."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def open_entry(file: BinaryIO, info: zipfile.ZipInfo) -> zipfile.ZipExtFile:
    """The unpacked bytes of an entry, as a file. `BadZipFile` and `NotImplementedError` as by `ZipFile.open`."""
    file.seek(info.header_offset)
    local = file.read(_LOCAL.size)
    if len(local) < _LOCAL.size or not local.startswith(b"PK\3\4"):
        raise BadZipFile("no file where the directory says")
    flags, name_length, extra_length = _LOCAL.unpack(local)[2], *_LOCAL.unpack(local)[-2:]
    name, extra = file.read(name_length), file.read(extra_length)
    if (info.flag_bits | flags) & (_PATCHED | _STRONG_ENCRYPTION):
        raise NotImplementedError("compressed patched data or strong encryption")
    # The directory may say more of an encoding than the file's own header does.
    if info.orig_filename not in (name_of(name, flags, extra), name_of(name, info.flag_bits, info.extra)):
        raise BadZipFile(f"another name than in the directory: {name_of(name, flags, extra)!r}")
    return zipfile.ZipExtFile(file, "r", info)
