"""IJB-B and IJB-C: golden files of public code, plain transcriptions, properties, damage, and a run from photos."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.ijb_tree import tree_of_lfw, write_lists
from helpers.toy_models import write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import ijb_eval
from cropping import contents
from embedding import load_embedder
from ijb import crops, kernels, one_to_many, one_to_one, report
from ijb.lists import Lists, Pairs, People, read_lists, read_pairs, read_people
from ijb.templates import TREATMENTS, USUAL, ImageFeatures, pool
from retinaface import RetinaFace
from utils import InputError
from verification import metrics
from verification.intervals import Interval

CASES = ("small/IJBC", "medium/IJBB")


def load(shared, case):
    folder = shared / "ijb" / Path(case).parts[0]
    lists = read_lists(folder / Path(case).parts[1])
    stored = np.load(folder / "features.npz")
    golden = json.loads((folder / "golden.json").read_text())
    return folder, lists, stored, golden


# --- against public code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_to_one_as_public_code_prints_it(shared, case):
    folder, lists, stored, golden = load(shared, case)
    pairs = read_pairs(lists)
    templates = pool(ImageFeatures.of_arrays(stored["embs"], stored["embs_f"]), lists)
    assert len(lists.images) == golden["counts"]["images"] and len(templates.numbers) == golden["counts"]["templates"]
    scorer = one_to_one.PairScorer(pairs, templates)
    scores_of = np.load(folder / "golden_scores.npz")
    for treatment in TREATMENTS:
        scores = scorer.scores(templates.embeddings(treatment))
        assert np.array_equal(scores, scores_of[treatment.name][scorer.order])  # bit by bit
        found = one_to_one.verification(scores, scorer.same, treatment)
        expected = golden["one_to_one"][treatment.name]
        assert found.area == pytest.approx(expected["AUC"], abs=1e-9)
        for far, tar in found.printed.items():
            assert tar == pytest.approx(expected[str(far)], abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_to_many_as_public_code_prints_it(shared, case):
    _, lists, stored, golden = load(shared, case)
    templates = pool(ImageFeatures.of_arrays(stored["embs"], stored["embs_f"]), lists)
    found = one_to_many.identification(lists, templates, replicates=100)
    for gallery in found.galleries:
        expected = golden["one_to_many"][gallery.name]
        assert (gallery.size, gallery.probes, gallery.mated) == tuple(
            expected[name] for name in ("gallery", "probes", "mated_probes")
        )
        assert [gallery.hits[rank] for rank in (1, 5, 10)] == [expected[f"top{rank}"] for rank in (1, 5, 10)]
        for fpir in one_to_many.CURVE[::25]:
            assert gallery.printed[fpir] == pytest.approx(expected["tpir"][f"{fpir:g}"], abs=1e-9)
            assert gallery.thresholds[fpir] == pytest.approx(expected["threshold"][f"{fpir:g}"], abs=1e-9)
    for rank, share in found.printed.items():
        assert share == pytest.approx(golden["one_to_many"]["mean"][f"top{rank}"], abs=1e-9)
    for fpir in one_to_many.CURVE[::25]:
        assert found.printed_tpir[fpir] == pytest.approx(golden["one_to_many"]["mean_tpir"][f"{fpir:g}"], abs=1e-9)


def roc_points(scores, same):
    """The points of scikit-learn's roc_curve with its defaults (metrics/_ranking.py), one after the other."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    tps = np.cumsum(same[order])[ends]
    fps = 1 + ends - tps
    if len(fps) > 2:
        kept = np.append(np.append(True, (np.diff(fps, 2) != 0) | (np.diff(tps, 2) != 0)), True)
        fps, tps = fps[kept], tps[kept]
    fps, tps = np.append(0, fps), np.append(0, tps)
    return fps / fps[-1], tps / tps[-1]


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 20))
def test_nearest_points_are_those_of_roc_curve(seed, count, values):
    generator = np.random.default_rng(seed)
    scores = generator.integers(values, size=count) / 8
    same = generator.random(count) < 0.4
    same[:2] = True, False
    far, tar = roc_points(scores, same)
    targets = np.append(generator.random(5), [1e-6, 0.1, 1.0])
    genuine, impostor = (np.sort(scores[kind])[::-1] for kind in (same, ~same))
    found, area = kernels.nearest_points(genuine, impostor, targets)
    flipped_far, flipped_tar = far[::-1], tar[::-1]  # the first of equals is the one of the largest TAR
    assert np.array_equal(found, [flipped_tar[np.argmin(abs(flipped_far - target))] for target in targets])
    assert area == pytest.approx(np.trapezoid(tar, far))


