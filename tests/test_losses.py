"""The losses by themselves: the margin and its derivatives against 60-digit arithmetic, and what each class states."""

import math
import re
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import losses
from training.losses import LOSSES


def margin_cosine(cosine, m1, m2, m3):
    """Value and derivative by the cosine."""
    cosine = cosine.requires_grad_()
    value = losses.margin_cosine(cosine, m1, m2, m3)
    return value.detach(), torch.autograd.grad(value.sum(), cosine)[0]


def exact_value(cosine, m1, m2, m3):
    """The value by 60-digit arithmetic, without the branches' shortcuts."""
    total = m1 * mpmath.acos(cosine) + m2
    if total > mpmath.pi:
        turn = min(max((mpmath.pi - m2) / m1, 0), mpmath.pi)
        return cosine - max(m2 * mpmath.sin(m2), 1 + mpmath.cos(turn)) - m3
    return (1 if total < 0 else mpmath.cos(total)) - m3


def exact_margin(cosine, m1, m2, m3):
    """Value and derivative."""
    with mpmath.workdps(60):
        cosine, m1, m2, m3 = (mpmath.mpf(float(x)) for x in (cosine, m1, m2, m3))
        angle = mpmath.acos(cosine)
        total = m1 * angle + m2
        value = float(exact_value(cosine, m1, m2, m3))
        if total > mpmath.pi or total < 0:
            return value, float(total > 0)
        return value, float(m1 * mpmath.sin(total) / mpmath.sin(angle)) if abs(cosine) < 1 else None


floats32 = st.floats(-1, 1, width=32)


@settings(max_examples=200, deadline=None)
@given(floats32, st.floats(0, 1.5))
def test_arcface_is_exact_for_every_float32(cosine, m):
    value, derivative = margin_cosine(torch.tensor([cosine], dtype=torch.float32), 1.0, m, 0.0)
    expected, slope = exact_margin(cosine, 1, m, 0)
    if abs(math.acos(cosine) + m - math.pi) < 1e-12:
        return  # which branch is a matter of the last bit
    assert value.item() == pytest.approx(expected, abs=1e-12)
    if slope is not None:
        assert derivative.item() == pytest.approx(slope, rel=1e-6, abs=1e-6)
    assert math.isfinite(derivative.item())


@settings(max_examples=200, deadline=None)
@given(floats32, st.floats(0.5, 3), st.floats(-1.5, 1.5), st.floats(0, 1))
def test_any_margins_are_exact(cosine, m1, m2, m3):
    value, derivative = margin_cosine(torch.tensor([cosine], dtype=torch.float32), m1, m2, m3)
    angle = m1 * math.acos(cosine) + m2
    if min(abs(angle - math.pi), abs(angle)) < 1e-12:
        return
    expected, slope = exact_margin(cosine, m1, m2, m3)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    if slope is not None:
        assert derivative.item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 0.6, 1.0])
def test_ends_of_the_range(dtype, m):
    """cos = +-1 exactly, and a little beyond by rounding: the value is right, the derivative finite."""
    ends = torch.tensor([1.0, -1.0, 1 + 2**-7, -1 - 2**-7], dtype=dtype)
    value, derivative = margin_cosine(ends, 1.0, m, 0.0)
    nearest = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    below = margin_cosine(nearest, 1.0, m, 0.0)[1].item()
    beyond = -1 - m * math.sin(m)
    assert value.tolist() == pytest.approx([math.cos(m), beyond, math.cos(m), beyond], abs=1e-12)
    assert derivative[[0, 2]].tolist() == pytest.approx([below] * 2, rel=0.02)
    assert derivative[[1, 3]].tolist() == pytest.approx([1.0, 1.0])


@settings(max_examples=200, deadline=None)
@given(st.lists(floats32, min_size=2, max_size=2, unique=True), st.floats(0.5, 4), st.floats(0, 1.5))
def test_a_larger_cosine_never_gives_a_smaller_logit(pair, m1, m2):
    value, derivative = margin_cosine(torch.tensor(sorted(pair), dtype=torch.float64), m1, m2, 0.0)
    assert value[1] >= value[0] - 1e-12
    assert (derivative >= 0).all()


def test_zero_margin_is_the_cosine():
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64)
    value, derivative = margin_cosine(cosine, 1.0, 0.0, 0.0)
    assert torch.allclose(value, cosine, atol=1e-15)
    assert torch.allclose(derivative, torch.ones_like(cosine), atol=1e-7)


def test_adaface_agrees_with_its_official_formula():
    """Official code: cos(clip(theta - m z, eps, pi - eps)) - m (1 + z), with cosines clipped at 1 - 1e-3."""
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(500, generator=generator, dtype=torch.float64) * 1.9 - 0.95
    z = torch.rand(500, generator=generator, dtype=torch.float64) * 2 - 1
    m = 0.4
    official = (cosine.acos() - m * z).clamp(1e-3, math.pi - 1e-3)
    inside = cosine.acos() - m * z < math.pi
    value, _ = margin_cosine(cosine, 1.0, -m * z, m + m * z)
    assert torch.allclose(value[inside], (official.cos() - m - m * z)[inside], atol=1e-6)
    assert (value[~inside] <= (official.cos() - m - m * z)[~inside] + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.floats(-0.999, 0.999), st.floats(0.5, 3), st.floats(-1.5, 3), st.floats(0, 1))
