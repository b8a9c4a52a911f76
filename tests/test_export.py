"""Exported models: the same features as PyTorch, any batch, metadata that is read back and cannot be contradicted."""

import json
import subprocess
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT

import export
from embedding import load_embedder
from formats import crop_sets
from formats.crop_sets import write_crops
from formats.verification_bin import write_bin
from models import build_network
from retinaface.engines import onnx_model
from retinaface.weights import load_weights
from utils import InputError


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
        (["--far", "0"], "--far 0"),
        ([], "no-such.pt"),
    ],
)
def test_refusals(tmp_path, arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", "no-such.pt", "--out", str(tmp_path), *arguments])
    assert export.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
    assert not list(tmp_path.iterdir())


def test_onnx_is_not_exported_again(exported, monkeypatch, capsys, tmp_path):
    folder, _ = exported
    path = folder / "out" / "embedding-fp32.onnx"
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", str(path), "--out", str(tmp_path)])
    assert export.main() == 1
    assert "is ONNX already" in capsys.readouterr().err
