"""Signals that ask a run to stop: noted when they arrive, obeyed when the step is done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

__all__ = ["EXIT_PREEMPTED", "STOP_SIGNALS", "Preempted", "StopRequest"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command with --resume goes on.
EXIT_PREEMPTED = 75


class Preempted(Exception):
    """The run stopped at a signal after saving; raised in every process alike."""


class StopRequest:
    """Whether this process has been asked to stop.

    Args:
        tell: processes that get the same signals.

    Attributes:
        signal: name of the first such signal, "" before.
    """

    def __init__(self, *, tell: Sequence[BaseProcess] = ()) -> None:
        self.signal = ""
        self.tell = tell

    def __bool__(self) -> bool:
        return bool(self.signal)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note the stop signals for the time of a ``with`` block instead of ending the process.

        Only the main thread may set handlers; in another one the block does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        if not self.signal:
            self.signal = signal.Signals(number).name
        for process in self.tell:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
