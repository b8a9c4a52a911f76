"""Files of a cache: arrays under the key of all that they depend on, with a checksum over every byte.

A cache that gives back damaged numbers, or those of another model, is worse than none. So each file says what it was
computed from, and whoever reads it says what is wanted: what is missing, cut short, altered by a single bit or of
another key is not there, and is computed anew. There is no way to read a file without naming its key.

Layout: the line `face-cache-1 SHA256`, where the sum is over everything behind that line; a line of JSON with the key
and, for each array, name, type and shape; then the arrays one after the other, little-endian, in C order.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import utils

FORMAT = b"face-cache-1"
_TYPES = {np.dtype(code) for code in ("|u1", "|b1", "<i4", "<i8", "<f4", "<f8")}


def key_of(*parts: Any) -> str:
    """SHA-256 over what a result depends on: plain values as JSON, arrays and bytes by their contents."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"array {part.dtype.str} {part.shape}\n".encode())
            digest.update(np.ascontiguousarray(part).data)
        elif isinstance(part, bytes):
            digest.update(b"bytes %d\n" % len(part) + part)
        else:
            text = json.dumps(part).encode()
            digest.update(b"json %d\n" % len(text) + text)
    return digest.hexdigest()


def write(path: str | Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays (whole numbers, float32, float64, bool) under a key, whole or not at all."""
    entries, parts = [], []
    for name, array in arrays.items():
        kind = array.dtype.newbyteorder("<")
        if kind not in _TYPES:
            raise ValueError(f"{name}: arrays of {array.dtype} are not kept")
        entries.append([name, kind.str, list(array.shape)])
        parts.append(np.ascontiguousarray(array, kind).tobytes())
    body = json.dumps({"key": key, "arrays": entries}).encode() + b"\n" + b"".join(parts)
    utils.write_bytes(path, FORMAT + b" " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read(path: str | Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that were written to `path` under `key`, as they were; None if they are not there unharmed."""
    try:
        utils.require_file(path)
        data = Path(path).read_bytes()
    except (OSError, utils.InputError):
        return None
    first, _, body = data.partition(b"\n")
    if first != FORMAT + b" " + hashlib.sha256(body).hexdigest().encode():
        return None
    head = body[: body.index(b"\n")]
    content = json.loads(head)  # the sum was right: this is what `write` wrote
    if content["key"] != key:
        return None
    arrays: dict[str, np.ndarray] = {}
    at = len(head) + 1
    for name, code, shape in content["arrays"]:
        array = np.frombuffer(body, np.dtype(code), math.prod(shape), at).reshape(shape)
        arrays[name] = array
        at += array.nbytes
    return arrays
