"""The FCOS head against loops over points and objects."""

from __future__ import annotations

import math

import pytest
import torch

from codetr.heads.fcos import FCOSHead
from tests.projects.codetr import plain
from tests.projects.codetr.dense_heads import (
    CLASSES,
    STRIDES,
    background_maps,
    dense_head,
    random_case,
    show_maps,
)


def objects_of_points(maps, strides, objects, reaches):
    """(image, point number, level, x, y) -> number of the object, or None."""
    for image, each in enumerate(objects):
        number = 0
        for level, stride in enumerate(strides):
            low, high = reaches[level]
            for row in range(maps[level].shape[2]):
                for column in range(maps[level].shape[3]):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    best = None
                    for k, (x1, y1, x2, y2) in enumerate(each.gt_boxes.tensor.tolist()):
                        sides = [x - x1, y - y1, x2 - x, y2 - y]
                        central = (
                            abs(x - (x1 + x2) / 2) < 1.5 * stride
                            and abs(y - (y1 + y2) / 2) < 1.5 * stride
                        )
                        if min(sides) <= 0 or not central or not low < max(sides) <= high:
                            continue
                        size = (x2 - x1) * (y2 - y1)
                        if best is None or size < best[0]:
                            best = size, k
                    yield image, number, stride, x, y, None if best is None else best[1]
                    number += 1


REACHES = {
    STRIDES: [(-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)],
    (4, 8, 16): [(-1, 32), (32, 64), (64, math.inf)],
    (8, 16, 32): [(-1, 64), (64, 128), (128, math.inf)],
}


@pytest.mark.parametrize("strides", REACHES)
def test_losses_and_candidates_equal_those_of_loops(strides):
    maps, objects = random_case(strides=strides)
    fcos = dense_head("fcos", strides=strides)
    with torch.no_grad():
        logits, distances, ratings = fcos.predict(maps)
    losses, candidates = fcos.losses(maps, objects)
    classes = boxes = rated = 0.0
    positives, weight = 0, 0.0
    places = objects_of_points(maps, strides, objects, REACHES[strides])
    for image, number, stride, x, y, found in places:
        label = CLASSES if found is None else int(objects[image].gt_classes[found])
        assert candidates.labels[image, number] == label
        square = [x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride]
        assert candidates.boxes[image, number].tolist() == square
        classes += plain.focal(logits[image, number].tolist(), label)
        if found is None:
            continue
        box = objects[image].gt_boxes.tensor[found].tolist()
        assert candidates.targets[image, number].tolist() == box
        left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
        across = min(left, right) / max(left, right)
        down = min(top, bottom) / max(top, bottom)
        centre = math.sqrt(across * down)
        d = [side * stride for side in distances[image, number].tolist()]
        ours = [x - d[0], y - d[1], x + d[2], y + d[3]]
        boxes += (
            centre * (1 - plain.giou(ours, box)) if plain.area(ours) else centre * _flat(ours, box)
        )
        rated += plain.bce(float(ratings[image, number]), centre)
        positives, weight = positives + 1, weight + centre
    assert positives > 20
    assert candidates.usable.all()
    assert losses["loss_cls"].item() == pytest.approx(classes / positives, rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(boxes / max(weight, 1), rel=1e-4)
    assert losses["loss_centerness"].item() == pytest.approx(rated / positives, rel=1e-4)


def _flat(ours, box) -> float:
    """1 - generalised IoU of a box without area, which shares nothing with any other."""
    width = max(ours[2], box[2]) - min(ours[0], box[0])
    height = max(ours[3], box[3]) - min(ours[1], box[1])
    return 1 + (width * height - plain.area(box)) / (width * height)


def test_features_are_those_of_the_points():
    maps, objects = random_case()
    _, candidates = dense_head("fcos").losses(maps, objects)
    first = maps[0].shape[2] * maps[0].shape[3]
    assert candidates.rows is None
    assert torch.equal(candidates.features[1, 37], maps[0][1, :, 37 // 32, 37 % 32])
    assert torch.equal(candidates.features[2, first + 21], maps[1][2, :, 1, 5])
    assert candidates.features.requires_grad
    assert not candidates.boxes.requires_grad


def constructed(objects: dict):
    """A head that shows its maps' channels as outputs, and maps with objects at (level, row,
    column): (class, score, centerness, box).
    """
    fcos = FCOSHead(channels=32, num_classes=CLASSES, convs=1, strides=STRIDES)
    fcos.layers.cls_subnet = fcos.layers.bbox_subnet = torch.nn.Identity()
    outputs = [fcos.layers.cls_score, fcos.layers.bbox_pred, fcos.layers.ctrness]
    show_maps(outputs)
    maps = background_maps(32, CLASSES)
    for (image, level, row, column), (label, score, central, box) in objects.items():
        stride = STRIDES[level]
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        place = maps[level][image, :, row, column]
        place[label] = math.log(score / (1 - score))
        sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
        place[CLASSES : CLASSES + 4] = torch.tensor(sides) / stride
        place[CLASSES + 4] = math.log(central / (1 - central))
    return fcos, maps


def test_detections_are_the_constructed_boxes():
    fcos, maps = constructed(
        {
            (0, 0, 5, 6): (2, 0.9, 0.8, [30.0, 20.0, 70.0, 60.0]),
            (0, 0, 5, 7): (2, 0.8, 0.8, [31.0, 20.0, 70.0, 60.0]),  # the same object once more
            (0, 0, 6, 7): (1, 0.7, 0.5, [31.0, 20.0, 70.0, 60.0]),  # one of another class
            (0, 3, 1, 1): (0, 0.6, 0.9, [-20.0, 10.0, 300.0, 150.0]),  # over the sides
            (0, 1, 1, 1): (0, 0.04, 0.9, [10.0, 10.0, 40.0, 40.0]),  # too faint
            (1, 1, 2, 3): (3, 0.5, 0.5, [40.0, 25.0, 90.0, 52.0]),
        }
    )
    first, second = fcos.detect(maps, [(192, 256), (160, 208)])
    assert first.pred_classes.tolist() == [2, 0, 1]
    torch.testing.assert_close(first.scores, torch.tensor([0.72, 0.54, 0.35]))
    expected = [[30.0, 20, 70, 60], [0, 10, 256, 150], [31, 20, 70, 60]]
    torch.testing.assert_close(first.pred_boxes.tensor, torch.tensor(expected))
    assert second.pred_classes.tolist() == [3]
    torch.testing.assert_close(second.pred_boxes.tensor, torch.tensor([[40.0, 25, 90, 52]]))
    assert second.image_size == (160, 208)


def test_a_thousand_objects_are_the_same_in_parts(monkeypatch):
    maps, objects = random_case((1000, 3, 0))
    whole, candidates = dense_head("fcos").losses(maps, objects)
    monkeypatch.setattr("codetr.heads.objects._ELEMENTS", 2**18)
    parts, again = dense_head("fcos").losses(maps, objects)
    assert torch.equal(candidates.labels, again.labels)
    assert torch.equal(candidates.targets, again.targets)
    assert all(torch.equal(whole[name], parts[name]) and whole[name].isfinite() for name in whole)
