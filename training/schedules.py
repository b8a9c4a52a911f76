"""Learning rate and margin over time, as pure functions of the step: a restart needs no state of theirs."""

import math

from config import Train
from training.losses import LOSSES
from utils import InputError

DEFAULT_MARGINS = {name: loss.default_margin for name, loss in LOSSES.items()}


def learning_rate(step: int, steps_per_epoch: int, options: Train) -> float:
    """The rate of a step.

    Warm-up is linear and starts one part above zero: step 0 of n warm-up steps has 1 / (n + 1) of the full rate.
    `cosine` and `poly` (power 2, as in InsightFace's recipes) reach 0 at the end of the last epoch; their time begins
    after the warm-up.
    """
    epoch = step / steps_per_epoch
    if epoch < options.warmup:
        return options.lr * (step + 1) / (options.warmup * steps_per_epoch + 1)
    if options.schedule == "steps":
        return options.lr * 0.1 ** sum(epoch >= milestone for milestone in options.milestones)
    done = min(1.0, (epoch - options.warmup) / (options.epochs - options.warmup))
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (1 - done) ** 2


def full_margin(options: Train) -> tuple[float, ...]:
    """`--margin`, or the default of the loss."""
    margin = tuple(options.margin) if options.margin else DEFAULT_MARGINS[options.loss]
    wanted = len(DEFAULT_MARGINS[options.loss])
    if len(margin) != wanted:
        raise InputError(f"--margin {' '.join(map(str, margin))}: {options.loss} takes {wanted} number(s)")
    return margin


def margin_at(step: float, steps_per_epoch: int, options: Train) -> float | tuple[float, ...]:
    """The margin of a step: grows linearly from nothing over `--margin-warmup` epochs."""
    full = full_margin(options)
    share = min(1.0, step / (options.margin_warmup * steps_per_epoch)) if options.margin_warmup > 0 else 1.0
    if options.loss == "combined":
        return 1 + (full[0] - 1) * share, full[1] * share, full[2] * share
    return full[0] * share


def cost_of_margin(loss: str, margin: float | tuple[float, ...]) -> float:
    """What a margin takes from the cosine of a crop at a right angle to its centre.

    Times the scale, it is what a network that knows nothing loses on top of log(identities).
    """
    if isinstance(margin, tuple):
        return margin[2] - math.cos(margin[0] * math.pi / 2 + margin[1])
    return math.sin(margin) if loss == "arcface" else margin
