"""The commands that the pages show: where they are, what they parse to, which small model fits."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

from d2dense import config, model_zoo
from d2dense.errors import UserError
from tests.docs.pages import (
    ROOT,
    Block,
    fenced,
    indented,
    logical_lines,
    without_fences,
    words,
)

__all__ = ["Command", "commands_of", "parsed", "tiny_config"]

# What may begin a line of a shell block; "python" runs something of ours.
_PROGRAMS = ("git", "make", "python", "srun", "torchrun")
# Lines that are the shell's own.
_GLUE = ("code=$?; [ $code -eq 75 ] && scontrol requeue $SLURM_JOB_ID; exit $code",)
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=\S*")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_MARK = re.compile(r"needs? (a )?GPUs?\b|\d GPUs\b|needs the full data")
_ANY = "FSCascade/fscascade_tiny_shapes"  # in place of a reader's config
_NEAR = 500  # characters before a block in which a mark counts


@dataclass(frozen=True)
class Command:
    """A command line of a page.

    Attributes:
        words: without assignments of environment variables, launchers and ``...``.
        launched: several processes, by a launcher or a flag.
        marked: the page says beside it what it needs.
    """

    page: Path
    line: int
    text: str
    words: tuple[str, ...]
    launched: bool
    marked: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"

    @property
    def tool(self) -> str:
        """The script's path, or the module's name; of ``make``, the target."""
        if self.words[0] != "python":
            return self.words[-1]
        return self.words[2] if self.words[1] == "-m" else self.words[1]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[3:] if self.words[1] == "-m" else self.words[2:])


def commands_of(page: Path) -> Iterator[Command]:
    """Yield all commands of a page, in their order.

    Raises:
        AssertionError: a line of a shell block that is no command which can be checked.
    """
    text = page.read_text()
    found = []
    for block in fenced(text):
        if block.kind in ("bash", "sh", "console"):
            found += _of_block(page, block)
    for block in indented(text):
        lines = [line for _, line in logical_lines(block)]
        if any(_program(line) for line in lines):
            found += _of_block(page, block)
    found += _of_spans(page, text)
    yield from sorted(found, key=lambda each: each.line)


def _of_block(page: Path, block: Block) -> Iterator[Command]:
    near = block.before[-_NEAR:] + block.text
    for number, line in logical_lines(block):
        if line in _GLUE:
            continue
        assert _program(line), f"{page}:{number}: no command that is known: {line}"
        yield _command(page, number, line, near)


def _of_spans(page: Path, text: str) -> Iterator[Command]:
    plain = without_fences(text)
    for match in _SPAN.finditer(plain):
        if _program(match[1]) in ("make", "python"):
            number = plain.count("\n", 0, match.start()) + 1
            near = plain[max(0, match.start() - _NEAR) : match.end() + _NEAR]
            yield _command(page, number, match[1], near)


def _program(line: str) -> str | None:
    """The program that a line starts, if it is one of those that are known."""
    parts = [each for each in line.split() if not _ASSIGNMENT.fullmatch(each)]
    return parts[0] if len(parts) > 1 and parts[0] in _PROGRAMS else None


def _command(page: Path, number: int, text: str, near: str) -> Command:
    parts = words(text.replace("\\|", "|"))
    kept = ["", *parts]
    parts = [b for a, b in pairwise(kept) if b != "..." or a.startswith("--")]
    while _ASSIGNMENT.fullmatch(parts[0]):
        parts.pop(0)
    launched = parts[0] in ("srun", "torchrun")
    if launched:  # what it launches is a script, and ours are run by python
        start = next(i for i, each in enumerate(parts) if each.endswith(".py"))
        parts = ["python", *parts[start:]]
    many = [b for a, b in pairwise(parts) if a in ("--num-gpus", "--num-machines")]
    launched |= any(int(each) > 1 for each in many)
    return Command(page, number, text, tuple(parts), launched, bool(_MARK.search(near)))


class _Parsed(Exception):
    """A tool has understood its command line."""

    def __init__(self, namespace: argparse.Namespace):
        super().__init__()
        self.namespace = namespace


@contextmanager
def _stop_after_parsing() -> Iterator[None]:
    def stopping(parse):
        def call(self, *args, **kwargs):
            raise _Parsed(parse(self, *args, **kwargs))

        return call

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", stopping(_parse)),
        mock.patch.object(parser, "parse_intermixed_args", stopping(_parse_intermixed)),
    ):
        yield


def _parse(self, args=None, namespace=None):
    found, left = self.parse_known_args(args, namespace)
    if left:
        self.error(f"unrecognized arguments: {' '.join(left)}")
    return found


def _parse_intermixed(self, args=None, namespace=None):
    found, left = self.parse_known_intermixed_args(args, namespace)
    if left:
        self.error(f"unrecognized arguments: {' '.join(left)}")
    return found


def parsed(command: Command) -> argparse.Namespace:
    """Return what the tool's own parser makes of a command; nothing is run.

    Raises:
        AssertionError: there is no such tool, or it refuses the arguments.
    """
    tool = command.tool
    module = command.words[1] == "-m"
    assert module or (ROOT / tool).is_file(), f"{command}: there is no {tool}"
    try:
        with _stop_after_parsing(), mock.patch.object(sys, "argv", [tool, *command.arguments]):
            if module:
                runpy.run_module(tool, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / tool), run_name="__main__")
    except _Parsed as result:
        return result.namespace
    except UserError as error:
        raise AssertionError(f"{command}: {error}") from None
    except SystemExit as end:
        raise AssertionError(f"{command}: its arguments are refused ({end.code})") from None
    raise AssertionError(f"{command}: it parses no arguments")


def check_configs(command: Command, namespace: argparse.Namespace) -> None:
    """Check that the configs which a command names exist and have the keys that it changes.

    Raises:
        AssertionError: they do not.
    """
    names = getattr(namespace, "config_file", None) or []
    overrides = list(getattr(namespace, "overrides", None) or [])
    for name in [names] if isinstance(names, str) else names:
        path = ROOT / name
        if _is_placeholder(name):
            if not overrides:
                continue
            path = model_zoo.get_config_file(_ANY, "lazy" if "=" in overrides[0] else "yaml")
        try:
            config.load(path if path.is_file() else name, overrides)
        except UserError as error:
            raise AssertionError(f"{command}: {error}") from None


def _is_placeholder(name: str) -> bool:
    """Whether a config is one that the reader has: F, NAME, my.yaml, output/run/config.yaml."""
    return bool(re.fullmatch(r"\.\.\.|[A-Z]+|my\S*|output/\S*", name))


def tiny_config(name: str) -> str:
    """Return the small model of the same project that is most like ``name``; yaml for yaml."""
    special = {  # a branch of auxiliary heads is asked for
        "CoDETR/deformable_detr_pp_r50_rcnn_atss_1x": "CoDETR/co_deformable_detr_tiny_shapes"
    }
    if _is_placeholder(name):
        return _ANY
    file = re.fullmatch(r"projects/(\w+)/configs/(\w+)\.(py|yaml)", name)
    model = f"{file[1]}/{file[2]}" if file else name
    kind = {"py": "lazy", "yaml": "yaml"}[file[3]] if file else None
    if "tiny" not in model:
        project = model.split("/")[0]
        small = [each for each in model_zoo.list_models(kind) if each.startswith(f"{project}/")]
        small = [each for each in small if "tiny" in each]
        small.sort(key=len)
        alike = max(small, key=lambda each: len(os.path.commonprefix([each, model])))
        model = special.get(model, alike)
    return str(model_zoo.get_config_file(model, kind)) if file else model
