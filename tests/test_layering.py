"""Imports point down only: tools, then projects, then d2dense, whose parts have an order too."""

from __future__ import annotations

import pytest

from tests.layering import ORDER, PROJECTS, foreign, modules, upward


def test_the_parts_of_the_library_import_downwards(repo_root):
    assert upward(repo_root / "d2dense", ORDER) == []


def test_the_order_names_nothing_that_is_gone(repo_root):
    parts = {path.stem for path in (repo_root / "d2dense").glob("[a-z]*")}
    assert set(ORDER) <= parts


def test_the_library_knows_no_project_and_no_tool(repo_root):
    files = list(modules(repo_root / "d2dense"))
    assert foreign(files, (*PROJECTS, "projects", "tools", "tests")) == []


def test_all_projects_are_looked_at(repo_root):
    found = {folder.name.lower() for folder in (repo_root / "projects").glob("*/")}
    assert found == set(PROJECTS)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_knows_no_other_project(repo_root, name):
    (folder,) = (repo_root / "projects").glob(f"*/{name}")
    files = [*modules(folder), *modules(folder.parent / "tools")]
    assert len(files) > 5
    others = tuple(each for each in PROJECTS if each != name)
    assert foreign(files, (*others, "projects", "tools", "tests")) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from lib.low import a", None),
        ("from . import b", None),
        ("from ..low import c", None),
        ("import torch, lib", None),
        ("from lib import version", None),
        ("import lib.high.x", "lib.high.x"),
        ("from lib import high", "lib.high"),
        ("from ..high import d", "lib.high.d"),
        ("from .. import high", "lib.high"),
        ("def f():\n    from lib.high.x import e", "lib.high.x.e"),
    ],
)
def test_what_is_found(tmp_path, text, wrong):
    folder = tmp_path / "lib"
    for part in ("low", "middle", "high"):
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").touch()
    (folder / "middle" / "module.py").write_text(text)
    found = upward(folder, ("low", "middle", "high"))
    assert len(found) == (wrong is not None)
    if wrong:
        assert f"imports {wrong}, which is above middle" in found[0]


def test_a_part_without_a_place_is_reported(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("from .new import x")
    (tmp_path / "lib" / "new.py").touch()
    assert ["'new' has no place" in each for each in upward(tmp_path / "lib", ())] == [True]
    assert "above lib" in upward(tmp_path / "lib", ("new",))[0]
