"""Stage 5, probes: the photos of FaceScrub and the annotated boxes -> one aligned 112x112 crop each.

    python align_facescrub.py --src megaface/FaceScrub --dst megaface/FaceScrub_aligned \\
        --annotations megaface/facescrub_actors.txt megaface/facescrub_actresses.txt

A photo NAME/NAME_FACEID.EXT belongs to the annotation of that name and face_id, whatever its extension. Its crop has
the same relative name and shows the face that overlaps the annotated box. Where none does, the surroundings of the box
are searched again, enlarged and turned; the last resort is a crop from the box, marked `box_crop` in DST/faces.tsv, or
without a usable box from the middle, `centre_crop`. Photos without an annotation give their central face; annotations
without a photo and photos that cannot be read have a row without a crop. Lines that are no annotations are listed in
DST/report.json. A killed run goes on when it is started again; --shard and torchrun share the work.
"""

import passive_threads  # noqa: F401  # isort: skip

import contextlib
import sys
from pathlib import Path

import config
import utils
from cropping.crop_tree import check_folders, crop_tree
from cropping.faces import FaceFinder, Photo, detector_settings, open_detector
from cropping.photos import in_order, list_photos
from megaface.facescrub import Annotation, Annotations, file_key, read_annotations
from options import parse

NAMED = 5  # problems that are printed; report.json has all


def combine(files: list[str], annotations: Annotations) -> dict[str, Annotation | None]:
    """Every photo on disk with its annotation, if any, and every annotation without a photo, by relative name."""
    known = {file: annotations.faces.get(key) if (key := file_key(file)) else None for file in files}
    with_photo = {face.key for face in known.values() if face is not None}
    absent = {face.file: face for key, face in annotations.faces.items() if key not in with_photo}
    both = known | absent
    return {file: both[file] for file in in_order(both)}


def photo_of(src: Path, file: str, face: Annotation | None) -> Photo:
    """A photo with the box to look in, and what there is to remark about its annotation."""
    path = src / file
    if face is None:
        return Photo(path, file, Path(file).parent.name, note="no annotation")
    remarks = []
    with contextlib.suppress(OSError):  # whoever reads the photo will say why that cannot be done
        if face.sha256 and path.is_file() and utils.sha256_of(path) != face.sha256:
            remarks.append("not the annotated file: another sha256")
    if face.box is None:
        remarks.append(f"no usable box: {face.box_problem}")
    return Photo(path, file, face.name, face.box, "; ".join(remarks))


@utils.command
def main() -> None:
    options = parse(config.AlignFacescrub, __doc__)
    check_folders(options.src, options.dst, options.jpeg_quality)
    annotations = read_annotations(options.annotations)
    for problem in annotations.problems[:NAMED]:
        print(f"not an annotation: {problem}", file=sys.stderr)
    if len(annotations.problems) > NAMED:
        print(f"and {len(annotations.problems) - NAMED} more lines, all in report.json", file=sys.stderr)
    listing = list_photos(options.src)
    photos = list(combine(listing.files, annotations).items())
    crop_tree(
        options,
        "align_facescrub",
        len(photos),
        lambda number: photo_of(options.src, *photos[number]),
        # The boxes refer to the pixels as stored, so orientations are not applied.
        lambda: FaceFinder(
            open_detector(options), min_overlap=options.min_overlap, retry=True, fallback=True, orient=False
        ),
        listing,
        {
            "annotations": [utils.sha256_of(path) for path in options.annotations],
            **detector_settings(options),
            "min_overlap": options.min_overlap,
        },
        {"not_annotations": annotations.problems},
    )


if __name__ == "__main__":
    sys.exit(main())
