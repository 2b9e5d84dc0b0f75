"""What a user got wrong, said in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

__all__ = ["ToolParser", "UserError", "nearest", "one_or_more", "run_tool"]


# A config key before '=' (a dotted path, or an upper-case name), and one followed by its value.
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*(\.\w+)+|[A-Z][A-Z0-9_]*)=")
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")
# Values that a message quotes may be of any length; what to change stands at its end.
_LONGEST = 1500
_END = 500


class UserError(Exception):
    """A mistake that the user can correct: one line with what was found, expected, and what to
    change.

    Attributes:
        exit_code: of a tool that ends with this.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(_one_line(str(message)))


def _one_line(message: str) -> str:
    """Return ``message`` as one line of moderate length that any terminal or file takes."""
    words = " ".join(message.split())
    if len(words) > _LONGEST:
        words = f"{words[: _LONGEST - _END]} [...] {words[-_END:]}"
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


class ToolParser(argparse.ArgumentParser):
    """Report a wrong command line as one line, like every other mistake of a user.

    Where a tool has the positional ``overrides``, config overrides at the end of the command line
    belong to it, even after a flag that takes a list and would swallow them. A flag named
    ``--opts`` keeps its own.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help shows the flags)")

    def parse_known_args(self, args=None, namespace=None):
        # argparse takes "--flag=--" for an empty list
        for arg in sys.argv[1:] if args is None else args:
            if re.fullmatch(r"--[\w-]+=--", arg):
                self.error(f"argument {arg[:-3]}: expected a value, not '--'")
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        args = list(sys.argv[1:] if args is None else args)
        start = self._overrides_start(args)
        namespace, rest = super().parse_known_intermixed_args(args[:start], namespace)
        if start < len(args):
            namespace.overrides = [*namespace.overrides, *args[start:]]
        return namespace, rest

    def _overrides_start(self, args: list[str]) -> int:
        """Return where the overrides that end the command line start, or its length."""
        if not any(action.dest == "overrides" for action in self._get_positional_actions()):
            return len(args)
        flags = [i for i, arg in enumerate(args) if re.match(r"--|-[A-Za-z]", arg)]
        if not flags:
            return len(args)  # nothing that could swallow them
        count = self._values_needed(args[flags[-1]])
        if count is None:
            return len(args)
        starts = range(flags[-1] + 1 + count, len(args))
        return next((i for i in starts if _are_overrides(args[i:])), len(args))

    def _values_needed(self, flag: str) -> int | None:
        """Return how many values a flag must keep; None for ``--opts``, ``--`` and unknown ones."""
        name, has_value, _ = flag.partition("=")
        known = self._option_string_actions
        names = [name] if name in known else [n for n in known if n.startswith(name)]
        actions = {id(known[n]): known[n] for n in names}
        if flag == "--" or len(actions) != 1:
            return None
        (action,) = actions.values()
        if action.dest == "opts":
            return None
        if has_value or action.nargs in ("?", "*"):
            return 0
        return action.nargs if isinstance(action.nargs, int) else 1


def _are_overrides(words: Sequence[str]) -> bool:
    """Whether all words are config overrides, the first one certainly and none a file's name."""
    index = 0
    while index < len(words):
        word = words[index]
        if _ASSIGNMENT.match(word) and not os.path.exists(word):
            index += 1
        elif _KEY.fullmatch(word) and ("." in word or index) and index + 1 < len(words):
            index += 2
        else:
            return False
    return True


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of ``names``, or an empty string when none is
    close.
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_or_more(text: str) -> int:
    """Read the number that a flag counts something by, as the ``type`` of its argument."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's ``main`` and return its exit code; a :class:`UserError` is one line on stderr
    and code 2 (or what its class says), and so is a file or folder that the system refuses.
    """
    _quiet_known_warnings()
    try:
        return main() or 0
    except UserError as error:
        reason = error
    except OSError as error:
        if not isinstance(error.filename, (str, bytes)):
            raise
        reason = UserError(f"{os.fsdecode(error.filename)}: {error.strerror}")
    print(f"error: {reason}", file=sys.stderr)
    return reason.exit_code


def _quiet_known_warnings() -> None:
    """Leave out what PyTorch says of Detectron2's own code, which a user cannot change."""
    warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
