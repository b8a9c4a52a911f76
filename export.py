"""Turn a trained network into ONNX files that say of themselves how they are to be fed.

    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME
    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME --lfw data/lfw --far 1e-3
    python export.py --checkpoint released --out exports/r101 --variants fp32 fp16 int8 --calibration data/crops \\
        --bin lfw.bin --mirror-inside
    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME --layout insightface

Writes embedding-VARIANT.onnx for each variant, detector.onnx on request, and export.json. Each file is compared with
PyTorch before it gets its name: float32 must agree to rounding; what FP16 and INT8 lose is measured, on the crops'
cosines always and, with --lfw or --bin, as verification accuracy beside the float32 network's own. The figures and the
threshold at --far, with its confidence interval, go into the files' metadata, where lfw_eval.py and demo.py read them.
With --layout insightface it writes backbone.pth alone, the weights as InsightFace's arcface_torch loads them.
"""

import passive_threads  # noqa: F401  # isort: skip

import dataclasses
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import config
import retinaface.engines
import utils
from config import CROP_SIZE
from cropping.photos import decode_crop
from embedding import Embedder, Preprocessing, load_embedder, normalise
from formats import crop_sets
from models import feeding_of, name_of
from networks.catalogue import INSIGHTFACE
from options import parse
from retinaface.weights import load_weights
from utils import InputError
from verification.features import verify
from verification.metrics import VerificationResult
from verification.sets import VerificationSet, open_set

# Version 18 is the oldest that PyTorch's exporter writes without conversion; every onnxruntime since 1.14 reads it.
OPSET = 18
# Float32 in another order of additions: the largest difference seen over all networks is 1e-5 of a feature's length.
TOLERANCE = 1e-4
CALIBRATION_CROPS = 256
CHECK_BATCHES = (1, 2, 5)

# What remains to be done outside of a graph that normalises: hand over pixels from 0 to 255.
RAW_PIXELS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pixel_range=255)


class ExportedNetwork(nn.Module):
    """The network as the graph will hold it: crops float32 [N, 3, 112, 112] -> feature float32 [N, D].

    With `normalisation`, the crops are RGB pixels from 0 to 255; without, they are normalised already. With `mirror`,
    the features of the mirror image are added.
    """

    def __init__(self, network: nn.Module, normalisation: Preprocessing | None, mirror: bool) -> None:
        super().__init__()
        self.network, self.mirror = network, mirror
        self.normalises = normalisation is not None
        self.bgr = normalisation is not None and normalisation.channels == "bgr"
        if normalisation is not None:
            shift, scale = normalisation.constants()
            self.register_buffer("shift", shift.reshape(3, 1, 1))
            self.register_buffer("scale", scale.reshape(3, 1, 1))

    def forward(self, crops: Tensor) -> Tensor:
        """See the class."""
        if self.bgr:
            crops = crops.flip(1)
        if self.normalises:
            crops = (crops - self.shift) * self.scale
        if not self.mirror:
            return self.network(crops)
        # One pass over both: two would be two networks to whoever quantises the graph.
        features = self.network(torch.cat([crops, crops.flip(3)]))
        return features[: crops.shape[0]] + features[crops.shape[0] :]


def to_onnx(module: ExportedNetwork) -> bytes:
    """The module as an ONNX model with input `crops`, output `feature` and a free batch size."""
    sample = torch.rand(2, 3, CROP_SIZE, CROP_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter that a user can do nothing about
        program = torch.onnx.export(
            module.eval(),
            (sample,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["crops"],
            output_names=["feature"],
            dynamic_shapes={"crops": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    model = program.model_proto
    for entries in (model.graph.node, model.graph.input, model.graph.output, model.graph.value_info):
        for entry in entries:
            del entry.metadata_props[:]  # stack traces and paths of the machine that exported
    del model.metadata_props[:]
    return model.SerializeToString()


def to_fp16(model: bytes) -> bytes:
    """The same model with float16 weights and arithmetic; input and output stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    half = OnnxModel(convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True))
    half.topological_sort()  # the converter appends the casts of the input at the end
    return half.model.SerializeToString()


def to_int8(model: bytes, batches: Iterator[np.ndarray]) -> bytes:
    """The same model with 8-bit convolutions and linear layers, ranges taken from `batches` of its input.

    Weights have a scale per output channel (as little loss as 8 bits allow), activations one per tensor.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"crops": batch}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantised = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(model)
        quantization.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        return quantised.read_bytes()


def with_metadata(model: bytes, metadata: dict[str, str]) -> bytes:
    """The model with these texts as its metadata, replacing what it had."""
    import onnx

    proto = onnx.load_from_string(model)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


# --- crops to check and to calibrate with ----------------------------------------------------------------------------


def calibration_crops(path: Path, count: int) -> np.ndarray:
    """`count` crops spread evenly over a training set, uint8 RGB [n, 112, 112, 3]."""
    crops = crop_sets.open_training_set(path)
    chosen = np.unique(np.linspace(0, len(crops) - 1, count).round().astype(int))
    return np.stack([_decode(crops, int(index)) for index in chosen])


def _decode(crops: crop_sets.Crops, index: int) -> np.ndarray:
    payload, _ = crops.read(index)
    try:
        return decode_crop(payload)
    except ValueError as error:
        raise InputError(f"{crops.describe(index)}: {error}") from error


def _random_crops() -> np.ndarray:
    """Smooth random pictures: more like photos to a network than white noise."""
    noise = np.random.Generator(np.random.Philox(key=[0, 0])).integers(0, 256, (16, 8, 8, 3), np.uint8)
    return np.stack([cv2.resize(small, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_CUBIC) for small in noise])


def differences(reference: np.ndarray, features: np.ndarray) -> dict[str, float]:
    """How far `features` [N, D] are from `reference`: relative to its largest length, and as cosine and angle."""
    lengths = np.linalg.norm(reference, axis=1)
    cosines = (normalise(reference) * normalise(features)).sum(axis=1)
    if not np.isfinite(features).all():
        raise InputError("the exported network gives features that are not finite")
    return {
        "max_difference": float(np.abs(features - reference).max()),
        "max_relative_difference": float(np.linalg.norm(features - reference, axis=1).max() / lengths.max()),
        "min_cosine": float(cosines.min()),
        "max_angle": float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1)))),
    }


