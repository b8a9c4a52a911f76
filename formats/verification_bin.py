"""Verification sets in InsightFace's `.bin` files (lfw.bin, cfp_fp.bin, agedb_30.bin ...), read without `pickle`.

A `.bin` is a pickle of (encoded images, same-person flags), and a pickle is a program. It is not given to the `pickle`
module, not even with a restricted `find_class`, because that allocates what a length or a memo index in the file
claims before looking for the data. Instead a small interpreter here runs the 40-odd opcodes that Python 2, Python 3
and numpy use for such a tuple. It knows no classes: the handful of numpy globals that occur become plain descriptions
of an array, any other global or opcode is refused where it stands, and a length is compared with what is left of the
file before anything is copied. Price: 0.3 s for a set of 12,000 images, and a new opcode of a future Python must be
added by hand.
"""

import codecs
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import utils
from utils import InputError

# All that numpy 1 and 2 and Python 2 and 3 refer to in such files; none of it is ever imported or called.
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_TYPES = {"b1": "?", "u1": "u1", "i1": "i1", "i4": "<i4", "i8": "<i8"}  # what images and flags are stored as
_LONGEST_LINE = 64  # of a number or a global's name in the text opcodes


class _Refused(Exception):
    """The file does something that no verification set does; the message says what."""


class _Global(NamedTuple):
    """Stands for one of `_GLOBALS`; it can be an argument or be "called", both of which only we interpret."""

    kind: str


@dataclass
class _Type:
    """A numpy dtype by its code ("u1"), as it is pickled."""

    code: str


def _kind(value: object) -> str:
    """What a value of a file is called in a message."""
    return "NumPy array" if isinstance(value, _Array) else type(value).__name__.strip("_")


@dataclass
class _Array:
    """A numpy array: its bytes as they stand in the file and how to read them."""

    type: _Type | None = None
    data: bytes = b""
    elongated: bool = True  # at most one dimension differs from 1, so the order of the elements is plain

    def flat(self) -> np.ndarray:
        if self.type is None:
            raise _Refused("an array without contents")
        item = np.dtype(_TYPES[self.type.code])
        if len(self.data) % item.itemsize:
            raise _Refused("an array whose bytes do not fit its type")
        return np.frombuffer(self.data, item)


