"""Call a function in a short-lived child process, so that this one never holds what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import traceback
from collections.abc import Callable
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any, TypeVar

__all__ = ["call_in_child"]

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_log_format = QueueHandler(queue.SimpleQueue())  # makes records picklable


class _ChildTraceback(Exception):
    """Where in the child an exception came from: the cause of the one that is raised here."""

    def __str__(self) -> str:
        return f"\n\nin the child process:\n{self.args[0]}"


def call_in_child(function: Callable[[], T]) -> T:
    """Return ``function()``, called in a fork of this process that ends right after.

    The value must be picklable; open files are inherited, so large results go through one of those.
    What the function logs is logged here.

    The garbage collector is off in the child, which makes the building of many objects about twice
    as fast. Where processes cannot fork (not Linux) the function is called here.

    Raises:
        MemoryError: the child was killed, as the system does when memory runs out.
        Exception: whatever ``function`` raised.
    """
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return function()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(function, sender, os.getpid()))
    child.start()
    sender.close()
    try:
        while isinstance(message := receiver.recv(), logging.LogRecord):
            logging.getLogger(message.name).handle(message)
    except EOFError:
        child.join()
        raise MemoryError(f"the reading process ended with code {child.exitcode}") from None
    finally:
        child.kill()  # it has said all it had to say, or this process is being interrupted
        child.join()
        receiver.close()
    value, error, trace = message
    if error is not None:
        raise error from _ChildTraceback(trace)
    return value


def _run(function: Callable[[], Any], sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no child
    if os.getppid() != parent:
        return

    # this copy of the logging module writes nothing: what it is told is logged by the parent
    def hand_on(_: logging.Logger, record: logging.LogRecord) -> None:
        sender.send(_log_format.prepare(record))

    logging.Logger.callHandlers = hand_on  # type: ignore
    gc.disable()
    outcome: tuple[Any, BaseException | None, str]
    try:
        outcome = function(), None, ""
    except BaseException as error:
        outcome = None, _portable(error), traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        sender.send(outcome)


def _portable(error: BaseException) -> BaseException:
    """Return ``error``, or what it says where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
