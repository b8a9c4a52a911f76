"""Figures of verification against brute force, hand-computed cases and properties; sets of pairs against damage."""

import dataclasses
import itertools
import json
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import models
from embedding import Embedder, Preprocessing
from formats import cached, verification_bin
from utils import InputError
from verification import features, metrics, sets
from verification.metrics import curve, evaluate

UNHURRIED = settings(deadline=None)  # a busy machine is not an error

# Few distinct values, so that ties happen; their midpoints are exact in binary.
COSINES = st.integers(-32, 32).map(lambda value: value / 32)


@st.composite
def scored_pairs(draw, *, missing=False, both_kinds=True):
    count = draw(st.integers(4, 40))
    cosines = draw(hnp.arrays(np.float64, count, elements=COSINES))
    same = draw(hnp.arrays(bool, count))
    if both_kinds:
        same[:2] = True, False
    if missing:
        cosines[draw(hnp.arrays(bool, count))] = np.nan
        cosines[:2] = draw(hnp.arrays(np.float64, 2, elements=COSINES))
    return cosines, same


def brute_accuracies(cosines, same):
    """Accuracy of every threshold that could matter, by counting pair by pair."""
    values = sorted({c for c in cosines if not math.isnan(c)})
    thresholds = [-2.0, *((a + b) / 2 for a, b in itertools.pairwise(values)), 2.0]
    table = []
    for threshold in thresholds:
        correct = 0
        for cosine, one_person in zip(cosines, same, strict=True):
            if not math.isnan(cosine):
                correct += (cosine >= threshold) == one_person
        table.append((correct / len(same), threshold))
    return table


@UNHURRIED
@given(scored_pairs(missing=True))
def test_best_threshold_is_the_best_of_all(pairs):
    cosines, same = pairs
    threshold, correct = metrics.best_threshold(cosines, same)
    best = max(accuracy for accuracy, _ in brute_accuracies(cosines, same))
    assert correct / len(same) == pytest.approx(best)
    assert metrics.accuracy_at(threshold, cosines, same) == pytest.approx(best)
    strictest = max(t for accuracy, t in brute_accuracies(cosines, same) if accuracy == best)
    assert threshold == pytest.approx(np.clip(strictest, -1, 1))


@UNHURRIED
@given(scored_pairs(missing=True))
def test_area_is_the_mann_whitney_statistic(pairs):
    cosines, same = pairs
    scores = metrics.worst_scores(cosines, same)
    genuine, impostor = scores[same], scores[~same]
    wins = (genuine[:, None] > impostor).sum() + 0.5 * (genuine[:, None] == impostor).sum()
    area = metrics.area_under_curve(curve(cosines, same))
    assert area == pytest.approx(wins / (len(genuine) * len(impostor)))
    statistic = stats.mannwhitneyu(genuine, impostor).statistic
    assert area == pytest.approx(statistic / (len(genuine) * len(impostor)))


