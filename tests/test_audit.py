"""The audit: centres and neighbours against plain arithmetic, faults that were put in, what training makes of it."""

import html
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import skimage.data
import torch
from helpers import ijb_tree
from helpers.training import jpegs, pair_set, record_set, write_audit

import audit
from auditing import decisions as decided
from auditing import duplicates, report, space
from auditing.centres import NEAREST, Centres, nearest_other, robust_centres, unit_rows
from auditing.duplicates import Duplicate
from auditing.findings import (
    DUPLICATE,
    KEEP,
    STRANGER,
    TEST,
    UNUSABLE,
    WRONG,
    Findings,
    Limits,
    PairFinding,
    chance_threshold,
    compare,
    find_faceless,
    find_merges,
    find_splits,
    judge_crops,
    person_limit,
    random_fit,
    score_threshold,
)
from auditing.measures import LEAST_SCORE, filled, look, reject_curve, resolution, sharpness
from auditing.space import Placed
from cropping.align import TEMPLATE, align_face
from formats import crop_sets, selection, tables
from retinaface import RetinaFace
from utils import InputError


def people(identities=300, dim=64, spread=1.2, seed=0, least=3, most=20):
    """Unit features [n, dim] of people who look different from photo to photo, and who they are."""
    random = np.random.default_rng(seed)
    middles = unit_rows(random.standard_normal((identities, dim)) + 0.3 * random.standard_normal(dim))
    truth = np.repeat(np.arange(identities), random.integers(least, most, identities))
    away = unit_rows(random.standard_normal((len(truth), dim))) * random.uniform(0.6, 1.6, (len(truth), 1))
    return unit_rows(middles[truth] + spread * away), truth


def exchanged(truth, share, seed=1):
    random = np.random.default_rng(seed)
    labels = truth.copy()
    some = random.permutation(len(truth))[: round(share * len(truth))]
    labels[some] = (labels[some] + random.integers(1, truth.max() + 1, len(some))) % (truth.max() + 1)
    return labels


def judged(features, labels, error_rate=0.05):
    identities = int(labels.max()) + 1
    made = compare(features, labels, identities, error_rate, 0.01)
    names = list(map(str, range(identities)))
    kinds, score, reasons = judge_crops(labels, made.centres, made.other, made.nearest, made.bounds, names)
    near = made.near_centre, made.near_cosine
    return made.centres, made.nearest, made.other, made.bounds, np.array(kinds), score, reasons, near, names


# --- centres and neighbours ------------------------------------------------------------------------------------------


def test_a_third_of_wrong_crops_does_not_move_a_centre():
    features, truth = people(100, least=6)
    clean = robust_centres(features, truth, 100)
    labels = exchanged(truth, 1 / 3)
    noisy = robust_centres(features, labels, 100)
    cosines = np.einsum("nd,nd->n", clean.centres, noisy.centres)
    assert np.median(cosines) > 0.95 and (cosines > 0.8).mean() > 0.95
    plain = np.stack([unit_rows(features[labels == label].sum(axis=0)[None])[0] for label in range(100)])
    assert np.median(cosines) > np.median(np.einsum("nd,nd->n", clean.centres, plain)) + 0.02
    assert noisy.trusted[labels == truth].mean() > 0.8 and noisy.trusted[labels != truth].mean() < 0.1


def test_own_leaves_the_crop_itself_out():
    features, truth = people(20, least=2, most=4)
    found = robust_centres(features, truth, 20)
    for index in range(len(truth)):
        mine = found.trusted & (truth == truth[index])
        mine[index] = False
        if not mine.any():
            assert np.isnan(found.own[index])
            continue
        centre = unit_rows(features[mine].sum(axis=0)[None])[0]
        assert found.own[index] == pytest.approx(float(features[index] @ centre), abs=1e-5)


def test_how_a_crop_fits_is_its_centre_and_its_nearest_other_crop(monkeypatch):
    features, truth = people(20, least=2, most=9)
    found = robust_centres(features, truth, 20)
    for index in np.flatnonzero(np.isfinite(found.own)):
        others = (truth == truth[index]) & (np.arange(len(truth)) != index)
        plain = (1 - NEAREST) * found.own[index] + NEAREST * (features[others] @ features[index]).max()
        weight = (found.trusted[others].sum() / (found.trusted[others].sum() + 1)) ** 0.5
        expected = weight * plain + (1 - weight) * found.typical
        assert found.fit[index] == pytest.approx(float(expected), abs=1e-5)
    assert (np.isnan(found.own) == np.isnan(found.fit)).all()
    monkeypatch.setattr("auditing.centres.MEDOID", 3)  # of large identities as many, and never the crop itself
    some = robust_centres(features, truth, 20).fit
    assert (some[np.isfinite(some)] <= 1 - 1e-4).all() and np.isnan(some).sum() == np.isnan(found.fit).sum()


def test_somebody_else_s_photos_fit_as_the_null_says():
    features, truth = people(spread=1.3)
    labels = exchanged(truth, 0.3)
    found = robust_centres(features, labels, 300)
    null = random_fit(features, labels, found, 0)
    wrong = found.fit[(labels != truth) & np.isfinite(found.fit)]
    assert len(null) > 20_000
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(wrong, quantile) == pytest.approx(np.quantile(null, quantile), abs=0.03)


def test_a_pair_of_rare_photos_is_no_pair_of_strangers():
    """A childhood photo is as far from the centre as a stranger, but not alone: only the stranger is called."""
    features, truth = people(200, spread=0.9, least=8)
    random = np.random.default_rng(5)
    rare = np.array([np.flatnonzero(truth == label)[:2] for label in range(0, 200, 2)])
    away = unit_rows(random.standard_normal((100, 64)))
    for pair, direction in zip(rare, away, strict=True):
        features[pair] = unit_rows(direction + 0.15 * features[pair] + 0.02 * random.standard_normal((2, 64)))
    labels = exchanged(truth, 0.1)
    labels[rare.ravel()] = truth[rare.ravel()]
    found = robust_centres(features, labels, 200)
    wrong = labels != truth
    assert np.median(found.own[rare]) < np.median(found.own[wrong]) + 0.2
    assert np.median(found.fit[rare]) > np.median(found.fit[wrong]) + 0.25


def test_an_identity_of_one_and_features_without_direction():
    features = np.array([[1, 0], [0, 1], [0, 0.9], [np.nan, 1], [0, 0]], np.float32)
    found = robust_centres(features, np.array([0, 1, 1, 1, 2]), 3)
    assert np.isnan(found.own[[0, 3, 4]]).all() and found.own[1] == found.own[2] == 1
    assert not found.centres[2].any() and found.trusted.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [(7, 5), (64, 1000)])
