"""Several processes train as one: same loss, same weights, same checkpoint."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers.toy_models import TEACHER, write_onnx
from helpers.training import (
    ROOT,
    SmallNetwork,
    assert_same_state,
    finish,
    jpegs,
    load,
    options,
    record_set,
    run,
    start,
    tensors,
    train_main,
    train_run,
    use_small_network,
)
from test_restart import wait_for_step
from torch import nn

import config
import data_gen
import processes as launched
import train
import utils
from formats import crop_sets, verification_bin
from options import parse
from training import augment, checkpoints, distributed, storage, validation
from training.run import Run
from training.schedules import Schedule
from utils import InputError

STEPS = 4


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    # 7 identities: not divisible by 2, 3 or 4 ranks.
    return record_set(tmp_path_factory.mktemp("crops"), identities=7, each=12)


def some_steps(line, out, dtype, first, last, small=True):
    """Train from the checkpoint in `out` (none for step 0) to step `last` with train.py's own parts; save there."""
    if small:
        use_small_network()
    settings = parse(config.Train, argv=line)
    with distributed.join("cpu") as world:
        data = crop_sets.open_training_set(settings.data)
        known = {"fingerprint": crop_sets.fingerprint(data)}
        order = data_gen.BatchOrder(len(data), settings.batch_size, 0, world.rank, world.size, settings.accumulate)
        schedule = Schedule(settings, order.steps_per_epoch)
        whole = Run(settings, world, data, known, order, schedule, [], print)
        teacher = train.find_teacher(whole) if settings.teacher else None
        if teacher is not None:
            teacher.prepare()
        state = train.build(settings, data.identities, schedule, world, teacher)
        for module in (state.network, state.head, state.distillation):
            if module is not None:
                module.to(dtype)
        for module in state.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # one mask for each rank: not meant to be the same on another number of ranks
        if first:
            checkpoints.restore(state, storage.find_last(out / str(first), world, print), world)
        model = distributed.data_parallel(state.network, world).train()
        dataset = data_gen.CropDataset(data, augment.Augmentation.named("published"), 0)
        losses = []
        requests = order.micro_batches(first, last)
        for _ in range(first, last):
            total = 0.0
            for part in range(settings.accumulate):
                batch = dataset[next(requests)]
                inputs = data_gen.to_inputs(batch.images).to(dtype)
                alone = world.size == 1 or part == settings.accumulate - 1
                with contextlib.nullcontext() if alone else model.no_sync():
                    features = model(inputs)
                    share, loss, _ = train.loss_of(state, features, batch.labels, batch.images, batch.indices)
                    (share / settings.accumulate).backward()
                total += loss.item() / settings.accumulate
            losses.append(total)
            if state.distillation is not None:
                state.distillation.sum_gradients()
            norm = train.gradient_norm(state, world).item()
            train.apply_gradients(state, settings, settings.lr)
            state.step += 1
        with distributed.averaged_statistics(state.network, world) as statistics:
            writer = storage.Writer(out / str(last), world)
            writer.submit(checkpoints.collect(whole, state, statistics))
            writer.wait()
        if world.is_main:
            content = storage.whole(out / str(last) / "checkpoint.pt")
            torch.save(content | {"losses": losses, "norm": norm}, out / f"{last}.pt")
    return 0


def trained(crops, folder, size, dtype=torch.float64, small=True, **changes):
    """What `size` processes have after STEPS steps."""
    out = folder / f"on-{size}"
    out.mkdir()
    line = options(crops, out, batch_size=12, sync_bn=True, **changes)
    run(some_steps, line, out, dtype, 0, STEPS, small, output=out / "output", size=size)
    return load(out / f"{STEPS}.pt")


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=tolerance, atol=0)
    assert found["norm"] == pytest.approx(expected["norm"], rel=100 * tolerance)
    one, other = ({k: v for k, v in tensors(content).items() if k != "statistics"} for content in (found, expected))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(
            value, other[key], rtol=tolerance, atol=tolerance, msg=lambda text, key=key: key + text
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample_rate": 0.4},
        {"loss": "adaface", "focal_gamma": 2.0},
        {"accumulate": 2},
        {"sample_rate": 0.4, "accumulate": 2, "loss": "combined"},
        {"loss": "magface", "sub_centres": 2, "filter": 0.3},
        {"loss": "curricularface", "sample_rate": 0.4, "teacher": "toy"},
        {"loss": "none", "teacher": "toy", "teacher_online": True, "accumulate": 2},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "plain",
)
def test_two_and_three_processes_are_exactly_one(crops, tmp_path, changes):
    """In float64, where rounding cannot hide an error: all weights, momenta and statistics after four large steps."""
    if "teacher" in changes:
        changes = changes | {"teacher": write_onnx(tmp_path / "toy.onnx", metadata=TEACHER)}
    alone = trained(crops, tmp_path, 1, lr=0.1, **changes)
    moved = alone["model"]["5.weight"] - untrained()[5].weight
    assert moved.abs().max() > 0.01
    for size in (2, 3):
        assert_close(trained(crops, tmp_path, size, lr=0.1, **changes), alone, 1e-9)


