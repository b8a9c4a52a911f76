"""Which of several processes this one is: as torchrun or Slurm says, or as --shard says.

Training joins its processes into one run (`training.distributed`). Every other stage cuts its work into shards that
share nothing but a folder, so it needs no more than a number: which shard of how many. Both read the same variables
here, in this order:

1. torchrun's RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE (or whatever else sets them);
2. Slurm's SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS, which `srun` gives to each task. A job array multiplies the
   shards by its tasks (SLURM_ARRAY_TASK_ID, _MIN, _STEP, _COUNT); training takes no notice of it, because the jobs of
   an array start when they like;
3. nothing: one process. So is what a batch script starts without `srun`, though `sbatch` calls it number 0 of all.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from utils import InputError

# Where processes meet when Slurm starts them; torchrun's default. Jobs that share a node get neighbouring ports.
PORT = 29500


@dataclass(frozen=True)
class Task:
    """This process among all that were started together. `local_*`: among those on the same machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""  # torchrun, srun, or nothing

    @property
    def nodes(self) -> int:
        """On how many machines they are, if each has as many as this one."""
        return -(-self.size // self.local_size)


def task(environment: Mapping[str, str] = os.environ) -> Task:
    """This process as its launcher describes it. Raises `InputError` for variables that contradict each other."""
    if "WORLD_SIZE" in environment or "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return _task("torchrun", names, environment)
    if "SLURM_PROCID" in environment and not _is_batch_script(environment):
        # Of the step that srun started, where it says so: a step may have fewer tasks than its job.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        found = _task("srun", ("SLURM_PROCID", size, "SLURM_LOCALID", ""), environment)
        return Task(found.rank, found.size, found.local_rank, _tasks_on_this_node(found, environment), found.launcher)
    return Task()


def _is_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether `sbatch` started this alone: as task 0, but of no step."""
    return environment["SLURM_PROCID"] == "0" and not environment.keys() & {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"}


def _task(launcher: str, names: tuple[str, str, str, str], environment: Mapping[str, str]) -> Task:
    rank, size, local_rank, local_size = (environment.get(name) for name in names)
    size = size or "1"
    rank = rank or ("0" if size == "1" else "")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"{names[0]}={rank} {names[1]}={size}: not a rank within a world size")
    if not all(text is None or text.isdecimal() for text in (local_rank, local_size)):
        raise InputError(f"{names[2]}={local_rank} {names[3]}={local_size}: not numbers")
    # Without a word about machines there is one.
    return Task(int(rank), int(size), int(local_rank or rank), int(local_size or size), launcher)


def _tasks_on_this_node(found: Task, environment: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE or SLURM_TASKS_PER_NODE, such as 2(x3),1, at SLURM_NODEID; else all of them."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    node = environment.get("SLURM_NODEID", "0")
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeated or 1)
    if sum(counts) != found.size or not node.isdecimal() or int(node) >= len(counts):
        return found.size
    return counts[int(node)]


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the processes of a run find each other: MASTER_ADDR and MASTER_PORT, or the first node that
    Slurm gave to the step and a port of the job's own.
    """
    host = environment.get("MASTER_ADDR")
    if not host:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        host = first_host(nodes) or "localhost"
    port = environment.get("MASTER_PORT") or str(PORT + int(environment.get("SLURM_JOB_ID", "0")) % 10_000)
    if not port.isdecimal():
        raise InputError(f"MASTER_PORT={port}: not a number")
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first name of a Slurm list of nodes: `n[003-007,9],login` gives n003; nothing gives nothing."""
    host, open_at = "", nodes.find("[")
    comma = nodes.find(",")
    if open_at < 0 or 0 <= comma < open_at:
        return nodes.split(",")[0]
    close = nodes.find("]", open_at)
    if close < 0:
        raise InputError(f"{nodes}: not a list of nodes as Slurm writes it")
    host = nodes[:open_at] + re.split("[,-]", nodes[open_at + 1 : close])[0]
    rest = nodes[close + 1 :]
    return host if not rest or rest.startswith(",") else first_host(host + rest)


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a piece of work; `index` counts from 0."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str | None = None, environment: Mapping[str, str] = os.environ) -> "Shard":
        """`"3/16"` is the third of sixteen. Without a text the launcher decides (see the file's docstring).

        Raises `InputError` for anything else.
        """
        if text is not None:
            index, slash, count = text.partition("/")
            if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
                raise InputError(f"--shard {text}: expected K/N with 1 <= K <= N, such as 3/16")
            return Shard(int(index) - 1, int(count))
        own, array = task(environment), _place_in_array(environment)
        return Shard(array.index * own.size + own.rank, array.count * own.size)

    def owns(self, chunk: int) -> bool:
        """Whether a chunk is this shard's; neighbours go to different shards, so that all take equally long."""
        return chunk % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


def _place_in_array(environment: Mapping[str, str]) -> Shard:
    """Which job of a Slurm array this is. `--array=0-15`, `1-16`, `0-30:2` are sixteen jobs each."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    if names[0] not in environment or names[3] not in environment:
        return Shard()
    texts = [environment.get(name, default) for name, default in zip(names, ("", "0", "1", ""), strict=True)]
    if not all(text.isdecimal() for text in texts):
        raise InputError(f"{' '.join(map('='.join, zip(names, texts, strict=True)))}: not numbers")
    number, first, step, count = map(int, texts)
    index, rest = divmod(number - first, max(step, 1))
    if rest or not 0 <= index < count:
        raise InputError(
            f"{names[0]}={number} with {names[3]}={count}: an array with gaps (such as --array=3,7) cannot say which "
            "shard is meant; give --shard K/N"
        )
    return Shard(index, count)