def test_roc_points_are_those_of_scikit_learn():
    ranking = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for _ in range(50):
        scores, same = generator.integers(30, size=200) / 8, generator.random(200) < 0.3
        far, tar, _ = ranking.roc_curve(same, scores)
        found = roc_points(scores, same)
        assert np.array_equal(found[0], far) and np.array_equal(found[1], tar)


@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.1, 0.5, 1.0]))
def test_point_of_sorted_scores_is_the_operating_point(seed, far):
    generator = np.random.default_rng(seed)
    cosines, same = generator.integers(-8, 9, 60) / 8, generator.random(60) < 0.4
    cosines[generator.random(60) < 0.1] = np.nan
    same[:2], cosines[:2] = (True, False), 0.5
    scores = metrics.worst_scores(cosines, same)
    found = metrics.point_at(np.sort(scores[same])[::-1], np.sort(scores[~same])[::-1], far)
    assert found == metrics.operating_point(metrics.curve(cosines, same), far)


@pytest.mark.parametrize("dimensions", [1, 5, 8, 9, 64, 100, 127, 128, 129, 200, 512, 513, 1000])
def test_scores_are_added_as_numpy_adds(dimensions):
    generator = np.random.default_rng(dimensions)
    embeddings = generator.standard_normal((40, dimensions))
    left, right = generator.integers(40, size=(2, 300)).astype(np.int32)
    bounds, merges = kernels.pairwise_plan(dimensions)
    scores = np.empty(300)
    kernels.score_pairs(kernels.arrange(embeddings, bounds), left, right, merges, 0, 300, scores)
    assert np.array_equal(scores, np.sum(embeddings[left] * embeddings[right], -1))


# --- properties -----------------------------------------------------------------------------------------------------


