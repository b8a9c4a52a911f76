"""TinyFace: golden files of public code, lists of any kind, a transcription with ties, and a run from photos."""

import json
import re
import sys

import cv2
import numpy as np
import pytest
import scipy.io
from helpers.toy_models import write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyface_eval
from ijb import tinyface
from ijb.tinyface import Lists, read_lists, refuse_gaps, search
from retinaface import RetinaFace
from utils import InputError
from verification.intervals import Interval


@pytest.fixture
def run(monkeypatch, capsys):
    """tinyface_eval.py in this process: exit code, standard output and error."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["tinyface_eval.py", *map(str, arguments)])
        capsys.readouterr()
        code = tinyface_eval.main()
        return code, *capsys.readouterr()

    return start


@pytest.mark.parametrize("case", ["small", "medium"])
def test_ranks_as_public_code_prints_them(shared, tmp_path, case, run):
    folder = shared / "ijb" / case / "tinyface"
    assert run("--features", folder / "features.npz", "--lists", folder, "--out", tmp_path, "--replicates", 100)[0] == 0
    results = json.loads((tmp_path / "results.json").read_text())
    golden = json.loads((folder / "golden.json").read_text())
    assert results["as_printed"] == golden  # to the last digit
    assert results["rank_1"]["value"] == pytest.approx(golden["rank-1"] / 100, abs=1e-6)
    assert 0 < results["mean_average_precision"]["value"] < results["rank_20"]["value"]


def plain_search(lists, embeddings):
    """Rank-k as CVLface's DIR_FAR, and mAP, one probe after the other."""
    names = lists.gallery_match + lists.gallery_distractor
    gallery = embeddings[len(lists.probe) :]
    hits, precisions = [], []
    for name, embedding in zip(lists.probe, embeddings, strict=False):
        subject = name.split("_")[0]
        mate = np.array([other.split("_")[0] == subject for other in lists.gallery_match])
        mate = np.append(mate, np.zeros(len(names) - len(mate), bool))
        if not mate.any():
            continue
        scores = gallery @ embedding
        ranked = mate[np.argsort(scores, kind="stable")[::-1]]
        hits.append([ranked[:k].any() for k in tinyface.RANKS])
        ranked = mate[np.lexsort((mate, -scores))]  # equal scores: mates last
        places = 1 + np.flatnonzero(ranked)
        precisions.append(np.mean((1 + np.arange(len(places))) / places))
    return 100 * np.mean(hits, axis=0), np.mean(precisions)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_search_with_ties_and_zeros(seed):
    generator = np.random.default_rng(seed)
    people = generator.integers(8, size=(2, 12))
    lists = Lists(
        [f"{person}_{number}.jpg" for number, person in enumerate(people[0])],
        [f"{person}_x{number}.jpg" for number, person in enumerate(people[1])],
        [f"{number}.jpg" for number in range(30)],
        ["lists"],
    )
    if not np.isin(*people).any():
        return
    embeddings = generator.integers(-2, 3, (len(lists.names), 3)).astype(float)  # exact products, many equal
    found = search(lists, embeddings, replicates=100)
    printed, precision = plain_search(lists, embeddings)
    assert list(found.printed.values()) == pytest.approx(printed)
    assert found.mean_precision.value == pytest.approx(precision)
    assert all(100 * found.rates[rank].value <= found.printed[rank] + 1e-5 for rank in tinyface.RANKS)
    order = generator.permutation(12)
    moved = Lists([lists.probe[row] for row in order], *(lists.gallery_match, lists.gallery_distractor, lists.files))
    again = search(moved, np.concatenate([embeddings[:12][order], embeddings[12:]]), replicates=100)
    assert again.printed == pytest.approx(found.printed)


def test_what_is_lost_is_not_found():
    lists = Lists(["1_1.jpg", "2_1.jpg", "3_1.jpg"], ["1_2.jpg", "2_2.jpg", "3_2.jpg"], [], ["lists"])
    embeddings = np.concatenate([np.eye(3), np.eye(3)])
    embeddings[0], embeddings[4] = np.nan, np.nan
    found = search(lists, embeddings, replicates=100)
    assert found.printed == pytest.approx({1: 100 / 3, 5: 100 / 3, 20: 100 / 3})
    assert found.mean_precision.value == pytest.approx(1 / 3)


