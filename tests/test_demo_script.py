"""The script behind `make demo`: its commands, without running them."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import config
from options import parse

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "synthesize.py": config.Synthesize,
    "pre_process.py": config.PreProcess,
    "train.py": config.Train,
    "lfw_eval.py": config.LfwEval,
    "align_facescrub.py": config.AlignFacescrub,
    "align_megaface.py": config.AlignMegaface,
    "megaface_eval.py": config.MegafaceEval,
}
# Takes python's place: notes its words, and leaves what the script looks for after a training.
STAND_IN = """#!/usr/bin/env bash
for word in "$@"; do printf '%s\\0' "$word"; done >> "$CALLS"
printf '\\n\\0' >> "$CALLS"
[ "$1" = "${FAILS:-}" ] && exit 1
if [ "$1" = train.py ]; then
  mkdir -p "$DEMO_RUN/train"
  for file in log.txt results.json; do echo last line > "$DEMO_RUN/train/$file"; done
fi
echo "what $1 prints"
"""


@pytest.fixture
def demo(tmp_path):
    """Run demo.sh on paths with blanks; returns exit code, standard output, and the words of each command."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("python", STAND_IN), ("tensorboard", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(**environment):
        calls.write_bytes(b"")
        (tmp_path / "my runs").mkdir(exist_ok=True)
        environment |= {"DEMO_DATA": str(tmp_path / "my data"), "DEMO_RUN": str(tmp_path / "my runs")}
        environment |= {"CALLS": str(calls), "PATH": f"{programs}:{os.environ['PATH']}"}
        for name in ("lfw", "megaface"):
            (tmp_path / "my runs" / name).mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / "demo.sh")], env={**os.environ, **environment}, capture_output=True, text=True
        )
        lines = calls.read_text().split("\n\0")[:-1]
        return done.returncode, done.stdout, [line.split("\0")[:-1] for line in lines]

    return run


def test_its_commands_are_valid_and_the_readmes(demo):
    code, _, calls = demo()
    readme = (ROOT / "README.md").read_text()
    assert code == 0 and [words[0] for words in calls] == ["synthesize.py"] * 4 + list(STAGES)[1:]
    for script, *words in calls:
        parse(STAGES[script], argv=words)  # exits for an option that does not exist
        assert f"python {script}" in readme
    people = [parse(config.Synthesize, argv=words) for _, *words in calls[:4]]
    numbers = [number for part in people for number in range(part.first, part.first + part.identities)]
    assert len(set(numbers)) == len(numbers)  # nobody is in two sets


def test_summary_names_figures_pictures_and_a_command_that_can_be_pasted(demo, tmp_path):
    code, out, _ = demo()
    assert code == 0
    for part in ("last line", "what lfw_eval.py prints", "what megaface_eval.py prints", "*.png"):
        assert part in out.partition("== Done")[2]
    [command] = re.findall(r"Training curves +(.+)", out)
    assert shlex.split(command) == [
        str(tmp_path / "programs" / "tensorboard"), "--logdir", str(tmp_path / "my runs" / "train")
    ]  # fmt: skip


def test_it_stops_where_a_stage_fails_and_does_not_train_twice(demo):
    code, out, calls = demo(FAILS="pre_process.py")
    assert code == 1 and calls[-1][0] == "pre_process.py" and "== Done" not in out
    code, out, calls = demo(FAILS="lfw_eval.py")  # although its output goes through tee
    assert code == 1 and calls[-1][0] == "lfw_eval.py" and "== Done" not in out
    code, out, calls = demo()
    assert code == 0 and "train.py" not in [words[0] for words in calls] and "== Done" in out
