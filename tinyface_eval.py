"""TinyFace: who is it, on twenty pixels, among 153,428 strangers?

    python tinyface_eval.py --checkpoint runs/NAME/embedding.pt --tinyface data/tinyface --out data/tinyface-eval
    python tinyface_eval.py --checkpoint released --tinyface data/aligned --aligned --lists data/tinyface --out DIR
    python tinyface_eval.py --features features.npz --lists lists.json --out DIR

Rank-1, 5 and 20 as public code prints them, the same with equal scores counted against the model, mAP, intervals by
person. Faces are looked for in the enlarged photo and aligned; where none is found the whole picture is resized, and
the report says how often. Writes results.json and the features to --out; the same command goes on after an
interruption.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from pathlib import Path
from typing import Any

import numpy as np

import config
import utils
from cropping import align, photos
from cropping.contents import photos_sha256
from embedding import normalise, open_embedder
from ijb import crops, tinyface
from ijb.tinyface import ALIGNED, RANKS, Lists, Search, cutter, read_lists, refuse_gaps, search
from options import parse
from retinaface import RetinaFace
from utils import InputError
from verification.intervals import Interval
from verification.lfw import detector_hash

LISTED = 1000  # photos that results.json names before it only counts


@utils.command
def main() -> None:
    """Read the options, embed the photos, search, write the report."""
    options = parse(config.TinyfaceEval, __doc__)
    utils.refuse_training(options.out)
    if (options.checkpoint is None) == (options.features is None):
        raise InputError("give --checkpoint FILE or --features FILE.npz, one of them")
    place = options.lists or options.tinyface
    if place is None:
        raise InputError("give --tinyface DIR, or --lists with --features")
    lists = read_lists(place)
    data: dict[str, Any] = {
        "lists": {str(file): utils.sha256_of(file) for file in lists.files if file.is_file()},
        "probes": len(lists.probe),
        "matches": len(lists.gallery_match),
        "distractors": len(lists.gallery_distractor),
        "notes": lists.notes(),
    }
    if options.features is not None:
        embeddings, model, preparation = _read_features(options.features, lists)
    else:
        if options.tinyface is None:
            raise InputError("--checkpoint needs the photos: --tinyface DIR")
        if not options.tinyface.is_dir():
            raise InputError(f"{options.tinyface}: no such folder of photos")
        folder = options.tinyface / "Testing_Set"
        paths = lists.paths(folder if folder.is_dir() else options.tinyface)
        embeddings, model, preparation = _embed(options, paths)
        data["photos_sha256"] = photos_sha256(paths, lists.names, options.out, options.workers)
    refuse_gaps(lists, embeddings)
    found = search(lists, embeddings, options.replicates)
    results = {
        "protocol": "TinyFace",
        "model": model,
        "data": data,
        "photos": preparation,
        "as_printed": {f"rank-{rank}": percent for rank, percent in found.printed.items()},
        **{f"rank_{rank}": rate.to_json() for rank, rate in found.rates.items()},
        "mean_average_precision": found.mean_precision.to_json(),
        "mated_probes": found.probes,
        "environment": utils.environment(),
    }
    utils.write_json(options.out / "results.json", results)
    for note in data["notes"]:
        print(f"{place}: {note}")
    print(_table(found, preparation))
    print(f"\n{options.out / 'results.json'}")


def _embed(options: config.TinyfaceEval, paths: list[Path]) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Embeddings of all photos, what the model is, and what became of the photos."""
    device = utils.choose_device(options.device)
    embedder = open_embedder(options, device)
    way: dict[str, Any] = {"code": crops.code_key(align, photos, tinyface), "aligned": options.aligned}
    detector = None
    if not options.aligned:
        detector = RetinaFace(options.detector_weights, device)
        way["detector"] = detector_hash(options.detector_weights, device.type)
    cut = cutter(paths, detector)
    rows = crops.embed_all(paths, cut, way, embedder, options.out, "TinyFace", options.workers, remarks=1)
    features, mirrored = rows[:, : embedder.dim], rows[:, embedder.dim : -1]
    embeddings = normalise(features + mirrored if embedder.preprocessing.mirror else features)
    gone = np.flatnonzero(np.isnan(embeddings[:, 0]))
    there = ~np.isnan(rows[:, -1])
    preparation = {
        "aligned_before": options.aligned,
        "detector_sha256": way.get("detector"),
        "aligned": int((rows[there, -1] == ALIGNED).sum()),
        "whole_picture_resized": int((rows[there, -1] != ALIGNED).sum()),
        "without_feature": len(gone),
        "names_without_feature": [f"{paths[row].parent.name}/{paths[row].name}" for row in gone[:LISTED]],
    }
    return embeddings, embedder.describe(), preparation


def _read_features(path: Path, lists: Lists) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """The same from an .npz with `features` [n, D] and `names` [n], in any order."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            features, names = stored["features"], stored["names"].astype(str)
    except FileNotFoundError:
        raise
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        raise InputError(f"{path}: not an .npz file with features and names") from error
    if features.ndim != 2 or not features.size or features.dtype.kind != "f" or names.shape != features.shape[:1]:
        raise InputError(f"{path}: features are {features.dtype} {features.shape} for names {names.shape}")
    names = names.tolist()
    row = {name: number for number, name in enumerate(names)}
    if len(row) != len(names):
        raise InputError(f"{path}: a name stands there twice")
    absent = [name for name in lists.names if name not in row]
    if absent:
        raise InputError(f"{path}: has no features of {len(absent)} files of the lists; the first is {absent[0]}")
    embeddings = normalise(features[[row[name] for name in lists.names]])
    gone = np.flatnonzero(np.isnan(embeddings[:, 0]))
    preparation = {
        "without_feature": len(gone),
        "names_without_feature": [lists.names[number] for number in gone[:LISTED]],
    }
    return embeddings, {"name": path.name, "sha256": utils.sha256_of(path)}, preparation


def _table(found: Search, preparation: dict[str, Any]) -> str:
    lines = [
        f"TinyFace, {found.probes} probes with a mate of {found.given}, gallery of {found.gallery}. In %:",
        "          as printed | equal scores against it (95 % by person)",
    ]
    lines += [f"  rank-{rank:<3} {found.printed[rank]:9.2f} | {_cell(found.rates[rank])}" for rank in RANKS]
    lines.append(f"  mAP                | {_cell(found.mean_precision)}")
    if "aligned" in preparation:
        whole = preparation["whole_picture_resized"]
        lines.append(f"\n{preparation['aligned']} photos aligned; of {whole} the whole picture was resized")
    if preparation["without_feature"]:
        lines.append(f"{preparation['without_feature']} photos give no feature and fail:")
        lines += [f"  {name}" for name in preparation["names_without_feature"][:5]]
    return "\n".join(lines)


def _cell(rate: Interval) -> str:
    return f"{utils.percent(rate.value, ''):>6} ({100 * rate.low:.2f} ... {100 * rate.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
