"""The head on 2 and 3 gloo processes against one process: the same data and global batch give the same training."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.losses import LOSSES
from training.margin import MarginHead

CROPS, INPUTS, SIZE, STEPS = 12, 10, 8, 3
# name -> identities and settings of the head; 101 and 7 are not divisible by 2 or 3.
SCENARIOS = {
    **{loss: (101, {"loss": loss}) for loss in LOSSES},
    **{f"sampled {loss}": (101, {"loss": loss, "sample_rate": 0.3}) for loss in LOSSES},
    "combined, focal": (101, {"loss": "combined", "focal_gamma": 2.0}),
    "few identities": (7, {"loss": "cosface", "margin": 0.2}),
    "one in ten, focal": (101, {"loss": "adaface", "sample_rate": 0.1, "focal_gamma": 1.0}),
    "all drawn": (101, {"loss": "arcface", "sample_rate": 1 - 2**-40}),
    "filter": (101, {"loss": "arcface", "filter": 0.3}),
    "sub-centres": (101, {"loss": "arcface", "sub_centres": 3}),
    "sampled, adamw": (101, {"loss": "arcface", "sample_rate": 0.3, "optimizer": "adamw"}),
    "all at once": (101, {"loss": "curricularface", "filter": 0.3, "sub_centres": 2, "sample_rate": 0.3}),
}


def make_head(name, rank, world_size):
    identities, settings = SCENARIOS[name]
    return MarginHead(SIZE, identities, scale=16.0, rank=rank, world_size=world_size, seed=3, **settings)


def put_together(rows):
    """A tensor of this rank's identities as one of all."""
    if not dist.is_initialized():
        return rows.detach().clone()
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.detach())
    return torch.cat(parts)


def whole_state(head):
    state = head.own_state()
    return state | {
        name: put_together(state[name]) for name in ("centres", "velocity", "squares", "updates") if name in state
    }


def train(name, rank, world_size):
    """A few steps of a linear network and the head on this rank's part of each batch; what can be compared after."""
    torch.manual_seed(0)
    network = nn.Linear(INPUTS, SIZE)
    head = make_head(name, rank, world_size)
    optimizer = torch.optim.SGD(
        [*network.parameters(), *head.parameters()], lr=0.5, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    generator = torch.Generator().manual_seed(1)
    part = slice(rank * CROPS // world_size, (rank + 1) * CROPS // world_size)
    losses, feature_gradients = [], []
    for _ in range(STEPS):
        crops = torch.randn(CROPS, INPUTS, generator=generator)
        labels = torch.randint(head.identities, (CROPS,), generator=generator)
        features = network(crops[part])
        features.retain_grad()
        loss, stats = head(features, labels[part])
        loss.backward()
        if world_size > 1:
            for parameter in network.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        head.step(0.5, momentum=0.9, weight_decay=5e-4, nesterov=True)
        losses.append(loss.detach())
        feature_gradients.append(features.grad)
        optimizer.zero_grad()
        head.zero_grad()
    momentum = optimizer.state[head.weight]["momentum_buffer"] if not head.sampled else head.centres
    gathered = put_together(momentum)
    assert torch.equal(head.own_rows(gathered), momentum)
    return {
        "losses": torch.stack(losses),
        "features": torch.stack(feature_gradients),
        "stats": stats,
        "network": network.weight.detach(),
        "head": whole_state(head),
        "momentum": gathered,
    }


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {name: train(name, rank, world_size) for name in SCENARIOS}
    single = torch.load(folder / "single.pt")
    for name in SCENARIOS:  # a state of one process, re-split here and put together again
        head = make_head(name, rank, world_size)
        head.load_full_state(single[name])
        results[name]["reloaded"] = whole_state(head)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def single():
    return {name: train(name, 0, 1) for name in SCENARIOS}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, single, tmp_path_factory):
    """What each of 2, and of 3, processes got from all scenarios (one start of the processes for all)."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({name: result["head"] for name, result in single.items()}, folder / "single.pt")
    mp.spawn(run_rank, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_close(one, other, tolerance=1e-5):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * max(1, other.abs().max())


@pytest.mark.parametrize("name", SCENARIOS)
def test_several_processes_train_like_one(single, ranks, name):
    expected, first = single[name], ranks[0][name]
    for result in ranks:
        assert torch.equal(result[name]["losses"], first["losses"]), "the loss is one number, the same on every rank"
        assert torch.equal(result[name]["network"], first["network"])
        for key, value in result[name]["stats"].items():
            assert torch.equal(value, first["stats"][key])
            assert_close(value, expected["stats"][key], 1e-4)
    assert_close(first["losses"], expected["losses"])
    assert_close(torch.cat([result[name]["features"] for result in ranks], dim=1), expected["features"])
    assert_close(first["network"], expected["network"])
    assert first["head"].keys() == expected["head"].keys()
    assert first["head"]["steps"] == STEPS
    for key in first["head"].keys() - {"steps", "identities"}:
        assert_close(first["head"][key], expected["head"][key])
    assert_close(first["momentum"], expected["momentum"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_state_of_one_process_is_split_and_joined_unchanged(single, ranks, name):
    state, again = single[name]["head"], ranks[0][name]["reloaded"]
    assert state.keys() == again.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(again[key])) for key in state)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_state_of_several_processes_loads_on_one(ranks, name):
    state = ranks[0][name]["head"]
    head = make_head(name, 0, 1)
    head.load_full_state(state)
    assert torch.equal(head.centres, state["centres"])
    assert head.steps == STEPS


def test_drawing_all_equals_the_full_head(ranks, single):
    """Sample rate 1 is the full soft-max, and drawing everything below it comes to the same on several ranks."""
    assert_close(ranks[0]["all drawn"]["losses"], single["arcface"]["losses"])
    assert_close(ranks[0]["all drawn"]["features"], ranks[0]["arcface"]["features"])
