"""What is a network worth that has seen other people? A few identities, from nothing and from such a network.

    python benchmarks/trial_finetune.py --data faces_large --lfw lfw --bin dev_pairs.bin --scratch /tmp/tuning
    python benchmarks/trial_finetune.py --data faces_large --lfw lfw --bin dev_pairs.bin --scratch /tmp/tuning \
        --synthetic 1200 --base-epochs 10                                   # the base has seen nobody real
    python benchmarks/trial_finetune.py --data faces_large --lfw lfw --scratch /tmp/tuning --base model.pt

The identities of --data are split by a seeded draw: --share of them are the few people that somebody has, the others
are what the base network is trained on (or, with --synthetic, people who do not exist). Then, at equal steps on the
few: from nothing; from the base with random centres; from the base with mean centres. Each is measured on --lfw and
--bin. All runs use the one recipe below, tuned runs a lower rate for the network (--tuned-lr) and --lr for the head.

Everything lies in --scratch: the same command goes on where it was stopped, and prints the table in the end. The few
are 1,480 crops of 131 people of `faces_large`; with --epochs 10 a run takes 7 CPU minutes.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats import crop_sets

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "--network mfn --augment strong --batch-size 64 --schedule cosine --margin 0.4 --scale 32".split()


def run(*command):
    """A script of the repository, to its end."""
    words = [sys.executable, *map(str, command)]
    print("$ python " + " ".join(words[1:]), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def split(data, scratch, share, seed):
    """Two crop sets, `few` and `rest`, of different identities; returns their folders."""
    crops = crop_sets.open_training_set(data)
    order = np.random.default_rng(seed).permutation(crops.identities)
    count = max(2, round(share * crops.identities))
    folders = []
    for name, chosen in (("few", order[:count]), ("rest", order[count:])):
        folder = scratch / name
        folders.append(folder)
        if folder.exists():
            continue
        unfinished = scratch / f"{name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        label_of = {int(identity): label for label, identity in enumerate(np.sort(chosen))}
        order_of_crops = np.argsort(crops.labels, kind="stable").tolist()
        records = (crops.read(index) for index in order_of_crops if int(crops.labels[index]) in label_of)
        written = crop_sets.write_crops(unfinished, ((payload, label_of[label]) for payload, label in records))
        print(f"{name}: {written} crops of {len(label_of)} identities", flush=True)
        unfinished.rename(folder)
    return folders


def synthetic(scratch, people):
    """Crops of people who do not exist, ten of each; synthesize.py goes on by itself."""
    folder = scratch / f"synthetic-{people}"
    run("synthesize.py", "--identities", people, "--images", 10, "--crops", "--out", folder)
    return folder


def train(options, name, data, epochs, lr, *extra):
    """One run to its end, at once if it is finished; returns its embedding.pt."""
    out = options.scratch / name
    size = ["--embedding-size", options.embedding_size]
    line = ["--data", data, "--out", out, "--epochs", epochs, "--lr", lr, "--warmup", min(1, epochs / 4), "--resume"]
    run("train.py", *line, *RECIPE, *size, *(["--amp"] if options.amp else []), *extra)
    return out / "embedding.pt"


def measure(options, checkpoint):
    """{set: (accuracy, its standard error, AUC)} of a network."""
    out = options.scratch / f"eval-{checkpoint.parent.name}"
    line = ["--checkpoint", checkpoint, "--out", out, "--cache", options.scratch / "cache"]
    if options.lfw:
        line += ["--lfw", options.lfw]
    if options.bin:
        line += ["--bin", *options.bin]
    if not (out / "results.json").exists():
        run("lfw_eval.py", *line)
    sets = json.loads((out / "results.json").read_text())["sets"]
    found = {}
    for entry in sets:
        accuracy, pairs = entry["accuracy_kfold_mean"], entry["pairs"]
        found[entry["name"]] = (accuracy, (accuracy * (1 - accuracy) / pairs) ** 0.5, entry["auc"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="crops as train.py takes them")
    parser.add_argument("--lfw", type=Path, help="photos with pairs.txt to measure on")
    parser.add_argument("--bin", type=Path, nargs="+", help="sets of pairs to measure on")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--share", type=float, default=0.1, help="of the identities that are the few")
    parser.add_argument("--synthetic", type=int, help="train the base on so many people who do not exist")
    parser.add_argument("--base", type=Path, metavar="FILE", help="this network is the base; none is trained")
    parser.add_argument("--base-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=10, help="on the few")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--tuned-lr", type=float, default=0.01, help="of the network that begins with the base's weights"
    )
    parser.add_argument("--embedding-size", type=int, default=128)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.lfw and not options.bin:
        parser.error("nothing to measure on: give --lfw or --bin")
    options.scratch = options.scratch.resolve()
    for name in ("data", "lfw"):
        path = getattr(options, name)
        setattr(options, name, path and path.resolve())
    options.bin = [path.resolve() for path in options.bin or []]
    options.scratch.mkdir(parents=True, exist_ok=True)
    few, rest = split(options.data, options.scratch, options.share, options.seed)
    if options.base:
        base, origin = options.base.resolve(), options.base.resolve().parent.name
    else:
        source = synthetic(options.scratch, options.synthetic) if options.synthetic else rest
        base, origin = train(options, f"base-{source.name}", source, options.base_epochs, options.lr), source.name
    tuned = ["--init", base, "--head-lr", options.lr]
    runs = {
        "the base alone": base,
        "from nothing": train(options, "nothing", few, options.epochs, options.lr),
        "from the base, random centres": train(
            options, f"random-{origin}", few, options.epochs, options.tuned_lr, *tuned, "--init-head", "random"
        ),
        "from the base, mean centres": train(options, f"means-{origin}", few, options.epochs, options.tuned_lr, *tuned),
    }
    figures = {name: measure(options, path) for name, path in runs.items()}
    sets = list(next(iter(figures.values())))
    print("\n| | " + " | ".join(sets) + " |\n|---|" + "---|" * len(sets))
    for name, row in figures.items():
        cells = [f"{row[key][0]:.2%} ± {row[key][1]:.2%} (AUC {row[key][2]:.3f})" for key in sets]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
