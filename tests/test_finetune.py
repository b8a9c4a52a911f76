"""Fine-tuning: where network and head begin, what stays frozen, and that restarts and ranks change nothing of it."""

import json
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers.training import (
    SmallNetwork,
    assert_same_state,
    finish,
    load,
    options,
    record_set,
    start,
    tensors,
    train_main,
)
from torch import nn

import config
import models
import train
from data_gen import decode_crop
from embedding import Embedder, normalise
from formats import crop_sets, embeddings
from models import NETWORKS, build_network
from networks.catalogue import RELEASED
from options import parse
from training import distributed, finetune
from training.distributed import World
from training.margin import CENTRE_STD, MarginHead
from utils import InputError

ALONE = World(0, 1, torch.device("cpu"))
IDENTITIES, EACH = 6, 4


class Tunable(SmallNetwork):
    """A small network that is known by its keys, as every true one is."""

    feeding = RELEASED
    stages = (("0", "1", "2"), ("5",))

    def __init__(self, embedding_size, recompute=False, stem=64):
        super().__init__(embedding_size)
        self[3] = nn.Dropout(0.0)  # what is dropped depends on the rank

    @classmethod
    def settings_of(cls, state):
        return {"embedding_size": len(state["6.bias"]), "stem": 64} if "6.bias" in state else None


@pytest.fixture(autouse=True)
def _tunable(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "mobilefacenet", Tunable)


def tune_main(line):
    """train.py with this command line and the small network as `mfn`."""
    models.FAMILIES["mobilefacenet"] = Tunable
    return train_main(line, small=False)


def tune(line, output, size=1):
    output.unlink(missing_ok=True)
    codes = finish(start(tune_main, line, output=output, size=size))
    return codes[0], output.read_text()


def small(size=16, seed=3):
    torch.manual_seed(seed)
    network = build_network("mfn", embedding_size=size)
    with torch.no_grad():
        network(torch.randn(8, 3, 112, 112))
    return network


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return record_set(tmp_path_factory.mktemp("crops"), IDENTITIES, EACH)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "begin.pt"
    torch.save(small().state_dict(), path)
    return path


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_begins_with_the_files_weights(weights, tmp_path):
    network = small(seed=4)
    record = finetune.load_weights(network, str(weights), "mfn", 16)
    assert record["network"] == "mfn" and record["file"] == str(weights) and len(record["sha256"]) == 64
    for key, value in torch.load(weights, weights_only=True).items():
        assert torch.equal(network.state_dict()[key], value)
    torch.save({f"module.{key}": value for key, value in small().state_dict().items()}, tmp_path / "parallel.pt")
    finetune.load_weights(network, str(tmp_path / "parallel.pt"), "mfn", 16)


def test_weights_that_do_not_fit_say_what_would(tmp_path, monkeypatch):
    monkeypatch.undo()  # true networks here
    torch.save(build_network("mfn", embedding_size=8).state_dict(), tmp_path / "mfn.pt")
    with pytest.raises(InputError, match=r"mfn\.pt: holds mfn, not mbf; give --network mfn"):
        finetune.load_weights(build_network("mbf", embedding_size=8), str(tmp_path / "mfn.pt"), "mbf", 8)
    with pytest.raises(InputError, match=r"mfn\.pt: its embedding has 8 dimensions, not 16; give --embedding-size 8"):
        finetune.load_weights(build_network("mfn", embedding_size=16), str(tmp_path / "mfn.pt"), "mfn", 16)
    torch.save(build_network("r18", False, embedding_size=8).state_dict(), tmp_path / "r18.pt")
    with pytest.raises(InputError, match=r"its r18 is without squeeze-and-excitation; give --no-use-se"):
        finetune.load_weights(build_network("r18", embedding_size=8), str(tmp_path / "r18.pt"), "r18", 8)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"--init .*other\.pt: not the weights"):
        finetune.load_weights(small(), str(tmp_path / "other.pt"), "mfn", 8)
    with pytest.raises(InputError, match=r"--init .*net\.onnx: is ONNX, which is not trained"):
        finetune.load_weights(small(), str(tmp_path / "net.onnx"), "mfn", 8)
    torch.save(torch.zeros(2), tmp_path / "one.pt")
    with pytest.raises(InputError, match=r"one\.pt: holds Tensor, not a dictionary of weights"):
        finetune.load_weights(small(), str(tmp_path / "one.pt"), "mfn", 8)
    state = small().state_dict()
    key = next(iter(state))
    torch.save(state | {key: state[key] * torch.nan}, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=rf"--init .*broken\.pt: {re.escape(key)} is not finite"):
        finetune.load_weights(small(), str(tmp_path / "broken.pt"), "mfn", 16)


