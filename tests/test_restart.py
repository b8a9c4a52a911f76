"""Runs that are killed, terminated, damaged and resumed."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.training import assert_same_state, finish, load, options, record_set, scalars, start, train_main, train_run

import config
import models
import utils
from networks.vit import VisionTransformer
from options import plain_options
from training import checkpoints, storage

STEPS = 120
RECIPE = {
    "epochs": 20,
    "augment": "strong",
    "schedule": "cosine",
    "warmup": 0.5,
    "margin_warmup": 1.0,
    "save_every": 7,
    "log_every": 3,
}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return record_set(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def unbroken(crops, tmp_path_factory):
    """The checkpoint of a run that was never stopped, on one and on two processes, and what TensorBoard shows."""
    runs, shown = {}, {}
    for size in (1, 2):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        code, output = train_run(options(crops, out, **RECIPE), out.parent / "output", size)
        assert code == 0, output
        runs[size], shown[size] = load(out / "checkpoint.pt"), scalars(out)
    return runs, shown


def wait_for_step(out, step, processes):
    """Until the checkpoint of `step` or a later one is there, or the run is over."""
    until = time.monotonic() + 120
    while time.monotonic() < until and all(process.is_alive() for process in processes):
        try:
            if load(out / "checkpoint.pt")["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)


def assert_groups_end(groups):
    """Nothing is left of the process groups that these processes led."""

    def alive(group):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
        return False

    until = time.monotonic() + 30
    while any(map(alive, groups)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [group for group in groups if alive(group)]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_points_ends_with_the_same_bits(crops, unbroken, tmp_path, size):
    out, output = tmp_path / "run", tmp_path / "output"
    # Another number of workers and other steps to save at than the unbroken run: nothing may depend on them.
    line = options(crops, out, **RECIPE | {"workers": 1, "save_every": 4}, resume=True)
    chance = random.Random(7 + size)
    kills, killed = 0, []
    for step in sorted(chance.sample(range(0, 90), 3)):
        processes = start(train_main, line, output=output, size=size)
        wait_for_step(out, step, processes)
        time.sleep(chance.uniform(0, 0.3))
        for process in processes:
            process.kill()
        kills += finish(processes) == [-signal.SIGKILL] * size
        killed += [process.pid for process in processes]
    assert kills == 3
    assert load(out / "checkpoint.pt")["step"] < STEPS  # not over before the last kill
    code, text = train_run(line, output, size)
    assert code == 0, text
    states, shown = unbroken
    assert_same_state(load(out / "checkpoint.pt"), states[size])
    found = scalars(out)
    assert found == shown[size] and len(found["train/loss"]) == STEPS // RECIPE["log_every"]
    assert not list(out.glob("*.tmp"))
    assert_groups_end(killed)  # the workers noticed


def transformer_main(line):
    """train.py with this command line and a vision transformer of two narrow blocks."""
    models.build_network = lambda name, use_se, size, **settings: VisionTransformer(16, 2, size, **settings)
    return train_main(line, small=False)


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_transformer_leaves_out_the_same_tokens_and_ways(crops, tmp_path, size):
    output = tmp_path / "output"
    recipe = {"epochs": 4, "optimizer": "adamw", "lr": 0.001, "drop_path": 0.3, "token_mask": 0.25, "save_every": 3}
    processes = start(transformer_main, options(crops, tmp_path / "unbroken", **recipe), output=output, size=size)
    assert finish(processes) == [0] * size, output.read_text()
    expected = load(tmp_path / "unbroken" / "checkpoint.pt")
    line = options(crops, tmp_path / "run", **recipe, resume=True)
    processes = start(transformer_main, line, output=output, size=size)
    wait_for_step(tmp_path / "run", 9, processes)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * size
    assert finish(start(transformer_main, line, output=output, size=size)) == [0] * size, output.read_text()
    assert_same_state(load(tmp_path / "run" / "checkpoint.pt"), expected)
    plain = options(crops, tmp_path / "plain", **recipe | {"token_mask": 0})
    assert finish(start(transformer_main, plain, output=output, size=size)) == [0] * size, output.read_text()
    masked = [load(tmp_path / name / "checkpoint.pt")["model"]["mask_token"] for name in ("unbroken", "plain")]
    assert not torch.equal(*masked), "a token that is not used is not trained"


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(crops, unbroken, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    line = options(crops, out, **RECIPE | {"save_every": "10min"}, resume=True)
    [process] = start(train_main, line, output=output)
    wait_for_step(out, 8, [process])  # the checkpoint at the end of the first epoch is of step 6
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [128 + signal.SIGTERM]
    stopped = load(out / "checkpoint.pt")
    assert 8 <= stopped["step"] < STEPS
    assert (
        f"stopped after step {stopped['step']} of {STEPS}; the same command with --resume goes on" in output.read_text()
    )
    code, text = train_run(line, output)
    assert code == 0, text
    assert_same_state(load(out / "checkpoint.pt"), unbroken[0][1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(crops, unbroken, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    line = options(crops, out, **RECIPE, resume=True)
    assert train_run(line, output)[0] == 0
    newest, previous = out / "checkpoint.pt", out / "checkpoint-previous.pt"
    data = bytearray(newest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 255 for byte in data[middle : middle + 64])
    newest.unlink()  # a hard link of best.pt, which must not change
    newest.write_bytes(data)
    code, text = train_run(line, output)
    assert code == 0, text
    assert f"warning: {newest}: damaged" in text and "going back to checkpoint-previous.pt" in text
    assert_same_state(load(newest), unbroken[0][1])
    assert utils.load_checkpoint(previous)["step"] == STEPS - 1  # the damaged one did not take its place
    newest.unlink()
    newest.write_bytes(data[: len(data) // 3])
    previous.unlink()
    code, text = train_run(line, output)
    assert code == 1 and text.count("error:") == 1 and f"{newest}: not a file of weights, or damaged" in text


def test_resume_refuses_another_run_and_other_data(crops, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    first = {"epochs": 1, "batch_size": 12}
    assert train_run(options(crops, out, **first), output)[0] == 0
    code, text = train_run(options(crops, out, **first), output)
    assert code == 1 and text == f"error: {out}: holds a run; add --resume to go on with it, or choose another --out\n"
    changed = options(crops, out, **first | {"batch_size": 8, "seed": 3}, resume=True, loss="cosface", lr=0.5)
    code, text = train_run(changed, output)
    assert code == 1 and "give it another --out, or leave the option as it was" in text
    assert "cannot go on with --loss cosface (was arcface), --batch-size 8 (was 12), --seed 3 (was 0): that is" in text
    other = record_set(tmp_path / "other", seed=1)
    code, text = train_run(options(other, out, **first, resume=True), output)
    assert code == 1 and "was trained on other data than --data" in text
    # What is free may change, and a finished run stays as it is.
    before = load(out / "checkpoint.pt")
    free = options(crops, out, **first | {"workers": 1, "save_every": 5, "log_every": 7}, resume=True)
    code, text = train_run(free, output)
    assert code == 0, text
    assert_same_state(load(out / "checkpoint.pt"), before)
    # More epochs follow where the rate does not depend on their number; fewer than are done cannot be.
    three = first | {"epochs": 3}
    assert train_run(options(crops, out, **three, resume=True), output)[0] == 0
    at_once = tmp_path / "at once"
    assert train_run(options(crops, at_once, **three), output)[0] == 0
    assert_same_state(load(out / "checkpoint.pt"), load(at_once / "checkpoint.pt"))
    assert json.loads((out / "results.json").read_bytes())["finished"]
    code, text = train_run(options(crops, out, **first, resume=True), output)
    assert code == 1 and "--epochs 1, but 3 are done" in text


def test_the_manual_lists_what_may_change():
    rows = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith("| `--lr`, ")]
    listed = set(re.findall(r"`--([a-z-]+)`", row))
    assert listed == {name.replace("_", "-") for name in checkpoints.CHANGEABLE_OPTIONS}


def test_a_checkpoint_of_another_version_is_refused():
    """An option that the checkpoint does not know is not taken for its default."""
    nowhere = Path()
    now = config.Train(data=nowhere, out=nowhere)
    saved = plain_options(now)
    saved["learning_rate"] = saved.pop("head_lr")
    content = {name: kind() for name, kind in checkpoints._KINDS.items()}
    content |= {"config": saved, "scheduler": {"step": 0, "steps_per_epoch": 1}}
    found = storage.Stored(Path("run/checkpoint.pt"), content)
    with pytest.raises(utils.InputError, match=r"checkpoint\.pt: .*another version.*\(head_lr, learning_rate\)"):
        checkpoints.check_same_run(SimpleNamespace(options=now, data={}), found)


def test_every_option_is_free_or_changeable_or_the_run_itself():
    names = {field.name for field in dataclasses.fields(config.Train)}
    assert names >= checkpoints.FREE_OPTIONS | checkpoints.CHANGEABLE_OPTIONS
    assert not checkpoints.FREE_OPTIONS & checkpoints.CHANGEABLE_OPTIONS
    fixed = {"network", "use_se", "embedding_size", "loss", "sample_rate", "batch_size", "seed"}
    assert not fixed & (checkpoints.FREE_OPTIONS | checkpoints.CHANGEABLE_OPTIONS)


def test_after_a_broken_step_the_advice_can_be_followed(crops, tmp_path):
    """A rate beyond float32, then the rate that the message asks for; both are on record."""
    out, output = tmp_path / "run", tmp_path / "output"
    line = {"epochs": 1, "batch_size": 12, "save_every": 1}
    assert train_run(options(crops, out, **line), output)[0] == 0
    code, text = train_run(options(crops, out, **line | {"epochs": 3, "lr": 3e38}, resume=True), output)
    assert code == 1 and "left weights that are not finite" in text
    assert f"{out}/checkpoint.pt is from before: go on from it with --resume and a lower --lr" in text
    changed = line | {"epochs": 3, "lr": 0.01, "margin": 0.3, "grad_clip": 1, "accumulate": 2}
    code, text = train_run(options(crops, out, **changed, resume=True), output)
    assert code == 0, text
    listed = "--margin 0.3 (was None), --epochs 3 (was 1), --lr 0.01 (was 0.02), --grad-clip 1.0 (was 5.0), "
    assert f"note: goes on with {listed}--accumulate 2 (was 1)" in text
    assert listed in (out / "log.txt").read_text()
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["lr"] == load(out / "checkpoint.pt")["config"]["lr"] == 0.01
    assert [(change["step"], change["options"]["lr"]) for change in run["changes"]] == [
        (2, [0.02, 3e38]),
        (2, [0.02, 0.01]),
    ]


def test_a_kill_between_checkpoint_and_results_is_made_good(crops, tmp_path):
    out, output = tmp_path / "run", tmp_path / "output"
    line = options(crops, out, epochs=1, batch_size=12, resume=True)
    assert train_run(line, output)[0] == 0
    for name in (storage.BEST, storage.EMBEDDING, "results.json"):
        (out / name).unlink()
    assert train_run(line, output)[0] == 0
    assert_same_state(load(out / storage.BEST), load(out / storage.CHECKPOINT))
    assert load(out / storage.EMBEDDING).keys() == load(out / storage.CHECKPOINT)["model"].keys()
    assert (out / "results.json").exists()
