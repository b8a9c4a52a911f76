"""Which of several processes this one is, by the variables of torchrun and Slurm."""

import pytest

from processes import Shard, Task, first_host, meeting_point, task
from utils import InputError

# What Slurm gave the third of four tasks on two nodes (srun --nodes=2 --ntasks-per-node=2).
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[017,020-022]",
}


def test_alone_without_any_variable():
    assert task({}) == Task(0, 1, 0, 1, "")
    assert Shard.parse(None, {}) == Shard(0, 1)


def test_torchrun():
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert task(variables) == Task(5, 8, 1, 4, "torchrun") and task(variables).nodes == 2
    # A script of torchrun's inside of a job of Slurm's: one task of Slurm's is many processes.
    assert task(STEP | variables).rank == 5
    assert task({"RANK": "1", "WORLD_SIZE": "2"}) == Task(1, 2, 1, 2, "torchrun")


def test_slurm():
    assert task(STEP) == Task(2, 4, 0, 2, "srun") and task(STEP).nodes == 2
    bare = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}
    assert task(bare) == Task(1, 3, 1, 3, "srun")
    uneven = STEP | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}
    assert task(uneven).local_size == 3
    # One task of a job that has four (an interactive shell).
    assert task(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).size == 1
    # The shell of salloc has no task.
    assert task({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == Task()


def test_a_command_of_a_batch_script_without_srun_is_alone():
    """sbatch calls its script number 0 of all tasks; nobody starts the others."""
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "64"}
    batch["SLURM_TASKS_PER_NODE"] = "34,26,2(x2)"
    assert task(batch) == Task() and Shard.parse(None, batch) == Shard(0, 1)
    array = batch | {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert Shard.parse(None, array) == Shard(5, 8)
    assert task(batch | {"SLURM_STEP_NUM_TASKS": "64"}).size == 64


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"},
        {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"},
    ],
)
def test_variables_that_contradict(variables):
    with pytest.raises(InputError, match=r"not a rank within a world size|not numbers"):
        task(variables)


def test_where_processes_meet():
    assert meeting_point(STEP) == ("gpu017", 29500 + 4711)
    assert meeting_point(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == ("10.0.0.1", 1234)
    assert meeting_point({"SLURM_JOB_NODELIST": "a1,b2"})[0] == "a1"
    assert meeting_point({}) == ("localhost", 29500)
    with pytest.raises(InputError, match="MASTER_PORT=many"):
        meeting_point({"MASTER_PORT": "many"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("", ""),
        ("login", "login"),
        ("a,b[1-2]", "a"),
        ("n[003-007,9],login", "n003"),
        ("n[7]", "n7"),
        ("rack[1-2]node[05-08]", "rack1node05"),
        ("n[1-3]-ib,m4", "n1-ib"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_shards_of_tasks_and_arrays():
    assert Shard.parse("3/16", STEP) == Shard(2, 16)  # the command line wins
    assert Shard.parse(None, STEP) == Shard(2, 4)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert Shard.parse(None, array) == Shard(5, 8)
    ones = array | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "8"}
    assert Shard.parse(None, ones) == Shard(7, 8)
    steps = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_STEP": "2"}
    assert Shard.parse(None, steps) == Shard(7, 8)
    found = {
        Shard.parse(None, array | {"SLURM_ARRAY_TASK_ID": str(a), "SLURM_PROCID": str(p), "SLURM_STEP_NUM_TASKS": "4"})
        for a in range(8)
        for p in range(4)
    }
    assert found == {Shard(index, 32) for index in range(32)}
    # Training takes no notice of arrays.
    assert task(array) == Task()


def test_an_array_with_gaps_is_a_question():
    gaps = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}
    with pytest.raises(InputError, match=r"an array with gaps .* give --shard K/N"):
        Shard.parse(None, gaps)


@pytest.mark.parametrize("text", ["", "0/4", "5/4", "1", "a/b", "1/", "/2", "-1/2"])
def test_shards_that_mean_nothing(text):
    with pytest.raises(InputError, match=f"--shard {text}: expected K/N"):
        Shard.parse(text, {})


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_chunk_belongs_to_one_shard(count):
    owners = [[shard for shard in range(count) if Shard(shard, count).owns(chunk)] for chunk in range(20)]
    assert all(len(owner) == 1 for owner in owners)
