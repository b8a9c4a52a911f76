"""One process or many: what `torchrun` starts, and what a single process does without any process group.

`join` reads torchrun's environment. With one process nothing is initialised and every function here is a no-op, so that
training has one code path. With more, tensors go through NCCL on GPUs and gloo on CPU, and a second, gloo group
carries the few decisions that the hosts take together (stop, save), because those must not wait for a GPU.

Gradients of the network are summed over ranks, not averaged: the margin head's loss is the mean over the global batch,
and what reaches a rank's features is its share of that gradient.
"""

import contextlib
import datetime
import hashlib
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from training.torch_internals import BatchNorm
from utils import InputError

# Rank 0 measures verification sets while the others wait; the default of 10 minutes is short for that.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among all of them. `control` is a gloo group for decisions of the hosts, None in a world of one."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and shows progress."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of the values that the processes bring, on the hosts. Collective."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def check_same(self, text: str, complaint: str) -> None:
        """Raise `InputError(complaint)` on all processes unless they all bring the same text. Collective."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        if self.largest(number) != -self.largest(-number):
            raise InputError(complaint)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place, on the device. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def union(self, numbers: set[int]) -> set[int]:
        """What any of the processes has, on the hosts. Collective."""
        if self.size == 1:
            return numbers
        longest = self.largest(len(numbers))
        own = torch.full((longest,), -1)
        own[: len(numbers)] = torch.tensor(sorted(numbers), dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.control)
        return set(torch.cat(parts).tolist()) - {-1}

    def wait(self) -> None:
        """Go on when all processes are here. Collective."""
        self.largest(0)


@contextlib.contextmanager
def join(device_name: str) -> Iterator[World]:
    """The world as torchrun describes it in RANK, LOCAL_RANK and WORLD_SIZE; a world of one without them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        device = utils.choose_device(device_name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # else what asks for "cuda" (pinned memory, the compiler) takes the first one
        yield World(0, 1, device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device_of(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=TIMEOUT))
    finally:
        dist.destroy_process_group()


def _device_of(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {name}: with several processes it is auto, cuda (one GPU for each) or cpu")
    device = utils.choose_device(name)
    return utils.choose_device(f"cuda:{local_rank}") if device.type == "cuda" else device


def prepare_device(device: torch.device) -> None:
    """Settings of the whole process that make training faster: TensorFloat-32, and convolutions chosen by trial.

    Every batch has the same shape, so the trials of cuDNN cost a few steps, once.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = device.type == "cuda"


def check_compiler(device: torch.device) -> None:
    """Raise `InputError` if torch.compile lacks what it builds kernels with; it would say so in a page at step 0.

    On a GPU Triton builds a small C module around each kernel, on a CPU the kernels are C++; both include Python.h.
    """
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = shlex.split(os.environ.get(variable, ""))[:1] or names
    if not any(map(shutil.which, names)):
        raise InputError(f"--compile: there is no {' or '.join(names)}; install one, or leave --compile out")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian puts headers
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not header.is_file():
        raise InputError(f"--compile: there is no {header}; install Python's headers, or leave --compile out")


def data_parallel(network: nn.Module, world: World) -> nn.Module:
    """The network whose backward pass sums gradients over the ranks.

    The network itself in a world of one, and where all of it is frozen: it then has no gradients.
    """
    if world.size == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    on_gpu = world.device.type == "cuda"
    parallel = DistributedDataParallel(
        network,
        device_ids=[world.device.index] if on_gpu else None,
        broadcast_buffers=False,  # see averaged_statistics
        gradient_as_bucket_view=True,
        # Buckets are regrouped after the first backward pass unless this is set, and with them changes the order in
        # which three or more ranks are summed: a resumed run would differ from an unbroken one in the last bits. It
        # costs a walk over the graph, so on GPUs, where training is not exactly repeatable anyway, it stays off.
        find_unused_parameters=not on_gpu,
    )
    parallel.register_comm_hook(None, _sum_bucket)
    return parallel


def _sum_bucket(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@contextlib.contextmanager
def averaged_statistics(network: nn.Module, world: World) -> Iterator[Tensor | None]:
    """Inside, running batch-norm statistics are the mean over the ranks; after it, each rank has its own again.

    Yields the statistics of all ranks, [world size, numbers] on the device, for a checkpoint (`restore_statistics`);
    None in a world of one. They do not take part in training, so a checkpoint or a measurement is the only time to
    average them: the running average is linear, and the mean of the ranks' averages is the average of the ranks' mean.
    Collective.
    """
    if world.size == 1:
        yield None
        return
    buffers = _statistics_of(network)
    own = torch.cat([buffer.flatten() for buffer in buffers])[None]
    every = own.new_empty((world.size, own.shape[1]))
    dist.all_gather_into_tensor(every, own)
    # Statistics that are the same everywhere, as those of frozen parts, stay the same to the last bit.
    _fill(buffers, torch.where((every == every[0]).all(0), every[0], every.mean(0)))
    try:
        yield every
    finally:
        _fill(buffers, own[0])


def restore_statistics(network: nn.Module, every: Tensor | None, world: World) -> None:
    """Give this rank its own running statistics back, if they were saved on as many ranks as there are now."""
    if every is not None and len(every) == world.size > 1:
        _fill(_statistics_of(network), every[world.rank])


def _statistics_of(network: nn.Module) -> list[Tensor]:
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


def _fill(buffers: list[Tensor], values: Tensor) -> None:
    """Write the numbers of a vector into tensors, one after the other."""
    for buffer, part in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


class _NormaliseOverRanks(torch.autograd.Function):
    """Batch norm with the statistics of all ranks' batches; sums are accumulated in float64, as torch does on CPU."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`input` [N, C, ...]; `count` values per channel over all ranks. Returns output, mean [C], variance [C]."""
        dims = _all_but_channels(input)
        mean = input.sum(dims, dtype=torch.float64)
        dist.all_reduce(mean)
        mean = (mean / count).to(input.dtype)
        centred = input - _as_channels(mean, input)
        variance = centred.square().sum(dims, dtype=torch.float64)
        dist.all_reduce(variance)
        variance = (variance / count).to(input.dtype)
        inverse = torch.rsqrt(variance + eps)
        normal = centred.mul_(_as_channels(inverse, input))
        ctx.save_for_backward(normal, inverse, weight)
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return torch.addcmul(_as_channels(bias, input), normal, _as_channels(weight, input)), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        dims = _all_but_channels(gradient)
        own = torch.stack([gradient.sum(dims, dtype=torch.float64), (gradient * normal).sum(dims, dtype=torch.float64)])
        total = own.clone()
        dist.all_reduce(total)
        mean, slope = (total / ctx.count).to(gradient.dtype)
        result = gradient - _as_channels(mean, gradient)
        result = torch.addcmul(result, normal, _as_channels(slope, gradient), value=-1)
        own = own.to(gradient.dtype)
        return result.mul_(_as_channels(inverse * weight, gradient)), own[1], own[0], None, None


def _all_but_channels(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]


def _as_channels(values: Tensor, like: Tensor) -> Tensor:
    """[C] so that it goes with [N, C, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


class CrossRankBatchNorm(BatchNorm):
    """Batch norm over the batches of all ranks, for CPU, where torch.nn.SyncBatchNorm does not run.

    [N, C, ...] -> the same; every rank brings the same N. Two collectives forward, one backward.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        if not self.training:
            return super().forward(input)
        count = input.numel() // input.shape[1] * dist.get_world_size()
        values = input.to(self.running_mean.dtype)  # float32 also under autocast
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        output, mean, variance = _NormaliseOverRanks.apply(values, weight, bias, self.eps, count)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        return output.to(input.dtype)


def synchronise_batch_norm(network: nn.Module, world: World) -> nn.Module:
    """The network with batch norms that see the batches of all ranks; same parameters and state_dict keys."""
    if world.size == 1:
        return network
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, module in list(network.named_children()):
        if isinstance(module, BatchNorm):
            synchronised = CrossRankBatchNorm(module.num_features, module.eps, module.momentum, affine=module.affine)
            synchronised.weight, synchronised.bias = module.weight, module.bias
            for key, buffer in module.named_buffers():
                setattr(synchronised, key, buffer)
            setattr(network, name, synchronised)
        else:
            synchronise_batch_norm(module, world)
    return network
