"""Focal loss, per sample: mean over the batch of (1 - p)^gamma * cross entropy, p being the target's probability.

Lin et al., ICCV 2017, equation 4. The reference implementation of this project's recipe departs from the paper: it
takes the *mean* cross entropy of the batch first, p = exp(-mean), and multiplies that mean by (1 - p)^gamma, so that
easy and hard crops of a batch all get the same factor. Here each crop has its own, which is what focal loss is for;
loss values and gradients therefore differ from the reference's for the same gamma > 0 (gamma = 0 agrees).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def focal_factor(entropy: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(1 - p)^gamma, and the derivative of (1 - p)^gamma * entropy with respect to the entropy; p = exp(-entropy).

    `entropy` >= 0, any shape. Exact near p = 1 (expm1) and finite for every gamma >= 0.
    """
    if gamma == 0:
        return torch.ones_like(entropy), torch.ones_like(entropy)
    miss = -torch.expm1(-entropy)  # 1 - p
    factor = miss**gamma
    # entropy / (1 - p) tends to 1 where both vanish, and p * entropy to 0 where the entropy is infinite.
    ratio = torch.where(miss > 0, entropy / miss, 1.0)
    slope = torch.where(entropy.isinf(), 0.0, torch.exp(-entropy) * ratio)
    return factor, factor * (1 + gamma * slope)


class FocalLoss(nn.Module):
    """Mean over the batch of the per-sample focal loss of logits [N, C] and target classes int64 [N]."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"focal gamma {gamma} is negative")
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss in float32 at least; differentiable once and more."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        entropy = F.cross_entropy(logits, target, reduction="none")
        return (focal_factor(entropy, self.gamma)[0] * entropy).mean()
