"""Detection quality score: worked examples."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from d2dense.analyses import quality
from d2dense.analyses.quality import Detections, Objects
from d2dense.errors import UserError


def objects(*rows):
    """From (class, x0, y0, x1, y1)."""
    boxes = np.array([row[1:] for row in rows], dtype=float).reshape(-1, 4)
    return Objects(boxes, np.array([row[0] for row in rows], dtype=np.int64))


def found(*rows):
    """From (class, score, x0, y0, x1, y1)."""
    boxes = np.array([row[2:] for row in rows], dtype=float).reshape(-1, 4)
    scores = np.array([row[1] for row in rows], dtype=float)
    return Detections(boxes, scores, np.array([row[0] for row in rows], dtype=np.int64))


def record(number, *rows, crowds=()):
    annotations = [
        {"bbox": row[1:], "bbox_mode": BoxMode.XYXY_ABS, "category_id": row[0], "iscrowd": crowd}
        for crowd, group in ((0, rows), (1, crowds))
        for row in group
    ]
    return {"image_id": number, "file_name": f"{number}.jpg", "annotations": annotations}


TWO = [(0, 0, 0, 10, 10), (1, 20, 20, 40, 40)]
FOUR = found(
    (0, 0.9, 0, 0, 10, 5),  # IoU 0.5 with the first object
    (0, 0.4, 0, 0, 10, 8),  # IoU 0.8: the largest, though less confident
    (1, 1.0, 100, 100, 120, 120),  # nothing there
    (0, 0.6, 20, 20, 40, 40),  # IoU 1 with the second object, whose class is another
)


def test_worked_example():
    same = quality.object_qualities(objects(*TWO), FOUR)
    assert same.detection.tolist() == [1, -1]
    assert same.iou.tolist() == pytest.approx([0.8, 0.0])
    assert same.score.tolist() == pytest.approx([0.4, 0.0])
    assert same.image_score == pytest.approx((0.8 * 0.4 + 0) / 2)
    every = quality.object_qualities(objects(*TWO), FOUR, any_class=True)
    assert every.detection.tolist() == [1, 3]
    assert every.image_score == pytest.approx((0.8 * 0.4 + 1.0 * 0.6) / 2)


def test_of_equal_overlaps_the_most_confident_counts():
    twins = found((0, 0.3, 0, 0, 10, 8), (0, 0.7, 0, 0, 10, 8), (0, 0.5, 0, 2, 10, 10))
    result = quality.object_qualities(objects(TWO[0]), twins)
    assert result.detection.tolist() == [1]
    assert result.image_score == pytest.approx(0.8 * 0.7)


def test_one_detection_may_serve_several_objects():
    twice = objects(TWO[0], TWO[0])
    assert quality.object_qualities(twice, FOUR).detection.tolist() == [1, 1]


def test_nothing_found_and_nothing_there():
    assert quality.object_qualities(objects(*TWO), Detections.none()).image_score == 0
    assert math.isnan(quality.object_qualities(objects(), FOUR).image_score)
    touching = quality.object_qualities(objects(TWO[0]), found((0, 1.0, 10, 0, 20, 10)))
    assert touching.detection.tolist() == [-1]
    assert touching.image_score == 0
    point = quality.object_qualities(objects((0, 5, 5, 5, 5)), found((0, 1.0, 5, 5, 5, 5)))
    assert point.image_score == 0


def test_ranking():
    """Differences: image 1 -0.5, image 2 0.2, image 3 no objects, image 4 0.2, image 5 0."""
    box = (0, 0, 0, 10, 10)
    images = [
        record(1, box), record(2, box), record(3, crowds=[box]), record(4, box), record(5, box),
    ]  # fmt: skip
    model = {k: found((0, s, 0, 0, 10, 10)) for k, s in {1: 0.25, 2: 0.7, 4: 0.9}.items()}
    baseline = {k: found((0, s, 0, 0, 10, 10)) for k, s in {1: 0.75, 2: 0.5, 4: 0.7}.items()}
    ranked = quality.compare(images, model, baseline)
    assert [each.record["image_id"] for each in ranked] == [2, 4, 5, 1]
    assert [each.rank for each in ranked] == [1, 2, 3, 4]
    assert [each.difference for each in ranked] == pytest.approx([0.2, 0.2, 0.0, -0.5])
    assert ranked[-1].model == pytest.approx(0.25)


def test_equal_differences_keep_their_order():
    images = [record(k, TWO[0]) for k in (7, 3, 5)]
    ranked = quality.compare(images, {}, {})
    assert [each.record["image_id"] for each in ranked] == [7, 3, 5]


def test_crowds_are_no_objects():
    kept = Objects.of(record(1, TWO[1], crowds=[TWO[0]]))
    assert kept.classes.tolist() == [1]
    assert kept.boxes.tolist() == [[20, 20, 40, 40]]


class Fixed(nn.Module):
    """Predict one box per image, at its number."""

    def forward(self, batch):
        outputs = []
        for image in batch:
            result = Instances((64, 64))
            result.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, image["image_id"], 4.0]]))
            result.scores = torch.tensor([0.5])
            result.pred_classes = torch.tensor([1])
            outputs.append({"instances": result})
        return outputs


def test_detections_of_a_model():
    model = Fixed().train()
    all_found = quality.detect(model, [[{"image_id": 1}, {"image_id": 2}], [{"image_id": 3}]])
    assert model.training
    assert {k: d.boxes.tolist() for k, d in all_found.items()} == {
        k: [[0, 0, k, 4]] for k in (1, 2, 3)
    }
    assert all_found[1].classes.tolist() == [1]
    with pytest.raises(UserError, match="predicts sem_seg"):
        quality.detect(lambda_model({"sem_seg": 0}), [[{"image_id": 1}]])


def lambda_model(output):
    model = nn.Module()
    model.forward = lambda batch: [output for _ in batch]
    return model


@pytest.fixture
def dataset():
    name = "analyses_quality_test"
    DatasetCatalog.register(name, list)
    metadata = MetadataCatalog.get(name)
    metadata.set(thing_classes=["a", "b"], thing_dataset_id_to_contiguous_id={3: 0, 9: 1})
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def prediction(**changes):
    return {"image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5} | changes


@pytest.mark.parametrize("wrap", [list, lambda rows: {"annotations": rows}])
def test_predictions_from_a_file(dataset, tmp_path, wrap):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(wrap([prediction(), prediction(category_id=3, score=1)])))
    (image,) = quality.read_predictions(path, dataset, [5, 6]).items()
    assert image[0] == 5
    assert image[1].boxes.tolist() == [[1, 2, 4, 6]] * 2
    assert image[1].scores.tolist() == [0.5, 1.0]
    assert image[1].classes.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([prediction(image_id=7)], "prediction 0 is of image 7, which is not in"),
        ([prediction(), prediction(category_id=1)], "prediction 1 is of category 1"),
        ([{"image_id": 5}], "expected image_id, category_id, bbox and score"),
        ([prediction(bbox=[1, 2, 3])], "expected finite x, y, w, h"),
        ([prediction(score=math.nan)], "expected finite x, y, w, h"),
        ([prediction(image_id=[5])], "expected image_id"),
        ({"images": []}, "no list in COCO's results format"),
    ],
)
def test_wrong_predictions_are_named(dataset, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        quality.read_predictions(path, dataset, [5])


def test_no_predictions(dataset, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        quality.read_predictions(tmp_path / "none.json", dataset, [])
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match="are not JSON"):
        quality.read_predictions(tmp_path / "text.json", dataset, [])
