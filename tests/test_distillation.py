"""Learning from a teacher: its loss, its stored embeddings, restarts, and crops without labels."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from helpers.toy_models import DIM, KERNEL, TEACHER, write_onnx
from helpers.training import (
    ROOT,
    assert_same_state,
    finish,
    folder_set,
    jpegs,
    load,
    options,
    record_set,
    start,
    train_main,
    train_run,
    write_audit,
)
from test_restart import wait_for_step

import data_gen
from embedding import load_embedder, normalise
from formats import crop_sets
from training.distillation import Distillation, NoHead
from training.distributed import World

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("teacher") / "toy.onnx", metadata=TEACHER)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return record_set(tmp_path_factory.mktemp("crops"))


class Rows:
    """A teacher of given embeddings."""

    def __init__(self, rows):
        self.rows, self.dim = F.normalize(rows), rows.shape[1]

    def __call__(self, images, indices):
        return self.rows[indices]


@pytest.mark.parametrize("dim", [6, 3])
def test_the_loss_is_the_mean_of_one_minus_cosine(dim):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, dim, generator=generator)
    rows[4] = torch.nan
    torch.manual_seed(0)
    distillation = Distillation(Rows(rows), 6, 2.5, WORLD).double()
    assert sum(p.numel() for p in distillation.parameters()) == (0 if dim == 6 else 18)
    features = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([8, 4, 0, 1, 1])
    share, loss, stats = distillation(features, torch.empty(0), indices)
    mapped = features if dim == 6 else features @ distillation.map.weight.T
    cosine = F.cosine_similarity(mapped, rows[indices].double().nan_to_num(1.0))
    expected = 2.5 * (1 - cosine[[0, 2, 3, 4]]).sum() / 5
    assert share.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(share.item())
    wanted = [features, *distillation.parameters()]
    for found, plain in zip(torch.autograd.grad(share, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-8)
    assert stats["target_angle"][0].item() == pytest.approx(np.degrees(np.arccos(cosine[0].item())), rel=1e-5)
    torch.testing.assert_close(stats["feature_norm"], features.detach().norm(dim=1))


def test_a_network_learns_the_teachers_directions():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    distillation = Distillation(Rows(rows), 8, 1.0, WORLD)
    features = torch.nn.Parameter(torch.randn(40, 8))
    optimizer = torch.optim.SGD([features, *distillation.parameters()], lr=20.0, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        share, loss, stats = distillation(features, torch.empty(0), torch.arange(40))
        share.backward()
        optimizer.step()
    assert loss < 0.01
    assert stats["top1"] == 1


CASES = {
    "beside": {"loss": "curricularface", "sub_centres": 2, "filter": 0.3, "sample_rate": 0.5},
    "alone, online": {"loss": "none", "teacher_online": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_same_bits(crops, teacher, tmp_path, case):
    recipe = {"epochs": 8, "save_every": 5, "teacher": teacher, "resume": True} | CASES[case]
    line = options(crops, tmp_path / "unbroken", **recipe)
    code, text = train_run(line, tmp_path / "output")
    assert code == 0, text
    expected = load(tmp_path / "unbroken" / "checkpoint.pt")
    assert expected["distillation"]["model"]["map.weight"].shape == (DIM, 16)
    assert expected["distillation"]["momentum"]["map.weight"].abs().max() > 0
    out = tmp_path / "run"
    processes = start(train_main, options(crops, out, **recipe), output=tmp_path / "output")
    wait_for_step(out, 5, processes)
    processes[0].kill()
    assert finish(processes) == [-signal.SIGKILL]
    assert load(out / "checkpoint.pt")["step"] < 48
    code, text = train_run(options(crops, out, **recipe), tmp_path / "output")
    assert code == 0, text
    found = load(out / "checkpoint.pt")
    assert_same_state(found, expected)
    assert (out / "teacher").exists() == (case == "beside")
    assert not any("map" in key for key in load(out / "embedding.pt")), "the map is dropped"
    exported = subprocess.run(
        [sys.executable, "export_centres.py", "--checkpoint", out / "best.pt", "--out", tmp_path / "centres"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if case == "beside":
        assert "6 x 2 centres of 16 dimensions" in exported.stdout
        centres = np.load(tmp_path / "centres" / "centres.npy")
        assert centres.shape == (6, 2, 16)
        np.testing.assert_allclose(np.linalg.norm(centres, axis=2), 1, rtol=1e-6)
    else:
        assert exported.returncode == 1 and "trained without labels" in exported.stderr


def test_embeddings_are_computed_once_and_shared(crops, teacher, tmp_path):
    """By two processes; the file holds what the teacher says of each crop."""
    shared, output = tmp_path / "shared", tmp_path / "output"
    recipe = {"epochs": 1, "batch_size": 12, "teacher": teacher, "teacher_embeddings": shared}
    code, text = train_run(options(crops, tmp_path / "one", **recipe), output, 2)
    assert code == 0, text
    [folder] = shared.iterdir()
    rows = np.load(folder / "embeddings.npy")
    data = crop_sets.open_training_set(crops)
    pictures = np.stack([data_gen.decode_crop(data.read(index)[0]) for index in range(len(data))])
    expected = normalise(load_embedder(teacher).features(pictures))
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, expected, atol=1e-3)
    before = (folder / "embeddings.npy").stat().st_mtime_ns
    code, text = train_run(options(crops, tmp_path / "two", **recipe), output)
    assert code == 0, text
    assert (folder / "embeddings.npy").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "two" / "run.json").read_bytes())["data"]["teacher"]


def test_any_folder_of_faces_will_do(teacher, tmp_path):
    """Images at any depth, no labels; a damaged one is replaced, and not learnt from."""
    faces = folder_set(tmp_path / "faces")
    shutil.move(faces / "person-0" / "0.jpg", faces / "loose.jpg")
    (faces / "deep" / "er").mkdir(parents=True)
    shutil.move(faces / "person-1", faces / "deep" / "er" / "person-1")
    (faces / "note.txt").write_text("not a face")
    (faces / "person-2" / "broken.jpg").write_bytes(next(jpegs(1, 1))[0][:500])
    out, output = tmp_path / "run", tmp_path / "output"
    line = options(faces, out, loss="none", teacher=teacher, epochs=2, batch_size=6)
    code, text = train_run(line, output)
    assert code == 1 and "broken.jpg" in text
    code, text = train_run([*line, "--skip-unreadable"], output)
    assert code == 0, text
    assert "13 crops" in text and "broken.jpg: unreadable, replaced" in text
    assert load(out / "checkpoint.pt")["head"]["centres"].shape == (0, 16)
    losses = [report["loss"] for report in json.loads((out / "results.json").read_bytes())["history"]]
    assert losses[1] < losses[0]


def test_what_cannot_be_is_refused(crops, teacher, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    code, text = train_run(options(crops, out, loss="none"), output)
    assert code == 1 and "there has to be a --teacher" in text
    code, text = train_run(options(crops, out, teacher=tmp_path / "nothing.onnx"), output)
    assert code == 1 and "nothing.onnx" in text
    recipe = {"epochs": 1, "teacher": teacher}
    assert train_run(options(crops, out, **recipe), output)[0] == 0
    other = write_onnx(tmp_path / "other.onnx", metadata=TEACHER | {"mirror": "none"})
    code, text = train_run(options(crops, out, **recipe | {"teacher": other}, resume=True), output)
    assert code == 1 and "was trained on other data" in text and text.count("--teacher") == 2
    moved = shutil.copy(teacher, tmp_path / "moved.onnx")
    code, text = train_run(options(crops, out, **recipe | {"teacher": moved}, resume=True), output)
    assert code == 0, text


def broken_onnx(path):
    """A teacher whose embeddings are all NaN."""
    write_onnx(path, metadata=TEACHER)
    model = onnx.load(path)
    kernel = np.full_like(KERNEL, np.nan)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "kernel"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("way", [{"teacher_online": True}, {"skip_unreadable": True}, {}])
def test_a_teacher_that_knows_nobody_teaches_nothing(crops, tmp_path, way):
    teacher = broken_onnx(tmp_path / "broken.onnx")
    line = options(crops, tmp_path / "run", teacher=teacher, loss="none", epochs=1, **way)
    code, text = train_run(line, tmp_path / "output")
    assert code == 1 and "Traceback" not in text
    assert re.search(r"--teacher broken\.onnx:? gives no finite embedding", text), text
    assert not (tmp_path / "run" / "embedding.pt").exists()


def test_embeddings_made_while_skipping_are_not_taken_for_whole(teacher, tmp_path):
    faces = folder_set(tmp_path / "faces")
    broken = sorted((faces / "person-2").iterdir())[1]
    whole = broken.read_bytes()
    recipe = {"loss": "none", "teacher": teacher, "epochs": 1, "batch_size": 6, "teacher_embeddings": tmp_path / "kept"}
    broken.write_bytes(b"no picture".ljust(len(whole), b"."))
    line = options(faces, tmp_path / "skipping", **recipe)
    assert train_run([*line, "--skip-unreadable"], tmp_path / "output")[0] == 0
    [store] = (tmp_path / "kept").iterdir()
    assert np.isnan(np.load(store / "embeddings.npy")).all(1).sum() == 1
    broken.write_bytes(whole)
    made = store.rename(tmp_path / "old")
    code, text = train_run(options(faces, tmp_path / "whole", **recipe), tmp_path / "output")
    assert code == 0, text
    [now] = (tmp_path / "kept").iterdir()
    for name in ("embeddings.npy", "checksums.bin"):
        shutil.copy(made / name, now / name)
    code, text = train_run(options(faces, tmp_path / "again", **recipe), tmp_path / "output")
    assert code == 1 and "holds no embedding of 1 of 12 crops" in text


def test_what_is_refused_is_refused_before_the_long_pass(crops, teacher, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    recipe = {"teacher": teacher, "epochs": 1}
    code, text = train_run(options(crops, out, init=tmp_path / "none.pt", **recipe), output)
    assert code == 1 and "none.pt" in text and not (out / "teacher").exists()
    assert train_run(options(crops, out, epochs=1), output)[0] == 0
    code, text = train_run(options(crops, out, resume=True, **recipe), output)
    assert code == 1 and "was trained on other data" in text and not (out / "teacher").exists()
    folders = folder_set(tmp_path / "faces")
    line = options(folders, tmp_path / "other", teacher_embeddings=folders / "teacher", **recipe)
    code, text = train_run(line, output)
    assert code == 1 and "--teacher-embeddings" in text and "lies among the crops" in text
    assert not (folders / "teacher").exists()


def test_advice_names_the_options_of_the_teacher(crops, tmp_path):
    silent = write_onnx(tmp_path / "silent.onnx")
    code, text = train_run(options(crops, tmp_path / "run", teacher=silent), tmp_path / "output")
    assert code == 1 and "give --teacher-mean and --teacher-std" in text


def test_no_head_has_the_interface_of_the_margin_head():
    head = NoHead(4, torch.device("cpu"))
    assert not list(head.parameters()) and not head.sampled_leaves()
    head.step(0.1, momentum=0.9, weight_decay=0.0, nesterov=True)
    again = NoHead(4, torch.device("cpu"))
    again.load_full_state(head.own_state())
    assert again.steps == 1
    with pytest.raises(ValueError, match=r"\(0, 4\), not \(0, 5\)"):
        NoHead(5, torch.device("cpu")).load_full_state(head.own_state())


def test_what_an_audit_drops_teaches_nothing_without_labels_either(teacher, tmp_path):
    """The audit is of crops with labels; a crop that cannot be read is not read once it is dropped."""
    faces = folder_set(tmp_path / "faces")
    broken = sorted((faces / "person-2").iterdir())[1]
    broken.write_bytes(b"no picture")
    crops = crop_sets.open_training_set(faces, skip_unreadable=True)
    place = next(index for index in range(len(crops)) if str(broken) in crops.describe(index))
    fingerprint = crop_sets.fingerprint(crops, skip_unreadable=True)
    write_audit(tmp_path / "audit", crops, {place: ("drop", None)}, fingerprint=fingerprint)
    recipe = {"loss": "none", "teacher": teacher, "epochs": 1, "batch_size": 5, "exclude": tmp_path / "audit"}
    code, text = train_run(options(faces, tmp_path / "run", **recipe), tmp_path / "output")
    assert code == 0 and "11 crops without labels" in text, text