# --- the two networks ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Exporter:
    """What all variants of one embedding network share."""

    options: config.Export
    embedder: Embedder  # the network in PyTorch, fed as its checkpoint wants
    sets: list[VerificationSet]

    def __post_init__(self) -> None:
        self.network: nn.Module = self.embedder.model.network
        self.results = [self.verify(self.embedder, pairs) for pairs in self.sets]
        calibration = self.options.calibration
        self.crops = _random_crops() if calibration is None else calibration_crops(calibration, CALIBRATION_CROPS)
        self.reference = self.embedder.features(self.crops)

    def verify(self, embedder: Embedder, pairs: VerificationSet) -> VerificationResult:
        """The figures of a model on one set, with the rate that --far asks for."""
        return verify(embedder, pairs, cache_dir=self.options.out / "cache", far_levels=[self.options.far])

    @property
    def outside(self) -> Preprocessing:
        """What is left to do before the graph."""
        inside = self.options.normalise_inside
        way = RAW_PIXELS if inside else self.embedder.preprocessing
        return dataclasses.replace(way, mirror=not self.options.mirror_inside)

    def base(self) -> bytes:
        """The float32 model without metadata."""
        normalisation = self.embedder.preprocessing if self.options.normalise_inside else None
        return to_onnx(ExportedNetwork(self.network, normalisation, self.options.mirror_inside))

    def variant(self, base: bytes, name: str) -> bytes:
        """`base` in the arithmetic of a variant."""
        if name == "fp16":
            return to_fp16(base)
        if name == "int8":
            parts = (self.crops[start : start + 16] for start in range(0, len(self.crops), 16))
            return to_int8(base, (np.ascontiguousarray(self.outside(torch.from_numpy(part))) for part in parts))
        return base

    def write(self, model: bytes, name: str) -> dict[str, Any]:
        """Check a variant, measure it, write it with its metadata; returns its entry of export.json."""
        path = self.options.out / f"embedding-{name}.onnx"
        metadata = self.outside.to_metadata(mirror_in_graph=self.options.mirror_inside)
        metadata |= {"source": self.embedder.name, "source_sha256": str(self.embedder.sha256), "variant": name}
        with tempfile.TemporaryDirectory(dir=self.options.out) as folder:
            trial = Path(folder) / path.name
            trial.write_bytes(with_metadata(model, metadata))
            exported = load_embedder(trial, "cpu")
            found = differences(self.reference, exported.features(self.crops))
            if name == "fp32" and not found["max_relative_difference"] <= TOLERANCE:
                raise InputError(
                    f"{path}: differs from PyTorch by {found['max_relative_difference']:.1e}, more than {TOLERANCE}"
                )
            self._check_batches(exported)
            results = [self.verify(exported, pairs) for pairs in self.sets]
        metadata |= self.figures(results)
        utils.write_bytes(path, with_metadata(model, metadata))
        return {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": utils.sha256_of(path),
            "difference_to_pytorch": found,
            "verification": {result.set_name: result.to_json() for result in results},
            "metadata": metadata,
        }

    def _check_batches(self, exported: Embedder) -> None:
        """A batch must not depend on its size: what a fixed batch in the graph would break."""
        rows = exported.features(self.crops[: max(CHECK_BATCHES)])
        for size in CHECK_BATCHES:
            part = exported.features(self.crops[:size])
            if not np.allclose(part, rows[:size], rtol=1e-2, atol=1e-2 * np.abs(rows).max()):
                raise InputError(f"{exported.name}: a batch of {size} gives other features than a larger one")

    def figures(self, results: list[VerificationResult]) -> dict[str, str]:
        """Metadata of the first set with both kinds of pairs: the threshold at --far and what it stands on."""
        for pairs, result in zip(self.sets, results, strict=True):
            if result.best_threshold is None:
                continue
            figures = {"data": result.set_name, "data_sha256": pairs.sha256} | _summary(result)
            point = result.points[0]
            if not point.resolved:
                return {"figures": json.dumps(figures)}
            threshold = {
                "cosine": point.threshold,
                "far": point.far,
                "far_interval_95": point.far_interval,
                "tar": point.tar,
                "impostor_pairs": point.impostors,
                "data": result.set_name,
            }
            return {"threshold": json.dumps(threshold), "figures": json.dumps(figures)}
        return {}


