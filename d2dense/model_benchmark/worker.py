"""The process of one group: measures its turns and says what it finds, line by line.

:mod:`d2dense.model_benchmark.runner` starts it with a request as JSON on its input: ``groups``
(``full`` or ``quick``), ``group`` and ``subjects`` (names), ``settings``, ``seconds``, ``done``
(names of turns that are not measured again), ``failed`` (cells that are not tried again) and
``known`` (of the models, from before). Its output is one JSON value per line: ``{"trying": cell}``
or ``{"trying": null}`` when turns begin, ``{"cell": cell, "found": ...}`` and ``{"known": ...}``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from d2dense import projects

from . import catalogue
from .cells import Cell, Plan, Settings, Turns
from .turns import Clock, measure

__all__ = ["main"]


def main() -> None:
    """Do what the request on the standard input asks for."""
    output = _own_output()
    _offer_to_the_memory_killer()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    projects.import_all()
    gc.freeze()  # collections before every call need not go through what was imported
    request = json.load(sys.stdin)
    settings = Settings.from_dict(request["settings"])
    names = set(request["subjects"])
    groups = catalogue.KINDS[request["groups"]]
    (group,) = (each for each in groups if each.name == request["group"])
    group = dataclasses.replace(
        group, subjects=tuple(each for each in group.subjects if each.name in names)
    )
    clock = Clock(request["seconds"])
    failed = {Cell(**cell) for cell in request["failed"]}
    known: dict[str, dict[str, Any]] = request["known"]
    subjects = {each.name: each for each in group.subjects}

    def report(cell: Cell | None, found: Mapping[str, Any] | None) -> None:
        which = None if cell is None else dataclasses.asdict(cell)
        _say(output, {"trying": which} if found is None else {"cell": which, "found": found})

    for turns in Plan.of(group, settings).turns:
        if turns.name not in request["done"]:
            rest = tuple(cell for cell in turns.cells if cell not in failed)
            left = Turns(name=turns.name, rounds=turns.rounds, cells=rest)
            measure(left, subjects, settings, clock, known, report)
            _say(output, {"known": known})


def _own_output() -> TextIO:
    """Return the standard output for our lines alone; what libraries print goes where errors go."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def _offer_to_the_memory_killer() -> None:
    """Let Linux end this process first when memory runs out, and no other one."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        logging.getLogger(__name__).debug("this system does not choose by a score")


def _say(output: TextIO, line: Any) -> None:
    print(json.dumps(line), file=output, flush=True)


if __name__ == "__main__":
    main()
