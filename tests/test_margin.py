"""The margin head in one process: loss and gradients against plain float64, memory, sampling, state; of every loss."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.plain_head import plain_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from training import losses, margin
from training.margin import MarginHead, identity_range

LOSSES = list(losses.LOSSES)
# What else a head does to the cosines: settings by name.
VARIANTS = {
    "plain": {},
    "filter": {"filter": 0.3},
    "sub-centres": {"sub_centres": 3},
    "both": {"sub_centres": 2, "filter": 0.4, "focal_gamma": 1.0},
}


def in_motion(head, crops=8):
    """The head with running numbers that are not where they begin."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(60):
        cosine, norm = torch.rand(2, crops, generator=generator).to(head.centres.dtype)
        head.loss.observe(cosine, 20 + 20 * norm)
    return head


# --- the loss and its gradients ---------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of centres even for tiny heads."""
    monkeypatch.setitem(margin._BLOCK_ELEMENTS, "cpu", 64)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "settings", [*VARIANTS.values(), {"focal_gamma": 0.5}, {"focal_gamma": 2.0}], ids=lambda settings: str(settings)
)
def test_loss_and_gradients_are_the_plain_ones(small_blocks, loss, settings):
    generator = torch.Generator().manual_seed(1)
    head = in_motion(MarginHead(6, 37, loss=loss, scale=12.0, seed=4, **settings).double())
    features = (torch.randn(10, 6, generator=generator, dtype=torch.float64) * 8).requires_grad_()
    labels = torch.randint(37, (10,), generator=generator)
    value, stats = head(features, labels)
    gradients = torch.autograd.grad(value * 3, [features, head.weight])
    weight = head.weight.detach().clone().requires_grad_()
    expected = plain_loss(head, features, labels, weight)
    expected_gradients = torch.autograd.grad(expected * 3, [features, weight])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for gradient, plain in zip(gradients, expected_gradients, strict=True):
        assert (gradient - plain).abs().max() < 1e-11 * plain.abs().max()
    cosine = (F.normalize(features) @ F.normalize(weight.flatten(0, -2)).T).detach().unflatten(1, (37, -1)).amax(2)
    target = cosine.gather(1, labels[:, None])[:, 0]
    other = cosine.scatter(1, labels[:, None], -2.0).amax(1)
    assert torch.allclose(stats["target_angle"], target.acos().rad2deg())
    assert torch.allclose(stats["other_angle"], other.acos().rad2deg())
    assert stats["top1"].item() == pytest.approx((target > other).double().mean().item())
    assert torch.allclose(stats["feature_norm"], features.detach().norm(dim=1))
    assert not any(tensor.requires_grad for tensor in stats.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_gradcheck(small_blocks, loss, settings):
    """Against differences of the loss itself; where no gradient flows through the norm, it is held."""
    head = MarginHead(3, 8, loss=loss, scale=4.0, **{"focal_gamma": 2.0} | settings).double()
    in_motion(head).eval()
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 20
    labels = torch.tensor([0, 7, 3, 3])

    def value(features, weight):
        return head(features if head.loss.trains_norm else F.normalize(features) * 20, labels)[0]

    assert torch.autograd.gradcheck(
        value, (features.requires_grad_(), head.weight), atol=1e-7, fast_mode=bool(settings)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_two_batches_before_their_backward_passes(loss):
    """The first one's gradient is that of its own moment, although the second has moved the running numbers."""
    head = in_motion(MarginHead(6, 20, loss=loss, scale=8.0).double())
    features, labels = torch.randn(2, 9, 6, dtype=torch.float64) * 20, torch.arange(9)
    kept = head.loss.state_dict()
    kept = {name: value.clone() for name, value in kept.items()}
    alone = torch.autograd.grad(head(features[0], labels)[0], head.weight)[0]
    head.loss.load_state_dict(kept)
    first, second = (head(batch, labels)[0] for batch in features)
    second.backward(retain_graph=True)
    assert torch.equal(torch.autograd.grad(first, head.weight)[0], alone)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(LOSSES),
    st.sampled_from(list(VARIANTS)),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.sampled_from([1.0, 30.0, 64.0, 512.0]),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e18]),
    st.sampled_from(["same", "opposite", "orthogonal", "zero"]),
)
def test_extreme_inputs_stay_finite(loss, variant, gamma, scale, length, place):
    """Crops exactly on, opposite to, or across from their centre, of any length: loss and gradients are finite."""
    head = MarginHead(4, 9, loss=loss, scale=scale, **VARIANTS[variant] | {"focal_gamma": gamma})
    with torch.no_grad():
        centres = torch.eye(4).repeat(3, 1)[:9] * torch.arange(1, 10)[:, None]
        head.weight.copy_(centres if head.sub_centres == 1 else centres[:, None])
    factor = {"same": 1.0, "opposite": -1.0, "orthogonal": 0.0, "zero": 0.0}[place]
    features = torch.eye(4)[:3] * factor
    if place == "orthogonal":
        features[:, 3] = 1.0
    features = (features * length).requires_grad_()
    value, _ = head(features, torch.tensor([0, 1, 2]))
    value.backward()
    assert math.isfinite(value.item())
    assert value.item() >= 0
    if length >= 1e-6:
        assert features.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_loss_keeps_its_precision_when_a_crop_is_nearly_certain():
    """The cross entropy of a sure crop is far below float32's step at the logits' size, and right all the same."""
    head = MarginHead(3, 3, loss="cosface", margin=0.0, scale=20.0)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    value, _ = head(torch.eye(3)[:1] * 5, torch.tensor([0]))
    assert value.item() == pytest.approx(2 * math.exp(-20), rel=1e-5)


