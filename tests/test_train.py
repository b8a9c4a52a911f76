"""train.py on one process: schedules, what a run leaves behind, and what it does when something is wrong."""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.training import (
    ROOT,
    SmallNetwork,
    finish,
    folder_set,
    jpegs,
    load,
    options,
    pair_set,
    record_set,
    start,
    train_main,
    train_run,
)

import data_gen
import export_centres
import models
import train
import utils
from config import Train
from formats import crop_sets, recordio, tables
from options import Interval, parse
from training import monitor, reporting, storage
from training.distributed import World
from training.run import Run
from training.schedules import Schedule
from utils import InputError

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return record_set(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pair_set(tmp_path_factory.mktemp("pairs") / "small.bin")


def wait_for(path):
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)


def settings(**changes):
    return parse(Train, argv=options("crops", "out", **changes))


def a_run(device="cpu", identities=1000, **changes):
    """A run of which only options and schedule are looked at."""
    chosen = settings(**changes)
    crops = SimpleNamespace(identities=identities)
    return Run(chosen, World(0, 1, torch.device(device)), crops, {}, None, Schedule(chosen, 1), [], print)


def build(chosen, identities):
    """What train.py begins with, in this process."""
    return train.build(chosen, identities, Schedule(chosen, 1), HERE)


# --- schedules -------------------------------------------------------------------------------------------------------


def rates(**changes):
    chosen = settings(**changes)
    return [Schedule(chosen, 10).learning_rate(step) for step in range(10 * chosen.epochs)]


def test_the_published_rate_is_the_default():
    chosen = parse(Train, argv=["--data", "x", "--out", "y"])
    schedule = Schedule(chosen, 100)
    rate = [schedule.learning_rate(epoch * 100) for epoch in range(40)]
    expected = [0.1] * 8 + [0.01] * 8 + [1e-3] * 8 + [1e-4] * 8 + [1e-5] * 8
    assert rate == pytest.approx(expected)
    assert schedule.learning_rate(799) == 0.1
    assert schedule.margin(0) == schedule.full_margin == (0.6,)
    assert (chosen.batch_size, chosen.scale, chosen.weight_decay, chosen.grad_clip) == (256, 64.0, 5e-4, 5.0)
    assert (chosen.network, chosen.embedding_size, chosen.momentum, chosen.augment) == ("r101", 512, 0.9, "published")


@pytest.mark.parametrize("schedule", ["steps", "cosine", "poly"])
def test_warmup_starts_below_the_full_rate_and_ends_at_it(schedule):
    rate = rates(schedule=schedule, warmup=2.0, epochs=6, lr=0.4)
    assert rate[0] == pytest.approx(0.4 / 21)
    assert np.allclose(np.diff(rate[:20]), 0.4 / 21)
    assert rate[20] == pytest.approx(0.4) == max(rate)


def test_cosine_and_poly_fall_to_zero():
    cosine, poly = rates(schedule="cosine", epochs=8, lr=0.1), rates(schedule="poly", epochs=8, lr=0.1)
    expected = [0.05 * (1 + math.cos(math.pi * step / 80)) for step in range(80)]
    assert cosine == pytest.approx(expected)
    assert poly == pytest.approx([0.1 * (1 - step / 80) ** 2 for step in range(80)])
    assert (np.diff(cosine) < 0).all() and (np.diff(poly) < 0).all()
    assert Schedule(settings(schedule="cosine", epochs=8), 10).learning_rate(80) == pytest.approx(0, abs=1e-12)
    assert Schedule(settings(schedule="poly", epochs=8), 10).learning_rate(95) == 0


def test_crops_are_small_for_as_long_as_asked():
    assert [Schedule(settings(), 10).side(step) for step in (0, 399)] == [112, 112]
    schedule = Schedule(settings(small_epochs=1.5, small_side=80), 10)
    assert [schedule.side(step) for step in (0, 14, 15, 399)] == [80, 80, 112, 112]


def test_milestones_may_be_anywhere():
    rate = rates(milestones=[0.5, 1.5], epochs=2, lr=1.0)
    assert rate == pytest.approx([1.0] * 5 + [0.1] * 10 + [0.01] * 5)


