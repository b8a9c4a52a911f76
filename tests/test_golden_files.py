"""The golden files of tests/data: formats, protocols and checkpoints held against plain code, without research data."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import extract
import tinyface_eval
from embedding import Preprocessing, load_embedder
from formats import recordio, verification_bin
from formats.crop_sets import open_crops, open_training_set, write_crops
from ijb import one_to_many, one_to_one
from ijb.lists import read_lists, read_pairs
from ijb.templates import USUAL, ImageFeatures, pool
from megaface.devkit_json import cmc_text, matches_text
from megaface.facescrub import read_annotations
from megaface.features import bin_bytes, read_feature
from megaface.protocol import identification
from models import build_network, name_of
from networks.catalogue import ADAFACE, INSIGHTFACE, RELEASED
from retinaface import RetinaFace
from utils import InputError, sha256_of
from verification import metrics, sets
from verification.pairs import read_pair_list

DATA = Path(__file__).resolve().parent / "data"
MADE = runpy.run_path(str(DATA / "make.py"))


def expected(name):
    return json.loads((DATA / name).read_text())


def test_they_are_what_the_script_makes(tmp_path, monkeypatch):
    """The same again, all but the photo; and few bytes."""
    files = [path for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 300_000
    monkeypatch.setitem(MADE["recordio"].__globals__, "DATA", tmp_path)
    for name in ("recordio", "verification", "lfw", "challenge", "ijb", "tinyface", "msceleb", "networks"):
        MADE[name]()
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {path.relative_to(DATA) for path in files} - {Path("make.py"), Path("face.jpg"), Path("face.json")}
    for name in made:
        if name.suffix == ".npz":  # how well it is packed depends on the library
            new, old = np.load(tmp_path / name), np.load(DATA / name)
            assert all(np.array_equal(new[key], old[key]) for key in (*new, *old)), name
        elif name.name == "outputs.json":  # sums in another order
            new, old = (json.loads((folder / name).read_text()) for folder in (tmp_path, DATA))
            assert all(np.allclose(new[key], old[key], atol=1e-4) for key in (*new, *old))
        else:
            assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


# --- formats ----------------------------------------------------------------------------------------------------------


def test_a_record_set(tmp_path):
    folder = DATA / "recordio" / "std"
    crops = open_crops(folder)
    wanted = expected("recordio/std/expected.json")
    assert (len(crops), crops.identities, crops.notes) == (40, 8, [])
    for index, (key, (person, digest)) in enumerate(wanted.items()):
        payload, label = crops.read(index)
        assert (int(crops.keys[index]), label, MADE["sha256"](payload)) == (int(key), person, digest)
    assert write_crops(tmp_path, (crops.read(index) for index in range(40))) == 40
    for file in ("train.rec", "train.idx", "property"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_records_of_every_kind():
    path = DATA / "recordio" / "parts" / "train.rec"
    with recordio.RecordReader(path) as reader:
        for key, (labels, payload) in expected("recordio/parts/expected.json").items():
            header, data = recordio.unpack(reader.read(int(key)))
            assert (np.ravel(header.label).tolist(), data.hex()) == (labels, payload), key
        assert b"".join(map(recordio.frame, reader)) == path.read_bytes()


def test_the_same_crops_whatever_they_lie_in(tmp_path):
    """RecordIO, folders, a list and a WebDataset shard."""
    records = open_training_set(DATA / "recordio" / "std")
    listed = []
    with tarfile.open(tmp_path / "000000.tar", "w") as shard:
        for index in range(len(records)):
            data, label = records.read(index)
            path = tmp_path / "folders" / str(label) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            listed.append(f"folders/{label}/{index}.jpg {label}\n")
            for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (tmp_path / "list.txt").write_text("".join(listed))

    def people(data):
        crops, found = open_training_set(data), {}
        for index in range(len(crops)):
            payload, label = crops.read(index)
            found.setdefault(label, set()).add(payload)
        return sorted(map(sorted, found.values()))

    wanted = people(DATA / "recordio" / "std")
    assert len(wanted) == 8
    for name in ("folders", "list.txt", "000000.tar"):
        assert people(tmp_path / name) == wanted, name


@pytest.mark.parametrize("name", ["python2", "python3", "numpy"])
def test_verification_sets(name):
    images, same = verification_bin.read_bin(DATA / "verification" / f"{name}.bin")
    wanted = expected("verification/expected.json")
    assert [MADE["sha256"](image) for image in images] == wanted["sha256"] and same.tolist() == wanted["same"]
    pairs = sets.open_set(DATA / "verification" / f"{name}.bin")
    rgb = cv2.imdecode(np.frombuffer(images[0], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert pairs.crops.shape == (4, 112, 112, 3) and np.array_equal(pairs.crops[0], rgb)


@pytest.mark.parametrize(("name", "reason"), [("evil", "os.system; refused, nothing was run"), ("cut", "cut off")])
def test_verification_sets_that_are_refused(name, reason):
    with pytest.raises(InputError, match=rf"{name}\.bin.*{reason}"):
        verification_bin.read_bin(DATA / "verification" / f"{name}.bin")


def test_rows_of_msceleb(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["extract.py", str(DATA / "msceleb.tsv"), "--out", str(tmp_path / "raw")])
    assert extract.main() == 1  # of eight rows three are no photos
    lines = (tmp_path / "raw" / "listing.tsv").read_text().splitlines()[1:]
    rows = [dict(zip(extract.COLUMNS, line.split("\t"), strict=True)) for line in lines]
    wanted = expected("msceleb.json")
    assert [row["status"] for row in rows] == wanted["statuses"]
    kept = [row for row in rows if row["path"]]
    assert [row["sha256"] for row in kept] == wanted["sha256"]
    assert [sha256_of(tmp_path / "raw" / row["path"]) for row in kept] == wanted["sha256"]
    assert {row["path"].split("/")[0] for row in kept} == {"m.0aa", "m.0bb", "m.0ff"}


def test_annotations_of_facescrub():
    found = read_annotations([DATA / "megaface" / "actors.txt"])
    faces = list(found.faces.values())
    assert [(face.name, face.face_id, face.box) for face in faces] == [
        ("Ann Invented", 11, (10, 20, 110, 120)),
        ("Ann Invented", 12, (0, 0, 50, 50)),
        ("Bo O'Made Jr.", 13, None),
        ("Bo O'Made Jr.", 15, None),
    ]
    assert len(found.problems) == 1 and "line 5: 4 columns instead of 6" in found.problems[0]


# --- protocols --------------------------------------------------------------------------------------------------------


def test_pairs_of_lfw_and_their_figures():
    wanted = expected("lfw/expected.json")
    pairs = read_pair_list(DATA / "lfw" / "pairs.txt")
    cosines = np.loadtxt(DATA / "lfw" / "cosines.txt")
    assert (len(pairs.same), pairs.folds.max() + 1) == (wanted["pairs"], wanted["folds"])
    result = metrics.evaluate(cosines, pairs.same, pairs.folds, far_levels=(0.1, 0.05))
    assert [fold.accuracy for fold in result.folds] == pytest.approx(wanted["accuracy_of_folds"])
    assert {str(point.far): point.tar for point in result.points} == pytest.approx(wanted["tar_at_far"])
    assert result.auc == pytest.approx(wanted["auc"], abs=1e-12)


def test_challenge_1_to_the_byte():
    folder = DATA / "megaface"
    probes, distractors = (np.load(folder / f"{side}.npy").astype(np.float32) for side in ("probes", "distractors"))
    (result,) = identification(probes, expected("megaface/probe_ids.json"), distractors, [40])
    assert cmc_text(result) == (folder / "cmc.json").read_text()
    assert matches_text(result) == (folder / "matches.json").read_text()
    assert np.array_equal(read_feature(folder / "feature.bin"), probes[0])
    assert bin_bytes(probes[0][:, None]) == (folder / "feature.bin").read_bytes()


def test_templates_of_ijb():
    lists = read_lists(DATA / "ijb")
    stored = np.load(DATA / "ijb" / "features.npz")
    templates = pool(ImageFeatures.of_arrays(stored["embs"], stored["embs_f"]), lists)
    scorer = one_to_one.PairScorer(read_pairs(lists), templates)
    found = one_to_one.verification(scorer.scores(templates.embeddings(USUAL)), scorer.same, USUAL)
    wanted = expected("ijb/expected.json")
    for far, tar in wanted["tar_at_far_as_printed"].items():
        assert found.printed[float(far)] == pytest.approx(tar, abs=1e-9)
    searched = one_to_many.identification(lists, templates, replicates=100)
    for rank, share in wanted["top"].items():
        assert searched.printed[int(rank)] == pytest.approx(share, abs=1e-9)


def test_ranks_of_tinyface(tmp_path, monkeypatch):
    folder = DATA / "tinyface"
    arguments = ["--features", folder / "features.npz", "--lists", folder, "--out", tmp_path, "--replicates", 100]
    monkeypatch.setattr(sys, "argv", ["tinyface_eval.py", *map(str, arguments)])
    assert tinyface_eval.main() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["as_printed"] == pytest.approx(expected("tinyface/expected.json"), abs=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------

AS_PEOPLE_HAVE_IT = {
    "r18": (RELEASED, lambda state: state),
    "ir18": (
        INSIGHTFACE,
        lambda state: {"epoch": 2, "state_dict_backbone": {f"module.{k}": v for k, v in state.items()}},
    ),
    "adaface_ir_18": (
        ADAFACE,
        lambda state: {
            "pytorch-lightning_version": "1.4.4",
            "state_dict": {f"model.{k}": v for k, v in state.items()} | {"head.kernel": torch.zeros(8, 3)},
        },
    ),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_IT)
def test_public_checkpoints(tmp_path, name):
    """Key by key the public layout, recognised, fed as it wants, and the output of plain code."""
    feeding, wrapped = AS_PEOPLE_HAVE_IT[name]
    state = MADE["invented_state"](DATA / "networks" / f"keys_{name}.txt")
    with torch.device("meta"):
        built = build_network(name, embedding_size=MADE["SIZE"]).state_dict()
    assert [(key, value.shape) for key, value in built.items()] == [(key, value.shape) for key, value in state.items()]
    torch.save(wrapped(state), tmp_path / "net.pth")
    embedder = load_embedder(tmp_path / "net.pth")
    assert name_of(state) == name and embedder.preprocessing == Preprocessing.of(feeding)
    wanted = np.array(expected("networks/outputs.json")[name])
    assert np.abs(embedder.model.run(MADE["batch"]()).numpy() - wanted).max() <= 1e-4 * np.abs(wanted).max()


# --- a face -----------------------------------------------------------------------------------------------------------


def test_the_detector_finds_the_face_of_somebody_who_does_not_exist():
    bgr = cv2.imread(str(DATA / "face.jpg"))
    (found,) = RetinaFace(device="cpu").detect([bgr])
    truth = np.array(expected("face.json"))
    eyes = np.linalg.norm(truth[1] - truth[0])
    assert len(found.scores) == 1 and found.scores[0] > 0.99
    assert np.linalg.norm(found.landmarks[0] - truth, axis=1).mean() < 0.08 * eyes
