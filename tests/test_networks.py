"""Networks of the field: public checkpoints in every shape they come in, and the same networks as our own."""

import argparse
import os
import re
import runpy
import sys
import textwrap
import types
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import data_gen
import export
import models
import networks.vit
from embedding import Embedder, Preprocessing, load_embedder
from models import NETWORKS, build_network, feeding_of, name_of, network_from_state
from networks.catalogue import ADAFACE, ARCFACE_TORCH, INSIGHTFACE, RELEASED, Entry, Feeding
from networks.files import read_state
from training.finetune import load_weights
from utils import InputError

# The smallest network of each family: whoever adds a family gets these tests.
SMALLEST = list({entry.family: name for name, entry in reversed(NETWORKS.items())}.values())
# What InsightFace and AdaFace call the networks.
PUBLIC = {f"arcface_torch_r{depth}": f"ir{depth}" for depth in (18, 34, 50, 100, 200)}
PUBLIC |= {f"arcface_torch_{name}": name for name in ("mbf", "vit_t", "vit_s", "vit_b", "vit_l")}
PUBLIC |= {name: name for name in NETWORKS if name.startswith("adaface_")}


def small(name, size=8, **settings):
    torch.manual_seed(3)
    return build_network(name, embedding_size=size, **settings)


@pytest.fixture(scope="module")
def mbf():
    """An InsightFace MobileFaceNet whose batch norms have seen something."""
    network = small("mbf")
    with torch.no_grad():
        network(torch.randn(4, 3, 112, 112))
    return network.eval()


@pytest.fixture(scope="module")
def crops():
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    return np.stack([cv2.resize(one, (112, 112), interpolation=cv2.INTER_CUBIC) for one in small])


# --- public checkpoints ----------------------------------------------------------------------------------------------


def golden_names(shared):
    return sorted(path.stem.removeprefix("golden_") for path in (shared / "networks").glob("golden_*.npz"))


def as_people_have_it(name, state):
    """A plain file of ResNets, the trainer's own of mobile networks, data parallel in half, Lightning's of AdaFace."""
    if name.startswith("adaface"):
        return {
            "epoch": 25,
            "global_step": 7,
            "pytorch-lightning_version": "1.4.4",
            "state_dict": {f"model.{key}": value for key, value in state.items()}
            | {"head.kernel": torch.zeros(512, 9)},
            "hyper_parameters": {"arch": "ir_50", "lr": 0.1},
        }
    if name.endswith("mbf"):
        return {"epoch": 2, "state_dict_backbone": state, "state_dict_softmax_fc": {"weight": torch.zeros(9, 512)}}
    if "vit" in name:
        return {f"module.{key}": value for key, value in state.items()}
    return state


def test_golden_outputs_of_public_checkpoints(shared, tmp_path):
    value = runpy.run_path(str(shared / "checkpoint" / "make_state.py"))["value"]
    batch = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 112, 112)).astype(np.float32))
    names = golden_names(shared)
    assert names
    for name in names:
        state = {}
        for index, line in enumerate((shared / "networks" / f"keys_{name}.txt").read_text().splitlines()):
            key, sizes, kind = line.split("\t")
            shape = tuple(int(size) for size in sizes.split(",") if size)
            state[key] = value(key, 2000 + index, shape).to(getattr(torch, kind.removeprefix("torch.")))
        torch.save(as_people_have_it(name, state), tmp_path / "net.pth")
        embedder = load_embedder(tmp_path / "net.pth")
        assert name_of(state) == PUBLIC[name]
        assert embedder.preprocessing == Preprocessing.of(ADAFACE if name.startswith("adaface") else INSIGHTFACE)
        assert list(embedder.model.network.state_dict()) == list(state)
        features = embedder.model.run(batch).numpy()
        golden = np.load(shared / "networks" / f"golden_{name}.npz")
        if "norm" in golden:
            np.testing.assert_allclose(np.linalg.norm(features, axis=1, keepdims=True), golden["norm"], rtol=1e-4)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
        assert np.abs(features - golden["output"]).max() <= 1e-4 * np.abs(golden["output"]).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_recognised_by_its_own_state(name):
    with torch.device("meta"):
        state = build_network(name, embedding_size=24).state_dict()
    assert NETWORKS[name_of(state)] == NETWORKS[name]


