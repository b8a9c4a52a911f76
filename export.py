"""Turn a trained network into ONNX files that say of themselves how they are to be fed.

    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME
    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME --lfw data/lfw --far 1e-3
    python export.py --checkpoint released --out exports/r101 --variants fp32 fp16 int8 --calibration data/crops \\
        --bin lfw.bin --mirror-inside
    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME --layout insightface

    python export.py --checkpoint runs/NAME/embedding.pt --out exports/NAME --for insightface --lfw data/lfw
    python export.py --checkpoint w600k_r50.onnx --mean 0.5 --std 0.5 --out exports/w600k --lfw data/lfw

Writes embedding-VARIANT.onnx for each variant, detector.onnx on request, and export.json. Each file is compared with
PyTorch before it gets its name: float32 must agree to rounding; what FP16 and INT8 lose is measured, on the crops'
cosines always and, with --lfw or --bin, as verification accuracy beside the float32 network's own. The figures and the
threshold at --far, with its confidence interval, go into the files' metadata, where lfw_eval.py and demo.py read them.
A foreign ONNX file that says nothing of itself becomes a copy that does, so that it is told only once.
With --layout insightface it writes backbone.pth alone, the weights as InsightFace's arcface_torch loads them.
"""

import passive_threads  # noqa: F401  # isort: skip

import contextlib
import dataclasses
import json
import logging
import math
import shutil
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
from download import checkpoint_path
from embedding import Embedder, Preprocessing, embedder_of_onnx, normalise, open_embedder
from formats import crop_sets
from models import name_of
from networks.catalogue import ARCFACE_TORCH, NETWORKS
from networks.files import not_finite
from options import parse, refuse_useless
from retinaface.weights import load_weights
from utils import InputError
from verification.decision import measured_entry
from verification.features import verify
from verification.metrics import FAR_LEVELS, VerificationResult
from verification.scores import stems
from verification.sets import VerificationSet, open_set

# Version 18 is the oldest that PyTorch's exporter writes without conversion; every onnxruntime since 1.14 reads it. It
# goes with version 8 of the file format; the exporter writes 10, which onnxruntime reads from 1.18 on only.
OPSET, IR_VERSION = 18, 8
OF_ONNX = (
    "variants", "for_", "normalise_inside", "mirror_inside", "calibration", "lfw", "bin", "figures", "detector",
    "detector_weights",
)  # fmt: skip
# Float32 in another order of additions: the largest difference seen over all networks is 1e-5 of a feature's length.
TOLERANCE = 1e-4
CALIBRATION_CROPS = 256
MEASURED = ("threshold", "figures")  # keys of the metadata
CHECK_BATCHES = (1, 2, 5)

# What remains to be done outside of a graph that normalises: hand over pixels from 0 to 255.
RAW_PIXELS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pixel_range=255)


class ExportedNetwork(nn.Module):
    """The network as the graph will hold it: crops float32 [N, 3, 112, 112] -> feature float32 [N, D].

    With `normalisation`, the crops are RGB pixels from 0 to 255; without, they are normalised already. With `mirror`,
    the features of the mirror image are added. Of several ways to write this, the one that most runtimes know is taken:
    OpenCV 4 has neither slices with a negative step nor sizes that are computed.
    """

    shift: Tensor
    scale: Tensor
    reverse: Tensor

    def __init__(self, network: nn.Module, normalisation: Preprocessing | None, mirror: bool) -> None:
        super().__init__()
        self.network, self.mirror = network, mirror
        self.normalises = normalisation is not None
        self.bgr = normalisation is not None and normalisation.channels == "bgr"
        if normalisation is not None:
            shift, scale = (values.flip(0) if self.bgr else values for values in normalisation.constants())
            self.register_buffer("shift", shift.reshape(3, 1, 1))
            self.register_buffer("scale", scale.reshape(3, 1, 1))
        # Times this matrix, a row of pixels is the other way round, exactly: all products but one are zero.
        self.register_buffer("reverse", torch.eye(CROP_SIZE).flip(0))

    def forward(self, crops: Tensor) -> Tensor:
        """See the class."""
        if self.normalises:
            crops = (crops - self.shift) * self.scale
        if self.bgr:
            crops = torch.cat([crops[:, 2:3], crops[:, 1:2], crops[:, 0:1]], dim=1)
        if not self.mirror:
            return self.network(crops)
        # One pass over both: two would be two networks to whoever quantises the graph.
        features = self.network(torch.cat([crops, crops @ self.reverse]))
        halves = features.reshape(2, -1, features.shape[1])
        return (halves[0:1] + halves[1:2]).reshape(-1, features.shape[1])


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
    assert program is not None  # as always with dynamo=True
    model = program.model_proto
    for entries in (model.graph.node, model.graph.input, model.graph.output, model.graph.value_info):
        for entry in entries:
            del entry.metadata_props[:]  # stack traces and paths of the machine that exported
    del model.metadata_props[:]
    model.ir_version = IR_VERSION
    if module.normalises:
        for node in model.graph.node[:2]:  # by these names the insightface package knows that it must not normalise
            node.name = f"{node.op_type}_pixels"
    return model.SerializeToString()


