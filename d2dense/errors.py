"""What a user got wrong, said in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import NoReturn

__all__ = ["ToolParser", "UserError", "nearest", "run_tool"]


class UserError(Exception):
    """A mistake that the user can correct: one line with what was found, expected, and what to
    change.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class ToolParser(argparse.ArgumentParser):
    """Report a wrong command line as one line, like every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help shows the flags)")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of ``names``, or an empty string when none is
    close.
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's ``main`` and return its exit code; a :class:`UserError` is one line on stderr
    and code 2.
    """
    _quiet_known_warnings()
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _quiet_known_warnings() -> None:
    """Leave out what PyTorch says of Detectron2's own code, which a user cannot change."""
    warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
