"""Every kind of model file gives the features that were computed by hand; everything else is refused with a reason."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.toy_models import DIM, KERNEL, write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from torch import nn

import config
import data_gen
import embedding
import export
import models
import utils
from embedding import Embedder, Preprocessing, load_embedder, normalise, open_checkpoint
from utils import InputError


def random_crops(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)


def by_hand(network, crops, *, mirror=True):
    """The definition, one crop at a time."""
    rows = []
    with torch.no_grad():
        for crop in crops:
            rgb = torch.from_numpy(crop).permute(2, 0, 1).float() / 255
            image = (rgb - torch.tensor(models.MEAN)[:, None, None]) / torch.tensor(models.STD)[:, None, None]
            feature = network(image[None])
            if mirror:
                feature = feature + network(image.flip(-1)[None])
            rows.append(feature[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    network = models.build_network("mfn", embedding_size=24)
    with torch.no_grad():  # statistics other than 0 and 1, so that training mode would show
        network.train()(torch.randn(4, 3, 112, 112))
    return network.eval()


# --- this repository's networks -------------------------------------------------------------------------------------


def test_state_dict_and_training_checkpoint_give_the_features_by_hand(tmp_path, network):
    crops = random_crops()
    expected = by_hand(network, crops)
    plain, training, parallel = (tmp_path / name for name in ("embedding.pt", "last.pt", "parallel.pt"))
    torch.save(network.state_dict(), plain)
    # Not by DataParallel itself, which would take the network to a GPU where there is one.
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, parallel)
    content = {
        "network": {"name": "mfn", "use_se": True, "embedding_size": 24},
        "model": network.state_dict(),
        "head": {"weight": torch.zeros(3, 24)},
        "epoch": 1,
    }
    utils.save_checkpoint(training, content)
    for path in (plain, training, parallel):
        embedder = load_embedder(path, batch_size=2)
        assert np.allclose(embedder.features(crops), expected, atol=1e-5)
        assert embedder.features(crops).dtype == np.float32
        assert embedder.dim == 24 and embedder.name == path.name
        assert embedder.sha256 == utils.sha256_of(path)
        assert embedder.preprocessing == Preprocessing()
        json.dumps(embedder.describe(), allow_nan=False)
    without = load_embedder(plain, mirror=False)
    assert np.allclose(without.features(crops), by_hand(network, crops, mirror=False), atol=1e-5)


def test_released_layout_gives_the_golden_features(shared, tmp_path):
    weights = tmp_path / "r18.pt"
    subprocess.run([sys.executable, shared / "checkpoint" / "make_state.py", "r18", weights], check=True)
    golden = np.load(shared / "checkpoint" / "golden_r18.npz")
    embedder = load_embedder(weights)
    batch = torch.from_numpy(golden["input"])
    assert np.allclose(embedder.model.run(batch).numpy(), golden["embedding"], atol=1e-4)
    assert embedder.dim == 512


def test_crops_and_their_mirror_images_have_the_same_feature(network):
    crops = random_crops(3)
    embedder = Embedder.from_network(network, "cpu")
    assert np.allclose(embedder.features(crops), embedder.features(crops[:, :, ::-1]), atol=1e-5)


def test_bfloat16_is_another_model_with_nearly_the_same_features(tmp_path, network):
    path, crops = tmp_path / "embedding.pt", random_crops()
    torch.save(network.state_dict(), path)
    exact, low = (load_embedder(path, precision=name) for name in ("exact", "bf16"))
    one, other = normalise(exact.features(crops)), normalise(low.features(crops))
    assert 0.999 < (one * other).sum(1).min() < 1 - 1e-8
    assert low.engine == f"{exact.engine} bf16" and low.fingerprint != exact.fingerprint


@pytest.mark.parametrize(
    ("emulated", "precision", "warned"), [(True, "bf16", True), (True, "exact", False), (False, "bf16", False)]
)
def test_bfloat16_without_a_processor_for_it_is_worth_a_line(
    tmp_path, network, capsys, monkeypatch, emulated, precision, warned
):
    monkeypatch.setattr(utils, "emulates_bfloat16", lambda device: emulated)
    torch.save(network.state_dict(), tmp_path / "embedding.pt")
    open_checkpoint(tmp_path / "embedding.pt", config.Feeding(precision=precision))
    assert ("--precision bf16: this processor has no bfloat16" in capsys.readouterr().err) is warned


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batches_do_not_change_features(network, batch_size):
    crops = random_crops()
    expected = Embedder.from_network(network, "cpu", batch_size=5).features(crops)
    embedder = Embedder.from_network(network, "cpu", batch_size=batch_size)
    assert np.allclose(embedder.features(crops), expected, atol=1e-5)
    assert embedder.features(crops[:0]).shape == (0, 24)


@pytest.mark.parametrize(
    ("threads", "batches", "together"),
    [(1, 9, 1), (2, 1, 1), (2, 2, 2), (2, 5, 1), (2, 99, 2), (8, 6, 2), (8, 16, 8), (7, 16, 1), (64, 640, 8)],
)
def test_no_thread_is_left_idle_by_batches_at_a_time(threads, batches, together):
    assert embedding._together(batches, threads) == together


@pytest.mark.parametrize("threads", [2, 4, 6])
def test_batches_at_a_time_do_not_change_features(network, threads):
    crops = random_crops(15)
    expected = Embedder.from_network(network, "cpu").features(crops)
    before, used = torch.get_num_threads(), []
    handle = network.register_forward_hook(
        lambda *_: used.append((threading.current_thread().name, torch.get_num_threads()))
    )
    try:
        torch.set_num_threads(threads)
        features = Embedder.from_network(network, "cpu", batch_size=4).features(crops)
        assert torch.get_num_threads() == threads
        assert len({name for name, _ in used}) > 1 and threading.current_thread().name not in dict(used)
        assert {inside for _, inside in used} == {threads // {2: 2, 4: 4, 6: 2}[threads]}  # four batches
        assert np.allclose(features, expected, atol=1e-5)
        del used[:]
        Embedder.from_network(network, "cpu", batch_size=4).features(crops[:4])
        assert {name for name, _ in used} == {threading.current_thread().name}  # one batch has all threads inside
    finally:
        handle.remove()
        torch.set_num_threads(before)


def test_a_network_in_training_is_left_as_it_was(network):
    crops = random_crops(2)
    expected = Embedder.from_network(network, "cpu").features(crops)
    try:
        network.train()
        network.stem.eval()  # someone froze a part
        modes = [module.training for module in network.modules()]
        state = {key: value.clone() for key, value in network.state_dict().items()}
        torch.manual_seed(5)
        np.random.seed(5)
        generators = torch.random.get_rng_state().clone(), np.random.get_state()[1].copy()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a training loop; must not cost precision
            features = Embedder.from_network(network, "cpu").features(crops)
        assert np.allclose(features, expected, atol=1e-5)
        assert [module.training for module in network.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), generators[0])
        assert np.array_equal(np.random.get_state()[1], generators[1])
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[key])
        network(torch.randn(2, 3, 112, 112)).sum().backward()  # still a network that can be trained
        assert network.stem[0][0].weight.grad is not None
    finally:
        network.zero_grad()
        network.eval()


def test_modes_come_back_when_features_fail(network):
    class Failing(torch.nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    failing = Failing().train()
    with pytest.raises(ZeroDivisionError):
        Embedder.from_network(failing, "cpu").features(random_crops(1))
    assert failing.training


@pytest.mark.parametrize("crops", [np.zeros((1, 112, 112, 3), np.float32), np.zeros((1, 3, 112, 112), np.uint8)])
def test_other_arrays_are_not_taken_for_crops(network, crops):
    with pytest.raises(ValueError, match="crops are"):
        Embedder.from_network(network, "cpu").features(crops)


def test_whole_modules_and_rubbish_are_refused_with_the_way_out(tmp_path, network):
    whole, rubbish, other = tmp_path / "whole.pt", tmp_path / "rubbish.pt", tmp_path / "other.pt"
    torch.save(network, whole)
    rubbish.write_bytes(b"no weights")
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    for path, reason in ((whole, r"state_dict\(\)"), (rubbish, ""), (other, "not the weights")):
        with pytest.raises(InputError, match=f"{path.name}.*{reason}"):
            load_embedder(path)
    with pytest.raises((InputError, FileNotFoundError), match=r"absent\.pt"):
        load_embedder(tmp_path / "absent.pt")


def test_states_that_are_no_plain_weights_of_a_network_are_one_line(tmp_path, network):
    state = network.state_dict()
    key = next(key for key, value in state.items() if value.ndim == 4)
    odd = {
        "sparse": state[key].to_sparse(),
        "meta": torch.empty_like(state[key], device="meta"),
        "complex": state[key].to(torch.complex64),
        "int8": state[key].to(torch.int8),
    }
    states = {name: (state | {key: value}, key) for name, value in odd.items()}
    states |= {
        "numbered": ({0: torch.zeros(2)}, "holds no network"),
        "empty training checkpoint": ({"format": utils.CHECKPOINT_FORMAT}, "holds no network"),
        "list": ({"format": utils.CHECKPOINT_FORMAT, "model": [1]}, "holds no network"),
    }
    for name, (content, reason) in states.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match=f"{name}.pt: .*{reason}"):
            load_embedder(tmp_path / f"{name}.pt")


def test_options_replace_the_defaults_of_our_networks(tmp_path, network):
    path = tmp_path / "embedding.pt"
    torch.save(network.state_dict(), path)
    crops = random_crops(2)
    embedder = load_embedder(path, channels="bgr", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), mirror=False)
    batch = torch.from_numpy(crops[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = network((batch - 0.5) / 0.25).numpy()
    assert np.allclose(embedder.features(crops), expected, atol=1e-5)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def sums(inputs):
    return np.einsum("nchw,dchw->nd", inputs, KERNEL.astype(np.float64))


def onnx_by_hand(crops, mean, std, *, channels="rgb", pixel_range=1, mirror=False):
    pixels = crops[..., ::-1] if channels == "bgr" else crops
    inputs = ((pixels / 255 * pixel_range - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    return sums(inputs) + (sums(inputs[..., ::-1]) if mirror else 0)


@pytest.mark.parametrize("batch", ["n", 1, 3])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_onnx_with_free_and_fixed_batch(tmp_path, batch, channels):
    path = write_onnx(tmp_path / "sums.onnx", batch=batch)
    crops, mean, std = random_crops(5), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    embedder = load_embedder(path, mean=mean, std=std, channels=channels, batch_size=4)
    assert np.allclose(embedder.features(crops), onnx_by_hand(crops, mean, std, channels=channels), atol=1e-3)
    assert embedder.dim == DIM and embedder.sha256 == utils.sha256_of(path)
    assert "onnxruntime" in embedder.engine


def test_onnx_in_half_precision(tmp_path):
    path = write_onnx(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    crops, half = random_crops(2), (0.5, 0.5, 0.5)
    features = load_embedder(path, mean=half, std=half).features(crops)
    assert features.dtype == np.float32
    assert np.allclose(features, onnx_by_hand(crops, half, half), atol=0.1)


@pytest.mark.parametrize(
    ("mean", "std", "given", "expected"),
    [
        (127.5, 127.5, None, 255),
        (0.5, 0.5, None, 1),
        (0.0, 1.0, None, 1),
        (0.0, 1.0, 255, 255),
        (0.0, 255.0, None, 255),
    ],
)
def test_range_of_pixels_follows_from_mean_and_std_or_is_given(tmp_path, mean, std, given, expected):
    path = write_onnx(tmp_path / "sums.onnx")
    embedder = load_embedder(path, mean=(mean,) * 3, std=(std,) * 3, pixel_range=given)
    assert embedder.preprocessing.pixel_range == expected
    crops = random_crops(2)
    expected_features = onnx_by_hand(crops, (mean,) * 3, (std,) * 3, pixel_range=expected)
    assert np.allclose(embedder.features(crops), expected_features, rtol=1e-3, atol=1e-2)


def test_onnx_without_a_word_about_its_input_is_refused(tmp_path):
    path = write_onnx(tmp_path / "silent.onnx", metadata={"format": "something else", "mean": "0.1"})
    with pytest.raises(InputError, match=r"silent\.onnx.*--mean and --std.*--channels"):
        load_embedder(path)
    with pytest.raises(InputError, match=r"give --std"):
        load_embedder(path, mean=(0.5,) * 3)


@pytest.mark.parametrize("mirror", ["caller", "graph", "none"])
def test_metadata_is_read_back(tmp_path, mirror):
    stated = Preprocessing(channels="bgr", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), pixel_range=255.0)
    metadata = stated.to_metadata(mirror_in_graph=mirror == "graph")
    if mirror == "none":
        metadata = dataclasses.replace(stated, mirror=False).to_metadata()
    metadata["threshold"] = json.dumps({"cosine": 0.25})
    metadata["note"] = "free text, by whoever made the file"
    path = write_onnx(tmp_path / "stated.onnx", metadata=metadata)
    embedder = load_embedder(path)
    crops = random_crops(2)
    way = embedder.preprocessing
    assert (way.channels, way.mean, way.std, way.pixel_range) == ("bgr", (1, 2, 3), (4, 5, 6), 255)
    assert way.mirror == (mirror == "caller")
    expected = onnx_by_hand(crops, way.mean, way.std, channels="bgr", pixel_range=255, mirror=way.mirror)
    assert np.allclose(embedder.features(crops), expected, rtol=1e-3, atol=1e-2)
    assert embedder.metadata["threshold"] == {"cosine": 0.25}
    json.dumps(embedder.describe(), allow_nan=False)
    # Options may repeat what the file says, not contradict it.
    load_embedder(path, channels="bgr", mean=(1, 2, 3))
    with pytest.raises(InputError, match=r"stated\.onnx.*channels bgr, the option says rgb"):
        load_embedder(path, channels="rgb")
    if mirror == "graph":
        with pytest.raises(InputError, match="inside its graph"):
            load_embedder(path, mirror=False)
        assert not load_embedder(path, mirror=True).preprocessing.mirror
    else:
        assert load_embedder(path, mirror=False).preprocessing.mirror is False


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("mean", "[0.5, 0.5", "JSON"),
        ("mean", '"abc"', "mean"),
        ("mean", "[0.5, 0.5]", "mean"),
        ("std", "[0, 1, 1]", "std"),
        ("std", "[1, NaN, 1]", "std.*NaN"),
        ("pixel_range", "7", "pixel_range"),
        ("channels", "gbr", "channels"),
        ("mirror", "sometimes", "mirror"),
        ("threshold", "[1, 2]", "threshold"),
        ("mirror", None, "lacks 'mirror'"),
    ],
)
def test_damaged_metadata_names_the_file_and_the_key(tmp_path, key, text, reason):
    metadata = Preprocessing().to_metadata() | {key: text}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    path = write_onnx(tmp_path / "damaged.onnx", metadata=metadata)
    with pytest.raises(InputError, match=rf"damaged\.onnx.*{reason}"):
        load_embedder(path)


def ending(source, path, operation, kind, constants=(), **settings):
    """The model of a file with one operation more at its end, whose output says nothing of its width."""
    model = onnx.load(source)
    graph = model.graph
    graph.node[-1].output[0] = "inner"
    graph.node.append(helper.make_node(operation, ["inner", *constants], ["feature"], **settings))
    for number, name in enumerate(("first", "second")):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [number]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("feature", kind, ["n", "d"]))
    onnx.save(model, path)
    return path


def test_onnx_of_other_shapes_and_broken_files_are_refused(tmp_path):
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(InputError, match=r"large\.onnx.*\[N, 3, 112, 112\]"):
        load_embedder(write_onnx(tmp_path / "large.onnx", side=160), **half)
    with pytest.raises(InputError, match=r"two\.onnx.*one output"):
        load_embedder(write_onnx(tmp_path / "two.onnx", outputs=("a", "b")), **half)
    whole = write_onnx(tmp_path / "whole.onnx")
    with pytest.raises(InputError, match=r"many\.onnx: its batch is fixed at 1,000,000 crops"):
        load_embedder(write_onnx(tmp_path / "many.onnx", batch=1_000_000), **half)
    for kind in (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING):
        with pytest.raises(InputError, match=r"cast\.onnx: its output is tensor\(.*, not one of tensor\(float\)"):
            load_embedder(ending(whole, tmp_path / "cast.onnx", "Cast", kind, to=kind), **half)
    empty = ending(whole, tmp_path / "empty.onnx", "Slice", TensorProto.FLOAT, ("first", "first", "second"))
    with pytest.raises(InputError, match=r"empty\.onnx: gives \[2, 0\] for 2 crops, not \[2, D\]"):
        load_embedder(empty, **half).features(random_crops(2))
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole.read_bytes()[:50_000])
    with pytest.raises(InputError, match=r"cut\.onnx: not an ONNX model"):
        load_embedder(cut, **half)
    with pytest.raises(InputError, match=r"--precision bf16: .*whole\.onnx computes as its file says"):
        load_embedder(whole, **half, precision="bf16")
    with pytest.raises((InputError, FileNotFoundError), match=r"absent\.onnx"):
        load_embedder(tmp_path / "absent.onnx", **half)


def test_hash_covers_weights_in_a_second_file(tmp_path):
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = onnx.load(write_onnx(tmp_path / "one.onnx"))
    path = tmp_path / "two.onnx"
    onnx.save(model, path, save_as_external_data=True, location="two.data", size_threshold=0)
    before = load_embedder(path, **half)
    assert np.allclose(
        before.features(random_crops(1)), load_embedder(tmp_path / "one.onnx", **half).features(random_crops(1))
    )
    weights = tmp_path / "two.data"
    changed = bytearray(weights.read_bytes())
    changed[0] ^= 1
    weights.write_bytes(changed)
    assert load_embedder(path, **half).sha256 != before.sha256
    weights.unlink()
    with pytest.raises(InputError, match=r"two\.onnx"):
        load_embedder(path, **half)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter without onnxscript
def test_our_network_as_onnx_agrees_with_pytorch(tmp_path, network):
    """The repository's own network through torch.onnx gives the same features as through PyTorch."""
    path, plain = tmp_path / "mfn.onnx", tmp_path / "mfn.pt"
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 112, 112),),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["crops"],
        output_names=["feature"],
        dynamic_axes={"crops": {0: "n"}, "feature": {0: "n"}},
    )
    model = onnx.load(path)
    helper.set_model_props(model, Preprocessing().to_metadata())
    onnx.save(model, path)
    torch.save(network.state_dict(), plain)
    crops = random_crops()
    assert np.allclose(load_embedder(path).features(crops), load_embedder(plain).features(crops), atol=1e-4)


