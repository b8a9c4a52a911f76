"""Learning rate and margin over time, as pure functions of the step: a restart needs no state of theirs."""

import math
from dataclasses import dataclass

from config import Train
from training.losses import LOSSES
from utils import InputError

DEFAULT_MARGINS = {name: loss.default_margin for name, loss in LOSSES.items()}

Margin = float | tuple[float, ...]  # a number, or (m1, m2, m3) for the combined loss


@dataclass(frozen=True)
class Schedule:
    """What changes from step to step by plan. Raises `InputError` for a margin that the loss does not take."""

    options: Train
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self._numbers()

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 1."""
        return step // self.steps_per_epoch + 1

    def starts_epoch(self, step: int) -> bool:
        """Whether a step is the first of its epoch; of the number of steps done, whether an epoch has just ended."""
        return step % self.steps_per_epoch == 0

    def learning_rate(self, step: int) -> float:
        """The rate of a step.

        Warm-up is linear and starts one part above zero: step 0 of n warm-up steps has 1 / (n + 1) of the full rate.
        `cosine` and `poly` (power 2, as in InsightFace's recipes) reach 0 at the end of the last epoch; their time
        begins after the warm-up.
        """
        options = self.options
        epoch = step / self.steps_per_epoch
        if epoch < options.warmup:
            return options.lr * (step + 1) / (options.warmup * self.steps_per_epoch + 1)
        if options.schedule == "steps":
            return options.lr * 0.1 ** sum(epoch >= milestone for milestone in options.milestones)
        done = min(1.0, (epoch - options.warmup) / (options.epochs - options.warmup))
        if options.schedule == "cosine":
            return options.lr * 0.5 * (1 + math.cos(math.pi * done))
        return options.lr * (1 - done) ** 2

    def margin(self, step: int) -> Margin:
        """The margin of a step: grows linearly from nothing over `--margin-warmup` epochs."""
        options, full = self.options, self._numbers()
        if options.margin_warmup > 0:
            share = min(1.0, step / (options.margin_warmup * self.steps_per_epoch))
        else:
            share = 1.0
        if options.loss == "combined":
            return 1 + (full[0] - 1) * share, full[1] * share, full[2] * share
        return full[0] * share

    @property
    def full_margin(self) -> Margin:
        """What the margin grows to: `--margin`, or the default of the loss."""
        full = self._numbers()
        return full if self.options.loss == "combined" else full[0]

    def _numbers(self) -> tuple[float, ...]:
        options = self.options
        margin = tuple(options.margin) if options.margin else DEFAULT_MARGINS[options.loss]
        wanted = len(DEFAULT_MARGINS[options.loss])
        if len(margin) != wanted:
            raise InputError(f"--margin {' '.join(map(str, margin))}: {options.loss} takes {wanted} number(s)")
        return margin


def cost_of_margin(loss: str, margin: Margin) -> float:
    """What a margin takes from the cosine of a crop at a right angle to its centre.

    Times the scale, it is what a network that knows nothing loses on top of log(identities).
    """
    if isinstance(margin, tuple):
        return margin[2] - math.cos(margin[0] * math.pi / 2 + margin[1])
    return math.sin(margin) if loss == "arcface" else margin