def test_lists_of_any_kind(tmp_path):
    probe, match, distractors = ["1_1.jpg", "2_1.jpg"], ["1_2.jpg", "2_2.jpg"], ["7.jpg", "8.jpg"]
    official = tmp_path / "official" / "Testing_Set"
    (official / "Gallery_Distractor").mkdir(parents=True)
    for name in distractors:
        (official / "Gallery_Distractor" / name).touch()
    for file, key, names in [
        ("probe_img_ID_pairs.mat", "probe_set", probe),
        ("gallery_match_img_ID_pairs.mat", "gallery_set", match),
    ]:
        cells = np.array([[name] for name in names], dtype=object)
        scipy.io.savemat(official / file, {key: cells, key.replace("set", "ids"): np.array([[1], [2]])})
    text = tmp_path / "text"
    text.mkdir()
    for name, names in zip(("probe", "gallery_match", "gallery_distractor"), (probe, match, distractors), strict=True):
        (text / f"{name}.txt").write_text("\n".join(names) + "\n")
    stored = tmp_path / "lists.json"
    stored.write_text(json.dumps({"probe": probe, "gallery_match": match, "gallery_distractor": distractors}))
    for source in (tmp_path / "official", official, text, stored):
        lists = read_lists(source)
        assert (lists.probe, lists.gallery_match, lists.gallery_distractor) == (probe, match, distractors)
    assert read_lists(official).paths(official)[-1] == official / "Gallery_Distractor" / "8.jpg"


def test_distractors_of_a_folder_are_its_photos(tmp_path):
    for name in ("probe", "gallery_match"):
        (tmp_path / f"{name}.txt").write_text("1_1.jpg\n")
    folder = tmp_path / "Gallery_Distractor"
    (folder / "more").mkdir(parents=True)
    for name in (".DS_Store", "Thumbs.db", "list.txt"):
        (folder / name).touch()
    with pytest.raises(InputError, match="Gallery_Distractor: holds no photos"):
        read_lists(tmp_path)
    for name in ("7.jpg", "8"):
        (folder / name).touch()
    assert read_lists(tmp_path).gallery_distractor == ["7.jpg", "8"]


@pytest.mark.parametrize("place", ["probe", "gallery_match", "gallery_distractor"])
def test_no_figure_where_most_of_a_list_has_no_feature(tmp_path, run, place):
    lists = {
        "probe": ["1_1.jpg", "2_1.jpg", "3_1.jpg", "4_1.jpg"],
        "gallery_match": ["1_2.jpg", "2_2.jpg", "3_2.jpg", "4_2.jpg"],
        "gallery_distractor": ["5.jpg", "6.jpg", "7.jpg", "8.jpg"],
    }
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    names = [name for some in lists.values() for name in some]
    features = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    arguments = ("--features", tmp_path / "f.npz", "--lists", tmp_path / "lists.json", "--out", tmp_path / "out")
    for lost in (2, 3):
        features[[names.index(name) for name in lists[place][:lost]]] = np.nan
        np.savez(tmp_path / "f.npz", features=features, names=names)
        (tmp_path / "out" / "results.json").unlink(missing_ok=True)
        code, _, error = run(*arguments, "--replicates", 100)
        assert code == (lost > 2) and (tmp_path / "out" / "results.json").exists() == (lost == 2)
    assert f"lists.json: 3 of 4 of {place} have no feature, the first is {lists[place][0]}" in error
    refuse_gaps(Lists(["1_1.jpg"], ["1_2.jpg"], [], [tmp_path]), np.ones((2, 4)))  # a list may be empty


def test_names_that_stand_there_twice_are_told():
    assert Lists(["1_1.jpg"], ["1_2.jpg"], ["7.jpg"], []).notes() == []
    notes = Lists(["1_1.jpg", "1_1.jpg"], ["1_1.jpg", "1_2.jpg"], ["7.jpg", "7.jpg"], []).notes()
    assert [note.split(" again")[0] for note in notes[:2]] == [
        "1 names stand in probes",
        "1 names stand in the gallery",
    ]
    assert "1 probes are in the gallery, too" in notes[2] and "1_1.jpg" in notes[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": ["x_1.jpg"]}, "x_1.jpg: no number of a subject"),
        ({"probe": ["../1_1.jpg"]}, "is not the name of a file"),
        ({"probe": []}, "the list probe is empty"),
        ({"gallery_match": "1_2.jpg"}, "gallery_match is not a list"),
    ],
)
def test_damaged_lists(tmp_path, change, message):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"probe": ["1_1.jpg"], "gallery_match": ["1_2.jpg"], "gallery_distractor": []} | change))
    with pytest.raises(InputError, match=message):
        read_lists(path)
    (tmp_path / "probe_img_ID_pairs.mat").write_bytes(b"no matrix")
    path.unlink()
    with pytest.raises(InputError, match=r"not a \.mat file"):
        read_lists(tmp_path)


