"""The margin losses: one class each, which says all that there is to say about a loss.

`LOSSES` is the only list of them. The choices of `--loss`, the default of `--margin` and the parameters of the tests
come from it, so a new loss is a class and its entry there; docs/losses.md goes through it. The head (margin.py) has
the rest: centres, products, soft-max over all ranks, sampling, filtering, sub-centres.

A loss works on numbers per crop: the cosine to the crop's own centre, and the norm of its feature. The derivatives of
`target` and `penalty` are autograd's, exact and finite because `margin_cosine` is; the one thing that runs on all
cosines, `others`, states its own derivative, because autograd would keep copies of them.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

Margin = tuple[float, ...]  # as many numbers as the loss takes


def margin_cosine(
    cosine: Tensor, scale_angle: Tensor | float, add_angle: Tensor | float, add_cosine: Tensor | float
) -> Tensor:
    """cos(m1 theta + m2) - m3, elementwise, in float64; its derivatives are exact and finite for every input.

    `cosine` [N] in any floating dtype (values outside [-1, 1] are rounding noise and are clamped); m1, m2, m3 are
    `scale_angle`, `add_angle`, `add_cosine`, numbers or [N], through which gradients flow as well. The derivative by
    the cosine is m1 sin(m1 theta + m2) / sin(theta); at cos(theta) = +-1, where that is infinite, it is the value at
    the nearest number below 1 of cosine's dtype.

    Beyond m1 theta + m2 = pi the cosine would rise again. There the value is cos(theta) - K - m3 with derivative 1,
    where K = m2 sin(m2) as in ArcFace's official code (for m1 = 1; Deng et al., CVPR 2019), or larger if m1 > 1 asks
    for it to stay monotonic. A negative m2 (AdaFace) is cut where the sum leaves [0, pi] at its lower end: the value
    is 1 - m3, the derivative 0, as in AdaFace's code.
    """
    # A number is filled in on the device: a copy from the host would wait for the device.
    margins = [
        m.double() if isinstance(m, Tensor) else torch.full((), m, dtype=torch.float64, device=cosine.device)
        for m in (scale_angle, add_angle, add_cosine)
    ]
    return _MarginCosine.apply(cosine, *(m.expand_as(cosine) for m in margins))


class _MarginCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, cosine: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> Tensor:
        c = cosine.double().clamp(-1.0, 1.0)
        theta = torch.atan2(((1 - c) * (1 + c)).sqrt(), c)
        angle = m1 * theta + m2
        # The derivative is taken off the poles, by as much as cosine's dtype can tell.
        edge = 1 - torch.finfo(cosine.dtype).eps / 2
        near = c.clamp(-edge, edge)
        sine = ((1 - near) * (1 + near)).sqrt()
        by_cosine = m1 * (m1 * torch.atan2(sine, near) + m2).sin() / sine
        free = (math.pi - m2) / m1
        turn = free.clamp(0.0, math.pi)  # theta at which the angle reaches pi
        arcface, monotonic = m2 * m2.sin(), 1 + turn.cos()
        drop = torch.maximum(arcface, monotonic)
        beyond, below = angle > math.pi, angle < 0
        one, zero = torch.ones_like(c), torch.zeros_like(c)
        # What the drop changes by, for the larger of its two forms.
        turning = turn.sin() * (turn == free) / m1
        drop_by_m1 = torch.where(arcface >= monotonic, zero, turning * free)
        drop_by_m2 = torch.where(arcface >= monotonic, m2.sin() + m2 * m2.cos(), turning)
        ctx.save_for_backward(
            torch.where(beyond, one, torch.where(below, zero, by_cosine)),
            torch.where(beyond, -drop_by_m1, torch.where(below, zero, -theta * angle.sin())),
            torch.where(beyond, -drop_by_m2, torch.where(below, zero, -angle.sin())),
        )
        return torch.where(beyond, c - drop, torch.where(below, one, angle.cos())) - m3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        return *(upstream * slope for slope in ctx.saved_tensors), -upstream


class Loss(nn.Module):
    """What a loss states. Running numbers are buffers: they move with the head and are part of every checkpoint.

    `cosine` [N] is that of each crop of the global batch to its own centre, `norm` [N] the length of its feature, both
    float32 or float64 and the same on every rank, `margin` the present margin. Nothing here may wait for the device.
    """

    default_margin: ClassVar[Margin]  # of `--margin`; its length is how many numbers the loss takes
    no_margin: ClassVar[Margin] = ()  # where `--margin-warmup` begins; zeros unless stated
    trains_norm: ClassVar[bool] = False  # whether gradients flow through `norm`; else it comes without
    reshapes_others: ClassVar[bool] = False  # whether `others` does anything

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """The logit of each crop's own identity [N], before the scale; a smooth function of each crop alone."""
        raise NotImplementedError

    def penalty(self, norm: Tensor) -> Tensor | None:
        """What is added to each crop's loss [N], not scaled and without the focal factor; None: nothing."""
        return None

    def others(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The logits of other identities before the scale, from their cosines [N, any]; called block by block.

        `target` [N, 1] is what `target` returned, of which this may be a step function alone: no gradient flows. -inf
        (left out of the soft-max) stays -inf; else no value is below -2. `cosine` may be changed in place.
        """
        return cosine

    def others_derivative(self, cosine: Tensor, target: Tensor) -> Tensor:
        """d `others` / d cosine, of the same shape and finite, also where the cosine is -inf."""
        return torch.ones_like(cosine)

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        """Update the running numbers; called once for each batch in training, before `target`, without gradient."""

    @torch.no_grad()
    def cost(self, margin: Margin, norm: float = 20.0) -> float:
        """What the margin takes from the cosine of a crop, of this norm, at right angles to all centres.

        Times the scale, it is what a network that knows nothing loses on top of log(identities).
        """
        device = next((value.device for value in self.buffers()), None)
        cosine, length = torch.tensor([[0.0], [norm]], dtype=torch.float64, device=device)
        target = self.target(cosine, length, margin)
        return float(self.others(cosine[:, None], target[:, None]) - target)

    def check(self, margin: Margin) -> None:
        """Raise ValueError for a margin that is out of range."""
        if not all(0 <= value < math.pi for value in margin):
            raise ValueError(f"the margin of {self.name()} is in [0, pi), not {text_of(margin)}")

    @classmethod
    def name(cls) -> str:
        """What `--loss` calls it."""
        return cls.__name__.lower()

    @classmethod
    def formula(cls) -> str:
        """The first line of the class's docstring, for the command line."""
        return (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")

    @classmethod
    def numbers(cls, margin: Sequence[float] | None) -> Margin:
        """`margin`, or the default where it is None or empty. Raises ValueError for another number of numbers."""
        wanted = len(cls.default_margin)
        if margin and len(margin) != wanted:
            numbers = "one number" if wanted == 1 else f"{wanted} numbers"
            raise ValueError(
                f"{cls.name()} takes {numbers}, such as {text_of(cls.default_margin)}, not {text_of(margin)}"
            )
        return tuple(map(float, margin or cls.default_margin))

    @classmethod
    def grown(cls, margin: Margin, share: float) -> Margin:
        """The margin at `share` in [0, 1] of its warm-up."""
        start = cls.no_margin or (0.0,) * len(margin)
        return tuple(first + (full - first) * share for first, full in zip(start, margin, strict=True))

    def snapshot(self) -> Self:
        """The loss with its running numbers of now, for the backward pass."""
        taken = copy.copy(self)
        taken._buffers = {name: None if value is None else value.clone() for name, value in self._buffers.items()}
        return taken


def text_of(margin: Sequence[float]) -> str:
    """A margin as the command line takes it."""
    return " ".join(f"{value:g}" for value in margin)


class ArcFace(Loss):
    """cos(theta + m).

    Deng et al., CVPR 2019; the published model has m = 0.6, the paper 0.5.
    """

    default_margin = (0.6,)

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        return margin_cosine(cosine, 1.0, margin[0], 0.0)


class CosFace(Loss):
    """cos(theta) - m.

    Wang et al., CVPR 2018, section 4.1.
    """

    default_margin = (0.35,)

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        return margin_cosine(cosine, 1.0, 0.0, margin[0])


class Combined(Loss):
    """cos(m1 theta + m2) - m3.

    Deng et al., CVPR 2019, section 2.1; the default is CM1 of its table 2.
    """

    default_margin = (1.0, 0.3, 0.2)
    no_margin = (1.0, 0.0, 0.0)

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        return margin_cosine(cosine, *margin)

    def check(self, margin: Margin) -> None:
        """Raise ValueError unless m1 > 0 and the others are not negative."""
        if not (0 < margin[0] < math.inf and all(0 <= value < math.inf for value in margin[1:])):
            raise ValueError(f"the combined margin needs m1 > 0 and m2, m3 >= 0, not {text_of(margin)}")


class AdaFace(Loss):
    """cos(theta - m z) - m (1 + z), z in [-1, 1] from the feature's norm among those of late.

    Kim et al., CVPR 2022, section 4.1, and the official `head.py`: concentration h = 0.333, statistics that move by
    0.01 a batch from 20 and 100, norms clamped to [0.001, 100]. No gradient flows through the norm.
    """

    default_margin = (0.4,)
    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        """Let the statistics follow; a single crop has no deviation and is passed over."""
        if len(norm) > 1:
            norm = norm.clamp(1e-3, 100.0)
            self.norm_mean.lerp_(norm.mean().to(self.norm_mean.dtype), 0.01)
            self.norm_std.lerp_(norm.std().to(self.norm_std.dtype), 0.01)

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        norm = norm.clamp(1e-3, 100.0)
        z = ((norm - self.norm_mean) / (self.norm_std + 1e-3) * 0.333).clamp(-1, 1)
        return margin_cosine(cosine, 1.0, -margin[0] * z, margin[0] * (1 + z))


class CurricularFace(Loss):
    """cos(theta + m), and c (t + c) for others whose cosine c is above that.

    Huang et al., CVPR 2020, section 3, and the official `head/metrics.py`: t is the running mean of the cosines
    to the own centre, from 0, moving by 0.01 a batch and updated before it is used. So what is hard counts little in
    the beginning and more as the network gets better.
    """

    default_margin = (0.5,)
    reshapes_others = True
    t: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("t", torch.tensor(0.0))

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        """Let t follow."""
        self.t.lerp_(cosine.mean().to(self.t.dtype), 0.01)

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        return margin_cosine(cosine, 1.0, margin[0], 0.0)

    def others(self, cosine: Tensor, target: Tensor) -> Tensor:
        """c (t + c) for hard ones."""
        return torch.where(cosine > target, cosine * (self.t.to(cosine.dtype) + cosine), cosine)

    def others_derivative(self, cosine: Tensor, target: Tensor) -> Tensor:
        """t + 2 c for hard ones."""
        return torch.where(cosine > target, self.t.to(cosine.dtype) + 2 * cosine, 1.0)


class MagFace(Loss):
    """cos(theta + m(a)), and a penalty g(a) on the feature's norm a, which becomes the crop's quality.

    Meng et al., CVPR 2021, section 3.2, and the official `models/magface.py`, `run/run.sh`: a is clamped to [10, 110],
    m(a) goes linearly from 0.45 to 0.8, 35 g(a) = 35 (a / 110^2 + 1 / a). Gradients flow through the norm, inside
    these bounds. The official code leaves the margin out where cos(theta) <= 0 (its "easy margin", which makes the
    logit jump there); as in the paper's formula, it counts everywhere here.
    """

    default_margin = (0.45, 0.8)
    trains_norm = True
    norms = (10.0, 110.0)
    weight = 35.0

    def target(self, cosine: Tensor, norm: Tensor, margin: Margin) -> Tensor:
        """See the class."""
        lowest, highest = self.norms
        share = (norm.double().clamp(lowest, highest) - lowest) / (highest - lowest)
        return margin_cosine(cosine, 1.0, margin[0] + (margin[1] - margin[0]) * share, 0.0)

    def penalty(self, norm: Tensor) -> Tensor:
        """See the class."""
        norm = norm.double().clamp(*self.norms)
        return self.weight * (norm / self.norms[1] ** 2 + 1 / norm)


LOSSES: dict[str, type[Loss]] = {
    loss.name(): loss for loss in (ArcFace, CosFace, Combined, AdaFace, CurricularFace, MagFace)
}
# For the command line: each one's formula and margin.
MEANINGS = {name: f"{loss.formula()} (margin {text_of(loss.default_margin)})" for name, loss in LOSSES.items()} | {
    "none": "learns from --teacher alone, so crops need no labels"
}
