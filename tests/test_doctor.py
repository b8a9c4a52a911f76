"""The doctor on a patient whose illness is known: colours and normalisation that carry the identity."""

import json
import math
import subprocess
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from helpers.toy_models import TEACHER, write_onnx
from torch import nn

import doctor
import utils
from embedding import Embedder, Preprocessing
from formats.verification_bin import write_bin
from models import build_network
from utils import InputError
from verification import metrics
from verification.sets import VerificationSet


def make_set(pairs=200, seed=0):
    """Crops of one colour each, which is the identity, under noise."""
    rng = np.random.default_rng(seed)
    same = np.arange(pairs) % 2 == 0
    first = rng.uniform(40, 215, (pairs, 3))
    second = np.where(same[:, None], first + rng.normal(0, 4, (pairs, 3)), rng.uniform(40, 215, (pairs, 3)))
    colours = np.stack([first, second], axis=1).reshape(-1, 1, 1, 3)
    crops = np.clip(colours + rng.normal(0, 6, (2 * pairs, 112, 112, 3)), 0, 255).astype(np.uint8)
    return VerificationSet(
        name="colours",
        crops=crops,
        names=[str(index) for index in range(2 * pairs)],
        pairs=np.arange(2 * pairs).reshape(-1, 2),
        same=same,
        folds=np.arange(pairs) % 10,
        sha256="",
    )


class ReadsRed(nn.Module):
    """Knows a colour only by channel 0, in -1 to 1: the angle of its feature is that number."""

    def forward(self, crops):
        angle = crops[:, 0].mean(dim=(1, 2)) * 1.5
        return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.fixture
