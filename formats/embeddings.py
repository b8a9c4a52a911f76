"""Embeddings of a list of crops in a file that is mapped, computed in chunks by any number of processes.

A folder holds `embeddings.npy` (one row for each crop; any program with numpy reads it), `checksums.bin` (one number
for each chunk of `CHUNK` rows, 0 where it is not computed) and `key.json` (what everything was computed from). A chunk
is written into its place and flushed before its checksum is, so a killed run repeats at most one chunk per process, and
what a power cut or another program has damaged is found and computed again. The file has its full size from the start,
with holes where the file system knows them.
"""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import InputError

EMBEDDINGS, CHECKSUMS, KEY = "embeddings.npy", "checksums.bin", "key.json"
CHUNK = 256  # crops that are computed, and checked, together

_DONE = 1 << 32  # added to the CRC-32 of a finished chunk, so that none is 0


class EmbeddingStore:
    """Rows [rows, dim] in `dtype` (float32 or float16) of what `key` (JSON) describes; opened, or begun if not there.

    Raises InputError if the folder holds the embeddings of something else: nothing is mixed and nothing deleted.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], rows: int, dim: int, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype {dtype} is neither float32 nor float16")
        self.folder = Path(folder)
        self.rows, self.dim, self.dtype = rows, dim, np.dtype(dtype)
        self.chunks = -(-rows // CHUNK)
        self.key = json.loads(json.dumps(key | {"rows": rows, "dim": dim, "dtype": dtype, "chunk": CHUNK}))
        self.folder.mkdir(parents=True, exist_ok=True)
        with utils.locked(self.folder / ".lock"):
            self._open_or_begin()

    def _open_or_begin(self) -> None:
        path = self.folder / KEY
        other: Exception | None = None
        try:
            found = utils.read_json(path)
        except FileNotFoundError:
            found = None
        except ValueError as error:
            found, other = {}, error
        if other is not None or not isinstance(found, dict | None):
            raise InputError(f"{path}: not a record of embeddings; remove it or give another folder") from other
        if found is not None and found != self.key:
            names = [name for name in {**found, **self.key} if found.get(name) != self.key.get(name)]
            changes = ", ".join(f"{name} was {found.get(name)} and is now {self.key.get(name)}" for name in names)
            raise InputError(f"{self.folder}: holds embeddings of something else ({changes}); give another folder")
        if found is None and (self.folder / EMBEDDINGS).exists():
            raise InputError(f"{self.folder / EMBEDDINGS}: exists, but no record of what it is; give another folder")
        if found is None or not self._whole():
            # The key first: with it alone a killed process, or a full disk, leaves what is begun once more.
            utils.write_json(path, self.key)
            utils.write_bytes(self.folder / CHECKSUMS, bytes(8 * self.chunks))
            with utils.atomic_path(self.folder / EMBEDDINGS) as temporary:
                np.lib.format.open_memmap(temporary, "w+", self.dtype, (self.rows, self.dim)).flush()

    def _whole(self) -> bool:
        """Whether both files are there in their full sizes."""
        try:
            same = self._map().shape == (self.rows, self.dim)
            return same and (self.folder / CHECKSUMS).stat().st_size == 8 * self.chunks
        except (OSError, ValueError):
            return False

    def _map(self) -> np.memmap:
        return np.lib.format.open_memmap(self.folder / EMBEDDINGS, "r")

    def _checksums(self) -> np.ndarray:
        return np.fromfile(self.folder / CHECKSUMS, "<u8")

    def numbers(self, chunk: int) -> range:
        """The crops of a chunk, by their numbers in the list."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.rows))

    def missing(self, index: int = 0, count: int = 1) -> list[int]:
        """The chunks among `index`, `index` + `count`, ... that are to be computed. Reads, and checks, the others."""
        mine = range(index, self.chunks, count)
        written, values = self._checksums(), self._map()
        if not written[index::count].any():
            return list(mine)
        absent = []
        with utils.progress(len(mine), f"checking {self.folder}", unit="chunk") as bar:
            for chunk in mine:
                numbers = self.numbers(chunk)
                if int(written[chunk]) != self._checksum(values[numbers.start : numbers.stop]):
                    absent.append(chunk)
                bar.update()
        return absent

    @staticmethod
    def _checksum(values: np.ndarray) -> int:
        return _DONE + zlib.crc32(np.ascontiguousarray(values).data)

    def save(self, chunk: int, values: np.ndarray) -> None:
        """Write the rows [n, dim] of a chunk."""
        numbers = self.numbers(chunk)
        if values.shape != (len(numbers), self.dim):
            raise ValueError(f"chunk {chunk} has {len(numbers)} rows of {self.dim}, not {values.shape}")
        values = np.ascontiguousarray(values, self.dtype)
        # Not through the map: a full disk would end the process without a word.
        with open(self.folder / EMBEDDINGS, "r+b") as file:
            file.seek(self._map().offset + numbers.start * self.dim * self.dtype.itemsize)
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())
        with open(self.folder / CHECKSUMS, "r+b") as file:
            file.seek(8 * chunk)
            file.write(self._checksum(values).to_bytes(8, "little"))

    def fill(self, chunks: Sequence[int], embed: Callable[[range], np.ndarray], what: str) -> None:
        """Compute these chunks; `embed` gives the rows [n, dim] of some crops, by their numbers."""
        with utils.progress(sum(len(self.numbers(chunk)) for chunk in chunks), what, unit="crop") as bar:
            for chunk in chunks:
                self.save(chunk, embed(self.numbers(chunk)))
                bar.update(len(self.numbers(chunk)))

    def values(self) -> np.ndarray:
        """All rows [rows, dim], mapped and not to be written to. Raises InputError if some are not computed yet."""
        absent = np.flatnonzero(self._checksums() == 0)
        if len(absent):
            raise InputError(f"{self.folder}: {len(absent)} of {self.chunks} chunks of embeddings are not computed")
        return self._map()
