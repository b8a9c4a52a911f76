"""lfw_eval.py from pairs file to report: strict reading, cached faces, figures in the files, restart after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.toy_models import write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lfw_eval
import models
import plotting
from cropping import align
from embedding import Preprocessing, load_embedder
from formats import verification_bin
from utils import InputError
from verification import features, lfw, metrics, report, sets

ROOT = Path(lfw_eval.__file__).parent


# --- pairs files ----------------------------------------------------------------------------------------------------


def write_pairs(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_pairs_of_lfw(shared):
    pairs = lfw.read_pairs(shared / "lfw" / "pairs.txt")
    assert len(pairs.same) == 1800 and pairs.same.sum() == 900
    assert np.array_equal(pairs.folds, np.repeat([0, 1, 2], 600))
    lines = (shared / "lfw" / "pairs.txt").read_text().splitlines()[1:]
    for row in (0, 299, 300, 599, 600, 1799):
        fields = lines[row].split("\t")
        first, second = (pairs.photos[index] for index in pairs.pairs[row])
        if row % 600 < 300:
            assert pairs.same[row] and [first[0], str(first[1]), str(second[1])] == fields and second[0] == first[0]
        else:
            assert not pairs.same[row] and [first[0], str(first[1]), second[0], str(second[1])] == fields
    files = lfw.find_photos(shared / "lfw", pairs, "pairs.txt")
    assert len(files) == len(pairs.photos) and all(file.is_file() for file in files)
    assert files == lfw.find_photos(shared / "lfw" / "lfw-deepfunneled", pairs, "pairs.txt")


@pytest.mark.parametrize(
    ("text", "folds", "photos"),
    [
        ("1\nA\t1\t2\nA\t1\tB\t1\n", [0, 0], [("A", 1), ("A", 2), ("B", 1)]),
        ("1\t1\nA\t0001\t2\nA\t1\tB\t1", [0, 0], [("A", 1), ("A", 2), ("B", 1)]),
        ("1\r\nA\t1\t2\r\nA\t1\tB\t1\r\n\r\n", [0, 0], [("A", 1), ("A", 2), ("B", 1)]),
        ("\ufeff1 1\nA 1 2\nA 1 B 1\n", [0, 0], [("A", 1), ("A", 2), ("B", 1)]),
        ("1\nJosé da Silva\t1\t2\nJosé da Silva\t1\t李 娜\t3\n", [0, 0], None),
        (
            "1\nJosé da Silva 1 2\nJosé da Silva 1 李 娜 3\n",
            [0, 0],
            [("José da Silva", 1), ("José da Silva", 2), ("李 娜", 3)],
        ),
        ("1\n007\t1\t2\n007\t1\t008\t3\n", [0, 0], [("007", 1), ("007", 2), ("008", 3)]),
        ("1\n007 1 2\n007 1 008 3\n", [0, 0], [("007", 1), ("007", 2), ("008", 3)]),
        ("2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t2\nB\t2\tA\t2\n", [0, 0, 1, 1], None),
    ],
)
def test_both_forms_of_lines_and_heads(tmp_path, text, folds, photos):
    pairs = lfw.read_pairs(write_pairs(tmp_path / "pairs.txt", text))
    assert pairs.folds.tolist() == folds
    assert pairs.same.tolist() == [True, False] * (len(folds) // 2)
    if photos:
        assert pairs.photos == photos


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1.*nothing"),
        ("folds 3\n", "line 1"),
        ("0\n", "line 1"),
        ("3\t-1\n", "line 1"),
        ("1 1 1\n", "line 1"),
        ("1\nA\t1\t2\n", "2 lines; line 1 promises 1 folds of 1 [+] 1 pairs, that is 3"),
        ("1\nA\t1\t2\nA\t1\tB\t1\nA\t1\tB\t2\n", "4 lines"),
        ("1\nA\t1\nA\t1\tB\t1\n", "line 2: neither"),
        ("1\nA\t1\t2\nA\tx\tB\t1\n", "line 3: neither"),
        ("1\nA\t1\t2\nA\t1\tB\t1\t5\n", "line 3: neither"),
        ("1\n\nA\t1\tB\t1\n", "line 2"),
        ("1\nA\t1\t2\nA\t1\tA\t2\n", "line 3: four fields but one identity"),
        ("1\nA\t1\t1\nA\t1\tB\t2\n", "line 2: pairs a photo with itself"),
        ("1\n../A\t1\t2\nA\t1\tB\t2\n", "line 2.*cannot be the name"),
        ("1\nA\t1\t2\n..\t1\tB\t2\n", "line 3.*cannot be the name"),
        ("1\nA\t1\t2\nB\t1\t2\n", r"fold 1 \(lines 2 to 3\) has 2 pairs of one identity and 0 of two"),
        ("2 1\nA\t1\t2\nA\t1\tB\t1\nA\t1\tB\t2\nA\t2\tB\t1\n", r"fold 2 \(lines 4 to 5\)"),
        (b"1\nA\xff\t1\t2\nA\t1\tB\t2\n", "UTF-8"),
    ],
)
def test_malformed_pairs_name_the_line(tmp_path, text, reason):
    with pytest.raises(InputError, match=f"pairs.txt: .*{reason}"):
        lfw.read_pairs(write_pairs(tmp_path / "pairs.txt", text))


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\n\r/\\\0\ufeff", exclude_categories=("Cs", "Zl", "Zp", "Cc")),
    min_size=1,
    max_size=12,
).filter(lambda name: name == name.strip() and name not in (".", ".."))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_written_pairs_are_read_back(tmp_path_factory, data, folds, size):
    names = data.draw(
        st.lists(NAMES, min_size=2, max_size=5, unique_by=lambda name: unicodedata.normalize("NFC", name))
    )
    numbers = st.integers(1, 9999)
    lines, expected = [f"{folds}\t{size}"], []
    for _ in range(folds):
        for same in [True] * size + [False] * size:
            first, second = data.draw(st.permutations(names))[:2]
            a = data.draw(numbers)
            b = data.draw(numbers.filter(lambda value, a=a: value != a))
            lines.append(f"{first}\t{a}\t{b}" if same else f"{first}\t{a}\t{second}\t{b}")
            expected.append(((first, a), (first if same else second, b), same))
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    pairs = lfw.read_pairs(write_pairs(path, "\n".join(lines) + "\n"))
    normal = [tuple((unicodedata.normalize("NFC", n), k) for n, k in entry[:2]) for entry in expected]
    assert [tuple(pairs.photos[index] for index in row) for row in pairs.pairs] == normal
    assert pairs.same.tolist() == [same for *_, same in expected]
    assert len(set(pairs.photos)) == len(pairs.photos)
    assert [lines[line - 1].startswith(("", photo[0])) for line, photo in zip(pairs.lines, pairs.photos, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["1", "2", "A", "B", "\t", "\n", " ", "..", "\r\n", "\x85", "\u2028", "x/y"]), max_size=24)
)
def test_any_other_text_is_an_error_of_the_file(tmp_path_factory, parts):
    path = write_pairs(tmp_path_factory.getbasetemp() / "any.txt", "".join(parts))
    problem = None
    try:
        pairs = lfw.read_pairs(path)
    except InputError as error:
        problem = str(error)
    if problem is None:
        assert pairs.same.sum() * 2 == len(pairs.same) > 0
    else:
        assert problem.startswith(f"{path}: ") and "\n" not in problem


# --- photos ---------------------------------------------------------------------------------------------------------


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_photos_are_found_by_composed_name_and_any_suffix(tmp_path):
    decomposed = unicodedata.normalize("NFD", "José")
    expected = [
        touch(tmp_path / decomposed / f"{decomposed}_0001.jpg"),
        touch(tmp_path / decomposed / f"{decomposed}_0012.PNG"),
        touch(tmp_path / "A$AP & Co" / "A$AP & Co_0003.jpeg"),
    ]
    touch(tmp_path / "A$AP & Co" / "A$AP & Co_0003.txt")
    touch(tmp_path / "A$AP & Co" / "A$AP & Co_0003.webp")
    pairs = lfw.read_pairs(write_pairs(tmp_path / "pairs.txt", "1\nJosé\t1\t12\nJosé\t1\tA$AP & Co\t3\n"))
    assert lfw.find_photos(tmp_path, pairs, "pairs.txt") == expected


def test_missing_photos_are_listed(tmp_path):
    touch(tmp_path / "photos" / "A" / "A_0001.jpg")
    path = write_pairs(tmp_path / "pairs.txt", "1\nA\t1\t2\nA\t1\tB b\t7\n")
    with pytest.raises(InputError) as error:
        lfw.find_photos(tmp_path, lfw.read_pairs(path), path)
    text = str(error.value)
    assert "pairs.txt: names 2 photos that are not in" in text
    assert "A/A_0002.jpg (line 2)" in text and "B b/B b_0007.jpg (line 3)" in text
    many = (
        "100\n"
        + "".join(f"A\t{n}\t{n + 1}\n" for n in range(1, 101))
        + "".join(f"A\t1\tB\t{n}\n" for n in range(1, 101))
    )
    with pytest.raises(InputError, match="names 200 photos") as error:
        lfw.find_photos(tmp_path, lfw.read_pairs(write_pairs(path, many)), path)
    assert "and 100 more" in str(error.value)


def test_folders_without_or_with_several_sets_of_photos(tmp_path):
    pairs = lfw.read_pairs(write_pairs(tmp_path / "pairs.txt", "1\nA\t1\t2\nA\t1\tB\t1\n"))
    with pytest.raises(InputError, match="neither here nor one level below"):
        lfw.find_photos(tmp_path, pairs, "pairs.txt")
    for folder in ("funneled", "deepfunneled"):
        for name in ("A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg"):
            touch(tmp_path / folder / name)
    with pytest.raises(InputError, match=r"several folders of photos \(deepfunneled, funneled\)"):
        lfw.find_photos(tmp_path, pairs, "pairs.txt")
    assert len(lfw.find_photos(tmp_path / "funneled", pairs, "pairs.txt")) == 3


# --- faces ----------------------------------------------------------------------------------------------------------


class FakeDetector:
    """Finds one face in the middle of every photo that is not black, and counts."""

    photos = 0

    def __init__(self, weights, device, max_side=None):
        pass

    def detect(self, images):
        type(self).photos += len(images)
        return [self.look(image) for image in images]

    def look(self, image):
        count = int(image.any())
        return SimpleNamespace(
            boxes=np.float32([[40, 40, 110, 130]] * count).reshape(-1, 4),
            scores=np.float32([0.99] * count),
            landmarks=np.float32([align.TEMPLATE + 20] * count).reshape(-1, 5, 2),
        )


@pytest.fixture
def fake_detector(monkeypatch):
    monkeypatch.setattr(lfw, "RetinaFace", FakeDetector)
    monkeypatch.setattr(lfw, "load_weights", lambda path: {"layer": (np.float32([len(str(path))]),)})
    monkeypatch.setattr(FakeDetector, "photos", 0)
    return FakeDetector


def write_photo(path, seed):
    """Noise, or a black photo (no face) for seed None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((150, 150, 3), np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(1, 256, (150, 150, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


def test_faces_are_found_once_and_again_when_anything_changed(tmp_path, fake_detector):
    files = [write_photo(tmp_path / "A" / f"A_{index:04d}.png", index) for index in range(70)]
    cache = tmp_path / "cache"

    def found(**settings):
        before = fake_detector.photos
        return lfw.crop_faces(files, workers=2, cache_dir=cache, **settings), fake_detector.photos - before

    first, detected = found()
    assert detected == 70
    again, detected = found()
    assert detected == 0
    assert np.array_equal(first.crops, again.crops) and first.rows == again.rows
    plain = lfw.crop_faces(files, workers=1)
    assert np.array_equal(first.crops, plain.crops) and first.sha256 == plain.sha256
    # Another photo under an old name: only its window of 32 photos.
    write_photo(files[40], 1000)
    changed, detected = found()
    assert detected == 32
    assert not np.array_equal(changed.crops[40], first.crops[40])
    assert np.array_equal(np.delete(changed.crops, 40, 0), np.delete(first.crops, 40, 0))
    assert found(rule="largest")[1] == 70
    assert found(weights="other.pth")[1] == 70
    assert found(max_side=100)[1] == 70


def test_damaged_files_of_the_cache_are_made_again(tmp_path, fake_detector):
    files = [write_photo(tmp_path / f"A_{index:04d}.png", index) for index in range(3)]
    expected = lfw.crop_faces(files, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "faces").iterdir()
    whole = path.read_bytes()
    for damage in (b"", whole[:1000], whole[:-100], whole.replace(b"\tcrop\t", b"\tblob\t")):
        path.write_bytes(damage)
        before = fake_detector.photos
        assert np.array_equal(lfw.crop_faces(files, cache_dir=tmp_path / "cache").crops, expected.crops)
        assert fake_detector.photos == before + 3
        assert path.read_bytes() == whole


def test_photos_that_moved_are_recognised(tmp_path, fake_detector):
    old = [write_photo(tmp_path / "old" / f"A_{index:04d}.png", index) for index in range(3)]
    lfw.crop_faces(old, cache_dir=tmp_path / "cache")
    new = [Path(shutil.copy(file, tmp_path / f"B_{index:04d}.png")) for index, file in enumerate(old)]
    found = lfw.crop_faces(new, cache_dir=tmp_path / "cache")
    assert fake_detector.photos == 3
    assert [row.file for row in found.rows] == [str(file) for file in new]


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("weights") / "mfn.pt"
    torch.save(models.build_network("mfn", embedding_size=16).state_dict(), path)
    return path


def small_set(folder, seeds):
    """Five identities of two photos; seeds by (identity, number) replace the noise, None for no face."""
    for identity in "ABCDE":
        for number in (1, 2):
            seed = seeds.get((identity, number), ord(identity) * 10 + number)
            write_photo(folder / "photos" / identity / f"{identity}_{number:04d}.png", seed)
    lines = ["2\t2", "A\t1\t2", "B\t1\t2", "A\t1\tB\t1", "B\t2\tC\t1", "C\t1\t2", "D\t1\t2", "D\t1\tE\t1", "C\t2\tE\t2"]
    return write_pairs(folder / "pairs.txt", "\n".join(lines) + "\n")


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lfw_eval.py", *map(str, arguments)])
    try:
        code = lfw_eval.main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def is_picture(path):
    image = cv2.imread(str(path))
    return image is not None and min(image.shape[:2]) > 100 and image.std() > 1


def test_pairs_without_a_face_are_counted_and_named(tmp_path, capsys, monkeypatch, fake_detector, checkpoint):
    small_set(tmp_path, {("A", 2): None, ("E", 1): None})
    broken = tmp_path / "photos" / "C" / "C_0002.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    out = tmp_path / "out"
    code, text, _ = run(capsys, monkeypatch, "--checkpoint", checkpoint, "--lfw", tmp_path, "--out", out)
    assert code == 0
    report = json.loads((out / "results.json").read_text())
    (entry,) = report["sets"]
    # A 1-2 (black), C 1-2 and C 2 - E 2 (cut off), D 1 - E 1 (black).
    assert entry["pairs_without_face"] == {"genuine": 2, "impostor": 2}
    assert [pair["pair"] for pair in entry["without_face"]] == [0, 4, 6, 7]
    assert entry["without_face"][0]["reasons"] == {"A/A_0002.png": "no face"}
    assert entry["without_face"][1]["reasons"]["C/C_0002.png"].startswith(("truncated", "unreadable"))
    assert entry["accuracy_best_threshold"] <= 0.5 and entry["accuracy_kfold_mean"] <= 0.5
    assert "without a face (counted as wrong)  4" in text
    table = (out / f"{tmp_path.name}-errors.tsv").read_text().splitlines()
    assert sum(line.startswith("no_face\t") for line in table) == 4
    wrong = sum(line.split("\t")[0] in ("false_accept", "false_reject", "no_face") for line in table[1:])
    assert wrong == len(table) - 1 == round(8 * (1 - entry["accuracy_best_threshold"]))
    for picture in ("angles.png", "roc.png", "errors.png"):
        assert is_picture(out / f"{tmp_path.name}-{picture}")


def test_two_bins_and_a_folder_in_one_report(tmp_path, capsys, monkeypatch, fake_detector, checkpoint):
    small_set(tmp_path, {})
    images = [
        cv2.imencode(".png", np.random.default_rng(n).integers(0, 256, (112, 112, 3), np.uint8))[1] for n in range(16)
    ]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        same = [True, False] * 4 if folder == "a" else [True] * 8
        verification_bin.write_bin(tmp_path / folder / "set.bin", [image.tobytes() for image in images], same)
    out = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, "--lfw", tmp_path / "photos", "--pairs", tmp_path / "pairs.txt"]
    arguments += ["--bin", tmp_path / "a" / "set.bin", tmp_path / "b" / "set.bin", "--out", out, "--far", 0.25, 0.01]
    code, text, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    report = json.loads((out / "results.json").read_text())
    names = [entry["name"] for entry in report["sets"]]
    assert names == ["photos", "set", "set"]
    files = {path.name for path in out.iterdir()}
    for stem in ("photos", "set"):
        assert {
            f"{stem}-{end}" for end in ("angles.png", "angles.svg", "roc.png", "roc.svg", "errors.png", "errors.tsv")
        } <= files
    assert "set-2-angles.png" in files and "set-2-roc.png" not in files
    assert report["sets"][2]["auc"] is None and "of one person" in report["sets"][2]["notes"][0]
    first = report["sets"][1]
    assert [point["far"] for point in first["tar_at_far"]] == [0.25, 0.01]
    assert first["tar_at_far"][0]["false_accepts"] == 1 and not first["tar_at_far"][1]["resolved"]
    assert first["tar_at_far"][1]["tar"] is None
    assert "not resolved by 4 pairs" in text and "it takes at least 100" in text
    assert len(report["model"]["sha256"]) == 64 and len({entry["sha256"] for entry in report["sets"]}) == 3
    # What is reported is what the library says.
    embedder = load_embedder(checkpoint)
    result = features.verify(embedder, sets.open_set(tmp_path / "a" / "set.bin"))
    assert first["accuracy_kfold_mean"] == result.kfold_mean and first["auc"] == result.auc
    # What a deployment needs stands in the table: the threshold at each rate, and how sure that rate is.
    point = features.verify(embedder, sets.open_set(tmp_path / "a" / "set.bin"), far_levels=[0.25]).points[0]
    low, high = point.far_interval
    rows = [row for row in text.splitlines() if row.startswith(("  threshold  ", "  FAR there, 95 % interval"))]
    assert any(f"cosine {point.threshold:.4f}, {metrics.to_angle(point.threshold):.2f}°" in row for row in rows)
    assert any(f"{100 * low:.2g} % to {100 * high:.2g} %" in row for row in rows)


def test_model_that_knows_its_threshold_is_judged_by_it(tmp_path, capsys, monkeypatch):
    metadata = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3).to_metadata() | {"threshold": json.dumps({"cosine": 0.0})}
    model = write_onnx(tmp_path / "model.onnx", metadata=metadata)
    images = [
        cv2.imencode(".png", np.random.default_rng(n).integers(0, 256, (112, 112, 3), np.uint8))[1] for n in range(24)
    ]
    pairs = tmp_path / "set.bin"
    verification_bin.write_bin(pairs, [image.tobytes() for image in images], [True, False] * 6)
    code, text, _ = run(capsys, monkeypatch, "--checkpoint", model, "--bin", pairs, "--out", tmp_path / "out")
    assert code == 0 and "at the model's own cosine 0.0000" in text
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["sets"][0]
    result = features.verify(load_embedder(model), sets.open_set(pairs))
    accepted = result.cosines >= 0
    assert entry["model_threshold"]["accuracy"] == np.mean(accepted == result.same)
    assert entry["model_threshold"]["far"] == np.mean(accepted[~result.same])
    assert entry["model_threshold"]["tar"] == np.mean(accepted[result.same])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--pairs", "pairs.txt", "--bin", "set.bin"], "--pairs names photos"),
        (["--lfw", "absent"], "--lfw absent: no such folder"),
        (["--bin", "absent.bin"], "--bin absent.bin: no such file"),
        (["--lfw", ".", "--pairs", "absent.txt"], "absent.txt"),
        (["--lfw", ".", "--pairs", "bad.txt"], "bad.txt: line 3"),
        (["--lfw", ".", "--pairs", "missing.txt"], "names 1 photos that are not in"),
        (["--bin", "set.bin", "--far", "2"], "--far 2"),
        (["--bin", "set.bin", "--mean", "1", "2"], "--mean: one number for all channels or three"),
        (["--bin", "set.bin", "--std", "0"], "std"),
        (["--bin", "set.bin", "--folds", "1"], "--folds 1"),
        (["--bin", "set.bin", "--cache", "bad.txt"], "--cache bad.txt: is a file"),
        (["--bin", "set.bin", "--cache", "set.bin"], "--cache set.bin: is --bin, too"),
        (["--bin", "set.bin", "--batch-size", "0"], "--batch-size 0"),
        (["--bin", "set.bin", "--chanels", "rgb"], "did you mean --channels"),
        (["--bin", "set.bin", "--channels", "rbg"], "not one of rgb, bgr"),
        (["--bin", "pairs.txt"], "pairs.txt"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, checkpoint, arguments, message):
    small_set(tmp_path, {})
    write_pairs(tmp_path / "bad.txt", "1\nA\t1\t2\nA\tone\tB\t1\n")
    write_pairs(tmp_path / "missing.txt", "1\nA\t1\t2\nA\t1\tB\t9\n")
    image = cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes()
    verification_bin.write_bin(tmp_path / "set.bin", [image, image], [True])
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, "--checkpoint", checkpoint, "--out", "out", *arguments)
    assert code in (1, 2)
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_training_is_not_written_over(tmp_path, capsys, monkeypatch, checkpoint):
    verification_bin.write_bin(tmp_path / "pairs.bin", *bin_of(8))
    out = tmp_path / "run"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"history": [], "best": {}}))
    words = ["lfw_eval.py", "--checkpoint", checkpoint, "--bin", tmp_path / "pairs.bin", "--out", out]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    assert lfw_eval.main() == 1
    assert "holds the results of a training" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text()) == {"history": [], "best": {}}


