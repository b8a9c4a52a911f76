"""What benchmarks/stress_truth.py compares, against plain loops."""

import itertools

import numpy as np
import pytest

from benchmarks import stress_truth
from benchmarks.stress_truth import NOSE, StressTruth, compare, correlation, in_bins, lost, threshold, yaw
from cropping.align import TEMPLATE


def test_yaw_of_a_head_that_is_turned():
    face = np.column_stack([TEMPLATE - TEMPLATE[:2].mean(axis=0), np.zeros(5)])
    face[:, 0] -= face[2, 0]
    face[2, 2] = NOSE * (face[1, 0] - face[0, 0])
    for degrees in (0, 10, 35, 60):
        angle = np.radians(degrees)
        turned = face @ np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])
        found = yaw(np.stack([turned[:, :2], turned[:, :2] * [-1, 1] + 7]))
        assert found == pytest.approx([degrees, degrees], abs=3)


def test_thresholds_and_losses_are_those_of_plain_loops(monkeypatch):
    monkeypatch.setattr(stress_truth, "BLOCK", 7)
    random = np.random.default_rng(0)
    people = random.integers(0, 9, 60)
    middles = random.standard_normal((9, 16))
    unit = middles[people] + random.standard_normal((60, 16))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    bins = in_bins(random.random(60), 3)
    assert np.bincount(bins).tolist() == [20, 20, 20]
    pairs = list(itertools.combinations(range(60), 2))
    impostor = sorted((float(unit[a] @ unit[b]) for a, b in pairs if people[a] != people[b]), reverse=True)
    limit = threshold(unit, people, 0.05)
    accepted = sum(cosine >= limit for cosine in impostor)
    alike = np.tile(unit[:1], (60, 1))
    assert threshold(alike, people, 0.05) > alike[0] @ alike[1], "equal cosines together or not at all"
    assert accepted / len(impostor) <= 0.05 < (accepted + 2) / len(impostor)
    for number, (count, missed, angle) in enumerate(lost(unit, people, bins, limit)):
        wanted = [float(unit[a] @ unit[b]) for a, b in pairs
                  if people[a] == people[b] and sorted((bins[a], bins[b])) == [0, number]]  # fmt: skip
        assert count == len(wanted) and missed == sum(cosine < limit for cosine in wanted)
        assert angle == pytest.approx(np.degrees(np.arccos(wanted)).mean(), abs=1e-3)


def test_orders_that_agree_and_one_that_does_not():
    """Photos whose features leave their person the more, the larger the value."""
    random = np.random.default_rng(1)
    people = np.repeat(np.arange(40), 10)
    values = random.random(400)
    middles = random.standard_normal((40, 32))
    units = []
    for strength in (1.5, 3.0):
        rows = middles[people] + strength * values[:, None] * random.standard_normal((400, 32))
        units.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    options = StressTruth(checkpoint=["a", "b"], stress=None, lfw=None, far=0.01)
    steep = ([0.0, 0.5, 1.0], [0.0, 0.0, 0.9], [0.0, 40.0, 90.0])
    flat = ([0.0, 0.5, 1.0], [0.0, 0.0, 0.3], [0.0, 10.0, 30.0])
    found = compare(units, people, values, [flat, steep], options)
    assert found["order of bins"][1] == pytest.approx(1) and found["all models"] > 0.8
    assert found["each model"][1] == pytest.approx(1)
    three = compare([*units, units[0]], people, values, [flat, steep, flat], options)
    assert three["models"] == pytest.approx(1)
    alone = compare(units, people, values, [None, None], options)
    assert alone.keys() == {"medians", "pairs", "real", "real angles", "order of bins"}
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1) and correlation([1, 2, 3], [1, 1, 1]) is None
