"""Stage 5, distractors: the photos of MegaFace -> one aligned 112x112 crop each.

    python align_megaface.py --src megaface/MegaFace --dst megaface/MegaFace_aligned
    python align_megaface.py --src megaface/MegaFace --dst megaface/MegaFace_aligned --shard 3/16
    torchrun --nproc-per-node 8 align_megaface.py --src megaface/MegaFace --dst megaface/MegaFace_aligned

Each crop has the relative name of its photo. A photo shows the face with the best score; one without a face gives the
largest square in its middle, marked `centre_crop` in DST/faces.tsv; one that cannot be read gives no crop and a row
that says why. A killed run goes on when it is started again.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from typing import cast

import config
import utils
from cropping.align import Rule
from cropping.crop_tree import check_folders, crop_tree
from cropping.faces import FaceFinder, Photo, detector_settings, open_detector
from cropping.photos import list_photos
from options import parse


@utils.command
def main() -> None:
    options = parse(config.AlignMegaface, __doc__)
    check_folders(options.src, options.dst, options.jpeg_quality)
    listing = list_photos(options.src)
    crop_tree(
        options,
        "align_megaface",
        len(listing.files),
        lambda number: Photo(options.src / listing.files[number], listing.files[number]),
        lambda: FaceFinder(open_detector(options), cast("Rule", options.rule), fallback=True),
        listing,
        {**detector_settings(options), "rule": options.rule},
        {},
    )


if __name__ == "__main__":
    sys.exit(main())
