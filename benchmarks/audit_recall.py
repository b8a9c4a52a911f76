"""How much of what inject_faults.py put into a set has an audit found? Precision and recall of each kind.

    python benchmarks/inject_faults.py --data faces_large --out noisy --exchange 0.1
    python audit.py --data noisy --checkpoint model.onnx --out audit
    python benchmarks/audit_recall.py --faulty noisy --audit audit

*At the audit's limit*: the findings as they are. *At precision 0.95*: the most that a limit on the same score could
find, were the truth known. What was wrong in the set before counts against the audit, so precision is a lower bound.
Writes recall.json and recall.png (precision over recall of wrong labels) into the audit's folder.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plotting
import utils
from auditing.duplicates import HOW
from auditing.findings import DUPLICATE, MERGE, SPLIT, STRANGER, TEST, WRONG
from formats import selection
from options import REQUIRED, option, parse
from utils import InputError


@dataclass
class AuditRecall:
    """What is compared."""

    faulty: Path = option(REQUIRED, "folder that inject_faults.py wrote", metavar="DIR")
    audit: Path = option(REQUIRED, "folder that audit.py wrote about it", metavar="DIR")
    precision: float = option(0.95, "recall is stated at this precision", above=0, at_most=1)


class Truth(NamedTuple):
    """A row of truth.tsv: the label a crop has and the one it should have, its faults, and where it comes from."""

    label: int
    true: int
    faults: list[str]
    source: str

    def has(self, fault: str) -> bool:
        return any(name.startswith(fault) for name in self.faults)


def read_truth(path: Path) -> list[Truth]:
    """The rows, in the order of the set."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    lines = path.read_text().splitlines()
    if not lines or lines[0] != "key\tlabel\ttruth\tfaults\tsource":
        raise InputError(f"{path}: not a truth.tsv of inject_faults.py")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            _, label, true, faults, source = line.split("\t")
            rows.append(Truth(int(label), int(true), faults.split(", ") if faults else [], source))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not a row of five columns") from error
    return rows


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def curve(score: np.ndarray, is_wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall if the crops of the k highest scores are called wrong, for each k; equal scores together."""
    order = np.argsort(-score, kind="stable")
    right = np.cumsum(is_wrong[order])
    ends = np.append(np.flatnonzero(score[order][1:] != score[order][:-1]), len(order) - 1)
    return right[ends] / (ends + 1), right[ends] / max(1, right[-1])


def wrong_labels(
    rows: list[dict[str, str]], truth: list[Truth], precision: float
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Crops under another label than their own, and how often the audit names the right one.

    Identities that were split or merged are left out: whose label theirs is, is another question.
    """
    mixed = {row.label for row in truth if row.has("split") or row.has("merged")}
    mixed |= {row.true for row in truth if row.has("split")}
    judged = [(row, true) for row, true in zip(rows, truth, strict=True) if true.label not in mixed]
    is_wrong = np.array([true.label != true.true for _, true in judged])
    called = np.array([row["kind"] in (WRONG, STRANGER) for row, _ in judged])
    # The score of a duplicate is a correlation; what has none was not judged.
    score = np.array([float(row["score"] or "-inf") if row["kind"] != DUPLICATE else -np.inf for row, _ in judged])
    hits = [judged[hit] for hit in np.flatnonzero(called & is_wrong).tolist()]
    named = [int(row["to"]) == true.true for row, true in hits if row["to"] and true.true >= 0]
    precisions, recalls = curve(score, is_wrong)
    enough = precisions >= precision
    return {
        "put_in": int(is_wrong.sum()),
        "called": int(called.sum()),
        "precision": share(len(hits), int(called.sum())),
        "recall": share(len(hits), int(is_wrong.sum())),
        "right_label_named": share(sum(named), len(named)),
        f"recall_at_precision_{precision:g}": float(recalls[enough].max()) if enough.any() else 0.0,
    }, (precisions, recalls)


def people(rows: list[dict[str, str]], truth: list[Truth], kind: str, fault: str) -> dict[str, Any]:
    """Identities that were split, merged or put in: how many are named, and how many of the named ones were."""
    marked = Counter(frozenset((row.label, row.true)) if kind == MERGE else frozenset([row.label])
                     for row in truth if row.has(fault) and not row.has("exchanged"))  # fmt: skip
    put_in = {labels for labels in marked if kind != MERGE or len(labels) == 2}
    named = {
        frozenset((int(row["label"]), int(row["other"]))) if kind == MERGE else frozenset([int(row["label"])])
        for row in rows
        if row["kind"] == kind
    }
    hits = len(put_in & named)
    return {"put_in": len(put_in), "called": len(named), "precision": share(hits, len(named)),
            "recall": share(hits, len(put_in))}  # fmt: skip


def duplicates(rows: list[dict[str, str]], truth: list[Truth]) -> dict[str, Any]:
    """Copies that were put in; it does not matter which of the two crops is called."""
    members: dict[str, list[int]] = {}
    for index, row in enumerate(truth):
        members.setdefault(row.source, []).append(index)
    groups = [indices for indices in members.values() if len(indices) > 1]
    # What is a wrong person as well is called that, and the other crop is named in the reason.
    called = {index for index, row in enumerate(rows) if any(f"{how}: " in row["reason"] for how in HOW)}
    hits = called & {index for indices in groups for index in indices}
    wanted = sum(len(indices) - 1 for indices in groups)
    return {"put_in": wanted, "called": len(called), "precision": share(len(hits), len(called)),
            "recall": share(len(hits), wanted)}  # fmt: skip


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(AuditRecall, __doc__)
    truth = read_truth(options.faulty / "truth.tsv")
    rows = [row for _, row in selection.rows(options.audit / selection.CROPS, selection.CROP_COLUMNS)]
    if [int(row["label"]) for row in rows] != [row.label for row in truth]:
        raise InputError(f"{options.audit}: audits another set than {options.faulty}")
    found = [row for _, row in selection.rows(options.audit / selection.IDENTITIES, selection.IDENTITY_COLUMNS)]
    labels, (precisions, recalls) = wrong_labels(rows, truth, options.precision)
    record = {"wrong label": labels, "same photo twice": duplicates(rows, truth)}
    for kind, fault in ((MERGE, "split"), (SPLIT, "merged"), (TEST, "test")):
        record[kind] = people(found, truth, kind, fault)
    utils.write_json(options.audit / "recall.json", record)
    with plotting.drawing(options.audit / "recall", 6, 4) as figure:
        axes = figure.add_subplot(xlabel="recall of wrong labels", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.plot(recalls, precisions)
        if labels["called"]:
            axes.plot(labels["recall"], labels["precision"], "o", label="the audit's own limit")
            axes.legend(loc="lower left")
        at = labels[f"recall_at_precision_{options.precision:g}"]
        plotting.title(axes, str(options.faulty), f"{at:.1%} are found at precision {options.precision:g}")
    for kind, entry in record.items():
        values = {name.replace("_", " "): "-" if value is None else f"{value:.4g}" for name, value in entry.items()}
        print(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in values.items()))


if __name__ == "__main__":
    sys.exit(main())
