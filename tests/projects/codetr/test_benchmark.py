"""The floor that inference is compared with, the shares of time, and the whole command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from d2dense import costs, matmul_floor, stopwatch
from d2dense.matmul_floor import Product
from tests.projects.codetr import tiny

TOOL = Path(__file__).resolve().parents[3] / "projects" / "CoDETR" / "tools" / "benchmark.py"


def test_products_of_a_convolution_a_linear_layer_and_a_batch():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    linear = nn.Linear(5, 7)

    def call():
        conv(torch.ones(3, 6, 10, 12))
        linear(torch.ones(4, 5))
        linear(torch.ones(2, 2, 5))
        torch.ones(2, 3, 4) @ torch.ones(2, 4, 9)

    assert matmul_floor.collect_products(call) == {
        Product(2, 3 * 5 * 6, 27, 4): 1,
        Product(1, 4, 5, 7): 2,
        Product(2, 3, 4, 9): 1,
    }


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_detectors_products_are_its_macs(kind):
    model = tiny.detector(kind).eval()
    images = tiny.inputs(sizes=((64, 96),), counts=(1,))
    with torch.no_grad():
        products = matmul_floor.collect_products(lambda: model(images))
        expected = costs.count_macs(model, images)[""]
    assert matmul_floor.macs(products) == pytest.approx(expected, rel=0.01)


def test_the_floor_multiplies_every_shape_as_often_as_it_occurs():
    products = {Product(1, 4, 5, 7): 3, Product(2, 3, 4, 9): 2}
    assert matmul_floor.collect_products(matmul_floor.floor(products)) == products


def test_a_part_within_another_one_does_not_count_for_that(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0, 10.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = stopwatch.Stopwatch()
    with watch.part("all"):
        watch.timed(lambda: None, "first")()
        watch.timed(lambda: None, "second")()
    assert dict(watch.seconds) == {"all": 7.5, "first": 2.0, "second": 0.5}
    assert watch.shares() == {"all": 0.75, "first": 0.2, "second": 0.05}


def test_the_command_writes_its_tables(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("codetr_benchmark", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "MODELS", {"Co-DINO": "CoDETR/co_dino_tiny_shapes"})
    command = ["--size", "64", "64", "--rounds", "1", "--models", "Co-DINO", "--device", "cpu"]
    tool.main([*command, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "codetr_cpu.json").read_text())["rows"]
    none, two, floor = rows["Inference"]
    assert none["GMAC"] == two["GMAC"] == floor["GMAC"] > 0
    counts = [row["GMAC"] for row in rows["Training"]]
    assert counts == sorted(counts)
    assert counts[0] > 2.5 * none["GMAC"]
    for mode in ("inference %", "training %"):
        shares = {row["part"]: row.get(mode, 0.0) for row in rows["Shares of the time"]}
        assert sum(shares.values()) == pytest.approx(100)
        assert all(shares[part] > 0 for part in ("backbone", "encoder", "decoder"))
    assert min(shares["auxiliary heads"], shares["matcher"]) > 0
    assert rows["Full size on a GPU"][0]["state"] == "not measured"
    assert "Co-DETR's time" in (tmp_path / "codetr_cpu.md").read_text()