def pixels_first(model: bytes) -> bytes:
    """The same model with what is done to its pixels in front of all other nodes, where other programs look for it.

    The quantiser puts what it does to the weights there.
    """
    import onnx

    proto = onnx.load_from_string(model)
    nodes = list(proto.graph.node)
    maker = {output: node.name for node in nodes for output in node.output}
    wanted = {node.name for node in nodes if node.name == "Mul_pixels"}
    for node in reversed(nodes):  # a graph's nodes stand behind those they need
        if node.name in wanted:
            wanted |= {maker[name] for name in node.input if name in maker}
    del proto.graph.node[:]
    proto.graph.node.extend(sorted(nodes, key=lambda node: node.name not in wanted))
    return proto.SerializeToString()


def insightface_normalises(model: bytes) -> bool:
    """Whether the insightface package feeds a model with (pixel - 127.5) / 127.5, else with pixels from 0 to 255.

    Its rule (python-package, insightface/model_zoo/arcface_onnx.py): a model normalises itself if names among those of
    its first eight nodes begin with `Sub` or `_minus`, and with `Mul` or `_mul`. Crops are RGB, no mirror image is
    added.
    """
    import onnx

    names = [node.name for node in onnx.load_from_string(model).graph.node[:8]]
    subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
    multiplies = any(name.startswith(("Mul", "_mul")) for name in names)
    return not (subtracts and multiplies)


def fed_by_insightface(model: bytes, way: Preprocessing) -> str:
    """`right` or `wrong`: whether the insightface package feeds a model as `way` says."""
    plain = (
        Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3, pixel_range=255)
        if insightface_normalises(model)
        else RAW_PIXELS
    )
    same = all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain.constants(), way.constants(), strict=True))
    return "right" if same and way.channels == "rgb" and not way.mirror else "wrong"


