"""The recipes and the commands of docs/training.md, without running what they run."""

import os
import re
import shlex
import subprocess

import pytest
from helpers.training import ROOT

import config
from options import parse
from processes import Shard, meeting_point, task
from training import schedules

STAGES = {
    "synthesize.py": config.Synthesize,
    "extract.py": config.Extract,
    "megaface_eval.py": config.MegafaceEval,
    "pre_process.py": config.PreProcess,
    "align_megaface.py": config.AlignMegaface,
    "export_centres.py": config.ExportCentres,
    "train.py": config.Train,
    "audit.py": config.Audit,
}
# In place of python and torchrun: notes the words, and what Slurm says to the process.
STAND_IN = """#!/usr/bin/env bash
{ printf '%s\\0' "${0##*/}" "$@"; env | grep ^SLURM_ | tr '\\n' ' '; echo; } >> "$CALLS"
exit "${CODE:-0}"
"""
# In place of srun: as many tasks as the job asks for, with the variables that the real one gives them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$((rank % SLURM_NTASKS_PER_NODE)) SLURM_STEP_ID=0 "$@" || code=$?
done
exit "${code:-0}"
"""


@pytest.fixture
def shell(tmp_path):
    """Runs bash with stand-ins; gives exit code, messages, and (words, Slurm's variables) of each call."""
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    for name, text in {"python": STAND_IN, "torchrun": STAND_IN, "srun": SRUN, "scontrol": STAND_IN}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*words, **environment):
        calls.write_text("")
        environment |= {"CALLS": str(calls), "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(words, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        lines = [line.split("\0") for line in calls.read_text().splitlines()]
        said = [dict(word.split("=", 1) for word in line[-1].split()) for line in lines]
        return done.returncode, done.stderr, [(line[:-1], words) for line, words in zip(lines, said, strict=True)]

    return run


def options_of(words):
    """The options that a command line gives; SystemExit or InputError if there are no such."""
    script = next(word for word in words if word in STAGES)
    return parse(STAGES[script], argv=words[words.index(script) + 1 :])


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("small_set", ["my crops", "my run"]),
        ("noisy_set", ["my crops", "my run"]),
        ("ms1mv3_r50", ["crops", "run", "8"]),
        ("ms1mv3_r50", ["crops", "run"]),
        ("webface42m_16gpus", ["crops", "run", "node1"]),
        ("synthetic_people", ["crops", "run"]),
        ("finetune", ["my crops", "my run", "my backbone.pth"]),
    ],
)
def test_recipes_are_commands_that_the_stages_take(shell, recipe, words):
    path = ROOT / "recipes" / f"{recipe}.sh"
    more = [] if words == ["crops", "run"] and recipe == "ms1mv3_r50" else ["--val", "a b.bin", "c.bin"]
    code, errors, calls = shell("bash", path, *words, *more)
    assert code == 0, errors
    trainings = [words for words, _ in calls if "train.py" in words]
    chosen = options_of(trainings[-1])
    assert str(chosen.data) == words[0] and str(chosen.out) == words[1] and chosen.resume
    assert [str(path) for path in chosen.val] == more[1:]
    schedules.Schedule(chosen, 10)
    for call, _ in calls:
        options_of(call)
    assert re.search(r"^# Reaches: .+", path.read_text(), re.M) and "Costs: " in path.read_text()
    code, errors, calls = shell("bash", path, *words[:1])
    assert code != 0 and "usage: recipes/" in errors and not calls


def test_a_noisy_set_is_trained_on_without_what_the_audit_before_found(shell):
    code, errors, calls = shell("bash", ROOT / "recipes" / "noisy_set.sh", "crops", "run", "--seed", "3")
    assert code == 0, errors
    stages = [options_of(words) for words, _ in calls]
    trainings, audits = stages[::2], stages[1::2]
    assert [str(each.out) for each in trainings] == ["run/first", "run/second", "run"]
    assert [each.seed for each in trainings] == [3, 3, 3]
    assert [each.checkpoint for each in audits] == [str(each.out / "embedding.pt") for each in trainings]
    assert [each.exclude for each in trainings] == [None, *(each.out / "audit.tsv" for each in audits[:2])]
    assert audits[0].error_rate > audits[2].error_rate


def test_every_recipe_is_tried():
    tried = {"small_set", "noisy_set", "ms1mv3_r50", "webface42m_16gpus", "synthetic_people", "finetune"}
    assert {path.stem for path in (ROOT / "recipes").glob("*.sh")} == tried


def blocks():
    return re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)


def test_every_command_of_the_manual_is_one():
    found = 0
    for block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if any(word in STAGES for word in words):
                options_of(words)
                found += 1
    assert found >= 6


JOBS = {block.split("--job-name=")[1].split()[0]: block for block in blocks() if "--job-name=" in block}


def submit(shell, folder, name, **environment):
    """As sbatch: the file's own options decide how many tasks there are."""
    text = JOBS[name]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    (folder / "job.sh").write_text(text)
    each, nodes = int(asked.get("ntasks-per-node", 1)), int(asked.get("nodes", 1))
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": str(each * nodes),
        "SLURM_NTASKS_PER_NODE": str(each),
        "SLURM_TASKS_PER_NODE": f"{each}(x{nodes})",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    return shell("bash", folder / "job.sh", **variables, **environment)


def test_the_job_for_training_is_one_run_of_16_and_is_queued_again_after_sigterm(shell, tmp_path):
    code, errors, calls = submit(shell, tmp_path, "webface")
    assert code == 0, errors
    tasks = [task(said) for _, said in calls]
    assert [(found.rank, found.size, found.local_rank) for found in tasks] == [
        (rank, 16, rank % 8) for rank in range(16)
    ]
    assert tasks[9].nodes == 2 and meeting_point(calls[9][1]) == ("n1", 29577)
    assert all(options_of(words).resume for words, _ in calls)
    code, _, calls = submit(shell, tmp_path, "webface", CODE="143")
    assert code == 143 and calls[-1][0] == ["scontrol", "requeue", "77"]
    assert submit(shell, tmp_path, "webface", CODE="1")[2][-1][0][0] == "python"


def test_the_jobs_for_data_take_a_shard_each(shell, tmp_path):
    for job in ("distractors", "challenge"):
        code, errors, calls = submit(shell, tmp_path, job)
        assert code == 0, errors
        assert [Shard.parse(None, said) for _, said in calls] == [Shard(number, 16) for number in range(16)]
    found = []
    for number in (0, 7, 15):
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_MIN": "0"}
        code, errors, calls = submit(shell, tmp_path, "crops", **array)
        assert code == 0, errors
        found += [Shard.parse(None, said) for _, said in calls]
    assert found == [Shard(0, 16), Shard(7, 16), Shard(15, 16)]
