"""Run a property on many hostile inputs: each must succeed or end with one line for the user.

A property runs in a forked child of its own, whose memory and CPU time are limited. So a crash of
native code, a hang and a blow-up of memory are found like any other failure, with the input.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from d2dense.errors import UserError

__all__ = ["Canary", "attempt", "fuzz"]

T = TypeVar("T")

QUICK = 40
# More than the default profile by this factor.
LONG_FACTOR = 25
REPORT = "D2DENSE_FUZZ_REPORT"

_CPU_SECONDS = 10  # per input
_MEMORY = 2 << 30  # above what the process has at its start
_LONGEST_MESSAGE = 2000
_SHOWN = 3000


class Hang(BaseException):
    """One input took more CPU time than any should; no ``except Exception`` catches it."""


class Canary:
    """A file that hostile inputs try to make: code was executed when it exists."""

    def __init__(self, path: Path):
        self.path = path
        self.command = f"touch {path}"

    def check(self) -> None:
        if self.path.exists():
            self.path.unlink()
            raise AssertionError("the input executed code: the canary file exists")


def attempt(function: Callable[[], T]) -> T | None:
    """Return ``function()``, or None where it ended with a proper message for the user."""
    with warnings.catch_warnings(record=True) as caught, _cpu_limit():
        try:
            result = function()
        except UserError as error:
            result = None
            message = str(error)
            message.encode()
            assert message.strip(), "the message is empty"
            assert len(message.splitlines()) == 1, f"not one line: {message!r}"
            assert len(message) <= _LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]}"
    shown = [w for w in caught if not _is_expected(w)]
    assert not shown, f"the user sees a warning: {shown[0].message} ({shown[0].filename})"
    return result


def _is_expected(warning: warnings.WarningMessage) -> bool:
    """Whether Python hides a warning from users, or it says what they asked for."""
    hidden = issubclass(warning.category, DeprecationWarning | FutureWarning)
    return hidden or "zero-element tensors" in str(warning.message)


@contextmanager
def _cpu_limit():
    def stop(*_):
        raise Hang(f"more than {_CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(
    profile: str,
    inputs: SearchStrategy[T],
    check: Callable[[T], Any],
    *,
    name: str,
    quick: int = QUICK,
    factor: int = LONG_FACTOR,
    canary: Canary | None = None,
) -> None:
    """Check a property on inputs drawn from ``inputs``; raise AssertionError with the input of the
    first failure.

    Args:
        profile: ``quick`` (always the same inputs) or ``long`` (others every time; the seed is
            printed).
        check: calls :func:`attempt` on what is tested.
        name: of the property, for the report.
        quick: inputs of the quick profile; the long one has ``factor`` times as many.
        canary: looked for after every input.
    """
    seed = 0 if profile == "quick" else random.SystemRandom().getrandbits(32)
    count = quick if profile == "quick" else quick * factor
    if profile != "quick":
        print(f"{name}: seed {seed}, {count} inputs", flush=True)
    with _Last() as last:
        executions = _in_child(lambda: _run(inputs, check, count, seed, last, canary), last, name)
    _report(profile, name, executions, seed)
    assert executions >= min(count, 10), f"only {executions} different inputs"


def _run(inputs, check, count, seed, last, canary) -> int:
    """Let hypothesis draw and shrink; return the number of executions."""
    executions = 0

    def once(case: T) -> None:
        nonlocal executions
        executions += 1
        last.note(case)
        check(case)
        if canary is not None:
            canary.check()

    # no shrinking where an input may take seconds to fail; explaining is slow everywhere
    settings = hypothesis.settings(
        max_examples=count,
        derandomize=False,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    hypothesis.seed(seed)(settings(hypothesis.given(inputs)(once)))()
    return executions


class _Last:
    """The input in progress, kept in memory that the child shares with its parent."""

    def __enter__(self) -> _Last:
        self._memory = multiprocessing.RawArray("c", _SHOWN)
        return self

    def __exit__(self, *_) -> None:
        pass

    def note(self, case: Any) -> None:
        with suppress(Exception):
            text = repr(case).encode("utf-8", "backslashreplace")
            self._memory.value = text[: _SHOWN - 1]

    def text(self) -> str:
        return self._memory.value.decode("utf-8", "replace")


def _in_child(function: Callable[[], int], last: _Last, name: str) -> int:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(_child(function, writer))
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            answer = file.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not answer:
        what = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"exit code {os.WEXITSTATUS(status)}"
        )
        raise AssertionError(f"{name}: the process crashed ({what}) on {last.text()}")
    result = json.loads(answer)
    if "error" in result:
        raise AssertionError(f"{name}: on {last.text()}\n{result['error']}")
    return result["executions"]


def _child(function: Callable[[], int], writer: int) -> int:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)  # pytest's time limit is the parent's
        threading.excepthook = threading.__excepthook__
        _limit_memory()
        result = {"executions": function()}
    except BaseException as error:
        error.__notes__ = []  # hypothesis repeats the input there
        result = {"error": traceback.format_exc()[-_SHOWN:]}
    with open(writer, "wb") as file:
        file.write(json.dumps(result).encode())
    return 0


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, resource.RLIM_INFINITY)
    )


def _report(profile: str, name: str, executions: int, seed: int) -> None:
    """Add a line to the file that the environment names; one process at a time writes to it."""
    path = os.environ.get(REPORT)
    if not path:
        return
    file = Path(path)
    content = json.loads(file.read_text()) if file.exists() else {}
    content[name] = {"profile": profile, "executions": executions, "seed": seed}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