def to_fp16(model: bytes) -> bytes:
    """The same model with float16 weights and arithmetic; input and output stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    half = OnnxModel(convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True))
    half.topological_sort()  # the converter appends the casts of the input at the end
    return half.model.SerializeToString()


def to_int8(model: bytes, batches: Iterator[np.ndarray], scratch: Path) -> bytes:
    """The same model with 8-bit convolutions and linear layers, ranges taken from `batches` of its input.

    Weights have a scale per output channel (as little loss as 8 bits allow), activations one per tensor. `scratch` is a
    folder for what lies on the disk meanwhile; it is emptied first and gone afterwards.
    """
    import onnx
    from onnxruntime import quantization

    proto = onnx.load_from_string(model)
    name = proto.graph.input[0].name
    initialisers = {tensor.name: tensor for tensor in proto.graph.initializer}
    # The matrix that turns rows round is no weight: rounding its product would blur one half of the batch alone.
    turns = [
        node.name
        for node in proto.graph.node
        if node.op_type == "MatMul"
        and node.input[1] in initialisers
        and list(initialisers[node.input[1]].dims) == [CROP_SIZE, CROP_SIZE]
    ]

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch}

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    before = tempfile.tempdir
    tempfile.tempdir = str(scratch)  # the quantiser's own, so that nothing is left elsewhere after a kill
    try:
        plain, prepared, quantised = (scratch / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(model)
        quantization.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=turns,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        return quantised.read_bytes()
    finally:
        tempfile.tempdir = before
        shutil.rmtree(scratch, ignore_errors=True)


def with_metadata(model: bytes, metadata: dict[str, str]) -> bytes:
    """The model with these texts as its metadata, beside those of other names that it had.

    What was measured on the model as it was (`MEASURED`) does not stay.
    """
    import onnx

    proto = onnx.load_from_string(model)
    others = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in MEASURED}
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, others | metadata)
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
    """How far `features` [N, D] are from `reference`: relative to its largest length, and as cosine and angle.

    A feature of zero, as of a black crop, has no angle.
    """
    lengths = np.linalg.norm(reference, axis=1)
    known = lengths > 0
    cosines = (normalise(reference[known]) * normalise(features[known])).sum(axis=1)
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
    embedder: Embedder  # the network in PyTorch, or a foreign ONNX model, fed as it wants
    sets: list[VerificationSet]

    def __post_init__(self) -> None:
        self.network = self.embedder.network
        self.results = [self.verify(self.embedder, pairs) for pairs in self.sets]
        figures = self.options.figures
        self.measured = None if figures is None else measured_entry(figures, self.embedder)
        calibration = self.options.calibration
        self.crops = _random_crops() if calibration is None else calibration_crops(calibration, CALIBRATION_CROPS)
        if "int8" in self.options.variants and len(self.crops) < self._calibration_batch:
            raise InputError(
                f"--calibration {calibration}: {len(self.crops)} crops, fewer than the {self._calibration_batch} that "
                "int8 takes its ranges from at a time"
            )
        self.reference = self.embedder.features(self.crops)
        # Before anything is exported: nothing could be said of how alike the files are.
        if not np.isfinite(self.reference).all() or not self.reference.any():
            raise InputError(f"{self.options.checkpoint}: gives features that are zero or not finite")

    def verify(self, embedder: Embedder, pairs: VerificationSet) -> VerificationResult:
        """The figures of a model on one set, with the rate that --far asks for and the usual ones."""
        levels = sorted({self.options.far, *FAR_LEVELS}, reverse=True)
        return verify(embedder, pairs, cache_dir=self.options.out / "cache", far_levels=levels)

    @property
    def outside(self) -> Preprocessing:
        """What is left to do before the graph."""
        way = RAW_PIXELS if self.options.normalise_inside else self.embedder.preprocessing
        return dataclasses.replace(way, mirror=self.embedder.preprocessing.mirror and not self.options.mirror_inside)

    def base(self) -> bytes:
        """The model without our metadata: the network in float32, or the foreign file as it is."""
        if self.network is None:
            import onnx

            with self._named("cannot be copied"):
                # With the weights that lie beside it, which loading has checked.
                return onnx.load(checkpoint_path(self.options.checkpoint)).SerializeToString()
        normalisation = self.embedder.preprocessing if self.options.normalise_inside else None
        return to_onnx(ExportedNetwork(self.network, normalisation, self.options.mirror_inside))

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """What onnx and its converters raise of a foreign file is a line that names it; of ours it is a bug."""
        try:
            yield
        except (InputError, OSError):
            raise
        except Exception as error:  # a dozen unrelated types
            if self.network is not None:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.options.checkpoint}: {what}: {reason}") from error

    @property
    def _calibration_batch(self) -> int:
        return getattr(self.embedder.model, "batch", None) or 16

    def variant(self, base: bytes, name: str) -> bytes:
        """`base` in the arithmetic of a variant."""
        with self._named(f"cannot be made {name}"):
            if name == "fp16":
                return pixels_first(to_fp16(base))
            if name == "int8":
                size = self._calibration_batch
                whole = range(0, len(self.crops) - size + 1, size)
                parts = (torch.from_numpy(self.crops[start : start + size]) for start in whole)
                batches = (np.ascontiguousarray(self.outside(part)) for part in parts)
                return pixels_first(to_int8(base, batches, self.options.out / ".scratch"))
        return base

    def write(self, model: bytes, name: str) -> dict[str, Any]:
        """Check a variant, measure it, write it with its metadata; returns its entry of export.json."""
        path = self.options.out / f"embedding-{name}.onnx"
        mirrors = self.options.mirror_inside or self.embedder.metadata.get("mirror") == "graph"
        metadata = self.outside.to_metadata(mirror_in_graph=mirrors)
        metadata |= {
            "source": utils.printable(self.embedder.name),
            "source_sha256": str(self.embedder.sha256),
            "variant": name,
        }
        metadata["insightface"] = fed_by_insightface(model, self.outside)
        with self._named(f"cannot be written as {path.name}"):
            content = with_metadata(model, metadata)
        exported = embedder_of_onnx(content, path.name)
        features = exported.features(self.crops)
        known = self.reference.any(axis=1)
        if not np.isfinite(features).all() or not features[known].any(axis=1).all():
            raise InputError(f"{path}: in {name} the network gives features that are zero or not finite; not written")
        found = differences(self.reference, features)
        if name == "fp32" and not found["max_relative_difference"] <= TOLERANCE:
            raise InputError(
                f"{path}: differs from its source by {found['max_relative_difference']:.1e}, more than {TOLERANCE}"
            )
        self._check_batches(exported)
        results = [self.verify(exported, pairs) for pairs in self.sets]
        if self.measured is not None and name == "fp32":  # what was measured is not of another arithmetic
            try:
                metadata |= metadata_of(self.measured, self.options.far)
            except (LookupError, TypeError, ValueError) as error:
                wrong = f"not as lfw_eval.py writes it ({error!r})"
                raise InputError(f"--figures {self.options.figures}: {wrong}") from error
        else:
            metadata |= self.figures(results)
        (self.options.out / "export.json").unlink(missing_ok=True)  # of an earlier run, so of other files
        utils.write_bytes(path, with_metadata(model, metadata))
        return {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": utils.sha256_of(path),
            "difference_to_pytorch": found,
            "verification": {stem: result.to_json() for stem, result in zip(stems(self.sets), results, strict=True)},
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
            if result.best_threshold is not None:
                return metadata_of(
                    {"name": result.set_name, "sha256": pairs.sha256} | result.to_json(), self.options.far
                )
        return {}


def metadata_of(entry: dict[str, Any], far: float) -> dict[str, str]:
    """Metadata from one set's entry of a results.json: all its figures, and the threshold at `far` if it has that."""
    keys = ("pairs", "accuracy_kfold_mean", "accuracy_best_threshold", "threshold_best", "auc", "eer", "angles")
    figures = {key: entry[key] for key in keys} | {"data": entry["name"], "data_sha256": entry["sha256"]}
    figures["tar_at_far"] = [point for point in entry["tar_at_far"] if point["resolved"]]
    texts = {"figures": json.dumps(figures)}
    for point in figures["tar_at_far"]:
        if math.isclose(point["far"], far, rel_tol=1e-6):
            threshold = {key: point[key] for key in ("far", "far_interval_95", "tar", "impostor_pairs")}
            threshold |= {"cosine": point["threshold"]["cosine"], "data": entry["name"]}
            texts["threshold"] = json.dumps(threshold)
    return texts


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
    exported = retinaface.engines.OnnxEngine(folded).run(list(photos))
    reference = retinaface.engines.TorchEngine(folded, torch.device("cpu")).run(list(photos))
    difference = float(np.abs(np.asarray(exported) - np.asarray(reference)).max())
    path = options.out / "detector.onnx"
    utils.write_bytes(path, model)
    return {"file": path.name, "sha256": utils.sha256_of(path), "max_difference_to_pytorch": difference}