def _summary(result: VerificationResult) -> dict[str, Any]:
    whole = result.to_json()
    keys = ("pairs", "accuracy_kfold_mean", "accuracy_best_threshold", "threshold_best", "auc", "eer", "angles")
    return {key: whole[key] for key in keys}


def export_detector(options: config.Export) -> dict[str, Any]:
    """RetinaFace's folded network as ONNX, compared with PyTorch; decoding and suppression stay outside."""
    folded = load_weights(options.detector_weights)
    metadata = {
        "input": "image: float32 BGR [count, 3, height, width], pixels 0 to 255 minus (104, 117, 123)",
        "output": "float32 [count, 32, cells], cells of strides 8, 16, 32 in turn, two anchors a cell; "
        "see retinaface/network.py",
    }
    model = with_metadata(retinaface.engines.onnx_model(folded), metadata)
    photos = np.random.Generator(np.random.Philox(key=[1, 0])).integers(0, 256, (2, 250, 250, 3), np.uint8)
    exported = retinaface.engines.OnnxEngine(folded).run(photos)
    reference = retinaface.engines.TorchEngine(folded, torch.device("cpu")).run(photos)
    difference = float(np.abs(np.asarray(exported) - np.asarray(reference)).max())
    path = options.out / "detector.onnx"
    utils.write_bytes(path, model)
    return {"file": path.name, "sha256": utils.sha256_of(path), "max_difference_to_pytorch": difference}


def write_backbone(embedder: Embedder, out: Path) -> Path:
    """The weights as arcface_torch has them: a plain float32 state_dict under its key names, which are ours."""
    network = embedder.model.network
    if feeding_of(network) != INSIGHTFACE:
        raise InputError(
            f"{embedder.name}: holds {name_of(network.state_dict())}, which is none of InsightFace's networks (ir, "
            "mbf, vit) and has no weights for their key names; ONNX (--layout onnx) goes everywhere"
        )
    path = out / "backbone.pth"
    utils.save_tensors(path, {key: value.cpu().contiguous() for key, value in network.state_dict().items()})
    return path


def table(entries: dict[str, dict[str, Any]], reference: list[VerificationResult]) -> str:
    """Size, difference to PyTorch and accuracy of every variant, beside PyTorch's own accuracy."""
    lines = [
        "",
        f"{'':10}{'size':>10}{'max difference':>16}{'max angle':>11}" + "".join(f"{r.set_name:>24}" for r in reference),
        f"{'pytorch':10}{'':>10}{'':>16}{'':>11}" + "".join(f"{r.accuracy:>24.2%}" for r in reference),
    ]
    for name, entry in entries.items():
        found = entry["difference_to_pytorch"]
        cells = []
        for result in reference:
            figures = entry["verification"][result.set_name]
            accuracy = figures["accuracy_kfold_mean"] or figures["accuracy_best_threshold"] or float("nan")
            cells.append(f"{f'{accuracy:.2%} ({100 * (accuracy - result.accuracy):+.2f})':>24}")
        size = f"{entry['bytes'] / 1e6:.1f} MB"
        lines.append(
            f"{name:10}{size:>10}{found['max_difference']:>16.1e}{found['max_angle']:>10.3f}°" + "".join(cells)
        )
    return "\n".join(lines)


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(config.Export, __doc__)
    if "int8" in options.variants and options.calibration is None:
        raise InputError("--variants int8 needs --calibration: crops (not those of the evaluation) to take ranges from")
    for name in ("onnxscript", "torch.onnx", "onnx_ir", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    embedder = load_embedder(options.checkpoint, "cpu")
    if not hasattr(embedder.model, "network"):
        raise InputError(f"{embedder.name}: is ONNX already; export starts from a checkpoint")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.layout == "insightface":
        print(f"{write_backbone(embedder, options.out)}: for InsightFace's get_model(...).load_state_dict(...)")
        return
    paths = ([options.lfw] if options.lfw else []) + options.bin
    sets = [open_set(path, options.out / "cache", pairs=options.pairs, device="cpu") for path in paths]
    exporter = Exporter(options, embedder, sets)
    base = exporter.base()
    entries = {name: exporter.write(exporter.variant(base, name), name) for name in dict.fromkeys(options.variants)}
    report: dict[str, Any] = {"model": embedder.describe(), "variants": entries, "environment": utils.environment()}
    if options.detector:
        report["detector"] = export_detector(options)
    utils.write_json(options.out / "export.json", report)
    print(table(entries, exporter.results))
    if options.detector:
        print(f"detector   max difference to PyTorch {report['detector']['max_difference_to_pytorch']:.1e}")
    print(f"\n{options.out / 'export.json'}; the models lie beside it")


if __name__ == "__main__":
    sys.exit(main())
