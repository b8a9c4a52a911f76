"""Stage 4: how well a face model tells one person from two, on LFW-like folders of photos and on .bin sets.

    python lfw_eval.py --checkpoint runs/NAME/embedding.pt --lfw data/lfw --pairs data/lfw/pairs.txt --out data/eval
    python lfw_eval.py --checkpoint released --bin lfw.bin cfp_fp.bin agedb_30.bin --out data/eval
    python lfw_eval.py --checkpoint w600k_r50.onnx --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --bin lfw.bin --out data/eval

Writes to --out: results.json (every figure, hashes of model and data), per set the distribution of angles, the ROC,
a sheet of the worst errors and the list of all of them. Faces and features are cached there by content: the same
command goes on where an interrupted run stopped, and a second model needs no second detection.
"""

import re
import sys

import config
import utils
from embedding import open_embedder
from options import parse
from utils import InputError
from verification.features import verify
from verification.report import report, table, write_set
from verification.sets import VerificationSet, open_set


@utils.command
def main() -> None:
    """Read the options, evaluate every set, write the report."""
    options = parse(config.LfwEval, __doc__)
    _check(options)
    device = utils.choose_device(options.device)
    embedder = open_embedder(options, device)
    cache = options.cache or options.out / "cache"
    sets = [
        open_set(
            path,
            cache,
            pairs=options.pairs or None,
            folds=options.folds,
            aligned=options.aligned,
            rule=options.rule,
            detector_weights=options.detector_weights,
            max_side=options.max_side or None,
            device=device,
            workers=options.workers,
        )
        for path in ([options.lfw] if options.lfw else []) + options.bin
    ]
    results = [verify(embedder, pairs, cache_dir=cache, far_levels=options.far) for pairs in sets]
    for stem, pairs, result in zip(_stems(sets), sets, results, strict=True):
        write_set(options.out, stem, pairs, result, embedder.name, most=options.sheet)
    utils.write_json(options.out / "results.json", report(embedder, sets, results))
    print(table(embedder, results))
    print(f"\n{options.out / 'results.json'}; pictures and wrong pairs beside it")


def _check(options: config.LfwEval) -> None:
    if options.lfw is None and not options.bin:
        raise InputError("nothing to evaluate on: give --lfw DIR --pairs FILE or --bin FILE ...")
    if options.pairs and options.lfw is None:
        raise InputError("--pairs names photos: it needs --lfw DIR")
    if options.lfw is not None and not options.lfw.is_dir():
        raise InputError(f"--lfw {options.lfw}: no such folder")
    for path in options.bin:
        if path.is_dir():
            raise InputError(f"--bin {path}: a folder; photos with a list of pairs are --lfw DIR --pairs FILE")
        if not path.is_file():
            raise InputError(f"--bin {path}: {'not a plain file' if path.exists() else 'no such file'}")
    for name, folder in (("out", options.out), ("cache", options.cache)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise InputError(f"--{name} {folder}: is a file, not a folder")


def _stems(sets: list[VerificationSet]) -> list[str]:
    """A file name for each set: its own name without what file systems dislike, numbered where two are the same."""
    stems: list[str] = []
    for pairs in sets:
        plain = re.sub(r"[^\w.+-]+", "_", pairs.name).strip("._") or "set"
        count = 1
        stem = plain
        while stem.lower() in (other.lower() for other in stems):
            count += 1
            stem = f"{plain}-{count}"
        stems.append(stem)
    return stems


if __name__ == "__main__":
    sys.exit(main())
