"""What stands in the project's Markdown pages: blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ ]*$", re.M | re.S
)
_INDENTED = re.compile(r"(?:^|\n)\n((?:    [^\n]*\n|\n(?=    ))+)")
_FILE = re.compile(r"\*\*`([^`]+)`\*\*\n\n\Z")


@dataclass(frozen=True)
class Block:
    """A block of code, the text right before it, and the number of its first line."""

    kind: str
    text: str
    before: str
    line: int

    @property
    def file_name(self) -> str | None:
        """The name in bold right above the block, where it is a whole file."""
        found = _FILE.search(self.before)
        return found and found[1]


def pages() -> list[Path]:
    """All pages of the repository."""
    found = [ROOT / "README.md", *ROOT.glob("projects/*/README.md")]
    found += [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    return sorted(found)


def fenced(text: str) -> list[Block]:
    """The blocks between fences."""
    return [
        Block(
            kind=match["kind"],
            text=match["text"],
            before=text[: match.start()],
            line=text.count("\n", 0, match.start("text")) + 1,
        )
        for match in _FENCE.finditer(text)
    ]


def without_fences(text: str) -> str:
    """The page with empty lines in place of the blocks between fences."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def indented(text: str) -> list[Block]:
    """The blocks that are indented by four spaces, as shell commands."""
    blank = without_fences(text)
    return [
        Block(
            kind="bash",
            text=re.sub(r"^    ", "", match[1], flags=re.M),
            before=blank[: match.start(1)],
            line=blank.count("\n", 0, match.start(1)) + 1,
        )
        for match in _INDENTED.finditer(blank)
    ]


def logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a shell block, continued ones joined."""
    joined, start = "", block.line
    for number, line in enumerate(block.text.split("\n"), start=block.line):
        if not joined:
            start = number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        if joined and not joined.startswith("#"):
            yield start, joined
        joined = ""


def words(command: str) -> list[str]:
    """A command's words without its comment."""
    return shlex.split(command, comments=True)
