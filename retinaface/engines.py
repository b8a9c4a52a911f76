"""What runs the network: onnxruntime on a CPU, PyTorch on everything else.

On a CPU the folded network runs in onnxruntime on one core per batch, batches side by side on as many threads as
PyTorch would use. `benchmarks/detect.py` measures the alternatives; what decides besides speed is that a photo's result
then depends on nothing but the photo: not on the batch, not on the number of threads, to the last bit. The price is
that a single photo never uses more than one core unless it is large enough to be cut (`retinaface.tiles`).

On a GPU photos go through PyTorch in batches, channels last, float32 without TF32 (whose 10 bits of mantissa move
landmarks by tenths of a pixel). There results may differ in the last bits with the size of the batch. A GPU that gets
photos of many sizes one by one waits for kernels to be started, and plans each convolution anew for each size. So sizes
that few photos have are padded to multiples of `PADDED_TO` and share batches. After each layer everything beyond a
photo's own border is set to zero, which is what the next layer's padding would have been: the answers are those of the
photo alone, to rounding. The price is one more pass over each map, and the padding.
"""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retinaface.decoding import Cells
from retinaface.network import MEAN_BGR, STRIDE, STRIDES, Weights, forward, fuse_heads
from utils import true_float32

R = TypeVar("R")
T = TypeVar("T")
Size: TypeAlias = tuple[int, int]

PIXELS_UNDER_WAY = 32_000_000
"""How many pixels may be in the network at a time; the network needs about 75 bytes of memory for each."""

CPU_BATCH_PIXELS = 500_000
"""The largest batch on a CPU: eight photos of LFW. Larger ones would fall out of the caches."""

PADDED_TO = 128
"""Sides that photos of unusual sizes are padded to are multiples of this; a multiple of the coarsest stride."""

USUAL = 16
"""So many photos of one size on a GPU are batches of their own, without padding."""

_LANES = 16


