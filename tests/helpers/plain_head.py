"""The head's loss as a textbook would write it: one-hot matrix, acos, cross entropy, differentiated by autograd."""

import math

import torch
import torch.nn.functional as F


def angular(cosine, m1, m2, m3):
    """cos(m1 theta + m2) - m3 with the continuation that `losses.margin_cosine` describes."""
    m1, m2, m3 = (torch.as_tensor(m, dtype=cosine.dtype) for m in (m1, m2, m3))
    angle = m1 * cosine.acos() + m2
    drop = torch.maximum(m2 * m2.sin(), 1 + ((math.pi - m2) / m1).clamp(0, math.pi).cos())
    inside = torch.where(angle < 0, torch.ones_like(angle), angle.cos())
    return torch.where(angle > math.pi, cosine - drop, inside) - m3


def adaface(head, cosine, norm):
    loss, (m,) = head.loss, head.margin
    quality = ((norm.clamp(1e-3, 100) - loss.norm_mean) / (loss.norm_std + 1e-3) * 0.333).clamp(-1, 1)
    return angular(cosine, 1.0, -m * quality, m * (1 + quality))


def magface(head, cosine, norm):
    lower, upper = head.margin
    norm = norm.clamp(10, 110)
    return angular(cosine, 1.0, (upper - lower) / (110 - 10) * (norm - 10) + lower, 0.0)


# By the papers. A loss that is not here is taken at its own word for the values, and its derivatives are checked.
TARGETS = {
    "arcface": lambda head, cosine, norm: angular(cosine, 1.0, head.margin[0], 0.0),
    "cosface": lambda head, cosine, norm: cosine - head.margin[0],
    "combined": lambda head, cosine, norm: angular(cosine, *head.margin),
    "adaface": adaface,
    "curricularface": lambda head, cosine, norm: angular(cosine, 1.0, head.margin[0], 0.0),
    "magface": magface,
}
OTHERS = {
    "curricularface": lambda head, cosine, target: torch.where(
        cosine > target, cosine * (head.loss.t + cosine), cosine
    ),
}
PENALTIES = {"magface": lambda norm: 35 * (norm.clamp(10, 110) / 110**2 + 1 / norm.clamp(10, 110))}


def plain_loss(head, features, labels, weight):
    """The mean loss of features [N, D] with labels [N] and centres `weight` [S, D] or [S, sub-centres, D]."""
    norm = features.norm(dim=1)
    norm = norm if head.loss.trains_norm else norm.detach()
    cosine = F.normalize(features) @ F.normalize(weight.flatten(0, -2)).T
    cosine = cosine.unflatten(1, (len(weight), -1)).amax(2)
    name = head.loss.name()
    target = cosine.gather(1, labels[:, None])[:, 0]
    own = TARGETS[name](head, target, norm) if name in TARGETS else head.loss.target(target, norm, head.margin)
    limit = own.detach()[:, None]
    others = OTHERS[name](head, cosine, limit) if name in OTHERS else head.loss.others(cosine.clone(), limit)
    if head.filter:
        others = others.masked_fill(cosine > head.filter, -math.inf)
    logits = head.scale * torch.where(F.one_hot(labels, len(weight)).bool(), own[:, None], others)
    entropy = F.cross_entropy(logits, labels, reduction="none")
    loss = (1 - torch.exp(-entropy)) ** head.focal_gamma * entropy
    penalty = PENALTIES[name](norm) if name in PENALTIES else head.loss.penalty(norm)
    return (loss if penalty is None else loss + penalty).mean()
