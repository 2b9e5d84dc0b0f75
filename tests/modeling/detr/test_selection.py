"""Soft suppression against the recorded results and the usual loop; what is selected."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from d2dense.modeling.detr import Selection, soft_nms
from tests.modeling.detr import recorded

needs_recording = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


def by_loop(boxes, scores, classes, iou, min_score):
    """The usual algorithm on one image: take the best one, lower what overlaps it, and again."""
    overlap = box_iou(boxes.double(), boxes.double())
    scores, result = scores.double().clone(), torch.zeros(len(scores), dtype=torch.float64)
    left = [i for i in range(len(scores)) if scores[i] >= min_score]
    while left:
        best = max(left, key=lambda i: (float(scores[i]), -i))
        left.remove(best)
        result[best] = scores[best]
        for i in left:
            if classes[i] == classes[best] and overlap[i, best] >= iou:
                scores[i] *= 1 - overlap[i, best]
        left = [i for i in left if scores[i] >= min_score]
    return result


def candidates(images, count, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, count, 2, generator=g) * 10
    boxes = torch.cat([corner, corner + 30 + torch.rand(images, count, 2, generator=g) * 8], dim=2)
    scores = torch.rand(images, count, generator=g) ** 2
    return boxes, scores, torch.randint(0, classes, (images, count), generator=g)


@needs_recording
@pytest.mark.parametrize("by_offset", [False, True])
@pytest.mark.parametrize(("name", "iou"), [("softnms", 0.8), ("softnms05", 0.5)])
def test_the_recorded_suppression(name, iou, by_offset):
    units = np.load(recorded.UNITS)
    boxes, scores, labels = (
        torch.from_numpy(units[f"nms_in_{part}"])[None] for part in ("box", "score", "label")
    )
    found = soft_nms(boxes, scores, labels, iou=iou, by_offset=by_offset)[0]
    order = found.argsort(descending=True)[: int((found > 0).sum())]
    assert order.tolist() == units[f"{name}_keep"].tolist()
    assert recorded.error(found[order], units[f"{name}_dets"][:, 4]) < 1e-6
    assert recorded.error(boxes[0, order], units[f"{name}_dets"][:, :4]) < 1e-4


@needs_recording
def test_the_recorded_hard_suppression_is_torchvisions():
    units = np.load(recorded.UNITS)
    boxes, scores, labels = (
        torch.from_numpy(units[f"nms_in_{part}"]) for part in ("box", "score", "label")
    )
    assert batched_nms(boxes, scores, labels, 0.7).tolist() == units["nms07_keep"].tolist()


@pytest.mark.parametrize(("iou", "classes"), [(0.8, 3), (0.5, 1), (0.6, 100), (0.01, 1)])
def test_soft_suppression_by_loop(iou, classes):
    boxes, scores, labels = candidates(2, 60, classes)
    found = soft_nms(boxes, scores, labels, iou=iou, min_score=0.01)
    for i in range(2):
        expected = by_loop(boxes[i], scores[i], labels[i], iou, 0.01)
        assert torch.allclose(found[i].double(), expected, atol=1e-6)


def test_classes_apart_by_offset():
    boxes, scores, labels = candidates(2, 60, 40)
    found = soft_nms(boxes, scores, labels, iou=0.6, min_score=0.01, by_offset=True)
    for i in range(2):
        # in double precision, offsets change nothing but coordinates rounded to single ones
        offset = labels[i] * (boxes[i].max() + 1)
        moved = (boxes[i] + offset[:, None]).double()
        expected = by_loop(moved, scores[i], labels[i] * 0, 0.6, 0.01)
        assert torch.allclose(found[i].double(), expected, atol=1e-5)
    exact = soft_nms(boxes, scores, labels, iou=0.6, min_score=0.01)
    assert not torch.allclose(found, exact, atol=1e-7)
    assert torch.allclose(found, exact, atol=1e-3)


def test_equal_scores_and_equal_boxes():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9.5], [50, 50, 50, 50]]])
    found = soft_nms(boxes, torch.full((1, 4), 0.5), torch.zeros(1, 4))
    assert found[0].tolist() == pytest.approx([0.5, 0.0, 0.025, 0.5], abs=1e-6)


def test_nothing_to_suppress():
    empty = soft_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0))
    assert empty.shape == (2, 0)
    low = soft_nms(torch.rand(1, 5, 4), torch.full((1, 5), 1e-4), torch.zeros(1, 5))
    assert not low.any()


def test_traced_suppression_takes_other_numbers():
    def suppress(boxes, scores, labels):
        return soft_nms(boxes, scores, labels, iou=0.5, min_score=0.01)

    traced = torch.jit.trace(suppress, candidates(1, 5), check_trace=False)
    for given in (candidates(2, 70, seed=1), candidates(1, 0), candidates(3, 30, 1, seed=2)):
        assert torch.equal(traced(*given), suppress(*given))
    assert "PythonOp" not in str(traced.graph)


# ------------------------------------------------ selection


def inputs(images=2, queries=6, classes=4):
    torch.manual_seed(1)
    boxes = torch.rand(images, queries, 4) * 0.2 + 0.4
    sizes = [(40, 60), (32, 48)][:images]
    tensor = torch.tensor([[[w, h, w, h]] for h, w in sizes], dtype=torch.float32)
    return torch.randn(images, queries, classes), boxes, tensor, sizes


def test_scores_of_zero_are_dropped():
    logits, boxes, tensor, sizes = inputs()
    logits[0] = -200.0  # a score of zero in single precision
    logits[0, 2, 1] = 0.0
    found = Selection()(logits, boxes, tensor, sizes)
    assert [len(each) for each in found] == [1, 24]
    assert (float(found[0].scores), int(found[0].pred_classes)) == (0.5, 1)


def test_soft_suppression_follows_the_best_pairs():
    logits, boxes, tensor, sizes = inputs()
    boxes[:, 1] = boxes[:, 0] + 0.001
    logits[:, :2, 2] = torch.tensor([3.0, 2.9])
    found = Selection(max_detections=4, soft_nms_iou=0.8)(logits, boxes, tensor, sizes)
    everything = Selection(max_detections=6)(logits, boxes, tensor, sizes)
    for ours, plain in zip(found, everything):
        # as many candidates as queries
        new = by_loop(plain.pred_boxes.tensor, plain.scores, plain.pred_classes, 0.8, 1e-3)
        assert len(new[new > 0]) > 2
        assert not torch.allclose(new.float(), plain.scores)
        best = sorted((float(score) for score in new if score > 0), reverse=True)[:4]
        assert ours.scores.tolist() == pytest.approx(best, abs=1e-5)
        rows = [new.tolist().index(score) for score in sorted(new.tolist(), reverse=True)]
        assert torch.equal(ours.pred_classes, plain.pred_classes[rows[: len(ours)]])
        assert torch.equal(ours.pred_boxes.tensor, plain.pred_boxes.tensor[rows[: len(ours)]])


def test_half_precision_is_selected_in_single():
    logits, boxes, tensor, sizes = inputs()
    found = Selection()(logits.half(), boxes, tensor, sizes)
    assert found[0].scores.dtype == torch.float32
