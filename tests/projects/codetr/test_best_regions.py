"""Detections from the best pairs alone are those from all pairs."""

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image

from codetr.heads.faster_rcnn import best_regions
from codetr.heads.suppression import Suppression


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_the_same_as_from_all_pairs(agnostic, crowded, first, threshold):
    generator = torch.Generator().manual_seed(0)
    regions, classes, size = 60, 7, (100, 120)
    corner = torch.rand(regions, 1 if agnostic else classes, 2, generator=generator)
    corner = corner * (4 if crowded else 80)  # crowded ones suppress nearly all
    extent = torch.rand(corner.shape, generator=generator) * 5 + 30
    boxes = torch.cat([corner, corner + extent], dim=-1).flatten(1)
    scores = torch.randn(regions, classes + 1, generator=generator).softmax(dim=1)
    settings = (threshold, 0.5, 40)
    suppression = Suppression(iou=0.5)
    found = best_regions(boxes, scores, size, threshold, suppression, 40, first=first)
    expected, _ = fast_rcnn_inference_single_image(boxes, scores, size, *settings)
    assert len(expected) == 40 or crowded or threshold
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
