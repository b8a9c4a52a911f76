"""A tree of photos to a tree of crops: one crop per photo under the photo's own relative name.

Shared by align_megaface.py and align_facescrub.py, which differ in what they know of a photo and not in how the work is
cut, continued and reported. The crops are files of their own, written by the workers as they come; a chunk counts as
finished only after all its crops are written, so what a kill interrupts is written again. Price: the last crops before
a power cut (not a kill) may be empty; that is noticed at the end.

What is in a file is what its name says: JPEG, PNG, BMP, TIFF or WebP (all but JPEG lossless). Under any other name, or
one without an extension, it is PNG; every reader of images here goes by the content.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

import config
import utils
from cropping.chunks import MADE_BY, Chunks, Tally, Work, describe, process, waiting_for
from cropping.faces import FaceFinder, Photo, encode_jpeg, made_by
from cropping.photos import Listing
from formats.tables import NO_CROP, FaceRow, read_faces, row_text, table_text
from processes import Shard
from utils import InputError

JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif")
LOSSLESS_NAMES = (".png", ".bmp", ".tif", ".tiff", ".webp")


def encode_as_named(file: str, crop: NDArray[np.uint8], quality: int) -> bytes:
    """A crop BGR uint8 in the format that a file name asks for; `quality` is that of JPEG."""
    suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122
    if suffix in JPEG_NAMES:
        return encode_jpeg(crop, quality)
    # Quality 101 is OpenCV's word for lossless WebP.
    settings = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    return cv2.imencode(suffix if suffix in LOSSLESS_NAMES else ".png", crop, settings)[1].tobytes()


def write_crop(path: Path, data: bytes) -> None:
    """Write a crop's file so that nobody sees half of it; a restart overwrites what a kill left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def cropping(finder: FaceFinder, photo_at: Callable[[int], Photo], dst: Path, quality: int) -> Work:
    """What turns a window of photos into files below `dst` and rows."""

    def work(numbers: Sequence[int]) -> list[tuple[FaceRow, bytes | None]]:
        results = finder([photo_at(number) for number in numbers])
        for row, crop in results:
            if crop is not None:
                write_crop(dst / row.file, encode_as_named(row.file, crop, quality))
        return [(row, None) for row, _ in results]

    return work


def check_folders(src: Path, dst: Path, quality: int) -> None:
    """Refuse a target that would overwrite the photos or be read as photos, and a quality that is none."""
    if dst.resolve().is_relative_to(src.resolve()) or src.resolve().is_relative_to(dst.resolve()):
        raise InputError(f"--dst {dst}: must lie outside of --src {src}, where crops and photos would be mixed up")
    if not 1 <= quality <= 100:
        raise InputError(f"--jpeg-quality {quality}: must lie between 1 and 100")


def check_crops(dst: Path, rows: Iterable[FaceRow]) -> None:
    """`InputError` if a crop that the rows speak of is not there or empty."""
    gone = [row.file for row in rows if row.status != NO_CROP and not _has_bytes(dst / row.file)]
    if gone:
        raise InputError(
            f"{dst / gone[0]}: this crop is missing or empty ({len(gone)} in all); bring the crops of all shards "
            f"together, or remove {dst} and start over"
        )


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def crop_tree(
    options: config.AlignMegaface | config.AlignFacescrub,
    name: str,
    count: int,
    photo_at: Callable[[int], Photo],
    prepare: Callable[[], FaceFinder],
    listing: Listing,
    settings: dict[str, Any],
    report: dict[str, Any],
) -> None:
    """Do a shard's part of `count` photos, merge if it was the last, and print what became of them.

    `listing` is of the photos below `options.src`; `settings` is everything else that the result depends on besides the
    shared options; `report` is added to report.json.
    """
    shard = Shard.parse(options.shard)
    settings = {"stage": name, "photos": str(listing), **settings, "jpeg_quality": options.jpeg_quality}
    settings[MADE_BY] = made_by()
    report = {"companions": listing.companions, **report}
    chunks = Chunks(options.dst, count, settings, folder=options.src, stamp=listing.stamp)
    if chunks.open(["faces.tsv"]):
        check_crops(options.dst, read_faces(options.dst / "faces.tsv"))
    else:
        missing = process(
            chunks,
            shard,
            lambda: cropping(prepare(), photo_at, options.dst, options.jpeg_quality),
            lambda number: photo_at(number).path,
            utils.worker_count(options.workers),
            f"{name} {shard}",
        )
        if missing:
            print(waiting_for(shard, missing))
            return
        with chunks.merging() as mine:
            if mine:
                check_crops(options.dst, (row for row, _ in chunks.results(crops=False)))
                chunks.finish({**write_table(chunks, options.dst), **report})
    print(describe(chunks.report()))
    print(f"{options.dst}: the crops, faces.tsv, report.json")


def write_table(chunks: Chunks, dst: Path) -> dict[str, Any]:
    """Write faces.tsv from all chunks; returns the counts."""
    tally = Tally()
    with utils.atomic_path(dst / "faces.tsv") as path, open(path, "wb") as table:
        table.write(table_text([]))
        for row, _ in chunks.results(crops=False):
            tally.add(row)
            table.write(row_text(row))
    return tally.report()
