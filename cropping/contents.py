"""What a set of photos is, by the bytes of its files: the hash that a figure is stated with, wherever the photos lie.

Reading a million files takes minutes, so the hash is kept, under the names, sizes and times of the files.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from cropping.faces import ordered_map, windows
from formats import cached
from utils import InputError


def photos_hash(sha256: Sequence[str], names: Sequence[str]) -> str:
    """One SHA-256 over the hashes and names of photos, whatever their order."""
    listing = "".join(f"{digest}  {name}\n" for digest, name in sorted(zip(sha256, names, strict=True)))
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def photos_sha256(files: Sequence[Path], names: Sequence[str], cache: Path, workers: int | None = None) -> str:
    """SHA-256 over the names and contents of all photos: what the figures stand on, wherever it lies.

    Costs one reading of all files; kept below `cache` under their names, sizes and times.
    """
    key = cached.key_of("photos", stamps(files), list(names))
    place = cache / f"photos-{key[:16]}"
    known = cached.read(place, key)
    if known is None:
        digests: list[str] = []
        with utils.progress(len(files), "hash of the photos", unit="photo") as bar:
            ahead = windows(files, path_of=lambda file: file)
            for window in ordered_map(_digests, ahead, utils.worker_count(workers)):
                digests += window
                bar.update(len(window))
        known = {"sha256": np.frombuffer(bytes.fromhex(photos_hash(digests, names)), np.uint8)}
        cached.write(place, key, known)
    return known["sha256"].tobytes().hex()


def stamps(files: Sequence[Path]) -> str:
    """A hash of the name, size and time of every file."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 - half a million of them
            # The last time: of a change of the name, which moves another photo there with its own time.
            stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:  # missing: said later
            stamp = "missing"
        digest.update(f"{file.name}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, "" for what cannot be read: the reasons say so."""
    found = []
    for file in files:
        try:
            found.append(utils.sha256_of(file))
        except (OSError, InputError):
            found.append("")
    return found
