"""Exported models give PyTorch's features in the runtimes that people have.

Those that go with this environment (onnxruntime, OpenCV) run in it. Others want packages of their own, such as a NumPy
before 2: they are looked for in the folder that RUNTIMES names, an environment for each (`make runtimes` makes them).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT

import export
from embedding import Embedder, Preprocessing
from models import NETWORKS as KNOWN
from models import build_network, feeding_of

OTHERS = ("onnxruntime-1.16", "opencv-4", "openvino", "insightface")
# The smallest network of each family, but of those that have the operators of others, or a test of their own.
SMALLEST = {entry.family: name for name, entry in reversed(KNOWN.items())}.values()
NETWORKS = [name for name in SMALLEST if name not in ("ir18", "mbf", "vit_t")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By network: a file with everything inside the graph, which asks most of a runtime, and PyTorch's features."""
    folder = tmp_path_factory.mktemp("runtimes")
    crops = export._random_crops()[:3]
    np.save(folder / "pixels.npy", np.ascontiguousarray(crops.transpose(0, 3, 1, 2), np.float32))
    made = {}
    for name in NETWORKS:
        torch.manual_seed(0)
        network = build_network(name, embedding_size=8).eval()
        way = Preprocessing.of(feeding_of(network))
        path = folder / f"{name}.onnx"
        path.write_bytes(export.to_onnx(export.ExportedNetwork(network, way, mirror=True)))
        made[name] = path, Embedder.from_network(network, "cpu", preprocessing=way).features(crops)
    return folder / "pixels.npy", made


def features_by(python, runtime, path, pixels, out):
    script = ROOT / "tests" / "helpers" / "run_exported.py"
    command = [str(python), str(script), runtime, str(path), str(pixels), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "opencv"])
def test_runtimes_of_this_environment(exported, tmp_path, runtime, network):
    pixels, made = exported
    path, expected = made[network]
    assert onnx.load(path).ir_version == 8  # which onnxruntime has read since 1.13
    found = features_by(sys.executable, runtime, path, pixels, tmp_path / "features.npy")
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", OTHERS)
def test_runtimes_of_other_environments(exported, tmp_path, name, network):
    python = Path(os.environ.get("RUNTIMES", "")) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with {name} (make runtimes, RUNTIMES=DIR)")
    pixels, made = exported
    path, expected = made[network]
    found = features_by(python, name.split("-")[0], path, pixels, tmp_path / "features.npy")
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())