def test_the_nearest_other_is_exact_in_any_blocks(half, blocks, monkeypatch):
    monkeypatch.setattr("auditing.centres.BLOCK_CROPS", blocks[0])
    monkeypatch.setattr("auditing.centres.BLOCK_CENTRES", blocks[1])
    random = np.random.default_rng(3)
    # Many centres that half precision cannot tell apart, and some that are equal.
    base = unit_rows(random.standard_normal((6, 16)))
    centres = unit_rows(base[random.integers(0, 6, 60)] + 1e-4 * random.standard_normal((60, 16)))
    centres[40:50] = centres[10:20]
    rows, own = unit_rows(random.standard_normal((50, 16))), random.integers(-1, 60, 50)
    label, cosine = nearest_other(rows, own, centres, half=half)
    products = rows.astype(np.float64) @ centres.T.astype(np.float64)
    products[np.arange(50)[own >= 0], own[own >= 0]] = -2
    np.testing.assert_allclose(cosine, products.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(products[np.arange(50), label], products.max(axis=1), atol=2e-7)
    assert not np.isin(label, np.arange(40, 50))[~np.isin(own, np.arange(10, 20))].any()  # the smaller of equal ones


def test_without_another_identity_there_is_no_nearest():
    label, cosine = nearest_other(np.eye(2, dtype=np.float32), np.zeros(2, np.int64), np.eye(2, dtype=np.float32)[:1])
    assert label.tolist() == [-1, -1] and np.isnan(cosine).all()


# --- whitened within people -----------------------------------------------------------------------------------------


def uneven(identities=300, dim=64, spread=1.4, seed=0):
    """As `people`, but a person's photos differ along few directions, e^4 times as much along one as along another."""
    random = np.random.default_rng(seed)
    middles = unit_rows(random.standard_normal((identities, dim)))
    truth = np.repeat(np.arange(identities), random.integers(3, 20, identities))
    scale = np.exp(np.linspace(-2, 2, dim))
    away = random.standard_normal((len(truth), dim)) * scale / np.linalg.norm(scale)
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    return (middles[truth] + spread * away) @ turn * random.uniform(1, 30, (len(truth), 1)), truth


def test_whitened_people_vary_alike_in_all_directions(monkeypatch):
    features, truth = uneven(spread=0.5)
    monkeypatch.setattr(space, "ADDED", 0.0)
    placed = Placed(features, space.whitened(features, truth, 300))
    assert len(placed) == len(features) and placed.shape == features.shape
    trusted = robust_centres(placed, truth, 300).trusted
    scatter, freedom = space._scatter(placed[trusted], truth[trusted], 300, np.ones(trusted.sum(), bool))
    spectrum = np.linalg.eigvalsh(scatter / freedom)
    plain, freedom = space._scatter(unit_rows(features), truth, 300, np.ones(len(truth), bool))
    before = np.linalg.eigvalsh(plain / freedom)
    assert spectrum[-1] / spectrum[0] < 3 and before[-1] / before[0] > 300
    assert spectrum[-1] == pytest.approx(1, abs=0.1)  # less the share of dimensions in the degrees of freedom
    for index in (slice(3, 9), np.array([5, 2]), truth == 7):
        np.testing.assert_allclose(placed[index], placed[:][index], atol=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_whitening_finds_more_wrong_labels_among_people_who_vary_unevenly(share):
    features, truth = uneven()
    labels = exchanged(truth, share)
    recalls = []
    for rows in (features, Placed(features, space.whitened(features, labels, 300))):
        _, _, _, bounds, kinds, *_ = judged(rows, labels)
        called, wrong = np.isin(kinds, (WRONG, STRANGER)), labels != truth
        assert bounds.wrong_share == pytest.approx(share, abs=0.03)
        recalls.append((wrong & called).sum() / wrong.sum())
    assert (wrong & called).sum() / called.sum() > 0.92
    assert recalls[1] > max(0.95, recalls[0] + 0.02)


def test_the_space_is_the_one_that_finds_more():
    features, truth = uneven()
    chosen, tried = space.choose(features, exchanged(truth, 0.1), 300, 0.05, 0.01)
    assert chosen is not None and tried["whitened"] > tried["plain"]
    random = np.random.default_rng(0)  # what people differ in lies where their photos differ: whitening hides it
    middles = random.standard_normal((300, 64)) * np.exp(np.linspace(2, -2, 64))
    features = middles[truth] + 0.6 * random.standard_normal((len(truth), 64)) * np.exp(np.linspace(2, -2, 64))
    chosen, tried = space.choose(features, exchanged(truth, 0.1), 300, 0.05, 0.01)
    assert chosen is None and tried["whitened"] <= tried["plain"] + 2 * tried["plain"] ** 0.5


def test_a_sample_of_identities_is_enough_to_whiten(monkeypatch):
    features, truth = uneven(600, spread=0.5)
    whole = space.whitened(features, truth, 600)(features)
    monkeypatch.setattr(space, "SAMPLE", len(truth) // 2)
    part = space.whitened(features, truth, 600)(features)
    assert not np.array_equal(whole, part)
    assert np.einsum("nd,nd->n", unit_rows(whole), unit_rows(part)).min() > 0.9


def test_what_cannot_be_whitened_stays_as_it_is():
    features, truth = uneven(space.LEAST - 1)
    few = space.whitened(features, truth, space.LEAST - 1)
    np.testing.assert_array_equal(few(features), unit_rows(features))
    features, _ = uneven(40)
    alone = space.whitened(features[:40], np.arange(40), 40)  # nobody has two crops
    np.testing.assert_array_equal(alone(features), unit_rows(features))
    broken = np.concatenate([features, np.zeros((1, 64)), np.full((1, 64), np.nan)])
    truth = np.append(uneven(40)[1], [0, 1])
    placed = space.whitened(broken, truth, 40)(broken)
    assert np.isfinite(placed).all() and not placed[-2:].any() and placed[:-2].any(axis=1).all()


# --- findings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 1.5])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_exchanged_labels_are_found_at_the_error_rate_that_was_asked_for(share, spread):
    features, truth = people(spread=spread)
    labels = exchanged(truth, share)
    _, nearest, _, bounds, kinds, score, _, _, _ = judged(features, labels)
    wrong, called = labels != truth, np.isin(kinds, (WRONG, STRANGER))
    assert bounds.wrong_share == pytest.approx(share, abs=0.03)
    assert (wrong & called).sum() / called.sum() > 0.92  # no more than 5 % chance, and the noise of the estimate
    assert (wrong & called).sum() / wrong.sum() > 0.8
    assert (nearest[wrong] == truth[wrong]).mean() > 0.65
    assert score[wrong].min() > np.median(score[~wrong])


def test_a_clean_set_has_next_to_no_findings():
    features, truth = people(spread=0.8)
    _, _, _, bounds, kinds, _, _, (near, cosine), names = judged(features, truth)
    assert (kinds != KEEP).mean() < 0.005 and bounds.wrong_share < 0.02
    found = robust_centres(features, truth, 300)
    assert len(find_merges(features, truth, found, near, cosine, bounds, names)) <= 1
    assert len(find_splits(features, truth, found, bounds, names)) <= 1


def test_a_model_that_tells_nobody_apart_judges_no_crop():
    """Half of a set was called strangers by a network that had hardly been trained."""
    _, labels = people(100)
    features = unit_rows(np.random.default_rng(3).standard_normal((len(labels), 64)))
    *_, bounds, kinds, _, _, _, _ = judged(features, labels)
    assert bounds.wrong_share > 0.5 and not bounds.judges
    assert (kinds == KEEP).all()


def test_strangers_are_told_from_people_of_the_set():
    features, truth = people(spread=0.9)
    random = np.random.default_rng(5)
    strangers = unit_rows(random.standard_normal((150, 64)))
    features = np.concatenate([features, strangers])
    labels = np.concatenate([exchanged(truth, 0.05), random.integers(0, 300, 150)])
    kinds = judged(features, labels)[4]
    assert (kinds[-150:] == STRANGER).mean() > 0.8
    assert (kinds[:-150][labels[:-150] != truth] == WRONG).mean() > 0.9


def test_split_and_merged_people_are_found():
    features, truth = people(spread=0.8, least=8)
    labels = truth.copy()
    parted, joined = np.arange(0, 20), np.arange(100, 140, 2)
    for number, label in enumerate(parted):
        labels[np.flatnonzero(truth == label)[::2]] = 300 + number
    for label in joined:
        labels[truth == label + 1] = label
    _, labels = np.unique(labels, return_inverse=True)
    found, _, _, bounds, _, _, _, (near, cosine), names = judged(features, labels)
    pairs = {
        (pair.first, int(pair.second)) for pair in find_merges(features, labels, found, near, cosine, bounds, names)
    }
    truly = {
        (int(labels[np.flatnonzero(truth == label)[1]]), int(labels[np.flatnonzero(truth == label)[0]]))
        for label in parted
    }
    assert len(pairs & truly) >= 18 and len(pairs - truly) <= 2
    splits = {pair.first for pair in find_splits(features, labels, found, bounds, names)}
    mixed = {int(labels[np.flatnonzero(truth == label)[0]]) for label in joined}
    assert len(splits & mixed) >= 17 and len(splits - mixed) <= 2


def test_one_wrong_crop_of_two_does_not_make_two_people_one():
    features, truth = people(1000, dim=256, spread=0.8)
    labels, kept = truth.copy(), np.ones(len(truth), bool)
    for label in range(0, 60, 2):  # two crops each, one of them of somebody who has many
        mine = np.flatnonzero(truth == label)
        kept[mine[1:]] = False
        labels[np.flatnonzero(truth == label + 1)[0]] = label
    for label in range(100, 120):  # and whoever really has two labels, of two crops
        labels[np.flatnonzero(truth == label)[:2]] = 900 + label
    features, labels = features[kept], labels[kept]
    found, _, _, bounds, _, _, _, (near, cosine), names = judged(features, labels)
    pairs = {
        (pair.first, int(pair.second)) for pair in find_merges(features, labels, found, near, cosine, bounds, names)
    }
    truly = {(label, 900 + label) for label in range(100, 120)}
    assert sum(cosine[0:60:2] >= bounds.merge_limit) >= 5  # centres alone would have called them one
    assert len(pairs & truly) >= 12 and len(pairs - truly) <= 2


def test_the_limit_for_people_of_a_test_set_keeps_its_false_alarm_rate():
    features, truth = people(600, spread=1.0)
    inside = truth < 300
    found = robust_centres(features[inside], truth[inside], 300)
    limit, from_ = person_limit(features[inside], truth[inside], found, 3, 0.01)
    assert from_ > 250
    outside = [unit_rows(features[truth == label][:3].sum(axis=0)[None])[0] for label in range(300, 600)]
    best = (np.stack(outside) @ found.centres.T).max(axis=1)
    assert (best >= limit).mean() < 0.04
    same = [unit_rows(features[truth == label][-3:].sum(axis=0)[None])[0] for label in range(300)]
    assert ((np.stack(same) @ found.centres.T).max(axis=1) >= limit).mean() > 0.95


def test_thresholds_of_sets_that_say_nothing():
    nothing = np.array([], np.float32)
    assert score_threshold(nothing, nothing, nothing, nothing, 0.05) == (np.inf, 0.0)
    assert chance_threshold(np.full(3, 0.5), 0.05) == np.inf
    assert chance_threshold(np.full(100, 0.5), 0.05) > 0.5  # all alike: nobody is conspicuous
    assert 0.45 < chance_threshold(np.append(np.random.default_rng(0).gumbel(0.3, 0.03, 500), 0.9), 0.05) <= 0.9


# --- the same photo twice ---------------------------------------------------------------------------------------------


def variants(rgb, how):
    if how == "encoded":
        data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
        return cv2.imdecode(data, cv2.IMREAD_COLOR)
    if how == "resized":
        return cv2.resize(cv2.resize(rgb, (80, 80), interpolation=cv2.INTER_AREA), (112, 112))
    return rgb[:, ::-1].copy()


@pytest.mark.parametrize("how", ["encoded", "resized", "mirrored"])
def test_changed_photos_are_found_among_faces(shared, how):
    crops = crop_sets.open_training_set(shared / "faces")
    pictures = [
        cv2.imdecode(np.frombuffer(crops.read(index)[0], np.uint8), cv2.IMREAD_COLOR) for index in range(0, 1500, 3)
    ]
    copied = np.random.default_rng(0).permutation(500)[:80]
    pictures += [variants(pictures[index], how) for index in copied]
    encoded = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    thumbs = np.stack([duplicates.thumbnail(picture) for picture in pictures])
    found = duplicates.find_duplicates(thumbs, lambda index: (encoded[index], pictures[index]))
    pairs = {(pair.first, pair.second) for pair in found if pair.second >= 500}
    truly = {(int(index), 500 + place) for place, index in enumerate(copied)}
    assert len(pairs & truly) >= 78
    assert all(
        pair.how == ("mirrored" if how == "mirrored" else "encoded again") for pair in found if pair.second >= 500
    )


def test_bytes_that_are_equal_are_called_identical():
    rgb = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    assert duplicates.compare((b"a", rgb), (b"a", rgb), False) == ("identical", 1.0)
    assert duplicates.compare((b"a", rgb), (b"b", rgb), False)[0] == "encoded again"
    assert duplicates.compare((b"a", rgb), (b"b", rgb[:, ::-1]), True)[0] == "mirrored"
    other = np.random.default_rng(1).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    assert duplicates.compare((b"a", rgb), (b"b", other), False) is None
    grey = np.full((112, 112, 3), 127, np.uint8)
    assert duplicates.compare((b"a", grey), (b"b", grey), False) is None  # two empty pictures are no photo twice


def test_many_crops_of_one_code_stay_linear():
    first, second = duplicates._sharing(np.zeros(1000, np.int64))
    assert len(first) <= 1000 * duplicates.LARGEST_BUCKET and (first != second).all()


# --- quality ----------------------------------------------------------------------------------------------------------


def test_signs_of_quality():
    sharp = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    assert sharpness(sharp) > sharpness(cv2.GaussianBlur(sharp, (0, 0), 3)) + 2
    for side in (16, 24, 40):
        small = np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)
        enlarged = cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC)
        assert 0.7 * side < resolution(enlarged) < 1.5 * side
    assert resolution(sharp) > 100 and resolution(np.zeros_like(sharp)) == 0
    padded = sharp.copy()
    padded[:28] = 0
    assert filled(sharp) == 1.0 and filled(padded) == pytest.approx(0.75) and filled(np.zeros_like(sharp)) == 0.0


def test_a_face_is_told_from_other_pictures():
    """The public-domain portrait that scikit-image ships, aligned, moved, turned over; parts of it; noise."""
    detector = RetinaFace(device="cpu", score_threshold=LEAST_SCORE)
    photo = skimage.data.astronaut()
    (found,) = detector.detect([np.ascontiguousarray(photo[..., ::-1])])
    crop = align_face(photo, found.landmarks[0])
    moved = align_face(photo, found.landmarks[0] + np.float32([6, 0]))
    small = align_face(photo, TEMPLATE * 4 - 100)  # much besides a face
    enlarged = [cv2.resize(crop[rows, columns], (112, 112))
                for rows, columns in ((slice(84, 112), slice(0, 28)), (slice(0, 20), slice(46, 66)))]  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    face, landmarks = look(detector, np.stack([crop, moved, small, *enlarged, noise]))
    assert face[0] > 0.95 and face[1] > 0.9 and (face[3:] < 0.3).all()
    assert landmarks[0] > -6 and landmarks[1] < landmarks[0] - 1
    assert (landmarks[3:][face[3:] == 0] == -112).all() and face.dtype == np.float32


def test_crops_without_a_face_are_those_that_nobody_knows():
    random = np.random.default_rng(0)
    count = 2000
    found = Centres(
        np.zeros((4, 8), np.float32),
        np.ones(count, bool),
        np.full(count, 0.6, np.float32),
        np.full(count, 0.6, np.float32),
        0.6,
    )
    other, face = np.full(count, 0.1), 1 - 0.1 * random.random(count)
    bounds = Limits(0.0, 0.4, 0.3, 1.0, 0.0, 0.1, 0.05, 0.01)
    found.own[:20], face[:10] = 0.1, 0.01  # the first ten show nobody and no face, the next ten a stranger
    face[20:25] = 0.01  # hard to see, but known
    found.own[25:30], face[25:30], other[25:28] = np.nan, 0.01, 0.5  # alone; three of these known elsewhere
    assert np.flatnonzero(find_faceless(face, found, other, bounds)).tolist() == [*range(10), 28, 29]
    assert not find_faceless(np.full(count, np.nan), found, other, bounds).any()  # it did not look


def test_a_reject_curve_falls_for_a_sign_that_knows_and_not_for_one_that_does_not():
    random = np.random.default_rng(0)
    accepted = random.random(4000) > 0.2
    knows = accepted + random.random(4000)
    curve = reject_curve("knows", knows, accepted)
    assert curve.fnmr[0] == pytest.approx(1 - accepted.mean()) and curve.fnmr[-1] == 0 and curve.gain > 0.5
    assert abs(reject_curve("does not", random.random(4000), accepted).gain) < 0.1


# --- what training makes of it -----------------------------------------------------------


@pytest.fixture
def crops(tmp_path):
    crop_sets.write_crops(tmp_path / "crops", jpegs(6, 4))
    return crop_sets.open_training_set(tmp_path / "crops")


def chosen(crops, path, relabel=False):
    return selection.select(crops, crop_sets.fingerprint(crops), path, relabel=relabel)


def test_what_is_dropped_moved_merged_and_split(crops, tmp_path):
    rows = [
        ["two labels, one person", 0, "0", 1, "1", 0.9, "merge", "", ""],
        ["one label, two people", 2, "2", 2, "2", 0.9, "split", "8 9", ""],
        ["in the test set", 3, "3", "", "lfw: x", 0.9, "drop", "12", ""],
        ["two labels, one person", 4, "4", 5, "5", 0.9, "keep", "", "rejected"],
    ]
    path = write_audit(tmp_path / "audit", crops, {0: ("drop", None), 4: ("move", 5), 16: ("move", 1)}, rows)
    kept, fingerprint = chosen(crops, path, relabel=True)
    labels = {int(index): int(label) for index, label in zip(kept.indices, kept.labels, strict=True)}
    assert 0 not in labels and not {12, 13, 14, 15} & labels.keys()
    groups = {}
    for index, label in labels.items():
        groups.setdefault(label, set()).add(index)
    assert {1, 2, 3, 5, 6, 7, 16} in groups.values()  # 0 and 1 are one person, to whom crop 16 was moved
    assert {8, 9} in groups.values() and {10, 11} in groups.values()
    assert {4, 20, 21, 22, 23} in groups.values() and {17, 18, 19} in groups.values()
    assert kept.identities == len(groups) == len(kept.identity_names) and set(kept.labels) == set(range(len(groups)))
    assert [kept.read(index) for index in range(3)] == [(crops.read(i)[0], labels[i]) for i in list(labels)[:3]]
    assert "5 dropped, 2 moved, 1 merged labels, 1 split labels" in kept.notes[-1]
    rows[0][6], rows[1][0:3] = "keep", ["in the test set", 1, "1"]
    rows[1][6] = "drop"
    gone, _ = chosen(
        crops, write_audit(tmp_path / "gone", crops, {16: ("move", 1), 5: ("move", 0)}, rows), relabel=True
    )
    assert not {4, 6, 7, 16} & set(gone.indices) and 5 in gone.indices  # with whom was moved to them
    plain, other = chosen(crops, path)
    left_out = {0, 4, 16, 8, 9, 12, 13, 14, 15}
    assert set(plain.indices) == set(range(24)) - left_out and other != fingerprint
    assert (np.diff(crops.labels[plain.indices]) >= 0).all() and len(set(plain.labels)) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("keep", "kepp", 1), "line 2: expected crop 0 with one of keep, drop, move"),
        (lambda text: text[:-9], "the last line is cut off"),
        (lambda text: text.rpartition("23\t")[0], "not one row for each of 24 crops"),
        (lambda text: text.replace("index", "indices"), "not a table of an audit"),
        (lambda text: text.replace("\tkeep\t\t", "\tmove\t77\t", 1), "moves to '77', which is no label of the set"),
        (lambda text: text.replace("\n0\t", "\n0 "), "line 2: 19 columns instead of 20"),
    ],
)
def test_damaged_audits_are_one_line(crops, tmp_path, damage, message):
    path = write_audit(tmp_path / "audit", crops, {})
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"audit\.tsv") as error:
        chosen(crops, path, relabel=True)
    assert message in str(error.value)


