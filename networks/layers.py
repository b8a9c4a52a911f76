"""What the families share: running blocks with or without recomputation, and a convolution that is slow in bfloat16."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LAST_SIDE = 7  # of the last map, for crops of 112 pixels


class StridedDepthwise(nn.Conv2d):
    """Depthwise convolution with a stride, kept in float32 under CPU autocast.

    oneDNN has no fast bfloat16 kernel for its gradient: the three such layers of MobileFaceNet took half of a step
    (94-140 ms each for 32 crops on one core, 3-36 ms in float32).
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def in_float32(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layers(x)`, in float32 under autocast: the last layers, whose rounding nothing after them could make up for.

    As in InsightFace's and AdaFace's training code.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return layers(x)
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.float())


def convolution(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, padding: int | None = None, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias; `padding` None keeps the side where there is no stride."""
    kind = StridedDepthwise if groups > 1 and stride > 1 else nn.Conv2d
    padding = kernel // 2 if padding is None else padding
    return kind(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)


def xavier(network: nn.Module) -> None:
    """Xavier-normal convolutions and linear layers, zero bias; batch norm starts as identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            _no_bias(module)


def kaiming(network: nn.Module) -> None:
    """Kaiming-normal convolutions and linear layers by what goes out of them, zero bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            _no_bias(module)


def _no_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def full_map(x: Tensor) -> Tensor:
    """The last map [N, C, H, W] at the side that the layers after it are made for, as smaller crops do not give it."""
    return x if x.shape[-1] == LAST_SIDE else functional.interpolate(x, (LAST_SIDE, LAST_SIDE), mode="bilinear")


def row_count(state: Mapping[str, Any], key: str) -> int:
    """The first size of a weight: the output size of a layer. Raises ValueError where there is none."""
    weight = state.get(key)
    if not isinstance(weight, Tensor):
        raise ValueError(f"not the weights of an embedding network: {key} is missing")
    if weight.ndim < 1 or weight.shape[0] < 1:
        raise ValueError(f"not the weights of an embedding network: {key} has no rows")
    return weight.shape[0]


def count(state: Mapping[str, Any], pattern: str) -> int:
    """How many of `pattern` with 0, 1, 2 ... in the place of {} are keys of the state, up to the first that is not."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """One block after the other; with `recompute`, only their inputs are kept for the backward pass."""
    for block in blocks:
        x = recomputed(block, x) if recompute else block(x)
    return x


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """`block(*inputs)`, keeping only the inputs for the backward pass, which runs the block a second time.

    The block must draw no random numbers: their generator is not wound back (whoever needs some draws them before and
    hands them in). Batch norm must not count the second run in its running statistics, or the trained network would
    differ. torch.compile's second run has no side effects anyway, and it does not understand context functions.
    """
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():
        settings["context_fn"] = lambda: (contextlib.nullcontext(), _frozen_statistics(block))
    return checkpoint(block, *inputs, **settings)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        assert norm.num_batches_tracked is not None  # only those without running statistics have none
        # Another counter, not None: the batch norms that are synchronised over ranks insist on one.
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