def write_backbone(embedder: Embedder, out: Path) -> Path:
    """The weights as arcface_torch has them: a plain float32 state_dict under its key names, which are ours."""
    network = embedder.network
    if network is None:
        raise InputError(f"{embedder.name}: is ONNX; --layout insightface starts from weights of a network")
    name = name_of(network.state_dict())
    if name is None or NETWORKS[name].family not in ARCFACE_TORCH:
        raise InputError(
            f"{embedder.name}: holds {name or 'another network'}, which is none of InsightFace's networks (ir, "
            "mbf, vit) and has no weights for their key names; ONNX (--layout onnx) goes everywhere"
        )
    broken = not_finite(network.state_dict())
    if broken is not None:
        raise InputError(f"{embedder.name}: {broken} is not finite; the run that left it was broken")
    path = out / "backbone.pth"
    utils.save_tensors(path, {key: value.cpu().contiguous() for key, value in network.state_dict().items()})
    return path


def table(entries: dict[str, dict[str, Any]], reference: dict[str, VerificationResult]) -> str:
    """Size, difference to the source and accuracy of every variant, beside the source's own accuracy by set."""
    lines = [
        "",
        f"{'':10}{'size':>10}{'max difference':>16}{'max angle':>11}" + "".join(f"{name:>24}" for name in reference),
        f"{'source':10}{'':>10}{'':>16}{'':>11}" + "".join(f"{r.accuracy:>24.2%}" for r in reference.values()),
    ]
    for name, entry in entries.items():
        found = entry["difference_to_pytorch"]
        cells = []
        for stem, result in reference.items():
            figures = entry["verification"][stem]
            accuracy = figures["accuracy_kfold_mean"] or figures["accuracy_best_threshold"] or float("nan")
            cells.append(f"{f'{accuracy:.2%} ({100 * (accuracy - result.accuracy):+.2f})':>24}")
        size = f"{entry['bytes'] / 1e6:.1f} MB"
        lines.append(
            f"{name:10}{size:>10}{found['max_difference']:>16.1e}{found['max_angle']:>10.3f}°" + "".join(cells)
        )
    return "\n".join(lines)


