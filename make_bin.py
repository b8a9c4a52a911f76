"""A folder of photos and a list of pairs become a .bin, InsightFace's file of pairs, which every tool here reads.

    python make_bin.py --photos data/people --pairs pairs.csv --out people.bin
    python make_bin.py --photos data/crops --pairs pairs.txt --out people.bin --aligned
    python lfw_eval.py --checkpoint runs/NAME/embedding.pt --bin people.bin --out data/eval

Faces are found and aligned as lfw_eval.py does; with --aligned the photos are crops already, and their files go into
the .bin as they are. Lists are of any kind that lfw_eval.py --pairs reads. The order of the pairs is kept, so that the
folds that readers cut are those of the list if it has ten of one length. Beside FILE.bin lies FILE.bin.json: what it
was made from, with hashes.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from pathlib import Path
from typing import cast

import numpy as np

import config
import utils
from cropping.align import Rule
from cropping.crop_tree import encode_as_named
from formats.verification_bin import write_bin
from options import parse
from utils import InputError
from verification.sets import VerificationSet, open_set


@utils.command
def main() -> None:
    """Read the options, open the pairs, write the file."""
    options = parse(config.MakeBin, __doc__)
    if not options.photos.is_dir():
        raise InputError(f"--photos {options.photos}: no such folder")
    if options.out.is_file() and utils.image_suffix(options.out.read_bytes()[:4096]) is not None:
        raise InputError(f"--out {options.out}: is an image; give another file")
    pairs = open_set(
        options.photos,
        options.cache,
        pairs=options.pairs,
        aligned=options.aligned,
        rule=cast("Rule", options.rule),
        detector_weights=options.detector_weights,
        max_side=options.max_side or None,
        device=utils.choose_device(options.device),
        workers=options.workers,
    )
    kept = ~pairs.missing_pairs()
    if not kept.all() and not options.skip_missing:
        first = pairs.missing[min(pairs.missing)]
        raise InputError(
            f"{options.photos}: {len(pairs.missing)} photos give no crop, the first is "
            f"{pairs.names[min(pairs.missing)]} ({first}); --skip-missing leaves their {(~kept).sum()} pairs out"
        )
    if not kept.any():
        raise InputError(f"{options.photos}: no pair of which both photos give a crop")
    images = [crop_bytes(pairs, index, options.aligned) for index in pairs.pairs[kept].ravel()]
    write_bin(options.out, images, pairs.same[kept])
    record = {
        "bin_sha256": utils.sha256_of(options.out),
        "pairs": int(kept.sum()),
        "genuine_pairs": int(pairs.same[kept].sum()),
        "aligned": options.aligned,
        "source": pairs.source,
        "left_out": [
            {"pair": int(index), "photos": [pairs.names[photo] for photo in pairs.pairs[index]]}
            for index in np.flatnonzero(~kept)
        ],
        "reasons": {pairs.names[photo]: reason for photo, reason in sorted(pairs.missing.items())},
        "notes": pairs.notes,
    }
    utils.write_json(Path(f"{options.out}.json"), record)
    for note in pairs.notes:
        print(note)
    print(f"{options.out}: {kept.sum()} pairs ({pairs.same[kept].sum()} of one person), {(~kept).sum()} left out")


def crop_bytes(pairs: VerificationSet, index: int, aligned: bool) -> bytes:
    """An encoded crop: the file itself where it is one, PNG (without loss) where it was aligned here."""
    if aligned and pairs.photos is not None:
        data = utils.read_bytes(pairs.photos[index])
        if utils.image_suffix(data) is not None:
            return data
    return encode_as_named("crop.png", pairs.crops[index][..., ::-1], 100)


if __name__ == "__main__":
    sys.exit(main())
