"""The RetinaNet head against loops over anchors and objects."""

from __future__ import annotations

import math

import pytest
import torch

from codetr.heads.retinanet import RetinaNetHead
from tests.projects.codetr import plain
from tests.projects.codetr.dense_heads import (
    CLASSES,
    STRIDES,
    background_maps,
    check_detections,
    dense_head,
    random_case,
    show_maps,
)

SHAPES = {"scales": (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), "ratios": (0.5, 1.0, 2.0)}


def without_tiny_objects():
    """Those lie within several anchors of equal size, and the last digits decide which of these
    they overlap most.
    """
    return random_case((5, 0, 9), least=0.2)


def kinds_of_anchors(places, inside, boxes) -> list[int | None]:
    """The object of each anchor, -1 for background, None where it is ignored."""
    overlaps = [[plain.iou(place[3], box) for box in boxes] for place in places]
    kinds: list[int | None] = []
    for number, its in enumerate(overlaps):
        best = max(its, default=0.0)
        if not inside[number]:
            kinds.append(None)
        elif best >= 0.5:
            kinds.append(its.index(best))
        else:
            kinds.append(-1 if best < 0.4 else None)
    for k in range(len(boxes)):  # every object keeps its best anchors, later objects win
        mine = [its[k] if inside[number] else 0.0 for number, its in enumerate(overlaps)]
        most = max(mine)
        for number, overlap in enumerate(mine):
            if most > 0 and overlap == most:
                kinds[number] = k
    return kinds


def test_losses_and_candidates_equal_those_of_loops():
    maps, objects = without_tiny_objects()
    retinanet = dense_head("retinanet")
    with torch.no_grad():
        logits, deltas = retinanet.predict(maps)
    losses, candidates = retinanet.losses(maps, objects)
    places = plain.grid(maps, STRIDES, **SHAPES)
    assert len(places) == logits.shape[1]
    classes = overlaps = 0.0
    number = ignored = 0
    for image, each in enumerate(objects):
        height, width = each.image_size
        inside = [
            row * STRIDES[level] < height and column * STRIDES[level] < width
            for level, row, column, _ in places
        ]
        boxes = each.gt_boxes.tensor.tolist()
        kinds = kinds_of_anchors(places, inside, boxes)
        number += max(1, sum(kind is not None and kind >= 0 for kind in kinds))
        ignored += sum(kind is None and its for kind, its in zip(kinds, inside))
        starts = torch.tensor([place[3] for place in places]) * torch.tensor(inside)[:, None]
        torch.testing.assert_close(candidates.boxes[image], starts)
        given, scores = candidates.labels[image].tolist(), logits[image].tolist()
        names = each.gt_classes.tolist()
        for place, kind in enumerate(kinds):
            found = kind is not None and kind >= 0
            label = names[kind] if found else CLASSES
            assert given[place] == label
            if kind is not None:
                classes += plain.focal(scores[place], label)
            if found:
                assert candidates.targets[image, place].tolist() == boxes[kind]
                ours = plain.decode(places[place][3], deltas[image, place].tolist())
                overlaps += 1 - plain.giou(ours, boxes[kind])
    assert number > 100
    assert ignored > 30
    assert losses["loss_cls"].item() == pytest.approx(classes / number, rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(overlaps / number, rel=1e-4)


def test_objects_get_all_their_best_anchors_and_the_last_object_wins():
    maps, _ = without_tiny_objects()
    # 16 x 16 within the square of 32 around each of nine corners, a quarter of it; then the same
    # box again, and one that two of these anchors overlap more
    box = [56.0, 56.0, 72.0, 72.0]
    objects = [
        plain.instances((192, 256), [[200.0, 100, 232, 132], box, box], [3, 1, 2]),
        plain.instances((160, 208), [box, [48.0, 48, 80, 80]], [1, 2]),
        plain.instances((190, 100), [], []),
    ]
    _, candidates = dense_head("retinanet").losses(maps, objects)
    squares = candidates.labels[:, : 24 * 32 * 9].view(3, 24, 32, 9)[..., 3]  # stride 8, 32 x 32
    assert (squares[0, 7:10, 7:10] == 2).all()
    assert (squares[0] == 1).sum() == 0
    assert (squares[0] == 2).sum() == 9
    # the object of 32 x 32 has the anchor in the middle for itself, and shares the others' IoU
    assert squares[1, 8, 8] == 2
    assert (squares[1, 7:10, 7:10].flatten() == 1).sum() == 8


def test_the_nine_anchors_of_a_cell_share_its_feature():
    maps, objects = without_tiny_objects()
    _, candidates = dense_head("retinanet").losses(maps, objects)
    first = maps[0].shape[2] * maps[0].shape[3]
    for number, feature in (
        (9 * 37 + 8, maps[0][:, :, 37 // 32, 37 % 32]),
        (9 * (first + 21), maps[1][:, :, 1, 5]),
    ):
        assert torch.equal(candidates.features[:, candidates.rows[number]], feature)
    assert candidates.features.requires_grad
    assert candidates.rows.shape == candidates.labels.shape[1:]


def constructed(objects: dict):
    """A head that shows its maps' channels as outputs, and maps with objects at (image, level,
    row, column, anchor): (class, score, box).
    """
    width = 9 * (CLASSES + 4)
    retinanet = RetinaNetHead(channels=width, num_classes=CLASSES, strides=STRIDES)
    layers = retinanet.layers
    layers.cls_subnet = layers.bbox_subnet = torch.nn.Identity()
    show_maps((layers.cls_score, layers.bbox_pred))
    maps = background_maps(width, 9 * CLASSES)
    shapes = [(ratio, scale) for ratio in SHAPES["ratios"] for scale in SHAPES["scales"]]
    for (image, level, row, column, anchor), (label, score, box) in objects.items():
        ratio, scale = shapes[anchor]
        side = scale * STRIDES[level]
        width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        place = maps[level][image, :, row, column]
        place[CLASSES * anchor + label] = math.log(score / (1 - score))
        place[9 * CLASSES + 4 * anchor :][:4] = torch.tensor(
            [
                (x - column * STRIDES[level]) / width,
                (y - row * STRIDES[level]) / height,
                math.log((box[2] - box[0]) / width),
                math.log((box[3] - box[1]) / height),
            ]
        )
    return retinanet, maps


def test_detections_are_the_constructed_boxes():
    retinanet, maps = constructed(
        {
            (0, 0, 5, 6, 0): (2, 0.9, [30.0, 20.0, 70.0, 60.0]),
            (0, 0, 5, 7, 8): (2, 0.8, [31.0, 20.0, 70.0, 60.0]),  # the same object once more
            (0, 0, 6, 7, 4): (1, 0.7, [31.0, 20.0, 70.0, 60.0]),  # one of another class
            (0, 3, 1, 1, 5): (0, 0.6, [-20.0, 10.0, 300.0, 150.0]),  # over the sides
            (0, 1, 1, 1, 2): (0, 0.04, [10.0, 10.0, 40.0, 40.0]),  # too faint
            (1, 1, 2, 3, 7): (3, 0.5, [40.0, 25.0, 90.0, 52.0]),
        }
    )
    check_detections(retinanet, maps)
