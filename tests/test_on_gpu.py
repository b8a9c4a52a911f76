"""The script that measures a GPU works where there is none: every part in small, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIGHT = ("detector", "embedding", "head", "two-ranks", "products", "embed-speed", "detect-speed")
HEAVY = ("challenge", "sigterm", "processes", "train-r101", "train-two-million", "loader", "result")


def run(tmp_path, *words):
    return subprocess.run(
        [sys.executable, "benchmarks/on_gpu.py", "--device", "cpu", "--tiny", "--out", tmp_path, "--scratch",
         tmp_path / "scratch", *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parts", [LIGHT, HEAVY], ids=["light", "heavy"])
def test_every_part_works_in_small(tmp_path, parts):
    done = run(tmp_path, "--minutes", "14", "--only", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in parts:
        found = json.loads((tmp_path / f"gpu-{name}.json").read_text())
        assert found["status"] == "passed" and found["tiny"] is True and found["environment"]


def test_parts_are_named_and_a_missing_gpu_is_one_line(tmp_path):
    shown = run(tmp_path, "--show")
    assert shown.returncode == 0 and all(name in shown.stdout for name in (*LIGHT, *HEAVY))
    wrong = run(tmp_path, "--only", "detectro")
    assert wrong.returncode == 1 and "the parts are detector" in wrong.stderr
