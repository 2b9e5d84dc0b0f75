"""Commands in the background, started in a moment.

Each is a process of its own: a fork of the server that the processes of these tests come from,
which has imported everything. Nothing else of a command is left out: its words, variables, folder,
signals and exit code are those of one that a shell starts. The few seconds of imports are shown
to work by ``tests/tools/test_train_net.py``, which starts it with a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Command:
    """A process that runs ``words`` as ``python`` would, with what :class:`subprocess.Popen` has.

    Args:
        words: a script, or ``-m`` and a module, and its arguments.
        log: file for its output and error lines.
        environ: all of its variables.
        cwd: the folder that it runs in.
    """

    def __init__(self, words: Sequence, *, log: Path, environ: Mapping[str, str], cwd: Path):
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=([str(word) for word in words], str(log), dict(environ), str(cwd))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, the negative number of the signal that ended it, None before."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once there is one.

        Raises:
            subprocess.TimeoutExpired: there is none after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("command", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """End it and all that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def _run(words: list[str], log: str, environ: dict[str, str], cwd: str) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    from d2dense.engine import launch

    launch._START_METHOD = "fork"  # this process has no threads and has imported all there is
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
