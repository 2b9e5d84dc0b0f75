"""The benchmark of reading data measures what it says, and its command writes a report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2dense.data import datasets, mappers, speed_benchmark
from tools import benchmark_data


@pytest.fixture
def records(tiny):
    datasets.register("here", datasets.DatasetSpec(json=tiny.json, images=tiny.images))
    return datasets.load("here")


def test_shares_name_the_step_that_is_slow(records, monkeypatch):
    read = mappers.read_image
    monkeypatch.setattr(mappers, "read_image", lambda *a: time.sleep(0.05) or read(*a))
    found = speed_benchmark.shares(records, "default", images=8)
    assert max(found, key=found.get) == "decode" or found["decode"] > 50
    assert {"record", "ResizeShortestEdge", "RandomFlip", "masks", "transfer"} <= found.keys()
    assert all(milliseconds >= 0 for milliseconds in found.values())
    assert mappers.read_image(dict(records[0]), "BGR").ndim == 3  # the clocks are gone


def test_throughput_of_workers(records):
    found = speed_benchmark.throughput(records, "lsj", workers=(0, 1), images=4, rounds=1)
    assert found.keys() == {0, 1}
    assert all(speed > 0 for speed in found.values())


def test_the_command_writes_its_tables(tiny, tmp_path, capsys):
    labels = tmp_path / "maps"
    labels.mkdir()
    for path in Path(tiny.images).iterdir():
        width, height = Image.open(path).size
        Image.fromarray(np.zeros((height, width), np.uint8)).save(labels / path.name)
    files = ["--json", tiny.json, "--pictures", tiny.images, "--labels", str(labels)]
    sizes = ["--samples", "4", "--workers", "0", "--output", str(tmp_path / "report")]
    assert benchmark_data.main(["--parts", "speed", *files, *sizes]) == 0
    assert "## Where the time goes" in capsys.readouterr().out
    tables = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["recipe"] for row in tables["Images per second"]] == list(speed_benchmark.RECIPES)
    assert [row["recipe"] for row in tables["Copy-paste"]] == list(speed_benchmark.PASTES)
    steps = [(row["recipe"], row["step"]) for row in tables["Where the time goes"]]
    assert all((recipe, "copy-paste") in steps for recipe in speed_benchmark.PASTES)
    assert ("lsj", "copy-paste") not in steps
    shares = {}
    for row in tables["Where the time goes"]:
        shares[row["recipe"]] = shares.get(row["recipe"], 0) + row["share"]
    assert shares == pytest.approx(dict.fromkeys(speed_benchmark.RECIPES, 1.0))


@pytest.mark.long
def test_the_command_measures_memory(tmp_path):
    sizes = ["--images", "3000", "--boxes", "9000", "--batches", "20"]
    output = ["--parts", "memory", "--output", str(tmp_path / "report")]
    assert benchmark_data.main([*output, *sizes]) == 0
    ((_, rows),) = json.loads((tmp_path / "report.json").read_text())["rows"].items()
    assert [row["parsed"] for row in rows] == [1, 1, 1, 1]
    assert rows[0]["per worker"] < 60 < rows[2]["per worker"]
