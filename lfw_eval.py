"""Stage 4: how well a face model tells one person from two, on LFW-like folders of photos and on .bin sets.

    python lfw_eval.py --checkpoint runs/NAME/embedding.pt --lfw data/lfw --pairs data/lfw/pairs.txt --out data/eval
    python lfw_eval.py --checkpoint released --bin lfw.bin cfp_fp.bin agedb_30.bin --out data/eval
    python lfw_eval.py --checkpoint w600k_r50.onnx --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --bin lfw.bin --out data/eval

Writes to --out: results.json (every figure, hashes of model and data), per set the distribution of angles, the ROC,
a sheet of the worst errors and the list of all of them. Faces and features are cached there by content: the same
command goes on where an interrupted run stopped, and a second model needs no second detection.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from typing import cast

import config
import utils
from cropping.align import Rule
from embedding import open_embedder
from options import parse, plain_options
from utils import InputError
from verification.attributes import as_groups, parse_column, read_attributes
from verification.features import verify
from verification.groups import Groups, by_group
from verification.groups import draw as draw_groups
from verification.groups import table as groups_table
from verification.metrics import VerificationResult
from verification.report import intervals_text, report, table, write_set
from verification.scores import plain_name, stems, write_scores
from verification.sets import VerificationSet, open_set


@utils.command
def main() -> None:
    """Read the options, evaluate every set, write the report."""
    options = parse(config.LfwEval, __doc__)
    utils.refuse_training(options.out)
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
            rule=cast("Rule", options.rule),
            detector_weights=options.detector_weights,
            max_side=options.max_side or None,
            device=device,
            workers=options.workers,
        )
        for path in ([options.lfw] if options.lfw else []) + options.bin
    ]
    results = [verify(embedder, pairs, cache_dir=cache, far_levels=options.far) for pairs in sets]
    content = report(embedder, sets, results)
    groups = [_groups(options, pairs, result) for pairs, result in zip(sets, results, strict=True)]
    for stem, pairs, result, entry, found in zip(stems(sets), sets, results, content["sets"], groups, strict=True):
        write_set(options.out, stem, pairs, result, embedder.name, most=options.sheet)
        write_scores(options.out, stem, pairs, result)
        for one in found:
            draw_groups(options.out / f"{stem}-groups-{plain_name(one.column)}", one, f"{pairs.name}, {embedder.name}")
            entry.setdefault("groups", []).append(one.to_json())
    utils.write_json(options.out / "run.json", {"options": plain_options(options), "environment": utils.environment()})
    utils.write_json(options.out / "results.json", content)
    print(table(embedder, results))
    for text in (intervals_text(content), *(groups_table(one) for found in groups for one in found)):
        print(f"\n{text}" if text else "")
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


def _groups(options: config.LfwEval, pairs: VerificationSet, result: VerificationResult) -> list[Groups]:
    """Error rates by each column of --groups that is known of this set."""
    if not options.groups:
        return []
    tables = list(options.attributes)
    if not tables and options.lfw is not None:  # what synthesize.py writes
        tables = [path for path in (options.lfw / "truth.tsv", options.lfw / "identities.tsv") if path.is_file()]
    known = read_attributes(tables)
    sides = None if pairs.identities is None else pairs.identities[pairs.pairs]
    found = []
    for text in options.groups:
        column, borders = parse_column(text)
        if column in pairs.columns:
            values = [value for side in (0, 1) for value in (pair[side] for pair in pairs.columns[column])]
        elif pairs.photos is not None and column in known.columns():
            of = [known.value(photo, column) for photo in pairs.photos]
            values = [of[photo] for side in (0, 1) for photo in pairs.pairs[:, side]]
        else:
            there = ", ".join([*pairs.columns, *(known.columns() if pairs.photos is not None else [])]) or "none"
            raise InputError(f"--groups {column}: {pairs.name} has no such column (there are: {there})")
        names = as_groups(values, borders)
        both = list(zip(names[: len(pairs.same)], names[len(pairs.same) :], strict=True))
        found.append(by_group(result, sides, column, both, options.threshold))
    return found


if __name__ == "__main__":
    sys.exit(main())
