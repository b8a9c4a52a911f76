"""Learning rate and margin over time, as pure functions of the step: a restart needs no state of theirs."""

import math
from dataclasses import dataclass

from config import CROP_SIZE, Train
from training.losses import LOSSES, Margin
from utils import InputError


@dataclass(frozen=True)
class Schedule:
    """What changes from step to step by plan. Raises `InputError` for a margin that the loss does not take."""

    options: Train
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self.margin(0)

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

    def side(self, step: int) -> int:
        """The side of the crops that the network sees in a step: `--small-side` for `--small-epochs`, then whole."""
        options = self.options
        return options.small_side if step < options.small_epochs * self.steps_per_epoch else CROP_SIZE

    def margin(self, step: int) -> Margin:
        """The margin of a step: grows linearly from nothing over `--margin-warmup` epochs."""
        options, full = self.options, self.full_margin
        if options.margin_warmup == 0 or not full:
            return full
        return LOSSES[options.loss].grown(full, min(1.0, step / (options.margin_warmup * self.steps_per_epoch)))

    @property
    def freeze_steps(self) -> float:
        """Steps from the beginning of the run after which nothing is frozen any more: infinity, or a whole number."""
        epochs = self.options.freeze_epochs
        return math.inf if epochs is None else round(epochs * self.steps_per_epoch)

    @property
    def full_margin(self) -> Margin:
        """What the margin grows to: `--margin`, or the default of the loss; without a loss nothing."""
        if self.options.loss == "none":
            return ()
        try:
            return LOSSES[self.options.loss].numbers(tuple(self.options.margin or ()))
        except ValueError as error:
            raise InputError(f"--margin: {error}") from error