def test_derivatives_by_the_margins_are_exact(cosine, m1, m2, m3):
    """Against differences of 60-digit values; with them gradients reach a margin that depends on the feature."""
    step = 1e-20
    angle = m1 * math.acos(cosine) + m2
    turn = (math.pi - m2) / m1
    kinks = (angle - math.pi, angle, turn, turn - math.pi, m2 * math.sin(m2) - 1 - math.cos(min(max(turn, 0), math.pi)))
    if min(map(abs, kinks)) < 1e-9:
        return
    margins = torch.tensor([[m1], [m2], [m3]], dtype=torch.float64, requires_grad=True)
    value = losses.margin_cosine(torch.tensor([cosine], dtype=torch.float64), *margins)
    slopes = torch.autograd.grad(value.sum(), margins)[0][:, 0].tolist()
    for index, slope in enumerate(slopes):
        with mpmath.workdps(60):
            numbers = [mpmath.mpf(m) for m in (m1, m2, m3)]
            low = exact_value(cosine, *numbers)
            numbers[index] += step
            expected = float((exact_value(cosine, *numbers) - low) / step)
        assert slope == pytest.approx(expected, rel=1e-9, abs=1e-9)


# --- what each loss states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_states_all_that_is_asked_for(name):
    loss = LOSSES[name]()
    assert loss.name() == name
    assert loss.__doc__ and loss.__doc__ != losses.Loss.__doc__, "the first line of the docstring is its help"
    margin = loss.numbers(None)
    loss.check(margin)
    with pytest.raises(ValueError, match=f"{name} takes"):
        loss.numbers((*margin, 0.1))
    assert loss.grown(margin, 1.0) == pytest.approx(margin)
    cosine, norm = torch.linspace(-1, 1, 101), torch.linspace(0, 200, 101)
    value = loss.target(cosine, norm, margin)
    assert value.shape == cosine.shape and value.isfinite().all()
    assert (value <= cosine + 1e-6).all(), "a margin takes from the own cosine"
    begun = loss.target(cosine, torch.full((101,), 20.0), loss.grown(margin, 0.0))
    torch.testing.assert_close(begun.float(), cosine, atol=1e-6, rtol=0)
    penalty = loss.penalty(norm)
    assert penalty is None or (penalty.shape == norm.shape and penalty.isfinite().all() and (penalty >= 0).all())
    assert penalty is None or loss.trains_norm, "a penalty without a gradient changes nothing"


def manual():
    return (Path(losses.__file__).parent.parent / "docs" / "losses.md").read_text()


def test_the_loss_of_the_manual_is_one(monkeypatch):
    room = vars(losses) | {}
    exec(re.search(r"```python\n(class .*?)\n```", manual(), re.S)[1], room)
    monkeypatch.setitem(LOSSES, "growface", room["GrowFace"])
    test_a_loss_states_all_that_is_asked_for("growface")
    test_what_becomes_of_other_identities("growface")


@pytest.mark.parametrize("name", LOSSES)
def test_the_manual_has_every_loss(name):
    row = next((line for line in manual().splitlines() if line.startswith(f"| `{name}` |")), None)
    assert row is not None, f"docs/losses.md has no row for {name}"
    assert row.split("|")[4].strip() == losses.text_of(LOSSES[name].default_margin)


@pytest.mark.parametrize("name", LOSSES)
def test_what_becomes_of_other_identities(name):
    """Values and derivatives go together, nothing is below -2, and what is left out stays out."""
    loss = LOSSES[name]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        loss.observe(torch.rand(8, generator=generator), 20 + torch.rand(8, generator=generator))
    cosine = torch.linspace(-1, 1, 201, dtype=torch.float64).repeat(3, 1).requires_grad_()
    target = torch.tensor([[-1.2], [0.1], [0.7]], dtype=torch.float64)
    value = loss.others(cosine.clone(), target)
    slope = torch.autograd.grad(value.sum(), cosine)[0]
    torch.testing.assert_close(loss.others_derivative(cosine.detach(), target), slope)
    assert loss.reshapes_others == (not torch.equal(value, cosine))
    assert value.min() >= -2
    left_out = torch.full((3, 2), -math.inf)
    assert (loss.others(left_out.clone(), target.float()) == -math.inf).all()
    assert loss.others_derivative(left_out, target.float()).isfinite().all()


def test_curricularface_agrees_with_its_official_formula():
    """Hard ones, cosines above cos(theta + m), become c (t + c)."""
    loss = LOSSES["curricularface"]()
    loss.t.fill_(0.3)
    found = loss.others(torch.tensor([[-0.5, 0.2, 0.6]]), torch.tensor([[0.1]]))
    assert found.tolist()[0] == pytest.approx([-0.5, 0.2 * 0.5, 0.6 * 0.9])
    target = loss.target(torch.tensor([0.4]), torch.ones(1), (0.5,))
    assert target.item() == pytest.approx(math.cos(math.acos(0.4) + 0.5), abs=1e-6)


def test_magface_agrees_with_its_official_formula():
    """m(a) = 0.45 + 0.35 / 100 (a - 10), g(a) = a / 110^2 + 1 / a, a clamped to [10, 110]."""
    loss = LOSSES["magface"]()
    norm = torch.tensor([1.0, 10, 60, 110, 500])
    found = loss.target(torch.full((5,), 0.5), norm, (0.45, 0.8))
    margins = [0.45, 0.45, 0.625, 0.8, 0.8]
    assert found.tolist() == pytest.approx([math.cos(math.pi / 3 + m) for m in margins], abs=1e-7)
    a = [10, 10, 60, 110, 110]
    assert loss.penalty(norm).tolist() == pytest.approx([35 * (x / 110**2 + 1 / x) for x in a], rel=1e-6)