# --- the head --------------------------------------------------------------------------------------------------------


def means_by_hand(network, crops, left_out=()):
    embedder = Embedder.from_network(network, "cpu")
    rows = [normalise(embedder.features(decode_crop(crops.read(index)[0])[None]))[0] for index in range(len(crops))]
    means = []
    for identity in range(crops.identities):
        own = [rows[index] for index in np.flatnonzero(crops.labels == identity) if index not in left_out]
        means.append(np.mean(own, axis=0) if own else np.zeros_like(rows[0]))
    return np.stack(means)


def a_head(**settings):
    return MarginHead(16, IDENTITIES, loss="arcface", scale=16.0, **settings)


def begin(head, network, crops, folder, world=ALONE, **key):
    finetune.begin_with_means(head, network, crops, key, folder, world, skip=True)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_centres_begin_in_the_direction_of_the_means(crops, tmp_path, sample_rate):
    data = crop_sets.open_training_set(crops)
    network = small()
    head = a_head(sample_rate=sample_rate)
    begin(head, network, data, tmp_path)
    means = means_by_hand(network, data)
    centres = head.centres.numpy()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), CENTRE_STD * 4, rtol=1e-5)
    cosines = (normalise(centres) * normalise(means)).sum(axis=1)
    assert cosines.min() > 1 - 1e-5
    assert network.training  # as it was
    assert sorted(path.name[:10] for path in tmp_path.iterdir()) == ["init-embed", "init-means"]
    finetune.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_sub_centres_begin_near_the_mean_and_apart(crops, tmp_path):
    data = crop_sets.open_training_set(crops)
    head = a_head(sub_centres=3)
    begin(head, small(), data, tmp_path)
    unit = nn.functional.normalize(head.centres, dim=-1)
    means = torch.from_numpy(normalise(means_by_hand(small(), data))).float()
    cosines = torch.einsum("nkd,nd->nk", unit, means)
    assert cosines[:, 0].min() > 1 - 1e-5
    assert cosines[:, 1:].min() > 0.98 and cosines[:, 1:].max() < 1 - 1e-4
    assert (unit[:, 1] - unit[:, 2]).norm(dim=1).min() > 0.01


def test_crops_that_cannot_be_read_do_not_count(crops, tmp_path):
    data = crop_sets.open_training_set(crops)

    class Damaged:
        labels, identities, name = data.labels, data.identities, "damaged"
        describe = staticmethod(lambda index: f"damaged {index}")

        def __len__(self):
            return len(data)

        def read(self, index):
            return (b"no picture", int(self.labels[index])) if index in (0, *range(4, 8)) else data.read(index)

    head, network = a_head(), small()
    random_one = head.centres[1].clone()
    begin(head, network, Damaged(), tmp_path)
    means = means_by_hand(network, data, left_out=(0, *range(4, 8)))
    assert torch.equal(head.centres[1], random_one)  # nothing is known of this identity
    others = [0, 2, 3, 4, 5]
    assert (normalise(head.centres[others].numpy()) * normalise(means[others])).sum(axis=1).min() > 1 - 1e-5
    with pytest.raises(InputError, match="damaged"):
        finetune.begin_with_means(head, network, Damaged(), {"other": 1}, tmp_path, ALONE, skip=False)


def test_a_network_that_knows_nobody_is_no_beginning(crops, tmp_path):
    """Its weights are finite, its embeddings are not."""
    network = small()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_var.fill_(-1.0)
    with pytest.raises(InputError, match="--init gives no finite embedding of any crop"):
        begin(a_head(), network, crop_sets.open_training_set(crops), tmp_path)


def test_a_pass_that_was_stopped_goes_on(crops, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 5)
    data, seen = crop_sets.open_training_set(crops), []

    class Counting(Tunable):
        def forward(self, x):
            seen.append(len(x))
            if len(seen) == 5:
                raise KeyboardInterrupt
            return super().forward(x)

    head, expected = a_head(), a_head()
    network = Counting(16)
    network.load_state_dict(small().state_dict())
    with pytest.raises(KeyboardInterrupt):
        begin(head, network, data, tmp_path / "run")
    begin(head, network, data, tmp_path / "run")
    assert sum(seen) == 2 * len(data) + 5  # with mirror images; the chunk that broke off was begun twice
    begin(expected, small(), data, tmp_path / "other")
    assert torch.equal(head.centres, expected.centres)
    before = len(seen)
    begin(head, network, data, tmp_path / "run")
    assert len(seen) == before
    begin(head, network, data, tmp_path / "run", weights="others")
    assert len(seen) > before