def test_pictures_of_other_pairs_do_not_stay_and_repetitions_are_said(tmp_path, monkeypatch, checkpoint):
    path, out = tmp_path / "pairs.bin", tmp_path / "out"
    images, same = bin_of(8)
    words = ["lfw_eval.py", "--checkpoint", checkpoint, "--bin", path, "--out", out, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    verification_bin.write_bin(path, [*images, *images[:4], images[0], images[0]], [*same, *same[:2], True])
    assert lfw_eval.main() == 0
    [entry] = json.loads((out / "results.json").read_text())["sets"]
    notes = " ".join(entry["notes"])
    assert "1 of 11 pairs are of a picture and itself" in notes and "2 of 11 pairs are there before" in notes
    assert (out / "pairs-roc.png").exists() and (out / "pairs-errors.png").exists()
    verification_bin.write_bin(path, images[:2], [True])
    assert lfw_eval.main() == 0
    assert not list(out.glob("pairs-roc.*")) and not list(out.glob("pairs-errors.*"))
    [entry] = json.loads((out / "results.json").read_text())["sets"]
    assert not any("one and the same cosine" in note for note in entry["notes"]), "a single pair has one cosine"


def bin_of(pairs):
    """Crops of noise for a .bin, the first half of the pairs of one person, and which are."""
    random = np.random.default_rng(0)
    crops = [random.integers(0, 256, (112, 112, 3), np.uint8) for _ in range(2 * pairs)]
    return [cv2.imencode(".png", crop)[1].tobytes() for crop in crops], [k < pairs // 2 for k in range(pairs)]


def test_sheet_shows_the_worst_and_counts_all(tmp_path, fake_detector, checkpoint):
    small_set(tmp_path, {})
    pairs = sets.open_set(tmp_path, workers=1)
    cosines = np.array([0.9, 0.1, 0.8, 0.7, 0.2, 0.6, 0.3, 0.4])
    result = metrics.evaluate(cosines, pairs.same, pairs.folds, name="small")
    errors = report.errors_at(result, 0.5)
    assert errors.false_accepts.tolist() == [2, 3]
    assert errors.false_rejects.tolist() == [1, 4]
    for most in (1, 12):
        path = tmp_path / f"sheet-{most}.png"
        report.draw_errors(path, pairs, result, errors, "model", most=most)
        assert is_picture(path)
    # One more pair makes the sheet one row of crops and captions higher.
    heights = [cv2.imread(str(tmp_path / f"sheet-{most}.png")).shape[0] for most in (1, 12)]
    assert heights[1] - heights[0] == 112 + 26
    lines = report.errors_table(pairs, result, errors).splitlines()
    assert lines[1].split("\t")[:5] == ["false_accept", "2", "1", "A/A_0001.png", "B/B_0001.png"]


@pytest.mark.parametrize(
    ("files", "caption"), [(("a/1.jpg", "b/1.jpg"), "a/1 / b/1"), (("a/1.jpg", "b/2.jpg"), "1 / 2")]
)
def test_photos_that_are_called_alike_are_named_with_their_folders(tmp_path, monkeypatch, files, caption):
    drawn = []
    monkeypatch.setattr(plotting, "draw_text", lambda sheet, xy, text, **_: drawn.append(text))
    for file in files:
        (tmp_path / file).parent.mkdir()
        cv2.imwrite(str(tmp_path / file), np.full((112, 112, 3), 90, np.uint8))
    (tmp_path / "pairs.csv").write_text(f"file1,file2,same\n{files[0]},{files[1]},1\n")
    pairs = sets.open_set(tmp_path, pairs=[tmp_path / "pairs.csv"], aligned=True)
    result = metrics.evaluate(np.array([0.3]), pairs.same, pairs.folds, name="small")
    report.draw_errors(tmp_path / "sheet.png", pairs, result, report.errors_at(result, 0.5), "model", most=12)
    assert caption in drawn


def test_a_photo_that_vanished_leaves_its_crop_on_the_sheet(tmp_path, fake_detector):
    small_set(tmp_path, {})
    pairs = sets.open_set(tmp_path, workers=1)
    shutil.rmtree(tmp_path / "photos")
    result = metrics.evaluate(np.linspace(0, 1, 8), pairs.same, pairs.folds, name="small")
    errors = report.errors_at(result, 0.5)
    report.draw_errors(tmp_path / "sheet.png", pairs, result, errors, "model", most=12)
    assert is_picture(tmp_path / "sheet.png")


def test_pictures_do_not_depend_on_when_they_were_drawn(tmp_path):
    rng = np.random.default_rng(0)
    same = np.arange(200) % 2 == 0
    result = metrics.evaluate(rng.normal(same * 0.5, 0.2).clip(-1, 1), same, np.arange(200) // 20, name="A$AP ^2 $")
    for folder in ("one", "two"):
        report.draw_angles(tmp_path / folder / "angles", result, "m")
        report.draw_roc(tmp_path / folder / "roc", result, "m")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["angles.png", "angles.svg", "roc.png", "roc.svg"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_drawing_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), plotting.drawing(tmp_path / "broken", 3, 2):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


# --- real photos ----------------------------------------------------------------------------------------------------


def part_of_lfw(shared, folder, people):
    """The photos of some people of LFW, with pairs of their own: two folds."""
    root = shared / "lfw" / "lfw-deepfunneled"
    names = [name for name in sorted(path.name for path in root.iterdir()) if len(list((root / name).iterdir())) >= 2][
        :people
    ]
    for name in names:
        (folder / "photos" / name).mkdir(parents=True)
        for number in (1, 2):
            file = f"{name}_{number:04d}.jpg"
            shutil.copy(root / name / file, folder / "photos" / name / file)
    half = people // 2
    lines = [f"2\t{half}"]
    for part in (names[:half], names[half:]):
        lines += [f"{name}\t1\t2" for name in part]
        lines += [f"{name}\t1\t{other}\t2" for name, other in zip(part, part[1:] + part[:1], strict=True)]
    write_pairs(folder / "pairs.txt", "\n".join(lines) + "\n")


def test_killed_run_goes_on_and_ends_as_an_unbroken_one(shared, tmp_path):
    checkpoint = write_onnx(tmp_path / "model.onnx", metadata=Preprocessing().to_metadata())
    part_of_lfw(shared, tmp_path, 20)  # 40 photos, two windows of faces
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "lfw_eval.py", "--checkpoint", checkpoint, "--lfw", tmp_path, "--out", out]
    command += ["--device", "cpu", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "cache").glob("*/*.cache")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "cache").glob("*/*.cache")}
    assert kept and not (out / "results.json").exists()
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "40/40" in finished.stderr and "accuracy over folds" in finished.stdout
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    embedder = load_embedder(checkpoint)
    pairs = sets.open_set(tmp_path)
    expected = report.report(embedder, [pairs], [features.verify(embedder, pairs)])
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(expected))


def test_the_central_face_is_the_reference_detectors(shared):
    """The crops that a set is made of are cut where the original detector sees the central face."""
    reference = np.load(shared / "retinaface" / "reference_lfw.npz")
    names = [str(name) for name in reference["names"]]
    several = np.flatnonzero(np.diff(reference["offsets"]) >= 3)[:12]
    root = shared / "lfw" / "lfw-deepfunneled"
    files = [next(iter(root.glob(f"*/{Path(names[index]).name}"))) for index in several]
    found = lfw.crop_faces(files, weights=shared / "retinaface" / "mobilenet0.25_Final.pth", workers=1)
    for index, row in zip(several, found.rows, strict=True):
        box = reference["boxes"][reference["offsets"][index] + reference["central"][index]]
        assert np.allclose(row.box, box, atol=0.5)
