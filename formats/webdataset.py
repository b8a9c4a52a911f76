"""WebDataset's shards: tars in which files of one key belong together (`000017.jpg`, `000017.cls`, `000017.json`).

The layout is that of the webdataset library and of img2dataset: the key is a member's path up to the first dot of its
file name, and the members of a key follow one another. The label of a photo is the text of `.cls`, or `label`,
`identity` or `class` in the object in `.json`.
"""

import mmap
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import utils
from formats.names import is_nobodys, label_text

MAX_LABEL = 1 << 20  # bytes of a .cls or .json that are read
MAX_GROUP = 64  # members of one key
# What of a tar says whether it is a shard: a MiB, and where photos are large so much more that three keys are whole.
_LOOKED_AT, _WHOLE_KEYS, _FARTHEST = 1 << 20, 3, 1 << 30
LABEL_KEYS = ("label", "identity", "class")  # in the .json, the first that is there

BLOCK = 512  # bytes of a tar's header
_REGULAR, _NAMES = (b"0", b"\0"), (b"L", b"x")  # types of members
_BLANKS = b" " * 8  # what stands for the checksum in its own sum


def key_of(name: str) -> str:
    """The key of a member: its path up to the first dot of its file name."""
    folder, slash, file = name.replace("\\", "/").removeprefix("./").rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def is_label(name: str) -> bool:
    """Whether a member says something of the photo of its key."""
    return name.lower().endswith((".cls", ".json"))


def label_of(sidecars: Mapping[str, bytes]) -> str:
    """The label that the `.cls` and `.json` of one key give it, a whole number in its shortest form.

    Raises `ValueError` if there is none, it is no text or number, or the two contradict each other.
    """
    found: dict[str, str] = {}
    for name, data in sidecars.items():
        is_json = name.lower().endswith(".json")
        label = label_text(_from_json(data) if is_json else data.decode("utf-8", "surrogateescape"))
        if label:
            found[name] = label
    labels = set(found.values())
    if not labels:
        raise ValueError("no label: neither a .cls nor label, identity or class in a .json of this key")
    if any(map(is_nobodys, labels)):
        raise ValueError(f"the label {min(labels)}, which is nobody's")
    if len(labels) > 1:
        raise ValueError(f"two labels: {' and '.join(f'{label} in {name}' for name, label in found.items())}")
    return labels.pop()


def _from_json(data: bytes) -> Any:
    try:
        value = utils.parse_json(data)
    except ValueError:
        return None
    given = value if isinstance(value, dict) else {}
    return next((given[key] for key in LABEL_KEYS if given.get(key) is not None), None)


Read = Callable[[int, int], bytes]  # so many bytes from an offset, fewer where there are no more


def has_labels(read: Read) -> bool:
    """Whether a tar is a shard: one of its first keys has a photo's file and a label's.

    It is asked for offsets that only grow, for headers and labels: photos of any size are stepped over.
    """
    keys: dict[str, set[bool]] = {}
    labels: dict[str, dict[str, bytes]] = {}
    for count, entry in enumerate(_first_entries(read), 1):
        key = key_of(entry.name)
        keys.setdefault(key, set()).add(is_label(entry.name))
        if is_label(entry.name):
            labels.setdefault(key, {})[entry.name] = read(entry.offset, min(entry.size, MAX_LABEL))
        # The last key is not whole before another one begins.
        if entry.offset + entry.size > _LOOKED_AT and (len(keys) > _WHOLE_KEYS or count >= MAX_GROUP):
            break
    for key in (key for key, kinds in keys.items() if len(kinds) == 2):
        try:
            label_of(labels[key])
        except ValueError as error:
            if "two labels" not in str(error):
                continue
        return True
    return False


class Entry(NamedTuple):
    """A regular file in a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


def _first_entries(read: Read) -> Iterator[Entry]:
    at = 0
    long_name = ""
    while at <= _FARTHEST and len(block := read(at, BLOCK)) == BLOCK:
        try:
            name, size, kind = _header(block)
        except ValueError:
            return
        if kind in _NAMES:
            long_name = _long_name(kind, read(at + BLOCK, min(size, 1 << 16))) or long_name
        elif kind in _REGULAR:
            yield Entry(long_name or name, at + BLOCK, size)
            long_name = ""
        at += BLOCK + size + -size % BLOCK


def index(data: bytes | mmap.mmap) -> Iterator[Entry]:
    """The regular files of a plain tar, in their order, by its headers alone.

    Raises `ValueError` with the offset where it is damaged or cut off. Links are passed over: what they lead to is not
    in the shard.
    """
    at, size, zeros = 0, len(data), 0
    long_name = ""
    while at + BLOCK <= size and zeros < 2:
        block = data[at : at + BLOCK]
        if block[0] == 0 and not any(block):
            zeros += 1
            at += BLOCK
            continue
        zeros = 0
        try:
            name, length, kind = _header(block)
        except ValueError as error:
            raise ValueError(f"offset {at}: {error}") from error
        begin = at + BLOCK
        at = begin + length + -length % BLOCK
        if begin + length > size:
            raise ValueError(f"offset {begin - BLOCK}: {name!r} is cut off")
        if kind in _REGULAR:
            yield Entry(long_name or name, begin, length)
            long_name = ""
        elif kind in _NAMES:
            if length > MAX_LABEL:
                raise ValueError(f"offset {begin - BLOCK}: a name of {length} bytes")
            long_name = _long_name(kind, data[begin : begin + length]) or long_name
        elif kind != b"g":
            long_name = ""
    if not zeros:
        raise ValueError(f"cut off at {size}: no end-of-archive mark")


def name_in(block: bytes) -> str:
    """The name in a tar's header, cut to 100 bytes where a longer one stands before it; "" if it is no header."""
    try:
        return _header(block)[0] if len(block) == BLOCK else ""
    except ValueError:
        return ""


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header (POSIX ustar, and GNU's numbers in base 256); `ValueError` if it is none."""
    # Adler-32's lower half is one more than the sum of the bytes, modulo 65521: twenty times as fast as adding them.
    total = zlib.adler32(block[156:], zlib.adler32(_BLANKS, zlib.adler32(block[:148])))
    if (_number(block[148:156]) + 1) % 65521 != total & 0xFFFF:
        raise ValueError("no tar header (its checksum is wrong)")
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        value = int(field.split(b"\0", 1)[0] or b"0", 8)
    except ValueError:
        raise ValueError("no tar header (a number that is none)") from None
    if value < 0:
        raise ValueError("a negative number")
    return value


def _long_name(kind: bytes, data: bytes) -> str:
    """The name that GNU's `L` member or the `path` of a POSIX extended header gives the next member."""
    if kind == b"L":
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
    return match[1].decode("utf-8", "surrogateescape") if match else ""