@pytest.fixture(scope="module")
def tiny_lfw(shared, tmp_path_factory):
    """Faces of LFW about 30 pixels wide, in TinyFace's layout; one picture shows no face, one is damaged."""
    folder = tmp_path_factory.mktemp("tinyface")
    people = sorted(path for path in (shared / "lfw" / "lfw-deepfunneled").iterdir() if len(list(path.iterdir())) >= 3)
    for name in ("Probe", "Gallery_Match", "Gallery_Distractor"):
        (folder / name).mkdir()
    names = {"probe": [], "gallery_match": [], "gallery_distractor": []}
    for number, person in enumerate(people[:8], 1):
        for index, file in enumerate(sorted(person.iterdir())[:2]):
            face = cv2.resize(cv2.imread(str(file))[60:190, 65:185], (36, 39), interpolation=cv2.INTER_AREA)
            kind = ("probe", "gallery_match")[index] if number < 7 else "gallery_distractor"
            name = f"{number}_{index}.png" if number < 7 else f"{10 * number + index}.png"
            names[kind].append(name)
            cv2.imwrite(str(folder / tinyface._FOLDERS[kind] / name), face)
    cv2.imwrite(str(folder / "Gallery_Distractor" / "70.png"), np.full((20, 30, 3), 90, np.uint8))
    (folder / "Probe" / "1_0.png").write_bytes(b"nothing")
    (folder / "lists.json").write_text(json.dumps(names))
    return folder


def test_from_photos_to_results(tiny_lfw, tmp_path, run):
    model = write_onnx(tmp_path / "toy.onnx")
    arguments = ("--checkpoint", model, "--mean", 0.5, "--std", 0.5, "--tinyface", tiny_lfw, "--replicates", 100)
    code, output, _ = run(*arguments, "--out", tmp_path / "out")
    assert code == 0 and "1 photos give no feature and fail:\n  Probe/1_0.png" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["photos"]["aligned"] >= 13 and results["photos"]["whole_picture_resized"] >= 1
    assert results["mated_probes"] == 6 and results["data"]["distractors"] == 4
    assert not results["photos"]["aligned_before"] and len(results["photos"]["detector_sha256"]) == 64
    digest = results["data"]["photos_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    stored = next((tmp_path / "out").glob("features-*/embeddings.npy"))
    before = stored.stat().st_mtime_ns
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0 and stored.stat().st_mtime_ns == before
    code, output, _ = run(*arguments, "--aligned", "--out", tmp_path / "out")
    assert code == 0 and "15 photos aligned; of 0 the whole picture was resized" in output
    assert len(list((tmp_path / "out").glob("features-*"))) == 2
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["photos_sha256"] == digest


def test_tiny_faces_are_aligned_on_their_landmarks(tiny_lfw):
    """The crop of a shrunken photo shows its face where that of a large photo does."""
    lists = read_lists(tiny_lfw)
    paths = lists.paths(tiny_lfw)[1:6]
    detector = RetinaFace()
    cuts = tinyface.cutter(paths, detector)(range(5))
    found = detector.detect([np.ascontiguousarray(crop[..., ::-1]) for crop, _ in cuts])
    for (crop, remark), face in zip(cuts, found, strict=True):
        assert crop.shape == (112, 112, 3) and remark == (tinyface.ALIGNED,)
        if len(face.scores):
            assert np.abs(face.landmarks[0] - tinyface_eval.align.TEMPLATE).max() < 12


def test_one_miss_in_many_is_no_hundred_per_cent():
    assert tinyface_eval._cell(Interval(1 - 1e-5, 0.99, 1.0, 5, 100)) == "99.999 (99.00 ... 100.00)"
    assert tinyface_eval._cell(Interval(0.5, 0.25, 1.0, 5, 100)) == " 50.00 (25.00 ... 100.00)"


def test_errors_are_one_line(tmp_path, run, shared):
    folder = shared / "ijb" / "small" / "tinyface"
    np.savez(tmp_path / "few.npz", features=np.ones((1, 4), np.float32), names=["1_2.jpg"])
    np.savez(tmp_path / "column.npz", features=np.ones((1, 4), np.float32), names=[["1_2.jpg"]])
    np.savez(tmp_path / "narrow.npz", features=np.ones((1, 0), np.float32), names=["1_2.jpg"])
    for arguments, message in [
        (("--features", tmp_path / "column.npz", "--lists", folder), "features are float32 (1, 4) for names (1, 1)"),
        (("--features", tmp_path / "narrow.npz", "--lists", folder), "features are float32 (1, 0) for names (1,)"),
        (("--lists", folder), "give --checkpoint FILE or --features FILE.npz"),
        (("--features", "x.npz"), "give --tinyface DIR"),
        (("--features", tmp_path / "few.npz", "--lists", folder), "has no features of 535 files"),
        (("--features", folder / "golden.json", "--lists", folder), "not an .npz file"),
        (("--checkpoint", "x.onnx", "--lists", folder), "--checkpoint needs the photos"),
    ]:
        code, output, error = run(*arguments, "--out", tmp_path / "out")
        assert code == 1 and not output and error.startswith("error: ") and message in error
        assert error.count("\n") == 1