def test_a_label_outside_gives_an_infinite_loss():
    """Not a plausible number: the trainer's check for finite losses then stops the run."""
    head = MarginHead(4, 5, loss="arcface", margin=0.5, scale=16.0)
    for label in (5, -1):
        assert head(torch.ones(2, 4), torch.tensor([0, label]))[0].item() == math.inf


# --- precision and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sub_centres", [1, 3])
def test_autocast_keeps_the_target_in_float32(loss, sub_centres):
    """With bfloat16 products the target's angle is exact; loss and gradients differ by bfloat16's rounding only."""
    generator = torch.Generator().manual_seed(3)
    head = MarginHead(64, 300, loss=loss, scale=30.0, sub_centres=sub_centres)
    features = (torch.randn(32, 64, generator=generator) * 4).requires_grad_()
    labels = torch.randint(300, (32,), generator=generator)
    state = head.state_dict()
    full, full_stats = head(features, labels)
    full_gradients = torch.autograd.grad(full, [features, head.weight])
    head.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_stats = head(features, labels)
    low_gradients = torch.autograd.grad(low, [features, head.weight])
    assert low.dtype == torch.float32
    assert torch.equal(full_stats["target_angle"], low_stats["target_angle"])
    assert not torch.equal(full_stats["other_angle"], low_stats["other_angle"])
    assert low.item() == pytest.approx(full.item(), rel=2e-3)
    for exact, rounded in zip(full_gradients, low_gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.9999


def test_bfloat16_features_are_taken_in_float32():
    head = MarginHead(8, 20, loss="arcface", margin=0.5, scale=16.0)
    features = torch.randn(4, 8).bfloat16().requires_grad_()
    value, _ = head(features, torch.arange(4))
    value.backward()
    assert value.dtype == torch.float32
    assert features.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(head(features.detach().float(), torch.arange(4))[0].item(), rel=1e-6)


class _LargeTensors(TorchDispatchMode):
    """Counts the distinct storages of at least `elements` elements that operations return."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.storages, self.keep = elements, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                self.storages.add(tensor.untyped_storage().data_ptr())
                self.keep.append(tensor)
        return result


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "curricularface"}, {"sub_centres": 3, "filter": 0.3}], ids=lambda settings: str(settings)
)
def test_no_second_matrix_of_all_crops_and_identities(monkeypatch, settings):
    """Blocks are the only things of many columns: together the kept cosines are one [N, classes] in bfloat16.

    With sub-centres, the number of the nearest one is kept as a byte.
    """
    crops, identities, block = 32, 2500, 1 << 13
    monkeypatch.setitem(margin._BLOCK_ELEMENTS, "cpu", block)
    head = MarginHead(8, identities, scale=32.0, **{"loss": "arcface"} | settings)
    features = torch.randn(crops, 8, requires_grad=True)
    kept = []
    with (
        _LargeTensors(block + 1) as large,
        torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        value, _ = head(features, torch.randint(identities, (crops,)))
        value.backward()
    shapes = {tuple(tensor.shape) for tensor in large.keep}
    assert shapes <= {head.weight.shape, (identities * head.sub_centres, 8)}, (
        "only the centres' own gradient may be larger than a block"
    )
    cosines = [tensor for tensor in kept if tensor.dtype == torch.bfloat16]
    assert sum(tensor.numel() for tensor in cosines) == crops * identities
    winners = [tensor for tensor in kept if tensor.dtype == torch.uint8]
    assert sum(tensor.numel() for tensor in winners) == (crops * identities if head.sub_centres > 1 else 0)


def test_backward_frees_the_cosines_while_the_loss_is_still_held():
    head = MarginHead(8, 50, loss="arcface", margin=0.5, scale=32.0)
    value, _ = head(torch.randn(4, 8), torch.arange(4))
    value.backward()
    with pytest.raises(RuntimeError, match="freed"):
        value.backward()


@pytest.mark.parametrize(("rate", "variant"), [(1.0, "plain"), (0.3, "both")])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_device(loss, rate, variant):
    """Tensors without values: whatever the host would have to read from the device (.item(), nonzero) raises."""
    with FakeTensorMode():
        settings = VARIANTS[variant] | {"focal_gamma": 2.0}
        head = MarginHead(8, 200, loss=loss, scale=32.0, sample_rate=rate, **settings)
        for _ in range(2):  # accumulated
            features = torch.empty(4, 8, requires_grad=True)
            value, stats = head(features, torch.empty(4, dtype=torch.int64))
            value.backward()
        head.step(0.1)
    assert features.grad.shape == features.shape
    assert {name: tuple(tensor.shape) for name, tensor in stats.items()} == {
        "top1": (),
        "target_angle": (4,),
        "other_angle": (4,),
        "feature_norm": (4,),
    }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sub_centres", [1, 2])
def test_many_steps_learn_separable_identities(loss, sub_centres):
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.Parameter(torch.randn(60, 16, generator=generator))
    labels = torch.arange(60) % 20
    head = MarginHead(16, 20, loss=loss, scale=16.0, sub_centres=sub_centres)
    features = points.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([features, *head.parameters()], lr=1.0, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        result, stats = head(features, labels)
        result.backward()
        optimizer.step()
    assert stats["top1"] == 1
    assert stats["target_angle"].mean() < 40


@pytest.mark.parametrize("loss", LOSSES)
def test_cost_of_a_margin_is_what_an_ignorant_network_pays(loss):
    head = in_motion(MarginHead(64, 50, loss=loss, scale=16.0)).eval()
    with torch.no_grad():
        head.weight.copy_(torch.eye(64)[:50])
    value, _ = head(torch.eye(64)[50:62] * 30, torch.arange(12))  # at right angles to all centres
    penalty = head.loss.penalty(torch.tensor([30.0]))
    penalty = 0.0 if penalty is None else penalty.item()
    cost = head.cost_of_margin(30.0) - penalty
    assert cost > 0
    assert value.item() == pytest.approx(math.log(1 + 49 * math.exp(cost)) + penalty, rel=1e-4)


# --- filter and sub-centres -------------------------------------------------------------------------------------


def test_the_filter_leaves_near_identities_out_and_shows_them():
    head = MarginHead(3, 3, loss="cosface", margin=0.0, scale=10.0, filter=0.4)
    twin = torch.tensor([0.8, 0.6, 0.0])
    with torch.no_grad():
        head.weight.copy_(torch.stack([torch.eye(3)[0], twin, torch.eye(3)[2]]))
    features = torch.eye(3)[:1].clone().requires_grad_()
    value, stats = head(features, torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-5)  # against the third alone
    assert stats["other_angle"].item() == pytest.approx(math.degrees(math.acos(0.8)), rel=1e-5)  # but it is seen
    assert head.weight.grad[1].abs().max() == 0
    # Its own centre is never left out, and with nobody else there is nothing to learn.
    head.filter = 1e-6
    with torch.no_grad():
        head.weight[2].copy_(twin)
    value, stats = head(features, torch.tensor([0]))
    assert value.item() == 0
    assert stats["top1"] == 1


def test_the_nearest_sub_centre_counts_and_learns():
    head = MarginHead(4, 2, loss="arcface", margin=0.3, scale=4.0, sub_centres=2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4).view(2, 2, 4))
    value, stats = head(torch.tensor([[0.1, 1.0, 0.3, 0.2]]), torch.tensor([0]))
    value.backward()
    length = math.sqrt(1.14)
    assert stats["target_angle"].item() == pytest.approx(math.degrees(math.acos(1 / length)), rel=1e-4)
    assert stats["other_angle"].item() == pytest.approx(math.degrees(math.acos(0.3 / length)), rel=1e-4)
    moved = head.weight.grad.abs().amax(2) > 0
    assert moved.tolist() == [[False, True], [True, False]]


def test_equally_near_sub_centres_count_once():
    """As after a start from one mean for all of them."""
    one = MarginHead(8, 30, loss="arcface", scale=16.0)
    many = MarginHead(8, 30, loss="arcface", scale=16.0, sub_centres=3)
    with torch.no_grad():
        many.weight.copy_(one.weight[:, None])
    features, labels = torch.randn(5, 8), torch.arange(5)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            assert many(features, labels)[0].item() == pytest.approx(one(features, labels)[0].item(), rel=1e-6)


# --- AdaFace's statistics ---------------------------------------------------------------------------------------


def test_adaface_statistics_follow_the_norms_in_training_only():
    head = MarginHead(4, 8, loss="adaface", margin=0.4, scale=16.0)
    features = torch.randn(6, 4) * torch.tensor([1.0, 5, 20, 80, 300, 1e-9])[:, None]
    norms = features.norm(dim=1).clamp(1e-3, 100)
    head(features, torch.arange(6))
    assert head.loss.norm_mean.item() == pytest.approx(0.99 * 20 + 0.01 * norms.mean().item(), rel=1e-5)
    assert head.loss.norm_std.item() == pytest.approx(0.99 * 100 + 0.01 * norms.std().item(), rel=1e-5)
    before = head.loss.norm_mean.item()
    head.eval()(features, torch.arange(6))
    assert head.loss.norm_mean.item() == before
    head.train()(features[:1], torch.arange(1))  # one crop has no deviation
    assert math.isfinite(head.loss.norm_std.item())


def test_adaface_gives_blurred_crops_another_margin():
    """Weak features (low norm): margin on the angle, easy first. Strong: margin on the cosine, hard first."""
    head = MarginHead(4, 8, loss="adaface", margin=0.4, scale=16.0)
    head.loss.norm_mean.fill_(20), head.loss.norm_std.fill_(5)
    cosine, norm = torch.tensor(0.5).expand(3), torch.tensor([1.0, 20.0, 100.0])
    angle = math.pi / 3
    expected = [math.cos(angle + 0.4), 0.5 - 0.4, math.cos(angle - 0.4) - 0.8]
    assert head.loss.target(cosine, norm, (0.4,)).tolist() == pytest.approx(expected, abs=1e-3)


def test_curricularface_follows_its_own_centres_cosines():
    head = MarginHead(4, 8, loss="curricularface", scale=16.0)
    features = torch.randn(6, 4)
    _, stats = head(features, torch.arange(6))
    cosine = stats["target_angle"].deg2rad().cos().mean().item()
    assert head.loss.t.item() == pytest.approx(0.01 * cosine, abs=1e-6)
    before = head.loss.t.item()
    head.eval()(features, torch.arange(6))
    assert head.loss.t.item() == before


def test_magface_moves_the_norm_towards_its_bounds():
    """The penalty asks for long features, the margin for short ones where a crop is hard: gradients along the norm."""
    head = MarginHead(8, 30, loss="magface", scale=64.0)
    easy = F.normalize(head.centres[:4]) * torch.tensor([5.0, 30.0, 60.0, 200.0])[:, None]
    features = easy.requires_grad_()
    head(features, torch.arange(4))[0].backward()
    along = (features.grad * F.normalize(features.detach())).sum(1)
    assert along[[0, 3]].abs().max() < 5e-5  # outside [10, 110] nothing pulls
    # Crops on their centre are sure: what is left is the penalty's slope, 35 (1 / 110^2 - 1 / a^2) / 4.
    expected = [35 * (1 / 110**2 - 1 / a**2) / 4 for a in (30.0, 60.0)]
    assert along[1:3].tolist() == pytest.approx(expected, abs=2e-4)


# --- sampling ---------------------------------------------------------------------------------------------------


def sampled_head(rate, identities=400, **settings):
    settings = {"loss": "arcface", "margin": 0.3, "scale": 16.0, "seed": 5} | settings
    return MarginHead(8, identities, sample_rate=rate, **settings)


def batch(identities, crops=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(crops, 8, generator=generator), torch.randint(identities, (crops,), generator=generator)


def drawn_rows(head):
    (rows, _leaf), *others = head._drawn
    assert not others
    return rows[rows < head.last - head.first]


def test_a_step_draws_the_positives_and_a_share_of_the_rest():
    head = sampled_head(0.1, 5000)
    features, labels = batch(5000)
    seen = []
    for _ in range(20):
        head(features, labels)
        rows = drawn_rows(head)
        assert len(rows.unique()) == len(rows)
        assert set(labels.tolist()) <= set(rows.tolist())
        assert 0.08 * 5000 < len(rows) < 0.12 * 5000 + 12
        seen.append(frozenset(rows.tolist()))
        head.step(0.1)
    assert len(set(seen)) == 20
    # Independent draws: in 20 steps nearly (1 - 0.9^20 = 88 %) all are seen, and pairs of steps overlap by chance.
    assert 0.85 < len(frozenset.union(*seen)) / 5000 < 0.91
    assert np.mean([len(seen[i] & seen[i + 1]) for i in range(19)]) == pytest.approx(50 + 12, abs=12)


def test_the_draw_is_a_function_of_seed_and_step():
    features, labels = batch(400)
    one, same, other = sampled_head(0.2), sampled_head(0.2), sampled_head(0.2, seed=6)
    for _ in range(3):
        for head in (one, same, other):
            head(features, labels)
        assert torch.equal(drawn_rows(one), drawn_rows(same))
        assert not torch.equal(drawn_rows(one), drawn_rows(other))
        for head in (one, same, other):
            head.step(0.1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variant", ["plain", "both"])
def test_a_sampled_step_is_sgd_on_the_drawn_rows(loss, variant):
    """Loss, gradients, momentum and decay: those of a plain head that consists of the drawn rows; others untouched."""
    head = sampled_head(0.2, loss=loss, margin=None, **VARIANTS[variant] | {"focal_gamma": 1.0})
    plain = torch.nn.Parameter(head.centres.clone())
    velocity = torch.zeros_like(plain)
    for step in range(4):
        features, labels = batch(400, seed=step)
        features.requires_grad_()
        before = head.centres.clone()
        value, _ = head(features, labels)
        value.backward()
        rows = drawn_rows(head)
        gradient = features.grad
        copy = features.detach().double().requires_grad_()
        leaf = plain.detach()[rows].double().requires_grad_()
        columns = (rows == labels[:, None]).int().argmax(1)
        expected = plain_loss(head, copy, columns, leaf)
        expected.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(gradient, copy.grad.float(), atol=1e-6)
        head.step(0.5, momentum=0.9, weight_decay=0.01, nesterov=True)
        with torch.no_grad():
            slope = (leaf.grad + 0.01 * leaf).float()
            velocity[rows] = 0.9 * velocity[rows] + slope
            plain[rows] -= 0.5 * (slope + 0.9 * velocity[rows])
        assert torch.allclose(head.centres, plain, atol=1e-5)
        changed = (head.centres != before).flatten(1).any(1).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(rows.tolist())
        assert not head.sampled_leaves()


@pytest.mark.parametrize(("nesterov", "variant"), [(True, "plain"), (False, "plain"), (True, "both")])
def test_drawing_everything_is_the_full_head_under_torch_sgd(nesterov, variant):
    full = sampled_head(1.0, **VARIANTS[variant])
    everything = sampled_head(1 - 2**-40, **VARIANTS[variant])  # every hash is below the threshold
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov}
    optimizer = torch.optim.SGD(full.parameters(), lr=0.3, **settings)
    assert not list(everything.parameters())
    for step in range(4):
        features, labels = batch(400, seed=step)
        losses = [head(features, labels)[0] for head in (full, everything)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        full.step(0.3, **settings)
        everything.step(0.3, **settings)
        assert len(everything.centres) == 400
        assert torch.allclose(full.centres, everything.centres, atol=1e-6)


@pytest.mark.parametrize("variant", ["plain", "both"])
def test_drawing_everything_is_the_full_head_under_torch_adamw(variant):
    full = sampled_head(1.0, **VARIANTS[variant])
    everything = sampled_head(1 - 2**-40, optimizer="adamw", **VARIANTS[variant])
    optimizer = torch.optim.AdamW(full.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(5):
        features, labels = batch(400, seed=step)
        for head in (full, everything):
            head(features, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        full.step(0.01)
        everything.step(0.01, weight_decay=0.1)
        # A step is 0.01 however small the gradient, so the rounding of the smallest shows.
        torch.testing.assert_close(everything.centres, full.centres, rtol=0, atol=5e-5)


def test_a_row_under_adamw_knows_only_the_steps_that_drew_it():
    """As torch.optim.AdamW would treat it, were these all the steps there are; and a checkpoint holds all of it."""
    head = sampled_head(0.2, optimizer="adamw")
    watched = 7
    plain = torch.nn.Parameter(head.centres[watched].clone())
    optimizer = torch.optim.AdamW([plain], lr=0.05, weight_decay=0.1)
    drawn = 0
    for step in range(20):
        features, labels = batch(400, seed=step)
        head(features, labels)[0].backward()
        (rows, leaf), *_ = head._drawn
        here = (rows == watched).nonzero()
        if len(here):
            plain.grad = leaf.grad[here[0, 0]].clone()
            optimizer.step()
            drawn += 1
        if step == 11:
            other = sampled_head(0.2, optimizer="adamw")
            state = head.own_state()
            other.load_full_state(state)
            assert state["updates"].shape == (400, 1) and state["squares"].shape == (400, 8)
            assert all(torch.equal(value, state[name]) for name, value in other.own_state().items() if name in state
                       and torch.is_tensor(value))  # fmt: skip
        head.step(0.05, weight_decay=0.1)
        torch.testing.assert_close(head.centres[watched], plain.detach(), rtol=1e-4, atol=1e-6)
    assert 1 < drawn < 12


@pytest.mark.parametrize("variant", ["plain", "sub-centres"])
def test_accumulated_passes_update_each_drawn_row_once(variant):
    """Two backward passes before a step: gradients of a row drawn by both add up, momentum and decay count once."""
    head = sampled_head(0.3, **VARIANTS[variant])
    reference = head.centres.clone()
    total = torch.zeros_like(reference)
    rows = set()
    for seed in (0, 1):
        features, labels = batch(400, seed=seed)
        (head(features, labels)[0] / 2).backward()
    for drawn, leaf in head._drawn:
        real = drawn < 400
        total.index_add_(0, drawn[real], leaf.grad[real])
        rows |= set(drawn[real].tolist())
    head.step(0.1, momentum=0.9, weight_decay=0.05, nesterov=False)
    index = torch.tensor(sorted(rows))
    reference[index] -= 0.1 * (total[index] + 0.05 * reference[index])
    assert torch.allclose(head.centres, reference, atol=1e-6)


def test_accumulated_gradients_are_clipped_and_measured_as_one():
    """Drawing everything, twice before a step: what is clipped and measured is the sum, as for a full head."""
    heads = [sampled_head(1.0), sampled_head(1 - 2**-40)]
    for head in heads:
        for seed in (0, 1):
            features, labels = batch(400, seed=seed)
            (head(features, labels)[0] / 2).backward()
    norms, moved = [], []
    for head in heads:
        tensors = [*head.parameters(), *head.sampled_leaves()]
        norms.append(torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors]).item())
        torch.nn.utils.clip_grad_value_(tensors, 1e-3)
        if not head.sampled:
            torch.optim.SGD(tensors, lr=1.0).step()
        before = sampled_head(1.0).centres
        head.step(1.0, momentum=0.0, weight_decay=0.0, nesterov=False)
        moved.append(before - head.centres)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert (moved[0].abs() > 0.999e-3).float().mean() > 0.1  # the limit was reached
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("rate", "crops"), [(1.0, 16), (0.1, 16), (0.1, 300), (1e-9, 50)])
def test_how_many_centres_compete(rate, crops):
    head = MarginHead(4, 200, loss="arcface", margin=0.5, scale=16.0, sample_rate=rate)
    found = []
    for step in range(200):
        head.steps = step
        labels = torch.randint(0, 200, (crops,), generator=torch.Generator().manual_seed(step))
        weight, _, empty = head._choose(labels)
        found.append(len(weight) if empty is None else int((~empty).sum()))
    assert sum(found) / len(found) == pytest.approx(head.centres_seen(crops), rel=0.05)


def test_gradients_of_a_sampled_head_can_be_clipped_or_dropped():
    head = sampled_head(0.2)
    features, labels = batch(400)
    head(features, labels)[0].backward()
    torch.nn.utils.clip_grad_value_(head.sampled_leaves(), 1e-6)
    assert max(leaf.grad.abs().max().item() for leaf in head.sampled_leaves()) <= 1e-6
    before = head.centres.clone()
    head.zero_grad()
    head.step(0.1)
    assert torch.equal(head.centres, before)
    with torch.no_grad():
        head(features, labels)
    assert not head.sampled_leaves()


def test_a_sampled_head_keeps_one_momentum_row_per_centre_and_no_gradient():
    head = sampled_head(0.1, 1000)
    features, labels = batch(1000)
    head(features, labels)[0].backward()
    sizes = sorted(buffer.numel() for buffer in head.buffers())
    assert sizes == [8 * 1001] * 2
    assert all(buffer.grad is None for buffer in head.buffers())
    assert sum(leaf.grad.numel() for leaf in head.sampled_leaves()) < 0.25 * 8 * 1000


# --- construction and state -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "sphereface"}, "no loss named"),
        ({"margin": (1.0, 0.3)}, "one number"),
        ({"loss": "magface", "margin": 0.4}, "takes 2 numbers"),
        ({"loss": "magface", "margin": (0.4, 4.0)}, r"\[0, pi\)"),
        ({"filter": 1.5}, "filter"),
        ({"filter": math.nan}, "filter"),
        ({"sub_centres": 0}, "sub-centres"),
        ({"sub_centres": 257}, "sub-centres"),
        ({"margin": -0.1}, r"\[0, pi\)"),
        ({"margin": math.nan}, r"\[0, pi\)"),
        ({"loss": "combined", "margin": 0.5}, "3 numbers"),
        ({"loss": "combined", "margin": (0.0, 0.5, 0.0)}, "m1 > 0"),
        ({"loss": "combined", "margin": (1.0, math.nan, 0.0)}, "m1 > 0"),
        ({"sample_rate": 0.0}, "sample rate"),
        ({"sample_rate": 1.5}, "sample rate"),
        ({"focal_gamma": -1.0}, "gamma"),
        ({"world_size": 11}, "cannot be split over 11 ranks"),
        ({"rank": 1}, "cannot be split"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    settings = {"loss": "arcface", "margin": 0.5, "scale": 64.0} | change
    with pytest.raises(ValueError, match=message):
        MarginHead(8, 10, **settings)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_identities_are_split_evenly_and_completely(identities, world_size):
    ranges = [identity_range(identities, rank, world_size) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == identities
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sub_centres", [1, 3])
def test_initial_centres_do_not_depend_on_the_split(sub_centres):
    settings = {"loss": "arcface", "margin": 0.5, "scale": 64.0, "seed": 9, "sub_centres": sub_centres}
    whole = MarginHead(4, 2500, **settings).centres
    parts = [MarginHead(4, 2500, rank=rank, world_size=3, **settings).centres for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.std().item() == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(whole[:1024], whole[1024:2048])
    other = MarginHead(4, 2500, **(settings | {"seed": 10})).centres
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("rate", "variant"), [(1.0, "plain"), (0.3, "plain"), (1.0, "both"), (0.3, "both")])
def test_state_goes_on_where_it_stopped(loss, rate, variant):
    def steps(head, first, last):
        for step in range(first, last):
            features, labels = batch(400, seed=step)
            value, _ = head(features, labels)
            value.backward()
            if not head.sampled:
                with torch.no_grad():
                    head.weight -= 0.1 * head.weight.grad
            head.step(0.1)
            head.zero_grad()
        return value

    settings = {"loss": loss, "margin": None} | VARIANTS[variant]
    unbroken = sampled_head(rate, **settings)
    steps(unbroken, 0, 6)
    stopped = sampled_head(rate, **settings)
    steps(stopped, 0, 3)
    state = stopped.own_state()
    assert state["centres"].shape == unbroken.centres.shape
    resumed = sampled_head(rate, **settings | {"seed": 5})
    with torch.no_grad():
        resumed.centres.zero_()
    resumed.load_full_state(state)
    steps(resumed, 3, 6)
    assert torch.equal(resumed.centres, unbroken.centres)
    assert resumed.steps == 6
    for name, value in unbroken.loss.state_dict().items():
        assert torch.equal(resumed.loss.state_dict()[name], value) and name in state


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(400, 8\), not \(300, 8\)"):
        sampled_head(1.0, 300).load_full_state(sampled_head(1.0).own_state())
    with pytest.raises(ValueError, match=r"\(400, 8\), not \(400, 3, 8\)"):
        sampled_head(1.0, sub_centres=3).load_full_state(sampled_head(1.0).own_state())


def test_state_does_not_alias_the_head():
    head = sampled_head(0.5)
    state = head.own_state()
    features, labels = batch(400)
    head(features, labels)[0].backward()
    head.step(1.0)
    assert not torch.equal(state["centres"], head.centres)
