"""Evaluation takes no bad sample: it ends with a line that names the file."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2dense.data.datasets import register_custom
from d2dense.data.loaders import build_test_loader
from d2dense.data.mappers import DetectionMapper, SemanticMapper
from d2dense.data.reading import SampleError
from d2dense.errors import UserError
from d2dense.evaluation import COCOEvaluator, SemSegEvaluator, evaluate
from tests.data.spoil import LABELS, PICTURES
from tests.evaluation.samples import unregister

BOXES = [[4, 4, 30, 30], [20, 10, 25, 30], [1, 2, 40, 40]]


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of 64x48 pixels with one box each; ``write`` changes the annotations."""
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number, (x, y, w, h) in enumerate(BOXES):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
        content["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48}
        )
        content["annotations"].append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
        )

    def write() -> str:
        (tmp_path / "a.json").write_text(json.dumps(content))
        entries = {"json": str(tmp_path / "a.json"), "images": str(tmp_path)}
        return register_custom({"val": entries})["val"]

    yield tmp_path, content, write
    unregister("custom_val")


class Fixed(nn.Module):
    """Finds two of the three objects, and one that is not there."""

    def forward(self, batch):
        return [{"instances": self.found(image)} for image in batch]

    def found(self, image) -> Instances:
        found = Instances((48, 64))
        x, y, w, h = BOXES[image["image_id"]]
        boxes = [[x, y, x + w, y + h - 2]] if image["image_id"] < 2 else [[0, 0, 5, 5]]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.tensor([0.9 - 0.1 * image["image_id"]])
        found.pred_classes = torch.tensor([0])
        return found


def run(name: str, workers: int = 0) -> dict[str, float]:
    mapper = DetectionMapper(is_train=False, augmentations=[])
    loader = build_test_loader(dataset=name, mapper=mapper, num_workers=workers)
    return evaluate(Fixed(), {name: loader}, {name: COCOEvaluator(name)})[name]["bbox"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_bad_picture_ends_the_evaluation(pictures, kind, workers):
    folder, _, write = pictures
    spoil, reason = PICTURES[kind]
    name = write()
    assert run(name, workers)["AP50"] > 50
    spoil(folder / "1.jpg")
    with pytest.raises(SampleError, match=reason) as caught:
        run(name, workers)
    assert str(folder / "1.jpg") in str(caught.value)
    assert caught.value.file_name == str(folder / "1.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("box", [[9, 1, 0, 5], [9, 1, -5, 5], [70, 1, 5, 5]])
def test_boxes_that_no_detection_finds_count_as_pycocotools_counts_them(pictures, box):
    folder, content, write = pictures
    one = content["annotations"][0]
    content["annotations"].append(one | {"id": 9, "bbox": box, "area": abs(box[2] * box[3])})
    content["annotations"].append(one | {"id": 10, "image_id": 77})
    content["annotations"].append(one | {"id": 11, "image_id": 1, "iscrowd": None})
    name = write()
    ours = run(name)
    content["annotations"][-1]["iscrowd"] = 0
    (folder / "a.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "a.json"))
        model, detections = Fixed(), []
        for number in range(3):
            found = model.found({"image_id": number})
            x1, y1, x2, y2 = found.pred_boxes.tensor[0].tolist()
            detections.append(
                {
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(found.scores[0]),
                }
            )
        reference = COCOeval(truth, truth.loadRes(detections), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    for key, value in zip(("AP", "AP50", "AP75"), reference.stats):
        assert ours[key] == pytest.approx(100 * value)
    assert 0 < ours["AP50"] < 60


def test_a_contradiction_in_the_annotations_ends_it_before_the_first_image(pictures):
    _, content, write = pictures
    content["annotations"][2]["bbox"] = [1, 2, float("nan"), 4]
    with pytest.raises(UserError, match=r"annotation 3 has bbox \[1, 2, nan, 4\].*2\.jpg"):
        run(write())


class Blank(nn.Module):
    def forward(self, batch):
        return [{"sem_seg": torch.zeros(3, 40, 60)} for _ in batch]


@pytest.mark.parametrize("kind", LABELS)
def test_a_bad_label_map_ends_the_evaluation(tmp_path, kind):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(2):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (60, 40), number).save(tmp_path / "labels" / f"{number}.png")
    entries = {key: str(tmp_path / key) for key in ("images", "labels")}
    name = register_custom({"val": entries | {"classes": ["a", "b", "c"]}})["val"]
    try:
        mapper = SemanticMapper(is_train=False, augmentations=[])
        loader = build_test_loader(dataset=name, mapper=mapper, num_workers=0)
        evaluator = SemSegEvaluator(name)
        assert evaluate(Blank(), {name: loader}, {name: evaluator})[name]["sem_seg"]["pACC"] == 50
        spoil, reason = LABELS[kind]
        path = Path(evaluator.label_files["1"])
        assert path.name == "1.png"
        spoil(path)
        with pytest.raises(UserError) as caught:
            evaluate(Blank(), {name: loader}, {name: evaluator})
        message = str(caught.value)
        assert str(path) in message
        if kind not in ("other size", "unknown class"):  # the evaluator's own words
            assert re.search(reason, message)
    finally:
        unregister(name)
    assert name not in MetadataCatalog