def test_an_audit_of_other_crops_is_refused(crops, tmp_path):
    path = write_audit(tmp_path / "audit", crops, {}, fingerprint="other")
    with pytest.raises(InputError, match="an audit of other crops"):
        chosen(crops, path)
    path.with_name(selection.RECORD).unlink()
    with pytest.raises(InputError, match="No such file"):
        chosen(crops, path)
    everything = write_audit(tmp_path / "all", crops, dict.fromkeys(range(24), ("drop", None)))
    with pytest.raises(InputError, match="leaves not one crop"):
        chosen(crops, everything)


# --- the command ---------------------------------------------------------------------------


def write_projection(path, dim=48):
    """An ONNX model whose features are random projections of a crop's coarse colours."""
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.random.default_rng(0).standard_normal((3 * 14 * 14, dim)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["crops"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["small"], ["flat"]),
            helper.make_node("MatMul", ["flat", "matrix"], ["feature"]),
        ],
        "projection",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def portraits(identities, each, seed=4):
    """(JPEG, label) of crops that share their coarse colours within an identity and differ in light and detail."""
    random = np.random.default_rng(seed)
    for label in range(identities):
        face = random.integers(0, 255, (7, 7, 3)).astype(np.float32)
        for _ in range(each):
            crop = cv2.resize(face, (112, 112), interpolation=cv2.INTER_CUBIC)
            change = random.normal(0, 45, (14, 14, 3)).astype(np.float32)
            crop = crop + cv2.resize(change, (112, 112), interpolation=cv2.INTER_CUBIC)
            yield cv2.imencode(".jpg", crop.clip(0, 255).astype(np.uint8))[1].tobytes(), label


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """40 identities of 8 crops of which 16 have another's label, one crop twice, and a person of the test set."""
    folder = tmp_path_factory.mktemp("audit")
    entries = list(portraits(40, 8))
    random = np.random.default_rng(0)
    labels = [label for _, label in entries]
    moved = random.permutation(len(entries))[:16]
    for index in moved:
        labels[index] = (labels[index] + 7) % 40
    again = cv2.imencode(
        ".jpg", cv2.imdecode(np.frombuffer(entries[3][0], np.uint8), 1), [cv2.IMWRITE_JPEG_QUALITY, 85]
    )
    entries.append((again[1].tobytes(), 0))
    labels.append(labels[3])
    order = np.argsort(labels, kind="stable")
    crop_sets.write_crops(folder / "crops", [(entries[index][0], labels[index]) for index in order])
    for name, person in (("known", 5), ("unknown", 41)):
        (folder / "test" / name).mkdir(parents=True)
        for number, (data, _) in enumerate(entry for entry in portraits(42, 8) if entry[1] == person):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
            cv2.imwrite(str(folder / "test" / name / f"{number}.png"), image)
    truth = {int(np.flatnonzero(order == index)[0]) for index in moved}
    return folder, truth, write_projection(folder / "model.onnx")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, words)])
    return audit.main()


