"""What a teacher is worth to a small network, at equal steps: without it, beside the margin loss, and alone.

    python benchmarks/distillation.py faces_large --teacher model.onnx --val lfw dev_pairs.bin --out results/teacher
    python benchmarks/distillation.py faces_large --teacher model.onnx --val lfw --out results/teacher -- --epochs 2

The student is mfn_half, a quarter of mfn's arithmetic. Everything but the teacher is alike. The teacher's embeddings
are computed once and shared; it is measured itself on the same sets first. Options of train.py after -- replace those
of the recipe. Killed, the same command goes on. Writes distillation.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import trials
from config import Train
from options import parse
from training.distillation import open_teacher
from verification import features
from verification.sets import open_set

RECIPE = ["--network", "mfn_half", "--embedding-size", "128", *trials.SMALL_SET]


@utils.command
def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher", required=True)
    for name in ("mean", "std"):
        parser.add_argument(f"--teacher-{name}", type=float, nargs="+", metavar="X", help="where its file does not say")
    parser.add_argument("--teacher-channels", choices=("rgb", "bgr"), help="the same")
    parser.add_argument("--val", type=Path, nargs="+", required=True)
    parser.add_argument("--weights", type=float, nargs="+", default=[10.0], metavar="W", help="of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options, more = trials.parse(parser)
    sets = [open_set(path, options.out / "sets") for path in options.val]
    taught = ["--teacher", options.teacher, "--teacher-embeddings", str(options.out / "embeddings")]
    for name in ("mean", "std"):
        if numbers := getattr(options, f"teacher_{name}"):
            taught += [f"--teacher-{name}", *map(str, numbers)]
    if options.teacher_channels:
        taught += ["--teacher-channels", options.teacher_channels]
    teacher = open_teacher(parse(Train, argv=["--data", str(options.data), "--out", str(options.out), *taught]), "cpu")
    cache = options.out / "cache"
    own = {pairs.name: features.verify(teacher, pairs, cache_dir=cache).accuracy for pairs in sets}
    common = [*RECIPE, "--data", str(options.data), "--seed", str(options.seed)]
    common += ["--val", *map(str, options.val), *more]
    ways: dict[str, list[str]] = {"without a teacher": []}
    ways |= {f"teacher, weight {weight:g}": [*taught, "--teacher-weight", str(weight)] for weight in options.weights}
    ways["teacher alone"] = [*taught, "--loss", "none"]
    rows = [{"trial": "the teacher itself", "options": [], "last": own, "best": own}]
    for name, arguments in ways.items():
        rows += trials.run({name: arguments}, common, options.out, options.processes)
        trials.write(options.out / "distillation.json", __doc__.splitlines()[0], common, rows)
    print(trials.table(rows))


if __name__ == "__main__":
    sys.exit(main())
