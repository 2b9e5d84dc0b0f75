"""Tests at several sizes: suppression against the usual loop, voting, what the model is shown, and
both kinds of config.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import box_iou

from d2dense.errors import UserError
from d2dense.modeling import MultiScaleDetector
from d2dense.modeling.suppression import suppress, vote


def boxes_near_each_other(count, seed=0):
    torch.manual_seed(seed)
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2) * 40], dim=1)
    scores = torch.rand(count)
    scores[3], boxes[5] = scores[7], boxes[6]  # equal scores, equal boxes
    return boxes, scores, torch.randint(0, 3, (count,))


def one_after_the_other(boxes, scores, classes, factor, min_score):
    """Soft-NMS as published: take the best, lower the rest, again."""
    scores, result = scores.double().clone(), torch.zeros(len(scores), dtype=torch.double)
    left = set(range(len(scores)))
    overlap = box_iou(boxes, boxes).double()
    while left:
        best = max(left, key=lambda i: (float(scores[i]), -i))
        left.remove(best)
        if scores[best] < min_score:
            continue
        result[best] = scores[best]
        for other in left:
            if classes[other] == classes[best]:
                scores[other] *= factor(float(overlap[best, other]))
    return result


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"iou": 0.5}, lambda iou: 1 - iou if iou >= 0.5 else 1.0),
        ({"iou": 0.1}, lambda iou: 1 - iou if iou >= 0.1 else 1.0),
        ({"method": "gaussian", "sigma": 0.5}, lambda iou: float(np.exp(-(iou**2) / 0.5))),
        ({"method": "gaussian", "sigma": 0.1}, lambda iou: float(np.exp(-(iou**2) / 0.1))),
    ],
)
@pytest.mark.parametrize("rows", [1024, 7])
def test_suppression_is_the_usual_loop(settings, factor, rows, monkeypatch):
    monkeypatch.setattr("d2dense.modeling.suppression._ROWS", rows)
    boxes, scores, classes = boxes_near_each_other(120)
    found = suppress(boxes, scores, classes, min_score=0.05, **settings)
    expected = one_after_the_other(boxes, scores, classes, factor, 0.05)
    assert 0 < int((expected > 0).sum()) < 120
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_suppressed_and_moved_to_nothing():
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert suppress(*empty).shape == (0,)
    moved = vote(empty[0], *empty[:2], classes=empty[2], candidate_classes=empty[2])
    assert moved.shape == (0, 4)


def test_votes_are_weighted_by_scores_within_a_class():
    candidates = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 4]]
    )
    scores, classes = torch.tensor([0.5, 0.25, 0.9, 0.7, 0.9]), torch.tensor([1, 1, 2, 1, 1])
    moved = vote(
        candidates[[0, 3]], candidates, scores, classes=classes[[0, 3]], candidate_classes=classes
    )
    # the third is of another class, the last overlaps by 0.4
    expected = (0.5 * candidates[0] + 0.25 * candidates[1]) / 0.75
    torch.testing.assert_close(moved, torch.stack([expected, candidates[3]]))


class Finder(nn.Module):
    """Detects the red rectangle of an image, as any of the library's models returns it, with
    further detections of no other version.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        self.seen += [each["image"] for each in batch]
        return [{"instances": self.detect(each)} for each in batch]

    def detect(self, given):
        image = given["image"].float()
        rows, columns = (image[0] > 128).nonzero(as_tuple=True)
        factor = torch.tensor([given["width"] / image.shape[2], given["height"] / image.shape[1]])
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        size = (given["height"], given["width"])
        masks = nn.functional.interpolate((image[:1] > 128)[None].float(), size=size)[0] > 0.5
        return Instances(
            size,
            pred_boxes=Boxes(box[None] * factor.repeat(2)),
            scores=torch.tensor([image.shape[1] / 1000]),
            pred_classes=torch.tensor([1]),
            pred_masks=masks,
            other=torch.zeros(1),
        )


def picture(height=60, width=90):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, 20:40, 10:30] = 255
    return {"image": image, "height": height, "width": width}


