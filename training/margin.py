"""The margin head: class centres split by identity over the ranks, angular margins, soft-max over the union.

Design. One custom autograd function does product, margin, soft-max, cross entropy and focal factor. It walks over the
centres in blocks of columns, keeps exactly one matrix of [crops, identities] cosines in the dtype of the product
(bfloat16 under autocast), does its arithmetic in float32 on one block at a time, and never builds a one-hot matrix:
the target cosine of each crop is computed apart, in float32 from the stored centre, and so are its margin, derivative
and gradient. Centres are normalised block by block as well, so neither a normalised copy of all centres nor its
gradient exists. The price: a loop in Python over a few blocks, and no second derivative. What the losses do to the
cosines is theirs to say (losses.py).

Over several ranks, each holds a contiguous block of identities. A step costs an all-gather of features, norms and
labels, one of the target cosines, one of three numbers per crop (maximum, sum of exponentials, nearest other) and one
reduce-scatter of the features' gradient. The loss is the mean over the global batch and the same number on every rank.
Gradients of the head's own block are complete; gradients that flow on into the local features are those of the
*global* mean, so the backbone's have to be summed (not averaged) over the ranks.

With `sub_centres` K > 1 an identity has K centres, and the nearest one to a crop counts, for its own identity and for
the others (sub-centre ArcFace, Deng et al., ECCV 2020): crops of somebody else under the same label get a centre of
their own. Which one was nearest is kept, a byte for each cosine. With `filter` > 0 the cosines of other identities
above it are left out of the soft-max: two labels so close are probably one person (InsightFace's arcface_torch,
`interclass_filtering_threshold`, which sets such a cosine to 0 and so leaves exp(0) in the sum).

With `sample_rate` < 1 (Partial FC, An et al., CVPR 2022) a step sees the identities of its batch and a random share
of the others. Whether an identity is drawn is a hash of (seed, step, identity): the same for every number of ranks
and on every device, with no generator state to save, and no host synchronisation; the price is that the number
drawn varies a little from step to step (Partial FC draws a fixed number per rank), for which a few spare, masked
slots are allocated. The centres are then not a parameter: a step gathers the drawn rows into a small leaf tensor, and
`MarginHead.step` applies SGD, or AdamW, to these rows alone. Memory per centre: the row and its momentum (AdamW: two
moments and a count), no gradient.

How a trainer uses it, full or sampled alike:

    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], ...)   # sampled: no head parameters
    loss, stats = head(network(crops), labels)         # several times for gradient accumulation
    loss.backward()
    clip_grad_value_([*network.parameters(), *head.parameters(), *head.sampled_leaves()], 5.0)
    optimizer.step()
    head.step(lr, momentum=0.9, weight_decay=5e-4, nesterov=True)                   # full: only counts the step
    optimizer.zero_grad(); head.zero_grad()
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focal_loss import focal_factor
from training.losses import LOSSES, Loss, Margin

# Standard deviation of a fresh centre's coordinates (InsightFace's partial_fc; its direction alone matters to the loss,
# its length to how fast the direction turns).
CENTRE_STD = 0.01
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW (Loshchilov and Hutter, ICLR 2019), torch.optim.AdamW's defaults
MOST_SUB_CENTRES = 256  # their numbers are kept as bytes
_CENTRE_BLOCK = 1024  # identities per seeded block of initial values: fixed, or initial centres change

_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize

# Columns x crops that are held in float32 at a time: on a CPU what stays in the caches; on a GPU 256 MB, so that a step
# of 1,024 crops and 2 million identities is some 1,200 kernels (with a quarter of it four times as many, and a GPU that
# waits to be told what to do).
_BLOCK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 19}


def identity_range(identities: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one past the last identity that `rank` holds; sizes differ by one at most."""
    return rank * identities // world_size, (rank + 1) * identities // world_size


