"""A run in two halves: what stays as it is from the first step to the last, and what changes with each step.

Everything that a restart has to bring back is in `State`; everything in `Run` follows from the command line and the
data, so a restart makes it anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from config import Train
from data_gen import BatchOrder
from formats.crop_sets import Crops
from training.distillation import Distillation, NoHead
from training.distributed import World
from training.margin import MarginHead
from training.schedules import Schedule
from verification.sets import VerificationSet


@dataclass
class Sums:
    """What is added up over steps for a report; divided by `steps`, or by `seconds`, it is what people see."""

    loss: float = 0.0
    top1: float = 0.0  # share of a step's crops that were nearest to their own centre
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of the seconds: for data

    def add_step(self, loss: float, top1: float) -> None:
        """Count one step. One by one, so that no rounding depends on how often somebody looks."""
        self.loss += loss
        self.top1 += top1
        self.steps += 1


@dataclass
class State:
    """Everything that changes while training."""

    network: nn.Module  # without the wrappers of data-parallel training and compilation
    head: MarginHead | NoHead
    optimizer: torch.optim.Optimizer
    distillation: Distillation | None = None  # where there is a teacher
    step: int = 0  # optimiser steps done
    epoch_sums: Sums = field(default_factory=Sums)  # since the epoch began
    shown_sums: Sums = field(default_factory=Sums)  # since the last point in TensorBoard; their times are not used
    history: list[dict[str, Any]] = field(default_factory=list)  # a report for each finished epoch
    skipped: set[int] = field(default_factory=set)  # unreadable crops that were replaced
    begun_from: dict[str, Any] | None = None  # the weights of --init: file, sha256, network


@dataclass(frozen=True)
class Run:
    """Everything that does not: what was asked for, on what data, by which processes."""

    options: Train
    world: World
    crops: Crops
    data: dict[str, Any]  # crops, identities, fingerprint: by which a restart recognises the data
    order: BatchOrder
    schedule: Schedule
    sets: list[VerificationSet]
    log: Callable[[str], None]

    @property
    def steps(self) -> int:
        """Steps from the first to the last epoch."""
        return self.options.epochs * self.order.steps_per_epoch
