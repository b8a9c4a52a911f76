"""All pairs of photos, block by block, against the same figures from a sorted list of every score."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import InputError
from verification import all_pairs
from verification.all_pairs import AllPairs, Side, people_needed, summarise
from verification.intervals import pair_intervals
from verification.metrics import curve, equal_error_rate, operating_point

FARS = (0.1, 0.01, 0.001)


def people(seed, count=12, photos=5, dim=6, noise=0.6):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), photos)
    vectors = generator.normal(size=(count, dim))[labels] + noise * generator.normal(size=(count * photos, dim))
    return Side(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels)


def scores_of(first, second=None):
    """(cosines, same) of every pair, one at a time; a missing photo of one person is NaN, of two people left out."""
    other = first if second is None else second
    cosines, same = [], []
    for i, j in itertools.product(range(len(first.labels)), range(len(other.labels))):
        if second is None and j <= i:
            continue
        score = float(np.clip(first.embeddings[i] @ other.embeddings[j], -1, 1))
        if not np.isnan(score) or first.labels[i] == other.labels[j]:
            cosines.append(score)
            same.append(first.labels[i] == other.labels[j])
    return np.array(cosines), np.array(same)


def check(first, second=None, fars=FARS):
    found = summarise(AllPairs(first, second, quiet=True), fars, replicates=20)
    cosines, same = scores_of(first, second)
    counts = curve(cosines, same)
    for point in found.points:
        expected = operating_point(counts, point.far)
        assert point.resolved == expected.resolved
        if point.resolved:
            assert point.false_accepts == expected.false_accepts
            assert point.true_accepts / point.genuine == expected.tar
            assert point.threshold == pytest.approx(expected.threshold, abs=1e-12)
            assert point.tar_by_person.low <= expected.tar <= point.tar_by_person.high
    assert found.eer == pytest.approx(equal_error_rate(counts), abs=1e-12)
    return found


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 4), st.floats(0.0, 2.0))
def test_as_a_sorted_list_of_all_scores(seed, count, photos, noise):
    check(people(seed, count, photos, noise=noise))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_change_nothing(block, monkeypatch):
    monkeypatch.setattr(all_pairs, "BLOCK", block)
    check(people(3))


def test_ties_pass_or_fail_together():
    side = people(5)
    check(Side(np.round(side.embeddings[:, :2]) @ np.eye(2) / 2, side.labels))


def test_photos_without_a_face_are_rejections_and_no_impostors():
    side = people(7)
    side.embeddings[[3, 20]] = np.nan
    pairs = AllPairs(side, quiet=True)
    assert (pairs.genuine, pairs.genuine_lost) == (12 * 10 - 8, 8) and pairs.impostors == 58 * 57 // 2 - pairs.genuine
    check(side)


def test_gallery_and_probes():
    everybody = people(9)
    gallery = Side(everybody.embeddings[::5], everybody.labels[::5])
    others = np.flatnonzero(np.arange(60) % 5)
    probes = Side(everybody.embeddings[others], everybody.labels[others] + (everybody.labels[others] > 8) * 100)
    check(gallery, probes)


def test_the_worst_pairs_are_named():
    side = people(11)
    found = check(side)
    cosines, same = scores_of(side)
    assert [pair.cosine for pair in found.nearest_impostors] == pytest.approx(np.sort(cosines[~same])[::-1][:100])
    assert [pair.cosine for pair in found.farthest_genuine] == pytest.approx(np.sort(cosines[same])[:100])
    pair = found.nearest_impostors[0]
    assert side.embeddings[pair.first] @ side.embeddings[pair.second] == pytest.approx(pair.cosine)


def test_one_kind_of_pairs_is_refused():
    for labels in (np.zeros(4, int), np.arange(4)):
        with pytest.raises(InputError, match="it takes both kinds"):
            summarise(AllPairs(Side(np.eye(4), labels), quiet=True))


def test_a_part_of_the_pairs_gives_nearly_the_same_intervals(monkeypatch):
    side = people(13, count=60, photos=6, noise=0.9)
    whole = summarise(AllPairs(side, quiet=True), (0.05,), replicates=300).points[0]
    monkeypatch.setattr(all_pairs, "SAMPLE", 2000)
    part = summarise(AllPairs(side, quiet=True), (0.05,), replicates=300).points[0]
    assert (part.threshold, part.true_accepts) == (whole.threshold, whole.true_accepts)
    for name in ("low", "high"):
        assert getattr(part.tar_by_person, name) == pytest.approx(getattr(whole.tar_by_person, name), abs=0.03)


def test_intervals_cover_the_truth():
    """The TAR at a FAR of a hundred sets of people is in the interval about as often as it says."""
    truth = summarise(AllPairs(people(1, 400, 4, noise=0.9), quiet=True), (0.02,), replicates=2).points[0]
    rate, inside = truth.true_accepts / truth.genuine, 0
    for seed in range(100, 160):
        point = summarise(AllPairs(people(seed, 30, 4, noise=0.9), quiet=True), (0.02,), replicates=200).points[0]
        inside += point.tar_by_person.low <= rate <= point.tar_by_person.high
    assert inside >= 52  # of 60; a coverage of 95 % gives less once in 70 times


def test_the_interval_of_the_equal_error_rate_is_that_of_a_list_of_pairs(monkeypatch):
    side = people(17, count=24, photos=4, noise=1.0)
    found = summarise(AllPairs(side, quiet=True), (), replicates=200)
    cosines, same = scores_of(side)
    sides = np.array([side.labels[list(pair)] for pair in itertools.combinations(range(len(side.labels)), 2)])
    listed = pair_intervals(cosines, same, sides, eer=True, replicates=200).eer
    assert found.eer_by_person.value == found.eer == pytest.approx(listed.value)
    assert found.eer_by_person.high - found.eer_by_person.low > 0.02
    monkeypatch.setattr(all_pairs, "SAMPLE", 1500)
    part = summarise(AllPairs(side, quiet=True), (), replicates=200).eer_by_person
    for name in ("low", "high"):
        assert getattr(found.eer_by_person, name) == pytest.approx(getattr(listed, name), abs=0.01)
        assert getattr(part, name) == pytest.approx(getattr(listed, name), abs=0.03)


def test_how_many_more_people():
    found = people_needed(1e-3, 20, 190 * 4)  # two photos each: 4 pairs of any two people
    assert found["more_people_to_resolve"] == 3  # 23 people make 253 * 4 = 1012 pairs, 22 only 924
    assert found["more_people_to_trust"] == 123 - 20  # 123 * 122 / 2 * 4 = 30,012
    assert people_needed(1e-2, 20, 190 * 4)["more_people_to_resolve"] == 0