class Engine(ABC):
    """Runs the network on photos of any sizes; one instance may be used by several threads at a time."""

    def __init__(self, batch_pixels: int, threads: int) -> None:
        self._batch_pixels = batch_pixels
        self._workers = _Workers(threads)
        self._budget = _Budget(PIXELS_UNDER_WAY)

    @abstractmethod
    def run(self, photos: Sequence[np.ndarray]) -> Cells:
        """`network.forward` of some photos of one size, uint8 BGR [height, width, 3] each: [N, 32, cells]."""

    def map(
        self, sizes: Sequence[Size], load: Callable[[int], np.ndarray], finish: Callable[[Cells, Size], list[R]]
    ) -> list[R]:
        """`finish` of what the network says about each photo, in order.

        `load(i)` gives photo i, of the (height, width) `sizes[i]`; it is called when the photo's turn has come.
        `finish(cells, size)` takes the answers for some photos of one size, [N, 32, cells], and gives one R for each.
        """

        def work(batch: list[int]) -> list[R]:
            height, width = (max(sizes[index][axis] for index in batch) for axis in (0, 1))
            with self._budget.take(len(batch) * height * width):
                return self._answers([load(index) for index in batch], finish)

        batches = self._batches(sizes)
        answers: dict[int, R] = {}
        for batch, found in zip(batches, self._workers.map(work, batches), strict=True):
            answers |= zip(batch, found, strict=True)
        return [answers[index] for index in range(len(sizes))]

    def _answers(self, batch: list[np.ndarray], finish: Callable[[Cells, Size], list[R]]) -> list[R]:
        height, width = batch[0].shape[:2]
        return finish(self.run(batch), (height, width))

    def _groups(self, sizes: Sequence[Size]) -> dict[Size, list[int]]:
        """Numbers of photos that can share a batch, and the size that they have there: those of equal sizes."""
        groups: dict[Size, list[int]] = defaultdict(list)
        for index, size in enumerate(sizes):
            groups[size].append(index)
        return groups

    def _batches(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Numbers of photos that go through the network together, in enough batches to occupy all threads."""
        batches = []
        for (height, width), members in self._groups(sizes).items():
            share = math.ceil(len(members) / self._workers.count)
            count = max(1, min(share, self._batch_pixels // (height * width)))
            batches += [members[start : start + count] for start in range(0, len(members), count)]
        return batches


class OnnxEngine(Engine):
    """The network in onnxruntime, for a CPU."""

    def __init__(self, weights: Weights) -> None:
        import onnxruntime

        super().__init__(CPU_BATCH_PIXELS, torch.get_num_threads())
        self._session = _session(onnx_model(weights))
        self._give_back = onnxruntime.RunOptions()
        self._give_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, photos: Sequence[np.ndarray]) -> np.ndarray:
        height, width = photos[0].shape[:2]
        batch = np.empty((len(photos), 3, height, width), dtype=np.float32)
        for photo, planes in zip(photos, batch, strict=True):
            for channel, mean, plane in zip(cv2.split(photo), MEAN_BGR, planes, strict=True):
                np.subtract(channel, np.float32(mean), out=plane, dtype=np.float32)
        # Memory is kept for the next batch, but not what only a large photo needs.
        options = self._give_back if len(photos) * height * width > 2 * CPU_BATCH_PIXELS else None
        return self._session.run(None, {"image": batch}, options)[0]


def onnx_model(weights: Weights) -> bytes:
    """The folded network as an ONNX model: `image` float32 [count, 3, height, width] -> [count, 32, cells].

    `image` is BGR minus `MEAN_BGR`; the answer is that of `network.forward`, before decoding. All sizes are free.
    """
    return _Graph(_widen(fuse_heads(weights))).serialise()


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _widen(weights: Weights) -> Weights:
    """The same network with its 8-channel layers filled up with zeros to the 16 lanes that the CPU kernels work in.

    The kernels would compute 16 lanes anyway, but cut the result back to 8 between the layers.
    """
    weights = dict(weights)
    for name in ("body.stage1.0.0", "body.stage1.1.0"):
        weight, bias = weights[name]
        more = _LANES - len(bias)
        weights[name] = (np.pad(weight, ((0, more), (0, 0), (0, 0), (0, 0))), np.pad(bias, (0, more)))
    weight, bias = weights["body.stage1.1.3"]
    weights["body.stage1.1.3"] = (np.pad(weight, ((0, 0), (0, _LANES - weight.shape[1]), (0, 0), (0, 0))), bias)
    return weights


class _Graph:
    """The network as an ONNX model."""

    def __init__(self, weights: Weights) -> None:
        from onnx import TensorProto, helper, numpy_helper  # half a second that a GPU need not spend

        self._helper, self._from_array, self._float = helper, numpy_helper.from_array, TensorProto.FLOAT
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {
            "twice": np.array([1, 1, 2, 2], np.float32),
            "origin": np.array([0, 0], np.int64),
            "plane": np.array([2, 3], np.int64),
            "flat": np.array([0, 0, -1], np.int64),
        }

    def serialise(self) -> bytes:
        output = forward(self, "image")
        graph = self._helper.make_graph(
            self._nodes,
            "RetinaFace",
            [self._helper.make_tensor_value_info("image", self._float, ["count", 3, "height", "width"])],
            [self._helper.make_tensor_value_info(output, self._float, ["count", 32, "cells"])],
            [self._from_array(array, name) for name, array in self._constants.items()],
        )
        # Opset 17 and IR 8 are what every onnxruntime that the requirements allow can read.
        model = self._helper.make_model(graph, opset_imports=[self._helper.make_opsetid("", 17)], ir_version=8)
        return model.SerializeToString()

    def _add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{operator}{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolve(self, name: str, x: str, slope: float | None = None) -> str:
        weight, bias = self._weights[name]
        size = weight.shape[2]
        self._constants |= {f"{name}.weight": weight, f"{name}.bias": bias}
        x = self._add(
            "Conv",
            [x, f"{name}.weight", f"{name}.bias"],
            kernel_shape=[size, size],
            strides=[STRIDE[name]] * 2,
            pads=[size // 2] * 4,
            group=len(weight) if weight.shape[1] == 1 else 1,
        )
        if slope is None:
            return x
        return self._add("LeakyRelu", [x], alpha=slope) if slope else self._add("Relu", [x])

    def add_upsampled(self, x: str, coarse: str) -> str:
        # A map is half of the next finer one, rounded up, so nearest neighbour is doubling and cutting the excess off.
        doubled = self._add(
            "Resize",
            [coarse, "", "twice"],
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )
        size = self._add("Shape", [x], start=2, end=4)
        return self._add("Add", [x, self._add("Slice", [doubled, "origin", size, "plane"])])

    def concatenate(self, parts: list[str]) -> str:
        return self._add("Concat", parts, axis=1)

    def join_cells(self, maps: list[str]) -> str:
        return self._add("Concat", [self._add("Reshape", [level, "flat"]) for level in maps], axis=2)


class TorchEngine(Engine):
    """The network in PyTorch, for a GPU (it runs on a CPU too)."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        super().__init__(PIXELS_UNDER_WAY, threads=1)
        self.device = device
        self._mean = torch.tensor(MEAN_BGR, device=device, dtype=torch.float32)
        self._weights = {
            name: (
                torch.tensor(weight, device=device).contiguous(memory_format=torch.channels_last),
                torch.tensor(bias, device=device),
            )
            for name, (weight, bias) in fuse_heads(weights).items()
        }

    @torch.inference_mode()
    def run(self, photos: Sequence[np.ndarray]) -> Tensor:
        with true_float32(self.device):
            return forward(self, self._input(np.stack(photos)))

    @torch.inference_mode()
    def run_padded(self, photos: Sequence[np.ndarray]) -> list[Tensor]:
        """`run` for photos of any sizes in one batch: [32, cells] for each."""
        sizes = [photo.shape[:2] for photo in photos]
        height, width = (max(_padded(size)[axis] for size in sizes) for axis in (0, 1))
        batch = np.zeros((len(photos), height, width, 3), np.uint8)
        for place, photo in zip(batch, photos, strict=True):
            place[: photo.shape[0], : photo.shape[1]] = photo
        masked = _Masked(self, sizes, (height, width))
        with true_float32(self.device):
            cells = forward(masked, masked.cut(self._input(batch)))
        levels = cells.split([-(-height // stride) * -(-width // stride) for stride in STRIDES], dim=2)
        maps = [level.unflatten(2, (-(-height // stride), -1)) for level, stride in zip(levels, STRIDES, strict=True)]
        return [
            torch.cat(
                [
                    level[index, :, : -(-rows // stride), : -(-columns // stride)].flatten(1)
                    for level, stride in zip(maps, STRIDES, strict=True)
                ],
                dim=1,
            )
            for index, (rows, columns) in enumerate(sizes)
        ]

    def _input(self, photos: np.ndarray) -> Tensor:
        return torch.from_numpy(photos).to(self.device).float().sub_(self._mean).permute(0, 3, 1, 2)

    def _groups(self, sizes: Sequence[Size]) -> dict[Size, list[int]]:
        groups: dict[Size, list[int]] = defaultdict(list)
        for size, members in super()._groups(sizes).items():
            groups[size if len(members) >= USUAL else _padded(size)] += members
        return groups

    def _answers(self, batch: list[np.ndarray], finish: Callable[[Cells, Size], list[R]]) -> list[R]:
        sizes = [(photo.shape[0], photo.shape[1]) for photo in batch]
        if len(set(sizes)) == 1 and (len(batch) >= USUAL or sizes[0] == _padded(sizes[0])):
            return super()._answers(batch, finish)
        cells = self.run_padded(batch)
        answers: dict[int, R] = {}
        for size, members in super()._groups(sizes).items():
            answers |= zip(members, finish(torch.stack([cells[index] for index in members]), size), strict=True)
        return [answers[index] for index in range(len(batch))]

    def convolve(self, name: str, x: Tensor, slope: float | None = None) -> Tensor:
        weight, bias = self._weights[name]
        groups = len(weight) if weight.shape[1] == 1 else 1
        x = functional.conv2d(x, weight, bias, STRIDE[name], weight.shape[2] // 2, groups=groups)
        return x if slope is None else functional.leaky_relu_(x, slope)

    def add_upsampled(self, x: Tensor, coarse: Tensor) -> Tensor:
        return x + functional.interpolate(coarse, size=x.shape[2:], mode="nearest")

    def concatenate(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    def join_cells(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([level.flatten(2) for level in maps], dim=2)


def _padded(size: Size) -> Size:
    height, width = (-(-side // PADDED_TO) * PADDED_TO for side in size)
    return height, width


class _Masked:
    """The network on photos that are padded below and to the right, as if nothing lay there (`network.Operations`)."""

    def __init__(self, engine: TorchEngine, sizes: Sequence[Size], padded: Size) -> None:
        self._engine = engine
        self._masks: dict[Size, Tensor] = {}  # by the size of a map: [N, 1, height, width], 1 inside, 0 outside
        heights, widths = torch.tensor(sizes, device=engine.device).T
        for stride in (1 << level for level in range(STRIDES[-1].bit_length())):
            height, width = padded[0] // stride, padded[1] // stride
            inside = [
                torch.arange(0, side * stride, stride, device=engine.device) < ends[:, None]
                for side, ends in ((height, heights), (width, widths))
            ]
            self._masks[height, width] = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()

    def cut(self, x: Tensor) -> Tensor:
        """Zeros outside of each photo, in place."""
        height, width = x.shape[2:]
        return x.mul_(self._masks[height, width])

    def convolve(self, name: str, x: Tensor, slope: float | None = None) -> Tensor:
        return self.cut(self._engine.convolve(name, x, slope))

    def add_upsampled(self, x: Tensor, coarse: Tensor) -> Tensor:
        return self.cut(self._engine.add_upsampled(x, coarse))

    def concatenate(self, parts: list[Tensor]) -> Tensor:
        return self._engine.concatenate(parts)

    def join_cells(self, maps: list[Tensor]) -> Tensor:
        return self._engine.join_cells(maps)


class _Workers:
    """Threads shared by all callers, started when first needed, and again in a forked process, which has none."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._lock = threading.Lock()

    def map(self, function: Callable[[T], R], items: list[T]) -> list[R]:
        if self.count == 1 or len(items) <= 1:
            return [function(item) for item in items]
        return list(self._threads().map(function, items))

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="retinaface")
                self._process = os.getpid()
            return self._pool


class _Budget:
    """Lets work of a limited total size begin; the rest waits its turn."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()
