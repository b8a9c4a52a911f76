"""Sets with known faults: what benchmarks/inject_faults.py and audit_recall.py promise."""

import subprocess
import sys

import numpy as np
import pytest
from helpers.training import ROOT, record_set
from hypothesis import given, settings
from hypothesis import strategies as st

from auditing.duplicates import HOW
from auditing.findings import DUPLICATE, MERGE, SPLIT, WRONG
from benchmarks import audit_recall
from benchmarks.inject_faults import InjectFaults, changed, exchanged, make
from formats import crop_sets
from utils import InputError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.floats(0, 1), st.integers(0, 5))
def test_labels_are_exchanged_among_each_other(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    count = round(share * len(labels))
    try:
        given_labels = exchanged(labels, count, np.random.default_rng(seed))
    except InputError:
        return
    assert (given_labels != labels).sum() == count
    np.testing.assert_array_equal(np.bincount(given_labels), sizes)
    np.testing.assert_array_equal(exchanged(labels, count, np.random.default_rng(seed)), given_labels)


def test_no_set_is_overwritten(tmp_path):
    data, other = record_set(tmp_path / "crops", identities=20, each=8), record_set(tmp_path / "other")
    for out in (data, other):
        before = (out / "train.rec").read_bytes()
        with pytest.raises(InputError, match="holds another set of crops"):
            make(InjectFaults(data=data, out=out, exchange=0.1))
        assert (out / "train.rec").read_bytes() == before and not (out / "truth.tsv").exists()
    with pytest.raises(InputError, match="crops to exchange, but only"):
        make(InjectFaults(data=data, out=tmp_path / "faulty", exchange=0.9, strangers=0.4))
    assert not (tmp_path / "faulty").exists()


def test_one_identity_cannot_be_exchanged_with_itself():
    with pytest.raises(InputError, match="most of them of one identity"):
        exchanged(np.array([0] * 50 + [1]), 51, np.random.default_rng(0))


def truth_of(folder):
    lines = (folder / "truth.tsv").read_text().splitlines()
    assert lines[0] == "key\tlabel\ttruth\tfaults\tsource"
    return [line.split("\t") for line in lines[1:]]


def test_the_set_and_its_truth(tmp_path):
    crops = record_set(tmp_path / "crops", identities=20, each=8)
    command = [sys.executable, "benchmarks/inject_faults.py", "--data", str(crops), "--split", "2", "--merge", "2",
               "--duplicates", "0.05", "--strangers", "0.05", "--exchange"]  # fmt: skip
    for name in ("one", "two"):
        subprocess.run([*command, "0.2", "--out", tmp_path / name], cwd=ROOT, check=True, capture_output=True)
    for name in ("train.rec", "truth.tsv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    old, new = crop_sets.open_training_set(crops), crop_sets.open_training_set(tmp_path / "one")
    rows = truth_of(tmp_path / "one")
    assert len(rows) == len(new) == 20 * 8 + 8
    found = dict.fromkeys(("exchanged", "stranger", "split", "merged", "duplicate"), 0)
    for index, (_, label, truth, faults, source) in enumerate(rows):
        payload, given_label = new.read(index)
        assert given_label == int(label)
        for name in found:
            found[name] += name in faults
        if "duplicate" not in faults:
            assert payload == old.read(int(source.split("/")[1]))[0]
        if not faults or faults.startswith("merged"):
            assert label == truth
        assert (truth == "-1") == ("stranger" in faults)
    assert found["exchanged"] >= 32 and found["stranger"] >= 8 and found["duplicate"] == 8
    done = subprocess.run([*command, "0.1", "--out", tmp_path / "one"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds another set" in done.stderr


def test_a_crop_that_cannot_be_decoded_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a picture"):
        changed(b"", "encoded")
    crop_sets.write_crops(tmp_path / "crops", [(b"\xff\xd8\xff\xe0 no picture", label) for label in (0, 0, 1, 1)])
    with pytest.raises(InputError, match=r"crops: crop \d: not a picture"):
        make(InjectFaults(data=tmp_path / "crops", out=tmp_path / "out", duplicates=1.0))


def test_recall_and_precision_of_an_audit_that_knows_all_and_of_one_that_errs(tmp_path):
    crops = record_set(tmp_path / "crops", identities=20, each=8)
    command = [sys.executable, "benchmarks/inject_faults.py", "--data", str(crops), "--split", "3", "--merge", "2",
               "--duplicates", "0.1", "--exchange", "0.1", "--out", tmp_path / "faulty"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    truth = audit_recall.read_truth(tmp_path / "faulty" / "truth.tsv")
    rows = [
        {"kind": WRONG, "score": "1", "to": str(row.true)}
        if row.label != row.true and not row.has("split")
        else {"kind": DUPLICATE if row.has("duplicate") else "", "score": "-1", "to": ""}
        for row in truth
    ]
    found, (precisions, recalls) = audit_recall.wrong_labels(rows, truth, 0.95)
    assert found["precision"] == found["recall"] == found["recall_at_precision_0.95"] == found["right_label_named"] == 1
    assert precisions[0] == recalls[0] == 1 and recalls[-1] == 1
    mixed = {row.label for row in truth if row.has("split") or row.has("merged")}
    mixed |= {row.true for row in truth if row.has("split")}
    judged = [index for index, row in enumerate(truth) if row.label not in mixed]
    wrong = [index for index in judged if rows[index]["kind"] == WRONG]
    half, left = len(wrong) // 2, len(wrong) - len(wrong) // 2
    for index in wrong[:half]:  # half are missed, and as many right crops are called
        rows[index].update(kind="", score="-2")
    right = [index for index in judged if rows[index]["kind"] == "" and index not in wrong]
    for index in right[:half]:
        rows[index].update(kind=WRONG, score="0.5")
    found, _ = audit_recall.wrong_labels(rows, truth, 0.95)
    assert found["recall"] == found["recall_at_precision_0.95"] == pytest.approx(left / len(wrong))
    assert found["precision"] == pytest.approx(left / len(wrong)) and half > 0

    halves = {(row.label, row.true) for row in truth if row.has("split") and not row.has("exchanged")}
    pairs = [{"kind": MERGE, "label": str(min(pair)), "other": str(max(pair))} for pair in halves]
    assert audit_recall.people(pairs, truth, MERGE, "split") == {
        "put_in": 3, "called": 3, "precision": 1, "recall": 1
    }  # fmt: skip
    assert audit_recall.people(pairs[1:], truth, MERGE, "split")["recall"] == pytest.approx(2 / 3)
    merged = {row.label for row in truth if row.has("merged") and not row.has("exchanged")}
    rows_of = [{"kind": SPLIT, "label": str(label)} for label in merged] + [{"kind": SPLIT, "label": "0"}]
    assert audit_recall.people(rows_of, truth, SPLIT, "merged")["recall"] == 1
    assert audit_recall.duplicates([{"reason": ""} for _ in truth], truth)["recall"] == 0
    copies = [{"reason": f"{HOW[1]}: crop 3" if row.has("duplicate") else ""} for row in truth]
    found = audit_recall.duplicates(copies, truth)
    assert found["recall"] == found["precision"] == 1 and found["put_in"] == 16
