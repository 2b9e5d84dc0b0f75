"""The table of analyses and models: some of its cells, and whether the one in docs/ is whole."""

import importlib.util
import json
import sys

import pytest

from d2dense.errors import UserError, run_tool


@pytest.fixture(scope="module")
def matrix(repo_root):
    spec = importlib.util.spec_from_file_location(
        "analysis_matrix", repo_root / "tools" / "analysis_matrix.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_that_work_and_cells_that_are_refused(matrix, tmp_path):
    command = ["--output", str(tmp_path / "few"), "--size", "64", "--images", "1"]
    for name in ("fusion time", "encoder scores", "query distance", "kernel similarity"):
        command += ["--analysis", name]
    for name in ("RetinaNet", "Co-Deformable DETR", "HFGD"):
        command += ["--family", name]
    assert matrix.main(command) == 0
    tables = json.loads((tmp_path / "few.json").read_text())["rows"]
    overview = {row["model"]: row for row in tables[matrix.OVERVIEW]}
    works = {
        model: [key for key in row if key not in ("model", "config") and row[key] != "-"]
        for model, row in overview.items()
    }
    assert works == {
        "RetinaNet": ["fusion time", "encoder scores", "kernel similarity"],
        "Co-Deformable DETR": ["encoder scores", "query distance", "kernel similarity"],
        "HFGD": ["kernel similarity"],
    }
    assert all(float(overview[model][name]) > 0 for model in works for name in works[model])
    (files,) = [row["writes"] for row in tables["Commands"] if row["analysis"] == "query distance"]
    assert files == "query_distance.csv, query_distance.png, summary.json"
    refused = {(row["analysis"], row["models"]): row["words"] for row in tables[matrix.REFUSALS]}
    assert "has no auxiliary heads" in refused["query distance", "RetinaNet"]
    assert refused["query distance", "HFGD"].startswith("CONFIG reads its test set by Semantic")
    assert "| RetinaNet " in (tmp_path / "few.md").read_text()


@pytest.mark.parametrize("fails", [True, False])
def test_a_defect_is_reported(matrix, tmp_path, monkeypatch, capsys, fails):
    """An exception that is no refusal, and a command that writes nothing."""

    def main(line):
        if fails:
            raise RuntimeError("broken")
        return 0

    monkeypatch.setattr(matrix, "main_of", lambda command: main)
    command = ["--output", str(tmp_path / "one"), "--analysis", "fusion time"]
    assert matrix.main([*command, "--family", "HFGD"]) == 1
    words = "RuntimeError: broken" if fails else "wrote no .csv and no .json and no .png"
    assert words in capsys.readouterr().err
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert rows[matrix.OVERVIEW][0]["fusion time"] == matrix.DEFECT


def test_unknown_names(matrix):
    with pytest.raises(UserError, match="unknown 'HFG'; did you mean 'HFGD'"):
        matrix.main(["--family", "HFG"])


def test_every_command_of_a_project_is_in_the_table(matrix, repo_root):
    tools = repo_root.glob("projects/*/tools/*.py")
    found = {str(path.relative_to(repo_root)) for path in tools if path.name != "benchmark.py"}
    listed = {each.command for each in matrix.ANALYSES.values()}
    listed |= {each.then for each in matrix.ANALYSES.values()} - {""}
    assert found == listed


def test_the_table_in_docs_has_every_cell_and_no_defect(matrix, repo_root):
    tables = json.loads((repo_root / "docs" / "analyses.json").read_text())["rows"]
    overview = {row["model"]: row for row in tables[matrix.OVERVIEW]}
    assert list(overview) == list(matrix.FAMILIES)
    refused = {
        (row["analysis"], model)
        for row in tables[matrix.REFUSALS]
        for model in row["models"].split("; ")
    }
    for model, row in overview.items():
        assert list(row) == ["model", "config", *matrix.ANALYSES]
        for analysis in matrix.ANALYSES:
            if row[analysis] == "-":
                assert (analysis, model) in refused
            else:
                assert float(row[analysis]) >= 0


def test_mistakes_are_one_line(matrix, capsys):
    assert run_tool(lambda: matrix.main(["--analysis", "kernels"])) == 2
    assert capsys.readouterr().err.startswith("error: unknown 'kernels'")
