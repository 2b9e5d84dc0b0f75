"""The page that explains how to add a paper, followed to the letter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, fenced, logical_lines, words

PAGE = (ROOT / "docs" / "architecture.md").read_text()
BLOCKS = fenced(PAGE)
FILES = {block.file_name: block.text for block in BLOCKS if block.file_name}
NAME = "Peaks/peak_detector_tiny_shapes"


def commands(heading):
    """The commands under a heading, as lists of words."""
    return [
        words(line)
        for block in BLOCKS
        if block.kind == "bash" and block.before.rpartition("\n## ")[2].count(heading)
        for _, line in logical_lines(block)
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need, with the page's files in it."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "figures", "*.png")
    for name in ("d2dense", "projects", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/projects/parity.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name, text in FILES.items():
        assert not (root / name).exists(), f"{name} is there already"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(root, lines, **environment):
    (root / "commands.json").write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "docs" / "run_commands.py", "commands.json"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_fifth_paper_by_the_page(checkout):
    lines = commands("A fifth paper in nine steps")
    tools = [line[1] for line in lines]
    for name in ("print_config", "train_net", "demo", "export_model"):
        assert f"tools/{name}.py" in tools
    output = run(checkout, lines)
    results = checkout / "output" / "peaks"
    assert "6 passed" in output
    assert "check passed in a fresh process" in output
    assert (results / "model_final.pth").is_file()
    assert "PeakDetector" in (results / "config.yaml").read_text()
    assert len(list((results / "drawn").glob("*.jpg"))) == 8
    about = json.loads((results / "exported" / "model.json").read_text())
    assert [each["name"] for each in about["outputs"]] == ["boxes", "scores", "classes"]


def test_a_project_that_lies_elsewhere(checkout, tmp_path):
    """The last part of the page: nothing of it is in the copy's own folder."""
    (tmp_path / "papers").mkdir()
    shutil.move(checkout / "projects" / "Peaks", tmp_path / "papers" / "Peaks")
    (line,) = commands("Outside of this repository")
    name, _, value = line[0].partition("=")
    folder = value.replace("$HOME", str(tmp_path))
    output = run(checkout, [line[1:]], **{name: folder})
    assert "_target_: peaks.PeakDetector" in output