class MarginHead(nn.Module):
    """Class centres of `identities` people and the margin loss over them; see the file's docstring.

    `loss` is a name in `losses.LOSSES`, `margin` one number or as many as it takes, None its default. `scale`
    multiplies the cosines (64 in the papers). `focal_gamma` > 0 applies the focal factor per crop. `sub_centres` is
    the number of centres an identity has, `filter` in [0, 1] the cosine above which another identity is left out (0:
    none is). `sample_rate` in (0, 1] is the share of negative centres that a step sees. `rank`, `world_size`, `group`
    place the head on a process group (None: the default one); world size 1 needs none. `optimizer`, sgd or adamw, is
    what a sampled head applies to the rows that were drawn. `seed` decides initial centres and sampling, independently
    of the number of ranks. `margin` and `scale` may be assigned during training. Raises ValueError for values outside
    these ranges.
    """

    weight: nn.Parameter  # of a full head
    _rows: Tensor  # of a sampled one
    _velocity: Tensor  # momentum, or the first moment
    _squares: Tensor  # the second moment, and how often a row was drawn: of AdamW
    _updates: Tensor

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        *,
        loss: str,
        margin: float | Sequence[float] | None = None,
        scale: float,
        sub_centres: int = 1,
        filter: float = 0.0,
        sample_rate: float = 1.0,
        focal_gamma: float = 0.0,
        optimizer: str = "sgd",
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"no loss named {loss!r} (there are {', '.join(LOSSES)})")
        if not 0 <= rank < world_size <= identities:
            raise ValueError(f"{identities} identities cannot be split over {world_size} ranks (this one is {rank})")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample rate {sample_rate} is outside (0, 1]")
        if focal_gamma < 0:
            raise ValueError(f"focal gamma {focal_gamma} is negative")
        if not 1 <= sub_centres <= MOST_SUB_CENTRES:
            raise ValueError(f"{sub_centres} sub-centres are not between 1 and {MOST_SUB_CENTRES}")
        if not 0 <= filter <= 1:
            raise ValueError(f"filter {filter} is outside [0, 1]")
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"no optimizer named {optimizer!r} (there are sgd, adamw)")
        self.loss = LOSSES[loss]()
        self.scale, self.focal_gamma, self.sample_rate = scale, focal_gamma, sample_rate
        self.optimizer = optimizer
        self.sub_centres, self.filter = sub_centres, filter
        self.margin = margin
        self.rank, self.world_size, self.group, self.seed = rank, world_size, group, seed
        self.embedding_size, self.identities = embedding_size, identities
        self.first, self.last = identity_range(identities, rank, world_size)
        self.steps = 0
        self._drawn: list[tuple[Tensor, Tensor]] = []  # (rows, leaf) of each forward pass since the last step
        shape = (embedding_size,) if sub_centres == 1 else (sub_centres, embedding_size)
        if self.sampled:
            # One spare row at the end is where masked slots read from and write to.
            rows = torch.zeros(self.last - self.first + 1, *shape)
            self.register_buffer("_rows", rows, persistent=False)
            self.register_buffer("_velocity", torch.zeros_like(rows), persistent=False)
            if optimizer == "adamw":
                self.register_buffer("_squares", torch.zeros_like(rows), persistent=False)
                self.register_buffer("_updates", torch.zeros(len(rows), *[1] * len(shape)), persistent=False)
        else:
            self.weight = nn.Parameter(torch.empty(self.last - self.first, *shape))
        _draw_centres(self.centres, self.first, seed)

    @property
    def margin(self) -> Margin:
        """The present margin: as many numbers as the loss takes. One number may be assigned as it is."""
        return self._margin

    @margin.setter
    def margin(self, value: float | Sequence[float] | None) -> None:
        numbers = self.loss.numbers((float(value),) if isinstance(value, int | float) else value and tuple(value))
        self.loss.check(numbers)
        self._margin = numbers

    @property
    def sampled(self) -> bool:
        """True when steps see a sample of the centres and the head updates them itself."""
        return self.sample_rate < 1

    @property
    def centres(self) -> Tensor:
        """This rank's centres [last - first, embedding_size], not normalised, detached (a view, not a copy).

        With sub-centres [last - first, sub_centres, embedding_size].
        """
        return self._rows[:-1] if self.sampled else self.weight.detach()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.loss.name()}, margin={self.margin}, scale={self.scale}, identities={self.first}..{self.last - 1} "
            f"of {self.identities}, sample_rate={self.sample_rate}, focal_gamma={self.focal_gamma}, "
            f"sub_centres={self.sub_centres}, filter={self.filter}"
        )

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the global batch, and what is worth watching, without host synchronisation.

        `features` [n, embedding_size], not normalised, any floating dtype; `labels` int64 [n], global identities;
        n is the same on every rank. Returns the scalar float32 loss, and detached tensors over the global batch, N =
        n x world size crops in order of rank: `top1` [] share of crops nearer to their own centre than to any other
        seen in this step (no margin), `target_angle` [N] and `other_angle` [N] in degrees, to the own and to the
        nearest other centre, `feature_norm` [N]. A label that no rank holds makes the loss infinite.
        """
        device = features.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            features = features if features.dtype == torch.float64 else features.float()
            norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
            unit = features / norms.clamp_min(_SMALLEST_NORM)
            unit = _GatherRows.apply(unit, self.group, self.world_size)
            if self.loss.trains_norm:
                norms = _GatherRows.apply(norms[:, 0], self.group, self.world_size)
            else:
                norms = _all_gather(norms.detach()[:, 0], self.group, self.world_size)
            labels = _all_gather(labels, self.group, self.world_size)
            weight, columns, empty = self._choose(labels)
            loss, target, other = _MarginSoftmax.apply(
                unit, weight.flatten(0, -2), norms, columns, empty, low or unit.dtype, self
            )
        stats = {
            "top1": (target > other).to(target.dtype).mean(),
            "target_angle": _degrees(target),
            "other_angle": _degrees(other),
            "feature_norm": norms.detach(),
        }
        return loss, stats

    def sampled_leaves(self) -> list[Tensor]:
        """What holds the gradient of a sampled head for the coming `step` (to clip or measure it): one tensor or none.

        The gradients of several backward passes are added up first, as those of parameters are.
        """
        drawn = [(rows, leaf) for rows, leaf in self._drawn if leaf.grad is not None]
        if len(drawn) > 1:
            rows, gradient = self._summed([(rows, leaf.grad) for rows, leaf in drawn if leaf.grad is not None])
            leaf = torch.empty_like(gradient)  # nobody reads its values
            leaf.grad = gradient
            drawn = [(rows, leaf)]
        self._drawn = drawn
        return [leaf for _, leaf in drawn]

    def centres_seen(self, crops: int) -> float:
        """How many centres compete in a step of `crops` crops, on average, where identities are equally frequent."""
        positive = -self.identities * math.expm1(crops * math.log1p(-1 / self.identities))
        return positive + self.sample_rate * (self.identities - positive)

    @torch.no_grad()
    def cost_of_margin(self, norm: float) -> float:
        """What scale, present margin and penalty add to the loss of a network that knows nothing.

        Its features have this norm. Without margin and penalty its loss is log(identities).
        """
        penalty = self.loss.penalty(torch.tensor([norm]))
        return self.scale * self.loss.cost(self.margin, norm) + (0.0 if penalty is None else float(penalty))

    @torch.no_grad()
    def step(self, lr: float, *, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = True) -> None:
        """Finish a step: a sampled head updates the rows that were drawn, with torch.optim's arithmetic.

        Rows that were not drawn keep weight, momentum and, for AdamW (which has no use for `momentum` and `nesterov`),
        their own number of updates: each row is treated as if the steps that drew it were all there are. Call it once
        per step, after all backward passes, for a full head too (its parameter belongs to the common optimiser; the
        step is only counted).
        """
        self.steps += 1
        if not self.sampled_leaves():
            return
        [(rows, leaf)] = self._drawn
        self._drawn.clear()
        gradient = leaf.grad
        assert gradient is not None  # as `sampled_leaves` chose them
        values = self._rows[rows]
        if self.optimizer == "adamw":
            self._rows.index_copy_(0, rows, self._adamw(rows, values, gradient, lr, weight_decay))
            return
        gradient.add_(values, alpha=weight_decay)
        velocity = self._velocity[rows].mul_(momentum).add_(gradient)
        self._velocity.index_copy_(0, rows, velocity)
        update = gradient.add_(velocity, alpha=momentum) if nesterov else velocity
        self._rows.index_copy_(0, rows, values.add_(update, alpha=-lr))

    def _adamw(self, rows: Tensor, values: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
        """The rows after a step of torch.optim.AdamW; changes `values`."""
        updates = self._updates[rows] + 1
        mean = self._velocity[rows].lerp_(gradient, 1 - BETAS[0])
        squares = self._squares[rows].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        for kept, new in ((self._updates, updates), (self._velocity, mean), (self._squares, squares)):
            kept.index_copy_(0, rows, new)
        corrected = (squares / (1 - BETAS[1] ** updates)).sqrt_().add_(EPSILON)
        return values.mul_(1 - lr * weight_decay).sub_(mean.div_(1 - BETAS[0] ** updates).div_(corrected), alpha=lr)

    def _kept(self) -> dict[str, Tensor]:
        """What a sampled head's optimiser keeps for each of this rank's identities, by its name in a checkpoint."""
        names = (
            [] if not self.sampled else ["velocity"] if self.optimizer == "sgd" else ["velocity", "squares", "updates"]
        )
        return {name: getattr(self, f"_{name}")[:-1] for name in names}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and, without a `step`, the rows drawn for it."""
        super().zero_grad(set_to_none)
        self._drawn.clear()

    def own_state(self) -> dict[str, Any]:
        """This rank's part of a checkpoint: plain tensors on the CPU and numbers, all of them copies.

        `centres` [last - first, embedding_size] (with sub-centres [last - first, sub_centres, embedding_size]),
        `identities`, `steps`, for a sampled head `velocity` of the same shape (AdamW: `squares` and `updates`, too),
        and the loss's running numbers by name.
        """
        state: dict[str, Any] = {"centres": _copy_on_host(self.centres), "steps": self.steps}
        state["identities"] = self.identities
        state |= {name: _copy_on_host(rows) for name, rows in self._kept().items()}
        return state | {name: _copy_on_host(value) for name, value in self.loss.named_buffers()}

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Any]) -> None:
        """Take this rank's rows of a state of all identities, whatever the number of ranks that saved it.

        A full head's state may start a sampled one (momentum from zero) and the other way round. Raises ValueError
        when the number of identities or dimensions differs.
        """
        expected = (self.identities, *self.centres.shape[1:])
        if tuple(state["centres"].shape) != expected:
            raise ValueError(f"the head's centres are {tuple(state['centres'].shape)}, not {expected}")
        self.steps = int(state["steps"])
        self.centres.copy_(self.own_rows(state["centres"]))
        for name, rows in self._kept().items():
            if name in state:
                rows.copy_(self.own_rows(state[name]))
        for name, value in self.loss.named_buffers():
            if name in state:
                value.copy_(state[name])

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's part [last - first, ...] of a per-identity tensor [identities, ...]."""
        return whole[self.first : self.last]

    def _choose(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Centres of this step [S, ...], each label's place among them (-1: not here), which of them are masked [S]."""
        size = self.last - self.first
        local = labels - self.first
        here = (local >= 0) & (local < size)
        if not self.sampled:
            return self.weight, torch.where(here, local, -1), None
        drawn = _hash(torch.arange(self.first, self.last, device=labels.device), self.seed, self.steps)
        drawn = drawn < int(self.sample_rate * 2**32)
        positive = torch.zeros(size + 1, dtype=torch.bool, device=labels.device)
        positive.index_fill_(0, torch.where(here, local, size), True)
        drawn |= positive[:-1]
        # The number drawn stays on the device; slots for eight standard deviations above its mean are allocated.
        spread = 8 * math.sqrt(self.sample_rate * (1 - self.sample_rate) * size)
        slots = min(size, math.ceil(self.sample_rate * size + spread) + len(labels))
        order = drawn.cumsum(0)
        slot = torch.where(drawn, order - 1, slots).clamp_max(slots)
        rows = torch.full((slots + 1,), size, device=labels.device)
        rows = rows.scatter_(0, slot, torch.arange(size, device=labels.device))[:-1]
        empty = torch.arange(slots, device=labels.device) >= order[-1]
        leaf = self._rows[rows].requires_grad_()
        if torch.is_grad_enabled():
            self._drawn.append((rows, leaf))
        columns = slot[local.clamp(0, size - 1)]
        return leaf, torch.where(here & (columns < slots), columns, -1), empty

    def _summed(self, leaves: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Rows of several draws, each once (repeats point at the spare row), and their summed gradients."""
        rows = torch.cat([rows for rows, _ in leaves])
        gradients = torch.cat([gradient for _, gradient in leaves])
        index = torch.arange(len(rows), device=rows.device)
        spare = len(self._rows) - 1
        first = torch.full((spare + 1,), len(rows), device=rows.device).scatter_reduce_(0, rows, index, "amin")
        owner = first[rows]
        return torch.where(owner == index, rows, spare), torch.zeros_like(gradients).index_add_(0, owner, gradients)


class _MarginSoftmax(torch.autograd.Function):
    """Unit features, centres -> mean loss; target cosines and nearest other cosines come along without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        weight: Tensor,
        norm: Tensor,
        columns: Tensor,
        empty: Tensor | None,
        product_dtype: torch.dtype,
        head: MarginHead,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`unit` [N, D], `weight` [S x sub-centres, D], `norm` [N], `columns` [N] in -1 .. S - 1, `empty` [S] bool."""
        loss, scale, each = head.loss, head.scale, head.sub_centres
        inverse = 1 / torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
        here = columns >= 0
        own = _nearest_row(unit, weight, inverse, columns, each)
        target = torch.where(here, (unit * _rows_of(weight, inverse, own)).sum(1), -math.inf)
        target = _all_gather(target[None], head.group, head.world_size).amax(0)
        if head.training:
            loss.observe(target, norm)
        value, slope, norm_slope, penalty, penalty_slope = _evaluated(loss, target, norm, head.margin)
        value = torch.where(target.isinf(), -math.inf, value).to(unit.dtype)  # clamped away in `margin_cosine`

        low = unit.to(product_dtype)
        step = max(1, _BLOCK_ELEMENTS.get(unit.device.type, 1 << 26) // (len(unit) * each))
        cosines, nearest = [], []
        # Instead of -inf for "none yet": differences stay finite, and no cosine or what `others` makes of it is below.
        other = top = unit.new_full((len(unit),), -2.0)
        total = unit.new_zeros(len(unit))
        for start in range(0, len(weight) // each, step):
            stop = min(start + step, len(weight) // each)
            block = low @ _unit_block(weight, inverse, start * each, stop * each, product_dtype).T
            if each > 1:
                block, best = block.unflatten(1, (-1, each)).max(2)
                nearest.append(best.to(torch.uint8))
            if empty is not None:
                block.masked_fill_(empty[start:stop], -math.inf)
            _exclude(block, columns - start)
            if head.filter:
                other = torch.maximum(other, block.amax(1).to(unit.dtype))
                block.masked_fill_(block > head.filter, -math.inf)
            cosines.append(block)
            logits = block
            if loss.reshapes_others:
                if not head.filter:
                    other = torch.maximum(other, block.amax(1).to(unit.dtype))
                logits = loss.others(block.to(unit.dtype, copy=True), value[:, None])
            new_top = torch.maximum(top, logits.amax(1).to(unit.dtype))
            total = total * ((top - new_top) * scale).exp()
            total += logits.to(unit.dtype, copy=True).sub_(new_top[:, None]).mul_(scale).exp_().sum(1)
            top = new_top
        parts = torch.stack([top, total, other if head.filter or loss.reshapes_others else top])
        parts = _all_gather(parts[None], head.group, head.world_size)
        other = parts[:, 2].amax(0)
        log_others = torch.logsumexp(parts[:, 0] * scale + parts[:, 1].log(), 0)
        logit = value * scale
        # logsumexp(all) - logit, without cancellation where the crop is nearly certain.
        entropy = torch.logaddexp(log_others - logit, torch.zeros_like(logit))
        factor, focal_derivative = focal_factor(entropy, head.focal_gamma)
        result = factor * entropy if penalty is None else factor * entropy + penalty
        coefficient = focal_derivative / len(unit)
        miss = torch.expm1(-entropy)  # d entropy / d logit
        norm_gradient = None
        if loss.trains_norm:
            assert norm_slope is not None and penalty_slope is not None
            norm_gradient = coefficient * miss * scale * norm_slope + penalty_slope / len(unit)
        # Saved this way, not as attributes, the cosines are freed by the backward pass.
        ctx.save_for_backward(
            *(unit, weight, inverse, own, here, entropy + logit, coefficient, slope * miss, norm_gradient, value),
            *(*cosines, *nearest),
        )
        ctx.step, ctx.scale, ctx.product_dtype, ctx.each = step, scale, product_dtype, each
        ctx.loss = loss.snapshot() if loss.reshapes_others else None
        ctx.mark_non_differentiable(target, other)
        return result.mean(), target, other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """This rank's share of the features' gradient (its centres' part) and the whole gradient of its centres."""
        unit, weight, inverse, own, here, log_sum, coefficient, pull, norm_gradient, value, *kept = ctx.saved_tensors
        each = ctx.each
        blocks = len(kept) if each == 1 else len(kept) // 2
        with torch.autocast(unit.device.type, enabled=False):
            coefficient = coefficient * (upstream * ctx.scale)
            low = unit.to(ctx.product_dtype)
            unit_gradient, weight_gradient = torch.zeros_like(unit), torch.empty_like(weight)
            for index, cosine in enumerate(kept[:blocks]):
                start = index * ctx.step * each
                stop = start + cosine.shape[1] * each
                block = _unit_block(weight, inverse, start, stop, ctx.product_dtype)
                share, slope = cosine.to(unit.dtype, copy=True), None
                if ctx.loss is not None:
                    slope = ctx.loss.others_derivative(share, value[:, None])
                    share = ctx.loss.others(share, value[:, None])
                share = share.mul_(ctx.scale).sub_(log_sum[:, None]).exp_().mul_(coefficient[:, None])
                if slope is not None:
                    share *= slope
                share = share.to(ctx.product_dtype)
                if each > 1:
                    spread = share.new_zeros(*share.shape, each)
                    share = spread.scatter_(2, kept[blocks + index].long()[:, :, None], share[:, :, None]).flatten(1)
                unit_gradient += share @ block
                part = (share.T @ low).to(weight.dtype)
                weight_gradient[start:stop] = _through_norm(part, weight[start:stop], inverse[start:stop])
            target_gradient = (coefficient * pull * here)[:, None]
            unit_gradient += target_gradient * _rows_of(weight, inverse, own)
            part = _through_norm(target_gradient * unit, weight[own], inverse[own])
            weight_gradient.index_add_(0, own, part)
            # Summed over the ranks like the features' gradient: one of them gives the whole.
            norm_gradient = None if norm_gradient is None else upstream * norm_gradient * here
        return unit_gradient, weight_gradient, norm_gradient, *[None] * 4


def _evaluated(
    loss: Loss, cosine: Tensor, norm: Tensor, margin: Margin
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`loss.target`, its derivatives by cosine and norm, `loss.penalty` and its derivative; None where there is none.

    All [N] in the dtype of `cosine`, but the value, which is as exact as the loss gives it.
    """
    with torch.enable_grad():
        # Each crop's value depends on its own numbers alone, so the sum's derivatives are those of the values.
        place, length = cosine.detach().requires_grad_(), norm.detach().requires_grad_(loss.trains_norm)
        value, penalty = loss.target(place, length, margin), loss.penalty(length)
        norm_slope = penalty_slope = None
        if loss.trains_norm:
            slope, norm_slope = torch.autograd.grad(value.sum(), [place, length], materialize_grads=True)
            penalty_slope = torch.zeros_like(length)
            if penalty is not None:
                (penalty_slope,) = torch.autograd.grad(penalty.sum(), [length])
        else:
            (slope,) = torch.autograd.grad(value.sum(), [place])
    return value.detach(), slope, norm_slope, None if penalty is None else penalty.detach().to(cosine), penalty_slope


def _nearest_row(unit: Tensor, weight: Tensor, inverse: Tensor, columns: Tensor, each: int) -> Tensor:
    """Row of `weight` of each crop's own centre, the nearest of its `each` [N]; arbitrary where the column is -1."""
    own = columns.clamp_min(0)
    if each == 1:
        return own
    rows = own[:, None] * each + torch.arange(each, device=own.device)
    cosines = (_rows_of(weight, inverse, rows) * unit[:, None]).sum(2)
    return rows.gather(1, cosines.argmax(1, keepdim=True))[:, 0]


def _unit_block(weight: Tensor, inverse: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Normalised centres [stop - start, D] in the product's dtype."""
    block = torch.empty((stop - start, weight.shape[1]), dtype=dtype, device=weight.device)
    return torch.mul(weight[start:stop], inverse[start:stop], out=block)


def _rows_of(weight: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
    """Normalised centres of these rows [..., D]."""
    return weight[rows] * inverse[rows]


def _through_norm(gradient: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Gradient for w from the gradient for w / |w|, row by row: the tangential part over the length."""
    unit = weight * inverse
    return (gradient - unit * (unit * gradient).sum(1, keepdim=True)) * inverse


def _exclude(block: Tensor, columns: Tensor) -> None:
    """Set block[i, columns[i]] to -inf where that column lies inside the block, without a mask of the block's size."""
    width = block.shape[1]
    index = columns.clamp(0, width - 1)[:, None]
    inside = ((columns >= 0) & (columns < width))[:, None]
    block.scatter_(1, index, torch.where(inside, -math.inf, block.gather(1, index)))


def _copy_on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _degrees(cosine: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _draw_centres(centres: Tensor, first: int, seed: int) -> None:
    """Fill the centres [n, ...] of identities first, first + 1, ...: normal values, the same however they are split."""
    last = first + len(centres)
    for block in range(first // _CENTRE_BLOCK, -(-last // _CENTRE_BLOCK)):
        generator = torch.Generator().manual_seed(_hash(block, seed, 0))
        values = torch.randn(_CENTRE_BLOCK, *centres.shape[1:], generator=generator, device="cpu").mul_(CENTRE_STD)
        begin = block * _CENTRE_BLOCK
        start, stop = max(first, begin), min(last, begin + _CENTRE_BLOCK)
        centres[start - first : stop - first] = values[start - begin : stop - begin]


def _hash(numbers: Any, seed: int, step: int) -> Any:
    """32-bit hashes of non-negative numbers (int64 tensor, or a Python int), the same on every device.

    Two rounds of the multiply-xorshift mix 16-0x21f0aaad-15-0x735a2d97-15 (C. Wellons, "hash-prospector"); both
    factors are below 2^31, so that int64 products of 32-bit numbers do not overflow.
    """

    def mix(x: Any) -> Any:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 15)

    key = mix((mix(seed & 0xFFFFFFFF) + step) & 0xFFFFFFFF)
    return mix(mix((numbers ^ key) & 0xFFFFFFFF) ^ key)


class _GatherRows(torch.autograd.Function):
    """Rows [n, k] of every rank as [n x world size, k]; the gradient is summed over ranks and scattered back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None, world_size: int) -> Tensor:
        ctx.group, ctx.world_size = group, world_size
        return _all_gather(rows, group, world_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.world_size == 1:
            return gradient, None, None
        own = gradient.new_empty((len(gradient) // ctx.world_size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None, None


def _all_gather(rows: Tensor, group: dist.ProcessGroup | None, world_size: int) -> Tensor:
    if world_size == 1:
        return rows
    gathered = rows.new_empty((len(rows) * world_size, *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered
