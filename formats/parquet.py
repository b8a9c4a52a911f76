"""Parquet as Hugging Face's hub writes image data sets: a column `image` (encoded bytes and a path) and a `label`.

pyarrow reads it, which is not required otherwise: `pip install pyarrow`. The names of the labels, where there are some,
stand in the schema's metadata under `huggingface` (the datasets library, `features.ClassLabel`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from formats.names import is_nobodys, label_text
from utils import InputError

MAGIC = b"PAR1"
IMAGE_COLUMNS = ("image", "img", "jpg")
LABEL_COLUMNS = ("label", "identity", "class", "fine_label", "id")
_BATCH = 32  # rows in memory at a time


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class Row:
    """One image: its encoded bytes, its label as text, its file name; None or "" for what a row lacks."""

    data: bytes | None
    label: str | None
    file: str


class Table:
    """A file, open only while it is read; `rows` is their number."""

    def __init__(self, path: Path, rows: int, image: str, label: str, names: list[str]) -> None:
        self.path, self.rows = path, rows
        self._image, self._label, self._names = image, label, names

    def read(self) -> Iterator[Row]:
        """The rows in their order; `ValueError` where the file is damaged."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_BATCH, columns=[self._image, self._label]):
                    images, labels = batch.column(self._image).to_pylist(), batch.column(self._label).to_pylist()
                    for image, label in zip(images, labels, strict=True):
                        yield self._row(image, label)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"damaged: {str(error).splitlines()[0]}") from error

    def _row(self, image: Any, label: Any) -> Row:
        data = image.get("bytes") if isinstance(image, dict) else image
        file = image.get("path") if isinstance(image, dict) else ""
        text = label_text(label)
        if is_nobodys(text):
            text = ""
        if isinstance(label, int) and 0 <= label < len(self._names):
            text = self._names[label]
        name = Path(str(file or "").replace("\\", "/")).name
        return Row(data if isinstance(data, bytes) else None, text or None, name)


def open_table(path: Path) -> Table:
    """Open a file; `InputError` without pyarrow, for damage, and for a table without images or labels."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet: {str(error).splitlines()[0]}") from error
    columns = schema.names
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        what = "images (image)" if image is None else "labels (label)"
        raise InputError(f"{path}: no column of {what}; it has {', '.join(columns)[:200]}")
    twice = next((name for name in (image, label) if columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: has the column {twice} {columns.count(twice)} times")
    return Table(path, rows, image, label, _label_names(schema.metadata, label))


def _label_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str]:
    try:
        features = utils.parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
