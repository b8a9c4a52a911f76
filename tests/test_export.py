"""Exported models: the same features as PyTorch, any batch, metadata that is read back and cannot be contradicted."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from helpers.toy_models import TEACHER, write_onnx

import export
import lfw_eval
from embedding import Preprocessing, load_embedder, open_embedder
from formats import crop_sets
from formats.crop_sets import write_crops
from formats.verification_bin import write_bin
from models import build_network
from retinaface.engines import onnx_model
from retinaface.weights import load_weights
from utils import InputError
from verification.decision import find_decision


def jpeg(rng):
    small = rng.integers(0, 256, (7, 7, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC))[1].tobytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A MobileFaceNet with awake batch norms, exported with everything inside, in all variants."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    network = build_network("mfn", embedding_size=16)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 112, 112))
    torch.save(network.state_dict(), folder / "net.pt")
    rng = np.random.default_rng(0)
    write_crops(folder / "crops", [(jpeg(rng), label) for label in range(8) for _ in range(2)])
    images = [jpeg(rng) for _ in range(80)]
    images[1::4] = images[0::4]  # every other pair is one and the same picture
    write_bin(folder / "pairs.bin", images, np.arange(40) % 2 == 0)
    command = [sys.executable, ROOT / "export.py", "--checkpoint", folder / "net.pt", "--out", folder / "out"]
    command += ["--variants", "fp32", "fp16", "int8", "--calibration", folder / "crops", "--bin", folder / "pairs.bin"]
    command += ["--normalise-inside", "--mirror-inside", "--far", "0.1", "--detector"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_report_and_table(exported):
    folder, stdout = exported
    report = json.loads((folder / "out" / "export.json").read_text())
    assert list(report["variants"]) == ["fp32", "fp16", "int8"]
    sizes = [report["variants"][name]["bytes"] for name in ("fp32", "fp16", "int8")]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.5 * sizes[0]
    angles = [report["variants"][name]["difference_to_pytorch"]["max_angle"] for name in ("fp32", "fp16", "int8")]
    assert angles[0] < 0.1 and angles[0] <= angles[1] < 2 and angles[2] < 45
    assert all(name in stdout for name in ("fp32", "fp16", "int8", "pairs", "detector"))
    written = sorted(path.name for path in (folder / "out").iterdir() if path.name != "cache")
    assert written == ["detector.onnx", *(f"embedding-{name}.onnx" for name in ("fp16", "fp32", "int8")), "export.json"]


def test_sets_of_one_name_keep_their_own_figures(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    random = np.random.default_rng(5)
    for name in ("a", "b"):
        images = [jpeg(random) for _ in range(40)]
        if name == "a":
            images[1::4] = images[0::4]
        (tmp_path / name).mkdir()
        write_bin(tmp_path / name / "set.bin", images, np.arange(20) % 2 == 0)
    words = ["export.py", "--checkpoint", folder / "net.pt", "--out", tmp_path / "out", "--device", "cpu"]
    words += ["--bin", tmp_path / "a" / "set.bin", tmp_path / "b" / "set.bin"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert export.main() == 0
    said = capsys.readouterr().out
    [row] = [line for line in said.splitlines() if line.startswith("fp32 ") and "MB" in line]
    first, second = re.findall(r"(\d+\.\d+)% \(", row)
    assert first == "100.00" and float(second) < 90  # of pairs of one picture, and of noise
    found = json.loads((tmp_path / "out" / "export.json").read_text())["variants"]["fp32"]["verification"]
    assert set(found) == {"set", "set-2"} and found["set"]["auc"] != found["set-2"]["auc"]


def test_features_are_pytorchs_fed_with_plain_pixels(exported):
    folder, _ = exported
    crops = export._random_crops()[:5]
    reference = load_embedder(folder / "net.pt").features(crops)
    session = onnxruntime.InferenceSession(folder / "out" / "embedding-fp32.onnx")
    pixels = crops.transpose(0, 3, 1, 2).astype(np.float32)
    for count in (1, 5):
        (features,) = session.run(None, {"crops": pixels[:count]})
        np.testing.assert_allclose(features, reference[:count], atol=1e-4 * np.abs(reference).max())


def test_metadata_is_read_back(exported):
    folder, _ = exported
    model = load_embedder(folder / "out" / "embedding-fp32.onnx")
    way = model.preprocessing
    assert (way.channels, way.mean, way.std, way.pixel_range, way.mirror) == ("rgb", (0,) * 3, (1,) * 3, 255, False)
    threshold = model.metadata["threshold"]
    assert threshold["far"] == 0.1 and threshold["impostor_pairs"] == 20 and threshold["data"] == "pairs"
    low, high = threshold["far_interval_95"]
    assert 0 <= low < 0.1 < high < 1
    assert {"accuracy_kfold_mean", "angles", "data_sha256"} <= model.metadata["figures"].keys()
    with pytest.raises(InputError, match="metadata says"):
        load_embedder(folder / "out" / "embedding-fp32.onnx", channels="bgr")
    stored = onnx.load(folder / "out" / "embedding-fp32.onnx")
    assert str(ROOT).encode() not in stored.SerializeToString()


def test_detector_is_the_detector():
    model = onnx_model(load_weights())
    session = onnxruntime.InferenceSession(model)
    assert session.get_inputs()[0].shape == ["count", 3, "height", "width"]
    for size in ((1, 64, 96), (3, 100, 61)):
        (answer,) = session.run(None, {"image": np.zeros((size[0], 3, *size[1:]), np.float32)})
        cells = sum(-(-size[1] // stride) * -(-size[2] // stride) for stride in (8, 16, 32))
        assert answer.shape == (size[0], 32, cells)


def test_calibration_crops_are_spread_and_rgb(tmp_path):
    red = np.zeros((112, 112, 3), np.uint8)
    red[..., 2] = 200
    blue = red[..., ::-1].copy()
    items = [(cv2.imencode(".png", picture)[1].tobytes(), label) for label, picture in enumerate((red, blue, red))]
    write_crops(tmp_path / "crops", items)
    crops = export.calibration_crops(tmp_path / "crops", 2)
    assert crops.shape == (2, 112, 112, 3) and (crops[..., 0] == 200).all()
    assert len(crop_sets.open_training_set(tmp_path / "crops")) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--variants", "int8"], "--calibration"),
        (["--for", "insightface", "--mirror-inside", "--no-mirror"], "contradict each other"),
        (["--for", "insightface", "--mirror"], "the package adds no mirror image"),
        (["--pairs", "pairs.csv"], "--pairs: pairs of the photos in --lfw"),
        (["--detector-weights", "own.pth"], "--detector-weights: concerns --detector"),
        (["--precision", "bf16"], "--precision: files are written in the arithmetic of --variants"),
        (["--far", "0"], "--far 0"),
        (["--far", "1e-4"], "--far: the rate of a threshold, which only --lfw, --bin and --figures bring"),
        ([], "no-such.pt"),
    ],
)
def test_refusals(tmp_path, arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", "no-such.pt", "--out", str(tmp_path), *arguments])
    assert export.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
    assert not list(tmp_path.iterdir())


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    code = export.main()
    return code, *capsys.readouterr()


def test_a_foreign_file_becomes_one_that_speaks_for_itself(exported, tmp_path, monkeypatch, capsys):
    """Told once, measured once: the copy needs no options, and the demo finds its threshold in it."""
    folder, _ = exported
    foreign = write_onnx(tmp_path / "foreign.onnx", metadata={"author": "somebody"})
    model = onnx.load(foreign)
    onnx.save(model, foreign, save_as_external_data=True, location="foreign.data", size_threshold=0)
    told = ["--mean", "0.5", "--std", "0.5", "--channels", "bgr"]
    arguments = ["--checkpoint", foreign, "--out", tmp_path / "out", "--bin", folder / "pairs.bin", "--far", "0.1"]
    code, out, err = run(monkeypatch, capsys, *arguments, *told)
    assert code == 0, err
    assert "without mirror image" in out and "no mirror image; threshold cosine" in out
    copied = load_embedder(tmp_path / "out" / "embedding-fp32.onnx")
    half = (0.5,) * 3
    asked = load_embedder(foreign, mean=half, std=half, channels="bgr")
    assert copied.preprocessing == asked.preprocessing and not copied.preprocessing.mirror
    crops = export._random_crops()
    assert np.array_equal(copied.features(crops), asked.features(crops))
    decision = find_decision(copied, tmp_path / "nowhere.onnx", far=0.1)
    assert "at FAR 0.1 (95 % interval" in decision.source
    props = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "embedding-fp32.onnx").metadata_props}
    assert props["author"] == "somebody" and props["source_sha256"] == asked.sha256
    code, _, err = run(monkeypatch, capsys, *arguments, *told, "--mirror-inside")
    assert code == 1 and "copied as it is" in err


def test_what_was_measured_does_not_go_into_a_copy_unmeasured(exported, tmp_path, monkeypatch, capsys):
    """A copy in other arithmetic, or of another feeding, has no threshold; a mirror image inside stays inside."""
    folder, _ = exported
    source = folder / "out" / "embedding-fp32.onnx"
    assert "threshold" in load_embedder(source).metadata
    code, _, err = run(
        monkeypatch, capsys, "--checkpoint", source, "--out", tmp_path / "out", "--variants", "fp32", "fp16"
    )
    assert code == 0, err
    for name in ("fp32", "fp16"):
        said = load_embedder(tmp_path / "out" / f"embedding-{name}.onnx").metadata
        assert said["mirror"] == "graph" and "threshold" not in said and "figures" not in said


def test_figures_of_lfw_eval_need_not_be_measured_again(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    words = ["lfw_eval.py", "--checkpoint", folder / "net.pt", "--bin", folder / "pairs.bin", "--far", "0.1", "0.2"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--out", str(tmp_path / "eval"), "--device", "cpu"])
    assert lfw_eval.main() == 0
    capsys.readouterr()
    results = tmp_path / "eval" / "results.json"
    arguments = ["--checkpoint", folder / "net.pt", "--out", tmp_path / "out", "--figures", results, "--far", "0.1"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    measured = json.loads(results.read_text())["sets"][0]
    stated = load_embedder(tmp_path / "out" / "embedding-fp32.onnx").metadata
    (point,) = [point for point in measured["tar_at_far"] if point["far"] == 0.1]
    assert stated["threshold"]["cosine"] == point["threshold"]["cosine"] != measured["threshold_best"]["cosine"]
    assert stated["threshold"]["far_interval_95"] == point["far_interval_95"]
    # Fed in another way, or another network, it is no figure of this one; nor is it in another arithmetic.
    code, _, err = run(monkeypatch, capsys, *arguments, "--no-mirror")
    assert code == 1 and "fed with other mirror" in err
    content = json.loads(results.read_text())
    content["model"]["engine"] += " bf16"
    results.write_text(json.dumps(content))
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "results.json: measured with --precision bf16" in err


def insightface_would_feed(path, crops):
    """What the insightface package hands to a model, from its rule alone (model_zoo/arcface_onnx.py)."""
    graph = onnx.load(path).graph
    sub = any(node.name.startswith(("Sub", "_minus")) for node in graph.node[:8])
    mul = any(node.name.startswith(("Mul", "_mul")) for node in graph.node[:8])
    mean, std = (0.0, 1.0) if sub and mul else (127.5, 127.5)
    bgr = [crop[..., ::-1] for crop in crops]
    return cv2.dnn.blobFromImages(bgr, 1.0 / std, (112, 112), (mean,) * 3, swapRB=True)


def test_the_insightface_package_feeds_what_is_made_for_it(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    code, out, err = run(
        monkeypatch, capsys, "--checkpoint", folder / "net.pt", "--out", tmp_path, "--for", "insightface",
        "--bin", folder / "pairs.bin", "--far", "0.1",
    )  # fmt: skip
    assert code == 0, err
    path, crops = tmp_path / "embedding-fp32.onnx", export._random_crops()
    assert load_embedder(path).metadata["insightface"] == "right" and "WRONGLY" not in out
    session = onnxruntime.InferenceSession(path)
    (features,) = session.run(None, {"crops": insightface_would_feed(path, crops)})
    reference = load_embedder(folder / "net.pt", mirror=False).features(crops)
    assert np.allclose(features, reference, atol=1e-4 * np.abs(reference).max())


def test_a_file_says_what_the_insightface_package_makes_of_it(exported, tmp_path):
    folder, _ = exported
    for name in ("fp32", "fp16", "int8"):  # mirror image and normalisation inside: pixels are all they want
        path = folder / "out" / f"embedding-{name}.onnx"
        assert load_embedder(path).metadata["insightface"] == "right"
        assert insightface_would_feed(path, export._random_crops()).max() > 1
    plain = write_onnx(tmp_path / "plain.onnx").read_bytes()
    half = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, mirror=False)
    assert export.fed_by_insightface(plain, half) == "right"
    for changes in ({"mirror": True}, {"channels": "bgr"}, {"mean": (0.4,) * 3}, {"pixel_range": 255.0}):
        assert export.fed_by_insightface(plain, dataclasses.replace(half, **changes)) == "wrong"


def test_a_killed_export_leaves_nothing(exported, tmp_path):
    """Killed while it measures, again and again; the next run clears what a kill in the middle of a write leaves."""
    folder, _ = exported
    command = [sys.executable, ROOT / "export.py", "--checkpoint", folder / "net.pt", "--out", tmp_path / "out"]
    command += ["--bin", folder / "pairs.bin", "--variants", "int8", "--calibration", folder / "crops"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "out" / ".scratch").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    (tmp_path / "out" / ".embedding-fp32.onnx.1.tmp").write_bytes(b"half")
    subprocess.run(command, check=True, capture_output=True)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["cache", "embedding-int8.onnx", "export.json"]


@pytest.mark.parametrize(
    "wrong", ["--normalise-inside", "--mirror-inside", "--for insightface", "--layout insightface"]
)
def test_what_needs_a_network_is_refused_for_onnx(exported, monkeypatch, capsys, tmp_path, wrong):
    folder, _ = exported
    path = folder / "out" / "embedding-fp32.onnx"
    code, _, err = run(monkeypatch, capsys, "--checkpoint", path, "--out", tmp_path, *wrong.split())
    assert code == 1 and "is ONNX" in err and not list(tmp_path.iterdir())


def test_what_needs_a_network_is_refused_for_onnx_at_an_address(monkeypatch, capsys, tmp_path):
    """The address need not end like the file: fp16 and int8 would say of plain pixels what the graph never learnt."""
    model = write_onnx(tmp_path / "model.onnx", metadata=TEACHER)
    monkeypatch.setattr("download.fetch", lambda url, folder: model)
    address = "https://example.org/model.onnx?version=2"
    arguments = ["--checkpoint", address, "--out", tmp_path / "out", "--normalise-inside", "--variants", "fp16"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and f"{address}: is ONNX" in err and not (tmp_path / "out").exists()


def test_too_few_crops_to_calibrate_with_are_named(tmp_path, monkeypatch, capsys):
    foreign = write_onnx(tmp_path / "foreign.onnx")
    rng = np.random.default_rng(0)
    write_crops(tmp_path / "crops", [(jpeg(rng), label) for label in range(15)])
    arguments = ["--checkpoint", foreign, "--mean", "0.5", "--std", "0.5", "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, *arguments, "--variants", "int8", "--calibration", tmp_path / "crops")
    assert code == 1 and err.count("error:") == 1 and "15 crops, fewer than the 16" in err


def test_a_variant_that_overflows_is_named_and_no_report_of_other_files_stays(tmp_path, monkeypatch, capsys):
    foreign = write_onnx(tmp_path / "foreign.onnx")
    out = tmp_path / "out"
    arguments = ["--checkpoint", foreign, "--mean", "0.5", "--std", "0.5", "--out", out]
    assert run(monkeypatch, capsys, *arguments)[0] == 0 and (out / "export.json").exists()
    monkeypatch.setattr(
        export.Exporter, "variant", lambda self, base, name: base if name == "fp32" else too_large(base)
    )
    code, _, err = run(monkeypatch, capsys, *arguments, "--variants", "fp32", "fp16")
    assert code == 1 and "embedding-fp16.onnx: in fp16 the network gives features that are zero or not finite" in err
    assert sorted(path.name for path in out.glob("e*")) == ["embedding-fp32.onnx"]


def too_large(model):
    proto = onnx.load_from_string(model)
    kernel = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full_like(kernel, np.inf), "kernel"))
    return proto.SerializeToString()


def unsorted(path):
    model = onnx.load(write_onnx(path))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    onnx.save(model, path)


def beside_a_hard_link(path):
    onnx.save(onnx.load(write_onnx(path)), path, save_as_external_data=True, location="weights", size_threshold=0)
    os.link(path.with_name("weights"), path.with_name("the-same"))


@pytest.mark.parametrize(
    ("write", "variant", "reason"),
    [
        (unsorted, "fp32", "topologically sorted"),
        (beside_a_hard_link, "fp32", "multiple hard links"),
        (lambda path: write_onnx(path, kind=onnx.TensorProto.FLOAT16), "int8", "expected: (tensor(float16))"),
    ],
)
def test_a_foreign_file_that_cannot_be_turned_into_a_variant_is_named(
    tmp_path, monkeypatch, capsys, write, variant, reason
):
    foreign = tmp_path / "foreign.onnx"
    write(foreign)
    write_crops(tmp_path / "crops", [(jpeg(np.random.default_rng(0)), label) for label in range(16)])
    arguments = ["--checkpoint", foreign, "--mean", "0.5", "--std", "0.5", "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, *arguments, "--variants", variant, "--calibration", tmp_path / "crops")
    assert code == 1 and f"error: {foreign}: cannot be" in err and reason in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*.onnx"))


def test_a_crop_without_a_feature_does_not_end_the_export(tmp_path, monkeypatch, capsys):
    """A black one, to a network without biases; it has no angle to anything, the others have."""
    foreign = write_onnx(tmp_path / "foreign.onnx")
    black = cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes()
    write_crops(tmp_path / "crops", [(jpeg(np.random.default_rng(0)), 0), (black, 1)])
    arguments = ["--checkpoint", foreign, "--mean", "0", "--std", "1", "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, *arguments, "--calibration", tmp_path / "crops")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "export.json").read_text())["variants"]["fp32"]["difference_to_pytorch"]
    assert found["min_cosine"] == pytest.approx(1)


def test_a_name_that_is_no_text_is_written_as_it_is_shown(tmp_path, monkeypatch, capsys):
    def renamed(*arguments):
        embedder = open_embedder(*arguments)
        embedder.name = "caf\udce9.pt"
        return embedder

    monkeypatch.setattr(export, "open_embedder", renamed)
    foreign = write_onnx(tmp_path / "foreign.onnx", metadata=TEACHER)
    code, _, err = run(monkeypatch, capsys, "--checkpoint", foreign, "--out", tmp_path / "out")
    assert code == 0, err
    assert load_embedder(tmp_path / "out" / "embedding-fp32.onnx").metadata["source"] == r"caf\udce9.pt"


def test_the_source_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """A copy has no threshold of its own: made in the place of its source, it would take what was measured along."""
    source = write_onnx(tmp_path / "embedding-fp32.onnx", metadata=TEACHER | {"threshold": '{"cosine": 0.5}'})
    before = source.read_bytes()
    code, _, err = run(monkeypatch, capsys, "--checkpoint", source, "--out", tmp_path)
    assert code == 1 and "would be overwritten" in err and source.read_bytes() == before
    weights = tmp_path / "backbone.pth"
    torch.save(build_network("mbf").half().state_dict(), weights)
    before = weights.read_bytes()
    code, _, err = run(monkeypatch, capsys, "--checkpoint", weights, "--out", tmp_path, "--layout", "insightface")
    assert code == 1 and "would be overwritten" in err and weights.read_bytes() == before


def test_figures_of_another_version_are_named(tmp_path, monkeypatch, capsys):
    foreign = write_onnx(tmp_path / "foreign.onnx")
    told = ["--mean", "0.5", "--std", "0.5"]
    asked = load_embedder(foreign, mean=(0.5,) * 3, std=(0.5,) * 3)
    best = {"cosine": 0.5, "angle": 60.0}
    entry = {"name": "pairs", "sha256": "ab", "threshold_best": best, "angles": None, "tar_at_far": []}
    model = {"sha256": asked.sha256, "preprocessing": dataclasses.asdict(asked.preprocessing)}
    (tmp_path / "old.json").write_text(json.dumps({"model": model, "sets": [entry]}))
    arguments = ["--checkpoint", foreign, *told, "--out", tmp_path / "out", "--figures", tmp_path / "old.json"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "old.json: not as lfw_eval.py writes it" in err and "pairs" in err


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_network_that_knows_nothing_is_not_exported(tmp_path, monkeypatch, capsys, value):
    state = build_network("mfn_half", embedding_size=8).state_dict()
    state["project.0.weight"].fill_(value)
    state["project.1.bias"].fill_(value)
    torch.save(state, tmp_path / "net.pt")
    command = ["export.py", "--checkpoint", str(tmp_path / "net.pt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    assert export.main() == 1
    assert "net.pt: gives features that are zero or not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.onnx"))
