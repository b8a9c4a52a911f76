"""What wrong labels cost, and what --filter and --sub-centres win back.

    python benchmarks/label_noise.py faces_large --val lfw dev_pairs.bin --out results/noise
    python benchmarks/label_noise.py faces_large --val lfw --out results/noise -- --epochs 2 --network mfn

Trains on the set as it is and with 10 % and 30 % of its labels exchanged (make_noisy.py): plain, with --filter 0.4,
and with --sub-centres 3, everything else alike. Options of train.py after -- replace those of the recipe. Killed, the
same command goes on. Writes label_noise.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules of this folder

import trials
from make_noisy import make

import utils

RECIPE = (
    "--network mfn --embedding-size 256 --augment strong --batch-size 64 --epochs 8 --schedule cosine --lr 0.1 "
    "--warmup 1 --margin 0.4 --margin-warmup 3 --scale 32 --val-every 4"
).split()
WAYS = {"plain": [], "filter": ["--filter", "0.4"], "sub-centres": ["--sub-centres", "3"]}


@utils.command
def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--val", type=Path, nargs="+", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.3], metavar="SHARE")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the training")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options, more = trials.parse(parser)
    common = [*RECIPE, "--seed", str(options.seed), "--val", *map(str, options.val), *more]
    rows = []
    for share in options.shares:
        data = options.data
        if share > 0:
            data = options.out / f"noise-{share:g}"
            make(options.data, data, share, options.seed)
        ways = {f"{share:.0%} exchanged, {way}": WAYS[way] for way in options.ways}
        found = trials.run(
            {name: ["--data", str(data), *own] for name, own in ways.items()}, common, options.out, options.processes
        )
        rows += [row | {"share": share} for row in found]
        trials.write(options.out / "label_noise.json", __doc__.splitlines()[0], common, rows)
    print(trials.table(rows))


if __name__ == "__main__":
    sys.exit(main())
