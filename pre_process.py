"""Stage 2: photos -> faces -> aligned 112x112 crops in RecordIO, ready for train.py.

    python pre_process.py --photos data/raw --out data/crops
    python pre_process.py --photos data/raw --out data/crops --shard 3/16      # on each of 16 machines, common folder
    torchrun --nproc-per-node 8 pre_process.py --photos data/raw --out data/crops
    python pre_process.py --photos data/raw --out data/crops96 --jpeg-quality 96 --from-detections data/crops/faces.tsv

PHOTOS holds one folder per identity, as extract.py leaves it. In OUT:

    train.rec, train.idx, property   the crops in the InsightFace layout; labels ascend with the identities' names
    faces.tsv        one row per photo: what became of it, why, and the box, landmarks and score of its face
    identities.tsv   label, identity, number of crops; an identity without a crop has no label
    report.json      the counts, the settings, and the identities without a crop; written last

A killed run goes on when it is started again, and every way of cutting the work (workers, shards, restarts) gives the
same bytes on the same kind of machine. Settings or photos that differ from those of the run in OUT are an error.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import config
import utils
from cropping.align import Rule
from cropping.chunks import MADE_BY, Chunks, Tally, Work, describe, process, waiting_for
from cropping.faces import FaceFinder, Photo, Turn, detector_settings, encode_jpeg, made_by, open_detector, realign
from cropping.photos import Listing, identity_of, in_order, list_photos, note_on_depth
from formats.crop_sets import CropWriter
from formats.tables import NO_CROP, FaceRow, FaceTable, row_text, table_text, write_identities
from options import parse
from processes import Shard
from utils import InputError

OUTPUTS = ("train.rec", "train.idx", "property", "faces.tsv", "identities.tsv")

NAMED = 10  # identities that the summary names; the report names all

NO_IDENTITY = "no identity: not in the folder of an identity"
NOT_DETECTED = "not in the detections"


def list_input(folder: Path) -> Listing:
    """The photos below an input folder; `InputError` if it is something else, with what to do about it."""
    if (folder / "train.rec").is_file() or folder.suffix == ".rec":
        data = folder.parent if folder.suffix == ".rec" else folder
        raise InputError(
            f"{folder}: is RecordIO of aligned crops already and needs no pre-processing: python train.py --data {data}"
        )
    if folder.is_file():
        raise InputError(f"{folder}: is a file; python extract.py {folder} --out data/raw makes a folder of photos")
    listing = list_photos(folder)
    if not any(map(identity_of, listing.files)):
        raise InputError(f"{folder}: holds photos but no folders of identities (expected {folder}/IDENTITY/PHOTO)")
    if note := note_on_depth(listing.files):
        if len({identity_of(file) for file in listing.files} - {""}) == 1:  # a folder around all people
            raise InputError(f"{folder}: {note}")
        print(f"note: {folder}: {note}", file=sys.stderr)
    return listing


def photo_at(folder: Path, file: str) -> Photo:
    """The photo of a relative path."""
    return Photo(folder / file, file, identity_of(file))


def detecting(options: config.PreProcess, files: Sequence[str]) -> Work:
    """What finds, chooses and aligns the faces of a window of photos."""
    finder = FaceFinder(
        open_detector(options),
        cast("Rule", options.rule),
        min_side=options.min_side,
        min_face=options.min_face,
        turn=cast("Turn", options.turn),
        reduce_to=options.max_side if options.reduced else None,
    )

    def work(numbers: Sequence[int]) -> list[tuple[FaceRow, bytes | None]]:
        photos = [photo_at(options.photos, files[number]) for number in numbers]
        inside = iter(finder([photo for photo in photos if photo.identity]))
        results = [next(inside) if photo.identity else (_outside(photo), None) for photo in photos]
        return [(row, encode_jpeg(crop, options.jpeg_quality)) for row, crop in results]

    return work


def _outside(photo: Photo) -> FaceRow:
    return FaceRow(photo.identity, photo.file, NO_CROP, NO_IDENTITY)


def realigning(options: config.PreProcess, files: Sequence[str], table: FaceTable) -> Work:
    """What aligns the faces of a window of photos as the rows of an earlier run say."""

    def align(file: str) -> tuple[FaceRow, bytes | None]:
        photo = photo_at(options.photos, file)
        row = table.get(file)
        if not photo.identity:
            return _outside(photo), None
        if row is None:
            return FaceRow(photo.identity, file, NO_CROP, NOT_DETECTED), None
        row, crop = realign(
            photo,
            replace(row, identity=photo.identity),
            min_side=options.min_side,
            min_face=options.min_face,
            reduce_to=options.max_side if options.reduced else None,
        )
        return row, encode_jpeg(crop, options.jpeg_quality)

    return lambda numbers: [align(files[number]) for number in numbers]


def check(options: config.PreProcess) -> None:
    """Refuse values that make no sense and options that would have no effect."""
    if options.reduced and not options.max_side:
        raise InputError("--reduced: has no effect with --max-side 0, which looks for faces in all pixels")
    if options.from_detections is None:
        return
    for field in fields(options):
        if field.metadata["group"] == "detector" and getattr(options, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise InputError(f"--{name}: has no effect with --from-detections, where the faces are chosen already")
    if _stage_of(options.from_detections) == "align_facescrub":
        raise InputError(
            f"--from-detections {options.from_detections}: is of align_facescrub.py, which looks at photos as they are "
            "stored, not as EXIF turns them; detect anew, without this option"
        )


def _stage_of(table: Path) -> Any:
    """The stage that the report beside a table of faces is of, None without one."""
    report = table.with_name("report.json")
    try:
        return utils.read_json(report)["settings"]["stage"] if report.is_file() else None
    except (ValueError, KeyError, TypeError):  # of something else
        return None


def settings_of(options: config.PreProcess, listing: Listing) -> dict[str, Any]:
    """Everything that the result depends on."""
    if options.from_detections is None:
        search = {**detector_settings(options), "rule": options.rule, "turn": options.turn}
    else:
        search = {"detections": utils.sha256_of(options.from_detections)}
    return {
        "stage": "pre_process",
        "photos": str(listing),
        **search,
        "min_side": options.min_side,
        "min_face": options.min_face,
        "jpeg_quality": options.jpeg_quality,
        **({"reduced": True} if options.reduced else {}),
        MADE_BY: made_by(),
    }


def merge(chunks: Chunks, out: Path, companions: dict[str, int]) -> dict[str, Any]:
    """Write the output files from all chunks; returns the report.

    The photos come in the order of their identities, so an identity gets its label with its first crop.
    """
    tally = Tally()
    crops: dict[str, int] = {}
    with CropWriter(out) as writer:
        with (
            utils.atomic_path(out / "faces.tsv") as path,
            open(path, "wb") as table,
            utils.progress(chunks.items, "merging", unit="photo") as bar,
        ):
            table.write(table_text([]))
            label = -1
            for row, crop in chunks.results():
                tally.add(row)
                table.write(row_text(row))
                bar.update()
                if row.identity:
                    crops.setdefault(row.identity, 0)
                if crop is not None:
                    label += crops[row.identity] == 0
                    crops[row.identity] += 1
                    writer.write(crop, label)
        if label < 0:
            raise InputError(
                f"{out / 'faces.tsv'}: not one of {tally.photos} photos gave a crop; the reasons are there"
            )
    labelled = [identity for identity, count in crops.items() if count]
    write_identities(out / "identities.tsv", labelled, [crops[identity] for identity in labelled])
    without = [identity for identity, count in crops.items() if not count]
    return {**tally.report(), "identities": len(labelled), "identities_without_crop": without, "companions": companions}


def summary(report: dict[str, Any]) -> str:
    """The report as lines for the user."""
    without = report["identities_without_crop"]
    lines = [describe(report), f"{report['identities']:>10,} identities with a label"]
    if without:
        named = ", ".join(without[:NAMED]) + (f" and {len(without) - NAMED} more" if len(without) > NAMED else "")
        lines.append(f"{len(without):>10,} identities without a crop, so without a label: {named}")
    return "\n".join(lines)


@utils.command
def main() -> None:
    options = parse(config.PreProcess, __doc__)
    check(options)
    shard = Shard.parse(options.shard)
    workers = utils.worker_count(options.workers)
    listing = list_input(options.photos)
    table = None if options.from_detections is None else FaceTable(options.from_detections)
    files = listing.files if table is None else in_order({*listing.files, *table})
    settings = settings_of(options, listing)
    chunks = Chunks(options.out, len(files), settings, folder=options.photos, stamp=listing.stamp)
    if not chunks.open(OUTPUTS):

        def prepare() -> Work:
            return detecting(options, files) if table is None else realigning(options, files, table)

        missing = process(
            chunks, shard, prepare, lambda number: options.photos / files[number], workers, f"pre_process {shard}"
        )
        if missing:
            print(waiting_for(shard, missing))
            return
        with chunks.merging() as mine:
            if mine:
                chunks.finish(merge(chunks, options.out, listing.companions))
    print(summary(chunks.report()))
    print(f"{options.out}: train.rec, train.idx, property, faces.tsv, identities.tsv, report.json")


if __name__ == "__main__":
    sys.exit(main())
