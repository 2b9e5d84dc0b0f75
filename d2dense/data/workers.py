"""The processes that read ahead: how they start, which signals reach them, and how their death is
told.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cv2
from torch.utils import data as torchdata

from d2dense.errors import UserError

from .reading import be_strict

__all__ = ["Arrivals", "clear_deaths", "end", "held_signals", "pack", "start", "unpack"]

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # after which a process that has not started never will
_START_ATTEMPTS = 3

_KEYS = "DATALOADER.NUM_WORKERS / dataloader.train.num_workers and dataloader.test.num_workers"
_IGNORED = {signal.SIGINT, signal.SIGUSR1}
# How torch tells of workers that died, and of what kills them slowly.
_DEATH = re.compile(
    r"DataLoader worker \(pid|out of shared memory|</torch_|Too many open files"
    r"|received 0 items of ancdata"
)


def start(worker: int) -> None:
    """Prepare a worker (``worker_init_fn``): one OpenCV thread instead of one per core, strict
    reading, and no end by a signal that is meant for the training process.
    """
    cv2.setNumThreads(0)
    be_strict()
    _leave_signals_to_parent()


class Arrivals:
    """Starts forked workers and makes sure that each of them runs.

    A fork beside running threads can hang in the child before its first line: CPython before 3.12
    waits for a lock that a thread of the process group held at that moment. Nobody would tell the
    training process, which would wait for that worker's batches for ever.

    An instance is the ``worker_init_fn`` of one iteration of a loader whose workers are forked.
    """

    def __init__(self, num_workers: int):
        self._arrived = mmap.mmap(-1, max(num_workers, 1))  # shared with whatever is forked

    def __call__(self, worker: int) -> None:
        start(worker)
        self._arrived[worker] = 1

    def started(self, make: Callable[[], Iterator]) -> Iterator:
        """Return what ``make`` returned, a DataLoader's iterator, with all of its workers running.

        Raises:
            UserError: some did not start, three times.
        """
        for _ in range(_START_ATTEMPTS):
            self._arrived[:] = bytes(len(self._arrived))
            with held_signals():
                batches = make()
            workers = getattr(batches, "_workers", [])
            missing = self._wait(len(workers))
            if not missing:
                return batches
            logger.warning(
                "%d of %d processes that read data hang at their start; starting all again",
                missing,
                len(workers),
            )
            end(batches)
            for worker in workers:
                worker.kill()  # torch's own way out is a signal that is still held back in them
                worker.join()
        raise UserError(
            f"processes that read data do not start within {START_SECONDS:.0f} s; use fewer of "
            f"them or none ({_KEYS})"
        )

    def _wait(self, count: int) -> int:
        """Return how many of ``count`` workers have not arrived in time."""
        limit = time.monotonic() + START_SECONDS
        while (missing := count - sum(self._arrived[:count])) and time.monotonic() < limit:
            time.sleep(0.002)
        return missing


def pack(samples: list[Any]) -> list[Any] | bytes:
    """Collate a batch into a list; in a worker, pickle it with its tensors moved to shared memory.

    Queues do that in a thread of their own, whose errors reach nobody: where shared memory is full
    (64 MB in a container) the training process would wait for ever. Here they end the run.
    """
    if torchdata.get_worker_info() is None:
        return samples
    return bytes(ForkingPickler.dumps(samples))


def unpack(batch: list[Any] | bytes) -> list[Any]:
    """Return what :func:`pack` was given."""
    return pickle.loads(batch) if isinstance(batch, bytes) else batch


def end(batches: Iterator) -> None:
    """End the workers of a DataLoader's iterator now. Left to the garbage collector, which frees
    their queues first, each would be waited for in vain for five seconds: an error that somebody
    keeps (a debugger, a notebook, a test) holds the iterator in such a cycle.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)  # there is none without workers
    if shutdown is not None:
        shutdown()


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Hold signals back while workers are made, which inherit that: one that came before
    :func:`start` had run would end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_IGNORED, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent() -> None:
    """Ignore SIGINT, SIGUSR1 and SIGTERM, which schedulers and terminals send to the whole process
    group; the training process answers them by finishing its step, for which it needs its workers.

    They end when it tells them to or is gone. Where it ends them by SIGTERM, which is torch's last
    resort against one that hangs, they obey.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    # threads that start later inherit this, so the signal reaches none but the one that waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def clear_deaths() -> Iterator[None]:
    """Turn torch's error about a dead worker into a line that says what to change.

    torch raises it wherever the training process is when the worker dies, so this belongs around
    the whole run.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _DEATH.search(str(error)):
            raise
        # an error that comes from a worker is its whole traceback
        reason = str(error).strip().splitlines()[-1].rstrip(". ")
        raise UserError(
            f"a process that reads data ended or failed ({reason}); most often memory ran out: use "
            f"fewer of them ({_KEYS}; 0 reads in the training process), give the job more memory, "
            "a container more shared memory (docker run --shm-size 8g), or allow more open files "
            "(ulimit -n)"
        ) from error
