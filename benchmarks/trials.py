"""Trainings that are compared with each other: run one after the other, each goes on where it was, results as JSON."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in front of this folder

import utils
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
SMALL_SET = (  # what recipes/small_set.sh does, in fewer epochs
    "--augment strong --batch-size 64 --epochs 8 --schedule cosine --lr 0.02 --warmup 1 --margin 0.3 --margin-warmup 3 "
    "--scale 32 --val-every 4"
).split()


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """A benchmark's own options, and those of train.py, which follow `--`."""
    line = sys.argv[1:]
    place = line.index("--") if "--" in line else len(line)
    return parser.parse_args(line[:place]), line[place + 1 :]


def folder(out: Path, name: str) -> Path:
    """Where a trial's training lies."""
    return out / re.sub(r"[^\w.]+", "-", name)


def run(trials: dict[str, list[str]], common: list[str], out: Path, processes: int = 1) -> list[dict]:
    """Train each trial (name -> its options, after the `common` ones) in OUT/NAME; a summary of each, in their order.

    Raises `InputError` naming the trial that failed.
    """
    found = []
    for name, own in trials.items():
        place = folder(out, name)
        launcher = [sys.executable]
        if processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command = [*launcher, str(ROOT / "train.py"), *common, *own, "--out", str(place), "--resume"]
        print(f"== {name}: {' '.join(own)}", flush=True)
        began = time.monotonic()
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"{place}: the training failed; the same command goes on from there")
        results = json.loads((place / "results.json").read_bytes())
        last, best = results["last"], results["best"]
        found.append(
            {
                "trial": name,
                "options": own,
                "epochs": results["epochs"],
                "steps": last["step"],
                "loss": last["loss"],
                "crops_per_second": last["crops_per_second"],
                "seconds_of_this_call": round(time.monotonic() - began, 1),
                "last": {pairs: value["accuracy"] for pairs, value in last["verification"].items()},
                "best": {pairs: value["accuracy"] for pairs, value in best["verification"].items()},
            }
        )
    return found


def table(rows: list[dict]) -> str:
    """The last epoch's accuracies, a line for each trial."""
    sets = list(rows[0]["last"]) if rows else []
    lines = [f"{'':32}" + "".join(f"{name[:20]:>22}" for name in sets)]
    for row in rows:
        lines.append(f"{row['trial']:32}" + "".join(f"{row['last'][name]:>21.2%} " for name in sets))
    return "\n".join(lines)


def write(path: Path, what: str, common: list[str], rows: list[dict]) -> None:
    """The results with what they were made by."""
    utils.write_json(path, {"what": what, "common": common, "trials": rows, "environment": utils.environment()})
