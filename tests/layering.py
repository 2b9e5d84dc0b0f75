"""Imports between the parts of this repository, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECTS = ("cednet", "codetr", "fscascade", "hfgd")

# The parts of d2dense from the bottom up. A part imports those before it and nothing after it,
# inside of functions too.
ORDER = (
    "install_detectron2",  # runs before anything is installed
    "errors",
    "environment",
    "stopwatch",
    "benchmark",
    "matmul_floor",
    "projects",
    "checkpoint",
    "layers",
    "data",
    "evaluation",
    "modeling",
    "costs",
    "solver",
    "composition",
    "config",
    "model_zoo",
    "engine",
    "inference",
    "export",
    "model_table",
    "model_benchmark",
    "composition_trial",
    "composition_cells",
    "composition_report",
    "analyses",
)


@dataclass(frozen=True)
class Import:
    """Line ``line`` of ``file`` imports ``name``, a dotted module or a name in one."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports(file: Path, module: str) -> Iterator[Import]:
    """Yield what ``file`` imports, at its top or in a function, with relative names made absolute.

    Args:
        module: the dotted name of ``file``; that of a package ends in ``.__init__``.
    """
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (Import(file, node.lineno, f"{base}.{each.name}") for each in node.names)


def modules(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield file and dotted name of every module of the package in ``folder``."""
    for file in sorted(folder.rglob("*.py")):
        yield file, ".".join(file.relative_to(folder.parent).with_suffix("").parts)


def upward(folder: Path, order: tuple[str, ...]) -> list[str]:
    """Return a line for every import of the package in ``folder`` that does not point down."""
    package, rank = folder.name, {part: index for index, part in enumerate(order)}
    wrong = []
    for file, module in modules(folder):
        part = module.split(".")[1]
        if part == "__init__":
            part = None  # the package itself: below all of them
        elif part not in rank:
            wrong.append(f"{file}: {part!r} has no place in the order; give it one")
            continue
        for each in imports(file, module):
            root, *rest = each.name.split(".")
            if root != package or not rest or rest[0] not in rank:
                continue  # another package, or a name of the package itself
            if part is None or (rest[0] != part and rank[rest[0]] > rank[part]):
                wrong.append(f"{each}, which is above {part or package}")
    return wrong


def foreign(files: list[tuple[Path, str]], names: tuple[str, ...]) -> list[str]:
    """Return a line for every import of one of the packages ``names``."""
    return [
        str(each)
        for file, module in files
        for each in imports(file, module)
        if each.name.split(".")[0] in names
    ]
