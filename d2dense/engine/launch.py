"""Processes of a run: this one alone, spawned here, or started by torchrun or SLURM."""

from __future__ import annotations

import logging
import os
import re
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from d2dense.errors import UserError

__all__ = ["ProcessEnv", "environment_processes", "launch"]

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
_USER_ERROR_CODE = 2


@dataclass(frozen=True, kw_only=True)
class ProcessEnv:
    """Place of one process among all.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine.
        init_method: where the processes meet.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    init_method: str


def launch(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Call ``main(args)`` in every process of the run.

    The environment of torchrun or ``srun`` decides where there is one; otherwise ``--num-gpus``
    processes are spawned per machine. ``main`` must be importable (a module-level function).

    Args:
        args: with ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url`` and ``device``
            (``cpu`` runs one CPU process where there would be one per GPU).

    Raises:
        UserError: a launch that cannot work, or what a process raised as one.
    """
    given = environment_processes(os.environ)
    if given is not None:
        with _ProcessGroup(given, args.device):
            main(args)
        return
    world_size = args.num_gpus * args.num_machines
    _check(args, world_size)
    if world_size == 1:
        main(args)
        return
    _spawn(main, args, world_size, _meeting_point(args))


def environment_processes(environ: Mapping[str, str]) -> ProcessEnv | None:
    """Read what torchrun or ``srun`` says about this process; None where neither started it."""
    if "TORCHELASTIC_RUN_ID" in environ or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(environ):
        return ProcessEnv(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            local_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
            init_method="env://",
        )
    # Step variables: a batch script has SLURM_PROCID too, but only srun starts one task per rank.
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        world_size = int(environ["SLURM_STEP_NUM_TASKS"])
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", 1)))
        if world_size % nodes:
            raise UserError(
                f"SLURM started {world_size} tasks on {nodes} nodes; every node needs the same "
                "number, set --ntasks-per-node"
            )
        host = environ.get("MASTER_ADDR") or _first_host(
            environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        )
        # jobs that share a node must not meet at the same port
        port = environ.get("MASTER_PORT") or 20_000 + int(environ["SLURM_JOB_ID"]) % 40_000
        return ProcessEnv(
            rank=int(environ["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(environ["SLURM_LOCALID"]),
            local_size=world_size // nodes,
            init_method=f"tcp://{host}:{port}",
        )
    return None


def _first_host(nodelist: str) -> str:
    """Return the first name of a SLURM host list: ``gpu[007-009,12],x`` -> ``gpu007``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if match is None:
        raise UserError(f"cannot read the SLURM node list {nodelist!r}; set MASTER_ADDR")
    prefix, numbers, suffix = match.groups(default="")
    return prefix + re.split(r"[-,]", numbers)[0] + suffix


def _check(args: Namespace, world_size: int) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: both must be 1 or more"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} must be from 0 to {args.num_machines - 1} "
            f"(--num-machines {args.num_machines})"
        )
    found = torch.cuda.device_count()
    if world_size > 1 and args.device != "cpu" and args.num_gpus > found:
        raise UserError(
            f"--num-gpus {args.num_gpus} but this machine has {found}; use fewer, or --device cpu "
            "for that many CPU processes"
        )


def _meeting_point(args: Namespace) -> str:
    if args.dist_url != "auto":
        return args.dist_url
    if args.num_machines > 1:
        raise UserError(
            "several machines need a place to meet: give all of them "
            "--dist-url tcp://<host of machine 0>:<free port>"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _spawn(
    main: Callable[[Namespace], Any], args: Namespace, world_size: int, init_method: str
) -> None:
    mistakes = mp.get_context("spawn").SimpleQueue()
    # it warns of every process that it ends, which hides the one line that matters
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        mp.spawn(
            _worker, nprocs=args.num_gpus, args=(main, args, world_size, init_method, mistakes)
        )
    except mp.ProcessExitedException as error:
        # the processes that were not at fault were waiting for the others, and are ended by now
        if error.exit_code == _USER_ERROR_CODE and not mistakes.empty():
            raise UserError(mistakes.get()) from None
        raise


def _worker(local_rank: int, main, args: Namespace, world_size: int, init_method: str, mistakes):
    place = ProcessEnv(
        rank=args.machine_rank * args.num_gpus + local_rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=args.num_gpus,
        init_method=init_method,
    )
    if "OMP_NUM_THREADS" not in os.environ:
        # as torchrun does: processes that each take every core slow all of them down many times
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    try:
        with _ProcessGroup(place, args.device):
            main(args)
    except UserError as error:
        mistakes.put(str(error))
        raise SystemExit(_USER_ERROR_CODE) from None


class _ProcessGroup:
    """Join the other processes for the time of a ``with`` block."""

    def __init__(self, place: ProcessEnv, device: str | None):
        self.place = place
        self.cuda = device != "cpu" and torch.cuda.is_available()

    def __enter__(self) -> None:
        place = self.place
        if self.cuda:
            if place.local_size > torch.cuda.device_count():
                raise UserError(
                    f"{place.local_size} processes on this machine but "
                    f"{torch.cuda.device_count()} GPUs; start one process per GPU"
                )
            torch.cuda.set_device(place.local_rank)
        dist.init_process_group(
            backend="nccl" if self.cuda else "gloo",
            init_method=place.init_method,
            world_size=place.world_size,
            rank=place.rank,
            timeout=TIMEOUT,
        )
        comm.create_local_process_group(place.local_size)
        comm.synchronize()

    def __exit__(self, kind, *error) -> None:
        if kind is not None:
            return  # the others may never arrive; the end of the process frees everything
        comm.synchronize()
        # The groups that detectron2 remembers would outlive the interpreter; their threads abort
        # the process then.
        comm._LOCAL_PROCESS_GROUP = None
        comm.create_local_process_group.cache_clear()
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()
