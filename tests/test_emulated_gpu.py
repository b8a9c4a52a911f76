"""Everything that runs on a GPU, run on an emulated one: no tensor on the wrong device, no waiting inside a step, and
the CPU's results.
"""

import json
import signal
import sys
import sysconfig
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from helpers import emulated_nccl
from helpers.emulated_gpu import EmulatedGpu, OnGpu
from helpers.training import (
    ROOT,
    SmallNetwork,
    assert_same_state,
    jpegs,
    load,
    options,
    pair_set,
    record_set,
    run,
    train_main,
)
from torch import nn

import config
import data_gen
import embedding
import lfw_eval
import models
import train
import utils
from embedding import Embedder, load_embedder
from formats import crop_sets
from megaface.protocol import identification
from options import parse
from processes import Shard
from retinaface import RetinaFace, engines
from training import distributed, monitor


@pytest.fixture
def gpu():
    with EmulatedGpu() as emulated:
        yield emulated


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return record_set(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pair_set(tmp_path_factory.mktemp("pairs") / "small.bin")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "mfn.pt"
    torch.save(models.build_network("mfn", embedding_size=16).eval().state_dict(), path)
    return path


# --- the emulation itself --------------------------------------------------------------------------------------------


def test_operands_on_two_devices_fail_as_on_a_gpu(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for operation in (
        lambda: there + here,
        lambda: torch.where(there > 0, there, here),
        lambda: there @ torch.ones(3, 2),
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([1])),
        lambda: here[torch.tensor([1], device="cuda")],
        lambda: there.dot(torch.tensor(2.0).expand(3)),
        lambda: torch.add(here, here, out=there),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    # What CUDA allows: numbers, 0-dimensional operands, indices of the host, copies.
    number = torch.tensor(2.0)
    result = (there * 2 + number)[torch.tensor([0, 2])]
    result[0] = number
    there.copy_(here)
    assert result.device == torch.device("cuda:0") and result.tolist() == [2, 4]


def test_only_copies_reach_the_host(gpu):
    there = torch.arange(3, device="cuda")
    for look in (there.numpy, lambda: np.asarray(there), lambda: np.add(there, 1)):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy"):
            look()
    with pytest.raises(RuntimeError, match="does not wait"):
        there.to("cpu", non_blocking=True)
    assert type(there.cpu()) is torch.Tensor and there.cpu().numpy().tolist() == [0, 1, 2]


def test_waiting_for_the_device_is_noticed(gpu):
    values = torch.linspace(-1, 1, 8, device="cuda")
    labels = torch.arange(8).pin_memory().to("cuda", non_blocking=True)
    hidden = values.relu().index_select(0, labels).masked_fill(values > 0.5, 2.0).sum()
    assert gpu.synchronisations == []
    positive = values[values > 0]
    assert hidden.item() > 0 and bool(positive.all()) and labels.nonzero().tolist()
    torch.tensor([1.0], device="cuda").copy_(torch.ones(1))
    kinds = [line.split(" ", 1)[1] for line in gpu.synchronisations]
    expected = ["index", "local_scalar_dense", "local_scalar_dense", "nonzero", "tolist"]
    assert kinds == [*expected, "copy from Python", "copy to device"]
    assert all(line.startswith("tests/test_emulated_gpu.py:") for line in gpu.synchronisations)


def test_training_on_it_gives_the_cpus_gradients_and_counts_memory(gpu):
    torch.manual_seed(0)
    network = SmallNetwork(4).eval()
    pixels = torch.rand(2, 3, 112, 112)
    network(pixels).square().sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    before = gpu.allocated
    network.to("cuda")
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    assert gpu.allocated - before == size
    network(pixels.cuda()).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert isinstance(parameter, nn.Parameter) and parameter.is_cuda
        assert torch.equal(parameter.grad.cpu(), gradient)
    network.zero_grad()
    assert gpu.allocated == before + size < gpu.peak


def test_autocast_casts_what_it_casts_on_cuda(gpu):
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(36, 2)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        kinds = []
        for module in layer:
            module.register_forward_hook(lambda module, _, output: kinds.append(output.dtype))
        layer(torch.rand(2, 3, 5, 5, device="cuda")).float().sum().backward()
    assert set(kinds) == {torch.bfloat16}
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_another_gpu_than_the_first_becomes_the_current_one(gpu, monkeypatch):
    """Otherwise the pinning thread, the compiler and every `cuda` without a number would use the first one, too."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with distributed.join("cuda:1") as world:
        assert world.device == torch.device("cuda:1") == chosen[0]
    with distributed.join("cpu:0"), distributed.join("cuda"):
        assert len(chosen) == 1


def test_a_fused_optimiser_wants_one_layout(gpu):
    weight = nn.Parameter(torch.rand(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)
    weight.grad = torch.rand(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    optimizer.step()
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(2, 3, 4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="one layout"):
        optimizer.step()


def test_threads_have_it_and_forked_processes_do_not(gpu):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(2, device="cuda").sum().item()))
    thread.start()
    thread.join()
    assert seen == [0]
    there = torch.zeros(2, device="cuda")

    class Touching(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return (there + index).cpu()

    loader = torch.utils.data.DataLoader(Touching(), sampler=[1], num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
        next(iter(loader))


def test_memory_of_one_stream_is_not_read_in_another_unnoticed(gpu):
    [(encoded, _)] = jpegs(1, 1)
    picture = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="nvJPEG would write, at once"):
        data_gen.decode_jpeg([picture], device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        [decoded] = data_gen.decode_jpeg([picture], device="cuda")
    with pytest.raises(RuntimeError, match="memory of another stream"):
        decoded.float()
    decoded.record_stream(torch.cuda.current_stream())
    assert decoded.float().mean().item() > 0


def test_nothing_of_it_is_left():
    with EmulatedGpu():
        assert utils.choose_device("auto").type == "cuda"
    assert EmulatedGpu.active is None and threading.Thread.run.__module__ == "threading"
    assert data_gen.decode_jpeg.__module__ == "data_gen"
    assert torch.cuda.is_available.__module__ == "torch.cuda"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs train.py's loop in this process, where it can be watched; gives the run's folder."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    def run(data, name, *, small=True, code=0, **changes):
        if small:
            monkeypatch.setattr(models, "build_network", lambda name, se, size, **_: SmallNetwork(size))
        chosen = parse(config.Train, argv=options(data, tmp_path / name, **changes))
        with distributed.join(chosen.device) as world, monitor.RunLog() as log:
            assert train.train(chosen, world, log) == code
        return tmp_path / name

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def steps(monkeypatch, gpu):
    """For each step of a run: where the host waited for the device since the last one."""
    waits, add = [], monitor.Window.add

    def noting(window, *measured):
        add(window, *measured)
        waits.append(gpu.synchronisations.copy())
        gpu.synchronisations.clear()

    monkeypatch.setattr(monitor.Window, "add", noting)
    return waits


def test_the_published_recipe_never_waits_inside_a_step(crops, pairs, gpu, start, steps):
    """r18 with everything that --device cuda switches on: bfloat16, channels-last, workers, pinned memory."""
    settings = {"network": "r18", "epochs": 2, "batch_size": 8, "log_every": 3, "workers": 1, "val_every": 2}
    out = start(crops, "run", small=False, device="cuda", val=pairs, **settings)
    assert len(steps) == 6 and gpu.computed > 1000
    # Steps 0 and 3 show crops in TensorBoard; the reading and the checkpoint after step 2 are noted with step 3, too.
    assert [steps[number] for number in (1, 2, 4, 5)] == [[]] * 4
    content = load(out / "checkpoint.pt")
    assert all(value.device.type == "cpu" for value in content["model"].values())
    assert load(out / "embedding.pt").keys() == content["model"].keys()
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and results["best"]["verification"]["small"]["pairs"] == 12
    assert json.loads((out / "run.json").read_text())["environments"][0]["gpus"] == ["an emulated GPU"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "arcface", "augment": "none", "focal_gamma": 2.0, "grad_clip": 0},
        {"loss": "cosface", "augment": "strong", "amp": False, "channels_last": False},
        {"loss": "combined", "accumulate": 2, "margin_warmup": 1.0},
        {"loss": "adaface", "sample_rate": 0.5, "accumulate": 2},
        {"loss": "arcface", "sample_rate": 0.3, "workers": 1, "momentum": 0},
        {"loss": "arcface", "decode": "gpu", "schedule": "cosine"},
    ],
)
def test_no_variant_waits_inside_a_step(crops, gpu, start, steps, changes):
    start(crops, "run", device="cuda", epochs=1, log_every=100, **changes)
    if changes.get("decode") == "gpu":  # nvJPEG is called by the host; nothing else waits
        steps = [[line for line in step if not line.endswith(" decode")] for step in steps]
    assert len(steps) == 6 and steps[1:] == [[]] * 5


def test_recomputed_activations_take_less_memory(crops, gpu, start):
    peaks = []
    for recompute in (False, True):
        gpu.reset_peak()
        before = gpu.peak
        settings = {"network": "mfn", "epochs": 1, "batch_size": 12, "checkpoint_activations": recompute}
        start(crops, f"run-{recompute}", small=False, device="cuda", **settings)
        peaks.append(gpu.peak - before)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("sample_rate", [1, 0.5])
def test_a_run_and_its_resumption_are_the_cpus(crops, gpu, start, sample_rate, monkeypatch):
    """In float32, with every crop and every random number the same, so must the weights be."""
    settings = {"amp": False, "sample_rate": sample_rate, "loss": "adaface", "save_every": 1}
    expected = load(start(crops, "cpu", device="cpu", **settings) / "checkpoint.pt")

    def stop(options, step, seconds, termination):
        return train.STOP if step == 5 else 0

    with monkeypatch.context() as patch:
        patch.setattr(train, "next_action", stop)
        start(crops, "gpu", device="cuda", code=143, **settings)
    out = start(crops, "gpu", device="cuda", resume=True, **settings)
    assert_same_state(load(out / "checkpoint.pt"), expected)


def test_crops_that_the_gpu_cannot_decode_are_decoded_by_the_cpu(tmp_path, gpu, start):
    items = list(jpegs(6, 4))
    image = cv2.imdecode(np.frombuffer(items[3][0], np.uint8), cv2.IMREAD_COLOR)
    items[3] = (cv2.imencode(".png", image)[1].tobytes(), items[3][1])
    items[9] = (items[9][0][:300], items[9][1])
    crop_sets.write_crops(tmp_path / "crops", items)
    settings = {"device": "cuda", "decode": "gpu", "epochs": 1, "skip_unreadable": True, "augment": "none"}
    out = start(tmp_path / "crops", "run", **settings)
    results = json.loads((out / "results.json").read_text())
    assert results["unreadable_crops"] == [crop_sets.open_training_set(tmp_path / "crops").describe(9)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_compiling_lacks_is_said_before_the_first_step(gpu, monkeypatch, tmp_path, device):
    chosen = parse(config.Train, argv=options("crops", tmp_path / "run", device=device, compile=True))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    compiler = {"cpu": "CXX", "cuda": "CC"}[device]
    with distributed.join(device) as world:
        monkeypatch.setenv(compiler, f"{sys.executable} -O2")
        train.check_options(chosen, world)
        (tmp_path / "Python.h").unlink()
        with pytest.raises(utils.InputError, match=r"--compile: there is no .*/Python.h"):
            train.check_options(chosen, world)
        monkeypatch.setenv(compiler, "no-such-compiler")
        with pytest.raises(utils.InputError, match="--compile: there is no no-such-compiler; install one, or leave"):
            train.check_options(chosen, world)
        monkeypatch.delenv(compiler)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(utils.InputError, match=r"there is no (gcc or clang|g\+\+); install"):
            train.check_options(chosen, world)


def test_a_batch_that_does_not_fit_is_one_line(crops, gpu, start, monkeypatch, capsys, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(SmallNetwork, "forward", full)
    monkeypatch.setattr(sys, "argv", ["train.py", *options(crops, tmp_path / "run", device="cuda")])
    monkeypatch.setattr(models, "build_network", lambda name, se, size, **_: SmallNetwork(size))
    assert train.main() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --batch-size 4: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--accumulate" in error and "--checkpoint-activations" in error


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"sample_rate": 0.5}])
def test_two_ranks_on_gpus_are_two_on_cpus(crops, tmp_path, changes):
    """Every collective is given tensors of the device of its group, and the weights are the same."""
    states = []
    for device, target in (("cpu", train_main), ("cuda", emulated_nccl.train_main)):
        settings = {"amp": False, "loss": "adaface", "batch_size": 8, "workers": 0, "device": device} | changes
        run(target, options(crops, tmp_path / device, **settings), output=tmp_path / f"{device}.txt", size=2)
        states.append(load(tmp_path / device / "checkpoint.pt"))
    assert_same_state(*states)


# --- features, faces, scores -----------------------------------------------------------------------------------------


def random_crops(count):
    return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), np.uint8)


@pytest.mark.parametrize("mirror", [False, True])
def test_features_with_a_last_batch_that_is_not_full(checkpoint, gpu, mirror):
    expected = load_embedder(checkpoint, "cpu", mirror=mirror).features(random_crops(7))
    options = config.Model(checkpoint=str(checkpoint), device="auto", mirror=mirror, batch_size=3)
    embedder = embedding.open_embedder(options, utils.choose_device(options.device))
    features = embedder.features(random_crops(7))
    assert gpu.computed > 100 and embedder.describe()["device"] == "cuda"
    assert features.dtype == np.float32 and np.allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_features_are_computed_in_true_float32(gpu, monkeypatch):
    """Ten bits of mantissa, cuDNN's default on an H100, would miss the published embeddings by 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as train.py does
    try:
        seen = []
        network = SmallNetwork(4).cuda()
        network.register_forward_hook(
            lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        )
        Embedder.from_network(network, "cuda").features(random_crops(2))
        assert seen == [(False, "highest")] * 2
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.benchmark and network.training
    finally:
        torch.set_float32_matmul_precision(before)


def test_evaluation_script(checkpoint, pairs, gpu, tmp_path, monkeypatch):
    line = ["lfw_eval.py", "--checkpoint", checkpoint, "--bin", pairs, "--folds", "3"]
    reports = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        monkeypatch.setattr(sys, "argv", [*map(str, line), "--out", str(out), "--device", device])
        assert lfw_eval.main() == 0
        reports.append(json.loads((out / "results.json").read_text()))
    assert gpu.computed > 400 and reports[1]["model"]["device"] == "cuda"
    [here], [there] = (report["sets"] for report in reports)
    assert (here["auc"], here["accuracy_kfold_mean"]) == (there["auc"], there["accuracy_kfold_mean"])
    assert here["threshold_best"]["cosine"] == pytest.approx(there["threshold_best"]["cosine"], abs=1e-5)


def photos():
    """Parts of the picture in the README, in three sizes; its people do not exist."""
    picture = cv2.imread(str(ROOT / "docs" / "images" / "pipeline.jpg"))
    return [picture, picture[:-40], picture[:, 50:], picture[:-40]]


def test_faces_are_those_of_the_cpu(gpu):
    settings = {"score_threshold": 0.5, "max_side": 600}
    expected = RetinaFace(device="cpu", **settings).detect(photos())
    detector = RetinaFace(**settings)
    found = detector.detect(photos())
    assert detector.device.type == "cuda" and gpu.computed > 100
    assert sum(map(len, expected)) > 10
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        assert np.allclose(one.scores, other.scores, atol=1e-5)
        assert np.allclose(one.boxes, other.boxes, atol=1e-2) and np.allclose(one.landmarks, other.landmarks, atol=1e-2)


def test_threads_that_share_a_detector_keep_its_precision(gpu, monkeypatch):
    """The switch of TensorFloat-32 is one for all threads."""
    seen, forward = [], engines.forward

    def slowly(*arguments):
        time.sleep(0.05)
        result = forward(*arguments)
        seen.append(torch.backends.cudnn.allow_tf32)
        return result

    monkeypatch.setattr(engines, "forward", slowly)
    detector = RetinaFace()
    threads = [threading.Thread(target=detector.detect, args=(photos()[:1],)) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert seen == [False] * 3 and torch.backends.cudnn.allow_tf32


def scored(seed, count=60, distractors=700, quantum=None):
    random = np.random.default_rng(seed)
    people = random.normal(size=(12, 32))
    probes = people[np.arange(count) % 12] + 0.8 * random.normal(size=(count, 32))
    others = random.normal(size=(distractors, 32))
    others[5:9] = others[4]
    if quantum:
        probes, others = (np.round(values / quantum) * quantum for values in (probes, others))
    return probes.astype(np.float32), [f"person {i % 12}" for i in range(count)], others.astype(np.float32)


@pytest.mark.parametrize("quantum", [None, 0.5])
def test_identification_is_the_cpus_to_the_bit(gpu, quantum):
    probes, ids, distractors = scored(1, quantum=quantum)
    absent, ignored = np.arange(60) == 7, np.arange(700) % 50 == 3
    settings = {"sizes": [10, 500, 700], "absent": absent, "ignored": ignored}
    expected = identification(probes, ids, distractors, device="cpu", **settings)
    found = identification(probes, ids, distractors, device="cuda", **settings)
    assert gpu.computed > 500
    for one, other in zip(found, expected, strict=True):
        for name in ("scores", "ranks", "cmc", "traditional_cmc", "best_index", "best_score"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert np.array_equal(one.roc.accepts, other.roc.accepts) and np.array_equal(one.roc.rates, other.roc.rates)


@pytest.fixture
def warp_on_gpu(gpu, monkeypatch):
    """warp's arrays and kernels stay on the CPU, whatever device is named; gives the devices of tensors it looks at."""
    warp = pytest.importorskip("warp")
    pytest.importorskip("anny")
    to, from_torch = warp.array.to, warp.from_torch

    def on_cpu(function):
        return lambda *arguments, **settings: function(*arguments, **settings | {"device": "cpu"})

    def view(tensor, **settings):
        viewed.append(tensor.device.type)
        return from_torch(tensor.held if isinstance(tensor, OnGpu) else tensor, **settings)

    viewed = []

    monkeypatch.setattr(warp.array, "to", lambda array, device, **settings: to(array, "cpu", **settings))
    monkeypatch.setattr(warp, "from_torch", view)
    for name in ("array", "empty", "zeros", "launch"):
        monkeypatch.setattr(warp, name, on_cpu(getattr(warp, name)))
    return viewed


def test_people_who_do_not_exist_are_the_cpus(warp_on_gpu, gpu):
    """A person's photos in one launch with tensors on the GPU: the same bytes as one after the other on the CPU."""
    from synthetic import parameters, render

    results = []
    for device in ("cpu", "cuda"):
        warp_on_gpu.clear()
        renderer = render.Renderer(torch.device(device))
        person = parameters.draw_identity(0, 3, renderer.head, frozenset())
        photos = [parameters.draw_photo(person, k, renderer.head, frozenset(), "all") for k in range(3)]
        results.append(renderer.photograph(person, photos, 64))
        assert set(warp_on_gpu) == {device}
    (images, truths), (images_there, truths_there) = results
    assert gpu.computed > 50
    for one, other in zip(images_there, images, strict=True):
        assert np.array_equal(one, other) and one.std() > 5
    for one, other in zip(truths_there, truths, strict=True):
        assert np.allclose(one.landmarks, other.landmarks, atol=1e-3) and np.allclose(one.box, other.box, atol=1e-3)


def test_the_tracer_is_compiled_before_processes_start(warp_on_gpu, gpu, monkeypatch, tmp_path):
    """For the GPU and for the CPU, where paint looks for surfaces: else each process would compile it on its own."""
    from synthetic import dataset

    compiled = []
    monkeypatch.setattr("warp.load_module", lambda module, device: compiled.extend(device))
    monkeypatch.setattr(dataset, "_start_worker", lambda people, device: None)
    monkeypatch.setattr(dataset, "_work", lambda chunk: 1)
    people = dataset.People(tmp_path, dataset.Plan(2, 1, 0, 0, 64, "photos", False, "all", (), 3, 100))
    dataset.make_people(people, Shard(), torch.device("cuda", 0), 1)
    assert sorted(compiled) == ["cpu", "cuda:0"]
