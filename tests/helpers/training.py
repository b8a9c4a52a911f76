"""What the tests of training share: small sets of crops, and train.py in processes that need not import torch again.

A fork server imports train.py once; every run is forked from it, so that it starts at once and can be killed like any
program. Most runs train a network of a few thousand parameters: what is tested is the training, not the network.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

import models
import train
import utils
from formats import crop_sets, selection, verification_bin
from training import monitor, storage

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240  # seconds until a run counts as hanging


def jpegs(identities, each, seed=0):
    """(JPEG bytes, label) of crops that look alike within an identity."""
    random = np.random.default_rng(seed)
    for label in range(identities):
        face = random.integers(0, 255, (7, 7, 3), dtype=np.uint8)
        smooth = cv2.resize(face, (112, 112), interpolation=cv2.INTER_CUBIC).astype(int)
        for _ in range(each):
            crop = (smooth + random.integers(-30, 30, (112, 112, 3))).clip(0, 255).astype(np.uint8)
            yield cv2.imencode(".jpg", crop)[1].tobytes(), label


def record_set(folder, identities=6, each=4, seed=0):
    """A RecordIO set of crops in `folder`; returns the folder."""
    crop_sets.write_crops(folder, jpegs(identities, each, seed))
    return folder


def pair_set(path):
    """A verification set of the same kind of crops, other identities: 12 pairs."""
    faces = [data for data, _ in jpegs(12, 2, seed=9)]
    genuine = [faces[2 * i + k] for i in range(6) for k in range(2)]
    impostors = [faces[2 * i + 12 * k] for i in range(6) for k in range(2)]
    verification_bin.write_bin(path, genuine + impostors, [True] * 6 + [False] * 6)
    return path


def folder_set(folder, identities=3, each=4):
    """The same as files: <folder>/person-<label>/<number>.jpg."""
    for number, (data, label) in enumerate(jpegs(identities, each)):
        path = folder / f"person-{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_audit(folder, crops, actions, identity_rows=(), fingerprint=None):
    """What audit.py leaves in `folder`, with these actions {crop: (action, label)}; the path of its audit.tsv."""
    rows = []
    for index in range(len(crops)):
        action, to = actions.get(index, ("keep", None))
        label = int(crops.labels[index])
        rows.append(
            [index, crops.describe(index), label, label, "", None, None, None, None, action, to, *[None] * 8, ""]
        )
    selection.write_table(folder / selection.CROPS, selection.CROP_COLUMNS, rows)
    selection.write_table(folder / selection.IDENTITIES, selection.IDENTITY_COLUMNS, list(identity_rows))
    utils.write_json(folder / selection.RECORD, {"data": {"fingerprint": fingerprint or crop_sets.fingerprint(crops)}})
    return folder / selection.CROPS


def options(data, out, **changes):
    """A command line for a run of seconds; `changes` as option=value, True and False as flags."""
    values = {
        "data": data,
        "out": out,
        "network": "mfn",
        "embedding_size": 16,
        "batch_size": 4,
        "epochs": 2,
        "lr": 0.02,
        "scale": 16,
        "log_every": 2,
        "workers": 0,
        "device": "cpu",
    } | changes
    line = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            line += [f"--{flag}", *map(str, value)]
        else:
            line += [f"--{flag}", str(value)]
    return line


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "training", "torch.utils.tensorboard", "matplotlib.figure"])
    # The server ignores the parent's sys.path when it preloads.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return context


def _child(environment, output, target, arguments):
    os.environ.update(environment)
    os.setpgrp()
    torch.set_num_threads(1)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = target(*arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 99
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code or 0)


def start(target, *arguments, output, size=1, launcher="torchrun"):
    """Start `target(*arguments)` in `size` processes with torchrun's or srun's environment; returns them.

    Output is appended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        if launcher == "srun":  # which says nothing of where to meet but the list of nodes
            environment = {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": str(size),
                "SLURM_STEP_NUM_TASKS": str(size),
                "SLURM_NODEID": "0",
                "SLURM_TASKS_PER_NODE": str(size),
                "SLURM_JOB_ID": str(port),
            }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = _server().Process(target=_child, args=(environment, str(output), target, arguments))
        process.start()
        processes.append(process)
    return processes


def finish(processes):
    """Wait for all; exit codes."""
    for process in processes:
        process.join(PATIENCE)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs"
    return [process.exitcode for process in processes]


def run(target, *arguments, output, size=1):
    """Run to the end; all exit codes must be 0."""
    codes = finish(start(target, *arguments, output=output, size=size))
    assert codes == [0] * size, f"exit codes {codes}:\n{Path(output).read_text()[-3000:]}"


class SmallNetwork(nn.Sequential):
    """Everything that restarts and ranks have to deal with (batch norm of both kinds, PReLU, dropout), in
    milliseconds.
    """

    def __init__(self, embedding_size):
        super().__init__(
            nn.Conv2d(3, 8, 8, stride=8),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(8 * 14 * 14, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )


def use_small_network():
    """From now on this process trains `SmallNetwork`, whatever --network says."""
    models.build_network = lambda name, use_se, embedding_size, **_: SmallNetwork(embedding_size)


def train_main(line, small=True):
    """train.py with this command line."""
    if small:
        use_small_network()
    sys.argv = ["train.py", *line]
    return train.main()


def train_run(line, output, size=1, small=True):
    """Run train.py to the end; exit code of rank 0 and all output."""
    output.unlink(missing_ok=True)
    codes = finish(start(train_main, line, small, output=output, size=size))
    return codes[0], output.read_text()


def load(path):
    """A checkpoint as anybody would load it; with its parts, if it has any."""
    content = torch.load(path, weights_only=True)
    return storage.whole(path) if "parts" in content else content


def tensors(content, prefix=""):
    """All tensors of a nested dictionary by path."""
    found: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def scalars(out):
    """What TensorBoard shows of the training itself (not of speed): [(step, value), ...] by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(monitor.board_folder(out)))
    board.Reload()
    names = [name for name in board.Tags()["scalars"] if not name.startswith("train_speed/")]
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names}


def assert_same_state(first, second):
    """Two checkpoints hold the same state to the last bit."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys() and len(a) > 10
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different
    for key in ("step", "epoch", "scheduler", "rng", "skipped"):
        assert first[key] == second[key]
    assert [report["loss"] for report in first["history"]] == [report["loss"] for report in second["history"]]
