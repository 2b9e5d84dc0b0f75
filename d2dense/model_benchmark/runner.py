"""Starts a process per group, keeps what it says, and survives its end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cells import FAILED, MEASURED, NOT_MEASURED, Cell, Plan, Settings
from .subjects import Group
from .turns import OUT_OF_TIME

__all__ = ["Results", "run"]

_WORKER = (sys.executable, "-m", f"{__package__}.worker")
# What a process may take longer than it was given: seconds, and a share of those.
_GRACE, _GRACE_SHARE = 30.0, 0.2
_LEAST = 20.0  # seconds that a process is worth starting for


@dataclass(kw_only=True)
class Results:
    """What is known so far.

    Attributes:
        cells: by group, what was found of each cell: ``state``, and ``reason`` or ``seconds`` (of
            each round) and ``peak`` (bytes).
        known: by group and model, ``params``, ``macs``.
    """

    cells: dict[str, dict[Cell, dict[str, Any]]] = field(default_factory=dict)
    known: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON's types, which :meth:`from_dict` takes."""
        cells = [
            {"group": group, **dataclasses.asdict(cell), **found}
            for group, table in self.cells.items()
            for cell, found in table.items()
        ]
        return {"cells": cells, "known": self.known}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        results = cls(known=values["known"])
        names = [each.name for each in dataclasses.fields(Cell)]
        for row in values["cells"]:
            row = dict(row)
            group = results.cells.setdefault(row.pop("group"), {})
            group[Cell(**{name: row.pop(name) for name in names})] = row
        return results


def run(
    groups: Sequence[Group],
    settings: Settings,
    results: Results,
    *,
    kind: str,
    seconds: float,
    save: Callable[[], object],
    say: Callable[[str], None],
    worker: Sequence[str] = _WORKER,
) -> None:
    """Measure what ``results`` lack, and add it.

    Args:
        kind: of the groups, ``full`` or ``quick``.
        seconds: that all may take; a group gets its share of what is left, so that time which one
            does not need is the next ones'.
        save: called whenever there is something new.
        say: told about each step.
    """
    end = time.monotonic() + seconds
    todo = [group for group in groups if not _complete(group, settings, results)]
    for index, group in enumerate(todo):
        shares = sum(each.share for each in todo[index:])
        limit = time.monotonic() + (end - time.monotonic()) * group.share / shares
        say(f"{group.name}: up to {(limit - time.monotonic()) / 60:.1f} minutes")
        _Group(group, settings, results, kind, save, say, worker).measure(limit)
        save()


def _complete(group: Group, settings: Settings, results: Results) -> bool:
    found = results.cells.get(group.name, {})
    return all(_settled(found, turns.cells) for turns in Plan.of(group, settings).turns)


def _settled(found: dict[Cell, dict[str, Any]], cells: Sequence[Cell]) -> bool:
    return all(found.get(cell, {}).get("state") in (MEASURED, FAILED) for cell in cells)


class _Group:
    """One group's processes: a new one goes on where one has died."""

    def __init__(
        self,
        group: Group,
        settings: Settings,
        results: Results,
        kind: str,
        save: Callable[[], object],
        say: Callable[[str], None],
        worker: Sequence[str],
    ):
        self.group, self.settings, self.kind = group, settings, kind
        self.save, self.say, self.worker = save, say, worker
        self.plan = Plan.of(group, settings)
        self.found = results.cells.setdefault(group.name, {})
        self.known = results.known.setdefault(group.name, {})
        for cell, reason in self.plan.left_out:
            self.found[cell] = {"state": NOT_MEASURED, "reason": reason}
        self.trying: Cell | None = None

    def measure(self, limit: float) -> None:
        """Let processes measure until nothing is left, or no time."""
        while not all(_settled(self.found, turns.cells) for turns in self.plan.turns):
            left = limit - time.monotonic()
            if left < _LEAST:
                break
            before = self._open()
            reason = self._one_process(left)
            if reason is None:
                break
            if self.trying is not None:
                self._failed([self.trying], reason)
            elif self._open() == before:  # it died where no cell is to blame
                self._failed(self._next_turns(), reason)
        for cell in self._open():
            self.found.setdefault(cell, {"state": NOT_MEASURED, "reason": OUT_OF_TIME})

    def _open(self) -> list[Cell]:
        cells = [cell for turns in self.plan.turns for cell in turns.cells]
        return [cell for cell in cells if not _settled(self.found, [cell])]

    def _next_turns(self) -> list[Cell]:
        """Return what is open of the first turns that have something open."""
        for turns in self.plan.turns:
            cells = [cell for cell in turns.cells if not _settled(self.found, [cell])]
            if cells:
                return cells
        return []

    def _failed(self, cells: Sequence[Cell], reason: str) -> None:
        for cell in cells:
            self.found[cell] = {"state": FAILED, "reason": reason}
            self.say(f"  {cell}: {reason}")
        self.save()

    def _one_process(self, seconds: float) -> str | None:
        """Let a process measure what is left; return why it died, or None if it did not."""
        self.trying = None
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                self.worker,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Event()
            with _killed_after(seconds * (1 + _GRACE_SHARE) + _GRACE, process, late):
                with contextlib.suppress(BrokenPipeError):  # it died before it could read
                    process.stdin.write(json.dumps(self._request(seconds)))
                    process.stdin.close()
                for line in process.stdout:
                    self._take(json.loads(line))
                code = process.wait()
            if late.is_set() or code == 0:
                return None
            return _reason(code, errors)

    def _request(self, seconds: float) -> dict[str, Any]:
        done = [t.name for t in self.plan.turns if _settled(self.found, t.cells)]
        failed = [c for c, each in self.found.items() if each["state"] == FAILED]
        return {
            "groups": self.kind,
            "group": self.group.name,
            "subjects": [each.name for each in self.group.subjects],
            "settings": self.settings.as_dict(),
            "seconds": seconds,
            "done": done,
            "failed": [dataclasses.asdict(cell) for cell in failed],
            "known": self.known,
        }

    def _take(self, line: dict[str, Any]) -> None:
        if "trying" in line:
            self.trying = None if line["trying"] is None else Cell(**line["trying"])
            self.say("  " + (f"{self.trying}" if self.trying else "taking turns"))
        elif "known" in line:
            self.known.update(line["known"])
        else:
            cell, found = Cell(**line["cell"]), line["found"]
            self.found[cell] = found
            if found["state"] != MEASURED:
                self.say(f"  {cell}: {found['state']}, {found['reason']}")
            self.save()


@contextlib.contextmanager
def _killed_after(
    seconds: float, process: subprocess.Popen, late: threading.Event
) -> Iterator[None]:
    """End a process when its time is over, and in any case when this is left."""

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()


def _reason(code: int, errors: Any) -> str:
    """Say why a process ended with an exit code other than 0."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (
            ", as Linux does when memory runs out" if name == "SIGKILL" else ""
        )
    errors.seek(0, os.SEEK_SET)
    lines = [line.strip() for line in errors if line.strip()]
    last = lines[-1][:200] if lines else ""
    return f"its process ended with code {code}: {last}"