def test_versions_are_resized_as_detectron2_does_and_boxes_come_back():
    model = MultiScaleDetector(Finder(), min_sizes=[60, 90, 120], max_size=150)
    given = picture()
    (found,) = model([given])
    theirs = DatasetMapperTTA([60, 90, 120], 150, True)(given)
    assert [tuple(each.shape[1:]) for each in model.model.seen[::2]] == [
        (60, 90), (90, 135), (100, 150)
    ]  # fmt: skip
    for ours, expected in zip(model.model.seen, theirs, strict=True):
        assert torch.equal(ours, expected["image"])
    found = found["instances"]
    assert found.image_size == (60, 90)
    boxes = found.pred_boxes.tensor
    torch.testing.assert_close(
        boxes, torch.tensor([10.0, 20, 30, 40]).expand_as(boxes), atol=1, rtol=0
    )
    # the best keeps its score, the others lose what they overlap
    assert float(found.scores[0]) == pytest.approx(0.1)
    assert (found.scores[1:] < 0.05).all()
    assert found.pred_masks[:, 25:35, 15:25].all()
    assert not found.pred_masks[:, :, 50:].any()
    assert not found.has("other")


def test_an_image_shrunk_before_gives_results_of_its_original_size():
    model = MultiScaleDetector(Finder(), min_sizes=[60], flip=False)
    (found,) = model([picture() | {"height": 120, "width": 180}])
    assert found["instances"].image_size == (120, 180)
    assert found["instances"].pred_boxes.tensor.tolist() == [[20, 40, 60, 80]]


def test_no_more_than_asked_for_and_best_first():
    model = MultiScaleDetector(
        Finder(), min_sizes=[60, 70, 80], max_detections=4, method="gaussian", sigma=2.0
    )
    (found,) = model([picture()])
    scores = found["instances"].scores
    assert len(scores) == 4
    assert (scores[:-1] >= scores[1:]).all()


class Fixed(nn.Module):
    """Returns what it was given, in turn."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, batch):
        return [next(self.outputs) for _ in batch]


def detections(boxes, scores, classes, width=100):
    return {
        "instances": Instances(
            (50, width),
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
            scores=torch.tensor(scores, dtype=torch.float32),
            pred_classes=torch.tensor(classes, dtype=torch.long),
        )
    }


def test_merging_two_versions_by_hand():
    plain = detections([[10, 10, 30, 30], [60, 10, 80, 30]], [0.9, 0.6], [0, 0])
    # mirrored: [10, 10, 30, 30] as another class, and [60, 12, 80, 30] once more
    mirrored = detections([[70, 10, 90, 30], [20, 12, 40, 30]], [0.8, 0.7], [1, 0])
    model = MultiScaleDetector(Fixed([plain, mirrored]), min_sizes=[50], voting_iou=0.5)
    (found,) = model([{"image": torch.zeros(3, 50, 100, dtype=torch.uint8)}])
    found = found["instances"]
    assert found.pred_classes.tolist() == [0, 1, 0, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6 * 0.1])  # the IoU is 0.9
    moved = [60, (10 * 0.6 + 12 * 0.7) / 1.3, 80, 30]
    expected = torch.tensor([[10, 10, 30, 30], [10, 10, 30, 30], moved, moved])
    torch.testing.assert_close(found.pred_boxes.tensor, expected)


def test_versions_without_detections():
    none = [detections([], [], []) for _ in range(4)]
    model = MultiScaleDetector(Fixed(none), min_sizes=[50, 60], voting_iou=0.5)
    (found,) = model([{"image": torch.zeros(3, 50, 100, dtype=torch.uint8)}])
    assert len(found["instances"]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_sizes": []}, "min_sizes"),
        ({"max_size": 0}, "max_size = 0"),
        ({"iou": 1.5}, "iou = 1.5"),
        ({"sigma": 0.0}, "sigma"),
        ({"method": "gausian"}, "expected one of linear, gaussian"),
    ],
)
def test_what_makes_no_sense_is_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        MultiScaleDetector(Finder(), **wrong)


def test_a_model_without_boxes_is_refused():
    model = MultiScaleDetector(Fixed([{"sem_seg": torch.zeros(1)}] * 2))
    with pytest.raises(UserError, match=r"returns sem_seg.*switch it off"):
        model([picture()])