def test_the_margin_grows_to_its_value():
    schedule = Schedule(settings(margin=0.4, margin_warmup=2.0), 10)
    assert [schedule.margin(step)[0] for step in (0, 5, 10, 20, 500)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    combined = Schedule(settings(loss="combined", margin=[0.8, 0.3, 0.2], margin_warmup=1.0), 10)
    assert combined.margin(0) == (1.0, 0.0, 0.0)
    assert combined.margin(5) == pytest.approx((0.9, 0.15, 0.1))
    assert combined.full_margin == (0.8, 0.3, 0.2)
    assert Schedule(settings(loss="combined"), 10).margin(10) == (1.0, 0.3, 0.2)
    assert Schedule(settings(loss="cosface"), 10).margin(0) == (0.35,)


@pytest.mark.parametrize(
    ("text", "steps", "seconds"), [("500", 500, None), ("10min", None, 600), ("90s", None, 90), ("1.5h", None, 5400)]
)
def test_intervals(text, steps, seconds):
    interval = Interval(text)
    assert (interval.steps, interval.seconds, str(interval)) == (steps, seconds, text)


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "10 weeks", "min", "0s"])
def test_intervals_that_mean_nothing(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number of steps"):
        Interval(text)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"lr": 0}, "--lr 0.0: must be above 0"),
        ({"lr": "nan"}, "--lr nan: must be above 0"),
        ({"scale": -1}, "--scale -1.0: must be above 0"),
        ({"small_epochs": 1, "network": "vit_t"}, "--small-epochs: vit_t takes crops of 112 pixels only"),
        ({"small_epochs": 2, "epochs": 2}, "--small-epochs 2 leaves no whole crops to --epochs 2"),
        ({"warmup": 2, "epochs": 2}, "--warmup 2 leaves nothing of --epochs 2"),
        ({"weight_decay": -1}, "--weight-decay -1.0: must be at least 0"),
        ({"margin": [0.1, 0.2]}, "--margin: arcface takes one number, such as 0.6, not 0.1 0.2"),
        ({"loss": "combined", "margin": 0.5}, "--margin: combined takes 3 numbers, such as 1 0.3 0.2, not 0.5"),
        ({"decode": "gpu"}, "--decode gpu: the network runs on cpu"),
        ({"sync_bn": True, "compile": True}, "--sync-bn: synchronised batch norm breaks what --compile"),
        ({"workers": -1}, "--workers -1: must be at least 0"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808: must be at least"),
        ({"milestones": ["nan"]}, "--milestones nan: must be at least 0"),
        ({"batch_size": 1}, "--batch-size 1: batch norm needs more than one crop"),
        ({"batch_size": 4, "accumulate": 4}, "--batch-size 4: batch norm needs more than one crop"),
    ],
)
def test_options_no_run_can_use(changes, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        train.check_options(parse(Train, argv=options("crops", tmp_path / "out", **changes)), HERE)
    assert not (tmp_path / "out").exists()


def test_values_of_the_head_are_checked_by_the_head():
    with pytest.raises(InputError, match="margin of arcface"):
        build(settings(margin=4.0), 10)
    with pytest.raises(InputError, match="margin of arcface"):
        build(settings(margin=4.0, margin_warmup=2.0), 10)


def test_a_run_does_not_write_among_its_crops(tmp_path):
    folders, records = folder_set(tmp_path / "people"), record_set(tmp_path / "records")
    for data, out in (
        (folders, folders),
        (folders, folders / "run"),
        (records, records),
        (records / "train.rec", records),
    ):
        with pytest.raises(InputError, match=re.escape(f"--out {out}: lies among the crops of --data {data}")):
            train.check_options(parse(Train, argv=options(data, out)), HERE)
    train.check_options(parse(Train, argv=options(records, records / "run")), HERE)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(crops, pairs, tmp_path_factory):
    """A run of MobileFaceNet over two epochs, by the command that a user types."""
    out = tmp_path_factory.mktemp("runs") / "mfn"
    line = options(crops, out, val=pairs, batch_size=12, augment="strong", schedule="cosine", margin_warmup=1.0)
    done = subprocess.run([sys.executable, "train.py", *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stderr


def test_what_a_run_leaves_behind(finished, crops, pairs):
    out, _ = finished
    files = {path.name for path in out.iterdir() if path.is_file()}
    expected = {"checkpoint.pt", "checkpoint-previous.pt", "best.pt", "embedding.pt"}
    assert files == expected | {"results.json", "run.json", "log.txt", "identities.tsv"}
    content = load(out / "checkpoint.pt")
    assert content["format"] == "face-checkpoint-1"
    assert content["network"] == {"name": "mfn", "use_se": True, "embedding_size": 16}
    assert (content["epoch"], content["step"], content["rng"]) == (2, 4, {"seed": 0, "step": 4})
    assert content["scheduler"] == {"name": "cosine", "step": 4, "steps_per_epoch": 2}
    assert content["head"]["centres"].shape == (6, 16)
    assert content["optimizer"]["head_momentum"].shape == (6, 16)
    names = {name for name, _ in models.network_from_state(content["model"]).named_parameters()}
    assert content["optimizer"]["momentum"].keys() == names
    assert content["config"]["augment"] == "strong" and content["config"]["data"] == str(crops)
    run = json.loads((out / "run.json").read_text())
    assert run["options"] == content["config"] and run["data"] == content["data"]
    assert run["data"]["crops"] == 24 and len(run["data"]["fingerprint"]) == 64
    assert run["verification_sha256"] == {"small": utils.sha256_of(pairs)}
    [environment] = run["environments"]
    assert environment["torch"] == torch.__version__ and len(environment["source_sha256"]) == 64
    assert environment["command"][0] == "train.py"


def test_the_report_of_a_run(finished):
    out, stderr = finished
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and results["epochs"] == 2 and results["unreadable_crops"] == []
    assert [report["epoch"] for report in results["history"]] == [1, 2]
    accuracies = [report["verification"]["small"]["accuracy"] for report in results["history"]]
    best = 2 if accuracies[1] >= accuracies[0] else 1
    assert results["best_epoch"] == results["best"]["epoch"] == best
    assert load(out / "best.pt")["epoch"] == best
    assert all(report["loss"] > 0 and 0 <= report["top1"] <= 1 for report in results["history"])
    assert results["history"][0]["verification"]["small"]["pairs"] == 12
    log = (out / "log.txt").read_text()
    assert "24 crops of 6 identities, 2 steps of 12 an epoch (0 crops of each epoch's order left over)" in log
    assert re.search(r"epoch 2/2: loss [\d.]+, top-1 [\d.]+%, \d+ crops/s, small [\d.]+%", log)
    assert "4/4" in stderr and "waited for data" in stderr  # the progress line


def test_the_embedding_network_alone(finished):
    out, _ = finished
    state = load(out / "embedding.pt")
    best = load(out / "best.pt")["model"]
    assert list(state) == list(best) and all(torch.equal(state[key], best[key]) for key in state)
    assert all(value.is_contiguous() for value in state.values())
    network = models.network_from_state(state)
    assert network(torch.zeros(1, 3, 112, 112)).shape == (1, 16)


def test_tensorboard_has_what_people_watch(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The folder's name is what TensorBoard calls the run.
    board = EventAccumulator(str(finished[0] / "tensorboard" / "mfn"), size_guidance={"histograms": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    scalars = "loss top1 rate norm_of_gradient norm_of_features".split()
    expected = {f"train/{name}" for name in scalars}
    expected |= {"train_speed/crops_per_second", "train_speed/data_wait", "train_speed/memory_gb"}
    expected |= {"val/small/accuracy", "val/small/auc", "val/small/eer"}
    assert expected <= set(tags["scalars"])
    assert {"train_angle/target", "train_angle/nearest_other", "train_norm/features"} <= set(tags["histograms"])
    assert {"train_crops", "val_roc/small"} <= set(tags["images"])
    # It sorts by name, and this comes first.
    everything = [*tags["scalars"], *tags["histograms"], *tags["images"]]
    assert min(name for name in everything if not name.startswith("_")) == "train/loss"
    assert "_hparams_/experiment" in board.summary_metadata
    assert [event.step for event in board.Scalars("train/loss")] == [2, 4]
    assert all(0 < event.value < 10_000 for event in board.Scalars("train/norm_of_gradient"))
    picture = cv2.imdecode(np.frombuffer(board.Images("train_crops")[0].encoded_image_string, np.uint8), 1)
    assert picture.shape[1] == 8 * 114 + 2 and picture.std() > 20


def test_centres_by_identity(finished, tmp_path):
    out, _ = finished
    tables.write_identities(out / "identities.tsv", [f"person {label}" for label in range(6)])
    command = [sys.executable, "export_centres.py", "--checkpoint"]
    done = subprocess.run(
        [*command, out / "best.pt", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    centres = np.load(tmp_path / "centres.npy")
    expected = torch.nn.functional.normalize(load(out / "best.pt")["head"]["centres"]).numpy()
    assert centres.dtype == np.float32 and np.allclose(centres, expected)
    with open(tmp_path / "identities.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert [row[:2] for row in rows] == [
        ["label", "identity"],
        *([str(label), f"person {label}"] for label in range(6)),
    ]
    state = load(tmp_path / "embedding.pt")
    assert all(torch.equal(value, state[key]) for key, value in load(out / "embedding.pt").items())
    done = subprocess.run(
        [*command, tmp_path / "embedding.pt", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (
        done.returncode == 1
        and "weights alone; what is wanted is a training checkpoint, such as best.pt" in done.stderr
    )
    done = subprocess.run(
        [*command, out / "best.pt", "--out", out], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and f"--out {out}: the folder of the run, whose embedding.pt would be" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("head"), "head is missing"),
        (lambda content: content.update(data=None), "data is a NoneType"),
        (lambda content: content.update(step="4"), "step is a str"),
        (lambda content: content.update(step=10**9), "contradict each other"),
        (lambda content: content.update(step=-3), "contradict each other"),
        (lambda content: content.update(history=[1]), "its history is no list of reports"),
        (lambda content: content.update(optimizer={}), "nothing of the optimiser is in it"),
        (lambda content: content["head"].update(centres=torch.zeros(6, 16)), "6 centres are zero or not finite"),
        (lambda content: content["head"].update(centres=torch.zeros(96)), "its head has no centres"),
        (lambda content: content["head"].update(centres=torch.ones(6, 16).to_sparse()), "its head has no centres"),
        (lambda content: content["head"].update(centres=torch.ones(6, 16) * 1j), "its head has no centres"),
        (lambda content: content.update(model={}), "its model is no network's weights"),
        (lambda content: content.update(model={"a": 1}), "its model is no network's weights"),
    ],
)
def test_a_checkpoint_that_somebody_has_changed(crops, finished, tmp_path, monkeypatch, capsys, change, said):
    out = tmp_path / "run"
    out.mkdir()
    content = load(finished[0] / "checkpoint.pt")
    change(content)
    torch.save(content, out / "checkpoint.pt")
    if "centres" in said or "its model" in said:
        command = ["export_centres.py", "--checkpoint", out / "checkpoint.pt", "--out", tmp_path / "centres"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        assert export_centres.main() == 1
        error = capsys.readouterr().err
    else:
        line = options(crops, out, batch_size=12, augment="strong", schedule="cosine", margin_warmup=1.0, resume=True)
        code, error = train_run(line, tmp_path / "output", small=False)
        assert code == 1
    assert said in error and "Traceback" not in error


def test_it_learns_a_small_set_by_heart(crops, tmp_path):
    code, text = train_run(options(crops, tmp_path / "run", epochs=60, lr=0.1, schedule="cosine"), tmp_path / "output")
    assert code == 0, text
    last = json.loads((tmp_path / "run" / "results.json").read_text())["last"]
    assert last["top1"] > 0.9


def test_folders_of_crops_train_too(tmp_path):
    folders = folder_set(tmp_path / "people")
    code, text = train_run(options(folders, tmp_path / "run", epochs=1), tmp_path / "output")
    assert code == 0, text
    assert "12 crops of 3 identities" in text
    assert "2\tperson-2\t4\n" in (tmp_path / "run" / "identities.tsv").read_text()


def test_a_loss_that_is_not_finite_stops_with_step_batch_and_rate(crops, tmp_path):
    out = tmp_path / "run"
    code, text = train_run(options(crops, out, lr=1e30, grad_clip=0, save_every=1, log_every=4), tmp_path / "output")
    assert code == 1
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    step = int(re.search(r"step (\d+): the loss is (nan|inf) at learning rate 1e\+30; its batch is ", line)[1])
    order = data_gen.BatchOrder(24, 4, 0)
    expected = [crop_sets.open_training_set(crops).describe(index) for index in order.global_batch(step).tolist()]
    assert (out / f"broken-step-{step}.txt").read_text().splitlines() == expected
    assert f"{expected[0]}, {expected[1]}, {expected[2]}, ... (all 4 in {out}/broken-step-{step}.txt)" in line
    # Nothing of the broken state was kept.
    if (out / "checkpoint.pt").exists():
        assert load(out / "checkpoint.pt")["step"] <= step


def test_weights_that_are_not_finite_are_not_saved(crops, tmp_path):
    """The rate is beyond float32: the first loss is finite, and nothing is after the first step."""
    out = tmp_path / "run"
    code, text = train_run(options(crops, out, lr=3e38, save_every=1), tmp_path / "output")
    assert code == 1 and "error: step 0: it left weights that are not finite. Usually the rate" in text
    assert "there is no checkpoint yet: begin again with a lower --lr, or with --warmup" in text
    assert not (out / "checkpoint.pt").exists()


def test_advice_is_what_can_be_done():
    def advice(device, **changes):
        return reporting.advice_for_slow_input(a_run(device, **changes))

    assert advice("cuda") == "more --workers, or --decode gpu"
    assert advice("cpu") == "more --workers"
    assert advice("cuda", augment="strong") == "more --workers"
    assert advice("cuda", decode="gpu") == "more --workers"


def test_the_progress_line_is_sparse_in_a_file(crops, tmp_path):
    code, text = train_run(options(crops, tmp_path / "run", epochs=20, log_every=1), tmp_path / "output")
    assert code == 0
    lines = [line for line in re.split("[\r\n]", text) if line.startswith("train:")]
    assert "120/120" in lines[-1] and "waited for data" in lines[-1]
    assert len(lines) < 100  # some for the lines of the log, none for each look


def test_unreadable_crops_stop_the_run_or_are_counted(tmp_path):
    items = list(jpegs(6, 4))
    items[5] = (items[5][0][:200], items[5][1])
    crop_sets.write_crops(tmp_path / "crops", items)
    code, text = train_run(options(tmp_path / "crops", tmp_path / "a", epochs=1), tmp_path / "output")
    assert code == 1
    assert re.search(
        r"train.rec: record 6 at offset \d+: jpg image, but damaged or cut short \(--skip-unreadable rep", text
    )
    line = options(tmp_path / "crops", tmp_path / "b", skip_unreadable=True, workers=1)
    code, text = train_run(line, tmp_path / "output")
    assert code == 0, text
    where = crop_sets.open_training_set(tmp_path / "crops").describe(5)
    assert text.count(f"{where}: unreadable, replaced by the next crop") == 1  # in two epochs
    named = json.loads((tmp_path / "b" / "results.json").read_text())["unreadable_crops"]
    assert named == [where]


def test_damaged_records_stop_the_run_or_are_counted(tmp_path):
    """The magic of a record and the label inside another one: both among the few that are looked at first."""
    folder = record_set(tmp_path / "crops")
    reader = recordio.RecordReader(folder / "train.rec")
    first, second = (int(reader.offsets[reader.position(key)]) for key in (1, 8))
    data = bytearray((folder / "train.rec").read_bytes())
    data[first] ^= 255
    data[second + 12 : second + 16] = np.float32(5).tobytes()
    (folder / "train.rec").write_bytes(data)
    code, text = train_run(options(folder, tmp_path / "a"), tmp_path / "output")
    assert code == 1 and re.fullmatch(rf"error: {folder}/train.rec: record [18] at offset .*\n", text)
    code, text = train_run(options(folder, tmp_path / "b", skip_unreadable=True), tmp_path / "output")
    assert code == 0, text
    named = json.loads((tmp_path / "b" / "results.json").read_text())["unreadable_crops"]
    assert [name.split(": record ")[1].split()[0] for name in named] == ["1", "8"]
    line = options(folder, tmp_path / "b", skip_unreadable=True, resume=True)
    assert train_run(line, tmp_path / "output")[0] == 0


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    folders = folder_set(tmp_path / name)
    (folders / "person-1").rename(folders / name)
    crop = min((folders / name).iterdir())
    crop.write_bytes(crop.read_bytes()[:300])
    with pytest.raises(InputError, match="TensorBoard takes UTF-8 only"):
        train.check_options(parse(Train, argv=options(folders, tmp_path / f"run-{name}")), HERE)
    out = tmp_path / "run"
    code, text = train_run(options(folders, out, skip_unreadable=True), tmp_path / "output")
    assert code == 0, text
    assert json.loads((out / "results.json").read_bytes())["unreadable_crops"] == [str(crop)]
    assert json.loads((out / "run.json").read_bytes())["options"]["data"] == str(folders)
    assert "caf\\udce9: unreadable" in (out / "log.txt").read_text().replace(f"/{crop.name}", "")


def test_a_foreign_folder_keeps_its_files(crops, tmp_path):
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "run.json").write_text('{"mine": 1}')
    (out / ".notes.txt.tmp").write_text("mine")
    (out / "identities.tsv").write_text("mine")
    code, text = train_run(options(crops, out), tmp_path / "output")
    assert code == 1 and f"error: {out / 'run.json'}: not written by train.py, or damaged" in text
    assert (out / "run.json").read_text() == '{"mine": 1}' and (out / "identities.tsv").read_text() == "mine"
    (out / "run.json").unlink()
    (out / ".checkpoint.pt.1.tmp").write_text("left over")
    code, text = train_run(options(crops, out, epochs=1), tmp_path / "output")
    assert code == 0, text
    assert (out / ".notes.txt.tmp").read_text() == "mine" and not (out / ".checkpoint.pt.1.tmp").exists()


def test_two_runs_into_one_folder(crops, tmp_path):
    out = tmp_path / "run"
    processes = start(train_main, options(crops, out, epochs=10_000, workers=1), output=tmp_path / "first")
    wait_for(out / "checkpoint.pt")
    code, text = train_run(options(crops, out, epochs=10_000, resume=True), tmp_path / "second")
    assert code == 1 and text == f"error: {out}: another process is training into this folder\n"
    for process in processes:
        process.kill()
    finish(processes)
    content = load(out / "checkpoint.pt")
    line = options(crops, out, epochs=content["epoch"] + 1, resume=True)
    code, text = train_run(line, tmp_path / "second")  # at once, though the first one's worker may still be there
    assert code == 0, text


def test_verification_every_second_epoch_and_best_of_those(crops, pairs, tmp_path):
    # The real network: a small one may give features that cannot be told apart.
    line = options(crops, tmp_path / "run", val=pairs, val_every=2, epochs=3, batch_size=24)
    code, text = train_run(line, tmp_path / "output", small=False)
    assert code == 0, text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [bool(report["verification"]) for report in results["history"]] == [False, True, True]
    assert results["best_epoch"] in (2, 3)


def test_a_set_that_is_named_after_the_last_step_is_measured_too(crops, pairs, tmp_path):
    recipe = {"epochs": 1, "batch_size": 24, "resume": True}
    assert train_run(options(crops, tmp_path / "run", **recipe), tmp_path / "output", small=False)[0] == 0
    code, text = train_run(options(crops, tmp_path / "run", **recipe, val=pairs), tmp_path / "output", small=False)
    assert code == 0 and ", small " in text, text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["last"]["verification"]["small"]["accuracy"] == results["best"]["verification"]["small"]["accuracy"]
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["verification_sha256"]) == ["small"]
    before = (tmp_path / "run" / "results.json").read_bytes()
    code, text = train_run(options(crops, tmp_path / "run", **recipe, val=pairs), tmp_path / "output", small=False)
    assert code == 0 and ", small " not in text, "measured once"
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_a_missing_verification_set_is_found_before_the_first_step(crops, tmp_path):
    code, text = train_run(options(crops, tmp_path / "run", val="nowhere.bin"), tmp_path / "output")
    assert code == 1 and "error: nowhere.bin: no such file or folder" in text
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_verification_sets_of_one_name_are_refused(crops, pairs, tmp_path):
    other = tmp_path / "elsewhere" / pairs.name
    other.parent.mkdir()
    other.write_bytes(pairs.read_bytes())
    code, text = train_run(options(crops, tmp_path / "run", val=[pairs, other]), tmp_path / "output")
    assert code == 1 and "error: --val: two sets have the same name (small, small); rename one" in text


# --- parts -----------------------------------------------------------------------------------------------------------


def test_accumulated_parts_have_the_gradient_of_the_whole_batch():
    """With batch norm in evaluation mode, which alone depends on how the batch is cut."""
    torch.manual_seed(0)
    network = SmallNetwork(8).double().eval()
    inputs, labels = torch.randn(12, 3, 112, 112, dtype=torch.float64), torch.arange(12) % 5
    gradients = []
    for parts in (1, 3):
        state = build(settings(embedding_size=8, margin=0.3), 5)
        state.network = network
        state.head.double()
        network.zero_grad()
        for images, names in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
            loss, _ = state.head(network(images), names)
            (loss / parts).backward()
        gradients.append([p.grad.clone() for p in (*network.parameters(), *state.head.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_gradients_are_clipped_and_the_norm_is_of_the_unclipped(crops):
    chosen = settings(grad_clip=1e-3, momentum=0.0, weight_decay=0.0, embedding_size=8)
    state = build(chosen, 5)
    state.network = SmallNetwork(8)
    state.optimizer = torch.optim.SGD([*state.network.parameters(), *state.head.parameters()], lr=1.0)
    before = [p.detach().clone() for p in (*state.network.parameters(), *state.head.parameters())]
    loss, _ = state.head(state.network(torch.randn(6, 3, 112, 112)), torch.arange(6) % 5)
    loss.backward()
    gradients = [p.grad.clone() for p in (*state.network.parameters(), *state.head.parameters())]
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert train.gradient_norm(state, HERE).item() == pytest.approx(expected, rel=1e-5)
    train.apply_gradients(state, chosen, 1.0)
    for old, new, gradient in zip(
        before, (*state.network.parameters(), *state.head.parameters()), gradients, strict=True
    ):
        torch.testing.assert_close(old - new, gradient.clamp(-1e-3, 1e-3), rtol=0, atol=1e-6)
        assert new.grad is None


def reading(losses, top1=0.0, norm=20.0):
    return monitor.Reading(0, losses, [top1] * len(losses), 1.0, 0.0, {}), norm


def test_warnings_come_once_and_say_what_to_do():
    chance = math.log(1000)
    watch = monitor.Watch(1000, margin_cost=30.0, patience=100)
    assert watch.warnings(*reading([chance] * 60)) == []  # too early to say
    stuck, no_hit = watch.warnings(*reading([chance] * 60))
    assert stuck.startswith("stuck: after 120 steps the loss is 6.91, that of guessing") and "--warmup" in stuck
    assert no_hit.startswith("no hit: top-1 is 0 after 120 steps") and "labels" in no_hit
    assert watch.warnings(*reading([chance] * 60)) == []
    [explosion] = watch.warnings(*reading([chance] * 10, norm=20.0 * 21))
    assert explosion.startswith("explosion: feature norms grew from 20 to 420")
    # A network that knows nothing, but loses the margin on top.
    [text] = monitor.Watch(1000, 30.0, patience=1).warnings(*reading([chance + 30.0], top1=0.001))
    assert text.startswith("stuck")
    assert monitor.Watch(1000, 30.0, patience=1).warnings(*reading([20.0], top1=0.001)) == []
    assert monitor.Watch(1000, 0.0, patience=1).warnings(*reading([chance], top1=0.5)) == []
    # Few identities: guessing hits one in ten.
    assert monitor.Watch(10, 0.0, patience=1).warnings(*reading([math.log(10)], top1=0.1))[0].startswith("stuck")
    assert monitor.Watch(10, 0.0, patience=1).warnings(*reading([math.log(10)], top1=0.3)) == []
    # While the rate warms up there is nothing to be seen yet.
    slow = monitor.Watch(1000, 0.0, patience=100)
    assert slow.warnings(*reading([chance] * 150), rate_share=0.5) == []
    assert len(slow.warnings(*reading([chance] * 60), rate_share=0.5)) == 2
    assert "explosion" in "".join(
        monitor.Watch(10, 0.0, steps=0, first_norm=1.0).warnings(*reading([1.0], 0.5, math.nan))
    )


def test_steps_that_take_several_times_as_long_are_worth_a_line():
    pace = monitor.Pace()

    def note(seconds, steps=20, side=112):
        return pace.note(monitor.Reading(0, [1.0] * steps, [0.0] * steps, seconds * steps, 0.3 * steps, {}), side)

    assert [note(seconds) for seconds in (9.0, 1.0, 1.1, 0.9, 1.0)] == [
        None
    ] * 5  # the first compiles, or tries kernels
    assert note(2.5) is None and note(1.0, steps=3) is None
    text = note(4.0)
    assert text.startswith("a step takes 4 s, 4.0 times what it did (1 s); of these 0.3 s are waiting for data, and ")
    assert note(5.0) is None and note(2.0) is None
    assert note(1.0) == "a step takes 1 s again"
    assert note(4.0).startswith("a step takes 4 s")
    # Smaller crops are faster, whole ones as slow as they are; neither is worth a word.
    assert [note(seconds, side=64) for seconds in (0.3,) * 6] == [None] * 6
    assert [note(seconds) for seconds in (1.0,) * 6] == [None] * 6
    assert note(4.0).startswith("a step takes 4 s")


def test_a_small_set_with_the_settings_of_a_large_one_is_worth_a_line():
    advice = monitor.advice_for_few_identities
    text = advice(a_run(identities=494, scale=64, batch_size=256, lr=0.1))
    assert text.startswith("494 identities, and a margin and a scale for tens of thousands")
    assert text.endswith("--margin 0.3 --scale 32 --margin-warmup 4 --warmup 1 --schedule cosine --augment strong")
    # The published rate is for 256 crops a step.
    assert advice(a_run(scale=64, batch_size=64, lr=0.1)).endswith(" --lr 0.025")
    assert "--lr" not in advice(a_run(scale=64, batch_size=64, lr=0.05))
    assert "--lr" not in advice(a_run(scale=64, batch_size=64, lr=0.1, optimizer="adamw"))
    assert "--margin" not in advice(a_run(scale=64, loss="cosface")).split("--scale")[0]
    assert advice(a_run(identities=5000, scale=64)) is None
    # What it advises is not complained of, nor is who knows of the warm-up.
    assert advice(a_run(scale=32, margin=0.4, margin_warmup=4.0)) is None
    assert advice(a_run(scale=64, margin_warmup=4.0)) is None
    assert advice(a_run(scale=16)) is None


def report(epoch, accuracy, **sets):
    verification = {} if accuracy is None else {name: {"accuracy": accuracy} for name in sets}
    return {"epoch": epoch, "sets": sets, "verification": verification}


def test_the_best_epoch_is_of_the_present_verification_sets():
    def best(*history):
        return reporting.best_report(SimpleNamespace(history=list(history)))["epoch"]

    assert best(report(1, 0.9, a="1"), report(2, 0.8, a="1")) == 1
    assert best(report(1, 0.9, a="1"), report(2, 0.9, a="1")) == 2
    # Another set, another content of a set of the same name, no set any more: 0.9 was of something else.
    assert best(report(1, 0.9, a="1"), report(2, 0.7, b="1"), report(3, 0.6, b="1")) == 2
    assert best(report(1, 0.9, a="1"), report(2, 0.7, a="2")) == 2
    assert best(report(1, 0.9, a="1"), report(2, None), report(3, None)) == 3
    # Back again: best.pt was replaced meanwhile.
    assert best(report(1, 0.9, a="1"), report(2, 0.7, b="1"), report(3, 0.8, a="1")) == 3
    # Epochs that were not measured count less than those that were.
    assert best(report(1, None, a="1"), report(2, 0.1, a="1"), report(3, None, a="1")) == 2


def test_an_epoch_whose_weights_are_lost_is_not_the_best(tmp_path):
    """The best checkpoint was damaged, so the run went back; done anew, its epoch is worse than an earlier one."""
    run = SimpleNamespace(options=SimpleNamespace(out=tmp_path))
    first, second = ({"step": 10 * n, "loss": 5.0 - n} | report(n, 0.7 + n / 10, a="1") for n in (1, 2))

    def found(best, *history, step):
        utils.write_json(tmp_path / "results.json", {"best": best})
        state = SimpleNamespace(history=copy.deepcopy(list(history)), step=step)
        return state, reporting.forget_lost_epochs(run, state)

    state, note = found(second, first, step=15)
    state.history.append({**second, "loss": 3.1} | report(2, 0.7, a="1"))
    assert reporting.best_report(state)["epoch"] == 2 and "note: epoch 2, the best one, is done anew" in note
    # The last epoch's weights are in the checkpoint that the run goes on from.
    state, note = found(second, first, step=10)
    assert reporting.best_report(state)["epoch"] == 1 and note
    # Nothing is lost: an earlier one was the best, the best one is not verified yet in the checkpoint, no results.
    for best, history in ((first, [first]), (second, [first, {**second, "sets": {}, "verification": {}}])):
        state, note = found(best, *history, step=25)
        assert not note and not any("lost" in report for report in state.history)
    (tmp_path / "results.json").unlink()
    assert not reporting.forget_lost_epochs(run, state)


def every_second_part_hits(line):
    """train.py, where all crops of a step's first part are nearest to their own centre and none of its second."""
    hits, loss_of = itertools.cycle([1.0, 0.0]), train.loss_of

    def changed(*arguments):
        share, loss, stats = loss_of(*arguments)
        return share, loss, stats | {"top1": torch.tensor(next(hits))}

    train.loss_of = changed
    return train_main(line)


def test_top1_is_of_all_parts_of_a_step(crops, tmp_path):
    line = options(crops, tmp_path / "run", accumulate=2, epochs=1)
    [code] = finish(start(every_second_part_hits, line, output=tmp_path / "output"))
    assert code == 0, (tmp_path / "output").read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["last"]["top1"] == 0.5


def waits_for_its_data(line):
    """train.py that needs a minute to open its crops."""

    def open_run(options, *_):
        options.out.mkdir()
        time.sleep(60)

    train.open_run = open_run
    return train_main(line)


def test_a_signal_before_the_first_step_ends_the_run(tmp_path):
    [process] = start(waits_for_its_data, options("crops", tmp_path / "run"), output=tmp_path / "output")
    wait_for(tmp_path / "run")
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [-signal.SIGTERM] and time.monotonic() - began < 30


def test_a_reading_names_the_first_broken_step():
    window = monitor.Window(7)
    for value in (1.0, 2.0, math.inf, math.nan):
        window.add(torch.tensor(value), {"top1": torch.tensor(0.25)})
    seen = window.read()
    assert (seen.first, seen.broken_step, seen.top1) == (7, 9, 0.25)
    assert window.read() is None and window.first == 11


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Foreign:
    """Something that only a pickle can hold."""


@pytest.mark.parametrize("mmap", [False, True])
def test_files_that_are_no_checkpoints(tmp_path, mmap):
    path = tmp_path / "file.pt"

    def message():
        with pytest.raises(InputError) as caught:
            utils.load_checkpoint(path, mmap=mmap)
        return str(caught.value)

    torch.save(torch.nn.Linear(2, 2), path)
    assert message().startswith(f"{path}: holds Python objects, not plain tensors")
    assert "torch.save(model.state_dict(), FILE)" in message()
    torch.save({"a": Foreign()}, path)
    assert "holds Python objects" in message()
    torch.save({"a": torch.zeros(5000)}, path)
    assert utils.load_checkpoint(path, mmap=mmap)["a"].shape == (5000,)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert message() == f"{path}: not a file of weights, or damaged"
    place = whole.find(bytes(4000)) + 100
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    assert message().startswith(f"{path}: damaged (checksum")
    for rubbish in (b"", b"rubbish" * 100, b"PK\5\6" + bytes(18)):
        path.write_bytes(rubbish)
        assert message().startswith(f"{path}: not a file of weights, or damaged")
    torch.save([torch.zeros(2)], path)
    assert message() == f"{path}: holds list, not a dictionary of weights"
    torch.save({"a": torch.zeros(2), "b": 3}, path)
    assert message() == f"{path}: neither a training checkpoint nor a plain state_dict"
    torch.save({"format": "face-checkpoint-9", "a": torch.zeros(2)}, path)
    assert "format 'face-checkpoint-9'; this version reads 'face-checkpoint-1'" in message()
    path.unlink()
    path.mkdir()
    assert message() == f"{path}: a folder, not a file of weights"


def test_old_files_without_zip_load(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    assert utils.load_checkpoint(path, mmap=True)["a"].tolist() == [0, 1, 2]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    utils.save_checkpoint(path, {"step": 1})
    with pytest.raises(AttributeError):
        utils.save_checkpoint(path, {"step": 2, "bad": lambda: None})
    assert utils.load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_embedding_files_are_plain_float32_in_the_released_order(tmp_path):
    network = models.build_network("mfn", embedding_size=8).to(memory_format=torch.channels_last)
    storage.write_embedding(tmp_path / "embedding.pt", network.state_dict())
    state = load(tmp_path / "embedding.pt")
    assert list(state) == list(network.state_dict())
    assert all(value.is_contiguous() and torch.equal(value, network.state_dict()[key]) for key, value in state.items())
