"""Projects of one's own, outside of the checkout."""

from __future__ import annotations

import sys

import pytest

from d2dense import model_zoo, projects
from d2dense.errors import UserError

CACHED = (projects._packages, projects.import_all)


@pytest.fixture
def fresh():
    """Projects are looked for again, here and after the test."""
    path = list(sys.path)
    for function in CACHED:
        function.cache_clear()
    yield
    sys.path[:] = path
    for function in CACHED:
        function.cache_clear()


def write_project(root, name):
    package = root / name / name.lower()
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (root / name / "configs").mkdir()
    (root / name / "configs" / "some_model.py").write_text("model = {}")


def test_folders_of_the_environment_variable_are_projects_too(tmp_path, monkeypatch, fresh):
    write_project(tmp_path / "one", "OwnPaperA")
    write_project(tmp_path / "two", "OwnPaperB")
    (tmp_path / "two" / "notes").mkdir()  # no package, no project
    both = f"{tmp_path / 'one'}:{tmp_path / 'two'}"
    before = projects.names()
    monkeypatch.setenv("D2DENSE_PROJECTS", both)
    projects._packages.cache_clear()
    assert set(projects.names()) - set(before) == {"OwnPaperA", "OwnPaperB"}
    assert {"OwnPaperA/some_model", "OwnPaperB/some_model"} <= set(model_zoo.list_models("lazy"))
    assert model_zoo.get_config_file("OwnPaperB/some_model").parent == tmp_path.joinpath(
        "two", "OwnPaperB", "configs"
    )


@pytest.mark.parametrize(("make", "words"), [(False, "no folder"), (True, "FSCascade")])
def test_wrong_folders_are_named(tmp_path, monkeypatch, fresh, make, words):
    if make:
        write_project(tmp_path / "own", "FSCascade")
    monkeypatch.setenv("D2DENSE_PROJECTS", str(tmp_path / "own"))
    with pytest.raises(UserError, match=words):
        projects.names()
