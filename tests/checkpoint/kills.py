"""Kill a run again and again while it saves, and look at what is left each time."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2dense.checkpoint import CheckpointFolder

_SAVED = re.compile(r"saved .*model_(\d{7})\.pth")


@dataclass
class Kills:
    """What happened: kills in all, those that hit a save, and the last iteration."""

    total: int = 0
    during_save: int = 0
    between_saves: int = 0
    iteration: int = -1

    def __str__(self) -> str:
        return (
            f"{self.total} kills survived, {self.during_save} of them with a half-written file, "
            f"{self.between_saves} otherwise; reached iteration {self.iteration}"
        )


def kill_again_and_again(
    folder: Path,
    start: Callable[[], subprocess.Popen],
    *,
    kills: int,
    seed: int,
    longest: float,
    check: Callable[[dict], None] = lambda state: None,
    period: int = 1,
) -> Kills:
    """Start a run, kill it with SIGKILL at a random moment after its first save, and so on.

    After each kill there must be a state to resume, not older than the last save that was
    reported and at most one save newer.

    Args:
        folder: where the run saves.
        start: start the run with its output piped; it goes on from what is in ``folder`` and
            prints a line ``saved ...model_0000012.pth`` after each save.
        kills: how many times.
        seed: of the moments.
        longest: seconds between a run's first save and its kill.
        check: looks at the content of what would be resumed.
        period: iterations between saves.
    """
    generator = random.Random(seed)
    result = Kills()
    for _ in range(kills):
        run = start()
        try:
            reported = _first_save(run)
            assert reported > result.iteration, "the run does not go on"
            time.sleep(generator.uniform(0, longest))
        finally:
            run.kill()
        rest, _ = run.communicate()
        reported = max([reported, *map(int, _SAVED.findall(rest))])
        half = list(folder.glob(".*.pth.tmp-*"))
        assert len(half) <= 1, f"leftovers of earlier kills: {half}"
        found = CheckpointFolder(folder).resume()
        assert found is not None, f"nothing to resume (seed {seed}, kill {result.total})"
        _, state = found
        assert state["iteration"] in (reported, reported + period), (
            f"iteration {state['iteration']} after {reported} (seed {seed}, kill {result.total})"
        )
        check(state)
        result.total += 1
        result.during_save += bool(half)
        result.between_saves += not half
        result.iteration = state["iteration"]
    return result


def _first_save(run: subprocess.Popen) -> int:
    lines = []
    for line in run.stdout:
        lines.append(line)
        match = _SAVED.search(line)
        if match:
            return int(match[1])
    raise AssertionError(f"the run ended by itself ({run.wait()}): {''.join(lines[-20:])}")
