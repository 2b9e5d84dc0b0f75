"""LVIS's measures against the lvis package's own accumulation."""

import json
import logging
import math

import numpy as np
import pytest

from d2dense.data.coco_format import metadata
from d2dense.errors import UserError
from d2dense.evaluation import LVISEvaluator, build_evaluator
from d2dense.evaluation.lvis import lvis_precision
from tests.evaluation.samples import (
    feed,
    make_instances,
    noisy_predictions,
    register,
    result_rows,
    unregister,
)

lvis = pytest.importorskip("lvis")

NAME = "evaluation_test_lvis"


@pytest.fixture(autouse=True)
def clean(monkeypatch, caplog):
    # the package uses a name that numpy removed
    monkeypatch.setattr(np, "float", float, raising=False)
    caplog.set_level(logging.ERROR, logger="lvis")
    yield
    unregister(NAME)


def reference(json_file, predictions, task, max_dets=300):
    """The package's results, -1 for undefined, and the precision of each category with objects."""
    truth = lvis.LVIS(str(json_file))
    ids = sorted(truth.get_cat_ids())
    rows = result_rows(predictions, ids, task)
    results = lvis.LVISResults(truth, rows, max_dets=max_dets)
    evaluation = lvis.LVISEval(truth, results, task)
    evaluation.params.max_dets = max_dets
    evaluation.run()
    precision = evaluation.eval["precision"][..., 0]
    per_class = {}
    for k, id_ in enumerate(ids):
        values = precision[:, :, k]
        if (values > -1).any():
            per_class[f"AP-{truth.cats[id_]['name']}"] = 100 * values[values > -1].mean()
    return evaluation.get_results(), per_class


def agree(json_file, predictions, tasks, **options):
    register(NAME, json_file=str(json_file), evaluator_type="lvis", **metadata(str(json_file)))
    evaluator = LVISEvaluator(NAME, **options) if options else build_evaluator(NAME)
    assert type(evaluator) is LVISEvaluator
    found = feed(evaluator, predictions)
    assert list(found) == list(tasks)
    for task, metrics in found.items():
        expected, per_class = reference(json_file, predictions, task, **options)
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
            value = expected[name] * 100 if expected[name] >= 0 else math.nan
            assert metrics[name] == pytest.approx(value, abs=1e-6, nan_ok=True), (task, name)
        assert {k: v for k, v in metrics.items() if k.startswith("AP-")} == pytest.approx(per_class)
        assert 1 < metrics["AP"] < 99
    return found


@pytest.fixture
def excerpt(shared_data):
    return shared_data / "lvis_mini/annotations/lvis_v0.5_val_mini.json"


def test_boxes_and_masks_equal_the_package(excerpt):
    predictions = noisy_predictions(excerpt, with_masks=True)
    found = agree(excerpt, predictions, ["bbox", "segm"])
    assert found["segm"]["AP@0.50"] == found["segm"]["AP50"]


def test_more_images_equal_the_package(shared_data):
    json_file = shared_data / "lvis_mini/annotations/lvis_v0.5_val_annotations_only.json"
    agree(json_file, noisy_predictions(json_file, with_masks=False), ["bbox"])


def test_only_the_highest_scores_of_an_image_count(excerpt):
    predictions = noisy_predictions(excerpt, with_masks=False, repeats=30)
    assert max(len(found) for found in predictions.values()) > 300
    all_count = agree(excerpt, predictions, ["bbox"])
    few_count = agree(excerpt, predictions, ["bbox"], max_dets=40)
    assert few_count["bbox"]["AP"] != all_count["bbox"]["AP"]


def test_empty_predictions(excerpt):
    register(NAME, json_file=str(excerpt), **metadata(str(excerpt)))
    empty = {527220: make_instances((169, 500), masks=np.zeros((0, 169, 500)))}
    for predictions in (empty, {}):
        assert feed(LVISEvaluator(NAME), predictions)["bbox"]["AP"] == 0


def test_users_mistakes(excerpt, tmp_path):
    register(NAME, thing_classes=["a"])
    with pytest.raises(UserError, match="needs one"):
        LVISEvaluator(NAME)
    coco_file = tmp_path / "coco.json"
    coco_file.write_text(
        '{"images": [{"id": 1, "height": 9, "width": 9}], "categories": [{"id": 1, "name": "a"}],'
        '"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5],'
        '"area": 25, "segmentation": [[0, 0, 5, 0, 5, 5]]}]}'
    )
    register(NAME, json_file=str(coco_file))
    box = make_instances((9, 9), [[0, 0, 5, 5]], [0.5], [0])
    with pytest.raises(UserError, match="no frequency r, c or f"):
        feed(LVISEvaluator(NAME), {1: box})
    register(NAME, json_file=str(excerpt), **metadata(str(excerpt)))
    with pytest.raises(UserError, match="image 1 was predicted but is not in"):
        feed(LVISEvaluator(NAME), {1: box})


def test_an_object_without_area_has_that_of_its_box(tmp_path):
    """Hand-made files lack it; a size group of 10 x 20 pixels is small either way."""
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 50}],
        "categories": [{"id": 1, "name": "a", "frequency": "f"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 20]}],
    }
    results = []
    for area in ({}, {"area": 200}):
        content["annotations"][0] |= area
        (tmp_path / "lvis.json").write_text(json.dumps(content))
        found = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [5, 5, 10, 20]}
        results.append(lvis_precision(tmp_path / "lvis.json", [found], task="bbox", max_dets=300))
    np.testing.assert_array_equal(*results)
    assert results[0][..., 0].min() == pytest.approx(1.0)


@pytest.mark.parametrize("ids", [(None, 1), (1, 1)])
def test_objects_need_ids_of_their_own(tmp_path, ids):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 50, "width": 50}],
        "categories": [{"id": 1, "name": "a", "frequency": "f"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 20], **({"id": i} if i else {})}
            for i in ids
        ],
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    register(NAME, json_file=str(path), image_root="", evaluator_type="lvis", **metadata(path))
    evaluator = LVISEvaluator(NAME, tasks=("bbox",))
    evaluator.reset()
    with pytest.raises(UserError, match="number the annotations"):
        evaluator.evaluate()
