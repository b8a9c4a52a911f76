"""Any face model, one interface: 112x112 RGB crops in, features out.

A model is worth nothing without the way it wants to be fed. So everything that is done to a crop on its way into the
network (channel order, mean, standard deviation, range of the pixel values, whether the mirror image is added) is one
`Preprocessing`, stated by the file or by the caller, printed with every result and exchangeable. Nothing is guessed
silently: an ONNX model that says nothing about itself is refused until the caller says it.

Two kinds of files are read: weights of a network of `models.NETWORKS` (this repository's checkpoints, the released
layout, InsightFace's, AdaFace's; see networks/files.py), which say by their keys what they are and so how they are
fed, and ONNX models [N, 3, 112, 112] -> [N, D], with a free or a fixed batch. Files that hold code (whole pickled
modules) are refused.

What an ONNX file can say of itself, in its metadata (all values are texts; JSON where it says so):

    format       face-embedding-1; without it the metadata is somebody else's and left alone
    channels     rgb or bgr
    mean, std    JSON lists of three numbers, in the order of `channels`, in units of `pixel_range`; where the graph
                 itself normalises, this is what remains to be done outside: 0, 1 and a range of 255
    pixel_range  1 or 255: what white is before mean and std are applied
    mirror       caller (whoever calls adds the features of the mirror image), graph (the graph does) or none
    threshold    JSON {"cosine": x, ...}: from which cosine on two crops count as one person, and whatever is known of
                 it (far, far_interval_95, impostor_pairs, data); optional
    figures      JSON {...}: accuracy, thresholds at other rates and so on as measured at export; optional
    insightface  right or wrong: what the insightface package makes of the file, which decides by the names of the first
                 nodes how it feeds a model
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import config
import utils
from config import CROP_SIZE
from download import checkpoint_path
from models import MEAN, STD, feeding_of, name_of, network_from_state
from networks.adaface import AdaFaceIR
from networks.catalogue import RELEASED, Feeding
from networks.files import read_state
from utils import InputError

METADATA_FORMAT = "face-embedding-1"
# Crops per batch. Measured with `mfn` on two cores: onnxruntime is a tenth slower at 32 than at 16, PyTorch a tenth
# faster (utils.keep_freed_memory in force); 64 gain it another twentieth and take 250 MB more.
BATCH_ON_CPU, NETWORK_ON_CPU, BATCH_ON_GPU = 16, 32, 256
TOGETHER_ON_CPU = 8  # batches at a time at most: each needs memory for its layers

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a uint8 RGB crop becomes the input of a network: (pixel / 255 * pixel_range - mean) / std.

    `mean` and `std` are in the order of `channels` and in units of `pixel_range` (1 or 255). `mirror`: the feature is
    the sum of the features of the crop and of its mirror image. The defaults are those of the released network.

    Training, evaluation and exported graphs all normalise by what is here, so a crop is the same tensor, to the bit,
    in all of them. It is computed as one subtraction and one multiplication (see `constants`): no compiler can make
    that a fused multiply-add, which rounds once instead of twice, and graphs of other programs have the same form.
    """

    channels: str = "rgb"
    mean: Triple = MEAN
    std: Triple = STD
    pixel_range: float = 1.0
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise InputError(f"channels {self.channels!r} is neither rgb nor bgr")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(np.isfinite(values)):
                raise InputError(f"{name} {values} is not three finite numbers")
        if min(self.std) <= 0:
            raise InputError(f"std {self.std} has to be above zero")
        if self.pixel_range not in (1, 255):
            raise InputError(f"pixel range {self.pixel_range} is neither 1 nor 255")

    @classmethod
    def of(cls, feeding: Feeding) -> "Preprocessing":
        """That of a network, with the mirror image."""
        return cls(channels=feeding.channels, mean=feeding.mean, std=feeding.std)

    def constants(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale), float32 [3] in the order of `channels`: a value p of 0 to 255 becomes (p - shift) * scale."""
        return _constants(self.mean, self.std, self.pixel_range, torch.device(device))

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 RGB [N, H, W, 3] -> float32 [N, 3, H, W] on the same device, channels last in memory."""
        if self.channels == "bgr":
            crops = crops.flip(3)
        shift, scale = self.constants(crops.device)
        return ((crops - shift) * scale).permute(0, 3, 1, 2)

    def to_metadata(self, *, mirror_in_graph: bool = False) -> dict[str, str]:
        """The keys of the module's docstring that concern the input; `mirror_in_graph` for a graph that mirrors."""
        mirror = "graph" if mirror_in_graph else "caller" if self.mirror else "none"
        return {
            "format": METADATA_FORMAT,
            "channels": self.channels,
            "mean": json.dumps(list(self.mean)),
            "std": json.dumps(list(self.std)),
            "pixel_range": json.dumps(self.pixel_range),
            "mirror": mirror,
        }