def test_sizes_of_the_public_networks():
    """Millions of parameters as the public code builds them (InsightFace's model zoo, AdaFace's net.py)."""
    expected = {"ir18": 24.0, "ir34": 34.1, "ir50": 43.6, "ir100": 65.2, "mbf": 2.05, "adaface_ir_101": 65.2}
    with torch.device("meta"):
        for name, millions in expected.items():
            found = sum(parameter.numel() for parameter in build_network(name).parameters()) / 1e6
            assert found == pytest.approx(millions, abs=0.06), name


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict_backbone": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        lambda state: {key: value.half() if "num_batches" in key else value for key, value in state.items()},
    ],
)
def test_wrappers_and_prefixes_change_nothing(tmp_path, mbf, crops, wrapped):
    torch.save(wrapped(mbf.state_dict()), tmp_path / "net.pt")
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    assert np.array_equal(load_embedder(tmp_path / "net.pt").features(crops), expected)


@pytest.mark.parametrize("prefix", ["", "model.net."])
def test_safetensors_of_the_hub(tmp_path, mbf, crops, prefix):
    state = {f"{prefix}{key}": value for key, value in mbf.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.safetensors").read_bytes())  # the content counts
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    for name in ("model.safetensors", "model.bin"):
        assert np.array_equal(load_embedder(tmp_path / name).features(crops), expected)


def test_damaged_safetensors_are_one_line(tmp_path, mbf, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(mbf.state_dict(), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for damaged in (
        whole[: len(whole) // 2],
        whole[:100],
        whole[:9],
        whole + b"more",
        (10**7).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"{" * length + whole[8 + length :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors: not a file of weights, or damaged") as caught:
            load_embedder(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_embedder(path)


def load_embedder_of(network, folder):
    torch.save(network.state_dict(), folder / "plain.pt")
    return load_embedder(folder / "plain.pt")


def test_half_precision_is_read_as_float32(tmp_path, mbf, crops):
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in mbf.state_dict().items()},
               tmp_path / "half.pt")  # fmt: skip
    embedder = load_embedder(tmp_path / "half.pt")
    assert {parameter.dtype for parameter in embedder.model.network.parameters()} == {torch.float32}
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    assert np.abs(embedder.features(crops) - expected).max() < 0.01 * np.abs(expected).max()


def test_adaface_is_fed_with_bgr(tmp_path, crops):
    network = small("adaface_ir_18").eval()
    embedder = load_embedder_of(network, tmp_path)
    batch = (torch.from_numpy(crops[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = (network(batch) + network(batch.flip(3))).numpy()
    np.testing.assert_allclose(embedder.features(crops), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    # Training feeds it alike, and shows people RGB.
    images = torch.from_numpy(crops)
    inputs = data_gen.to_inputs(images, feeding_of(network))
    torch.testing.assert_close(inputs, batch)
    torch.testing.assert_close(data_gen.to_pixels(inputs, ADAFACE), images.permute(0, 3, 1, 2) / 255)
    # So does an exported graph that takes RGB pixels.
    graph = export.ExportedNetwork(network, embedder.preprocessing, mirror=True)
    with torch.no_grad():
        found = graph(images.permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_options_may_repeat_how_a_public_network_is_fed_but_not_contradict_it(tmp_path, mbf, crops):
    embedder = load_embedder_of(mbf, tmp_path)
    path = tmp_path / "plain.pt"
    same = (
        {"mean": (127.5,) * 3, "std": (127.5,) * 3},
        {"mean": (0.5,) * 3, "channels": "rgb"},
        {"mean": (127.5,) * 3, "std": (127.5,) * 3, "pixel_range": 255},
    )
    for options in same:
        assert load_embedder(path, **options).preprocessing == embedder.preprocessing
    assert not load_embedder(path, mirror=False).preprocessing.mirror
    other = (
        {"channels": "bgr"},
        {"mean": models.MEAN, "std": models.STD},
        {"mean": (0.0,) * 3},
        {"mean": (127.5,) * 3, "std": (128.0,) * 3},
        {"mean": (0.5,) * 3, "pixel_range": 255},
    )
    for options in other:
        with pytest.raises(InputError, match=r"plain\.pt: holds mbf, which is fed with channels rgb.*leave out"):
            load_embedder(path, **options)


def test_training_checkpoints_of_these_networks_are_read_too(tmp_path, mbf, crops):
    content = {"format": "face-checkpoint-1", "network": {"name": "mbf"}, "model": mbf.state_dict(), "head": {}}
    torch.save(content, tmp_path / "best.pt")
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    assert np.array_equal(load_embedder(tmp_path / "best.pt").features(crops), expected)


# --- files that are something else -----------------------------------------------------------------------------------


class Foreign:
    """A class that nobody who reads the file has."""


def foreign_class(name, base=object):
    package, module, short = name.split(".")
    kind = type(short, (base,), {"__module__": f"{package}.{module}"})
    sys.modules[package] = types.ModuleType(package)
    sys.modules[kind.__module__] = types.ModuleType(kind.__module__)
    setattr(sys.modules[kind.__module__], short, kind)
    return kind


def test_settings_and_callbacks_of_other_programs_do_not_matter(tmp_path, mbf, crops):
    """Lightning puts classes, their instances, NumPy numbers and namespaces beside the weights."""
    callback = foreign_class("lightning_of_old.model_checkpoint.ModelCheckpoint")
    attributes = foreign_class("lightning_of_old.parsing.AttributeDict", dict)
    state = {f"model.{key}": value for key, value in mbf.state_dict().items()}
    content = {
        "state_dict": state | {"head.kernel": torch.zeros(8, 5)},
        "callbacks": {callback: {"best_model_score": np.float64(0.9), "where": tmp_path, "scores": np.arange(3)}},
        "hyper_parameters": attributes(lr=0.1, arch="mbf"),
        "arguments": argparse.Namespace(seed=1),
    }
    torch.save(content, tmp_path / "last.ckpt")
    for name in ("lightning_of_old", callback.__module__, attributes.__module__):
        del sys.modules[name]
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    assert np.array_equal(load_embedder(tmp_path / "last.ckpt").features(crops), expected)
    assert callback.__module__ not in sys.modules


class Malicious:
    """Runs a command in whoever unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(tmp_path, mbf):
    state = mbf.state_dict()
    for name, content in {
        "beside": {"state_dict": state, "x": Malicious(tmp_path / "made")},
        "under": {"state_dict": Malicious(tmp_path / "made")},
        "alone": Malicious(tmp_path / "made"),
        "weight": state | {"layers.0.layers.0.weight": Malicious(tmp_path / "made")},
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match=f"{name}.pt: "):
            load_embedder(tmp_path / f"{name}.pt")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"encoder.0.weight": torch.zeros(3, 4)}, r"its keys are 'encoder\.0\.weight' \(3, 4\); known are"),
        ({"a\nb" * 100: torch.zeros(1)}, r"'a\\nba\\nb"),
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "its keys are 'epoch', 'optimizer'"),
        ({"state_dict": {}}, "its keys are none under 'state_dict'"),
        ({"model": [1, 2]}, "holds no network under 'model'"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 9, 9), "feature.0.weight": torch.zeros(64, 64 * 144),
          "feature.2.weight": torch.zeros(512, 64)}, "width 64, depth 0"),
    ],
)  # fmt: skip
def test_files_of_no_known_network_are_one_line(tmp_path, content, reason):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(InputError, match=rf"net\.pt: .*{reason}") as caught:
        load_embedder(tmp_path / "net.pt")
    assert "\n" not in str(caught.value)


def hostile_files(mbf):
    """What a few bytes can hold, and what is to be said of it."""
    last = {"features.layers.2.weight": torch.zeros(1).expand(10**9, 512)}
    norm = {f"features.layers.3.{name}": torch.zeros(1).expand(10**9) for name in ("weight", "bias")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that nested tensors may change
        nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])
    doubled = ()
    for _ in range(28):
        doubled = (doubled, doubled)
    return {
        "rows": (mbf.state_dict() | last | norm, "few are stored"),
        "nested": ({"a": nested}, "nested tensor"),
        "weight": (mbf.state_dict() | {"features.layers.2.weight": nested}, "nested tensor"),
        "prefixes": ({"module." * 3000 + "x": torch.zeros(1)}, "its keys are 'x'"),
        "format": ({"format": doubled}, "format 'tuple'"),
        "key": (mbf.state_dict() | {"new\nline" * 40: torch.zeros(1)}, r"has the unknown key 'new\\nline"),
    }


@pytest.mark.parametrize("name", ["rows", "nested", "weight", "prefixes", "format", "key"])
def test_hostile_files_are_one_short_line(tmp_path, mbf, name):
    content, said = hostile_files(mbf)[name]
    path = tmp_path / "net.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=said) as caught:
        load_embedder(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"model": {"state_dict": state}, "epoch": 3},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model": {"backbone": state, "head": {"weight": torch.zeros(3, 512)}}},
        lambda state: state | {"head.kernel": torch.zeros(512, 3), "head.t": torch.zeros(1)},
        lambda state: {
            "state_dict": {f"model.{key}": value for key, value in state.items()}
            | {"criterion.weight": torch.zeros(3), "loss_fn.kernel": torch.zeros(3), "arcface.weight": torch.zeros(3)}
        },
    ],
)
def test_a_network_within_what_trainers_put_around_it(tmp_path, mbf, crops, wrapped):
    torch.save(wrapped(dict(mbf.state_dict())), tmp_path / "net.pt")
    expected = load_embedder_of(mbf, tmp_path).features(crops)
    assert np.array_equal(load_embedder(tmp_path / "net.pt").features(crops), expected)


def test_the_order_of_cvlfaces_networks_is_the_users_to_say(tmp_path, crops):
    """Their keys are AdaFace's; whether they take RGB or BGR stands in a file beside the weights."""
    torch.manual_seed(0)
    network = build_network("adaface_ir_18", embedding_size=16).eval()
    for name, prefix in (("adaface", "model."), ("cvlface", "model.net.")):
        state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    own = load_embedder(tmp_path / "adaface.safetensors").features(crops)
    with pytest.raises(InputError, match=r"as CVLface writes it; give --channels rgb or bgr, as color_space"):
        load_embedder(tmp_path / "cvlface.safetensors")
    bgr = load_embedder(tmp_path / "cvlface.safetensors", channels="bgr").features(crops)
    rgb = load_embedder(tmp_path / "cvlface.safetensors", channels="rgb").features(crops[..., ::-1].copy())
    assert np.array_equal(bgr, own) and np.array_equal(rgb, own)
    with pytest.raises(InputError, match="is fed with channels bgr"):
        load_embedder(tmp_path / "adaface.safetensors", channels="rgb")
    with pytest.raises(InputError, match=r"--init .*: as CVLface writes it.*take the prefix model\.net\. off"):
        load_weights(network, str(tmp_path / "cvlface.safetensors"), "adaface_ir_18", 16)


def test_a_pixel_range_that_contradicts_the_file_is_refused(tmp_path, mbf):
    torch.save(mbf.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match="leave out the options that say otherwise"):
        load_embedder(tmp_path / "net.pt", pixel_range=255.0)
    load_embedder(tmp_path / "net.pt", mean=(127.5,) * 3, std=(127.5,) * 3, pixel_range=255.0)
    load_embedder(tmp_path / "net.pt", pixel_range=1.0)


def test_prefixes_are_taken_off_only_where_all_else_is_a_head():
    state = {"model.a": 1, "head.kernel": 2}
    assert models.name_of(state) is None
    assert read_prefixes(state) == {"a": 1}
    assert read_prefixes({"model.a": 1, "other.b": 2}) == {"model.a": 1, "other.b": 2}
    assert read_prefixes({"module.model.a": 1}) == {"a": 1}


def read_prefixes(state):
    return read_state.__globals__["_without_prefixes"](state)[0]


def test_a_file_that_nearly_fits_names_the_network_and_the_key(mbf):
    state = dict(mbf.state_dict())
    missing = {key: value for key, value in state.items() if key != "conv_sep.layers.1.bias"}
    with pytest.raises(ValueError, match=r"looks like mbf, but conv_sep\.layers\.1\.bias is missing"):
        network_from_state(missing)
    with pytest.raises(ValueError, match=r"fit mbf: conv_sep\.layers\.1\.bias is \(3,\)"):
        network_from_state(state | {"conv_sep.layers.1.bias": torch.zeros(3)})


# --- networks of our own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_does_what_is_asked_of_it(name, crops, tmp_path):
    """It says how it is fed, has embeddings of any size and gradients for all, and is the same out of a file."""
    network = small(name, 24)
    assert isinstance(type(network).feeding, Feeding)
    features = network(torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)))
    assert features.shape == (2, 24)
    features.square().sum().backward()
    assert [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
    embedder = Embedder.from_network(network.eval(), "cpu")
    read = load_embedder_of(network, tmp_path)
    assert read.preprocessing == embedder.preprocessing == Preprocessing.of(network.feeding)
    expected = embedder.features(crops[:2])
    assert np.array_equal(read.features(crops[:2]), expected)
    np.testing.assert_allclose(read.features(crops[:1]), expected[:1], atol=1e-4 * np.abs(expected).max())
    if NETWORKS[name].family in ARCFACE_TORCH:
        state = load_embedder(export.write_backbone(read, tmp_path)).model.network.state_dict()
        assert name_of(state) == name
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    else:
        with pytest.raises(InputError, match=f"holds {name}, which is none of InsightFace's networks"):
            export.write_backbone(read, tmp_path)


@pytest.mark.parametrize("name", ["r18", "mfn", "ir18", "mbf", "adaface_ir_18"])
def test_smaller_crops_train_the_same_layers(name):
    """As --small-epochs does; then the network goes on with whole crops."""
    network = small(name, 24)
    trained = {key for key, value in network.named_parameters() if value.requires_grad}
    for side in (32, 81, 112):
        network.zero_grad()
        features = network(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(side)))
        assert features.shape == (4, 24)
        features[0].square().sum().backward()
        given = {key for key, value in network.named_parameters() if value.grad is not None and value.grad.any()}
        assert given == trained and models.takes_side(name, side)


def manual():
    return (Path(models.__file__).parent / "docs" / "networks.md").read_text()


def test_the_network_of_the_manual_is_one(crops, tmp_path, monkeypatch):
    code = textwrap.dedent(re.search(r"    ```python\n(.*?)\n    ```", manual(), re.S)[1])
    room = {}
    exec(code, room)
    entry = re.search(r'`"plain_s": (Entry\(.*?\))`', manual())[1]
    monkeypatch.setitem(models.FAMILIES, "plain", room["PlainNetwork"])
    monkeypatch.setitem(NETWORKS, "plain_s", eval(entry, {"Entry": Entry}))
    test_every_network_is_recognised_by_its_own_state("plain_s")
    test_every_family_does_what_is_asked_of_it("plain_s", crops, tmp_path)
    test_recomputation_changes_nothing("plain_s")
    test_recomputation_keeps_less("plain_s")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_manual_has_every_network(name):
    table = manual().split("## What is understood")[1].split("\n\n")[1]
    assert f"`{name}`" in table, f"docs/networks.md does not list {name} under what is understood"


@pytest.mark.parametrize("name", SMALLEST)
def test_recomputation_changes_nothing(name):
    """Gradients and running statistics with `recompute` are those without it, bit for bit."""
    results = []
    batch = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    for recompute in (False, True):
        network = small(name, 16, recompute=recompute)
        network(batch).square().sum().backward()
        results.append((network.state_dict(), [parameter.grad for parameter in network.parameters()]))
        assert {norm.momentum for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)} <= {0.1}
    (state, gradients), (state_again, gradients_again) = results
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    for one, other in zip(gradients, gradients_again, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@pytest.mark.parametrize("name", SMALLEST)
def test_recomputation_keeps_less(name):
    def kept(recompute):
        network = small(name, 16, recompute=recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            network(torch.randn(2, 3, 112, 112))
        return sum(sizes) - sum(parameter.numel() for parameter in network.parameters())

    assert kept(True) < 0.7 * kept(False)


def test_scale_of_insightfaces_last_batch_norm_is_not_trained():
    network = small("ir18")
    assert [name for name, value in network.named_parameters() if not value.requires_grad] == ["features.weight"]
    assert torch.equal(network.features.weight, torch.ones(8))


def test_transformer_drops_tokens_and_paths_only_while_it_trains():
    network = small("vit_t")
    assert (network.drop_path, network.token_mask) == (0.1, 0.1)
    with torch.device("meta"):
        assert build_network("vit_l").drop_path == 0.05
        assert build_network("vit_t", drop_path=0.0, token_mask=0.5).token_mask == 0.5
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0].shape[1], *inputs[1:])))
    batch = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        network(batch)
        assert [tokens for tokens, _ in seen] == [int(0.9 * 144)] * 12
        first, last = seen[0][1], seen[-1][1]
        assert torch.equal(first, torch.ones(2, 3))
        assert torch.all((last == 0) | torch.isclose(last, torch.tensor(1 / 0.9)))
        seen.clear()
        network.eval()
        assert torch.equal(network(batch), network(batch))
        assert seen[:12] == [(144,)] * 12


def test_masked_tokens_are_replaced_in_their_places():
    """Without blocks, every token is either its own or the learned one."""
    network = small("vit_t", drop_path=0.0, token_mask=0.25)
    network.blocks = nn.ModuleList()
    nn.init.constant_(network.mask_token, 7.0)
    tokens = []
    network.feature.register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].unflatten(1, (144, -1)))
    )
    batch = torch.randn(4, 3, 112, 112)
    with torch.no_grad():
        network(batch)
        plain = network.norm(network.patch_embed(batch) + network.pos_embed)
    masked = (tokens[0] == 7.0).all(dim=2)
    assert masked.sum(dim=1).tolist() == [36] * 4
    assert not torch.equal(masked[0], masked[1])
    torch.testing.assert_close(tokens[0][~masked], plain[~masked])


def test_paths_are_left_out_as_often_as_they_should():
    network = small("vit_t", drop_path=0.5, token_mask=0.0)
    paths = network._draw_paths(torch.zeros(4000, 1))
    assert paths.shape == (12, 2, 4000)
    torch.testing.assert_close((paths > 0).float().mean(dim=(1, 2)), 1 - torch.linspace(0, 0.5, 12), atol=0.02, rtol=0)
    torch.testing.assert_close(paths.mean(dim=(1, 2)), torch.ones(12), atol=0.04, rtol=0)


def test_attention_is_the_papers():
    attention = networks.vit.Attention(16)
    x = torch.randn(2, 5, 16)
    query, key, value = attention.qkv(x).chunk(3, dim=2)
    heads = []
    for index in range(8):
        part = slice(2 * index, 2 * index + 2)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / 2**0.5).softmax(dim=2)
        heads.append(weights @ value[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=2)))


