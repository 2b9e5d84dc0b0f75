"""Flat batches of regions against Detectron2's per-image code."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, pairwise_iou

from d2dense.modeling import box_transform, encode, regions
from tests.modeling import batches as b


def pooler(levels: int = 2) -> ROIPooler:
    scales = [1 / s for s in (4, 8)][:levels]
    return ROIPooler(
        output_size=5,
        scales=scales,
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
        canonical_box_size=40,
        canonical_level=3,
    )


def boxes_of(counts) -> list[torch.Tensor]:
    return [b.random_boxes(count, seed=n) for n, count in enumerate(counts)]


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("counts", [(40, 30), (0, 20), (0, 0), (1, 1)])
def test_pooling_is_bitwise_detectron2s_in_value_and_gradient(levels, counts):
    roi_pooler, boxes = pooler(levels), boxes_of(counts)
    maps = [f.requires_grad_() for f in list(b.features().values())[:levels]]
    expected = roi_pooler(maps, [Boxes(x) for x in boxes])
    got = regions.pool_lists(roi_pooler, maps, boxes)
    assert torch.equal(got, expected)
    if levels == 2 and counts == (40, 30):
        assert len(set(regions._levels(roi_pooler, torch.cat(boxes)).tolist())) == 2
    weight = torch.randn_like(got)
    for x, y in zip(
        torch.autograd.grad((got * weight).sum(), maps),
        torch.autograd.grad((expected * weight).sum(), maps),
    ):
        torch.testing.assert_close(x, y)


def test_boxes_that_are_not_finite_are_pooled_from_some_level():
    broken = torch.tensor(
        [[float("nan")] * 4, [0.0, 0.0, float("inf"), 9.0], [1.0, 2.0, 30.0, 40.0]]
    )
    levels = regions._levels(pooler(), broken)
    assert levels.min() >= 0
    assert levels.max() < 2


def select(boxes, keep, classes=None, num_classes=5):
    classes = torch.arange(len(boxes)) % (num_classes + 1) if classes is None else classes
    return regions.select_regions(
        boxes=boxes,
        image=torch.arange(len(boxes)) % 2,
        classes=classes,
        gt_boxes=boxes + 1,
        keep=keep,
        pooler=pooler(),
        num_classes=num_classes,
        num_images=2,
    )


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_selection_keeps_order_and_lists_foreground_and_levels(kept):
    boxes = b.random_boxes(50, seed=0)
    keep = {"all": torch.ones(50), "none": torch.zeros(50), "some": torch.arange(50) % 3}[kept] > 0
    got, rows = select(boxes, keep)
    expected = keep.nonzero().squeeze(1)
    assert torch.equal(rows, expected)
    assert torch.equal(got.boxes, boxes[expected])
    assert torch.equal(got.gt_boxes, boxes[expected] + 1)
    assert torch.equal(got.image, expected % 2)
    assert torch.equal(got.foreground, (got.classes < 5).nonzero().squeeze(1))
    levels = regions._levels(pooler(), got.boxes)
    for level, members in enumerate(got.level_rows):
        assert torch.equal(members, (levels == level).nonzero().squeeze(1))


def test_clipping_equals_boxes_clip_per_image():
    boxes, image = b.random_boxes(60, seed=3) * 3 - 100, torch.arange(60) % 3
    sizes = [(128, 96), (50, 200), (256, 256)]
    got = regions.clip_regions(boxes, image, regions.image_limits(sizes, boxes))
    for n, size in enumerate(sizes):
        expected = Boxes(boxes[image == n])
        expected.clip(size)
        assert torch.equal(got[image == n], expected.tensor)


@pytest.mark.parametrize("target_counts", [(4, 3), (0, 3), (0, 0)])
def test_labels_equal_a_matcher_per_image(target_counts):
    targets = b.targets(target_counts)
    image = torch.arange(90) % 2
    boxes = b.random_boxes(90, seed=9)
    for n, target in enumerate(targets):  # some boxes that match
        if len(target):
            boxes[n : n + 2 * len(target) : 2] = target.gt_boxes.tensor + 1.5
    truth = regions.batch_ground_truth(targets)
    classes, rows = regions.label_regions(boxes, image, truth, iou_threshold=0.6, num_classes=5)
    matcher = Matcher([0.6], [0, 1], allow_low_quality_matches=False)
    for n, target in enumerate(targets):
        mine = image == n
        matched, labels = matcher(pairwise_iou(target.gt_boxes, Boxes(boxes[mine])))
        foreground = labels == 1
        assert torch.equal(classes[mine] < 5, foreground)
        if len(target):
            assert foreground.any()
            assert torch.equal(classes[mine][foreground], target.gt_classes[matched][foreground])
            expected = target.gt_boxes.tensor[matched][foreground]
            assert torch.equal(truth.boxes[rows[mine][foreground]], expected)


def test_box_targets_are_bitwise_detectron2s():
    weights = (20.0, 20.0, 10.0, 10.0)
    boxes, gt_boxes = b.random_boxes(100, seed=0), b.random_boxes(100, seed=1)
    expected = Box2BoxTransform(weights=weights).get_deltas(boxes, gt_boxes)
    assert torch.equal(encode(boxes, gt_boxes, weights), expected)
    again = box_transform(weights=list(weights)).apply_deltas(expected, boxes)
    torch.testing.assert_close(again, gt_boxes, rtol=1e-4, atol=1e-3)
