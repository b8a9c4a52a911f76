"""A training set with wrong labels, and the list of what is wrong: what label noise costs, and whether it is found.

    python benchmarks/make_noisy.py data/crops --exchange 0.1 --out data/noisy-10

Of a share of the crops, drawn at random, the labels are exchanged among each other, so that every one of them gets
another identity's and every identity keeps its number of crops. Writes RecordIO (train.rec, ...) and, before it,
noise.tsv: a line for each crop, in the order of the new set, with its number there, the label it has, its true label,
and its number in the original set. The same set, share and seed give the same bytes. What is there already is kept.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in front of this folder, which has modules so named

import utils
from formats import crop_sets
from utils import InputError

COLUMNS = ("index", "label", "true_label", "source_index")


def exchanged(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Labels int64 [n] of which `share` are exchanged, each for another one; the number of each label is the same.

    Raises InputError if that is impossible, because one identity has more than half of the crops that are drawn.
    """
    random = np.random.default_rng(seed)
    drawn = np.sort(random.choice(len(labels), round(share * len(labels)), replace=False))
    true = labels[drawn]
    if len(drawn) and 2 * np.bincount(true).max() > len(drawn):
        raise InputError(f"{len(drawn)} crops to exchange, most of them of one identity; take a larger share")
    given = random.permutation(true)
    while len(same := np.flatnonzero(given == true)):
        # A place whose exchange helps both sides; there is one, because no label has more than half of them.
        place = same[0]
        partners = np.flatnonzero((given != true[place]) & (true != given[place]))
        partner = random.choice(partners)
        given[[place, partner]] = given[[partner, place]]
    result = labels.copy()
    result[drawn] = given
    return result


def make(source: Path, out: Path, share: float, seed: int) -> None:
    """Write the set; does nothing if it is there."""
    crops = crop_sets.open_training_set(source)
    recipe = {"source": crop_sets.fingerprint(crops), "share": share, "seed": seed}
    record = out / "noise.json"
    if (out / "train.rec").exists():
        if not record.exists() or json.loads(record.read_bytes()) != recipe:
            raise InputError(f"{out}: holds another set; give another --out")
        return
    labels = exchanged(crops.labels, share, seed)
    order = np.argsort(labels, kind="stable")
    rows = [(new, labels[old], crops.labels[old], old) for new, old in enumerate(order.tolist())]
    lines = ["\t".join(map(str, row)) for row in (COLUMNS, *rows)]
    utils.write_text(out / "noise.tsv", "\n".join(lines) + "\n")
    utils.write_json(record, recipe)
    with utils.progress(len(order), "writing", unit="crop") as bar:

        def items():
            for old in order.tolist():
                yield crops.read(old)[0], int(labels[old])
                bar.update()

        crop_sets.write_crops(out, items())
    wrong = int((labels != crops.labels).sum())
    print(f"{out}: {len(labels)} crops of {crops.identities} identities, {wrong} with another label than their own")


@utils.command
def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--exchange", type=float, required=True, metavar="SHARE", help="share of the labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not 0 <= options.exchange <= 1:
        parser.error(f"--exchange {options.exchange} is not between 0 and 1")
    make(options.data, options.out, options.exchange, options.seed)


if __name__ == "__main__":
    sys.exit(main())
