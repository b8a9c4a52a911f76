"""Sets with exchanged labels: what benchmarks/make_noisy.py promises."""

import subprocess
import sys

import numpy as np
import pytest
from helpers.training import ROOT, record_set
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import crop_sets

sys.path.append(str(ROOT / "benchmarks"))

from make_noisy import exchanged

from utils import InputError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.floats(0, 1), st.integers(0, 5))
def test_labels_are_exchanged_among_each_other(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    try:
        given_labels = exchanged(labels, share, seed)
    except InputError:
        return
    assert (given_labels != labels).sum() == round(share * len(labels))
    np.testing.assert_array_equal(np.bincount(given_labels), sizes)
    np.testing.assert_array_equal(exchanged(labels, share, seed), given_labels)


def test_one_identity_cannot_be_exchanged_with_itself():
    with pytest.raises(InputError, match="most of them of one identity"):
        exchanged(np.array([0] * 50 + [1]), 1.0, 0)


def test_the_set_and_its_list(tmp_path):
    crops = record_set(tmp_path / "crops", identities=6, each=10)
    command = [sys.executable, "benchmarks/make_noisy.py", str(crops), "--exchange", "0.3", "--out"]
    for name in ("one", "two"):
        subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, check=True, capture_output=True)
    for name in ("train.rec", "noise.tsv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    old, new = crop_sets.open_training_set(crops), crop_sets.open_training_set(tmp_path / "one")
    lines = (tmp_path / "one" / "noise.tsv").read_text().splitlines()
    assert lines[0] == "index\tlabel\ttrue_label\tsource_index"
    wrong = 0
    for line in lines[1:]:
        index, label, true, source = map(int, line.split("\t"))
        assert new.read(index) == (old.read(source)[0], label)
        assert old.labels[source] == true
        wrong += label != true
    assert wrong == 18
    other = [*command[:4], "0.1", "--out", str(tmp_path / "one")]
    done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds another set" in done.stderr