def checkpoint(tmp_path):
    """A plain file of weights: what a doctor without a training checkpoint gets."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def embedder(**changes):
    way = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, mirror=False)
    return Embedder.from_network(ReadsRed(), "cpu").with_preprocessing(
        **{"mean": way.mean, "std": way.std, "mirror": False, **changes}
    )


def test_wrong_range_is_found_and_named(checkpoint):
    sick = embedder(pixel_range=255.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    trials = doctor.examine(sick, checkpoint, make_set(80), None)
    best = max(trials, key=lambda trial: trial.accuracy)
    assert best.accuracy > trials[0].accuracy + 0.2
    assert best.way.pixel_range == 1.0
    text = doctor.verdict(trials)
    assert "--pixel-range 1" in text and f"{trials[0].accuracy:.2%}" in text


def test_healthy_model_is_left_alone(checkpoint):
    trials = doctor.examine(embedder(), checkpoint, make_set(80), None)
    assert "Nothing tried is better" in doctor.verdict(trials)
    names = [trial.name for trial in trials]
    # One way is as it is fed now, and not tried twice; both mistakes inside the network need a checkpoint's head.
    assert not any("-1 to 1" in name and name.startswith("rgb") for name in names)
    assert sum("bgr" in name for name in names) == len(doctor.NORMALISATIONS)
    assert any("training mode" in name for name in names)
    table = doctor.table(trials)
    assert table.count("\n") == len(trials) - 1 and table.count("> ") >= 1


class ReadsGrey(nn.Module):
    """Knows a crop by its brightness alone: no pair can tell the orders of the channels apart."""

    def forward(self, crops):
        angle = crops.mean(dim=(1, 2, 3)) * 1.5
        return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize("sick", [False, True])
def test_what_the_pairs_do_not_decide_is_said_to_be_undecided(checkpoint, sick):
    """The best way against its runner-up, not only against how the model is fed now."""
    fed = (
        {"pixel_range": 255.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        if sick
        else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    )
    model = Embedder.from_network(ReadsGrey(), "cpu").with_preprocessing(mirror=False, **fed)
    trials = doctor.examine(model, checkpoint, make_set(120), None)
    equal = doctor.as_good(trials)
    assert {trial.way.channels for trial in equal} == {"rgb", "bgr"}
    text = doctor.verdict(trials)
    assert "the order of the channels" in text and "undecided" in text
    for trial in equal:
        assert trial.name in text
    if sick:
        decided = text.partition("Decided is: ")[2].partition("What to do")[0]
        assert "--pixel-range 1" in decided and "--channels" not in decided
    else:
        assert "That does not make it right" in text


def test_a_wrong_cut_is_decided_when_the_pairs_decide_it():
    fed = Preprocessing()

    def trial(name, right, way=fed, cut=doctor.AS_CUT):
        same = np.ones(200, bool)
        cosines = np.where(np.arange(200) < right, 0.9, 0.1)
        folds = [metrics.Fold(0.5, 0.5, 100, 100)]
        result = metrics.VerificationResult(
            "s", cosines, same, np.zeros(200, int), folds, right / 200, 0.0, right / 200, 0.5, 0.5, 0.5, [], []
        )
        return doctor.Trial(name, result, way, cut)

    now, tighter = trial("as now", 150), trial("tighter", 198, cut="tighter crop (85 %)")
    text = doctor.verdict([now, tighter, trial("training mode", 199, way=None)])
    assert "tighter gives 99.00%" in text and text.endswith("and cut the faces otherwise (tighter crop (85 %))")
    close = trial("tighter", 152, cut="tighter crop (85 %)")
    text = doctor.verdict([now, close])
    assert "Nothing tried is better" in text and "leave the cut of the faces undecided" in text


def test_the_best_of_many_ways_is_better_by_chance():
    """Of 17 equally good ways one is the best; that it beats how the model is fed now says less than of two."""
    generator, advised = np.random.default_rng(0), 0
    fed = Preprocessing()
    for _ in range(60):
        trials = []
        for number in range(17):
            right = generator.random(600) < 0.9
            cosines = np.where(right, 0.9, 0.1)
            result = metrics.VerificationResult(
                "s", cosines, np.ones(600, bool), np.zeros(600, int), [metrics.Fold(0.5, right.mean(), 300, 300)],
                right.mean(), 0.0, right.mean(), 0.5, 0.5, 0.5, [], [],
            )  # fmt: skip
            trials.append(doctor.Trial(str(number), result, fed))
        advised += trials[0] not in doctor.as_good(trials)
    assert advised <= 3


def test_chance_is_mcnemars():
    better, worse = (doctor.verify(e, make_set(60)) for e in (embedder(), embedder(std=(1e6,) * 3)))
    gained = int((doctor._right(better) & ~doctor._right(worse)).sum())
    lost = int((doctor._right(worse) & ~doctor._right(better)).sum())
    tail = sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)
    assert doctor.chance_of(better, worse) == pytest.approx(tail)
    assert doctor.chance_of(better, better) == 1.0


def test_subset_keeps_pairs_together():
    whole = make_set(300)
    whole.missing[7] = "no face"
    part = doctor.subset(whole, 100)
    assert len(part.same) == 100 and part.same.sum() == 50
    for (a, b), same in zip(part.pairs, part.same, strict=True):
        first, second = int(part.names[a]), int(part.names[b])
        assert second == first + 1 and whole.same[first // 2] == same
        np.testing.assert_array_equal(part.crops[a], whole.crops[first])
    with pytest.raises(InputError, match="too few"):
        doctor.subset(make_set(30), 30)


@pytest.mark.parametrize(("part", "dx", "dy"), [(1.0, 0, 0), (1.0, 0, 8), (0.5, 0, 0)])
def test_recrop_moves_what_it_says(part, dx, dy):
    pairs = make_set(1)
    pairs.crops[:] = np.arange(112, dtype=np.uint8)[None, :, None, None]  # brightness is the row
    row = doctor.recrop(pairs, part, dx, dy).crops[0, :, 50, 0].astype(float)
    expected = np.clip(55.5 + dy + part * (np.arange(112) - 55.5), 0, 111)
    assert np.abs(row - expected).max() <= 1


def test_training_mode_leaves_the_network_as_it_was():
    network = build_network("mfn", embedding_size=8).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    wrong = doctor._InTrainingMode(network)
    batch = torch.rand(4, 3, 112, 112)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        features = wrong(batch)
        right = network(batch)
    assert not torch.allclose(features, right)
    assert not network.training and torch.equal(torch.random.get_rng_state(), state)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_training_mode_of_a_crop_that_is_left_over_by_its_batch():
    """A batch of one has no statistics of a vector."""
    wrong = doctor._InTrainingMode(build_network("mfn", embedding_size=8).eval())
    with torch.inference_mode():
        assert wrong(torch.rand(1, 3, 112, 112)).isfinite().all()


def mean_colour_model(path):
    """An ONNX model whose feature is the mean of each channel."""
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["crops"], ["mean"]),
        onnx.helper.make_node("Flatten", ["mean"], ["feature"]),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "colours",
        [info("crops", onnx.TensorProto.FLOAT, ["n", 3, 112, 112])],
        [info("feature", onnx.TensorProto.FLOAT, ["n", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


def test_command(tmp_path):
    pairs = make_set(60)
    images = [cv2.imencode(".png", crop[..., ::-1])[1].tobytes() for crop in pairs.crops]
    write_bin(tmp_path / "colours.bin", images, pairs.same)
    mean_colour_model(tmp_path / "net.onnx")
    command = [sys.executable, ROOT / "doctor.py", "--checkpoint", tmp_path / "net.onnx", "--device", "cpu"]
    run = subprocess.run(
        [*command, "--bin", tmp_path / "colours.bin", "--most", "60", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "does not say how it is to be fed" in run.stderr  # and is taken for one of InsightFace's
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert report["set"]["pairs"] == 60 and len(report["trials"]) >= 15
    assert report["verdict"] in run.stdout
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr == "error: give either --lfw DIR or --bin FILE\n"


@pytest.mark.parametrize(("name", "reason"), [("absent.onnx", "no such file"), ("stated.onnx", "its metadata says")])
def test_only_a_model_that_says_nothing_is_taken_for_one_of_insightfaces(tmp_path, monkeypatch, capsys, name, reason):
    write_onnx(tmp_path / "stated.onnx", metadata=TEACHER)
    words = ["--checkpoint", tmp_path / name, "--channels", "bgr", "--bin", tmp_path / "none.bin", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, words)])
    assert doctor.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and f"{name}: {reason}" in error


def test_a_trainers_own_file_has_its_inner_mistakes_tried(tmp_path):
    """Also where the weights lie beside a head, as arcface_torch's checkpoints have them."""
    network = build_network("mbf", embedding_size=512).eval()
    wrapped = {"state_dict_backbone": network.state_dict(), "state_dict_softmax_fc": {"weight": torch.zeros(3, 512)}}
    torch.save(wrapped, tmp_path / "checkpoint_gpu_0.pt")
    found = list(doctor.inner_mistakes(Embedder.from_network(network, "cpu"), tmp_path / "checkpoint_gpu_0.pt"))
    assert [name for name, _ in found] == ["training mode"]


@pytest.mark.parametrize("head", [None, {"centres": torch.zeros(3, 9)}, {"centres": torch.zeros(3, 8).to_sparse()}])
def test_a_training_checkpoint_without_its_head_has_no_head_tried(tmp_path, head):
    network = build_network("mfn_half", embedding_size=8).eval()
    utils.save_checkpoint(tmp_path / "shared.pt", {"model": network.state_dict(), "head": head})
    found = list(doctor.inner_mistakes(Embedder.from_network(network, "cpu"), tmp_path / "shared.pt"))
    assert [name for name, _ in found] == ["training mode"]
