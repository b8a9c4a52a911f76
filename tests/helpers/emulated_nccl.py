"""NCCL for processes with emulated GPUs: gloo, but with NCCL's demands on tensors.

The default group takes tensors of the GPU only, dense ones; the group that is asked to be gloo takes the host's only.
DistributedDataParallel, whose C++ side would see CPU tensors, is replaced by a sum over the ranks after each gradient.
What is not seen here: which communicators NCCL opens, in which order its kernels run, what happens when a rank dies.
"""

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist
from helpers import training
from helpers.emulated_gpu import EmulatedGpu, OnGpu
from torch import Tensor, nn

from training import distributed

COLLECTIVES = "all_reduce all_gather all_gather_into_tensor reduce_scatter_tensor broadcast send recv barrier".split()


class Parallel(nn.Module):
    """What train.py needs of DistributedDataParallel."""

    def __init__(self, module, device_ids, **_):
        super().__init__()
        assert device_ids == [int(os.environ["LOCAL_RANK"])]
        self.module, self.sums = module, True
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self._sum)

    def _sum(self, parameter):
        if self.sums:
            dist.all_reduce(parameter.grad)

    def register_comm_hook(self, state, hook):
        assert hook is distributed._sum_bucket

    @contextlib.contextmanager
    def no_sync(self):
        self.sums = False
        yield
        self.sums = True

    def forward(self, crops):
        return self.module(crops)


def _demanding(collective):
    def call(*args, group=None, **settings):
        def held(value):
            if isinstance(value, list):
                return [held(part) for part in value]
            if not isinstance(value, Tensor):
                return value
            assert isinstance(value, OnGpu) == (group is None), f"{collective.__name__}: a tensor of the wrong device"
            value = value.held if isinstance(value, OnGpu) else value
            layouts = torch.contiguous_format, torch.channels_last
            assert any(value.is_contiguous(memory_format=some) for some in layouts[: 1 + (value.ndim == 4)])
            return value

        return collective(*map(held, args), group=group, **settings)

    return call


@contextlib.contextmanager
def emulated_ranks():
    """This process, started with torchrun's environment, has an emulated GPU and NCCL."""
    start = dist.init_process_group

    def init_process_group(backend, device_id, **settings):
        assert backend == "nccl" and device_id == torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        start("gloo", **settings)

    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(EmulatedGpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])))
        stand_ins = {name: _demanding(getattr(dist, name)) for name in COLLECTIVES}
        for name, stand_in in {**stand_ins, "init_process_group": init_process_group}.items():
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        stack.enter_context(mock.patch.object(distributed, "DistributedDataParallel", Parallel))
        yield gpu


def train_main(line):
    """train.py with this command line on an emulated GPU."""
    with emulated_ranks():
        return training.train_main(line)
