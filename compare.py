"""Is one model better than another, or luckier? Two models on the same pairs.

    python lfw_eval.py --checkpoint a.pt --lfw data/lfw --out results/a --cache results/cache
    python lfw_eval.py --checkpoint b.pt --lfw data/lfw --out results/b --cache results/cache
    python compare.py results/a/results.json results/b/results.json --out results/a-b

Every set that both have measured (the same pairs and photos, by their hash; others are refused) is compared by a paired
bootstrap by identity, which knows that pairs share people and, for TAR, that each model's threshold hangs on them, too.
Beside the accuracy stands McNemar's exact test, which takes pairs as independent; the bootstrap is the one to believe.
The last line is the sentence for a paper. With --out, comparison.json has everything.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from pathlib import Path
from typing import Any

import numpy as np

import config
import utils
from options import parse
from utils import InputError
from verification.intervals import compare, compare_tars, correct_pairs, mcnemar
from verification.metrics import curve, evaluate, operating_point
from verification.report import CHAINED, people_text
from verification.scores import Scores, read_scores

# Of two equally good models 5 in 100 comparisons may come out below p = 0.05; with fewer people it is up to 12.
FEWEST_PEOPLE = 20
# What finds the faces, by its names in results.json: where that differs the models are not all that does.
DETECTION = {
    "face_rule": "which face is taken",
    "detector_sha256": "the detector",
    "max_side": "the size at which faces are looked for",
    "aligned": "whether photos are aligned already",
}


@utils.command
def main() -> None:
    """Read both files, compare all common sets, say what that means."""
    options = parse(config.Compare, __doc__)
    if len(options.results) != 2:
        raise InputError(f"two results.json are compared, not {len(options.results)}")
    first, second = (read_scores(path) for path in options.results)
    names = distinct(first[0].model, second[0].model)
    comparisons = [compare_sets(one, other, names, options) for one, other in common(first, second, options.results)]
    if options.out is not None:
        content = {
            "kind": "comparison",
            "a": {"results": str(options.results[0]), "model": first[0].model},
            "b": {"results": str(options.results[1]), "model": second[0].model},
            "sets": comparisons,
            "seed": options.seed,
            "environment": utils.environment(),
        }
        utils.write_json(options.out / "comparison.json", content)
    print(f"A: {names[0]} ({options.results[0]})\nB: {names[1]} ({options.results[1]})")
    for found in comparisons:
        print("\n" + text(found))


def common(first: list[Scores], second: list[Scores], paths: list[Path]) -> list[tuple[Scores, Scores]]:
    """The sets that both have, by hash; InputError if a set of one name has other pairs, or there is none in common."""
    by_name = {scores.entry["name"]: scores for scores in second}
    by_hash = {scores.entry["sha256"]: scores for scores in second}
    found = []
    for one in first:
        other = by_hash.get(one.entry["sha256"]) or by_name.get(one.entry["name"])
        if other is None:
            continue
        if one.entry["sha256"] != other.entry["sha256"] or not np.array_equal(one.pairs, other.pairs):
            raise InputError(
                f"{one.entry['name']}: not the same pairs and photos (sha256 {one.entry['sha256'][:12]} in {paths[0]}, "
                f"{other.entry['sha256'][:12]} in {paths[1]}); figures of different pairs cannot be compared"
            )
        found.append((one, other))
    if not found:
        names = [", ".join(scores.entry["name"] for scores in side) for side in (first, second)]
        raise InputError(f"no set in common: {paths[0]} has {names[0]}; {paths[1]} has {names[1]}")
    return found


def distinct(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    """What to call two models: their names; files of one name by their hashes, one file twice as A and B."""
    if a["name"] != b["name"]:
        return a["name"], b["name"]
    marks = [str(model.get("sha256"))[:8] for model in (a, b)]
    first, second = marks if marks[0] != marks[1] else "AB"
    return f"{a['name']} ({first})", f"{b['name']} ({second})"


def compare_sets(one: Scores, other: Scores, names: tuple[str, str], options: config.Compare) -> dict[str, Any]:
    """Both tests of accuracy, and of TAR at each FAR that the pairs resolve; ready for JSON."""
    results = [
        evaluate(scores.cosines, scores.same, one.folds, name=scores.entry["name"], far_levels=options.far)
        for scores in (one, other)
    ]
    correct = [correct_pairs(result) for result in results]
    if correct[0] is None or correct[1] is None:
        raise InputError(f"{one.entry['name']}: pairs of one kind only; nothing to compare")
    notes = [
        f"{what} differs ({one.entry['source'].get(key)} and {other.entry['source'].get(key)}): not the models alone do"
        for key, what in DETECTION.items()
        if one.entry.get("source", {}).get(key) != other.entry.get("source", {}).get(key)
    ]
    lost = [int(np.isnan(scores.cosines).sum()) for scores in (one, other)]
    if lost[0] != lost[1]:
        notes.append(f"pairs without two faces, which count as wrong, differ ({lost[0]} and {lost[1]})")
    if not np.array_equal(one.folds, other.folds):
        notes.append("the folds differ: those of A are used for both")
    sides = one.sides
    people_known = sides is not None
    if sides is not None and one.entry.get("source", {}).get("people_by_chains"):
        notes.append(CHAINED)
    if sides is None:
        notes.append("nobody knows who is in the pairs: each pair is taken as two people of its own")
        sides = np.arange(2 * len(one.same)).reshape(-1, 2)
        sides[one.same, 1] = sides[one.same, 0]
    accuracy = compare(correct[0], correct[1], one.same, sides, seed=options.seed)
    curves = [curve(scores.cosines, scores.same) for scores in (one, other)]
    points = {far: [operating_point(found, far) for found in curves] for far in options.far}
    resolved = [far for far, pair in points.items() if all(point.resolved for point in pair)]
    tars = compare_tars(one.cosines, other.cosines, one.same, sides, resolved, seed=options.seed)
    only_a, only_b = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    tests = {"only_a_correct": only_a, "only_b_correct": only_b, "p_mcnemar": mcnemar(only_a, only_b)}
    found = {
        "name": one.entry["name"],
        "sha256": one.entry["sha256"],
        "pairs": len(one.same),
        "identities": accuracy.identities if people_known else None,
        "people": people_text(one.entry, accuracy.identities) if people_known else None,
        # Over all pairs, as the difference is: where folds differ in size, their mean is another number.
        "accuracy": {"a": float(correct[0].mean()), "b": float(correct[1].mean()), **accuracy.to_json()} | tests,
        "tar_at_far": [
            {"far": far, "a": points[far][0].tar, "b": points[far][1].tar, **tars[far].to_json()} for far in resolved
        ],
        "notes": notes,
    }
    return found | {"sentence": sentence(found, *names)}


def sentence(found: dict[str, Any], a: str, b: str) -> str:
    """What a reviewer wants to read."""
    row = found["accuracy"]
    low, high = (100 * end for end in row["interval_95"])
    proven = row["p_by_identity"] < 0.05 and row["identities"] >= FEWEST_PEOPLE
    better = a if row["difference"] > 0 else b
    verdict = f"{better} is better" if proven else "no difference is proven"
    if row["identities"] < FEWEST_PEOPLE:
        verdict += f", {row['identities']} people are too few for that"
    of, by = (f" of {found['people']}", " by identity") if found["people"] else ("", "")
    return (
        f"On {found['pairs']:,} pairs{of} ({found['name']}), {a} answers "
        f"{utils.percent(row['a'])} and {b} {utils.percent(row['b'])} correctly, a difference of "
        f"{100 * row['difference']:+.2f} points (95 % interval{by} {low:+.2f} to {high:+.2f}, "
        f"p = {row['p_by_identity']:.2g}; McNemar's test on {row['only_a_correct']} against {row['only_b_correct']} "
        f"pairs, p = {row['p_mcnemar']:.2g}): {verdict}."
    )


def text(found: dict[str, Any]) -> str:
    """The figures of one set as text."""
    lines = [f"{found['name']}: {found['pairs']} pairs, sha256 {found['sha256']}"]
    accuracy = found["accuracy"]
    mcnemar_says = (
        f"; McNemar {accuracy['only_a_correct']} : {accuracy['only_b_correct']}, p = {accuracy['p_mcnemar']:.2g}"
    )
    rows = [("accuracy", accuracy, mcnemar_says)]
    rows += [(f"TAR at FAR {row['far']:g}", row, "") for row in found["tar_at_far"]]
    for label, row, more in rows:
        low, high = (100 * end for end in row["interval_95"])
        lines.append(
            f"  {label:<18} A {utils.percent(row['a'])}  B {utils.percent(row['b'])}  "
            f"A - B {100 * row['difference']:+.2f} [{low:+.2f} ... {high:+.2f}] by identity, "
            f"p = {row['p_by_identity']:.2g}{more}"
        )
    return "\n".join([*lines, *(f"  {note}" for note in found["notes"]), "", found["sentence"]])


if __name__ == "__main__":
    sys.exit(main())