@UNHURRIED
@given(scored_pairs(missing=True), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_operating_point_is_the_laxest_within_its_rate(pairs, far):
    cosines, same = pairs
    point = metrics.operating_point(curve(cosines, same), far)
    impostors = int((~same).sum())
    rates = []
    for _, threshold in brute_accuracies(cosines, same):
        accepted = metrics.worst_scores(cosines, same) >= threshold
        if accepted[~same].sum() <= far * impostors:
            rates.append(accepted[same].mean())
    assert point.resolved == (far * impostors >= 1 and bool(rates))
    if not point.resolved:
        assert point.tar is None and point.threshold is None
        return
    assert point.tar == pytest.approx(max(rates))
    accepted = metrics.worst_scores(cosines, same) >= point.threshold
    assert accepted[~same].sum() == point.false_accepts
    assert accepted[same].mean() == pytest.approx(point.tar)
    assert point.far_interval[0] <= point.false_accepts / impostors <= point.far_interval[1]


@UNHURRIED
@given(scored_pairs(missing=True))
def test_equal_error_rate_lies_where_the_rates_cross(pairs):
    cosines, same = pairs
    counts = curve(cosines, same)
    rate = metrics.equal_error_rate(counts)
    far = np.concatenate([[0.0], counts.far, [1.0]])
    frr = 1 - np.concatenate([[0.0], counts.tar, [1.0]])
    # On a polyline from (0, 1) to (1, 0) the crossing is unique: no corner is better, or worse, in both rates.
    assert not ((far < rate - 1e-12) & (frr < rate - 1e-12)).any()
    assert not ((far > rate + 1e-12) & (frr > rate + 1e-12)).any()


def figures_of(cosines, same):
    folds = sets.contiguous_folds(len(same), 4)
    result = evaluate(cosines, same, folds)
    points = [(p.resolved, p.tar, p.false_accepts) for p in result.points]
    return result.best_accuracy, result.auc, result.eer, points


@UNHURRIED
@given(scored_pairs())
def test_monotone_transforms_change_no_rate(pairs):
    cosines, same = pairs
    original = figures_of(cosines, same)
    for transformed in (cosines**3, 1 - metrics.to_angle(cosines) / 90, np.tanh(3 * cosines)):
        # Cubes and angles keep distinct values distinct here, and equal ones equal.
        best, auc, eer, points = figures_of(transformed, same)
        assert best == original[0]
        assert auc == pytest.approx(original[1])
        assert eer == pytest.approx(original[2])
        assert points == original[3]


@UNHURRIED
@given(scored_pairs(missing=True), st.randoms(use_true_random=False))
def test_order_of_pairs_changes_nothing_but_folds(pairs, random):
    cosines, same = pairs
    order = list(range(len(same)))
    random.shuffle(order)
    assert figures_of(cosines, same) == figures_of(cosines[order], same[order])


@UNHURRIED
@given(scored_pairs())
def test_swapping_the_kinds_mirrors_area_and_equal_error_rate(pairs):
    cosines, same = pairs
    there, back = curve(cosines, same), curve(-cosines, ~same)
    assert metrics.area_under_curve(there) == pytest.approx(metrics.area_under_curve(back))
    assert metrics.equal_error_rate(there) == pytest.approx(metrics.equal_error_rate(back))


@UNHURRIED
@given(scored_pairs(missing=True), st.integers(2, 6))
def test_folds_are_judged_by_the_threshold_of_the_others(pairs, number):
    cosines, same = pairs
    fold_of = sets.contiguous_folds(len(same), number)
    folds = metrics.k_fold(cosines, same, fold_of)
    assert len(folds) == min(number, len(same))
    for index, fold in enumerate(folds):
        rest = fold_of != index
        candidates = brute_accuracies(cosines[rest], same[rest])
        best = max(accuracy for accuracy, _ in candidates)
        chosen = max(t for accuracy, t in candidates if accuracy == best)
        correct = [not math.isnan(c) and (c >= chosen) == s for c, s in zip(cosines[~rest], same[~rest], strict=True)]
        assert fold.accuracy == pytest.approx(np.mean(correct))
        assert (fold.genuine, fold.impostors) == (same[~rest].sum(), (~same[~rest]).sum())


def test_hand_computed_case():
    #         genuine             impostor
    cosines = np.array([0.9, 0.8, 0.5, 0.3, 0.65, 0.4, 0.2, 0.1])
    same = np.array([True] * 4 + [False] * 4)
    result = evaluate(cosines, same, np.array([0, 1] * 4), far_levels=[0.25, 0.1])
    # Six of eight are right at 0.725, at 0.45 and at 0.25; the strictest is taken.
    assert result.best_accuracy == 0.75
    assert result.best_threshold == pytest.approx(0.725)
    # Genuine 0.9 and 0.8 beat four impostors each, 0.5 three, 0.3 two: 13 of 16.
    assert result.auc == pytest.approx(13 / 16)
    # At 0.45 one impostor of four is accepted and one genuine of four rejected.
    assert result.eer == pytest.approx(0.25)
    # At most one false accept: everything above 0.4.
    quarter, tenth = result.points
    assert (quarter.false_accepts, quarter.tar) == (1, 0.75)
    assert quarter.threshold == pytest.approx(0.45)
    assert not tenth.resolved
    assert "4 impostor pairs cannot resolve it; it takes at least 10" in result.notes[0]
    # The odd pairs 0.8, 0.3 | 0.4, 0.1 choose 0.6: right for 0.9 and 0.2, wrong for 0.5 and 0.65. The even pairs
    # 0.9, 0.5 | 0.65, 0.2 choose 0.775: wrong for 0.3 only.
    assert [fold.threshold for fold in result.folds] == pytest.approx([0.6, 0.775])
    assert [fold.accuracy for fold in result.folds] == [0.5, 0.75]
    assert result.kfold_mean == pytest.approx(0.625)
    assert result.kfold_std == pytest.approx(0.125)
    assert result.angles(True).max() == pytest.approx(math.degrees(math.acos(0.3)))


def test_pairs_without_a_face_are_wrong_at_every_threshold():
    cosines = np.array([0.9, np.nan, 0.1, np.nan])
    same = np.array([True, True, False, False])
    result = evaluate(cosines, same, np.array([0, 1, 0, 1]), far_levels=[0.5])
    assert result.best_accuracy == 0.5
    # The second fold has nothing to choose a threshold by, and nothing of it can be right.
    assert [fold.accuracy for fold in result.folds] == [0.5, 0.0]
    assert result.points[0].tar == 0.5 and result.points[0].false_accepts == 1
    report = result.to_json()
    assert report["pairs_without_face"] == {"genuine": 1, "impostor": 1}
    assert result.auc == 0.25


def test_perfect_and_inverted_models():
    same = np.array([True, False] * 20)
    perfect = evaluate(np.where(same, 0.8, 0.1), same, sets.contiguous_folds(40, 10))
    assert (perfect.kfold_mean, perfect.kfold_std, perfect.auc, perfect.eer) == (1.0, 0.0, 1.0, 0.0)
    assert perfect.best_threshold == pytest.approx(0.45)
    inverted = evaluate(np.where(same, 0.1, 0.8), same, sets.contiguous_folds(40, 10))
    assert (inverted.auc, inverted.eer, inverted.best_accuracy) == (0.0, 1.0, 0.5)
    constant = evaluate(np.full(40, 0.3), same, sets.contiguous_folds(40, 10))
    assert (constant.auc, constant.eer, constant.best_accuracy) == (0.5, 0.5, 0.5)
    assert constant.best_threshold == metrics.ACCEPT_NOTHING


def test_neighbouring_floats_are_told_apart():
    low = np.float64(0.5)
    cosines = np.array([np.nextafter(low, 1), low])
    threshold, correct = metrics.best_threshold(cosines, np.array([True, False]))
    assert correct == 2 and metrics.accuracy_at(threshold, cosines, np.array([True, False])) == 1


def test_one_kind_of_pairs_and_one_fold_give_notes_instead_of_figures():
    cosines = np.linspace(0, 1, 10)
    result = evaluate(cosines, np.ones(10, bool), sets.contiguous_folds(10, 10))
    assert result.kfold_mean is None and result.auc is None and result.points == []
    assert math.isnan(result.accuracy)
    assert "all 10 pairs are of one person" in result.notes[0]
    json.dumps(result.to_json(), allow_nan=False)
    single = evaluate(cosines, cosines > 0.4, np.zeros(10, int))
    assert single.folds == [] and single.kfold_mean is None
    assert single.accuracy == single.best_accuracy == 1
    assert "one fold only" in single.notes[0]


def test_all_pairs_missing_is_an_error():
    with pytest.raises(InputError, match="no pair of which both"):
        evaluate(np.full(4, np.nan), np.array([True, False] * 2), np.zeros(4, int))


def test_interval_is_clopper_and_pearson():
    # Fleiss, Statistical Methods for Rates and Proportions; also R's binom.test(3, 100).
    assert metrics.binomial_interval(3, 100) == pytest.approx((0.006229972, 0.08517605), rel=1e-6)
    assert metrics.binomial_interval(0, 100) == pytest.approx((0, 1 - 0.025 ** (1 / 100)))
    assert metrics.binomial_interval(100, 100) == pytest.approx((0.025 ** (1 / 100), 1))


@pytest.mark.parametrize(("pairs", "folds"), [(10, 3), (6000, 10), (4, 10), (23, 5)])
def test_contiguous_folds_are_those_of_kfold(pairs, folds):
    numbers = sets.contiguous_folds(pairs, folds)
    sizes = [len(part) for part in np.array_split(np.arange(pairs), min(folds, pairs))]
    assert np.array_equal(numbers, np.repeat(np.arange(len(sizes)), sizes))


# --- sets -----------------------------------------------------------------------------------------------------------


def encoded(value, side=112, suffix=".png"):
    image = np.random.default_rng(value).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(suffix, image)[1].tobytes(), image[..., ::-1]


@pytest.fixture
def network():
    return Embedder.from_network(models.build_network("mfn", embedding_size=16), "cpu", batch_size=4)


def test_bin_decodes_each_image_once_and_keeps_colours(tmp_path):
    (a, a_rgb), (b, _), (c, _) = (encoded(value) for value in range(3))
    path = tmp_path / "small.bin"
    verification_bin.write_bin(path, [a, b, a, c, b, c], [True, False, True])
    pairs = sets.open_set(path)
    assert pairs.crops.shape == (3, 112, 112, 3)
    assert np.array_equal(pairs.crops[0], a_rgb)
    assert pairs.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert pairs.same.tolist() == [True, False, True]
    assert pairs.folds.tolist() == [0, 1, 2]


def test_bin_of_other_sizes_is_resized_and_other_shapes_refused(tmp_path):
    path = tmp_path / "sizes.bin"
    verification_bin.write_bin(path, [encoded(0, 96)[0], encoded(1, 160)[0]], [True])
    assert sets.open_set(path).crops.shape == (2, 112, 112, 3)
    oblong = cv2.imencode(".png", np.zeros((112, 96, 3), np.uint8))[1].tobytes()
    verification_bin.write_bin(path, [encoded(0)[0], oblong], [True])
    with pytest.raises(InputError, match=r"sizes.bin: image 1 \(pair 0\).*96x112"):
        sets.open_set(path)


def test_damaged_bin_files_name_file_and_image(shared, tmp_path):
    folder = shared / "formats" / "verification_bin"
    for name, reason in {
        "bad_one_not_jpeg.bin": r"image \d \(pair \d\)",
        "bad_empty.bin": "no pairs",
        "bad_truncated.bin": "",
        "evil_os_system.bin": "",
    }.items():
        with pytest.raises(InputError, match=f"{name}.*{reason}"):
            sets.open_set(folder / name)
    cut = tmp_path / "cut.bin"
    whole = encoded(3, suffix=".jpg")[0]
    verification_bin.write_bin(cut, [whole, whole[: len(whole) // 2]], [True])
    with pytest.raises(InputError, match=r"cut.bin: image 1 \(pair 0\)"):
        sets.open_set(cut)


def test_verify_matches_the_embedding_by_hand(tmp_path, network):
    path = tmp_path / "four.bin"
    images = [encoded(value) for value in range(4)]
    verification_bin.write_bin(path, [data for data, _ in images], [True, False])
    result = features.verify(network, sets.open_set(path))
    raw = network.features(np.stack([rgb for _, rgb in images])).astype(np.float64)
    embeddings = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    expected = (embeddings[0] @ embeddings[1], embeddings[2] @ embeddings[3])
    assert result.cosines == pytest.approx(expected, abs=1e-12)


def test_a_set_without_a_crop_is_named(tmp_path, network):
    path = tmp_path / "two.bin"
    verification_bin.write_bin(path, [encoded(0)[0], encoded(1)[0]], [True])
    pairs = dataclasses.replace(sets.open_set(path), missing={0: "no face found", 1: "no face found"})
    with pytest.raises(InputError, match="none of its 2 photos gives a crop"):
        features.verify(network, pairs)


PLAIN = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))


class BrokenModel:
    """Gives NaN for black crops and zero for white ones."""

    device = models.torch.device("cpu")

    def run(self, batch):
        mean = batch.mean(dim=(1, 2, 3))
        feature = batch.mean(dim=(2, 3))
        feature[mean < 0.01] = float("nan")
        feature[mean > 0.99] = 0
        return feature


@pytest.mark.parametrize("colour", [0, 255])
def test_features_without_direction_name_the_image(tmp_path, colour):
    embedder = Embedder(BrokenModel(), PLAIN, name="broken", sha256=None, engine="test")
    plain = cv2.imencode(".png", np.full((112, 112, 3), colour, np.uint8))[1].tobytes()
    path = tmp_path / "plain.bin"
    verification_bin.write_bin(path, [encoded(0)[0], encoded(1)[0], encoded(2)[0], plain], [True, False])
    with pytest.raises(InputError, match=r"broken .* 1 of 4 images; the first is image 3 \(pair 1\)"):
        features.verify(embedder, sets.open_set(path))


def test_features_are_taken_from_the_cache_only_for_the_same_model_and_crops(tmp_path):
    class Counting(BrokenModel):
        runs = 0

        def run(self, batch):
            self.runs += len(batch)
            return super().run(batch)

    path, cache = tmp_path / "pairs.bin", tmp_path / "cache"
    verification_bin.write_bin(path, [encoded(value)[0] for value in range(4)], [True, False])
    pairs = sets.open_set(path)
    model = Counting()
    embedder = Embedder(model, PLAIN, name="m", sha256="1" * 64, engine="test")
    first = features.verify(embedder, pairs, cache_dir=cache)
    assert model.runs == 8  # with mirror images
    again = features.verify(embedder, pairs, cache_dir=cache)
    assert model.runs == 8 and np.array_equal(first.cosines, again.cosines)
    features.verify(embedder.with_preprocessing(mirror=False), pairs, cache_dir=cache)
    assert model.runs == 12
    pairs.crops = pairs.crops[:]
    pairs.crops[0] ^= 1
    features.verify(embedder, pairs, cache_dir=cache)
    assert model.runs == 20


def test_no_flipped_bit_and_no_other_models_file_gets_from_the_cache_into_a_figure(tmp_path):
    path, cache = tmp_path / "pairs.bin", tmp_path / "cache"
    verification_bin.write_bin(path, [encoded(value)[0] for value in range(4)], [True, False])
    pairs = sets.open_set(path)
    models_ = [Embedder(BrokenModel(), PLAIN, name="m", sha256=digit * 64, engine="test") for digit in "12"]
    expected = [features.verify(model, pairs, cache_dir=cache).cosines for model in models_]
    first, second = sorted((cache / "features").iterdir())
    whole = first.read_bytes()
    damages = [
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)),
        whole[:-1],
        whole + b"\0",
        b"",
        second.read_bytes(),  # under the other's name
    ]
    for damage in damages:
        first.write_bytes(damage)
        for model, cosines in zip(models_, expected, strict=True):
            assert np.array_equal(features.verify(model, pairs, cache_dir=cache).cosines, cosines)
        assert first.read_bytes() == whole  # mended on the way


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        hnp.arrays(
            st.sampled_from(["u1", "?", "<i4", "<i8", "<f4", "<f8"]).map(np.dtype),
            hnp.array_shapes(min_dims=0, min_side=0),
        ),
        max_size=3,
    )
)
def test_cached_arrays_come_back_as_they_were(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("cache") / "a.cache"
    cached.write(path, "key", arrays)
    found = cached.read(path, "key")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert cached.read(path, "other key") is None


def test_folds_of_one_kind_give_no_accuracy_over_folds():
    """A list whose genuine pairs come first: nine of ten folds hold none."""
    rng = np.random.default_rng(0)
    same = np.arange(100) < 10
    cosines = np.where(same, 0.6, 0.1) + rng.normal(0, 0.1, 100)
    result = evaluate(cosines, same, np.repeat(np.arange(10), 10))
    assert result.kfold_mean is None and result.accuracy == result.best_accuracy
    assert any("10 of 10 folds hold pairs of one kind only: no accuracy" in note for note in result.notes)
    few = evaluate(cosines, same, np.where(np.arange(100) < 95, np.arange(100) % 5, 9))
    assert few.kfold_mean is not None
    assert any("1 of 6 folds hold pairs of one kind only: their" in note for note in few.notes)


def test_a_constant_network_is_told():
    same = np.arange(40) % 4 < 2
    folds = np.arange(40) // 4
    assert any("one feature for every crop" in note for note in evaluate(np.full(40, 0.3), same, folds).notes)
    assert not any("one feature" in note for note in evaluate(np.linspace(0, 0.1, 40), same, folds).notes)


def test_keys_tell_values_types_and_shapes_apart():
    array = np.arange(6, dtype=np.int32)
    parts = [array, array.reshape(2, 3), array.astype(np.int64), array.tobytes(), b"", "", None, 1, "1", ["a", "b"]]
    keys = [cached.key_of(part) for part in parts] + [cached.key_of("a", "b"), cached.key_of()]
    assert len(set(keys)) == len(keys)


def test_crops_of_a_set_are_decoded_when_they_are_wanted(tmp_path):
    path = tmp_path / "pairs.bin"
    images = [encoded(value)[0] for value in range(20)]
    verification_bin.write_bin(path, images, [True, False] * 5)
    pairs = sets.open_set(path)
    assert not isinstance(pairs.crops, np.ndarray)
    whole = pairs.crops[:]
    assert whole.shape == pairs.crops.shape == (20, 112, 112, 3)
    mask = np.arange(20) % 3 == 0
    for index in (3, -1, slice(2, 9, 3), [5, 5, 0], mask):
        assert np.array_equal(pairs.crops[index], whole[index])
    with pytest.raises(IndexError):
        pairs.crops[20]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_swapping_the_sides_of_a_pair_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    crops = rng.integers(1, 255, (6, 112, 112, 3), dtype=np.uint8)
    indices = rng.integers(0, 6, (8, 2))
    embedder = Embedder(BrokenModel(), PLAIN, name="m", sha256=None, engine="test")

    def cosines(order):
        pairs = sets.VerificationSet(
            name="s",
            crops=crops,
            names=[str(i) for i in range(6)],
            pairs=order,
            same=np.zeros(8, bool),
            folds=np.zeros(8, int),
            sha256="",
        )
        return features.verify(embedder, pairs).cosines

    assert np.array_equal(cosines(indices), cosines(indices[:, ::-1]))
