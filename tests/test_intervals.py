"""Intervals by person: against brute force, by simulation of people with their own difficulty, and their properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from verification import intervals, metrics
from verification.metrics import curve

FAR = 0.05


def people_with_difficulty(generator, count, meetings):
    """Pairs of `count` people, two genuine ones each: cosines, same, identities. Some people are hard to know again,
    and some look like others. `meetings`: how many impostor pairs each opens, or None, everybody with everybody."""
    hard, common = generator.normal(size=(2, count))
    genuine = np.repeat(np.arange(count), 2)
    if meetings is None:
        impostor = np.stack(np.triu_indices(count, 1), axis=1)
    else:
        impostor = generator.integers(count, size=(count * meetings, 2))
        impostor = impostor[impostor[:, 0] != impostor[:, 1]]
    cosines = np.concatenate(
        [
            0.6 - 0.12 * hard[genuine] + generator.normal(0, 0.12, len(genuine)),
            0.1 + 0.06 * common[impostor].sum(axis=1) + generator.normal(0, 0.1, len(impostor)),
        ]
    )
    identities = np.concatenate([np.stack([genuine, genuine], axis=1), impostor])
    return np.clip(cosines, -1, 1), identities[:, 0] == identities[:, 1], identities


def figures(cosines, same):
    counts = curve(cosines, same)
    rate = np.mean(metrics.worst_scores(cosines, same)[~same] >= 0.38)
    return metrics.operating_point(counts, FAR).tar, metrics.equal_error_rate(counts), float(rate)


@pytest.mark.parametrize(("count", "meetings"), [(150, 1), (30, None)])
def test_coverage(count, meetings):
    """Of the intervals of 95 %, nearly that many hold the figure of all mankind; the binomial ones hold it less often
    where everybody meets everybody."""
    generator = np.random.default_rng(3)
    mankind = [people_with_difficulty(generator, 3000 if meetings else 300, meetings) for _ in range(3)]
    truth = np.mean([figures(cosines, same) for cosines, same, _ in mankind], axis=0)
    hits, binomial, worlds = np.zeros(3), np.zeros(2), 60
    for world in range(worlds):
        cosines, same, identities = people_with_difficulty(generator, count, meetings)
        found = intervals.pair_intervals(
            cosines, same, identities, far_levels=[FAR], eer=True, replicates=100, seed=world
        )
        wrong = intervals.pair_intervals(
            cosines[~same],
            same[~same],
            identities[~same],
            correct=cosines[~same] < 0.38,
            replicates=100,
            seed=world,
        ).accuracy
        bounds = [(found.tar[FAR].low, found.tar[FAR].high), (found.eer.low, found.eer.high)]
        bounds.append((1 - wrong.high, 1 - wrong.low))
        hits += [low <= value <= high for (low, high), value in zip(bounds, truth, strict=True)]
        point = metrics.operating_point(curve(cosines, same), FAR)
        accepted = int((cosines[~same] >= 0.38).sum())
        pairs = point.tar_interval, metrics.binomial_interval(accepted, int((~same).sum()))
        binomial += [low <= value <= high for (low, high), value in zip(pairs, truth[[0, 2]], strict=True)]
    # Of 60 intervals that each hold with probability 0.95 fewer than 51 do with probability 0.001.
    assert (hits >= 51).all(), hits / worlds
    assert (hits[[0, 2]] >= binomial).all()
    assert meetings or binomial.min() < 51


def test_intervals_do_not_exaggerate():
    """Where every person is in one pair alone nothing is shared, and the interval is that of independent pairs."""
    generator = np.random.default_rng(0)
    people = np.arange(4000).reshape(-1, 2)
    wrong = generator.random(2000) < 0.1
    found = intervals.pair_intervals(
        np.zeros(2000), np.zeros(2000, bool), people, correct=~wrong, replicates=500
    ).accuracy
    low, high = metrics.binomial_interval(int((~wrong).sum()), 2000)
    assert found.high - found.low == pytest.approx(high - low, rel=0.25)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3]))
@settings(max_examples=25)
def test_weights_are_repetitions(seed, far):
    """A replicate is the figure of the set in which every pair stands as often as its weight says."""
    generator = np.random.default_rng(seed)
    identities = generator.integers(8, size=(60, 2))
    identities[:20, 1] = identities[:20, 0]
    same = identities[:, 0] == identities[:, 1]
    cosines = generator.integers(-4, 9, 60) / 8  # with ties
    cosines[generator.random(60) < 0.05] = np.nan
    people = intervals._People.of_pairs(identities, same)
    drawn = intervals.multiplicities(8, 5, generator)
    assert (drawn.sum(axis=0) == 8).all()
    weights = people.weights(0, drawn)
    scores = metrics.worst_scores(cosines, same)
    tar = intervals._TarAtFar(scores, same, [far])(weights)[0]
    eer = intervals._Eer(scores, same)(weights)[0]
    number = np.unique(identities, return_inverse=True)[1]
    for replicate in range(5):
        pair_weight = [drawn[a, replicate] * (1 if a == b else drawn[b, replicate]) for a, b in number.reshape(-1, 2)]
        rows = np.repeat(np.arange(60), pair_weight)
        if not same[rows].any() or same[rows].all():
            continue
        counts = curve(cosines[rows], same[rows])
        assert eer[replicate] == pytest.approx(metrics.equal_error_rate(counts))
        point = metrics.operating_point(counts, far)
        if point.resolved:
            assert tar[replicate] == pytest.approx(point.tar)


def test_result_intervals_hold_the_figures():
    generator = np.random.default_rng(5)
    cosines, same, identities = people_with_difficulty(generator, 100, 4)
    folds = np.arange(len(same)) % 5
    result = metrics.evaluate(cosines, same, folds, far_levels=(0.1, 0.01, 1e-6))
    names = np.array([f"person {number:03d}" for number in range(100)])[identities]
    found = intervals.result_intervals(result, names, replicates=100)
    sizes = np.bincount(folds)
    assert found.accuracy.value == pytest.approx(np.average([fold.accuracy for fold in result.folds], weights=sizes))
    assert found.eer.value == pytest.approx(result.eer)
    assert list(found.tar) == [0.1, 0.01]  # 1e-6 is not resolved
    assert [found.tar[p.far].value for p in result.points[:2]] == pytest.approx([p.tar for p in result.points[:2]])
    for interval in (found.accuracy, found.eer, *found.tar.values()):
        assert 0 <= interval.low < interval.value < interval.high <= 1
    again = intervals.result_intervals(result, identities, replicates=100)
    assert again == found  # names or numbers, the same seed: the same
    order = generator.permutation(len(same))
    result = metrics.evaluate(cosines[order], same[order], folds[order], far_levels=(0.1, 0.01))
    moved = intervals.result_intervals(result, identities[order], replicates=100)
    assert moved.eer.low == pytest.approx(found.eer.low, abs=0.02)


def test_no_error_is_no_certainty():
    """Without an error every person is one trial: the rule of three."""
    found = intervals.rate_interval(np.ones(500), np.repeat(np.arange(50), 10), replicates=50)
    assert found.value == found.high == 1 and found.low == pytest.approx(metrics.binomial_interval(50, 50)[0])
    nothing = intervals.rate_interval(np.zeros(500), np.repeat(np.arange(50), 10), replicates=50)
    assert nothing.low == 0 and nothing.high == pytest.approx(1 - found.low)


def test_people_who_are_all_alike_are_no_certainty():
    """Their rates differ by rounding alone."""
    for each, hits in ((3, 2), (10, 9), (7, 3)):
        right = ([1] * hits + [0] * (each - hits)) * 10
        found = intervals.rate_interval(right, np.repeat(range(10), each))
        assert 0 <= found.low < hits / each - 0.1 and hits / each + 0.05 < found.high <= 1


def test_probes_of_one_person_are_one_trial():
    """Ten probes of one person that all share one fate tell no more than one."""
    generator = np.random.default_rng(1)
    fate = generator.random(200) < 0.8
    once = intervals.rate_interval(fate, np.arange(200), replicates=400)
    ten = intervals.rate_interval(np.repeat(fate, 10), np.repeat(np.arange(200), 10), replicates=400)
    assert ten.high - ten.low == pytest.approx(once.high - once.low, rel=0.02)


def test_detection_intervals():
    generator = np.random.default_rng(2)
    mates = np.where(generator.random(300) < 0.1, -np.inf, generator.normal(0.6, 0.15, 300))
    others = generator.normal(0.3, 0.1, 400)
    found = intervals.detection_intervals(
        mates, np.arange(300) % 60, others, 100 + np.arange(400) % 80, [0.1, 0.01], replicates=200
    )
    for far, interval in found.items():
        threshold = np.sort(others)[::-1][int(400 * far)]
        assert interval.value == pytest.approx(np.mean(mates > threshold))
        assert interval.low < interval.value < interval.high
    assert found[0.01].high - found[0.01].low > found[0.1].high - found[0.1].low


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (40, 61)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert intervals.mcnemar(only_a, only_b) == pytest.approx(expected)


def test_comparison_of_two_models():
    """The better model is told from the worse, a model from itself is not, and swapping them swaps the sign."""
    generator = np.random.default_rng(4)
    cosines, same, identities = people_with_difficulty(generator, 200, 5)
    good = (cosines >= 0.38) == same
    bad = good & (generator.random(len(same)) > 0.05)
    found = intervals.compare(good, bad, same, identities, replicates=500)
    assert found.difference == pytest.approx(good.mean() - bad.mean())
    assert 0 < found.low < found.difference < found.high
    assert found.p_identity < 0.01
    swapped = intervals.compare(bad, good, same, identities, replicates=500)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    itself = intervals.compare(good, good, same, identities, replicates=100)
    assert itself.difference == itself.low == itself.high == 0 and itself.p_identity == 1
    tars = [intervals.compare_tars(*pair, same, identities, [0.01], replicates=200)[0.01]
            for pair in ((cosines, cosines - 0.2 * same), (cosines, cosines))]  # fmt: skip
    assert 0 < tars[0].low < tars[0].difference and tars[0].p_identity < 0.05
    assert tars[1].difference == tars[1].low == tars[1].high == 0 and tars[1].p_identity == 1


def test_the_paired_test_keeps_its_level():
    """Two models of equal worth are told apart in about one world of twenty, though people share their errors."""
    generator = np.random.default_rng(8)
    told, worlds = 0, 100
    for world in range(worlds):
        person = np.repeat(np.arange(80), 5)
        right = [generator.random(400) < (0.9 - 0.4 * (generator.random(80) < 0.2))[person] for _ in range(2)]
        same, people = np.ones(400, bool), np.stack([person, person], axis=1)
        told += intervals.compare(*right, same, people, replicates=200, seed=world).p_identity < 0.05
    assert told <= 12  # more than 12 of 100 at a rate of 0.05: probability 0.001


def test_the_p_value_is_that_of_the_interval():
    """A winner is not called where the interval holds no difference; equally good models of few people."""
    generator = np.random.default_rng(4)
    below, around = 0, 0
    for _ in range(40):
        genuine = np.repeat(np.arange(12), 5)[:, None].repeat(2, 1)
        identities = np.concatenate([genuine, generator.integers(12, size=(60, 2))])
        identities = identities[(np.arange(120) < 60) | (identities[:, 0] != identities[:, 1])]
        same = identities[:, 0] == identities[:, 1]
        hard = generator.normal(size=12)[identities].sum(1) > 1.5
        right = [generator.random(len(same)) < np.where(hard, 0.6, 0.95) for _ in range(2)]
        found = intervals.compare(*right, same, identities, replicates=200)
        if found.p_identity < 0.05:
            below += 1
            around += found.low <= 0 <= found.high
    assert around <= 1 and below <= 10


def test_the_comparison_of_tars_keeps_its_level():
    """Also where both thresholds hang on a few impostor pairs: taken as given, every other world would tell the models
    apart."""
    generator = np.random.default_rng(5)
    people = np.arange(1200).reshape(-1, 2)
    same = np.arange(1200) % 2 == 0
    identities = np.repeat(people, 2, axis=0)
    identities[same, 1] = identities[same, 0]
    told = held = 0
    for world in range(60):
        models = [np.where(same, 0.4, 0.0) + 0.15 * generator.normal(size=1200) for _ in range(2)]
        found = intervals.compare_tars(*models, same, identities, [0.005], replicates=200, seed=world)[0.005]
        told += found.p_identity < 0.05
        held += found.low <= 0 <= found.high
    assert told <= 8 and held >= 52  # at a rate of 0.05, more than 8 of 60: probability 0.004


def test_identities_have_to_fit():
    with pytest.raises(ValueError, match="identities do not fit"):
        intervals.pair_intervals([0.5], [True], [["a", "b"]], correct=[True])


def test_many_pairs_are_pairs(monkeypatch):
    """Drawing only the pairs near the threshold gives the intervals of drawing all."""
    generator = np.random.default_rng(6)
    cosines, same, identities = people_with_difficulty(generator, 150, None)
    every = intervals.pair_intervals(cosines, same, identities, far_levels=[0.1, 0.01], replicates=400)
    many = intervals.ManyPairs(*identities.T, same, replicates=400).tar_intervals(cosines, [0.1, 0.01])
    for far, interval in every.tar.items():
        assert many[far].value == interval.value
        assert (many[far].low, many[far].high) == pytest.approx((interval.low, interval.high), abs=0.01)
    monkeypatch.setattr(intervals.ManyPairs, "_APART", 0)
    wider = intervals.ManyPairs(*identities.T, same, replicates=400).tar_intervals(cosines, [0.1, 0.01])
    for far, interval in every.tar.items():
        assert wider[far].value == interval.value
        assert 0.9 < (wider[far].high - wider[far].low) / (interval.high - interval.low) < 1.5
