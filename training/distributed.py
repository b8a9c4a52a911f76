"""One process or many: what `torchrun` or `srun` starts, and what a single process does without any process group.

`join` reads what the launcher says. With one process nothing is initialised and every function here is a no-op, so that
training has one code path. With more, tensors go through NCCL on GPUs and gloo on CPU. Two more groups, both gloo,
belong to the hosts: one carries the few decisions that they take together (stop, save), because those must not wait for
a GPU, the other is for the threads that write checkpoints. Who waits for a process that writes or measures waits in
the hosts' group, for hours if need be; in the GPUs' group nobody waits longer than steps differ, so there a process
that hangs is found out in minutes.

Gradients of the network are summed over ranks, not averaged: the margin head's loss is the mean over the global batch,
and what reaches a rank's features is its share of that gradient.
"""

import contextlib
import datetime
import hashlib
import os
import re
import shlex
import shutil
import socket
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import processes
import utils
from training.torch_internals import BatchNorm
from utils import InputError

# Of the hosts' groups, where processes wait for one that opens data, writes or finds faces; and of NCCL's.
TIMEOUT = datetime.timedelta(hours=2)
GPU_TIMEOUT = datetime.timedelta(minutes=15)

# What torch says when another process has gone, and when one did not come in time.
_GONE = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe|remote process exited|Connection refused")
_LATE = re.compile(r"[Tt]imed? ?out")


@dataclass(frozen=True)
class World:
    """This process among all of them.

    `control` is a gloo group for decisions of the hosts, `writers` one for the threads that write checkpoints; None in
    a world of one.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    writers: dist.ProcessGroup | None = None

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

    def gather(self, value: Any) -> list[Any]:
        """What each process brings (anything that pickle takes), in order of rank, on the hosts. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def shared(self, value: Any) -> Any:
        """What rank 0 brings. Collective."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Go on when all processes are here. Collective."""
        self.largest(0)

    def meet_to_write(self) -> None:
        """Go on when the writing threads of all processes are here. Collective among these threads."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.writers)


@contextlib.contextmanager
def join(device_name: str) -> Iterator[World]:
    """The world as torchrun or srun describes it (see `processes.task`); a world of one without them.

    After an error the groups are left as they are, because to take them down would wait for processes inside a
    collective, until their time-out, before anybody has read why: the process has to end at once (see `leave`). When
    another process has gone or does not come, `InputError` says so in one line.
    """
    task = processes.task()
    if task.size == 1:
        device = utils.choose_device(device_name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # else what asks for "cuda" (pinned memory, the compiler) takes the first one
        yield World(0, 1, device)
        return
    if task.launcher == "srun":
        _speak_as_torchrun(task)
    check_addresses(task)
    device = _device_of(device_name, task.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _initialise(device, task)
        groups = [dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)]
        yield World(task.rank, task.size, device, *groups)
    except RuntimeError as error:
        text = str(error)
        if _GONE.search(text):
            raise InputError(
                f"process {task.rank} of {task.size}: another process of this run has ended; its own message says why"
            ) from error
        if _LATE.search(text):
            raise InputError(
                f"process {task.rank} of {task.size}: waited too long for the other processes; one of them hangs, has "
                f"ended, or cannot be reached ({text.splitlines()[0]})"
            ) from error
        if isinstance(error, dist.DistNetworkError):  # such as a port that another run has
            where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
            raise InputError(
                f"process {task.rank} of {task.size}: cannot meet the others at {where} ({text.splitlines()[0]})"
            ) from error
        raise
    dist.destroy_process_group()


def _initialise(device: torch.device, task: processes.Task) -> None:
    """Open the group of all processes; `InputError` where MASTER_ADDR or MASTER_PORT is missing or is no address."""
    try:
        if device.type == "cuda":
            # With a device the communicators are opened on it at once; else sending would open some on GPU 0.
            dist.init_process_group("nccl", timeout=GPU_TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise InputError(f"process {task.rank} of {task.size}: cannot meet the others: {error}") from error


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end this process with its exit code; after an error at once, even if others still wait for it."""
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_available() and dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def _speak_as_torchrun(task: processes.Task) -> None:
    """Put Slurm's description into torchrun's variables, which torch reads."""
    host, port = processes.meeting_point()
    os.environ.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.size),
        LOCAL_RANK=str(task.local_rank),
        LOCAL_WORLD_SIZE=str(task.local_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )


def check_addresses(task: processes.Task) -> None:
    """Raise `InputError` where gloo would give the other machines an address that only this one can reach.

    gloo tells the others the address that this machine's own name stands for; on Debian and Ubuntu that is 127.0.1.1.
    """
    if task.nodes == 1 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    meeting = os.environ.get("MASTER_ADDR", "")
    if (address.startswith("127.") or address == "no address") and not meeting.startswith(("127.", "localhost", "::1")):
        names = ", ".join(name for _, name in socket.if_nameindex() if name != "lo") or "none"
        raise InputError(
            f"this machine's name {name} stands for {address}, where the other machines cannot reach it: export "
            f"GLOO_SOCKET_IFNAME=NAME, the network interface between them (here there are: {names})"
        )


def _device_of(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {name}: with several processes it is auto, cuda (one GPU for each) or cpu")
    device = utils.choose_device(name)
    if device.type != "cuda":
        return device
    # Slurm's --gpus-per-task shows each process one GPU, its own.
    alone = torch.cuda.device_count() == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return utils.choose_device("cuda:0" if alone else f"cuda:{local_rank}")


def prepare_device(device: torch.device) -> None:
    """Settings of the whole process that make training faster.

    TensorFloat-32; on a GPU convolutions chosen by trial (every batch has the same shape, so the trials of cuDNN cost a
    few steps, once); on a CPU memory that is used again.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = device.type == "cuda"
    if device.type == "cpu":
        utils.keep_freed_memory()


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
        assert self.running_mean is not None
        count = input.numel() // input.shape[1] * dist.get_world_size()
        values = input.to(self.running_mean.dtype)  # float32 also under autocast
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        output, mean, variance = _NormaliseOverRanks.apply(values, weight, bias, self.eps, count)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None and self.running_var is not None and self.momentum is not None
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
