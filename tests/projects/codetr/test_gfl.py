"""The GFL head against loops over anchors, given which are positive."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from codetr.heads.gfl import GFLHead, distribution_loss
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


def adaptive_positives(places, inside, boxes) -> dict[int, int]:
    """Anchor number -> object number, by adaptive training sample selection."""
    taken: dict[int, tuple[float, int]] = {}
    for k, box in enumerate(boxes):
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        chosen = []
        for level in range(len(STRIDES)):
            near = sorted(
                (math.dist(centre, ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2)), number)
                for number, (its, _, _, a) in enumerate(places)
                if its == level and inside[number]
            )
            chosen += [number for _, number in near[:9]]
        overlaps = [plain.iou(places[number][3], box) for number in chosen]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for number, overlap in zip(chosen, overlaps):
            a = places[number][3]
            x, y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
            within = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and within and overlap > taken.get(number, (-1, 0))[0]:
                taken[number] = overlap, k
    return {number: k for number, (_, k) in taken.items()}


def test_losses_and_candidates_equal_those_of_loops():
    maps, objects = random_case()
    gfl = dense_head("gfl")
    with torch.no_grad():
        logits, distances = gfl.predict(maps)
    losses, candidates = gfl.losses(maps, objects)
    places = plain.grid(maps, STRIDES)
    classes = overlaps = spreads = total = 0.0
    number = 0
    for image, each in enumerate(objects):
        height, width = each.image_size
        inside = [
            row * STRIDES[level] < height and column * STRIDES[level] < width
            for level, row, column, _ in places
        ]
        boxes = each.gt_boxes.tensor.tolist()
        positives = adaptive_positives(places, inside, boxes)
        number += max(1, len(positives))
        for place, (level, _, _, anchor) in enumerate(places):
            scores = [plain.sigmoid(logit) for logit in logits[image, place].tolist()]
            found = positives.get(place)
            label = CLASSES if found is None else int(each.gt_classes[found])
            assert candidates.labels[image, place] == label
            start = anchor if inside[place] else [0.0] * 4
            assert candidates.boxes[image, place].tolist() == pytest.approx(start)
            quality = 0.0
            if found is not None:
                assert candidates.targets[image, place].tolist() == boxes[found]
                x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
                shares = distances[image, place].softmax(dim=-1).tolist()
                d = [
                    STRIDES[level] * sum(k * share for k, share in enumerate(side))
                    for side in shares
                ]
                ours, box = [x - d[0], y - d[1], x + d[2], y + d[3]], boxes[found]
                quality = plain.iou(ours, box)
                overlaps += max(scores) * (1 - plain.giou(ours, box))
                for side, wanted in zip(shares, [x - box[0], y - box[1], box[2] - x, box[3] - y]):
                    wanted = min(max(wanted / STRIDES[level], 0), 15.9)
                    low = int(wanted)
                    spreads -= max(scores) / 4 * (low + 1 - wanted) * math.log(side[low])
                    spreads -= max(scores) / 4 * (wanted - low) * math.log(side[low + 1])
                total += max(scores)
            if inside[place]:
                for k, (score, logit) in enumerate(zip(scores, logits[image, place].tolist())):
                    target = quality if k == label else 0.0
                    classes += plain.bce(logit, target) * (target - score) ** 2
    assert number > 50
    assert losses["loss_cls"].item() == pytest.approx(classes / number, rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(2 * overlaps / max(total, 1), rel=1e-4)
    assert losses["loss_dfl"].item() == pytest.approx(spreads / 4 / max(total, 1), rel=1e-4)


def test_distribution_loss_is_least_at_the_two_neighbours():
    values = torch.tensor([0.0, 3.3, 9.0, 15.9, 40.0, -2.0])
    shares = torch.zeros(6, 17)
    for row, value in enumerate(values.clamp(0, 15.9).tolist()):
        shares[row, int(value)] = int(value) + 1 - value
        shares[row, int(value) + 1] = value - int(value)
    logits = (shares + 1e-9).log().requires_grad_()
    loss = distribution_loss(logits, values)
    entropy = -(shares * (shares + 1e-9).log()).sum(dim=1)
    torch.testing.assert_close(loss, entropy, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() < 1e-5


def constructed(objects: dict):
    """A head that shows its maps' channels as outputs, and maps with objects at (image, level,
    row, column): (class, score, box).
    """
    reach = 16
    width = CLASSES + 4 * (reach + 1)
    gfl = GFLHead(channels=width, num_classes=CLASSES, convs=0, strides=STRIDES)
    show_maps((gfl.classes, gfl.distances))
    maps = background_maps(width, CLASSES)
    for (image, level, row, column), (label, score, box) in objects.items():
        stride = STRIDES[level]
        x, y = column * stride, row * stride
        place = maps[level][image, :, row, column]
        place[label] = math.log(score / (1 - score))
        bins = place[CLASSES:].view(4, reach + 1)
        for side, value in zip(bins, [x - box[0], y - box[1], box[2] - x, box[3] - y]):
            low = int(value / stride)
            share = value / stride - low
            side[:] = -30.0
            side[low], side[low + 1] = math.log(1 - share), math.log(share + 1e-13)
    return gfl, maps


def test_detections_are_the_constructed_boxes():
    gfl, maps = constructed(
        {
            (0, 0, 5, 6): (2, 0.9, [30.0, 20.0, 70.0, 60.0]),
            (0, 0, 5, 7): (2, 0.8, [31.0, 20.0, 70.0, 60.0]),  # the same object once more
            (0, 0, 6, 7): (1, 0.7, [31.0, 20.0, 70.0, 60.0]),  # one of another class
            (0, 3, 1, 1): (0, 0.6, [-20.0, 10.0, 300.0, 150.0]),  # over the sides
            (0, 1, 1, 1): (0, 0.04, [10.0, 10.0, 40.0, 40.0]),  # too faint
            (1, 1, 2, 3): (3, 0.5, [40.0, 25.0, 90.0, 52.0]),
        }
    )
    check_detections(gfl, maps)