# --- what is frozen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {entry.family: name for name, entry in NETWORKS.items()}.values())
def test_stages_of_every_network_are_its_own_parts(name, monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        network = build_network(name, embedding_size=8)
    known = {name for name, _ in network.named_modules()} | {name for name, _ in network.named_parameters()}
    counts = []
    for number in range(1, len(network.stages) + 1):
        parts = finetune.frozen_parts(network, ["stages", str(number)])
        assert set(parts) <= known
        freezing = finetune.Freezing(network, ["stages", str(number)], 10)
        freezing.apply(0)
        counts.append(sum(not parameter.requires_grad for parameter in network.parameters()))
        freezing.apply(10)
    assert counts == sorted(set(counts)) and len(counts) >= 3
    assert counts[-1] < len(list(network.parameters()))


def test_what_is_trained_later_begins_with_a_momentum_of_zero(tmp_path):
    """The fused SGD, which takes momenta for all or for none, does what the plain one does."""
    chosen = parse(config.Train, argv=options(tmp_path, tmp_path, lr=0.01))
    network, plain = small(), small()
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": chosen.weight_decay, "nesterov": True}
    reference = torch.optim.SGD(plain.parameters(), **settings, fused=False)
    fused = train.build_optimizer(chosen, network, nn.Module())
    batch = torch.randn(4, 3, 112, 112)
    for step in range(3):
        for model in (network, plain):
            finetune.Freezing(model, ["stages", "1"], 1).apply(step)
            model(batch).square().mean().backward()
        train.begin_momentum(fused)
        for optimizer in (fused, reference):
            optimizer.step()
            optimizer.zero_grad()
    for values, expected in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(values, expected)


def test_frozen_parts_keep_weights_and_statistics_until_their_time_is_over():
    network = small()
    freezing = finetune.Freezing(network, ["stages", "1"], 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}

    def a_step(step):
        freezing.apply(step)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
        network(torch.randn(4, 3, 112, 112)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = network.state_dict()
        return {key.split(".")[0] for key, value in before.items() if not torch.equal(state[key], value)}

    assert not freezing.ends_at(0) and freezing.ends_at(2)
    assert a_step(0) == {"5", "6"}
    assert a_step(2) == {"0", "1", "2", "5", "6"}
    assert not finetune.Freezing(network, ["none"], 2).ends_at(2)


def test_what_the_architecture_fixes_stays_fixed(monkeypatch):
    monkeypatch.undo()
    network = build_network("ir18", embedding_size=8)
    for words in (["all"], ["none"], ["stages", "4"]):
        freezing = finetune.Freezing(network, words, 1)
        freezing.apply(0)
        assert network.layer1.training == (words == ["none"]) and network.training == (words != ["all"])
        freezing.apply(1)
        fixed = [name for name, value in network.named_parameters() if not value.requires_grad]
        assert fixed == ["features.weight"] and all(module.training for module in network.modules())


@pytest.mark.parametrize(
    "words", [["some"], ["stages"], ["stages", "3"], ["stages", "0"], ["all", "1"], ["stages", "-1"]]
)
def test_what_freeze_does_not_understand(words):
    with pytest.raises(InputError, match=r"--freeze .*this network has 2 stages"):
        finetune.frozen_parts(small(), words)


# --- whole runs ------------------------------------------------------------------------------------------------------

RECIPE = {
    "epochs": 6,
    "freeze": ["stages", "1"],
    "freeze_epochs": 2,
    "head_lr": 0.1,
    "optimizer": "adamw",
    "sample_rate": 0.5,
    "lr": 0.005,
    "batch_size": 6,
    "save_every": 5,
    "sync_bn": True,
}
STEPS = IDENTITIES * EACH // 6 * 6


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_points_ends_with_the_same_bits(crops, weights, tmp_path, size):
    output = tmp_path / "output"
    line = options(crops, tmp_path / "unbroken", **RECIPE, init=weights)
    code, text = tune(line, output, size)
    assert code == 0, text
    assert f"begins with mfn of {weights} (SHA-256 " in text and "step 8: nothing is frozen any more" in text
    out = tmp_path / "run"
    line = options(crops, out, **RECIPE | {"save_every": 3}, init=weights, resume=True)
    chance, kills = random.Random(size), 0
    for step in (3, 12):  # while a part is frozen, and after
        processes = start(tune_main, line, output=output, size=size)
        until = time.monotonic() + 120
        while time.monotonic() < until and all(process.is_alive() for process in processes):
            if (out / "checkpoint.pt").exists() and load(out / "checkpoint.pt")["step"] >= step:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.02))
        for process in processes:
            process.kill()
        kills += finish(processes) == [-signal.SIGKILL] * size
    assert kills and load(out / "checkpoint.pt")["step"] <= STEPS
    code, text = tune(line, output, size)
    assert code == 0, text
    state = load(out / "checkpoint.pt")
    assert_same_state(state, load(tmp_path / "unbroken" / "checkpoint.pt"))
    assert set(state["optimizer"]["optimizer_steps"]) == {name for name, _ in small().named_parameters()}
    record = json.loads((out / "run.json").read_text())["begun_from"]
    assert record == state["begun_from"] == finetune.load_weights(small(), str(weights), "mfn", 16)
    assert not list(out.glob("init-*"))


