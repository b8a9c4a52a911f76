"""What wrong labels cost, and what --filter, --sub-centres and an audit win back.

    python benchmarks/label_noise.py faces_large --val lfw dev_pairs.bin --out results/noise
    python benchmarks/label_noise.py faces_large --val lfw --out results/noise -- --epochs 2 --network mfn

Trains on the set as it is and with 10 % and 30 % of its labels exchanged (inject_faults.py), everything else alike:
plain; with --filter 0.4; with --sub-centres 3; and plain without what audit.py finds by means of the network that the
plain training gave (--exclude; --error-rate 0.3, since a wrong label costs more than a crop); and once more, the audit
by means of the network that this gave. audit_recall.py says how much each audit found. Options of train.py after --
replace those of the recipe. Killed, the same command goes on. Writes label_noise.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import trials
from benchmarks.inject_faults import InjectFaults, make
from utils import InputError

RECIPE = ["--network", "mfn", "--embedding-size", "256", *trials.SMALL_SET]
WAYS: dict[str, list[str]] = {
    "plain": [],
    "filter": ["--filter", "0.4"],
    "sub-centres": ["--sub-centres", "3"],
    "audited": [],
    "audited again": [],
}


def audit(data: Path, checkpoint: Path, out: Path) -> list[str]:
    """Audit a set by a network, once; the options of train.py that follow from it."""
    if not (out / "recall.json").exists():
        found = ["audit.py", "--data", data, "--checkpoint", checkpoint, "--out", out]
        found += ["--no-duplicates", "--error-rate", "0.3"]
        for command in (found, ["benchmarks/audit_recall.py", "--faulty", data, "--audit", out]):
            if subprocess.run([sys.executable, *map(str, command)], cwd=trials.ROOT, check=False).returncode:
                raise InputError(f"{out}: the audit failed; the same command goes on from there")
    return ["--exclude", str(out / "audit.tsv")]


@utils.command
def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--val", type=Path, nargs="+", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.3], metavar="SHARE")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="audited needs plain before it, audited again both"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the training")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options, more = trials.parse(parser)
    options.out = options.out.resolve()
    common = [*RECIPE, "--seed", str(options.seed), "--val", *map(str, options.val), *more]
    rows: list[dict] = []
    for share in options.shares:
        data = options.data
        if share > 0:
            data = options.out / f"noise-{share:g}"
            make(InjectFaults(data=options.data, out=data, exchange=share, seed=options.seed))
        network = None
        for way in options.ways:
            own = ["--data", str(data), *WAYS[way]]
            extra: dict[str, Any] = {}
            if way.startswith("audited"):
                if share == 0 or network is None:
                    continue
                folder = options.out / f"{way.replace('audited', 'audit').replace(' ', '-')}-{share:g}"
                own += audit(data, network / "embedding.pt", folder)
                extra = {"audit": json.loads((folder / "recall.json").read_bytes())["wrong label"]}
            name = f"{share:.0%} exchanged, {way}"
            [row] = trials.run({name: own}, common, options.out, options.processes)
            if way == "plain" or way.startswith("audited"):
                network = trials.folder(options.out, name)
            rows.append(row | {"share": share} | extra)
            trials.write(options.out / "label_noise.json", __doc__.splitlines()[0], common, rows)
    print(trials.table(rows))


if __name__ == "__main__":
    sys.exit(main())
