"""identification.py: galleries and probes against a plain count, people set aside, folders of photos to a report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.toy_models import write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import identification as script
from formats.crop_sets import open_crops, write_crops
from formats.tables import write_identities
from utils import InputError
from verification import hold_out, identification
from verification.all_pairs import Side
from verification.hold_out import split
from verification.identification import UNRANKED, Roles, answer, closed_roles, closed_set, open_roles, open_set
from verification.pairs import open_lists

ROOT = Path(script.__file__).parent


def people(seed, counts, dim=5, noise=0.7):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    vectors = generator.normal(size=(len(counts), dim))[labels] + noise * generator.normal(size=(len(labels), dim))
    return Side(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels)


# --- roles and answers ----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=2, max_size=9), st.integers(1, 2))
def test_roles_share_no_photo_and_no_stranger_is_known(seed, counts, gallery_photos):
    side = people(seed, counts)
    if max(counts) <= gallery_photos:
        return
    generator = np.random.default_rng(seed)
    for roles, everybody in (
        (closed_roles(side, generator, gallery_photos), False),
        (open_roles(side, generator, gallery_photos), True),
    ):
        known = set(side.labels[roles.gallery])
        assert not set(roles.gallery) & set(roles.probes)
        assert np.bincount(side.labels[roles.gallery]).max() == gallery_photos
        assert [label in known for label in side.labels[roles.probes]] == roles.mated.tolist()
        able = sum(count > gallery_photos for count in counts)
        assert len(known) == (max(able // 2, 1) if everybody else able)
        assert len(roles.gallery) + len(roles.probes) == (
            len(side.labels) if everybody else sum(c for c in counts if c > gallery_photos)
        )


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=2, max_size=9), st.integers(1, 3))
def test_answers_are_those_of_a_plain_count(seed, counts, block):
    side = people(seed, counts)
    side.embeddings[:] = np.round(side.embeddings * 4) / 4  # ties, exact in any order of addition
    if len(side.labels) > 3:
        side.embeddings[3] = np.nan
    generator = np.random.default_rng(seed)
    gallery = np.setdiff1d(np.sort(generator.permutation(len(side.labels))[: max(len(side.labels) // 2, 1)]), [3])
    if not len(gallery):
        return
    probes = np.setdiff1d(np.arange(len(side.labels)), gallery)
    identification.BLOCK, before = block, identification.BLOCK
    try:
        found = answer(side, side, Roles(gallery, probes, np.isin(side.labels[probes], side.labels[gallery])))
    finally:
        identification.BLOCK = before
    for row, probe in enumerate(probes):
        best = {}
        for photo in gallery:
            score = float(np.clip(side.embeddings[probe] @ side.embeddings[photo], -1, 1))
            score = -np.inf if np.isnan(score) else score
            best[side.labels[photo]] = max(best.get(side.labels[photo], -np.inf), score)
        mate = best.pop(side.labels[probe], None)
        assert found.mated[row] == (mate is not None)
        if mate is not None and mate > -np.inf:
            assert found.mate[row] == pytest.approx(mate)
            assert found.rank[row] == 1 + sum(score >= mate for score in best.values())
        else:
            assert found.mate[row] == -np.inf and found.rank[row] == UNRANKED
        assert found.other[row] == pytest.approx(max(best.values(), default=-np.inf))


def test_closed_and_open_set_by_hand():
    """Known: person 0 at 0 degrees, person 1 at 90. Probes of both, and of two strangers."""

    def at(*degrees):
        angles = np.radians(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    gallery = Side(at(0, 90), np.array([0, 1]))
    probes = Side(
        np.concatenate([at(10, 50, 80, 100), at(40, -120), np.full((1, 2), np.nan)]), np.array([0, 0, 1, 1, 2, 3, 0])
    )
    roles = Roles(np.arange(2), np.arange(7), np.array([True] * 4 + [False] * 2 + [True]))
    found = answer(gallery, probes, roles)
    assert found.rank.tolist()[:4] == [1, 2, 1, 1] and found.rank[6] == UNRANKED
    closed = closed_set([found])
    assert [row["rate"] for row in closed["ranks"]] == [3 / 5] and closed["cmc"] == [3 / 5, 4 / 5]
    opened = open_set([found], [0.5, 0.1])
    half, tenth = opened["dir_at_fpir"]
    # Strangers are nearest at 40 and 120 degrees: the second of them is let in at half. Mates at 10, 10, 10 degrees.
    assert half["dir"] == 3 / 5 and half["by_identity"]["value"] == 3 / 5
    assert half["threshold"]["angle"] + 1e-9 > 40 or half["threshold"]["angle"] > 40
    assert tenth == {"fpir": 0.1, "resolved": False, "non_mated_probes": 2}


def test_people_whose_gallery_photo_shows_no_face_are_no_strangers():
    """Their probes miss, in both sets."""
    gallery = Side(np.array([[1.0, 0], [np.nan, np.nan]]), np.array([0, 1]))
    probes = Side(np.array([[1.0, 0], [0.0, 1], [0.6, 0.8]]), np.array([0, 1, 2]))
    mated = np.array([True, True, False])
    found = answer(gallery, probes, Roles(np.array([0]), np.arange(3), mated))
    assert found.mated.tolist() == mated.tolist() and found.rank.tolist() == [1, UNRANKED, UNRANKED]
    closed = closed_set([answer(gallery, probes, Roles(np.array([0]), np.arange(2), mated[:2]))])
    assert closed["cmc"] == [0.5] and closed["probes_without_face"] == 0  # they have one
    assert open_set([found], [1.0])["dir_at_fpir"][0]["dir"] == 0.5


def test_strangers_without_a_face_raise_no_alarm_and_are_counted():
    gallery = Side(np.eye(2), np.array([0, 1]))
    probes = Side(np.array([[1.0, 0], [np.nan, np.nan], [0.8, 0.6]]), np.array([0, 5, 6]))
    found = answer(gallery, probes, Roles(np.arange(2), np.arange(3), np.array([True, False, False])))
    point = open_set([found], [0.5])
    assert point["dir_at_fpir"][0]["dir"] == 1.0 and point["probes_without_face"] == 1


# --- people set aside -----------------------------------------------------------------------------------------------


def crop_bytes(value):
    return cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes()


def make_folder(root, counts):
    for person, count in enumerate(counts):
        (root / f"p{person}").mkdir(parents=True)
        for number in range(count):
            (root / f"p{person}" / f"Fóto {number}.png").write_bytes(crop_bytes(10 * person + number))
    return root


def test_a_folder_is_split_by_people(tmp_path):
    source = make_folder(tmp_path / "all", [3, 1, 2, 4, 2])
    report = split(source, tmp_path / "out", 2, seed=1)
    held = {path.name for path in (tmp_path / "out" / "held-out").iterdir()}
    kept = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert held | kept == {f"p{n}" for n in range(5)} and not held & kept and len(held) == 2 and "p1" in kept
    assert sorted(report["held_out"]["names"]) == sorted(held)
    for part in ("train", "held-out"):
        for file in (tmp_path / "out" / part).glob("*/*"):
            assert file.read_bytes() == (source / file.parent.name / file.name).read_bytes()
    lines = (tmp_path / "out" / "pairs.csv").read_text().splitlines()
    assert len(lines) == 1 + report["pairs"] and lines[0] == "file1,file2,same"
    listed = open_lists(tmp_path / "out" / "held-out", [tmp_path / "out" / "pairs.csv"])
    assert len(listed.same) == report["pairs"] and len(set(listed.identities.tolist())) == 2
    again = split(source, tmp_path / "again", 2, seed=1)
    assert again["held_out"] == report["held_out"]
    with pytest.raises(InputError, match="holds something else"):
        split(source, tmp_path / "out", 3, seed=1)
    assert split(source, tmp_path / "out", 2, seed=1)["held_out"] == report["held_out"]
    # Of a set that has grown, others would be held out, and some be on both sides.
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*"))
    shutil.copytree(source / "p0", source / "p9")
    with pytest.raises(InputError, match="holds something else"):
        split(source, tmp_path / "out", 2, seed=1)
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*")) == before
    shutil.rmtree(source / "p9")
    with pytest.raises(InputError, match="cannot be held out"):
        split(source, tmp_path / "more", 4)
    with pytest.raises(InputError, match="lies in"):
        split(source, source / "out", 2)


def test_no_photo_and_no_person_gives_way_to_a_name(tmp_path):
    source = make_folder(tmp_path / "all", [2, 2, 2, 2])
    for person in range(4):
        (source / f"p{person}" / "a").mkdir()
        for number, name in enumerate(("a/b.png", "a__b.png")):
            (source / f"p{person}" / name).write_bytes(crop_bytes(100 + 2 * person + number))
    report = split(source, tmp_path / "out", 2)
    assert report["held_out"]["photos"] == len(list((tmp_path / "out" / "held-out").glob("*/*"))) == 8
    names = ["label-1", "a/b", "c", "d", "Bob", "BOB"]
    items = [(crop_bytes(20 * label + n), label) for label in range(6) for n in range(2)]
    write_crops(tmp_path / "records", items)
    write_identities(tmp_path / "records" / "identities.tsv", names)
    split(tmp_path / "records", tmp_path / "apart", 4, seed=3)
    folders = list((tmp_path / "apart" / "held-out").iterdir())
    assert len(folders) == 4 and all(len(list(folder.iterdir())) == 2 for folder in folders)
    found = set(hold_out._folder_names(names, range(6)).values())
    assert len(found) == 6 and {"label-1", "label-1~2", "Bob", "label-5"} <= found


def test_records_are_split_by_people(tmp_path):
    counts, names = [3, 2, 4, 1], ["ann", "../bob", "cy", "ann2"]
    items = [(crop_bytes(20 * label + n), label) for label, count in enumerate(counts) for n in range(count)]
    write_crops(tmp_path / "all", items)
    write_identities(tmp_path / "all" / "identities.tsv", names)
    report = split(tmp_path / "all", tmp_path / "out", 2)
    left = open_crops(tmp_path / "out" / "train")
    held = report["held_out"]["names"]
    assert left.identities == 2 and list(left.identity_names) == [name for name in names if name not in held]
    found = [left.read(index)[0] for index in range(len(left))]
    found += [path.read_bytes() for path in sorted((tmp_path / "out" / "held-out").glob("*/*"))]
    assert sorted(found) == sorted(data for data, _ in items)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train",
        "held-out",
        "pairs.csv",
        "report.json",
        "settings.json",
    }


# --- the script -----------------------------------------------------------------------------------------------------


def write_people(root, count=6, photos=4, seed=0):
    generator = np.random.default_rng(seed)
    for person in range(count):
        (root / f"person {person}").mkdir(parents=True)
        face = generator.integers(0, 255, (14, 14, 3))
        for number in range(photos):
            noisy = np.clip(face + generator.normal(0, 25, face.shape), 0, 255).astype(np.uint8)
            crop = cv2.resize(noisy, (112, 112), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(root / f"person {person}" / f"{number}.png"), crop)
    return root


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["identification.py", *map(str, words)])
    return script.main()


@pytest.fixture
def model(tmp_path):
    return ["--checkpoint", write_onnx(tmp_path / "m.onnx"), "--mean", 0.5, "--std", 0.5]


def test_folders_of_people_to_a_report(tmp_path, monkeypatch, model, capsys):
    photos = write_people(tmp_path / "people")
    (photos / "person 2" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "person 3" / "copy.png").write_bytes((photos / "person 1" / "0.png").read_bytes())
    out = tmp_path / "out"
    words = [
        *model,
        "--photos",
        photos,
        "--aligned",
        "--out",
        out,
        "--scores",
        tmp_path / "all.npy",
        "--far",
        0.1,
        1e-6,
    ]
    assert run(monkeypatch, *words) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["data"][0]["photos"] == 26 and found["data"][0]["photos_without_face"] == 1
    assert any("different people" in note and "person 1/0.png = person 3/copy.png" in note for note in found["notes"])
    checked = found["verification"]
    assert checked["impostor_pairs"] == 25 * 24 // 2 - checked["genuine_pairs"]
    assert checked["genuine_pairs"] == 5 * 6 + 10 and checked["genuine_pairs_without_face"] == 4
    assert [point["resolved"] for point in checked["tar_at_far"]] == [True, False]
    low, high = checked["eer_by_identity"]["interval_95"]
    assert low <= checked["eer"] <= high
    assert checked["people_needed"][1]["more_people_to_resolve"] > 0
    scores = np.load(tmp_path / "all.npy")
    assert scores.shape == (26 * 25 // 2,) and np.isnan(scores).sum() == 25
    rows = [line.split("\t") for line in (out / "photos.tsv").read_text().splitlines()[1:]]
    at = {row[1]: int(row[0]) for row in rows}
    first, second = sorted((at["person 1/0.png"], at["person 3/copy.png"]))
    assert scores[first * 26 - first * (first + 1) // 2 + second - first - 1] == pytest.approx(1)
    assert (out / "pairs.tsv").read_text().splitlines()[1].startswith("two_people\tperson 1/0.png\tperson 3/copy.png")
    for name in ("scores.png", "cmc.png", "dir.png", "worst.png"):
        assert cv2.imread(str(out / name)) is not None
    assert "takes" in capsys.readouterr().out


def test_given_roles_and_a_table_of_scores(tmp_path, monkeypatch, model):
    write_people(tmp_path / "all", count=5)
    for name, people_of in (("gallery", (0, 1, 2)), ("probes", (1, 2, 3, 4))):
        for person in people_of:
            (tmp_path / name / f"person {person}").mkdir(parents=True)
            for number in (0, 1) if name == "gallery" else (2, 3):
                source = tmp_path / "all" / f"person {person}" / f"{number}.png"
                (tmp_path / name / f"person {person}" / f"{number}.png").write_bytes(source.read_bytes())
    words = ["--gallery", tmp_path / "gallery", "--probes", tmp_path / "probes", "--aligned", "--fpir", 0.5]
    assert run(monkeypatch, *model, *words, "--out", tmp_path / "out", "--scores", tmp_path / "s.tsv") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["closed_set"]["gallery_people"] == 3 and found["closed_set"]["probes"] == 4
    assert found["open_set"]["non_mated_probes"] == 4 and found["open_set"]["splits"] == 1
    rows = [line.split("\t") for line in (tmp_path / "s.tsv").read_text().splitlines()]
    assert rows[0] == ["first", "second", "same", "cosine"] and len(rows) == 1 + 6 * 8
    assert sum(row[2] == "1" for row in rows[1:]) == found["verification"]["genuine_pairs"] == 8
    assert (tmp_path / "out" / "dir.png").is_file() and not found["notes"]
    # A probe that is a photo of the gallery finds itself.
    again = tmp_path / "probes" / "person 2" / "again.png"
    shutil.copy(tmp_path / "gallery" / "person 2" / "1.png", again)
    assert run(monkeypatch, *model, *words, "--out", tmp_path / "out") == 0
    (note,) = json.loads((tmp_path / "out" / "results.json").read_text())["notes"]
    assert note.startswith("1 probes are in the gallery, too, byte for byte") and f"person 2/1.png = {again}" in note
    again.unlink()
    # Again into the same folder: one of the three has no face in the gallery any more, and nobody is a stranger.
    for number in (0, 1):
        (tmp_path / "gallery" / "person 1" / f"{number}.png").write_bytes(b"no picture")
    for person in (3, 4):
        shutil.rmtree(tmp_path / "probes" / f"person {person}")
    assert run(monkeypatch, *model, *words, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["closed_set"]["probes"] == 4 and found["closed_set"]["ranks"][0]["rate"] <= 0.5
    assert found["open_set"] is None and not (tmp_path / "out" / "dir.png").exists()
    assert any("1 people have no gallery photo with a face: their 2 probes" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look at"),
        (["--photos", "{0}", "--gallery", "{0}"], "not both"),
        (["--photos", "{0}/nowhere"], "no such folder"),
        (["--photos", "{0}/flat"], "no folders of people"),
        (["--gallery", "{0}", "--probes", "{0}/flat"], "one lies in the other"),
        (["--photos", "{0}", "--scores", "x.txt"], "ending in .tsv or .npy"),
        (["--photos", "{0}", "--scores", "{0}/x.tsv"], "where it would be taken for data"),
        (["--photos", "{0}", "--seed", "-1"], "--seed -1: must be at least 0"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, monkeypatch, model, capsys, words, message):
    (tmp_path / "people" / "flat").mkdir(parents=True)
    (tmp_path / "people" / "flat" / "a.png").write_bytes(crop_bytes(1))
    given = [word.format(tmp_path / "people") for word in words]
    assert run(monkeypatch, *model, *given, "--aligned", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "out" / "results.json").exists()


def test_no_model_and_nobody_to_hold_out(tmp_path, monkeypatch, capsys):
    photos = make_folder(tmp_path / "people", [2, 2])
    assert run(monkeypatch, "--photos", photos, "--out", tmp_path / "out") == 1
    assert "--checkpoint" in capsys.readouterr().err
    assert run(monkeypatch, "--photos", photos, "--hold-out", 2, "--out", tmp_path / "out") == 1
    assert "cannot be held out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, model):
    photos = write_people(tmp_path / "people", count=60, photos=3)
    command = [sys.executable, str(ROOT / "identification.py"), *map(str, model), "--aligned", "--photos", str(photos)]
    begun = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    cache = tmp_path / "killed" / "cache" / "features"
    while begun.poll() is None and not (cache.is_dir() and any(cache.glob("*.cache"))):
        time.sleep(0.01)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    texts = []
    for name in ("killed", "whole"):
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, capture_output=True)
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert found
        texts.append((found, (tmp_path / name / "pairs.tsv").read_bytes()))
    assert texts[0] == texts[1]