def test_settings_of_transformers_are_refused_elsewhere():
    with pytest.raises(ValueError, match="ir18 has no drop path"):
        build_network("ir18", drop_path=0.1)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        build_network("vit_t", token_mask=1.0)


def test_a_transformer_as_onnx_agrees_with_pytorch(tmp_path, crops):
    network = small("vit_t").eval()
    network.blocks = network.blocks[:2]
    embedder = Embedder.from_network(network, "cpu")
    path = tmp_path / "net.onnx"
    model = export.to_onnx(export.ExportedNetwork(network, None, mirror=False))
    path.write_bytes(export.with_metadata(model, embedder.preprocessing.to_metadata()))
    exported = load_embedder(path)
    assert exported.preprocessing == embedder.preprocessing == Preprocessing.of(INSIGHTFACE)
    expected = embedder.features(crops)
    np.testing.assert_allclose(exported.features(crops), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", {entry.family: name for name, entry in NETWORKS.items()}.values())
def test_every_trained_parameter_has_a_part_in_every_step(name):
    """Else data parallelism on GPUs, which does not look for unused ones, waits for their gradients in vain."""
    network = small(name).train()
    network(torch.randn(2, 3, 112, 112)).sum().backward()
    idle = [key for key, values in network.named_parameters() if values.requires_grad and values.grad is None]
    assert not idle


def test_export_under_insightfaces_key_names(tmp_path, mbf, crops, monkeypatch, capsys):
    content = {"format": "face-checkpoint-1", "model": mbf.state_dict()}
    torch.save(content, tmp_path / "best.pt")
    line = ["export.py", "--checkpoint", str(tmp_path / "best.pt"), "--out", str(tmp_path), "--layout", "insightface"]
    monkeypatch.setattr(sys, "argv", line)
    assert export.main() == 0
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert list(state) == list(mbf.state_dict())
    assert np.array_equal(
        load_embedder(tmp_path / "backbone.pth").features(crops), load_embedder(line[2]).features(crops)
    )
    monkeypatch.setattr(sys, "argv", [*line, "--variants", "fp16"])
    assert export.main() == 1
    assert "--variants: --layout insightface writes weights alone" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", line)
    content["model"]["layers.0.layers.0.weight"][0] = torch.nan
    torch.save(content, tmp_path / "best.pt")
    assert export.main() == 1
    assert "layers.0.layers.0.weight is not finite" in capsys.readouterr().err
    torch.save(small("mfn").state_dict(), tmp_path / "best.pt")
    assert export.main() == 1
    assert "holds mfn, which is none of InsightFace's networks" in capsys.readouterr().err
    assert feeding_of(small("mfn")) == RELEASED