class _Machine:
    """Runs the pickle in `data`; what it builds are None, bool, int, str, bytes, list, tuple and `_Array`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0  # bytes made by `encode`, the one operation that a few bytes of pickle could repeat

    def run(self) -> Any:
        while True:
            opcode = self.take(1)
            if opcode == pickle.STOP:
                return self.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                known = pickletools.code2op.get(opcode.decode("latin1"))  # type: ignore[attr-defined]  # not in the stubs
                name = known.name if known else repr(opcode)
                raise _Refused(f"pickle opcode {name} occurs in no verification set; refused, nothing was run")
            action(self)

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the file, which must be there."""
        left = len(self.data) - self.at
        if not 0 <= count <= left:
            raise _Refused(f"cut off or corrupt: {count} bytes announced, {left} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def protocol(self, version: int) -> None:
        if version > pickle.HIGHEST_PROTOCOL:
            raise _Refused(f"corrupt: pickle protocol {version} does not exist")

    def frame(self, length: int) -> None:
        """A frame only tells readers how much to buffer; what it announces must be there."""
        if length > len(self.data) - self.at:
            raise _Refused(f"cut off or corrupt: {length} bytes announced, {len(self.data) - self.at} are left")

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, longest: int = _LONGEST_LINE) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + longest + 1)
        if end < 0:
            raise _Refused("cut off or corrupt: a line has no end")
        line = self.take(end - self.at)
        self.at += 1
        return line

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("corrupt: takes more from the stack than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("corrupt: no mark on the stack")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list):
            raise _Refused(f"corrupt: appends to a {_kind(target)}")
        target.extend(values)
        self.push(target)

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Refused(f"corrupt: refers to value {index}, which was not stored")
        self.push(self.memo[index])

    def integer(self) -> None:
        line = self.line()
        if line in (b"00", b"01"):  # how protocols 0 and 1 write False and True
            self.push(line == b"01")
        else:
            self.push(self.parse(line))

    def parse(self, line: bytes) -> int:
        if not line.removeprefix(b"-").isdigit() or len(line) > 18:
            raise _Refused(f"corrupt: {line!r} is not a number")
        return int(line)

    def string(self) -> None:
        """A Python 2 str of protocol 0, quoted and escaped; such strings are bytes."""
        line = self.line(len(self.data))
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise _Refused("corrupt: a string without quotes")
        try:
            self.push(codecs.escape_decode(line[1:-1])[0])
        except ValueError as error:
            raise _Refused(f"corrupt: {error}") from error

    def text(self, count: int) -> None:
        self.push(self.take(count).decode("utf-8", "surrogatepass"))

    def escaped_text(self) -> None:
        self.push(self.line(len(self.data)).decode("raw-unicode-escape"))

    def find(self, module: Any, name: Any) -> None:
        kind = _GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if kind is None:
            wanted = ".".join(part[:60] if isinstance(part, str) else type(part).__name__ for part in (module, name))
            raise _Refused(f"wants {wanted}; refused, nothing was run")
        self.push(_Global(kind))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.find(module, name)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _Refused("corrupt: calls something that is no function")
        self.push(self.apply(function.kind, arguments))

    def apply(self, kind: str, arguments: tuple) -> Any:
        match kind, arguments:
            case "encode", (str() as text, "latin1"):
                self.encoded += len(text)
                if self.encoded > len(self.data):
                    raise _Refused("expands to more than its own size")
                return text.encode("latin1")
            case "dtype", (str() | bytes() as code, *_) if _plain(code) in _TYPES:
                return _Type(_plain(code))
            case "reconstruct", (_Global("ndarray"), (0,), _):
                return _Array()
            case "scalar", (_Type() as type, bytes() as data):
                values = _Array(type, data).flat()
                if len(values) == 1:
                    return values[0].item()
            case "frombuffer", (bytes() as data, _Type() as type, tuple() as shape, _):
                return _array(type, shape, data)
        raise _Refused(f"a call of {kind} that numpy does not write")

    def build(self) -> None:
        """The contents of an array or the details of a dtype, as `__setstate__` would get them."""
        state, target = self.pop(), self.pop()
        match target, state:
            case _Array(type=None), (1, tuple() as shape, _Type() as type, bool() | int(), bytes() as data):
                filled = _array(type, shape, data)
                target.type, target.data, target.elongated = filled.type, filled.data, filled.elongated
            case _Type(), (int(), str() | bytes() as order, None, None, None, -1, -1, int()) if _plain(order) in "|<":
                pass
            case _:
                raise _Refused("sets the state of something that is neither an array nor its type")
        self.push(target)


def _plain(text: str | bytes) -> str:
    """Python 2 wrote names as str, which are bytes here."""
    return text.decode("latin1") if isinstance(text, bytes) else text


def _ascii(line: bytes) -> str:
    return line.decode("ascii", "backslashreplace")


def _array(type: _Type, shape: tuple, data: bytes) -> _Array:
    # Anything else than a few numbers is not printed: tuples of tuples, each twice, are endless texts.
    if len(shape) > 4 or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise _Refused(f"an array whose shape is not up to four numbers, with {len(data)} bytes of data")
    if math.prod(shape) * np.dtype(_TYPES[type.code]).itemsize != len(data):
        raise _Refused(f"an array of shape {shape} with {len(data)} bytes of data")
    return _Array(type, data, sum(side != 1 for side in shape) <= 1)


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: m.protocol(m.number("<B")),
    pickle.FRAME: lambda m: m.frame(m.number("<Q")),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.INT: _Machine.integer,
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.STRING: _Machine.string,
    pickle.BINSTRING: lambda m: m.push(m.take(m.number("<i"))),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number("<B"))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.BINUNICODE: lambda m: m.text(m.number("<I")),
    pickle.SHORT_BINUNICODE: lambda m: m.text(m.number("<B")),
    pickle.BINUNICODE8: lambda m: m.text(m.number("<Q")),
    pickle.UNICODE: _Machine.escaped_text,
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.LIST: lambda m: m.push(m.pop_mark()),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: lambda m: m.pop_tuple(1),
    pickle.TUPLE2: lambda m: m.pop_tuple(2),
    pickle.TUPLE3: lambda m: m.pop_tuple(3),
    pickle.PUT: lambda m: m.put(m.parse(m.line())),
    pickle.BINPUT: lambda m: m.put(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GET: lambda m: m.get(m.parse(m.line())),
    pickle.BINGET: lambda m: m.get(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
    pickle.GLOBAL: lambda m: m.find(_ascii(m.line()), _ascii(m.line())),
    pickle.STACK_GLOBAL: _Machine.stack_global,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
}


def read_bin(path: str | Path) -> tuple[list[bytes], np.ndarray]:
    """The encoded images of a `.bin`, pair i being images 2i and 2i + 1, and whether each pair is one person.

    Returns 2P byte strings and bool [P]. Raises `InputError`, naming the file and the byte or the image, for anything
    that is not such a set: refused or truncated pickles, other structures, counts that do not fit, no pairs at all,
    an entry that does not begin as an image file does. The images are not decoded here.
    """
    path = Path(path)
    with open(path, "rb") as file:
        first = file.read(1)
        if first not in (pickle.PROTO, pickle.MARK, pickle.EMPTY_LIST):
            raise InputError(f"{path}: {'does not begin as a pickle does' if first else 'is empty'}; not a .bin set")
        data = first + file.read()
    machine = _Machine(data)
    try:
        value = machine.run()
    except _Refused as refusal:
        raise InputError(f"{path}: byte {machine.at}: {refusal}") from refusal
    except UnicodeError as error:
        raise InputError(f"{path}: byte {machine.at}: corrupt: a text that is none") from error
    try:
        return _interpret(value)
    except _Refused as refusal:
        raise InputError(f"{path}: {refusal}") from refusal


def _interpret(value: Any) -> tuple[list[bytes], np.ndarray]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise _Refused(f"holds a {_kind(value)}, not the pair (images, flags)")
    entries, flags = value
    if not isinstance(entries, tuple | list):
        raise _Refused(f"its images are a {_kind(entries)}, not a list")
    same = _flags(flags)
    if len(entries) != 2 * len(same):
        raise _Refused(f"{len(entries)} images for {len(same)} pairs; there must be two per pair")
    if not entries:
        raise _Refused("holds no pairs")
    return [_image(entry, index) for index, entry in enumerate(entries)], same


def _flags(flags: Any) -> np.ndarray:
    values = flags.flat().tolist() if isinstance(flags, _Array) else flags
    if not isinstance(values, tuple | list):
        raise _Refused(f"its flags are a {_kind(values)}, not a list")
    for index, value in enumerate(values):
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise _Refused(
                f"flag {index} is {'a ' + _kind(value) if not isinstance(value, int) else value}, not a bool"
            )
    return np.array(values, bool)


def _image(entry: Any, index: int) -> bytes:
    data = entry
    if isinstance(entry, _Array):
        if entry.type is None or entry.type.code != "u1" or not entry.elongated:
            raise _Refused(f"image {index} is an array, but not one of encoded bytes")
        data = entry.data
    if not isinstance(data, bytes):
        raise _Refused(f"image {index} (pair {index // 2}) is a {_kind(data)}, not an encoded image")
    if utils.image_suffix(data) is None:
        raise _Refused(f"image {index} (pair {index // 2}): {len(data)} bytes that do not begin as an image file does")
    return data


def write_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool] | np.ndarray) -> None:
    """Write encoded images (pair i is images 2i and 2i + 1) and flags [P] as a `.bin`, whole or not at all.

    Protocol 3 with plain bytes and bools: no globals, so any Python 3 loads it, whatever its numpy. The same contents
    give the same bytes. Raises `ValueError` when the counts do not fit.
    """
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(images)} images for {len(same)} pairs")
    unique: dict[bytes, bytes] = {}  # pickle writes an object once; which images are one object must not matter
    entries = [unique.setdefault(bytes(image), bytes(image)) for image in images]
    utils.write_bytes(path, pickle.dumps((entries, [bool(value) for value in same]), protocol=3))
