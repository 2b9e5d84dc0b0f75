"""COCO's measures against pycocotools, on real data and on cases that go wrong easily."""

import contextlib
import io
import json
import logging
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2dense.data.coco_format import metadata
from d2dense.errors import UserError
from d2dense.evaluation import COCOEvaluator, build_evaluator
from tests.evaluation.samples import (
    feed,
    make_instances,
    noisy_predictions,
    register,
    result_rows,
    unregister,
)

NAME = "evaluation_test_coco"


@pytest.fixture(autouse=True)
def clean():
    yield
    unregister(NAME)


def mean(values):
    values = values[values > -1]
    return 100 * values.mean() if values.size else math.nan


def reference(json_file, predictions, task, max_dets=100):
    """The same metrics by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        ids = sorted(truth.getCatIds())
        results = result_rows(predictions, ids, task)
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, task)
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]
    metrics = {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
        "APs": mean(precision[..., 1]),
        "APm": mean(precision[..., 2]),
        "APl": mean(precision[..., 3]),
    }
    for t in range(10):
        metrics[f"AP@{0.5 + 0.05 * t:.2f}"] = mean(precision[t, ..., 0])
    for k, id_ in enumerate(ids):
        metrics[f"AP-{truth.cats[id_]['name']}"] = mean(precision[:, :, k, 0])
    return metrics


def agree(json_file, predictions, tasks, **options):
    """Check that the evaluator of ``json_file`` and pycocotools agree; return the metrics."""
    register(NAME, json_file=str(json_file), evaluator_type="coco", **metadata(str(json_file)))
    found = feed(build_evaluator(NAME, **options), predictions)
    assert list(found) == list(tasks)
    for task in tasks:
        expected = reference(json_file, predictions, task, **options)
        assert found[task] == pytest.approx(expected, abs=1e-6, nan_ok=True), task
    return found


@pytest.mark.parametrize(
    ("path", "tasks"),
    [
        ("coco_mini/annotations/instances_train.json", ["bbox", "segm"]),
        ("coco_mini/annotations/instances_val_from_panoptic.json", ["bbox", "segm"]),
        ("nuclei_mini/annotations/instances_val.json", ["bbox", "segm"]),
        ("bccd/annotations_coco/instances_val.json", ["bbox"]),
        ("fruits_nuts/annotations/instances_val.json", ["bbox", "segm"]),
    ],
)
def test_real_data_equals_pycocotools(shared_data, path, tasks):
    json_file = shared_data / path
    predictions = noisy_predictions(json_file, with_masks="segm" in tasks)
    found = agree(json_file, predictions, tasks)
    for task in tasks:
        assert 1 < found[task]["AP"] < 99


# Hard cases


def box_annotation(image, category, box, **changes):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        **changes,
    }


def write_json(path, annotations, *, images=3, size=(60, 80)):
    """Three images with ids 10, 20, 30 and three categories with ids 3, 5, 9."""
    content = {
        "info": {},
        "images": [
            {"id": 10 * (k + 1), "file_name": f"{k}.jpg", "height": size[0], "width": size[1]}
            for k in range(images)
        ],
        "categories": [{"id": i, "name": n} for i, n in ((3, "nut"), (9, "date"), (5, "fig"))],
    }
    if annotations is not None:
        content["annotations"] = [{"id": k + 1, **a} for k, a in enumerate(annotations)]
    path.write_text(json.dumps(content))
    return path


def crowd(image, category, mask):
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts, runs, value = [], 0, 0
    for pixel in mask.reshape(-1, order="F").astype(int).tolist():
        if pixel != value:
            counts.append(runs)
            runs, value = 0, pixel
        runs += 1
    counts.append(runs)
    return box_annotation(
        image,
        category,
        mask_util.toBbox(code).tolist(),
        area=int(mask.sum()),
        iscrowd=1,
        segmentation={"size": list(mask.shape), "counts": counts},
    )


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def crowd_json(tmp_path):
    """A crowd beside and below single objects; an image without annotation; "fig" has no object."""
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 30:78] = True
    mask[20:30, 40:50] = False
    boxes = [(10, 3, (5, 5, 20, 20)), (10, 3, (35, 12, 15, 15)), (20, 9, (2, 2, 60, 50))]
    annotations = [
        box_annotation(image, category, box, segmentation=rectangle(*box))
        for image, category, box in boxes
    ]
    return write_json(tmp_path / "crowd.json", [crowd(10, 3, mask), *annotations])


def random_predictions(seed, count, *, size=(60, 80), images=(10, 20, 30), classes=(0, 1, 2)):
    rng = np.random.default_rng(seed)
    predictions = {}
    for image in images:
        corner = rng.uniform(0, 0.6, (count, 2)) * (size[1], size[0])
        boxes = np.concatenate([corner, corner + rng.uniform(3, 24, (count, 2))], axis=1).round()
        masks = np.zeros((count, *size), dtype=bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
            mask[y0:y1, x0:x1] = True
        scores = rng.random(count).round(2)
        predictions[image] = make_instances(size, boxes, scores, rng.choice(classes, count), masks)
    return predictions


def test_crowds_equal_pycocotools(crowd_json):
    predictions = noisy_predictions(crowd_json, with_masks=True, seed=2, repeats=6, wrong=12)
    found = agree(crowd_json, predictions, ["bbox", "segm"])
    assert 0 < found["bbox"]["AP"] < 100
    assert math.isnan(found["bbox"]["AP-fig"])
    agree(crowd_json, random_predictions(1, 60), ["bbox", "segm"])


@pytest.mark.parametrize("max_dets", [100, 10])
def test_more_detections_than_count(tmp_path, max_dets):
    rng, annotations = np.random.default_rng(0), []
    for image in (10, 20, 30):
        for _ in range(130):
            box = [*rng.uniform(0, 40, 2).round(1), *rng.uniform(6, 20, 2).round(1)]
            annotations.append(
                box_annotation(image, int(rng.choice([3, 9])), box, segmentation=rectangle(*box))
            )
    json_file = write_json(tmp_path / "many.json", annotations)
    predictions = noisy_predictions(json_file, with_masks=True, repeats=3, wrong=40)
    assert min(len(found) for found in predictions.values()) > 250
    options = {} if max_dets == 100 else {"max_dets": max_dets}
    found = agree(json_file, predictions, ["bbox", "segm"], **options)
    assert found["bbox"]["AP"] > 0
    every = feed(COCOEvaluator(NAME, max_dets=1000), predictions)
    assert every["bbox"]["AP"] > found["bbox"]["AP"]


def test_empty_predictions(crowd_json):
    empty = make_instances((60, 80), masks=np.zeros((0, 60, 80)))
    found = agree(crowd_json, {10: empty, 20: empty, 30: empty}, ["bbox", "segm"])
    assert found["bbox"]["AP"] == found["segm"]["AP"] == 0
    some = random_predictions(3, 20)
    some[20] = empty
    agree(crowd_json, some, ["bbox", "segm"])


def test_no_ground_truth_at_all(tmp_path):
    json_file = write_json(tmp_path / "none.json", [])
    register(NAME, json_file=str(json_file))
    found = feed(COCOEvaluator(NAME), random_predictions(0, 5))
    assert list(found) == ["bbox"]
    assert all(math.isnan(value) for value in found["bbox"].values())
    found = feed(COCOEvaluator(NAME, tasks=["bbox", "segm"]), random_predictions(0, 5))
    assert math.isnan(found["segm"]["AP"])
    # a test set whose annotations are secret
    register(NAME, json_file=str(write_json(tmp_path / "test.json", None)))
    assert feed(COCOEvaluator(NAME), random_predictions(0, 5)) == {}


def test_objects_without_mask_are_left_out_of_masks(crowd_json):
    raw = json.loads(crowd_json.read_text())
    extra = box_annotation(20, 3, (60, 40, 15, 15), segmentation=[], id=99)
    crowd_json.write_text(json.dumps({**raw, "annotations": [*raw["annotations"], extra]}))
    register(NAME, json_file=str(crowd_json), **metadata(str(crowd_json)))
    predictions = noisy_predictions(
        write_json(crowd_json.with_name("rest.json"), raw["annotations"]), with_masks=True
    )
    with_extra = feed(COCOEvaluator(NAME), predictions)
    crowd_json.write_text(json.dumps(raw))
    without = feed(COCOEvaluator(NAME), predictions)
    assert with_extra["segm"]["AP"] == pytest.approx(without["segm"]["AP"])
    assert with_extra["bbox"]["AP"] < without["bbox"]["AP"]


# What this library adds


def test_changed_annotations_under_the_same_name_are_seen(crowd_json):
    predictions = noisy_predictions(crowd_json, with_masks=True, seed=5)
    before = agree(crowd_json, predictions, ["bbox", "segm"])
    evaluator = COCOEvaluator(NAME)
    feed(evaluator, predictions)
    raw = json.loads(crowd_json.read_text())
    for annotation in raw["annotations"]:
        if annotation["image_id"] == 20:
            annotation["bbox"] = [1, 1, 8, 8]
    crowd_json.write_text(json.dumps(raw))
    after = feed(evaluator, predictions)
    assert after["bbox"]["AP"] != before["bbox"]["AP"]
    expected = reference(crowd_json, predictions, "bbox")
    assert after["bbox"] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_unpredicted_images_count(crowd_json, caplog):
    predictions = noisy_predictions(crowd_json, with_masks=True, repeats=1, wrong=0, seed=1)
    some = {20: predictions[20]}
    with caplog.at_level(logging.WARNING):
        found = agree(crowd_json, some, ["bbox", "segm"])
    assert "2 of 3 images were not predicted" in caplog.text
    assert found["bbox"]["AP-nut"] == 0
    assert feed(COCOEvaluator(NAME), {})["bbox"]["AP"] == 0


def test_an_image_seen_twice_counts_once(crowd_json):
    predictions = noisy_predictions(crowd_json, with_masks=True, seed=2, repeats=3)
    once = agree(crowd_json, predictions, ["bbox", "segm"])
    assert 0 < once["bbox"]["AP"] < 100
    evaluator = COCOEvaluator(NAME)
    images = [{"image_id": k} for k in (10, 20, 10, 30, 20)]
    evaluator.process(images, [{"instances": predictions[i["image_id"]]} for i in images])
    for task, metrics in evaluator.evaluate().items():
        assert metrics == pytest.approx(once[task], nan_ok=True)


def test_dicts_without_json_equal_the_json(crowd_json):
    raw = json.loads(crowd_json.read_text())
    order = {3: 0, 5: 1, 9: 2}
    dicts = [
        {
            "file_name": image["file_name"],
            "image_id": image["id"],
            "height": 60,
            "width": 80,
            "annotations": [
                {
                    "bbox": a["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": order[a["category_id"]],
                    "iscrowd": a["iscrowd"],
                    "segmentation": a["segmentation"],
                }
                for a in raw["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in raw["images"]
    ]
    predictions = noisy_predictions(crowd_json, with_masks=True, seed=2, repeats=6, wrong=12)
    expected = agree(crowd_json, predictions, ["bbox", "segm"])
    register(NAME, dicts, thing_classes=["nut", "fig", "date"])
    found = feed(COCOEvaluator(NAME), predictions)
    for task in ("bbox", "segm"):
        assert found[task]["AP"] == pytest.approx(expected[task]["AP"], abs=1e-6)


def test_results_file_holds_the_data_sets_own_ids(crowd_json, tmp_path):
    predictions = noisy_predictions(crowd_json, with_masks=True, seed=2, repeats=3)
    predictions[30] = random_predictions(0, 12)[30]
    before = sorted(tmp_path.iterdir())
    expected = agree(crowd_json, predictions, ["bbox", "segm"])
    assert expected["bbox"]["AP"] > 0
    assert sorted(tmp_path.iterdir()) == before  # nothing without an output folder
    feed(COCOEvaluator(NAME, output_dir=str(tmp_path / "out")), predictions)
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} == {3, 5, 9}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(crowd_json))
        for task in ("bbox", "segm"):
            # a results file with boxes and masks gives objects the size of their boxes
            kept = [{k: v for k, v in r.items() if task == "bbox" or k != "bbox"} for r in results]
            evaluation = COCOeval(truth, truth.loadRes(kept), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert 100 * evaluation.stats[0] == pytest.approx(expected[task]["AP"], abs=1e-6)


def test_options(crowd_json):
    predictions = random_predictions(11, 12)
    agree(crowd_json, predictions, ["bbox", "segm"])
    found = feed(COCOEvaluator(NAME, tasks=["segm"], per_class=False), predictions)
    assert list(found) == ["segm"]
    assert not any(key.startswith("AP-") for key in found["segm"])
    other = COCOEvaluator(NAME, prediction_key="stage1", task_suffix="_stage1")
    assert list(feed(other, predictions, "stage1")) == ["bbox_stage1", "segm_stage1"]


def test_users_mistakes(crowd_json, tmp_path):
    predictions = random_predictions(13, 4)
    register(NAME, json_file=str(crowd_json), **metadata(str(crowd_json)))
    evaluator = COCOEvaluator(NAME)
    wrong = make_instances((60, 80), [[0, 0, 9, 9]], [0.5], [3])
    with pytest.raises(UserError, match=r"class 3, but .* 3 classes .*set the model's"):
        evaluator.process([{"image_id": 10}], [{"instances": wrong}])
    with pytest.raises(UserError, match="image 11 was predicted but is not in"):
        feed(evaluator, {11: predictions[10]})
    with pytest.raises(UserError, match="needs 'instances'"):
        evaluator.process([{"image_id": 10}], [{"sem_seg": torch.zeros(2, 3, 3)}])
    with pytest.raises(UserError, match="neither image_id nor file_name"):
        evaluator.process([{"image": None}], [{"instances": predictions[10]}])
    boxes_only = {10: make_instances((60, 80), [[0, 0, 9, 9]], [0.5], [1])}
    with pytest.raises(UserError, match="the model predicts no masks"):
        feed(COCOEvaluator(NAME, tasks=["segm"]), boxes_only)
    with pytest.raises(UserError, match="use some of"):
        COCOEvaluator(NAME, tasks=["keypoints"])
    with pytest.raises(UserError, match="at least one detection"):
        COCOEvaluator(NAME, max_dets=0)
    no_masks = write_json(tmp_path / "boxes.json", [box_annotation(10, 3, (1, 1, 9, 9))])
    register(NAME, json_file=str(no_masks))
    assert list(feed(COCOEvaluator(NAME), predictions)) == ["bbox"]
    with pytest.raises(UserError, match="has boxes but no masks"):
        feed(COCOEvaluator(NAME, tasks=["segm"]), predictions)
    register(NAME, json_file=str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="does not exist"):
        COCOEvaluator(NAME)
    (tmp_path / "broken.json").write_text("{")
    register(NAME, json_file=str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match="not valid json"):
        feed(COCOEvaluator(NAME), predictions)


SPOILED = {
    "an entry of text": (lambda c: c["annotations"].append("x"), "no object"),
    "annotations of text": (lambda c: c.update(annotations="x"), "not a list"),
    "no image id": (lambda c: c["images"][0].pop("id"), "no 'id'"),
    "an entry without its image": (lambda c: c["annotations"][0].pop("image_id"), "no object"),
    "a box of texts": (lambda c: c["annotations"][0].update(bbox=["1"] * 4), "four finite"),
    "no area": (lambda c: c["annotations"][0].update(area=float("nan")), "area nan"),
    "a far polygon": (
        lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1e9, 0, 5, 5]]),
        "beyond any picture",
    ),
    "a mask of lies": (
        lambda c: c["annotations"][0].update(segmentation={"size": [60, 80], "counts": "000"}),
        "of 0 pixels",
    ),
    "a category without a name": (lambda c: c["categories"][0].pop("name"), "'name'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_contradicts_itself_is_one_line(crowd_json, tmp_path, case):
    """Native code is never given numbers that are none, or that ask for gigabytes."""
    change, reason = SPOILED[case]
    given = metadata(str(crowd_json))
    content = json.loads(crowd_json.read_text())
    change(content)
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps(content))
    register(NAME, json_file=str(path), **given)
    with pytest.raises(UserError, match=reason):
        feed(COCOEvaluator(NAME), random_predictions(13, 4))


def test_masks_need_the_size_of_their_images(crowd_json, tmp_path):
    given = metadata(str(crowd_json))
    content = json.loads(crowd_json.read_text())
    for image in content["images"]:
        del image["height"]
    path = tmp_path / "without.json"
    path.write_text(json.dumps(content))
    register(NAME, json_file=str(path), **given)
    predictions = random_predictions(13, 4)
    assert "bbox" in feed(COCOEvaluator(NAME, tasks=["bbox"]), predictions)
    with pytest.raises(UserError, match="no height and width"):
        feed(COCOEvaluator(NAME, tasks=["segm"]), predictions)