def test_the_command_finds_what_was_put_in_and_training_takes_it(faulty, tmp_path, monkeypatch, capsys):
    folder, truth, model = faulty
    words = ["--data", folder / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--no-mirror"]
    words += ["--against", folder / "test", "--device", "cpu"]
    assert run(monkeypatch, *words, "--out", tmp_path / "audit") == 0
    printed = capsys.readouterr().out
    assert "1 of 2 people are in the training set" in printed
    rows = list(selection.rows(tmp_path / "audit" / "audit.tsv", selection.CROP_COLUMNS))
    called = {index for index, (_, row) in enumerate(rows) if row["kind"] in (WRONG, STRANGER)}
    assert len(called & truth) >= 15 and len(called - truth) <= 1
    assert sum(row["kind"] == "duplicate" for _, row in rows) == 1
    people_rows = list(selection.rows(tmp_path / "audit" / "audit_identities.tsv", selection.IDENTITY_COLUMNS))
    assert [row["other_identity"] for _, row in people_rows if row["kind"] == "in the test set"] == ["test: known"]
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "http://" not in page and "https://" not in page and page.count('class="finding"') >= 16
    assert (tmp_path / "audit" / "wrong-person.png").stat().st_size > 10_000

    # A second audit computes no feature again, and honours what a person decided.
    one = min(called & truth)
    decisions = tmp_path / "decisions.tsv"
    of = json.loads((tmp_path / "audit" / "audit.json").read_text())["data"]["fingerprint"][:16]
    gone = next(index for index in range(300) if index not in called)
    lines = [f"{decided.name_of_crop(STRANGER, index)}\treject\n" for index in (one, gone)]
    decisions.write_text(f"finding\tdecision\t{of}\n{''.join(lines)}")
    monkeypatch.setattr(audit, "_embed_chunk", None)
    assert run(monkeypatch, *words, "--out", tmp_path / "audit", "--decisions", decisions) == 0
    rows = list(selection.rows(tmp_path / "audit" / "audit.tsv", selection.CROP_COLUMNS))
    assert rows[one][1]["action"] == "keep" and "rejected by a person" in rows[one][1]["reason"]
    assert "1 of 2 decisions reject what is not found now" in capsys.readouterr().out

    assert (
        run(
            monkeypatch,
            "apply",
            "--data",
            folder / "crops",
            "--audit",
            tmp_path / "audit",
            "--relabel",
            "--out",
            tmp_path / "clean",
        )
        == 0
    )
    clean = crop_sets.open_training_set(tmp_path / "clean")
    assert 40 * 8 - 20 < len(clean) < 40 * 8 and clean.identities == 39  # the person of the test set is gone
    assert (tmp_path / "clean" / "sources.tsv").read_text().count("\n") == len(clean) + 1
    counts = [line.split("\t")[2] for line in (tmp_path / "clean" / "identities.tsv").read_text().splitlines()[1:]]
    assert counts == list(map(str, np.bincount(clean.labels)))


def page_of(folder):
    """The names of the findings on an audit's page, and the set's key."""
    text = (folder / "audit.html").read_text()
    names = [html.unescape(name) for name in re.findall(r'data-id="([^"]*)"', text)]
    assert len(set(names)) == len(names)
    return names, re.search(r'key = "(\w+)"', text)[1]


def saved(path, key, decisions):
    """What the page's button saves."""
    lines = [f"{name}\t{what}\n" for name, what in decisions.items()]
    path.write_text(f"finding\tdecision\t{key}\n{''.join(lines)}")
    return path


def actions(folder):
    return [row["action"] for _, row in selection.rows(folder / selection.CROPS, selection.CROP_COLUMNS)]


WORDS = ["--mean", "0.5", "--std", "0.5", "--no-mirror", "--device", "cpu", "--no-faces"]


def test_what_is_rejected_is_kept_and_what_is_confirmed_goes_though_it_is_not_found(faulty, tmp_path, monkeypatch):
    folder, _, model = faulty
    words = ["--data", folder / "crops", "--checkpoint", model, *WORDS, "--out", tmp_path / "audit"]
    against = ["--against", folder / "test"]
    assert run(monkeypatch, *words, *against) == 0
    names, key = page_of(tmp_path / "audit")
    kinds = [json.loads(name)[0] for name in names]
    assert {"wrong person", "duplicate", "in the test set"} <= set(kinds)
    before = actions(tmp_path / "audit")
    assert before.count("drop") + before.count("move") >= 16

    reject = saved(tmp_path / "reject.tsv", key, dict.fromkeys(names, "reject"))
    assert run(monkeypatch, *words, *against, "--decisions", reject) == 0
    assert set(actions(tmp_path / "audit")) == {"keep"}
    assert page_of(tmp_path / "audit")[0] == names
    rows = [row for _, row in selection.rows(tmp_path / "audit" / selection.IDENTITIES, selection.IDENTITY_COLUMNS)]
    assert rows and {row["action"] for row in rows} == {"keep"}

    # A later audit looks for less: confirmed findings stay what they are.
    confirm = saved(tmp_path / "confirm.tsv", key, dict.fromkeys(names, "confirm"))
    assert run(monkeypatch, *words, "--no-duplicates", "--error-rate", "0.001", "--decisions", confirm) == 0
    assert actions(tmp_path / "audit") == before
    rows = [row for _, row in selection.rows(tmp_path / "audit" / selection.IDENTITIES, selection.IDENTITY_COLUMNS)]
    assert [row["other_identity"] for row in rows if row["action"] == "drop"] == ["test: known"]
    assert run(monkeypatch, *words, "--no-duplicates", "--error-rate", "0.001") == 0
    assert actions(tmp_path / "audit") != before


def test_one_decision_is_about_one_finding(faulty, tmp_path, monkeypatch):
    """A duplicate that is no duplicate, and somebody else all the same."""
    folder, _, model = faulty
    words = ["--data", folder / "crops", "--checkpoint", model, *WORDS, "--out", tmp_path / "audit"]
    assert run(monkeypatch, *words) == 0
    names, key = page_of(tmp_path / "audit")
    before = actions(tmp_path / "audit")
    twice = next(name for name in names if json.loads(name)[0] == "duplicate")
    wrong = [name for name in names if json.loads(name)[0] == "wrong person"]
    assert run(monkeypatch, *words, "--decisions", saved(tmp_path / "d.tsv", key, {twice: "reject"})) == 0
    changed = [index for index, (a, b) in enumerate(zip(before, actions(tmp_path / "audit"), strict=True)) if a != b]
    assert changed == [json.loads(twice)[2]]
    assert run(monkeypatch, *words, "--decisions", saved(tmp_path / "d.tsv", key, {wrong[0]: "reject"})) == 0
    changed = [index for index, (a, b) in enumerate(zip(before, actions(tmp_path / "audit"), strict=True)) if a != b]
    assert changed == [json.loads(wrong[0])[1]]


@pytest.mark.parametrize(
    "line",
    ["crop 1\treject", '["wrong person", 1]\treject', '["stranger", 999999]\treject', '["stranger", true]\tconfirm',
     '["wrong person", 1, -1]\tconfirm', '["nothing", 1]\treject', '["stranger", 1]\tmaybe', "[\treject",
     '["one label, two people", 1, []]\tconfirm', "{}\treject", "[[]]\treject"],
)  # fmt: skip
def test_decisions_that_no_page_saved(tmp_path, line):
    path = tmp_path / "decisions.tsv"
    path.write_text(f'finding\tdecision\tkey\n["stranger", 1]\treject\n{line}\n')
    with pytest.raises(InputError, match=r"decisions\.tsv, line 3: expected a finding and confirm or reject"):
        decided.read_decisions(path, "key", 100, 10)


def test_any_name_of_a_person_survives_the_page(tmp_path):
    names = ["tab\there", "line\u2028and\u0085", "bytes \udcff", "<b>&\"'", "a\nb"]
    findings = [PairFinding(TEST, 3, name, 0.9, "") for name in names]
    sections = [(TEST, [(decided.name_of_pair(finding), finding.second, []) for finding in findings])]
    report.write_page(tmp_path / "audit.html", "x", "", {}, sections, "abc0")
    found, key = page_of(tmp_path)
    decisions = decided.read_decisions(saved(tmp_path / "d.tsv", key, dict.fromkeys(found, "reject")), "abc0", 10, 10)
    assert len(decisions) == 5 and all(decisions.rejected(decided.name_of_pair(finding)) for finding in findings)
    assert not decisions.rejected(decided.name_of_pair(PairFinding(TEST, 3, "other", 0.9, "")))


def test_no_set_is_overwritten(faulty, tmp_path, monkeypatch, capsys):
    folder, _, model = faulty
    data = shutil.copytree(folder / "crops", tmp_path / "crops")
    words = ["--data", data, "--checkpoint", model, *WORDS, "--out", tmp_path / "audit"]
    assert run(monkeypatch, *words) == 0
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    write = ["apply", "--data", data, "--audit", tmp_path / "audit", "--out"]
    assert run(monkeypatch, *write, data) == 1
    assert "holds another set of crops" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    assert run(monkeypatch, *write, tmp_path / "clean") == 0
    made = (tmp_path / "clean" / "train.rec").stat().st_mtime_ns
    assert run(monkeypatch, *write, tmp_path / "clean") == 0, "the same again"
    assert (tmp_path / "clean" / "train.rec").stat().st_mtime_ns == made
    assert run(monkeypatch, *write, tmp_path / "clean", "--relabel") == 1, "another one"
    assert "holds another set of crops" in capsys.readouterr().err


def test_a_clean_set_keeps_its_table_of_faces(faulty, tmp_path, monkeypatch):
    folder, _, model = faulty
    data = shutil.copytree(folder / "crops", tmp_path / "crops")
    crops = crop_sets.open_training_set(data)
    rows = [tables.FaceRow(f"p{label}", f"p{label}/{index}.jpg", tables.CROP, faces=1, score=0.5)
            for index, label in enumerate(crops.labels.tolist())]  # fmt: skip
    rows.insert(7, tables.FaceRow("p0", "p0/none.jpg", tables.NO_CROP, "no face"))
    (data / "faces.tsv").write_bytes(tables.table_text(rows))
    tables.write_identities(data / "identities.tsv", [f"p{label}" for label in range(40)])
    words = ["--data", data, "--checkpoint", model, *WORDS, "--out", tmp_path / "audit"]
    assert run(monkeypatch, *words) == 0
    write = ["apply", "--data", data, "--audit", tmp_path / "audit", "--relabel", "--out", tmp_path / "clean"]
    assert run(monkeypatch, *write) == 0
    clean = crop_sets.open_training_set(tmp_path / "clean")
    found = tables.read_faces(tmp_path / "clean" / "faces.tsv")
    assert [row.identity for row in found] == [clean.identity_names[label] for label in clean.labels]
    for index, row in enumerate(found):
        assert crops.read(int(Path(row.file).stem))[0] == clean.read(index)[0]


def test_an_audit_that_fails_leaves_the_last_one_whole(faulty, tmp_path, monkeypatch, capsys):
    folder, _, model = faulty
    out = tmp_path / "audit"
    words = ["--data", folder / "crops", "--checkpoint", model, *WORDS, "--out", out]
    assert run(monkeypatch, *words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (tmp_path / "cut.bin").write_bytes(b"\x80\x02]")
    assert run(monkeypatch, *words, "--error-rate", "0.4", "--quality-on", tmp_path / "cut.bin") == 1
    assert "cut.bin" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    # Killed between its tables it is no audit.
    plain = selection.write_table

    def stops(path, *rest):
        if path.name == selection.IDENTITIES:
            raise KeyboardInterrupt
        plain(path, *rest)

    monkeypatch.setattr(selection, "write_table", stops)
    assert run(monkeypatch, *words, "--error-rate", "0.4") == 130
    with pytest.raises(InputError, match=r"audit\.json"):
        chosen(crop_sets.open_training_set(folder / "crops"), out)


def test_a_damaged_record_is_unusable_and_the_rest_is_audited(tmp_path, monkeypatch):
    crop_sets.write_crops(tmp_path / "crops", portraits(30, 8))
    path = tmp_path / "crops" / "train.rec"
    crops = crop_sets.open_training_set(tmp_path / "crops")
    data = bytearray(path.read_bytes())
    at = int(crops.reader.offsets[crops.reader.position(crops.keys[100])])
    data[at : at + 4] = b"xxxx"
    path.write_bytes(data)
    model = write_projection(tmp_path / "model.onnx")
    words = ["--checkpoint", model, *WORDS, "--no-duplicates"]
    assert run(monkeypatch, "--data", tmp_path / "crops", *words, "--out", tmp_path / "audit") == 0
    rows = [row for _, row in selection.rows(tmp_path / "audit" / selection.CROPS, selection.CROP_COLUMNS)]
    assert [index for index, row in enumerate(rows) if row["kind"] == UNUSABLE] == [100]
    assert (tmp_path / "audit" / "audit.json").exists()
    # The same as a test set: the picture is left out, and said.
    assert run(monkeypatch, "--data", tmp_path / "crops", "--against", tmp_path / "crops", *words, "--out",
               tmp_path / "again") == 0  # fmt: skip
    [entry] = json.loads((tmp_path / "again" / "audit.json").read_text())["against"]
    assert entry["pictures_left_out"] == 1 and entry["people"] == 30


def test_a_broken_model_says_nothing_of_a_crop(tmp_path, monkeypatch, capsys):
    crop_sets.write_crops(tmp_path / "crops", portraits(5, 4))
    model = write_projection(tmp_path / "model.onnx")
    for value in (np.nan, 0.0):
        content = onnx.load(model)
        kernel = onnx.numpy_helper.to_array(content.graph.initializer[0])
        content.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full_like(kernel, value), "matrix"))
        onnx.save(content, tmp_path / "broken.onnx")
        words = ["--data", tmp_path / "crops", "--checkpoint", tmp_path / "broken.onnx", *WORDS]
        assert run(monkeypatch, *words, "--out", tmp_path / f"audit {value}") == 1
        assert "the model gives no direction for any of 20 crops" in capsys.readouterr().err