@functools.cache  # copying them to a GPU for every batch would wait for it
def _constants(
    mean: Triple, std: Triple, pixel_range: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    shift = [value * 255 / pixel_range for value in mean]
    scale = [pixel_range / (255 * value) for value in std]
    with torch.inference_mode(False):  # training uses them, too
        return torch.tensor(shift, device=device), torch.tensor(scale, device=device)


class UnstatedError(InputError):
    """A model that does not say how it is to be fed, and nobody else does."""


class Model(Protocol):
    """What runs: `run` maps a normalised float32 batch [n, 3, 112, 112] to float32 features [n, D]."""

    device: torch.device

    def run(self, batch: torch.Tensor) -> torch.Tensor: ...


class Embedder:
    """A model together with the way it is fed.

    `name`: what it is called in reports. `sha256`: of the weight file (None for a network that came from memory);
    of the model file followed by its external data files where an ONNX model has such. `metadata`: what an ONNX file
    says of itself, JSON decoded, otherwise empty. `engine`: what computes it. `batch_size`: None takes
    `BATCH_ON_CPU` (networks of ours: `NETWORK_ON_CPU`) or `BATCH_ON_GPU`.
    """

    def __init__(
        self,
        model: Model,
        preprocessing: Preprocessing,
        *,
        name: str,
        sha256: str | None,
        engine: str,
        batch_size: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size is None:
            batch_size = BATCH_ON_CPU if model.device.type == "cpu" else BATCH_ON_GPU
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is below 1")
        self.model = model
        self.preprocessing = preprocessing
        self.name = name
        self.sha256 = sha256
        self.engine = engine
        self.batch_size = batch_size
        self.metadata = dict(metadata or {})
        self._dim: int | None = None

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        device: torch.device | str,
        *,
        preprocessing: Preprocessing | None = None,
        name: str = "network",
        sha256: str | None = None,
        batch_size: int | None = None,
        precision: str = "exact",
    ) -> "Embedder":
        """Embed with a network in memory, which may be in the middle of its training.

        The network is neither copied nor moved: `device` is where it is. While features are computed it is in
        evaluation mode; before `features` returns, each of its modules is back in the mode it was found in. Random
        number generators are not touched. `preprocessing`: None takes what the network says.
        `precision`: `exact` is float32, `bf16` rounds what goes into products, but for the last layers, to bfloat16.
        """
        model = _NetworkModel(network, torch.device(device), precision)
        preprocessing = preprocessing or Preprocessing.of(feeding_of(network))
        if batch_size is None and model.device.type == "cpu":
            batch_size = NETWORK_ON_CPU
        engine = f"pytorch {torch.__version__} {model.device.type}" + (" bf16" if precision == "bf16" else "")
        return cls(model, preprocessing, name=name, sha256=sha256, engine=engine, batch_size=batch_size)

    @property
    def network(self) -> nn.Module | None:
        """The network that computes; None for an ONNX model."""
        return getattr(self.model, "network", None)

    @property
    def dim(self) -> int:
        """Numbers in a feature. Asked for the first time before any features were computed, it costs one crop."""
        if self._dim is None:
            self._dim = self.features(np.zeros((1, CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)).shape[1]
        return self._dim

    @property
    def fingerprint(self) -> str | None:
        """A hash of all that decides the features: weights, preprocessing, engine with its version, and the code.

        None without a weight file. The code is this module and those that define the network's layers.
        """
        if self.sha256 is None:
            return None
        code = utils.code_sha256(__file__, *_sources(self.network))
        recipe = [self.sha256, self.engine, dataclasses.astuple(self.preprocessing), code]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def with_preprocessing(self, **changes: Any) -> "Embedder":
        """The same model, fed differently: `channels`, `mean`, `std`, `pixel_range` or `mirror` replaced."""
        other = copy.copy(self)
        other.preprocessing = dataclasses.replace(self.preprocessing, **changes)
        return other

    def features(self, crops: np.ndarray) -> np.ndarray:
        """uint8 RGB crops [N, 112, 112, 3] -> float32 features [N, D], not normalised, mirror image included.

        Values are passed on as the model gives them, NaN included: whoever knows the names of the crops reports them.
        """
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
            raise ValueError(f"crops are {crops.dtype} {crops.shape}, not uint8 [N, {CROP_SIZE}, {CROP_SIZE}, 3]")
        if len(crops) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        starts = range(0, len(crops), self.batch_size)
        with self._evaluating(), self._at_a_time(len(starts)) as ordered_map:
            rows = list(ordered_map(lambda start: self._batch(crops[start : start + self.batch_size]), starts))
        features = np.concatenate(rows)
        self._dim = features.shape[1]
        return features

    @contextlib.contextmanager
    def _at_a_time(self, batches: int) -> Iterator[Callable[..., Iterator[np.ndarray]]]:
        """A `map` over batches: several at a time for a network on a CPU, otherwise one after the other.

        Threads that share a layer wait for each other at its end. Measured with `mfn` on two cores: a thread a batch
        is up to a quarter faster in float32 and a third in bfloat16. An ONNX engine has threads of its own.
        """
        on_cpu, threads = self.network is not None and self.model.device.type == "cpu", torch.get_num_threads()
        count = _together(batches, threads) if on_cpu else 1
        if count == 1:
            yield map
            return
        with utils.computing_threads(count, threads // count) as pool:
            yield pool.map

    def _batch(self, crops: np.ndarray) -> np.ndarray:
        batch = self.preprocessing(torch.from_numpy(np.ascontiguousarray(crops)).to(self.model.device))
        feature = self.model.run(batch)
        if self.preprocessing.mirror:
            feature = feature + self.model.run(batch.flip(3))
        return feature.cpu().numpy()

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        network = self.network
        return contextlib.nullcontext() if network is None else _evaluation_mode(network, self.model.device)

    @property
    def feeding(self) -> str:
        """How the model is fed, in words for people: what a threshold or an accuracy holds for."""
        way = self.preprocessing
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (way.mean, way.std))
        mirror = "with mirror image" if way.mirror else "without mirror image"
        if not way.mirror and not self.metadata and "onnx" in self.engine:
            mirror += " (the file says nothing of itself; --mirror adds it)"
        if self.metadata.get("mirror") == "graph":
            mirror = "mirror image inside the graph"
        return f"{way.channels} 0..{way.pixel_range:g}, mean {mean}, std {std}, {mirror}"

    @property
    def as_stated(self) -> bool:
        """Is it fed as its metadata says? Only then does the threshold there hold. Options can change no more than the
        mirror image."""
        stated = self.metadata.get("mirror")
        return stated in (None, "graph") or self.preprocessing.mirror == (stated == "caller")

    def describe(self) -> dict[str, Any]:
        """What a report has to say about the model, ready for JSON."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "engine": self.engine,
            "device": str(self.model.device),
            "dim": self.dim,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "metadata": self.metadata,
        }


def _together(batches: int, threads: int) -> int:
    """How many batches at a time: as many as leave no thread idle, neither beside them nor while the last ones run."""
    counts = range(1, min(threads, TOGETHER_ON_CPU) + 1)
    return max(count for count in counts if threads % count == 0 and -(-batches // count) * count <= 1.05 * batches)


def _sources(network: nn.Module | None) -> list[str]:
    """The files that define a network's layers, but for PyTorch's own, and those beside them in their packages."""
    kinds = {type(module) for module in network.modules()} if network is not None else set()
    files = {Path(inspect.getfile(kind)) for kind in kinds if not kind.__module__.startswith("torch.")}
    for folder in {path.parent for path in files}:
        if (folder / "__init__.py").is_file():
            files |= set(folder.glob("*.py"))
    return sorted(map(str, files))


def normalise(features: np.ndarray) -> np.ndarray:
    """Features [N, D] -> embeddings [N, D] float64 of length 1. A zero or non-finite feature gives a row of NaN."""
    features = features.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Dividing by the largest value first keeps the squares of float32's whole range finite.
        features = features / np.abs(features).max(axis=1, keepdims=True, initial=0)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


def load_embedder(
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    channels: str | None = None,
    pixel_range: float | None = None,
    mirror: bool | None = None,
    batch_size: int | None = None,
    precision: str = "exact",
) -> Embedder:
    """Load weights of a network of `models.NETWORKS`, whatever program wrote them, or an ONNX model.

    `checkpoint` is a file, an address, or `released` for the published network (see download.py).

    What is None is taken from the file: from the metadata of an ONNX model, else from the network that it holds. A
    value given replaces the defaults of the released family, which is trained with any; one that contradicts what an
    ONNX model says of itself, or how a public layout of InsightFace or AdaFace is fed, is refused, as is an ONNX model
    without metadata as long as `mean` and `std` are not given (`channels` is then rgb if not given). Where
    `pixel_range` is not given with `mean` and `std`, a mean or a standard deviation above 1 tells that they are meant
    for pixels up to 255.

    Raises InputError, naming the file, for anything that cannot be used.
    """
    path = checkpoint_path(checkpoint)
    given: dict[str, Any] = {
        "channels": channels,
        "mean": mean,
        "std": std,
        "pixel_range": pixel_range,
        "mirror": mirror,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("mean", "std"):
        if key in given:
            given[key] = tuple(float(value) for value in given[key])
    if path.suffix.lower() == ".onnx":
        if precision != "exact":
            raise InputError(f"--precision {precision}: {path} computes as its file says; leave the option out")
        with _unchanged(path):
            return _load_onnx(path, torch.device(device), given, batch_size)
    with _unchanged(path):
        network, prefix = _read_network(path)
        sha256 = utils.sha256_of(path)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    preprocessing = _fed(path, network, prefix, given)
    return Embedder.from_network(
        network,
        device,
        preprocessing=preprocessing,
        name=path.name,
        sha256=sha256,
        batch_size=batch_size,
        precision=precision,
    )


@contextlib.contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """Raise InputError if another file takes the place of `path` meanwhile, as a training's next one does.

    Else the features of one would be kept and reported under the hash of the other.
    """
    before = _stamp(path)
    yield
    if _stamp(path) != before:
        raise InputError(f"{path}: was replaced while it was read; run the same command again")


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ValueError):  # said by whoever opens it
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def open_embedder(options: config.Model, device: torch.device | str = "cpu") -> Embedder:
    """The model that a script's options describe, fed as they say; see `load_embedder`."""
    return open_checkpoint(options.checkpoint, options, device)


def open_checkpoint(checkpoint: str | Path, options: config.Feeding, device: torch.device | str = "cpu") -> Embedder:
    """A model fed as a script's options say; see `load_embedder`."""
    if options.precision == "bf16" and utils.emulates_bfloat16(torch.device(device)):
        print("warning: --precision bf16: this processor has no bfloat16 of its own; exact is faster", file=sys.stderr)
    return load_embedder(
        checkpoint,
        device,
        mean=triple("mean", options.mean),
        std=triple("std", options.std),
        channels=options.channels,
        pixel_range=options.pixel_range,
        mirror=options.mirror,
        batch_size=options.batch_size,
        precision=options.precision,
    )


def triple(name: str, values: list[float] | None) -> Triple | None:
    """The numbers of an option `--name`, one for all channels or three; None stays None."""
    if values is None:
        return None
    if len(values) not in (1, 3):
        raise InputError(f"--{name}: one number for all channels or three, not {len(values)}")
    return (values[0], values[0], values[0]) if len(values) == 1 else (values[0], values[1], values[2])


def _with_pixel_range(given: dict[str, Any]) -> dict[str, Any]:
    if "pixel_range" in given or not ("mean" in given and "std" in given):
        return given
    return given | {"pixel_range": 255.0 if max(*given["mean"], *given["std"]) > 1 else 1.0}


# --- this repository's networks -------------------------------------------------------------------------------------


class _NetworkModel:
    def __init__(self, network: nn.Module, device: torch.device, precision: str = "exact") -> None:
        self.network = network
        self.device = device
        self.precision = precision
        if device.type == "cpu":
            utils.keep_freed_memory()

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        # A caller's autocast would halve the precision of what is being measured.
        low = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16 if low else None, enabled=low):
            return self.network(batch).float()


@contextlib.contextmanager
def _evaluation_mode(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode for the whole network, in true float32; afterwards each module is in its own earlier mode again.

    Not `network.train(before)`: that would wake modules that their owner has frozen.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with utils.true_float32(device):
            yield
    finally:
        for module, training in modes:
            module.training = training


def load_network(path: Path) -> nn.Module:
    """The network in a file of weights, on the CPU in evaluation mode. Raises InputError, naming the file."""
    return _read_network(path)[0]


def _read_network(path: Path) -> tuple[nn.Module, str]:
    """The same, and the prefixes that its keys have in the file."""
    state, prefix = read_state(path)
    try:
        return network_from_state(state), prefix
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _fed(path: Path, network: nn.Module, prefix: str, given: dict[str, Any]) -> Preprocessing:
    """Preprocessing of a network as it says; options may repeat that, and replace it in the released family only.

    CVLface writes AdaFace's networks under `net.` (its models/iresnet). They take RGB or BGR as `color_space` in a file
    beside the weights says, so only the user can tell.
    """
    feeding = feeding_of(network)
    if isinstance(network, AdaFaceIR) and "net." in prefix:
        if "channels" not in given:
            raise InputError(
                f"{path}: holds {name_of(network.state_dict())} as CVLface writes it; give --channels rgb or bgr, as "
                "color_space in the config.yaml beside it says"
            )
        feeding = dataclasses.replace(feeding, channels=given["channels"])
    if feeding == RELEASED:
        return dataclasses.replace(Preprocessing(), **_with_pixel_range(given))
    numbers = [*given.get("mean", ()), *given.get("std", ())]
    scale = given.get("pixel_range", 255.0 if max(numbers, default=0) > 1 else 1.0)
    stated = {"mean": np.multiply(feeding.mean, scale), "std": np.multiply(feeding.std, scale)}
    agrees = all(np.allclose(given.get(key, value), value, rtol=1e-3) for key, value in stated.items())
    agrees &= given.get("pixel_range", 1.0) == 1.0 or ("mean" in given and "std" in given)
    if not agrees or given.get("channels", feeding.channels) != feeding.channels:
        raise InputError(
            f"{path}: holds {name_of(network.state_dict())}, which is fed with channels {feeding.channels}, mean "
            f"{feeding.mean}, std {feeding.std} of pixels from 0 to 1; leave out the options that say otherwise"
        )
    return dataclasses.replace(Preprocessing.of(feeding), mirror=given.get("mirror", True))


# --- ONNX -----------------------------------------------------------------------------------------------------------

LARGEST_ONNX = 1 << 31  # bytes; protobuf's limit
LARGEST_BATCH = 1024  # crops of a fixed batch, which is filled up whatever there is to compute
_ONNX_INPUTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Not whole numbers, which are classes or need a scale that nobody states.
_ONNX_OUTPUTS = (*_ONNX_INPUTS, "tensor(double)")


class OnnxModel:
    """An onnxruntime session. A fixed batch is filled up with zeros; its surplus rows are dropped."""

    def __init__(self, path: Path, device: torch.device, content: bytes | None = None) -> None:
        """Of a file, or of a file's `content` before there is one."""
        import onnxruntime  # 0.3 s that nobody but the users of .onnx files should pay

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait would keep others from working (see passive_threads.py).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only: warnings about unused initialisers say nothing to a user
        cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        providers: list[Any] = ["CPUExecutionProvider"]
        if cuda:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            self.session = onnxruntime.InferenceSession(content or str(path), options, providers=providers)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise InputError(f"{path}: onnxruntime cannot load it: {_first_line(error)}") from error
        self.engine = f"onnxruntime {onnxruntime.__version__} {self.session.get_providers()[0]}"
        # Batches are handed over in main memory, whatever the provider does with them.
        self.device = torch.device("cpu")
        self.input_name, self.dtype, self.batch = self._check_input()
        self.output_name = self._check_output()

    def _check_input(self) -> tuple[str, type, int | None]:
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise InputError(f"{self.path}: has {len(inputs)} inputs ({names}), not one batch of crops")
        shape, kind = inputs[0].shape, inputs[0].type
        wanted = (3, CROP_SIZE, CROP_SIZE)
        fits = len(shape) == 4 and all(
            not isinstance(found, int) or found == size for found, size in zip(shape[1:], wanted, strict=True)
        )
        if not fits:
            raise InputError(f"{self.path}: its input is {shape}, not [N, 3, {CROP_SIZE}, {CROP_SIZE}]")
        if kind not in _ONNX_INPUTS:
            raise InputError(f"{self.path}: its input is {kind}, not one of {', '.join(_ONNX_INPUTS)}")
        batch = shape[0] if isinstance(shape[0], int) else None
        if batch is not None and batch > LARGEST_BATCH:
            raise InputError(f"{self.path}: its batch is fixed at {batch:,} crops; at most {LARGEST_BATCH:,} are fed")
        return inputs[0].name, _ONNX_INPUTS[kind], batch

    def _check_output(self) -> str:
        outputs = self.session.get_outputs()
        matrices = [entry for entry in outputs if len(entry.shape) == 2]
        if len(matrices) != 1:
            found = ", ".join(f"{entry.name} {entry.shape}" for entry in outputs)
            raise InputError(f"{self.path}: needs exactly one output [N, D]; it has {found}")
        if matrices[0].type not in _ONNX_OUTPUTS:
            raise InputError(f"{self.path}: its output is {matrices[0].type}, not one of {', '.join(_ONNX_OUTPUTS)}")
        return matrices[0].name

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        array: np.ndarray = np.ascontiguousarray(batch.numpy(), dtype=self.dtype)
        size = self.batch or len(array)
        rows = [self._run_batch(array[start : start + size], size) for start in range(0, len(array), size)]
        return torch.from_numpy(np.concatenate(rows))

    def _run_batch(self, array: np.ndarray, size: int) -> np.ndarray:
        count = len(array)
        if count < size:
            array = np.concatenate([array, np.zeros((size - count, *array.shape[1:]), dtype=array.dtype)])
        try:
            (features,) = self.session.run([self.output_name], {self.input_name: array})
        except Exception as error:  # as above
            raise InputError(f"{self.path}: onnxruntime cannot run it: {_first_line(error)}") from error
        if features.ndim != 2 or features.shape[0] != size or features.shape[1] == 0:  # whatever it declared
            raise InputError(f"{self.path}: gives {list(features.shape)} for {size} crops, not [{size}, D]")
        return features[:count].astype(np.float32)


def _load_onnx(path: Path, device: torch.device, given: dict[str, Any], batch_size: int | None) -> Embedder:
    sha256 = _check_onnx(path)
    return _onnx_embedder(path, OnnxModel(path, device), sha256, given, batch_size)


def embedder_of_onnx(content: bytes, name: str) -> Embedder:
    """The model that an ONNX file `name` with this content will be, on the CPU; the content says how it is fed."""
    model = OnnxModel(Path(name), torch.device("cpu"), content)
    return _onnx_embedder(Path(name), model, hashlib.sha256(content).hexdigest(), {}, None)


def _onnx_embedder(
    path: Path, model: OnnxModel, sha256: str, given: dict[str, Any], batch_size: int | None
) -> Embedder:
    texts = model.session.get_modelmeta().custom_metadata_map
    metadata = _read_metadata(path, texts) if texts.get("format") == METADATA_FORMAT else {}
    preprocessing = _stated(path, metadata, given) if metadata else _unstated(path, given)
    return Embedder(
        model,
        preprocessing,
        name=path.name,
        sha256=sha256,
        engine=model.engine,
        batch_size=batch_size,
        metadata=metadata,
    )


def _read_metadata(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """Metadata with its JSON decoded and checked; keys that are none of ours stay texts."""
    metadata: dict[str, Any] = dict(sorted(texts.items()))
    for key in sorted(_JSON_KEYS & texts.keys()):
        try:
            metadata[key] = utils.parse_json(texts[key], parse_constant=_refuse_constant)
        except ValueError as error:
            raise InputError(f"{path}: its metadata has no JSON under {key!r}: {error}") from error
    for key, check in _CHECKS.items():
        if key not in metadata:
            raise InputError(f"{path}: its metadata lacks {key!r}")
        if not check(metadata[key]):
            raise InputError(f"{path}: its metadata has {key!r} {texts[key]}, which is not understood")
    threshold = metadata.get("threshold", {"cosine": 0})
    if not isinstance(threshold, dict) or not _is_number(threshold.get("cosine")):
        raise InputError(f"{path}: its metadata has a threshold without a cosine: {texts['threshold']}")
    return metadata


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


_JSON_KEYS = {"mean", "std", "pixel_range", "threshold", "figures"}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "channels": lambda value: value in ("rgb", "bgr"),
    "mean": _is_triple,
    "std": lambda value: _is_triple(value) and min(value) > 0,
    "pixel_range": lambda value: value in (1, 255),
    "mirror": lambda value: value in ("caller", "graph", "none"),
}


def _stated(path: Path, metadata: dict[str, Any], given: dict[str, Any]) -> Preprocessing:
    """Preprocessing of a model that describes itself; options may repeat what it says, not contradict it."""
    stated = {
        "channels": metadata["channels"],
        "mean": tuple(metadata["mean"]),
        "std": tuple(metadata["std"]),
        "pixel_range": float(metadata["pixel_range"]),
    }
    for key, value in stated.items():
        if key in given and given[key] != value:
            raise InputError(f"{path}: its metadata says {key} {value}, the option says {given[key]}; leave it out")
    if metadata["mirror"] == "graph" and given.get("mirror") is False:
        raise InputError(f"{path}: adds the mirror image inside its graph; it cannot be had without")
    mirror = metadata["mirror"] == "caller"
    if metadata["mirror"] != "graph":
        mirror = given.get("mirror", mirror)
    return Preprocessing(**stated, mirror=mirror)


def _unstated(path: Path, given: dict[str, Any]) -> Preprocessing:
    missing = [f"--{key}" for key in ("mean", "std") if key not in given]
    if missing:
        raise UnstatedError(
            f"{path}: does not say how it is to be fed; give {' and '.join(missing)} (models of InsightFace: "
            "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --channels rgb)"
        )
    # Whoever uses such a model elsewhere adds no mirror image, and a threshold measured with one would not fit.
    return dataclasses.replace(Preprocessing(mirror=False), **_with_pixel_range(given))


def _check_onnx(path: Path) -> str:
    """SHA-256 of an ONNX file, followed by the files beside it that hold its weights, in the order of their names.

    Looked at before anything is loaded: such a file can name any other, and a runtime would read it. Raises InputError
    for weights that lie elsewhere, are no plain files, or end before they should.
    """
    import onnx

    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.stat().st_size > LARGEST_ONNX:
        raise InputError(f"{path}: {path.stat().st_size / 1e9:.1f} GB; an ONNX file has at most 2 GiB")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise InputError(f"{path}: not an ONNX model: {_first_line(error)}") from error
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        numbers = entries.get("offset", "0"), entries.get("length", "0")
        if not all(number.isascii() and number.isdecimal() and len(number) < 20 for number in numbers):
            raise InputError(f"{path}: the place of its weights in {name!r} is not understood")
        ends[name] = max(ends.get(name, 0), sum(map(int, numbers)))
    parts = [_external_file(path, name, end) for name, end in sorted(ends.items())]
    if not parts:
        return utils.sha256_of(path)
    digest = hashlib.sha256()
    for part in (path, *parts):
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _external_file(path: Path, name: str, end: int) -> Path:
    """A file of weights beside an ONNX file, at least `end` bytes long."""
    folder = path.parent.resolve()
    part = path.parent / name
    try:
        inside = bool(name) and not Path(name).is_absolute() and part.resolve(strict=True).is_relative_to(folder)
    except FileNotFoundError:
        inside = part.resolve().is_relative_to(folder)
    except (OSError, ValueError):  # a name that no file can have
        inside = False
    if not inside:
        raise InputError(f"{path}: wants weights from {name!r}, which is not in the model's own folder; refused")
    if not part.is_file():
        what = "is not a plain file" if part.exists() else "is not there"
        raise InputError(f"{path}: its weights are said to be in {name!r} beside it, which {what}")
    if part.stat().st_size < end:
        raise InputError(f"{part}: cut off: {part.stat().st_size:,} bytes, {path.name} needs {end:,}")
    return part


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors anywhere inside an ONNX model: weights, constants, those of inner graphs and functions."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else (value,):
                yield from _tensors(item)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
