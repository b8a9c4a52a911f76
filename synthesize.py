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

import passive_threads  # noqa: F401  # isort: skip

import sys

import config
import synthetic
import utils
from options import parse
from processes import Shard
from utils import InputError


@utils.command
def main() -> None:
    """Read the options, make what is missing, merge."""
    options = parse(config.Synthesize, __doc__)
    with synthetic.needed():
        from synthetic import dataset
        from synthetic.parameters import ABLATIONS

    if options.crops and options.layout != "photos":
        raise InputError(f"--layout {options.layout}: is of photos, --crops writes none")
    shard = Shard.parse(options.shard)
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
        looks=options.looks,
    )
    if plan.layout == "lfw":
        dataset.pairs_text(plan)  # impossible numbers are refused before the work, not after it
    device = utils.own_device(options.device)
    people = dataset.People(options.out, plan)
    if not people.open(dataset.outputs(plan)):
        missing = dataset.make_people(people, shard, device, dataset.worker_processes(device, options.workers))
        if missing:
            print(f"shard {shard} is done; {len(missing)} of {plan.identities} identities are left to other shards")
            return
        dataset.merge(people)
    kind = "crops" if plan.crops else "photos"
    print(f"{options.out}: {plan.identities} identities, {plan.identities * plan.images} {kind}, truth.tsv")


if __name__ == "__main__":
    sys.exit(main())