def test_names_decide_the_reader(tmp_path, network):
    path = write_onnx(tmp_path / "model.onnx")
    renamed = tmp_path / "model.pt"
    shutil.copy(path, renamed)
    with pytest.raises(InputError, match=r"model\.pt"):
        load_embedder(renamed)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_fingerprint_tells_what_was_computed(tmp_path, network):
    path = write_onnx(tmp_path / "sums.onnx")
    embedder = load_embedder(path, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert embedder.fingerprint == load_embedder(path, mean=(0.5,) * 3, std=(0.5,) * 3).fingerprint
    for change in ({"mirror": True}, {"channels": "bgr"}, {"mean": (0.4, 0.5, 0.5)}, {"pixel_range": 255.0}):
        assert embedder.with_preprocessing(**change).fingerprint != embedder.fingerprint
    assert Embedder.from_network(network, "cpu").fingerprint is None


@pytest.mark.parametrize("name", ["net.pt", "net.onnx"])
def test_a_file_that_another_one_replaces_while_it_is_read_is_neither(tmp_path, network, monkeypatch, name):
    """Else the features of one would be kept, and reported, under the hash of the other."""
    path = write_onnx(tmp_path / "net.onnx", metadata=Preprocessing().to_metadata())
    torch.save(network.state_dict(), tmp_path / "net.pt")
    sha256_of = utils.sha256_of

    def replaced(path):
        utils.write_bytes(path, path.read_bytes())
        return sha256_of(path)

    monkeypatch.setattr(utils, "sha256_of", replaced)
    with pytest.raises(InputError, match=rf"{name}: was replaced while it was read"):
        load_embedder(path.with_name(name))


def test_fingerprint_covers_the_code_of_the_network_and_the_librarys_version(tmp_path, monkeypatch):
    """Editing the forward pass is another model: its old features must not be taken for the new ones."""
    source = tmp_path / "own_network.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def fingerprint(text):
        source.write_text(
            f"from torch import nn\nclass Own(nn.Module):\n    def forward(self, x):\n        return {text}\n"
        )
        monkeypatch.delitem(sys.modules, "own_network", raising=False)
        utils.code_sha256.cache_clear()
        module = importlib.import_module("own_network")
        return Embedder.from_network(nn.Sequential(module.Own()), "cpu", sha256="1" * 64).fingerprint

    first = fingerprint("x.mean((2, 3))")
    assert fingerprint("x.mean((2, 3))") == first
    assert fingerprint("x.amax((2, 3))") != first
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", version + ".1")
    assert fingerprint("x.mean((2, 3))") != first


def test_training_evaluation_and_export_feed_the_same_tensor_to_the_bit():
    """All 256 values of all channels through the three doors to a network."""
    crops = np.zeros((2, 112, 112, 3), np.uint8)
    crops[0].reshape(-1)[:] = np.arange(112 * 112 * 3) % 256
    crops[1] = random_crops(1)[0]
    in_training = data_gen.to_inputs(torch.from_numpy(crops), channels_last=False)
    in_evaluation = Preprocessing()(torch.from_numpy(crops))
    assert torch.equal(in_training, in_evaluation)

    class Through(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    graph = export.to_onnx(export.ExportedNetwork(Through(), Preprocessing(), mirror=False))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pixels = crops.transpose(0, 3, 1, 2).astype(np.float32)
    (exported,) = session.run(None, {"crops": pixels})
    assert np.array_equal(exported.reshape(pixels.shape), in_training.numpy())


def external(tmp_path, location):
    """A model whose weights are said to lie in `location`."""
    model = onnx.load(write_onnx(tmp_path / "one.onnx"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.data", "pipe", "zero", "link", "folder", "", "short"])
def test_weights_of_an_onnx_file_are_plain_files_beside_it(tmp_path, location):
    """A device or a pipe would never end, and another folder's file is none of the model's business."""
    (tmp_path / "models").mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(KERNEL.nbytes))
    folder = tmp_path / "models"
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "link").symlink_to(tmp_path / "secret.data")
    (folder / "folder").mkdir()
    (folder / "short").write_bytes(bytes(KERNEL.nbytes - 1))
    path = external(folder, location)
    with pytest.raises(InputError, match=r"model\.onnx: |short: cut off"):
        load_embedder(path, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_weights_in_an_inner_constant_are_checked_too(tmp_path):
    path = external(tmp_path, "model.data")
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto()
    tensor.CopyFrom(model.graph.initializer[0])
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = "/dev/zero"
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
    onnx.save(model, path)
    with pytest.raises(InputError, match="/dev/zero"):
        load_embedder(path, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("name", ["pipe.pt", "zero.pt", "pipe.onnx", "zero.onnx"])
def test_a_checkpoint_that_is_no_file_is_refused_at_once(tmp_path, name):
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name}: .*not a file"):
        load_embedder(path, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_silent_onnx_is_fed_without_its_mirror_image_unless_asked(tmp_path):
    path, half = write_onnx(tmp_path / "silent.onnx"), (0.5,) * 3
    crops = random_crops(2)
    plain = load_embedder(path, mean=half, std=half)
    assert "without mirror image" in plain.feeding
    assert np.allclose(plain.features(crops), onnx_by_hand(crops, half, half), atol=1e-3)
    asked = load_embedder(path, mean=half, std=half, mirror=True)
    assert "with mirror image" in asked.feeding
    assert np.allclose(asked.features(crops), onnx_by_hand(crops, half, half, mirror=True), atol=1e-3)


FEATURES = hnp.arrays(
    np.float32, (3, 8), elements=st.floats(-(2**127), 2**127, width=32).filter(lambda value: abs(value) > 1e-30)
)


@settings(max_examples=50, deadline=None)
@given(FEATURES, st.integers(-8, 8))
def test_embeddings_have_length_one_whatever_the_scale(features, power):
    embeddings = embedding.normalise(features)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1)
    with np.errstate(over="ignore", under="ignore"):
        scaled = features * np.float32(2.0**power)
    if np.isfinite(scaled).all():
        assert np.allclose(embedding.normalise(scaled), embeddings)


def test_features_without_direction_become_nan():
    features = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [3, 4]], dtype=np.float32)
    embeddings = embedding.normalise(features)
    assert np.isnan(embeddings).any(axis=1).tolist() == [True, True, True, False]
    assert embeddings[3] == pytest.approx([0.6, 0.8])
