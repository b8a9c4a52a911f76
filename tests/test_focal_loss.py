"""Focal loss per sample, against the paper's formula in high precision, and where the reference differs."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_loss import FocalLoss, focal_factor


def test_it_is_the_mean_of_each_samples_focal_loss():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    probability = logits.softmax(1)[torch.arange(8), target]
    expected = ((1 - probability) ** 2 * -probability.log()).mean()
    assert FocalLoss(2.0)(logits, target).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_reference_weighs_the_batch_mean_instead():
    """One easy and one hard sample: per sample the easy one vanishes; the batch factor would keep half of it."""
    logits = torch.tensor([[8.0, 0.0], [-1.0, 0.0]])
    target = torch.tensor([0, 0])
    entropy = F.cross_entropy(logits, target, reduction="none")
    mean = entropy.mean()
    batch_factor = (1 - torch.exp(-mean)) ** 2 * mean
    ours = FocalLoss(2.0)(logits, target)
    hard = entropy[1]
    assert ours.item() == pytest.approx(((1 - torch.exp(-hard)) ** 2 * hard / 2).item(), rel=1e-4)
    assert abs(ours - batch_factor) > 0.1
    assert FocalLoss(0.0)(logits, target).item() == pytest.approx(mean.item())


@settings(max_examples=150, deadline=None)
@given(st.floats(0, 700), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 5.0]))
def test_factor_and_derivative_are_exact(entropy, gamma):
    factor, derivative = focal_factor(torch.tensor(entropy, dtype=torch.float64), gamma)
    with mpmath.workdps(400):
        x = mpmath.mpf(entropy)
        p = mpmath.exp(-x)
        if x == 0:
            expected, slope = mpmath.mpf(gamma == 0), mpmath.mpf(gamma == 0)
        else:
            expected = (1 - p) ** gamma
            slope = expected + gamma * x * p * (1 - p) ** (gamma - 1)
    assert factor.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-300)
    assert derivative.item() == pytest.approx(float(slope), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extremes_are_finite(gamma):
    entropy = torch.tensor([0.0, 1e-45, 1e-38, 88.0, 1e4, math.inf])
    factor, derivative = focal_factor(entropy, gamma)
    assert factor.isfinite().all()
    assert derivative.isfinite().all()
    assert factor[-1] == 1 and derivative[-1] == 1


def test_gradcheck_and_low_precision():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda x: FocalLoss(1.5)(x, target), (logits,))
    low = FocalLoss(2.0)(logits.detach().bfloat16(), target)
    assert low.dtype == torch.float32


def test_negative_gamma_is_refused():
    with pytest.raises(ValueError, match="negative"):
        FocalLoss(-1)
