"""The judge of synthetic people: its figures against counting by hand, and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.toy_models import TEACHER, write_onnx
from helpers.training import ROOT, jpegs

from benchmarks.bench_likeness import GREY, crops_of, inner_face, judged
from embedding import normalise
from formats import crop_sets
from utils import InputError


def test_figures_are_what_counting_gives():
    random = np.random.default_rng(0)
    people = np.repeat(np.arange(8), 5)
    centres = random.standard_normal((8, 6)) + 2 * np.eye(6)[0]
    unit = normalise(centres[people] + 0.5 * random.standard_normal((40, 6)))
    found = judged(unit, people, 0.02)
    same, different = [], []
    for first in range(40):
        for second in range(first):
            angle = float(np.degrees(np.arccos(unit[first] @ unit[second])))
            (same if people[first] == people[second] else different).append(angle)
    assert found["same_mean"] == pytest.approx(np.mean(same))
    assert found["different_deviation"] == pytest.approx(np.std(different))
    limit = np.sort(different)[int(0.02 * len(different))]
    assert found["tar"] == pytest.approx(np.mean(np.array(same) < limit))
    assert found["mean_length"] == pytest.approx(np.linalg.norm(unit.mean(axis=0)))
    assert 1 <= found["dimensions"] <= 6
    # Without what all have in common nothing is common; people on one line fill one dimension.
    off = normalise(unit - unit.mean(axis=0))
    assert judged(off, people, 0.02)["mean_length"] < 0.5 * found["mean_length"]
    line = normalise(np.stack([np.ones(40), people / 8.0], axis=1))
    assert judged(line, people, 0.02)["dimensions"] == pytest.approx(1, abs=0.05)


def test_nothing_is_left_but_the_inner_face():
    crops = np.full((2, 112, 112, 3), 255, np.uint8)
    kept = (inner_face(crops) == 255).all(axis=3)
    assert kept[:, 72, 56].all() and not kept[:, :30].any() and not kept[:, :, :25].any()
    assert (inner_face(crops)[0, 0, 0] == GREY).all() and 0.2 < kept.mean() < 0.3


def test_the_command(tmp_path):
    for name, seed in (("real", 0), ("synthetic", 1)):
        crop_sets.write_crops(tmp_path / name, jpegs(6, 4, seed=seed))
    model = write_onnx(tmp_path / "judge.onnx", metadata=TEACHER)
    words = [sys.executable, "benchmarks/bench_likeness.py", "--checkpoint", model, "--real", tmp_path / "real",
             "--synthetic", tmp_path / "synthetic", "--identities", "5", "--images", "3"]  # fmt: skip
    run = subprocess.run([*words, "--json", tmp_path / "f.json"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    synthetic = f"synthetic {tmp_path / 'synthetic'}"
    parts = ["", ", inner face"]
    assert set(rows) == {*(f"real{part}" for part in parts), *(f"{synthetic}{part}" for part in parts),
                         f"{synthetic}, common look off"}  # fmt: skip
    assert all(row["centres"] == 5 for row in rows.values())
    for wrong, message in (
        (["--far", "1"], "--far 1"),
        (["--images", "1"], "--images 1"),
        (["--images", "9"], "fewer"),
    ):
        run = subprocess.run([*words, *wrong], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode and message in run.stderr and "Traceback" not in run.stderr


def test_a_crop_that_cannot_be_decoded_is_named(tmp_path):
    entries = list(jpegs(3, 2))
    entries[3] = (b"no picture", entries[3][1])
    crop_sets.write_crops(tmp_path / "crops", entries)
    with pytest.raises(InputError, match=r"train\.rec: record 4"):
        crops_of(tmp_path / "crops", 3, 2)