def invented(generator, images=40, templates=12, dimensions=16, zeros=0.1):
    """Lists and features in which templates have one image or many, not side by side, and media are shared."""
    numbers = generator.choice(1000, templates, replace=False)
    template = np.concatenate([numbers, generator.choice(numbers[: templates // 2], images - templates)])
    generator.shuffle(template)
    features = generator.integers(-3, 4, (2, images, dimensions)).astype(np.float32)
    features[:, generator.random(images) < zeros] = 0
    lists = Lists(
        "IJB-C",
        Path(),
        "ijbc",
        [f"{number}.jpg" for number in range(images)],
        template,
        template * 4 + generator.integers(4, size=images),
        np.zeros((images, 5, 2), np.float32),
        generator.choice(np.array([0.1, 0.5, 0.999], np.float32), images),
    )
    first, second = generator.choice(numbers, (2, 80))
    return lists, features, Pairs(first, second, generator.random(80) < 0.4)


def plain_embeddings(lists, features, treatment):
    """Templates one image after the other, without any library's help."""
    result = []
    for number in sorted(set(lists.templates.tolist())):
        medias = {}
        for row in np.flatnonzero(lists.templates == number):
            value = features[0, row] + features[1, row] if treatment.mirror else features[0, row]
            length = np.sqrt(float((value.astype(float) ** 2).sum()))
            value = value / np.float32(length or 1) if treatment.unit else value
            value = value * lists.scores[row] if treatment.weighted else value
            medias.setdefault(lists.medias[row], []).append(value.astype(float))
        total = sum(sum(values) / len(values) for values in medias.values())
        result.append(total / (np.linalg.norm(total) or 1))
    return np.array(result)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_templates_are_pooled_as_told(seed):
    lists, features, _ = invented(np.random.default_rng(seed))
    templates = pool(ImageFeatures.of_arrays(*features), lists)
    assert not templates.lost.any()
    side_by_side = pool(ImageFeatures.of_rows(np.hstack(features), []), lists)
    for treatment in TREATMENTS:
        embeddings = templates.embeddings(treatment)
        assert np.allclose(embeddings, plain_embeddings(lists, features, treatment), atol=1e-5)
        assert np.isfinite(embeddings).all()  # zero stays zero
        assert np.array_equal(side_by_side.embeddings(treatment), embeddings)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_order_does_not_matter(seed):
    """Neither that of images and pairs, nor which numbers templates have; what is printed stays to the last digit."""
    generator = np.random.default_rng(seed)
    lists, features, pairs = invented(generator)
    same = pairs.same.copy()
    same[:2] = True, False
    pairs = replace(pairs, same=same)

    def figures(lists, features, pairs):
        templates = pool(ImageFeatures.of_arrays(*features), lists)
        scorer = one_to_one.PairScorer(pairs, templates)
        scores = scorer.scores(templates.embeddings(USUAL))
        found = one_to_one.verification(scores, scorer.same, USUAL, (0.05, 0.1, 0.5))
        listed = np.empty_like(scores)
        listed[scorer.order] = scores
        return listed, found

    scores, found = figures(lists, features, pairs)
    # Integers as features: sums of float32 are exact, whatever their order; the detector's score is not.
    lists = replace(lists, scores=np.ones(len(lists.images), np.float32))
    scores, found = figures(lists, features, pairs)
    images, places = generator.permutation(len(lists.images)), generator.permutation(len(pairs.same))
    renumbered = np.append(0, generator.permutation(1000) + 7)
    moved = replace(
        lists,
        images=[lists.images[row] for row in images],
        templates=renumbered[lists.templates[images] + 1],
        medias=lists.medias[images],
        scores=lists.scores[images],
    )
    swapped = Pairs(renumbered[pairs.second[places] + 1], renumbered[pairs.first[places] + 1], pairs.same[places])
    others, again = figures(moved, features[:, images], swapped)
    assert np.allclose(others, scores[places], atol=1e-6)
    assert again.area == pytest.approx(found.area, abs=1e-3)
    if np.array_equal(others, scores[places]):
        assert again == found


def test_lengths_that_are_nothing_are_not_divided_by():
    """scikit-learn's normalize, which the public programs call, takes lengths below ten float spacings for zero."""
    lists, features, _ = invented(np.random.default_rng(3), zeros=0)
    embs = features[0]
    embs[0] *= 1e-8
    unit = next(one for one in TREATMENTS if one.name == "N1D0F0")
    alone = replace(lists, templates=np.arange(len(embs)), medias=np.arange(len(embs)))
    pooled = pool(ImageFeatures.of_arrays(embs, embs), alone).pooled[unit.index]
    assert np.array_equal(pooled[0], embs[0]) and np.linalg.norm(pooled[1]) == pytest.approx(1)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_a_lost_template_fails_every_pair(seed):
    generator = np.random.default_rng(seed)
    lists, features, pairs = invented(generator, zeros=0)
    pairs.same[:2] = True, False
    gone = pairs.first[0]
    features[:, lists.templates == gone] = np.nan
    templates = pool(ImageFeatures.of_arrays(*features), lists)
    assert templates.numbers[templates.lost].tolist() == [gone]
    scorer = one_to_one.PairScorer(pairs, templates)
    for treatment in TREATMENTS:
        scores = scorer.scores(templates.embeddings(treatment))
        lost = ((pairs.first == gone) | (pairs.second == gone))[scorer.order]
        assert (scores[lost & scorer.same] == -np.inf).all() and (scores[lost & ~scorer.same] == np.inf).all()
        assert np.isfinite(scores[~lost]).all()
    # Some images less are another matter: the others speak for the template.
    lists, features, _ = invented(np.random.default_rng(seed), zeros=0)
    many = np.flatnonzero(np.bincount(lists.templates)[lists.templates] > 1)
    features[0, many[0]] = np.inf
    less = pool(ImageFeatures.of_arrays(*features), lists)
    there = np.arange(len(lists.images)) != many[0]
    short = replace(
        lists,
        images=[image for image, stays in zip(lists.images, there, strict=True) if stays],
        templates=lists.templates[there],
        medias=lists.medias[there],
        scores=lists.scores[there],
    )
    expected = pool(ImageFeatures.of_arrays(*features[:, there]), short)
    assert not less.lost.any() and np.array_equal(less.pooled, expected.pooled)


def plain_gallery(gallery, probes, embedding):
    """Closed and open set as the public program loops over probes."""
    hits, mates, best = dict.fromkeys((1, 5, 10), 0), [], []
    for number, subject in zip(probes.templates, probes.subjects, strict=True):
        scores = np.array([embedding[number] @ embedding[other] for other in gallery.templates])
        if subject not in gallery.subjects:
            best.append(scores.max())
            continue
        mate = int(np.argwhere(gallery.subjects == subject)[0, 0])
        ranking = np.argsort(scores, kind="stable")[::-1]
        for rank in hits:
            hits[rank] += mate in ranking[:rank]
        mates.append((scores[mate], np.delete(scores, mate).max()))
    best = np.sort(best)[::-1]
    tpir = {}
    for fpir in one_to_many.CURVE[::25]:
        threshold = best[max(int(len(best) * fpir), 1) - 1]
        tpir[fpir] = np.mean([own > rival and own > threshold for own, rival in mates])
    return hits, tpir


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_identification_with_ties_and_zeros(seed):
    generator = np.random.default_rng(seed)
    lists, features, _ = invented(generator, images=60, templates=30, dimensions=3)
    templates = pool(ImageFeatures.of_arrays(*features), lists)
    embeddings = generator.integers(-2, 3, (30, 3)).astype(float)  # few directions: many ties, and some zeros
    numbers = generator.permutation(templates.numbers)
    gallery = People(np.sort(numbers[:8]), np.array([f"s{number}" for number in range(8)]))
    probes = People(np.sort(numbers[8:]), generator.choice([f"s{number}" for number in range(12)], 22))
    if not np.isin(probes.subjects, gallery.subjects).any() or np.isin(probes.subjects, gallery.subjects).all():
        return
    found = one_to_many.against("G1", gallery, probes, templates, embeddings, replicates=100)
    hits, tpir = plain_gallery(gallery, probes, dict(zip(templates.numbers, embeddings, strict=True)))
    assert found.hits == hits
    assert {fpir: found.printed[fpir] for fpir in tpir} == pytest.approx(tpir)
    for rank in hits:
        assert found.hits_strict[rank] <= found.hits[rank]
    for detection in found.detections:
        assert detection.tpir is None or detection.false_alarms <= detection.fpir * detection.others


def test_lost_probes_and_people_of_a_gallery():
    """Whoever is lost finds nobody, is found by nobody, and is taken for somebody."""
    embeddings = np.eye(6)
    embeddings[[1, 3, 5]] = np.nan
    lists, features, _ = invented(np.random.default_rng(0), images=6, templates=6)
    lists = replace(lists, templates=np.arange(6))
    templates = pool(ImageFeatures.of_arrays(*features), lists)
    gallery = People(np.array([0, 1]), np.array(["a", "b"]))
    probes = People(np.array([2, 3, 4, 5]), np.array(["a", "a", "b", "c"]))
    embeddings[2], embeddings[4] = embeddings[0], 0
    found = one_to_many.against("G1", gallery, probes, templates, embeddings, fpir_levels=[1.0], replicates=100)
    assert found.mated == 3 and found.hits == {1: 1, 5: 1, 10: 1} and found.thresholds[1.0] == np.inf
    assert found.ranks[0] == 1 and (found.ranks[1:] > 1000).all()


def test_more_lost_probes_than_alarms_allowed_leave_a_rate_open():
    best = np.array([np.inf, np.inf, *np.linspace(0.5, 0, 18)])
    mates = np.linspace(1, 0, 10)
    few, many = one_to_many._detections(mates, np.arange(10), best, np.arange(20), [0.05, 0.1], replicates=20)
    assert few.tpir is None and few.threshold is None
    assert many.threshold == 0.5 and many.false_alarms == 2 and many.tpir == 0.5


def test_identities_join_what_lists_and_pairs_say():
    lists, features, _ = invented(np.random.default_rng(1), images=6, templates=6)
    lists = replace(lists, templates=np.arange(6))
    templates = pool(ImageFeatures.of_arrays(*features), lists)
    pairs = Pairs(np.array([0, 1]), np.array([1, 4]), np.array([True, False]))
    known = [People(np.array([1, 2]), np.array(["x", "x"])), People(np.array([3]), np.array(["y"]))]
    person = one_to_one.identities(pairs, templates, known)
    assert person[0] == person[1] == person[2] and len(set(person[2:])) == 4
    assert len(set(one_to_one.identities(pairs, templates, []))) == 5


# --- files ----------------------------------------------------------------------------------------------------------


def small_protocol(folder, prefix="ijbc"):
    galleries = ("G1", "G2") if prefix == "ijbc" else ("S1", "S2")
    return write_lists(
        folder,
        prefix,
        ["1.jpg", "2.jpg", "3.jpg", "4.jpg"],
        [7, 7, 8, 9],
        [1, 1, 2, 3],
        np.zeros((4, 5, 2)),
        [0.5] * 4,
        [(7, 8, 1), (7, 9, 0)],
        {galleries[0]: [(7, 1, "1.jpg"), (7, 1, "2.jpg")], galleries[1]: [(9, 2, "4.jpg")]},
        [(8, 1, "3.jpg")],
    )


@pytest.mark.parametrize(("prefix", "subset"), [("ijbc", "IJB-C"), ("ijbb", "IJB-B")])
def test_the_files_say_which_set_it_is(tmp_path, prefix, subset):
    lists = read_lists(small_protocol(tmp_path, prefix))
    assert lists.subset == subset and read_lists(tmp_path / "meta").images == lists.images
    assert read_people(lists, f"1N_gallery_{lists.galleries[0]}").templates.tolist() == [7]
    assert read_pairs(lists).same.tolist() == [True, False]
    small_protocol(tmp_path, "ijbb" if prefix == "ijbc" else "ijbc")
    with pytest.raises(InputError, match="give a folder of one"):
        read_lists(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("face_tid_mid.txt", "3.jpg 8 2", "3.jpg 8", "line 3: 2 fields instead of 3"),
        ("face_tid_mid.txt", "3.jpg 8 2", "3.jpg eight 2", "line 3: 'eight' is not a number"),
        ("name_5pts_score.txt", "2.jpg", "5.jpg", "line 2: 5.jpg, but .* has 2.jpg there"),
        ("name_5pts_score.txt", "0.500", "nan", "line 1: a number that is not finite"),
        ("template_pair_label.txt", "7 9 0", "7 9 2", "line 2: label 2"),
        ("template_pair_label.txt", "7 9 0", "7 5 0", "line 2: template 5 has no image"),
        ("template_pair_label.txt", "7 9 0", "7 9", "line 2: 2 fields instead of 3"),
        ("template_pair_label.txt", "7 9 0", "7 x 0", "line 2: 'x' is not a number"),
        ("template_pair_label.txt", "7 8 1\n7 9 0\n", "", "holds no lines"),
        ("1N_gallery_G1.csv", "7,1,2.jpg", "7,5,2.jpg", "line 3: template 7 has another subject"),
        ("1N_gallery_G1.csv", "7,1,2.jpg", "7", "line 3: neither a template nor a subject"),
        ("1N_gallery_G1.csv", "7,1,2.jpg", "7,1", "line 3: 2 fields instead of 3"),
        ("1N_probe_mixed.csv", "8,1", "6,1", "line 2: template 6 has no image"),
        ("1N_probe_mixed.csv", "8,1,3.jpg\n", "", "no template"),
    ],
)
def test_damaged_lists(tmp_path, file, old, new, message):
    path = small_protocol(tmp_path) / "meta" / f"ijbc_{file}"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

    def read():
        lists = read_lists(tmp_path)
        return read_pairs(lists), read_people(lists, "1N_gallery_G1"), read_people(lists, "1N_probe_mixed")

    with pytest.raises(InputError, match=f"{re.escape(path.name)}.*{message}"):
        read()


def test_features_of_elsewhere(tmp_path):
    lists = read_lists(small_protocol(tmp_path))
    path = tmp_path / "features.npz"
    good = np.ones((4, 8), np.float32)

    def refused(message, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=message):
            crops.read_features(path, lists)

    refused("no array embs_f", embs=good)
    refused("has 3 rows, but the lists have 4", embs=good[:3], embs_f=good[:3])
    refused("embs_f is float32", embs=good, embs_f=good[:, :4])
    refused("not one row is finite", embs=good * np.nan, embs_f=good)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        crops.read_features(path, lists)
    gappy = good.copy()
    gappy[0, 3], gappy[2, 3] = 1e30, np.inf
    gappy[1] = 0
    np.savez(path, embs=gappy, embs_f=gappy)
    features, gone = crops.read_features(path, lists)
    assert features.there.tolist() == [False, True, False, True] and features.zeros() == 1
    assert gone == {row: f"{row + 1}.jpg: a number that is not finite, or beyond 1e18" for row in (0, 2)}
    rows = np.concatenate([gappy, good], axis=1)
    assert ImageFeatures.of_rows(rows, gone).zeros() == 0
    rows[1] = 0
    assert ImageFeatures.of_rows(rows, gone).zeros() == 1


# --- from photos to results -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lfw_tree(shared, tmp_path_factory):
    return tree_of_lfw(shared / "lfw", tmp_path_factory.mktemp("ijb"), RetinaFace(), people=6)


@pytest.fixture
def run(monkeypatch, capsys):
    """ijb_eval.py in this process: exit code, standard output and error."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["ijb_eval.py", *map(str, arguments)])
        capsys.readouterr()
        code = ijb_eval.main()
        return code, *capsys.readouterr()

    return start


def test_from_photos_to_results(lfw_tree, tmp_path, run):
    tree = shutil.copytree(lfw_tree, tmp_path / "IJBC")
    (tree / "loose_crop" / "1.jpg").unlink()  # of template 10, which has another image
    for image in ("6.jpg", "8.jpg"):  # all of template 13
        (tree / "loose_crop" / image).write_bytes(b"no photo")
    model = write_onnx(tmp_path / "toy.onnx")
    arguments = ("--checkpoint", model, "--mean", 0.5, "--std", 0.5, "--ijb", tree, "--out", tmp_path / "out")
    code, output, _ = run(*arguments, "--replicates", 100, "--save-scores")
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"] == "IJB-C" and results["model"]["name"] == "toy.onnx"
    assert results["missing"]["images"] == 3 and results["missing"]["lost_template_numbers"] == [13]
    digest = results["data"]["photos_sha256"]
    reasons = results["missing"]["reasons"]
    assert reasons[0] == "1.jpg: missing" and reasons[1].startswith("6.jpg: not a photo")
    assert "3 of 24 images have no feature; 1 templates have none left" in output and "1.jpg: missing" in output
    assert (tmp_path / "out" / "roc.png").is_file()

    # The same figures from features by hand, as --features takes them.
    lists = read_lists(tree)
    plain = load_embedder(model, mean=(0.5,) * 3, std=(0.5,) * 3, mirror=False)
    features = np.full((2, 24, 4), np.nan, np.float32)
    for row in range(24):
        crop = crops.cut_image(lists, tree / "loose_crop", row)
        if crop is not None:
            features[:, row] = [plain.features(image[None])[0] for image in (crop, crop[:, ::-1])]
    np.savez(tmp_path / "features.npz", embs=features[0], embs_f=features[1])
    run("--features", tmp_path / "features.npz", "--ijb", tree, "--out", tmp_path / "other", "--replicates", 100)
    other = json.loads((tmp_path / "other" / "results.json").read_text())
    assert other["one_to_one"] == results["one_to_one"] and other["one_to_many"] == results["one_to_many"]
    scores = np.load(tmp_path / "out" / "scores.npz")["N0D1F1"]
    pairs = read_pairs(lists)
    lost = (pairs.first == 13) | (pairs.second == 13)
    assert (scores[lost & pairs.same] == -np.inf).all() and (scores[lost & ~pairs.same] == np.inf).all()

    # What is there already is not computed again; another photo is.
    stored = next((tmp_path / "out").glob("features-*/embeddings.npy"))
    before = stored.stat().st_mtime_ns
    run(*arguments, "--protocol", "1:N", "--replicates", 100)
    assert stored.stat().st_mtime_ns == before
    shutil.copy(tree / "loose_crop" / "2.jpg", tree / "loose_crop" / "1.jpg")
    run(*arguments, "--replicates", 100, "--protocol", "1:1")
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["missing"]["images"] == 2 and "one_to_many" not in again
    assert again["data"]["photos_sha256"] != digest
    (tree / "loose_crop" / "1.jpg").unlink()
    moved = shutil.copytree(tree, tmp_path / "elsewhere")
    lists = read_lists(moved)
    files = [moved / "loose_crop" / image for image in lists.images]
    assert contents.photos_sha256(files, lists.images, tmp_path / "cache") == digest
    assert contents.photos_sha256(files, lists.images, tmp_path / "cache") == digest


def test_landmarks_of_the_list_give_the_crop(lfw_tree):
    """The crop is the one that the landmarks describe: eyes and mouth lie where ArcFace's template has them."""
    lists = read_lists(lfw_tree)
    crop = crops.cut_image(lists, lfw_tree / "loose_crop", 0)
    found = RetinaFace().detect([np.ascontiguousarray(crop[..., ::-1])])[0]
    assert crop.shape == (112, 112, 3) and len(found.scores)
    assert np.abs(found.landmarks[0] - crops.align.TEMPLATE).max() < 6


def test_killed_it_goes_on(lfw_tree, tmp_path, monkeypatch):
    """What a killed run has finished is not computed again, and a damaged chunk is."""
    lists = read_lists(lfw_tree)
    embedder = load_embedder(write_onnx(tmp_path / "toy.onnx"), mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr("formats.embeddings.CHUNK", 8)
    seen = []

    class Killed(BaseException):
        pass

    original = crops._features

    def counted(plain, images, count, width):
        if len(seen) == 2:
            raise Killed
        seen.append(count)
        return original(plain, images, count, width)

    monkeypatch.setattr(crops, "_features", counted)
    with pytest.raises(Killed):
        crops.embed_images(lists, lfw_tree / "loose_crop", embedder, tmp_path, workers=1)
    monkeypatch.setattr(crops, "_features", lambda *args: seen.append(args[2]) or original(*args))
    features, gone = crops.embed_images(lists, lfw_tree / "loose_crop", embedder, tmp_path, workers=1)
    assert seen == [8, 8, 8] and not gone
    with open(next(tmp_path.glob("features-*/embeddings.npy")), "r+b") as file:
        file.seek(-100, 2)
        file.write(b"x")
    again, _ = crops.embed_images(lists, lfw_tree / "loose_crop", embedder, tmp_path, workers=1)
    assert seen == [8, 8, 8, 8] and np.array_equal(again.rows, features.rows)


@pytest.mark.parametrize(
    ("protocol", "name", "text", "message"),
    [
        ("1:1", "template_pair_label.txt", None, "ijbc_template_pair_label.txt: No such file"),
        ("1:1", "1N_gallery_G1.csv", "a,b\n7\n", "line 2: neither a template"),
        ("1:1", "1N_gallery_G1.csv", None, ""),
        ("1:N", "template_pair_label.txt", None, ""),
        ("1:N", "1N_gallery_G2.csv", None, "ijbc_1N_gallery_G2.csv: No such file"),
        ("1:N", "1N_probe_mixed.csv", "a,b\n7\n", "line 2: neither a template"),
    ],
)
def test_lists_that_fail_do_so_before_features_are_computed(tmp_path, run, monkeypatch, protocol, name, text, message):
    path = small_protocol(tmp_path / "IJBC") / "meta" / f"ijbc_{name}"
    path.unlink() if text is None else path.write_text(text)
    (tmp_path / "IJBC" / "loose_crop").mkdir()

    def begin(*_):
        raise InputError("hours of work")

    monkeypatch.setattr(ijb_eval, "embed_images", begin)
    model = ("--checkpoint", write_onnx(tmp_path / "toy.onnx"), "--mean", 0.5, "--std", 0.5)
    code, _, error = run(*model, "--ijb", tmp_path / "IJBC", "--protocol", protocol, "--out", tmp_path / "out")
    assert code == 1 and (message or "hours of work") in error


def test_one_miss_in_many_is_no_hundred_per_cent():
    genuine = np.append(np.full(59_999, 0.9), 0.1)
    point = metrics.point_at(genuine, np.full(100, 0.2), 0.1)
    assert report._tar(point) == "99.998" and "99.998 %" in report._point_line(point, None)
    rate = Interval(1 - 1e-5, 0.99, 1.0, 5, 100)
    gallery = one_to_many.Gallery(
        "G1", 1, 1, 1, {}, {}, {}, {}, [one_to_many.Detection(fpir, 9, tpir=1 - 1e-5) for fpir in (1e-2, 1e-1)],
        np.zeros(1, int), np.zeros(1, int),
    )  # fmt: skip
    found = one_to_many.Identification(
        (gallery,), dict.fromkeys(one_to_many.RANKS, 1.0), dict.fromkeys(one_to_many.CURVE, 1.0),
        dict.fromkeys(one_to_many.RANKS, rate),
    )  # fmt: skip
    lists = Lists("IJB-C", Path(), "ijbc", [], *np.zeros((4, 0)))
    text = report.table(lists, {"images": 0, "zero_features": 0}, [], found)
    assert text.count("| 99.999 (99.00 ... 100.00)") == 3 and text.count("G1 99.999") == 2


def test_errors_are_one_line(lfw_tree, tmp_path, run):
    out = ("--out", tmp_path / "out")
    for arguments, message in [
        (("--ijb", lfw_tree, *out), "give --checkpoint FILE or --features FILE.npz"),
        (("--ijb", tmp_path / "nowhere", "--features", "x.npz", *out), "nowhere: no such folder"),
        (("--ijb", tmp_path, "--features", "x.npz", *out), "no list"),
        (("--ijb", lfw_tree, "--features", tmp_path / "x.npz", *out), "x.npz: No such file"),
    ]:
        code, output, error = run(*arguments)
        assert code == 1 and not output and error.startswith("error: ") and message in error
        assert error.count("\n") == 1
