"""The place of a process as torchrun and SLURM describe it; the variables are those they set."""

from __future__ import annotations

import os

import pytest

from d2dense.engine.cluster import environment_processes, first_host, thread_share
from d2dense.errors import UserError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
# srun --nodes 2 --ntasks-per-node 4
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
ONE_NODE = {
    **SLURM,
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8",
    "SLURM_STEP_NODELIST": "gpu3",
    "SLURM_LOCALID": "5",
}


def place_of(environ):
    place = environment_processes(environ)
    return place.rank, place.world_size, place.local_rank, place.local_size


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun():
    assert place_of(TORCHRUN) == (5, 8, 1, 4)
    assert environment_processes(TORCHRUN).init_method == "env://"
    # older launchers set neither the run's name nor the local size
    alone = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"}
    assert place_of(without(alone, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")) == (1, 2, 1, 2)


def test_srun_on_several_nodes():
    assert place_of(SLURM) == (5, 8, 1, 4)
    assert environment_processes(SLURM).init_method == "tcp://gpu007:23456"
    given = environment_processes({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "99"})
    assert given.init_method == "tcp://head:99"
    # before Slurm told the tasks per node of a step
    older = without(SLURM, "SLURM_STEP_TASKS_PER_NODE")
    assert place_of(older) == (5, 8, 1, 4)
    older = {**without(older, "SLURM_STEP_NUM_NODES"), "SLURM_NNODES": "2"}
    assert place_of(older) == (5, 8, 1, 4)
    job = {**without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST": "a[2,4]"}
    assert environment_processes(job).init_method == "tcp://a2:23456"


def test_srun_on_one_node():
    assert place_of(ONE_NODE) == (5, 8, 5, 8)
    assert environment_processes(ONE_NODE).init_method == "tcp://gpu3:23456"


def test_torchrun_inside_of_a_slurm_step_counts():
    assert place_of({**SLURM, **TORCHRUN, "RANK": "1", "WORLD_SIZE": "4"}) == (1, 4, 1, 4)


def test_a_plain_shell_a_batch_script_and_an_interactive_step_start_one_process():
    assert environment_processes({}) is None
    assert environment_processes({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert environment_processes({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    # some clusters describe the machines in variables like torchrun's, without a local rank
    assert environment_processes(without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_RANK")) is None


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("one", "one"),
        ("a,b", "a"),
        ("n[3,5]", "n3"),
        ("n[01-04]-ib,x", "n01-ib"),
        ("login-1,gpu[2-3]", "login-1"),
        ("a[001-003,007],b12", "a001"),
        ("gpu-a100-[07,09-12]", "gpu-a100-07"),
        ("rack[1-2]node[03,05-06],x9", "rack1node03"),
        ("node1.cluster.org,node2.cluster.org", "node1.cluster.org"),
        (" c[10]\n", "c10"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[", "a[1-3", "a]b", "a[x-y]", ",b", "a b"])
def test_node_lists_that_cannot_be_read(nodelist):
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}, r"unequal .*3\(x2\),2.* --ntasks-per-node"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,3"}, "--ntasks-per-node"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "cannot read SLURM_STEP_TASKS_PER_NODE='4x2'"),
        ({"SLURM_STEP_TASKS_PER_NODE": None, "SLURM_STEP_NUM_NODES": "3"}, "--ntasks-per-node"),
        ({"SLURM_STEP_TASKS_PER_NODE": None, "SLURM_STEP_NUM_NODES": "0"}, "--ntasks-per-node"),
        # ranks dealt out in turn: the second of node 0 has rank 2
        ({"SLURM_PROCID": "2"}, "--distribution=block"),
        ({"SLURM_PROCID": "9"}, "rank 9 of 8"),
        ({"SLURM_PROCID": None}, "SLURM_PROCID is missing"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is missing"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_JOB_NODELIST is missing"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' should be a number"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many' should be a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' should be a number"),
    ],
)
def test_slurm_environments_that_cannot_work(changes, words):
    environ = {k: v for k, v in {**SLURM, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=words):
        environment_processes(environ)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "RANK is missing, but others say that torchrun"),
        ({"WORLD_SIZE": "4.0"}, r"WORLD_SIZE='4\.0' should be a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' should be a number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is missing"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"}, "same number of processes"),
    ],
)
def test_torchrun_environments_that_cannot_work(changes, words):
    environ = {k: v for k, v in {**TORCHRUN, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=words):
        environment_processes(environ)


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert thread_share({}, 4) == 3
    assert thread_share({}, 50) == 1
    assert thread_share({"OMP_NUM_THREADS": "1"}, 4) is None
    assert thread_share({"SLURM_CPUS_PER_TASK": "8"}, 4) == 8
    assert thread_share({"SLURM_CPUS_PER_TASK": "99"}, 4) == 12