def untrained():
    """The network as train.py begins with it."""
    torch.manual_seed(0)
    return SmallNetwork(16).double()


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_float32_agrees_to_1e_5(crops, tmp_path, sample_rate):
    """At the published rate, scale and embedding size: losses, and each number of every weight and centre.

    Running variances reach 1500: there, 1e-5 of the largest. What is left is rounding: one process in float32 is as far
    from one in float64. (Momenta, sums of a million terms that nearly cancel, are compared in float64 above.)
    """
    changes = {"lr": 0.1, "embedding_size": 512, "scale": 64, "sample_rate": sample_rate}
    alone = trained(crops, tmp_path, 1, torch.float32, **changes)
    assert alone["losses"][-1] < 0.8 * alone["losses"][0]
    for size in (2, 3):
        found = trained(crops, tmp_path, size, torch.float32, **changes)
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
        for key, value in alone["model"].items():
            largest = float(value.abs().max()) if "running_var" in key else 1.0
            torch.testing.assert_close(found["model"][key], value, rtol=1e-5, atol=1e-5 * largest)
        torch.testing.assert_close(found["head"]["centres"], alone["head"]["centres"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_three_ranks_resume_on_one_two_and_four(crops, tmp_path, sample_rate):
    line = options(crops, tmp_path, batch_size=12, sync_bn=True, sample_rate=sample_rate, lr=0.1)
    unbroken = trained(crops, tmp_path, 1, lr=0.1, sample_rate=sample_rate)
    run(some_steps, line, tmp_path, torch.float64, 0, 2, output=tmp_path / "output", size=3)
    for size in (1, 2, 4):
        run(some_steps, line, tmp_path, torch.float64, 2, STEPS, output=tmp_path / "output", size=size)
        resumed = load(tmp_path / f"{STEPS}.pt")
        assert_close(resumed, unbroken | {"losses": unbroken["losses"][2:]}, 1e-9)


def test_recomputed_activations_with_synchronised_batch_norm(crops, tmp_path):
    found = []
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        out.mkdir()
        line = options(crops, out, batch_size=4, sync_bn=True, lr=0.1, checkpoint_activations=recompute)
        run(some_steps, line, out, torch.float64, 0, 1, False, output=out / "output", size=2)
        found.append(load(out / "1.pt"))
    assert_close(*found, 1e-9)
    assert found[1]["model"]["stem.0.1.num_batches_tracked"] == 1
    assert found[1]["model"]["blocks.0.layers.0.1.num_batches_tracked"] == 1


def test_without_sync_bn_statistics_are_averaged_over_ranks(crops, tmp_path):
    """Each rank normalises by its own part of the batch; the checkpoint holds the mean of their running statistics."""
    out = tmp_path / "out"
    out.mkdir()
    line = options(crops, out, batch_size=12, lr=0.1)
    run(some_steps, line, out, torch.float64, 0, 1, output=out / "output", size=2)
    saved = load(out / "1.pt")
    found = saved["model"]
    data = crop_sets.open_training_set(crops)
    indices = data_gen.BatchOrder(len(data), 12, 0).global_batch(0)
    batch = data_gen.CropDataset(data, augment.Augmentation.named("published"), 0)[(0, indices)]
    first = untrained()[0](data_gen.to_inputs(batch.images).double())
    means = [part.mean(dim=(0, 2, 3)) for part in first.split(6)]
    torch.testing.assert_close(found["1.running_mean"], 0.1 * sum(means) / 2, rtol=1e-9, atol=1e-12)
    # Each rank's own are kept beside it, for as many ranks to go on with.
    torch.testing.assert_close(saved["statistics"][:, :8], 0.1 * torch.stack(means), rtol=1e-9, atol=1e-12)


def test_two_processes_killed_and_resumed_end_with_the_same_bits_on_torchrun(tmp_path):
    """The commands of the README, with a real network."""
    recipe = {"batch_size": 8, "epochs": 2, "save_every": 2, "augment": "strong", "margin_warmup": 1.0}
    recipe |= {"small_epochs": 1.5}  # killed before the crops grow
    crops = record_set(tmp_path / "crops", identities=6, each=4)
    unbroken = tmp_path / "unbroken"
    line = options(crops, unbroken, **recipe)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = subprocess.run([*command, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mfn on 2 x cpu" in done.stderr

    out, output = tmp_path / "killed", tmp_path / "output"
    line = options(crops, out, **recipe, resume=True)
    processes = start(train_main, line, False, output=output, size=2)
    wait_for_step(out, 3, processes)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * 2
    stopped = load(out / "checkpoint.pt")["step"]
    assert 2 <= stopped < 6
    code, text = train_run(line, output, size=2, small=False)
    assert code == 0, text
    assert f"goes on at step {stopped} of 6" in text
    assert_same_state(load(out / "checkpoint.pt"), load(unbroken / "checkpoint.pt"))


def test_sigterm_to_one_rank_stops_all_with_one_checkpoint(crops, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    line = options(crops, out, epochs=200, batch_size=12, save_every=50)
    processes = start(train_main, line, output=output, size=2)
    wait_for_step(out, 50, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM] * 2
    step = load(out / "checkpoint.pt")["step"]
    assert f"stopped after step {step} of 1400" in output.read_text()


def test_unreadable_crops_of_all_processes_are_named_once(tmp_path):
    items = list(jpegs(6, 4))
    damaged = (2, 5, 9, 14, 20)
    for index in damaged:
        items[index] = (items[index][0][:200], items[index][1])
    crop_sets.write_crops(tmp_path / "crops", items)
    line = options(tmp_path / "crops", tmp_path / "run", skip_unreadable=True, save_every=1)
    code, text = train_run(line, tmp_path / "output", size=2)
    assert code == 0, text
    where = [crop_sets.open_training_set(tmp_path / "crops").describe(index) for index in damaged]
    assert [text.count(f"{place}: unreadable, replaced") for place in where] == [1] * len(damaged)
    named = json.loads((tmp_path / "run" / "results.json").read_text())["unreadable_crops"]
    assert named == where
    assert load(tmp_path / "run" / "checkpoint.pt")["skipped"] == list(damaged)


def test_bad_input_is_one_line(crops, tmp_path):
    code, text = train_run(options(crops, tmp_path / "a", batch_size=5), tmp_path / "output", size=2)
    assert code == 1
    expected = "error: --batch-size 5 must be a multiple of 2 (2 processes times --accumulate 1)"
    assert text.count("error:") == text.count(f"{expected}\n") == 2  # one for each process
    code, text = train_run(options(crops, tmp_path / "a", device="cuda:0", batch_size=4), tmp_path / "output", size=2)
    assert code == 1 and "error: --device cuda:0: with several processes it is auto, cuda" in text


def other_rate(line):
    return train_main([*line, "--lr", "0.5", "--workers", "1"] if os.environ["RANK"] == "1" else line)


def test_processes_with_other_options_are_refused(crops, tmp_path):
    """Each would train a network of its own, of which rank 0's is kept."""
    codes = finish(start(other_rate, options(crops, tmp_path / "run"), output=tmp_path / "output", size=2))
    text = (tmp_path / "output").read_text()
    assert codes == [1, 1], text
    expected = "error: --lr: not the same for all processes (0.02, 0.5); start all of them with the same command line\n"
    assert text.count("error:") == text.count(expected) == 2
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_meet_are_told_where(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with (
        pytest.raises(InputError, match=r"process 0 of 2: cannot meet the others: .*MASTER_PORT"),
        distributed.join("cpu"),
    ):
        pass
    with socket.create_server(("127.0.0.1", 0)) as other_run:
        monkeypatch.setenv("MASTER_PORT", str(other_run.getsockname()[1]))
        expected = r"cannot meet the others at MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+ .*address already in use"
        with pytest.raises(InputError, match=expected), distributed.join("cpu"):
            pass


# --- started, stopped, left alone ------------------------------------------------------------------------------------


def test_tasks_of_slurm_train_as_one(crops, tmp_path):
    line = options(crops, tmp_path / "run", batch_size=12, epochs=1)
    processes = start(train_main, line, output=tmp_path / "output", size=2, launcher="srun")
    assert finish(processes) == [0, 0], (tmp_path / "output").read_text()
    assert "mfn on 2 x cpu" in (tmp_path / "output").read_text()
    assert train_run(options(crops, tmp_path / "torchrun", batch_size=12, epochs=1), tmp_path / "other", size=2)[0] == 0
    assert_same_state(load(tmp_path / "run" / "checkpoint.pt"), load(tmp_path / "torchrun" / "checkpoint.pt"))


def leave_the_other(folder):
    """Rank 1 finds something wrong while rank 0 is inside a collective that it will never join."""

    def main():
        with distributed.join("cpu") as world:
            if world.rank == 1:
                raise InputError("rank 1 found something wrong")
            world.sum(torch.zeros(3))
        return 0

    distributed.leave(utils.command(main))


def test_after_an_error_nobody_waits(tmp_path):
    codes = finish(start(leave_the_other, tmp_path, output=tmp_path / "output", size=2))
    text = (tmp_path / "output").read_text()
    assert codes == [1, 1], text
    assert "error: rank 1 found something wrong\n" in text
    assert "error: process 0 of 2: another process of this run has ended; its own message says why\n" in text
    assert "Traceback" not in text


def two_sets(folder):
    """Sets of 150 and 5 crops: more than two chunks, and less than one."""
    for name, number in (("many", 150), ("few", 5)):
        faces = [data for data, _ in jpegs(number // 5, 5, seed=number)]
        pairs = [(faces[i], faces[(i * 7 + 1) % number], i % 2 == 0) for i in range(number)]
        encoded = [face for first, second, _ in pairs for face in (first, second)]
        verification_bin.write_bin(folder / f"{name}.bin", encoded, [same for _, _, same in pairs])
    return [folder / "many.bin", folder / "few.bin"]


def measured(line, out):
    chosen = parse(config.Train, argv=line)
    with distributed.join("cpu") as world:
        sets = train.open_verification_sets(chosen, world)
        run = Run(chosen, world, None, {}, None, Schedule(chosen, 1), sets, print)
        torch.manual_seed(0)
        network = SmallNetwork(16).train()
        results = validation.measure(run, network, lambda: False)
        assert network.training
        assert validation.measure(run, network, lambda: world.rank == world.size - 1) is None
        if world.is_main:
            cosines = {name: torch.from_numpy(result.cosines) for name, result in results.items()}
            torch.save(cosines, out / f"{world.size}.pt")
        else:
            assert results == {}


def test_verification_shared_by_processes_is_that_of_one_to_the_bit(tmp_path):
    line = options("unused", tmp_path, val=two_sets(tmp_path))
    found = []
    for size in (1, 2, 3):
        run(measured, line, tmp_path, output=tmp_path / "output", size=size)
        found.append(torch.load(tmp_path / f"{size}.pt"))
    assert found[0].keys() == {"many", "few"} and found[0]["many"].std() > 0
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def slow_verification(line, folder):
    """train.py whose verification takes a while for each chunk, and says when it has begun."""
    plain = validation._features

    def slow(*arguments):
        (folder / "verifying").touch()
        time.sleep(0.2)
        return plain(*arguments)

    validation._features = slow
    validation.features.CHUNK = 4
    return train_main(line, small=False)


def test_a_signal_while_an_epoch_is_verified_ends_at_once_and_it_is_verified_later(crops, tmp_path):
    """The checkpoint is written first: torchrun sends SIGKILL 30 seconds after SIGTERM."""
    out, output, sets = tmp_path / "run", tmp_path / "output", two_sets(tmp_path)
    line = options(crops, out, epochs=1, batch_size=84, val=sets)
    processes = start(slow_verification, line, tmp_path, output=output, size=2)
    until = time.monotonic() + 120
    while not (tmp_path / "verifying").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM] * 2, output.read_text()
    assert "stopped after step 1 of 1; the same command with --resume goes on" in output.read_text()
    stopped = load(out / "checkpoint.pt")
    assert stopped["step"] == 1 and stopped["history"][0]["verification"] == {}
    assert not (out / "results.json").exists()
    code, text = train_run([*line, "--resume"], output, size=2, small=False)
    assert code == 0, text
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and results["best"]["verification"].keys() == {"many", "few"}
    assert results["best"]["loss"] == stopped["history"][0]["loss"]
    # Done once more, it is not measured again.
    code, text = train_run([*line, "--resume"], output, small=False)
    assert code == 0 and "features" not in text
    assert json.loads((out / "results.json").read_text()) == results


# --- machines --------------------------------------------------------------------------------------------------------


def test_an_address_that_other_machines_cannot_reach(monkeypatch):
    two_nodes = launched.Task(0, 4, 0, 2, "torchrun")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(InputError, match=r"stands for 127.0.1.1, .* export GLOO_SOCKET_IFNAME=NAME.*here there are: "):
        distributed.check_addresses(two_nodes)
    distributed.check_addresses(launched.Task(0, 2, 0, 2, "torchrun"))  # one machine
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # two launchers on one machine
    distributed.check_addresses(two_nodes)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    distributed.check_addresses(two_nodes)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.2")
    distributed.check_addresses(two_nodes)


def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
    """As Slurm's --gpus-per-task=1 shows them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert distributed._device_of("auto", 3) == torch.device("cuda:0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # one GPU in the machine, and four processes
    with pytest.raises(InputError, match="--device cuda:3: this machine has 1 CUDA devices"):
        distributed._device_of("auto", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed._device_of("auto", 3) == torch.device("cuda:3")
