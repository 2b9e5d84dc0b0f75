"""The PAA head against loops over anchors and objects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from codetr.heads.assignment import Assignment
from codetr.heads.objects import pad_objects
from codetr.heads.paa import PAAHead, separate, vote
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

STDS = (0.1, 0.1, 0.2, 0.2)


def predictions(paa, maps):
    """Logits (N, A, K), deltas (N, A, 4) and IoU logits (N, A) in double precision."""
    with torch.no_grad():
        outputs = paa.predict(maps)
    return [
        torch.cat([each.permute(0, 2, 3, 1).flatten(1, 2) for each in levels], dim=1).double()
        for levels in outputs
    ]


def candidates_of(places, inside, boxes) -> dict[int, int]:
    """Anchor number -> object: IoU of at least 0.1, and the best anchors of every object."""
    found: dict[int, int] = {}
    overlaps = [[plain.iou(place[3], box) for box in boxes] for place in places]
    for number, its in enumerate(overlaps):
        if inside[number] and max(its, default=0) >= 0.1:
            found[number] = its.index(max(its))
    for k in range(len(boxes)):
        mine = [its[k] if inside[number] else 0.0 for number, its in enumerate(overlaps)]
        most = max(mine)
        found.update({n: k for n, overlap in enumerate(mine) if overlap == most > 0})
    return found


def positives_of(places, found, costs, objects: int) -> dict[int, int]:
    """The candidates of the better component of each object."""
    result = {}
    for k in range(objects):
        mine = []
        for level in range(len(STRIDES)):
            its = [n for n, owner in found.items() if owner == k and places[n][0] == level]
            mine += sorted(its, key=costs.get)[:9]
        mine.sort(key=costs.get)
        values = np.array([costs[number] for number in mine])
        weights, means, variances = plain.fit_mixture(values)
        density = [
            w / math.sqrt(2 * math.pi * v) * np.exp(-((values - m) ** 2) / (2 * v))
            for w, m, v in zip(weights, means, variances)
        ]
        low = np.flatnonzero(density[0] >= density[1])
        if len(low):
            last = int(np.argmax((density[0] + density[1])[low]))
            result.update({mine[row]: k for row in low[: last + 1]})
    return result


@pytest.mark.parametrize("counts", [(5, 0, 9), (1, 2, 0)])
def test_losses_and_candidates_equal_those_of_loops(counts):
    maps, objects = random_case(counts)
    paa = dense_head("paa")
    logits, deltas, ratings = predictions(paa, maps)
    losses, candidates = paa.losses(maps, objects)
    places = plain.grid(maps, STRIDES)
    classes = overlaps = rated = total = 0.0
    number = dropped = 0
    for image, each in enumerate(objects):
        height, width = each.image_size
        inside = [
            row * STRIDES[level] < height and column * STRIDES[level] < width
            for level, row, column, _ in places
        ]
        boxes, names = each.gt_boxes.tensor.tolist(), each.gt_classes.tolist()
        found = candidates_of(places, inside, boxes)
        scores = logits[image].tolist()
        ours = [
            plain.decode(place[3], delta, STDS)
            for place, delta in zip(places, deltas[image].tolist())
        ]
        costs = {
            n: plain.focal(scores[n], names[k]) + 1.3 * (1 - plain.giou(ours[n], boxes[k]))
            for n, k in found.items()
        }
        positives = positives_of(places, found, costs, len(boxes))
        dropped += len(found) - len(positives)
        number += max(1, len(positives))
        for place in range(len(places)):
            k = positives.get(place)
            label = CLASSES if k is None else names[k]
            assert candidates.labels[image, place] == label
            if inside[place]:
                classes += plain.focal(scores[place], label)
            if k is not None:
                assert candidates.targets[image, place].tolist() == boxes[k]
                quality = plain.iou(ours[place], boxes[k])
                overlaps += quality * (1 - plain.giou(ours[place], boxes[k]))
                rated += plain.bce(float(ratings[image, place]), quality)
                total += quality
    assert number > 5
    assert dropped > 5
    assert losses["loss_cls"].item() == pytest.approx(classes / number, rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(1.3 * overlaps / max(total, 1), rel=1e-4)
    assert losses["loss_iou"].item() == pytest.approx(0.5 * rated / number, rel=1e-4)


def test_hand_made_candidates_are_separated():
    # anchors 0-5 in the first level, 6-8 in the second; object 0 has one candidate, object 1 three
    # good ones and two bad ones, one of them too many in its level; anchor 2 is nobody's
    positive = torch.tensor([[True, True, False, True, True, True, True, True, False]])
    matched = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 1, 0]])
    first = Assignment(matched=matched, positive=positive, negative=~positive)
    costs = torch.tensor([[7.0, 0.50, 0.0, 9.0, 0.51, 9.1, 0.52, 8.9, 0.0]])
    objects = plain.instances((9, 9), [[0.0, 0, 1, 1]] * 3, [0, 1, 2])
    padded = pad_objects([objects], costs.device)
    kept = separate(first, costs, [6, 3], padded, most=3)
    mine = kept.positive[0].nonzero()[:, 0].tolist()
    assert mine[0] == 0
    assert set(mine[1:]) <= {1, 4, 6}
    assert 1 in mine
    assert kept.matched[0, mine].tolist() == [0] + [1] * (len(mine) - 1)
    assert torch.equal(kept.negative, ~kept.positive)


def constructed(objects: dict, **settings):
    """A head that shows its maps' channels as outputs, and maps with objects at (image, level,
    row, column): (class, score, IoU, box).
    """
    width = CLASSES + 5
    paa = PAAHead(channels=width, num_classes=CLASSES, convs=0, strides=STRIDES, **settings)
    show_maps((paa.classes, paa.boxes, paa.centerness))
    maps = background_maps(width, CLASSES)
    for (image, level, row, column), (label, score, iou, box) in objects.items():
        side = 8 * STRIDES[level]
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        place = maps[level][image, :, row, column]
        place[label] = math.log(score / (1 - score))
        place[CLASSES : CLASSES + 4] = torch.tensor(
            [
                (x - column * STRIDES[level]) / side / 0.1,
                (y - row * STRIDES[level]) / side / 0.1,
                math.log((box[2] - box[0]) / side) / 0.2,
                math.log((box[3] - box[1]) / side) / 0.2,
            ]
        )
        place[CLASSES + 4] = math.log(iou / (1 - iou))
    return paa, maps


OBJECTS = {
    (0, 0, 5, 6): (2, 0.9, 0.9, [30.0, 20.0, 70.0, 60.0]),
    (0, 0, 5, 7): (2, 0.8, 0.8, [34.0, 20.0, 70.0, 60.0]),  # the same object once more
    (0, 0, 6, 7): (1, 0.7, 0.7, [31.0, 20.0, 70.0, 60.0]),  # one of another class
    (0, 3, 1, 1): (0, 0.9, 0.4, [-20.0, 10.0, 300.0, 150.0]),  # over the sides
    (0, 1, 1, 1): (0, 0.04, 0.05, [10.0, 10.0, 40.0, 40.0]),  # too faint
    (1, 1, 2, 3): (3, 0.5, 0.5, [40.0, 25.0, 90.0, 52.0]),
}


def test_detections_are_the_constructed_boxes():
    paa, maps = constructed(OBJECTS, voting=None)
    check_detections(paa, maps)


def test_votes_average_the_suppressed_boxes_of_the_class():
    paa, maps = constructed(OBJECTS)
    first, _ = paa.detect(maps, [(192, 256), (160, 208)])
    assert first.pred_classes.tolist() == [2, 1, 0]
    weight = 0.8 * math.exp(-(0.1**2) / 0.025)  # 36 x 40 of 40 x 40
    left = (0.9 * 30 + weight * 34) / (0.9 + weight)
    expected = [[left, 20, 70, 60], [31, 20, 70, 60], [0, 10, 256, 150]]
    torch.testing.assert_close(first.pred_boxes.tensor, torch.tensor(expected), atol=1e-3, rtol=0)


def test_a_box_without_votes_stays():
    alone, nobody = Instances((9, 9)), Instances((9, 9))
    for each, boxes in ((alone, [[1.0, 1, 1, 5]]), (nobody, [])):
        each.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        each.scores = torch.ones(len(boxes))
        each.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    assert vote(alone, nobody, spread=0.025).pred_boxes.tensor.tolist() == [[1, 1, 1, 5]]


def test_many_objects_are_the_same_in_parts(monkeypatch):
    maps, objects = random_case((60, 3, 0), least=0.2)
    whole, candidates = dense_head("paa").losses(maps, objects)
    monkeypatch.setattr("codetr.heads.objects._ELEMENTS", 2**13)
    parts, again = dense_head("paa").losses(maps, objects)
    assert torch.equal(candidates.labels, again.labels)
    assert torch.equal(candidates.targets, again.targets)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
