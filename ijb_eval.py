"""IJB-B and IJB-C: sets of photos compared 1:1 and 1:N, as papers report it and as it can be believed.

    python ijb_eval.py --checkpoint runs/NAME/embedding.pt --ijb data/IJBC --out data/ijbc
    python ijb_eval.py --checkpoint w600k_r50.onnx --mean 0.5 --std 0.5 --ijb data/IJBB --out data/ijbb
    python ijb_eval.py --features features.npz --ijb data/IJBC --out data/ijbc --protocol 1:1

The folder is the official one: meta/ with the lists, loose_crop/ with the photos; which set it is, the lists say. Every
figure comes twice: as the field's public code prints it, and with the named error rate not exceeded, with intervals.
Writes to --out: results.json, the ROC of the usual treatment (roc.png), and the features, so that the same command
goes on after an interruption and a second run computes none.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from typing import Any

import numpy as np

import config
import utils
from cropping.contents import photos_sha256
from embedding import open_embedder
from ijb import report
from ijb.crops import FOLDER, embed_images, read_features
from ijb.lists import Lists, all_people, check_others, read_lists, read_pairs
from ijb.one_to_many import Identification, identification
from ijb.one_to_one import PairScorer, Verification, identities, verification
from ijb.templates import TREATMENTS, USUAL, Templates, pool
from options import parse
from utils import InputError
from verification.intervals import ManyPairs


@utils.command
def main() -> None:
    """Read the options, embed the images, evaluate, write the report."""
    options = parse(config.IjbEval, __doc__)
    utils.refuse_training(options.out)
    if (options.checkpoint is None) == (options.features is None):
        raise InputError("give --checkpoint FILE or --features FILE.npz, one of them")
    lists = read_lists(options.ijb)
    check_others(lists, options.protocol)
    data = report.lists_json(lists)
    if options.features is not None:
        features, gone = read_features(options.features, lists)
        model = {"name": options.features.name, "sha256": utils.sha256_of(options.features)}
    else:
        folder = lists.meta.parent / FOLDER
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of photos (--features takes features made elsewhere)")
        embedder = open_embedder(options, utils.choose_device(options.device))
        features, gone = embed_images(lists, folder, embedder, options.out, options.workers)
        model = embedder.describe()
        files = [folder / image for image in lists.images]
        data["photos_sha256"] = photos_sha256(files, lists.images, options.out, options.workers)
    templates = pool(features, lists)
    missing = report.missing_json(lists, templates, gone, features.zeros())
    del features
    results = {"protocol": lists.subset, "model": model, "data": data, "missing": missing}
    verifications: list[Verification] = []
    identified: Identification | None = None
    if "1:1" in options.protocol:
        verifications = _one_to_one(options, lists, templates, model["name"])
        results["one_to_one"] = report.one_to_one_json(verifications)
    if "1:N" in options.protocol:
        identified = identification(lists, templates, replicates=options.replicates)
        results["one_to_many"] = report.one_to_many_json(identified)
    utils.write_json(options.out / "results.json", results | {"environment": utils.environment()})
    print(report.table(lists, missing, verifications, identified))
    print(f"\n{options.out / 'results.json'}")


def _one_to_one(options: config.IjbEval, lists: Lists, templates: Templates, name: str) -> list[Verification]:
    pairs = read_pairs(lists)
    if pairs.same.all() or not pairs.same.any():
        raise InputError(f"{lists.path('template_pair_label.txt')}: pairs of one kind only; no TAR at FAR without both")
    scorer = PairScorer(pairs, templates)
    person = identities(pairs, templates, all_people(lists))
    del pairs
    people = ManyPairs(person[scorer.first], person[scorer.second], scorer.same, replicates=options.replicates)
    results: list[Verification] = []
    saved: dict[str, Any] = {}
    with utils.progress(len(TREATMENTS), f"{lists.subset}: 1:1", unit="treatment") as bar:
        for treatment in TREATMENTS:
            scores = scorer.scores(templates.embeddings(treatment))
            results.append(verification(scores, scorer.same, treatment, people=people))
            if options.save_scores:
                saved[treatment.name] = np.empty_like(scores)
                saved[treatment.name][scorer.order] = scores
            if treatment == USUAL:
                report.draw_roc(options.out / "roc", lists, scores, scorer.same, results[-1], name)
            bar.update()
    if saved:
        with utils.atomic_path(options.out / "scores.npz") as path, open(path, "wb") as file:
            np.savez(file, **saved)
    return results


if __name__ == "__main__":
    sys.exit(main())
