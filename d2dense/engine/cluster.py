"""The place of this process among all, as torchrun or SLURM tell it through the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from d2dense.errors import UserError

__all__ = ["ProcessEnv", "environment_processes", "first_host", "thread_share"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True)
class ProcessEnv:
    """Place of one process among all; every machine has equally many, with consecutive ranks.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine.
        init_method: where the processes meet.
        hosted: whether the process that started this one already keeps a store there; otherwise
            rank 0 does.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    init_method: str
    hosted: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_size):
            raise UserError(
                f"the environment places this process at rank {self.rank} of {self.world_size}, "
                f"{self.local_rank} of {self.local_size} on its machine; ranks count from 0"
            )
        if self.world_size % self.local_size or self.rank % self.local_size != self.local_rank:
            raise UserError(
                f"rank {self.rank} of {self.world_size} is number {self.local_rank} of "
                f"{self.local_size} on its machine: every machine needs the same number of "
                "processes, with consecutive ranks (torchrun --nproc-per-node; "
                "srun --ntasks-per-node --distribution=block)"
            )


def environment_processes(environ: Mapping[str, str]) -> ProcessEnv | None:
    """Read what torchrun or ``srun`` says about this process; None where neither started it.

    Raises:
        UserError: a variable that is missing or garbled, or nodes with unequal numbers of tasks.
    """
    if "TORCHELASTIC_RUN_ID" in environ or set(_TORCHRUN) <= set(environ):
        return _from_torchrun(environ)
    # Step variables: a batch script has SLURM_PROCID too, but only srun starts one task per rank.
    if "SLURM_STEP_NUM_TASKS" in environ and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return _from_slurm(environ)
    return None


def thread_share(environ: Mapping[str, str], local_size: int) -> int | None:
    """Return how many threads each of the machine's processes may compute with; None where
    ``OMP_NUM_THREADS`` already says it (torchrun sets it).

    Processes that each take every core slow all of them down many times.
    """
    if "OMP_NUM_THREADS" in environ:
        return None
    try:
        cores = len(os.sched_getaffinity(0))  # what SLURM or a container bound this process to
    except AttributeError:  # not every system can tell
        cores = os.cpu_count() or 1
    if environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, min(cores, int(environ["SLURM_CPUS_PER_TASK"])))
    return max(1, cores // local_size)


def first_host(nodelist: str) -> str:
    """Return the first name of a SLURM host list: ``gpu[007-009,12]-ib,x`` -> ``gpu007-ib``."""
    match = re.match(r"(?:[^,\[\]\s]|\[[\d,-]+\])+(?=,|$)", nodelist.strip())
    first = "" if match is None else re.sub(r"\[(\d*)[^\]]*\]", r"\1", match.group())
    if not first:
        raise UserError(f"cannot read the SLURM node list {nodelist!r}; set MASTER_ADDR")
    return first


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnv:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        _need(environ, name)
    world_size = _number(environ, "WORLD_SIZE")
    local = "LOCAL_WORLD_SIZE"
    return ProcessEnv(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_size=_number(environ, local) if local in environ else world_size,
        init_method="env://",
    )


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnv:
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
    host = environ.get("MASTER_ADDR") or first_host(
        environ.get("SLURM_STEP_NODELIST") or _need(environ, "SLURM_JOB_NODELIST")
    )
    if environ.get("MASTER_PORT"):
        port = _number(environ, "MASTER_PORT")
    else:  # jobs that share a node must not meet at the same port
        port = 20_000 + _number(environ, "SLURM_JOB_ID") % 40_000
    return ProcessEnv(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=_tasks_per_node(environ, world_size),
        init_method=f"tcp://{host}:{port}",
    )


def _tasks_per_node(environ: Mapping[str, str], world_size: int) -> int:
    """Return the number of tasks on every node; ``2(x3),1``: three nodes with 2, one with 1."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if counts is not None:
        found = {each.partition("(")[0] for each in counts.split(",")}
        if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts):
            raise UserError(f"cannot read SLURM_STEP_TASKS_PER_NODE={counts!r}")
        if len(found) == 1:
            return int(found.pop())
    else:
        nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_NNODES"
        number = _number(environ, nodes) if nodes in environ else 1
        if number > 0 and world_size % number == 0:
            return world_size // number
        counts = f"{world_size} on {number} nodes"
    raise UserError(
        f"SLURM started unequal numbers of tasks per node ({counts}); set --ntasks-per-node"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _need(environ, name)
    if not text.strip().isdigit():
        raise UserError(f"the environment variable {name}={text!r} should be a number")
    return int(text)


def _need(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        launcher = "srun" if name.startswith("SLURM") else "torchrun"
        raise UserError(
            f"the environment variable {name} is missing, but others say that {launcher} started "
            f"this process; start it with {launcher}, or unset the others"
        )
    return environ[name]
