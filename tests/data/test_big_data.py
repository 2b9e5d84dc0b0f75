"""A large annotation file is parsed once, and workers and ranks cost little more."""

from __future__ import annotations

import json

import pytest

from d2dense.data import coco_format
from d2dense.data.memory_benchmark import Case, measure, per_worker, write_annotations

LIMIT_MIB = 60


@pytest.fixture(scope="module")
def json_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("big") / "big.json"
    write_annotations(path, images=20_000, boxes=140_000)
    return str(path)


def test_the_file_is_as_large_as_asked_and_repeatable(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        write_annotations(path, images=120, boxes=500, seed=3)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    content = json.loads(paths[0].read_text())
    assert len(content["images"]) == 120
    assert len(content["annotations"]) == 500
    order = [annotation["image_id"] for annotation in content["annotations"]]
    assert order != sorted(order)


@pytest.mark.parametrize("block", [1, 5, 12, 13, 10_000])
def test_categories_are_found_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(coco_format, "_BLOCK", block)
    path = tmp_path / "a.json"
    names = [{"id": 3, "name": "x"}]
    path.write_text(json.dumps({"images": [], "categories": names, "annotations": []}))
    assert coco_format._scan_categories(path) == names
    path.write_text(json.dumps({"info": {"categories": []}, "images": [], "categories": names}))
    assert coco_format._scan_categories(path) is None


def _check(json_file: str, batches: int) -> None:
    reports = measure(json_file, Case(ranks=2, workers=1), batches=batches)
    assert [len(report["workers"]) for report in reports] == [1, 1]
    assert per_worker(reports) < LIMIT_MIB
    assert [report["parsed"] for report in reports] == [1, 0]
    for report in reports:
        # the records are in the shared file: a rank holds little more than numbers per image
        growth = report["alone"]["uss"] - report["before"]["uss"]
        assert growth < 10 + 100 * report["records"] / 2**20
        assert growth < report["records_mib"]


def test_memory_per_worker_and_rank(json_file):
    _check(json_file, batches=200)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_per_worker_and_rank_of_a_million_images(tmp_path):
    path = tmp_path / "big.json"
    write_annotations(path, images=1_000_000, boxes=7_000_000)
    _check(str(path), batches=1000)