def test_two_and_three_processes_are_one(crops, weights, tmp_path):
    """Where the head begins, what is frozen, both rates and the optimiser, over three steps in float32."""
    recipe = RECIPE | {"optimizer": "sgd", "epochs": 2, "freeze_epochs": 1, "augment": "none", "momentum": 0}
    states = []
    for size in (1, 2, 3):
        out = tmp_path / str(size)
        code, text = tune(options(crops, out, **recipe, init=weights), tmp_path / "output", size)
        assert code == 0, text
        states.append(tensors({key: load(out / "checkpoint.pt")[key] for key in ("model", "head")}))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_network_that_stays_frozen_keeps_every_bit(crops, weights, tmp_path, size):
    out = tmp_path / "run"
    line = options(crops, out, epochs=1, batch_size=6, freeze="all", init=weights, accumulate=1)
    code, text = tune(line, tmp_path / "output", size)
    assert code == 0, text
    begun, state = torch.load(weights, weights_only=True), load(out / "checkpoint.pt")["model"]
    assert all(torch.equal(state[key], value) for key, value in begun.items())


def test_options_that_do_not_go_together_are_one_line(crops, weights, tmp_path):
    cases = [
        ({"freeze": "all"}, "--freeze all: there is nothing to keep without --init"),
        ({"init_head": "means"}, "--init-head means: the embeddings of a network without --init mean nothing"),
        ({"freeze_epochs": 1, "init": weights}, "--freeze-epochs: nothing is frozen"),
        ({"freeze": ["stages", "9"], "init": weights}, "--freeze stages 9: none, all, or stages and a number"),
        ({"init": tmp_path / "none.pt"}, "none.pt"),
        ({"teacher_weight": 3}, "--teacher-weight: there is no --teacher"),
        ({"teacher_online": True}, "--teacher-online: there is no --teacher"),
        ({"teacher": weights, "teacher_online": True, "teacher_embeddings": tmp_path}, "with --teacher-online none"),
        ({"teacher": weights, "loss": "none", "sub_centres": 3}, "--sub-centres: --loss none has no head"),
        ({"teacher": weights, "init": weights, "freeze": "all"}, "--teacher: --freeze all leaves no network"),
        ({"val_every": 3}, "--val-every: there is no --val"),
        ({"schedule": "cosine", "milestones": [3.0]}, "--milestones: --schedule cosine has none"),
        ({"small_side": 48}, "--small-side: without --small-epochs all crops are whole"),
        ({"optimizer": "adamw", "momentum": 0.5}, "--momentum: is of --optimizer sgd"),
        ({"network": "mfn_half", "use_se": False}, "mfn_half is not of the released family"),
        ({"init": weights, "embedding_size": 8}, "its embedding has 16 dimensions, not 8; give --embedding-size 16"),
    ]
    for changes, message in cases:
        code, text = tune(options(crops, tmp_path / "run", **changes), tmp_path / "output")
        assert code == 1 and message in text and "Traceback" not in text, text
        assert not list((tmp_path / "run").glob("init-*")), "refused before the pass over all crops"


def test_statistics_that_are_the_same_everywhere_stay_so(monkeypatch):
    """The mean of three equal numbers is not always that number in float32."""
    network, value = nn.BatchNorm1d(64), torch.rand(64)
    network.running_mean.copy_(value)
    monkeypatch.setattr(
        distributed.dist, "all_gather_into_tensor", lambda every, own: every.copy_(own.expand_as(every))
    )
    with distributed.averaged_statistics(network, World(0, 3, torch.device("cpu"))):
        assert torch.equal(network.running_mean, value)
