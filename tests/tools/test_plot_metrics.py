"""Curves from metrics.json: what is read, what is drawn."""

from __future__ import annotations

import importlib.util
import json

import cv2
import pytest

from d2dense.engine import curves
from d2dense.errors import UserError


@pytest.fixture
def tool(repo_root):
    spec = importlib.util.spec_from_file_location(
        "plot_metrics", repo_root / "tools/plot_metrics.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, rows, *, tail=""):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.json").write_text(lines + tail)
    return folder


def rows(slope):
    return [
        {"iteration": i, "total_loss": slope * i, "loss_cls": 1.0, "lr": 0.1, "time": 0.5}
        for i in range(0, 100, 20)
    ] + [{"iteration": 99, "bbox/AP": 30.0, "bbox/AP-cat": 10.0}]


def test_later_values_of_a_resumed_run_count_and_a_cut_line_is_ignored(tmp_path):
    again = [{"iteration": 40, "total_loss": -1.0}]
    run = write(tmp_path / "a", rows(1.0) + again, tail='{"iteration": 120, "tot')
    found = curves.read_metrics(run)
    assert found["total_loss"] == ([0, 20, 40, 60, 80], [0.0, 20.0, -1.0, 60.0, 80.0])
    assert found["bbox/AP"] == ([99], [30.0])


def test_several_runs_are_drawn_into_one_picture(tmp_path, tool, capsys):
    runs = [write(tmp_path / name, rows(slope)) for name, slope in (("a", 1.0), ("b", -1.0))]
    output = tmp_path / "plots" / "curves.png"
    assert tool.main([*map(str, runs), "--output", str(output), "--smooth", "2"]) == 0
    assert str(output) in capsys.readouterr().out
    two = cv2.imread(str(output))
    assert two.std() > 1
    assert tool.main([str(runs[0]), "--output", str(output)]) == 0
    assert (cv2.imread(str(output)) != two).any()
    narrow = tmp_path / "lr.png"
    assert tool.main([str(runs[0]), "--output", str(narrow), "--metrics", "lr"]) == 0
    assert cv2.imread(str(narrow)).shape[1] < two.shape[1]


def test_default_panels():
    known = ["bbox/AP", "bbox/AP-cat", "bbox/APs", "loss_cls", "lr", "time", "total_loss"]
    assert curves._default_names(known) == ["total_loss", "loss_cls", "lr", "bbox/AP"]


def test_smoothing_averages_over_the_last_points():
    assert list(curves._smoothed([1.0, 3.0, 5.0, 7.0], 2)) == [1.0, 2.0, 4.0, 6.0]
    assert list(curves._smoothed([1.0, 3.0], 1)) == [1.0, 3.0]


def test_mistakes_are_named(tmp_path):
    run = write(tmp_path / "a", rows(1.0))
    broken = write(tmp_path / "b", [], tail="no json\n{}\n")
    empty = write(tmp_path / "c", [])
    for runs, names, words in (
        ([tmp_path / "none"], None, "does not exist"),
        ([run], ["total_los"], "did you mean 'total_loss'"),
        ([broken], None, "line 1"),
        ([empty], None, "no metrics yet"),
    ):
        with pytest.raises(UserError, match=words):
            curves.draw(runs, tmp_path / "x.png", names=names)
    with pytest.raises(UserError, match="cannot write"):
        curves.draw([run], tmp_path / "x.unknown")
