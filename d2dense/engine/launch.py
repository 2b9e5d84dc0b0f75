"""Processes of a run: this one alone, spawned here, or started by torchrun or SLURM."""

from __future__ import annotations

import logging
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from d2dense.errors import UserError

from .attempt import attempt_store
from .cluster import ProcessEnv, environment_processes, thread_share
from .meeting import check_url, meet
from .signals import STOP_SIGNALS, Preempted, StopRequest

__all__ = ["ProcessDied", "launch"]

logger = logging.getLogger(__name__)

# How long one process waits for another in an exchange: evaluation and checkpoints happen between
# two of them, and a process that hangs holds the others up for this long at most.
TIMEOUT = timedelta(minutes=30)
# How long processes wait for each other at the start: machines may begin minutes apart.
JOIN_TIMEOUT = timedelta(minutes=10)
# What the processes that are left have, after one died, to end by themselves.
GRACE_SECONDS = 5.0
_USER_ERROR_CODE = 2
# A forked process cannot use CUDA, which this one may have used.
_START_METHOD = "spawn"
_HERE = "127.0.0.1"


class ProcessDied(UserError):
    """A process of the run was ended from outside; the others have been ended too."""

    exit_code = 1


def launch(
    main: Callable[[Namespace], Any],
    args: Namespace,
    *,
    join_timeout: timedelta = JOIN_TIMEOUT,
) -> None:
    """Call ``main(args)`` in every process of the run.

    The environment of torchrun or ``srun`` decides where there is one; otherwise ``--num-gpus``
    processes are spawned per machine. ``main`` must be importable (a module-level function).

    Args:
        args: with ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url`` and ``device``
            (``cpu`` runs one CPU process where there would be one per GPU).
        join_timeout: how long the processes wait for each other at the start.

    Raises:
        UserError: a launch that cannot work, or what a process raised as one.
        ProcessDied: a process was killed, for instance because the machine ran out of memory.
        Preempted: a signal stopped the run; one that reaches the launching process is passed on to
            those that it started.
    """
    given = environment_processes(os.environ)
    # a srun with one task per machine may describe the machines by flags
    if given is not None and args.num_machines == 1:
        if args.num_gpus not in (1, given.local_size):
            raise UserError(
                f"--num-gpus {args.num_gpus}, but torchrun or srun started {given.local_size} "
                "process(es) on this machine; leave the flag out, or start that many"
            )
        with _ProcessGroup(given, args.device, join_timeout):
            main(args)
        return
    world_size = args.num_gpus * args.num_machines
    _check(args, world_size)
    if world_size == 1:
        main(args)
        return
    store = _hosted_store(args)  # lives until the processes have ended
    place = args.dist_url if store is None else f"tcp://{_HERE}:{store.port}"
    _spawn(main, args, world_size, place, store is not None, join_timeout)


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


def _hosted_store(args: Namespace) -> dist.TCPStore | None:
    """Return the meeting point of a run on this machine alone, None for one that the user names.

    It is kept by this process, which alone knows a port to be free: it has it.
    """
    if args.dist_url != "auto":
        check_url(args.dist_url)
        return None
    if args.num_machines > 1:
        raise UserError(
            "several machines need a place to meet: give all of them "
            "--dist-url tcp://<host of machine 0>:<free port>"
        )
    return dist.TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)


def _spawn(
    main: Callable[[Namespace], Any],
    args: Namespace,
    world_size: int,
    init_method: str,
    hosted: bool,
    join_timeout: timedelta,
) -> None:
    endings = mp.get_context(_START_METHOD).SimpleQueue()
    # it warns of every process that it ends, which hides the one line that matters
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    context = mp.start_processes(
        _worker,
        nprocs=args.num_gpus,
        args=(main, args, world_size, init_method, hosted, join_timeout, endings),
        join=False,
        start_method=_START_METHOD,
    )
    killed = None
    try:
        with StopRequest(tell=context.processes).listening() as stop:
            done = False
            while not done:
                killed = _wait_for_one(context.processes)
                done = context.join(grace_period=GRACE_SECONDS)
    except (mp.ProcessExitedException, mp.ProcessRaisedException):
        # Whoever failed first, the others fail too, waiting for it: look for the cause in all.
        if not endings.empty():
            kind, message = endings.get()
            raise (UserError(message) if kind == "mistake" else Preempted(message)) from None
        if killed is None:
            raise
        if stop and -(killed.exitcode or 0) in STOP_SIGNALS:
            # it came before the processes were ready to obey it
            raise Preempted(stop.signal) from None
        raise ProcessDied(_obituary(killed)) from None
    if not endings.empty():
        raise Preempted(endings.get()[1])


def _wait_for_one(processes: list[BaseProcess]) -> BaseProcess | None:
    """Wait until a process ends; return one that a signal ended.

    To be asked before PyTorch learns of it and kills the others.
    """
    alive: dict[Any, BaseProcess] = {p.sentinel: p for p in processes if p.exitcode is None}
    # of none, ``wait`` would never return: the last ones may have ended since PyTorch looked
    for sentinel in wait(list(alive)) if alive else ():
        alive[sentinel].join()  # it has let go of its pipe, but may not have its exit code yet
    return next((each for each in processes if (each.exitcode or 0) < 0), None)


def _obituary(process: BaseProcess) -> str:
    number = -(process.exitcode or 0)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = ""
    if number == signal.SIGKILL:
        hint = "; if the system did it for lack of memory, use fewer loader workers or processes"
    return (
        f"a process of the run (pid {process.pid}) was ended by {name}, and the others with it"
        f"{hint}. --resume goes on from the last checkpoint"
    )


def _worker(
    local_rank: int,
    main,
    args: Namespace,
    world_size: int,
    init_method: str,
    hosted: bool,
    join_timeout: timedelta,
    endings,
) -> None:
    place = ProcessEnv(
        rank=args.machine_rank * args.num_gpus + local_rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=args.num_gpus,
        init_method=init_method,
        hosted=hosted,
    )
    try:
        with _ProcessGroup(place, args.device, join_timeout):
            main(args)
    except Preempted as ending:
        if local_rank == 0:
            endings.put(("preempted", str(ending)))
    except UserError as error:
        endings.put(("mistake", str(error)))
        raise SystemExit(_USER_ERROR_CODE) from None


class _ProcessGroup:
    """Join the other processes for the time of a ``with`` block."""

    def __init__(self, place: ProcessEnv, device: str | None, join_timeout: timedelta):
        self.place = place
        self.join_timeout = join_timeout
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
        threads = thread_share(os.environ, place.local_size)
        if threads is not None:
            torch.set_num_threads(threads)
        store = attempt_store(
            meet(place, timeout=self.join_timeout),
            rank=place.rank,
            world_size=place.world_size,
            timeout=self.join_timeout,
        )
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            backend="nccl" if self.cuda else "gloo",
            store=store,
            world_size=place.world_size,
            rank=place.rank,
            timeout=TIMEOUT,
        )
        comm.create_local_process_group(place.local_size)
        comm.synchronize()

    def __exit__(self, kind, *error) -> None:
        if kind is not None and not issubclass(kind, Preempted):
            return  # the others may never arrive; the end of the process frees everything
        comm.synchronize()
        # The groups that detectron2 remembers would outlive the interpreter; their threads abort
        # the process then.
        comm._LOCAL_PROCESS_GROUP = None
        comm.create_local_process_group.cache_clear()
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()
