"""The Mask R-CNN head: the mask branch beside Faster R-CNN's, against Detectron2's crops and loops
over regions.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks

from codetr.heads.faster_rcnn import FasterRCNNHead
from codetr.heads.mask_rcnn import MaskRCNNHead, crop_masks
from codetr.heads.rpn import ProposalNetwork
from d2dense.errors import UserError
from tests.projects.codetr import plain
from tests.projects.codetr.dense_heads import CLASSES, ODD, SIZES, STRIDES, odd_objects

SETTINGS = {"channels": 32, "num_classes": CLASSES, "strides": STRIDES, "hidden": 16}


def rpn() -> ProposalNetwork:
    return ProposalNetwork(
        channels=32,
        strides=STRIDES,
        random_sampling=False,
        train_candidates=100,
        train_proposals=60,
        test_proposals=20,
    )


def head(kind=MaskRCNNHead, **settings):
    torch.manual_seed(0)
    if kind is MaskRCNNHead:
        settings = {"mask_convs": 1, "mask_channels": 8, **settings}
    made = kind(rpn=rpn(), random_sampling=False, **SETTINGS, **settings)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "mask_head" not in name:  # the rest equals a head without masks
            torch.nn.init.normal_(parameter, std=0.05)
    if kind is MaskRCNNHead:  # masks that differ from class to class
        torch.nn.init.normal_(made.mask_head.predictor.weight)
    return made


def polygons(boxes) -> PolygonMasks:
    """A rhombus in each box."""
    corners = []
    for x1, y1, x2, y2 in boxes.tolist():
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        corners.append([[x1, y, x, y1, x2, y, x, y2]])
    return PolygonMasks(corners)


def with_masks(objects, *, bitmaps: bool):
    for each in objects:
        each.gt_masks = polygons(each.gt_boxes.tensor)
        if bitmaps:
            each.gt_masks = BitMasks.from_polygon_masks(each.gt_masks, *each.image_size)
    return objects


def random_case(counts=(6, 0, 9), bitmaps=True):
    maps = plain.random_maps(1, SIZES[0], STRIDES, images=3, channels=32)
    objects = plain.random_instances(2, SIZES, counts, num_classes=CLASSES, least=0.1)
    return maps, with_masks(objects, bitmaps=bitmaps)


def regions_of(made, maps, objects):
    """Losses, candidates and the regions that they are of."""
    seen, sample = [], made.sample

    def spy(*arguments):
        seen.append(sample(*arguments))
        return seen[-1]

    made.sample = spy
    return *made.losses(maps, objects), seen[0]


@pytest.mark.parametrize("bitmaps", [True, False])
def test_loss_is_the_mean_over_the_positive_regions(bitmaps):
    maps, objects = random_case(bitmaps=bitmaps)
    made = head()
    losses, _, regions = regions_of(made, maps, objects)
    values = []
    for image, each in enumerate(objects):
        for row in regions.positive[image].nonzero()[:, 0].tolist():
            box = regions.boxes[image, row][None]
            mask = each.gt_masks[[int(regions.matched[image, row])]]
            target = mask.crop_and_resize(box, 28)[0]
            boxes = [box if image == n else box[:0] for n in range(3)]
            with torch.no_grad():
                logits = made.predict_masks(maps, boxes)
            assert logits.shape == (1, CLASSES, 28, 28)
            p = logits[0, int(regions.labels[image, row])].double().sigmoid()
            values.append(-torch.where(target, p.log(), (1 - p).log()).mean().item())
    assert len(values) > 15
    assert losses["loss_mask"].item() == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_the_rest_is_faster_rcnn():
    maps, objects = random_case()
    losses, candidates = head().losses(maps, objects)
    theirs, others = head(FasterRCNNHead).losses(maps, objects)
    assert set(losses) == {*theirs, "loss_mask"}
    assert all(torch.equal(losses[name], theirs[name]) for name in theirs)
    for one, other in zip(candidates[:5], others[:5]):
        assert torch.equal(one, other)


def test_crops_of_bitmaps_are_detectron2s():
    _, objects = random_case()
    draw = torch.Generator().manual_seed(3)
    index = torch.randint(9, (40,), generator=draw)
    boxes = objects[2].gt_boxes.tensor[index] + 20 * torch.rand(40, 4, generator=draw) - 10
    boxes[0] = boxes[0, [0, 1, 0, 1]]  # without area
    ours = crop_masks(objects[2], index, boxes, 28)
    assert torch.equal(ours.bool(), objects[2].gt_masks[index].crop_and_resize(boxes, 28))
    assert 0.2 < ours.mean() < 0.8


def test_a_box_sees_its_part_of_the_mask():
    objects = plain.instances((64, 64), [[0.0, 0, 32, 64]], [0])
    left = torch.zeros(1, 64, 64, dtype=torch.bool)
    left[:, :, :32] = True
    objects.gt_masks = BitMasks(left)
    boxes = torch.tensor([[18.0, 0, 46, 28], [0, 0, 28, 28], [40, 40, 60, 60]])
    whole, inner, outer = crop_masks(objects, torch.zeros(3, dtype=torch.int64), boxes, 28)
    assert (whole[:, :14] == 1).all()
    assert (whole[:, 14:] == 0).all()
    assert inner.all()
    assert not outer.any()


def test_detections_have_the_mask_of_their_class():
    maps, _ = random_case()
    sizes = list(SIZES)
    made = head()
    chances = torch.tensor([0.1, 0.4, 0.6, 0.9])
    torch.nn.init.zeros_(made.mask_head.predictor.weight)
    made.mask_head.predictor.bias.data = chances.logit()
    detections = made.detect(maps, sizes)
    others = head(FasterRCNNHead).detect(maps, sizes)
    assert sum(len(each) for each in detections) > 20
    for one, other, size in zip(detections, others, sizes):
        assert one.image_size == size
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        expected = chances[one.pred_classes].view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
        torch.testing.assert_close(one.pred_masks, expected)


def test_default_mask_branch_is_that_of_the_paper():
    with torch.device("meta"):
        made = MaskRCNNHead(rpn=ProposalNetwork())
    count = sum(parameter.numel() for parameter in made.mask_head.parameters())
    conv = 256 * 256 * 9 + 256
    assert count == 4 * conv + (256 * 256 * 4 + 256) + (256 * 80 + 80)


@pytest.mark.parametrize("name", ODD)
def test_odd_objects(name):
    maps, _ = random_case()
    objects = odd_objects(name)
    if name == "huge":
        objects = [plain.instances(size, [[-300.0, -300, 600, 600]], [1]) for size in SIZES]
    objects = with_masks(objects, bitmaps=name != "a thousand")
    losses, _, gradients = plain.gradients(head(), maps, objects)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert (losses["loss_mask"] > 0) == (name != "none")


def test_objects_without_masks_are_refused():
    maps, objects = random_case()
    for each in objects:
        each.remove("gt_masks")
    with pytest.raises(UserError, match=r"MODEL\.MASK_ON"):
        head().losses(maps, objects)


def test_losses_are_float32_under_autocast():
    maps, objects = random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = head().losses(maps, objects)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