def _advice(metadata: dict[str, str]) -> str:
    """What whoever uses a file has to know, in one line."""
    numbers = f"mean {metadata['mean']}, std {metadata['std']}"
    way = f"feed {metadata['channels'].upper()} 0..{metadata['pixel_range']}, {numbers}"
    mirror = {"caller": "add the mirror image's feature", "graph": "mirror image inside", "none": "no mirror image"}
    threshold = "no threshold"
    if "threshold" in metadata:
        known = json.loads(metadata["threshold"])
        threshold = f"threshold cosine {known['cosine']:.4f} at FAR {known['far']:g}"
    package = "the insightface package feeds it " + ("so" if metadata["insightface"] == "right" else "WRONGLY")
    return f"{way}; {mirror[metadata['mirror']]}; {threshold}; {package}"


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(config.Export, __doc__)
    if "int8" in options.variants and options.calibration is None:
        raise InputError("--variants int8 needs --calibration: crops (not those of the evaluation) to take ranges from")
    if options.figures is not None and (options.lfw or options.bin):
        raise InputError("--figures takes what was measured; --lfw and --bin measure: give one or the other")
    weights = options.layout == "insightface"
    useless = [
        (weights, "--layout insightface writes weights alone, as they are", OF_ONNX),
        (
            not (options.lfw or options.bin or options.figures),
            "the rate of a threshold, which only --lfw, --bin and --figures bring",
            ("far",),
        ),
        (options.lfw is None, "pairs of the photos in --lfw, which is not given", ("pairs",)),
        (not options.detector, "concerns --detector, which is not given", ("detector_weights",)),
        (True, "files are written in the arithmetic of --variants", ("precision",)),
    ]
    refuse_useless(options, useless)
    if options.mirror_inside and options.mirror is False:
        raise InputError("--mirror-inside and --no-mirror contradict each other")
    inside = options.for_ or options.normalise_inside or options.mirror_inside
    if options.for_ == "insightface":
        # The package adds no mirror image, so a threshold measured with one would not be that of what it computes.
        if options.mirror and not options.mirror_inside:
            raise InputError("--for insightface: the package adds no mirror image; give --mirror-inside, not --mirror")
        options = dataclasses.replace(options, normalise_inside=True, mirror=options.mirror_inside)
    for name in ("onnxscript", "torch.onnx", "onnx_ir", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    source = checkpoint_path(options.checkpoint)  # an address need not end like its file
    if inside and source.suffix.lower() == ".onnx":
        raise InputError(
            f"{options.checkpoint}: is ONNX; its graph is copied as it is, without --normalise-inside, --mirror-inside "
            "and --for, which start from a checkpoint"
        )
    embedder = open_embedder(options, "cpu")
    written = ["backbone.pth"] if weights else [f"embedding-{name}.onnx" for name in options.variants]
    for path in (options.out / name for name in written):
        if path.resolve() == source.resolve():
            raise InputError(f"--out {options.out}: {path} is what --checkpoint names, and would be overwritten")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.out.glob(".*.tmp"):  # of a run that was killed while it wrote
        path.unlink(missing_ok=True)
    shutil.rmtree(options.out / ".scratch", ignore_errors=True)
    if weights:
        print(f"{write_backbone(embedder, options.out)}: for InsightFace's get_model(...).load_state_dict(...)")
        return
    paths = ([options.lfw] if options.lfw else []) + options.bin
    device = utils.choose_device(options.device)  # for the faces; networks are exported, and compared, on the CPU
    sets = [open_set(path, options.out / "cache", pairs=options.pairs, device=device) for path in paths]
    exporter = Exporter(options, embedder, sets)
    base = exporter.base()
    entries = {name: exporter.write(exporter.variant(base, name), name) for name in dict.fromkeys(options.variants)}
    report: dict[str, Any] = {"model": embedder.describe(), "variants": entries, "environment": utils.environment()}
    if options.detector:
        report["detector"] = export_detector(options)
    utils.write_json(options.out / "export.json", report)
    print(f"{embedder.name}: fed with {embedder.feeding}")
    print(table(entries, dict(zip(stems(sets), exporter.results, strict=True))))
    for name, entry in entries.items():
        print(f"{name:10} {_advice(entry['metadata'])}")
    if options.detector:
        print(f"detector   max difference to PyTorch {report['detector']['max_difference_to_pytorch']:.1e}")
    print(f"\n{options.out / 'export.json'}; the models lie beside it")


if __name__ == "__main__":
    sys.exit(main())
