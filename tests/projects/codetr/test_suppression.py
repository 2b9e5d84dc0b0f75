"""Suppression of detections against loops over single boxes, in the auxiliary heads and in the
settings of the official models.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codetr import official
from codetr.heads.dense import dense_detections
from codetr.heads.faster_rcnn import best_regions
from codetr.heads.suppression import Suppression

F = np.float32


def candidates(count=300, classes=4, *, seed=0, side=60.0):
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * side
    boxes = torch.cat([corner, corner + 20 + 40 * torch.rand(count, 2, generator=draw)], dim=1)
    labels = torch.randint(classes, (count,), generator=draw)
    return boxes, torch.rand(count, generator=draw), labels


def overlap(a, b):
    """IoU of two boxes, each step rounded to single precision."""
    width = max(F(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(F(0), min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def one_by_one(boxes, scores, labels, iou, *, soft):
    """(row, score) of what is kept, best first."""
    boxes, left = boxes.numpy(), dict(enumerate(scores.tolist()))
    kept = []
    while left:
        best = max(left, key=left.get)
        score = left.pop(best)
        if soft and score < 1e-3:
            break
        kept.append((best, score))
        for other in list(left):
            shared = float(overlap(boxes[best], boxes[other]))
            if labels[best] != labels[other]:
                continue
            if soft and shared >= iou:
                left[other] *= 1 - shared
            elif not soft and shared > iou:
                del left[other]
    return kept


@pytest.mark.parametrize("first", [1, 50])
@pytest.mark.parametrize("most", [7, 200])
@pytest.mark.parametrize("by_offset", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_best_box_first_then_what_it_leaves(soft, by_offset, most, first):
    boxes, scores, labels = candidates()
    suppression = Suppression(iou=0.5, soft=soft, by_offset=by_offset)
    rows, found = suppression(boxes, scores, labels, most=most, first=first)
    expected = one_by_one(boxes, scores, labels, 0.5, soft=soft)[:most]
    assert rows.tolist() == [row for row, _ in expected]
    assert found.tolist() == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_no_candidates(soft):
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    rows, found = Suppression(iou=0.5, soft=soft, by_offset=True)(*nothing, most=5)
    assert len(rows) == len(found) == 0


@pytest.mark.parametrize("soft", [False, True])
def test_by_offset_boxes_are_rounded_where_their_class_is(soft):
    """Two boxes overlap beyond the limit in the first class, and less in a late one."""
    label, largest = 1000, F(301.0)
    boxes = np.array([[10.01, 10, 20.01, 20], [13.34, 10, 23.34, 20], [0, 0, 301, 301]], dtype=F)
    shift = F(label) * (largest + F(1))
    exact, rounded = (float(overlap(b[0], b[1])) for b in (boxes, boxes + shift))
    assert exact - rounded > 1e-5
    suppression = Suppression(iou=(exact + rounded) / 2, soft=soft, by_offset=True)
    scores = torch.tensor([0.9, 0.8, 0.1])
    for own, untouched in ((0, False), (label, True)):
        labels = torch.tensor([own, own, 1])
        rows, found = suppression(torch.from_numpy(boxes), scores, labels, most=3)
        kept = dict(zip(rows.tolist(), found.tolist()))
        assert (kept.get(1) == pytest.approx(0.8)) is untouched


def test_regions_are_suppressed_softly():
    boxes, _, _ = candidates(50)
    draw = torch.Generator().manual_seed(1)
    scores = (3 * torch.randn(50, 4, generator=draw)).softmax(dim=1)
    suppression = Suppression(iou=0.5, soft=True, by_offset=True)
    found = best_regions(boxes, scores, (90, 100), 0.0, suppression, 1000)
    clipped = torch.minimum(boxes, torch.tensor([100.0, 90.0, 100.0, 90.0]))
    pairs = [(row, label) for row in range(50) for label in range(3)]
    expected = one_by_one(
        clipped[[row for row, _ in pairs]],
        scores[:, :3].flatten(),
        [label for _, label in pairs],
        0.5,
        soft=True,
    )
    assert found.pred_classes.tolist() == [pairs[i][1] for i, _ in expected]
    assert torch.equal(found.pred_boxes.tensor, clipped[[pairs[i][0] for i, _ in expected]])
    assert found.scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-4)


def test_dense_heads_rate_before_they_suppress_softly():
    boxes, scores, _ = candidates(40)
    draw = torch.Generator().manual_seed(2)
    ratings = torch.rand(40, generator=draw)
    (found,) = dense_detections(
        scores[None, :, None],
        boxes[None],
        [40],
        [(200, 200)],
        ratings=ratings[None],
        soft_nms=True,
    )
    expected = one_by_one(boxes, scores * ratings, [0] * 40, 0.6, soft=True)
    assert torch.equal(found.pred_boxes.tensor, boxes[[row for row, _ in expected]])
    assert found.scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("variant", official.VARIANTS)
def test_the_official_settings(variant):
    """The official test settings: soft in the models on ViT-L alone."""
    with torch.device("meta"):
        regions, dense = official.build(variant).auxiliary_heads
    soft = "vit" in variant
    threshold, suppression, most = regions.detection
    assert (threshold, most) == (0.0, 1000 if soft else 100)
    assert (suppression.iou, suppression.soft, suppression.by_offset) == (0.5, soft, True)
    expected = {"nms_threshold": 0.6, "max_detections": 100, "soft_nms": soft, "by_offset": True}
    assert expected.items() <= dense.detection.items()
    candidates, proposals, suppression = regions.rpn.test_limits
    assert (candidates, proposals) == ((8000, 2000) if soft else (1000, 1000))
    assert (suppression.iou, suppression.soft) == (0.9 if soft else 0.7, False)
    assert suppression.by_offset
