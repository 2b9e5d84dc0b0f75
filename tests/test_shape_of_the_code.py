"""Modules hold one idea and functions fit a screen, in tests as elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDERS = ("d2dense", "projects", "tools", "tests")
MODULE_LINES = 500
# Of a function below its signature and docstring: what has to be understood at once.
BODY_LINES = 60


def long_functions(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[ast.get_docstring(node) is not None :]
            lines = node.end_lineno - start[0].lineno + 1 if start else 0
            if lines > BODY_LINES:
                found.append(f"{node.name} ({lines} lines)")
    return found


@pytest.fixture(scope="module")
def files(repo_root) -> list[Path]:
    return [file for folder in FOLDERS for file in (repo_root / folder).rglob("*.py")]


def test_modules_are_short(files):
    lengths = {str(file): len(file.read_text().splitlines()) for file in files}
    assert len(lengths) > 500
    assert {file: n for file, n in lengths.items() if n > MODULE_LINES} == {}


def test_functions_fit_a_screen(files):
    assert [(str(f), name) for f in files for name in long_functions(f.read_text())] == []


def test_what_counts_as_long():
    body = "\n".join(f"    a{k} = {k}" for k in range(BODY_LINES))
    assert long_functions(f'def f(\n    x,\n):\n    """A\n\n    B."""\n{body}') == []
    assert long_functions(f"def f(x):\n{body}\n    return x") == ["f (61 lines)"]
    assert long_functions('def f(x):\n    """A."""') == []
