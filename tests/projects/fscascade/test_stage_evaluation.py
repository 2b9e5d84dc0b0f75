"""Evaluation of all stages in one pass against evaluating one mode after another."""

import csv
import json

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2dense import config
from d2dense.data import shapes
from d2dense.data.augmentations import default
from d2dense.data.coco_format import load_coco
from d2dense.data.loaders import build_test_loader
from d2dense.data.mappers import DetectionMapper
from d2dense.errors import UserError
from d2dense.evaluation import COCOEvaluator, evaluate
from d2dense.evaluation.ground_truth import load_ground_truth
from d2dense.modeling import FlexibleCascadeROIHeads, RegionPredictor
from fscascade.stage_evaluation import AllStages, ScoresByIoU, evaluate_stages

NAME = "fscascade_stage_test"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six generated scenes, registered."""
    root = tmp_path_factory.mktemp("shapes")
    shapes.generate(output_dir=root, split="val", count=6, size=128, seed=1)
    json_file, images = str(root / "annotations/instances_val.json"), str(root / "images/val")
    DatasetCatalog.register(NAME, lambda: load_coco(json_file, images))
    MetadataCatalog.get(NAME).set(
        json_file=json_file, thing_classes=list(shapes.CLASSES), evaluator_type="coco"
    )
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def loader(name):
    mapper = DetectionMapper(
        is_train=False, augmentations=default(is_train=False, min_size=128, max_size=128)
    )
    return build_test_loader(
        dataset=DatasetCatalog.get(name), mapper=mapper, batch_size=2, num_workers=0
    )


def test_one_pass_equals_one_evaluation_per_mode(dataset, tiny_model, tmp_path):
    results = evaluate_stages(tiny_model, loader(dataset), dataset, output_dir=tmp_path)
    assert list(results) == [
        "stage1", "stage2", "stage3", "ensemble_last_rois", "ensemble_own_rois",
    ]  # fmt: skip
    for mode, tasks in results.items():
        tiny_model.roi_heads.set_test_scores(mode)
        one = COCOEvaluator(dataset, output_dir=str(tmp_path / "one"))
        alone = evaluate(tiny_model, {"one": loader(dataset)}, {"one": one})["one"]
        assert tasks["bbox"] == pytest.approx(alone["bbox"], abs=1e-6, nan_ok=True)
        found = json.loads((tmp_path / f"coco_{mode}_results.json").read_text())
        expected = json.loads((tmp_path / "one" / "coco_instances_results.json").read_text())
        assert len(found) == len(expected) > 100
        for x, y in zip(found, expected):
            assert x["score"] == pytest.approx(y["score"], abs=1e-5)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved.keys() == results.keys()
    assert {f"AP@{0.5 + 0.05 * k:.2f}" for k in range(10)} <= saved["stage1"]["bbox"].keys()
    with (tmp_path / "confidence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(0.5 <= float(row["iou"]) <= 1 for row in rows)


def test_outputs_are_scaled_to_the_original_image(tiny_model):
    image = torch.rand(3, 64, 96) * 255
    wrapped = AllStages(tiny_model).eval()
    small = wrapped([{"image": image, "height": 64, "width": 96}])[0]
    large = wrapped([{"image": image, "height": 128, "width": 192}])[0]
    for name in wrapped.names:
        assert large[name].image_size == (128, 192)
        twice = small[name].pred_boxes.tensor * 2
        torch.testing.assert_close(large[name].pred_boxes.tensor, twice, rtol=1e-4, atol=1e-2)


def test_scores_by_iou_take_the_best_box_of_the_same_class(dataset):
    truth = load_ground_truth(dataset)
    annotation = next(a for a in truth.annotations if min(a["bbox"][2:]) > 12)
    image_id = next(k for k, v in truth.image_ids.items() if v == annotation["image_id"])
    x, y, w, h = annotation["bbox"]
    boxes = [[x, y, x + w, y + h], [x, y, x + w, y + 0.6 * h], [x, y, x + w, y + 0.3 * h]]
    found = Instances((128, 128))
    found.pred_boxes = Boxes(torch.tensor([*boxes, boxes[0]]))
    found.scores = torch.tensor([0.9, 0.6, 0.3, 0.8])
    right = annotation["category_id"] - 1
    absent = next(
        c
        for c in range(len(truth.class_names))
        if all(
            a["category_id"] != c + 1
            for a in truth.annotations
            if a["image_id"] == annotation["image_id"]
        )
    )
    found.pred_classes = torch.tensor([right, right, right, absent])
    collector = ScoresByIoU(truth, prediction_key="stage3")
    collector.process([{"image_id": image_id}], [{"stage3": found}])
    ious, scores = zip(*sorted(collector.pairs, reverse=True)[:2])
    assert scores == pytest.approx((0.9, 0.6))
    assert ious == pytest.approx((1.0, 0.6), abs=1e-4)
    assert all(score not in (0.3, 0.8) for _, score in collector.pairs)


def flexible_twin():
    """The small plain cascade, and the same with the library's other cascade heads."""
    node = config.load("FSCascade/cascade_rcnn_tiny_shapes").model
    plain = instantiate(node).eval()
    node.roi_heads._target_ = FlexibleCascadeROIHeads
    for key in ("cfs", "loc_head", "test_scores"):
        node.roi_heads.pop(key, None)
    for predictor in node.roi_heads.box_predictors:
        predictor._target_ = RegionPredictor
        predictor.pop("box_input_shape")
    twin = instantiate(node).eval()
    twin.load_state_dict(plain.state_dict())
    return plain, twin


def test_other_cascades_have_the_same_stages():
    torch.manual_seed(0)
    plain, twin = flexible_twin()
    inputs = [{"image": torch.rand(3, 96, 128) * 255, "height": 96, "width": 128}]
    (expected,), (found,) = AllStages(plain)(inputs), AllStages(twin)(inputs)
    assert list(found) == ["stage1", "stage2", "stage3", "ensemble_own_rois"]
    for name, instances in found.items():
        assert len(instances) > 10
        torch.testing.assert_close(instances.scores, expected[name].scores)
        boxes = expected[name].pred_boxes.tensor
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)
        assert torch.equal(instances.pred_classes, expected[name].pred_classes)


def test_any_other_detector_is_one_stage(dataset, tmp_path):
    class Blind(torch.nn.Module):
        def forward(self, batch):
            return [{"instances": self.nothing(each)} for each in batch]

        def nothing(self, image):
            found = Instances((image["height"], image["width"]))
            found.pred_boxes = Boxes(torch.zeros(0, 4))
            found.scores = torch.zeros(0)
            found.pred_classes = torch.zeros(0, dtype=torch.int64)
            return found

    results = evaluate_stages(Blind(), loader(dataset), dataset, output_dir=tmp_path)
    assert list(results) == ["stage1"]
    assert results["stage1"]["bbox"]["AP"] == 0


def test_what_is_no_detector_is_refused():
    class Segmenter(torch.nn.Module):
        def forward(self, batch):
            return [{"sem_seg": torch.zeros(1, 1, 1)}]

    with pytest.raises(UserError, match="Segmenter predicts sem_seg; stages are those of"):
        AllStages(Segmenter())([{}])