def test_of_two_copies_the_one_under_its_own_name_stays(tmp_path, monkeypatch):
    """People of a single crop, whose photo stands under somebody else's name as well."""
    entries = list(portraits(30, 8))
    lone = list(portraits(33, 1, seed=9))[30:]
    kept = [(data, label) for data, label in entries] + [(data, 30 + k) for k, (data, _) in enumerate(lone)]
    images = [cv2.imdecode(np.frombuffer(data, np.uint8), 1) for data, _ in lone]
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
    wrong = [(cv2.imencode(".jpg", image, quality)[1].tobytes(), k) for k, image in enumerate(images)]
    crop_sets.write_crops(tmp_path / "crops", sorted(kept + wrong, key=lambda entry: entry[1]))
    crops = crop_sets.open_training_set(tmp_path / "crops")
    model = write_projection(tmp_path / "model.onnx")
    words = ["--data", tmp_path / "crops", "--checkpoint", model, *WORDS]
    assert run(monkeypatch, *words, "--out", tmp_path / "audit") == 0
    left = chosen(crops, tmp_path / "audit")[0]
    assert {"30", "31", "32"} <= set(left.identity_names)
    gone = set(range(len(crops))) - set(left.indices.tolist())
    copies = {index for index in range(len(crops)) if crops.read(index)[0] in [data for data, _ in wrong]}
    assert copies <= gone


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["one label, two people", 0, "0", "", "", 0.9, "split", "0 99999999999999999999", ""], "names crops that are"),
        (["one label, two people", 0, "0", "", "", 0.9, "split", "0 1,2 x", ""], "names crops that are not of label 0"),
        (["two labels, one person", 0, "0", "9" * 5000, "", 0.9, "merge", "", ""], "which is no label of the set"),
        (["in the test set", "9" * 5000, "", "", "", 0.9, "drop", "", ""], "is nothing that can be done"),
    ],
)
def test_numbers_that_are_none(crops, tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        chosen(crops, write_audit(tmp_path / "audit", crops, {}, [row]), relabel=True)


def test_people_of_ijb_are_found_by_the_lists_of_1_to_n(faulty, tmp_path, monkeypatch, capsys):
    """The crops of two people, pasted into larger pictures with their landmarks, as IJB-C has them."""
    folder, _, model = faulty
    loose = tmp_path / "IJBC" / "loose_crop"
    loose.mkdir(parents=True)
    whose = {5: "known", 41: "unknown"}
    rows = [(data, person) for data, person in portraits(42, 8) if person in whose]
    for number, (data, _) in enumerate(rows):
        image = np.full((200, 180, 3), 127, np.uint8)
        image[40:152, 30:142] = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
        cv2.imwrite(str(loose / f"{number}.png"), image)
    images, people = [f"{number}.png" for number in range(len(rows))], [whose[person] for _, person in rows]
    templates = [10 + (person == "unknown") for person in people]
    people_rows = list(zip(templates, people, images, strict=True))
    ijb_tree.write_lists(
        tmp_path / "IJBC", "ijbc", images, templates, range(len(rows)), [TEMPLATE + np.array([30, 40])] * len(rows),
        [0.9] * len(rows), [(10, 11, 0)], {"G1": people_rows[:8], "G2": people_rows[8:]}, people_rows,
    )  # fmt: skip
    words = ["--data", folder / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--no-mirror"]
    assert run(monkeypatch, *words, "--against", tmp_path / "IJBC", "--device", "cpu", "--out", tmp_path / "audit") == 0
    assert "1 of 2 people are in the training set" in capsys.readouterr().out
    people_rows = selection.rows(tmp_path / "audit" / "audit_identities.tsv", selection.IDENTITY_COLUMNS)
    found = [row["other_identity"] for _, row in people_rows if row["kind"] == "in the test set"]
    assert found == ["IJB-C: subject known"]


def test_a_killed_audit_goes_on_and_another_model_is_not_mixed_in(faulty, tmp_path, monkeypatch, capsys):
    folder, _, model = faulty
    words = ["--data", folder / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--device", "cpu"]
    plain, done = audit._embed_chunk, []

    def stops(crops, numbers, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(numbers)
        return plain(crops, numbers, *rest)

    monkeypatch.setattr(audit, "_embed_chunk", stops)
    assert run(monkeypatch, *words, "--out", tmp_path / "killed") == 130
    again = []
    monkeypatch.setattr(
        audit, "_embed_chunk", lambda crops, numbers, *rest: again.append(numbers) or plain(crops, numbers, *rest)
    )
    assert run(monkeypatch, *words, "--out", tmp_path / "killed") == 0
    assert done and again and not set(done) & set(again)
    assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    for name in (selection.CROPS, selection.IDENTITIES):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = write_projection(tmp_path / "other.onnx", dim=32)
    words[3] = other
    capsys.readouterr()
    assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 1
    assert "holds embeddings of something else" in capsys.readouterr().err


def test_shards_share_the_embedding_and_give_the_same_tables(faulty, tmp_path, monkeypatch, capsys):
    folder, _, model = faulty
    words = ["--data", folder / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--device", "cpu"]
    assert run(monkeypatch, *words, "--out", tmp_path / "shared", "--shard", "1/2") == 0
    assert "other shards are not there yet" in capsys.readouterr().out
    assert not (tmp_path / "shared" / selection.CROPS).exists()
    assert run(monkeypatch, *words, "--out", tmp_path / "shared", "--shard", "2/2") == 0
    assert run(monkeypatch, *words, "--out", tmp_path / "alone") == 0
    for name in (selection.CROPS, selection.IDENTITIES):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


class SmoothIsAFace:
    """A detector that sees a face in the middle of every crop but noise."""

    def detect(self, images):
        faces = []
        for image in images:
            seen = int(cv2.Laplacian(image, cv2.CV_32F).std() < 40)
            faces.append(SimpleNamespace(
                boxes=np.float32([[15, 9, 97, 119]])[:seen], scores=np.float32([0.99])[:seen],
                landmarks=TEMPLATE[None][:seen],
            ))  # fmt: skip
        return faces


def test_a_crop_without_a_face_is_unusable(tmp_path, monkeypatch, capsys):
    entries = list(portraits(30, 8))
    noise = np.random.default_rng(1).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    entries[17] = (cv2.imencode(".png", noise)[1].tobytes(), entries[17][1])
    crop_sets.write_crops(tmp_path / "crops", entries)
    model = write_projection(tmp_path / "model.onnx")
    words = ["--data", tmp_path / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--no-mirror"]
    words += ["--device", "cpu", "--no-duplicates"]
    monkeypatch.setattr(audit, "open_detector", lambda options: SmoothIsAFace() if options.faces else None)
    assert run(monkeypatch, *words, "--out", tmp_path / "audit") == 0
    rows = [row for _, row in selection.rows(tmp_path / "audit" / "audit.tsv", selection.CROP_COLUMNS)]
    assert [index for index, row in enumerate(rows) if row["kind"] == UNUSABLE] == [17]
    assert rows[17]["reason"] == "no face: the detector gives 0.00"
    assert rows[17]["action"] == "drop" and float(rows[17]["landmarks"]) == -112 and float(rows[16]["landmarks"]) == 0
    # Not asked to look it does not know.
    assert run(monkeypatch, *words, "--out", tmp_path / "blind", "--no-faces") == 0
    rows = [row for _, row in selection.rows(tmp_path / "blind" / "audit.tsv", selection.CROP_COLUMNS)]
    assert rows[17]["kind"] == KEEP and rows[17]["face"] == ""


def test_an_unreadable_crop_is_unusable_and_the_rest_is_audited(faulty, tmp_path, monkeypatch):
    _folder, _, model = faulty
    people_folder = tmp_path / "people"
    for label in range(4):
        (people_folder / f"p{label}").mkdir(parents=True)
    for number, (data, label) in enumerate(portraits(4, 6)):
        (people_folder / f"p{label}" / f"{number:02}.jpg").write_bytes(data if number != 7 else b"no image")
    shutil.copy(model, tmp_path / "model.onnx")
    words = ["--data", people_folder, "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--device", "cpu"]
    assert run(monkeypatch, *words, "--out", tmp_path / "audit") == 0
    rows = [row for _, row in selection.rows(tmp_path / "audit" / "audit.tsv", selection.CROP_COLUMNS)]
    assert [row["crop"].endswith("07.jpg") for row in rows if row["kind"] == "unusable"] == [True]
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["counts"]["unusable"] == 1


def test_signs_of_quality_are_asked_on_a_verification_set(faulty, tmp_path, monkeypatch):
    folder, _, model = faulty
    pairs = pair_set(tmp_path / "pairs.bin")
    words = ["--data", folder / "crops", "--checkpoint", model, *WORDS, "--out", tmp_path / "audit"]
    assert run(monkeypatch, *words, "--quality-on", pairs, "--far", "0.4") == 0
    record = json.loads((tmp_path / "audit" / "audit.json").read_text())["quality"]
    assert {entry["sign"] for entry in record} == {"norm", "mirror", "sharpness", "resolution", "filled"}
    assert all(len(entry["fnmr"]) == 26 and min(entry["fnmr"]) >= 0 for entry in record)
    assert (tmp_path / "audit" / "quality.png").stat().st_size > 10_000
    assert run(monkeypatch, *words) == 0
    assert not list((tmp_path / "audit").glob("quality.*")), "of another audit"


def test_a_small_clean_set_is_audited_to_the_end(tmp_path, monkeypatch, capsys):
    """Limits that nothing reaches are no numbers of JSON."""
    crop_sets.write_crops(tmp_path / "crops", jpegs(4, 3))
    write_projection(tmp_path / "model.onnx")
    words = ["--data", tmp_path / "crops", "--checkpoint", tmp_path / "model.onnx", "--mean", 0.5, "--std", 0.5]
    assert run(monkeypatch, *words, "--out", tmp_path / "audit") == 0
    said = capsys.readouterr().out
    assert "with fewer than 20 identities that is not to be told" in said
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["limits"]["merge_limit"] is None
    chosen(crop_sets.open_training_set(tmp_path / "crops"), tmp_path / "audit" / "audit.tsv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "nowhere"], "--against nowhere: no such file or folder"),
        (["--decisions", "nowhere"], "nowhere"),
        (["--quality-on", "nowhere"], "--quality-on nowhere: no such file or folder"),
        (["--decisions", "{0}/empty.tsv"], "not saved by an audit's page"),
        (["--against", "{0}/lonely"], "--against"),
        (["--decisions", "{0}/others.tsv"], "decisions about other crops (0123456789abcdef instead of"),
        (["--data", "{0}/photos"], "not one of 4 crops is usable; the first: "),
        (["--error-rate", "0"], "--error-rate 0.0: must be above 0"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(faulty, tmp_path, monkeypatch, capsys, words, message):
    folder, _, model = faulty
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "others.tsv").write_text("finding\tdecision\t0123456789abcdef\ncrop 1\treject\n")
    crop_sets.write_crops(
        tmp_path / "photos",
        [(cv2.imencode(".png", np.zeros((200, 200, 3), np.uint8))[1].tobytes(), n) for n in range(4)],
    )
    (tmp_path / "lonely").mkdir()
    (tmp_path / "lonely" / "train.rec").write_bytes(b"nonsense")
    words = [word.format(tmp_path) for word in words]
    usual = ["--data", folder / "crops", "--checkpoint", model, "--mean", "0.5", "--std", "0.5", "--device", "cpu"]
    assert run(monkeypatch, *usual, "--out", tmp_path / "audit", *words) == 1
    assert message in capsys.readouterr().err


def test_a_confirmed_copy_of_somebody_else_is_moved_to_them(tmp_path):
    """Confirmed as a wrong person and as a photo that is there twice, in whatever order."""
    crops = crop_sets.open_training_set(record_set(tmp_path / "crops", identities=2, each=2))
    names = [decided.name_of_duplicate(0, 2), decided.name_of_crop(WRONG, 2, 1), decided.name_of_duplicate(1, 3)]
    for order in (names, names[::-1]):
        found = Findings(crops)
        decided.decide(decided.Decisions(dict.fromkeys(order, "confirm")), found, np.zeros(4, np.int64), [])
        assert found.action == ["keep", "keep", "move", "drop"] and found.to == [None, None, 1, None]


@pytest.mark.parametrize(
    ("kind", "decisions", "kinds"),
    [
        (DUPLICATE, [(0, 1)], [KEEP, DUPLICATE]),  # found the other way round: as the person said
        (DUPLICATE, [(1, 0)], [DUPLICATE, KEEP]),
        (DUPLICATE, [(0, 1), (1, 0)], [DUPLICATE, KEEP]),  # of two decisions about the pair the later one
        (STRANGER, [(0, 1)], [STRANGER, KEEP]),  # the one to be kept goes for another reason
        (KEEP, [(0, 1)], [KEEP, DUPLICATE]),  # not found any more
    ],
)
def test_of_a_photo_that_is_there_twice_one_stays(tmp_path, kind, decisions, kinds):
    """A later audit, by another network, may find the same pair the other way round, or a fault of the kept one."""
    crops = crop_sets.open_training_set(record_set(tmp_path / "crops", identities=2, each=2))
    found = Findings(crops)
    if kind != KEEP:
        found.set(0, kind, "", "drop")
    pairs = [] if kind == KEEP else [(Duplicate(0, 1, "identical", 1.0), 0)]
    confirmed = decided.Decisions({decided.name_of_duplicate(*pair): "confirm" for pair in decisions})
    decided.decide(confirmed, found, np.zeros(4, np.int64), pairs)
    assert found.kinds[:2] == kinds
    assert found.action[:2] == ["keep" if kind == KEEP else "drop" for kind in kinds]
