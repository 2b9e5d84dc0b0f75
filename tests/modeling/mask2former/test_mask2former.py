"""Mask2Former on tiny sizes: matching and losses by their formulas, and the whole model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import nn
from torchvision.ops import masks_to_boxes

from d2dense.config import detr
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.modeling.mask2former import (
    Mask2FormerCriterion,
    MaskDecoder,
    MaskTargets,
    masked_instances,
)
from d2dense.modeling.mask2former.points import sample, uncertain_points

CLASSES = 3
KINDS = ("loss_cls", "loss_mask", "loss_dice")


def criterion(**options):
    return Mask2FormerCriterion(num_classes=CLASSES, num_points=50, **options)


def targets(*counts, size=(16, 24)):
    return [MaskTargets(torch.arange(n) % CLASSES, torch.rand(n, *size) < 0.4) for n in counts]


def predictions(layers, images, queries):
    logits = torch.randn(layers, images, queries, CLASSES + 1)
    masks = torch.randn(layers, images, queries, 4, 6)
    return logits.requires_grad_(), masks.requires_grad_()


# ------------------------------------------------ points


def test_samples_are_bilinear():
    masks = torch.arange(12.0).view(1, 3, 4)
    centres = torch.tensor([[[0.5 / 4, 0.5 / 3], [2.5 / 4, 1.5 / 3], [2 / 4, 1.5 / 3]]])
    assert sample(masks, centres)[0].tolist() == pytest.approx([0.0, 6.0, 5.5], abs=1e-5)


def test_uncertain_points_are_near_the_border():
    ramp = torch.linspace(-1, 1, 64).expand(2, 64, 64)  # zero in the middle column
    points = uncertain_points(ramp, count=400)
    assert points.shape == (2, 400, 2)
    near = (points[..., 0] - 0.5).abs() < 0.15  # 300 of 1200 uniform points fill a quarter
    assert (near[:, :300].float().mean(dim=1) > 0.99).all()
    assert (near[:, 300:].float().mean(dim=1) < 0.6).all()


# ------------------------------------------------ matching and losses


def test_costs_are_the_formulas():
    logits, masks = (each.detach()[:, 0] for each in predictions(2, 1, 4))
    (target,) = targets(2)
    torch.manual_seed(3)
    cost = criterion().cost(logits, masks, target)
    torch.manual_seed(3)
    points = torch.rand(1, 50, 2)
    for layer, q, g in itertools.product(range(2), range(4), range(2)):
        x = sample(masks[layer, q][None], points)[0]
        t = sample(target.masks[g][None].float(), points)[0]
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        entropy = F.binary_cross_entropy_with_logits(x, t)
        of_class = logits[layer, q].softmax(-1)[target.classes[g]]
        expected = -2 * of_class + 5 * entropy + 5 * dice
        assert float(cost[layer, q, g]) == pytest.approx(float(expected), rel=1e-4)


def test_pairs_are_the_cheapest():
    logits, masks = (each.detach() for each in predictions(2, 3, 4))
    given = targets(2, 0, 3)
    torch.manual_seed(5)
    pairs = torch.stack(criterion().match(logits, masks, given)).T.tolist()
    torch.manual_seed(5)
    costs = [criterion().cost(logits[:, i], masks[:, i], each) for i, each in enumerate(given)]
    expected = []
    for layer in range(2):
        for image, first in ((0, 0), (2, 2)):
            table = costs[image][layer]
            count = table.shape[1]
            best = min(
                itertools.permutations(range(4), count),
                key=lambda queries: sum(float(table[q, g]) for g, q in enumerate(queries)),
            )
            expected += [[layer, image, q, first + g] for g, q in enumerate(best)]
    assert sorted(pairs) == sorted(expected)
    assert [pair[0] for pair in pairs] == [0] * 5 + [1] * 5


def test_one_copy_to_the_host(monkeypatch):
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or to_host(self))
    criterion().match(*predictions(3, 2, 4), targets(2, 1))
    assert copies == [1]


def test_losses_of_flat_masks(monkeypatch):
    """Where masks are flat, it does not matter where they are sampled, borders apart."""
    inner = 0.2 + 0.6 * torch.rand(2, 50, 2)
    place = "d2dense.modeling.mask2former.criterion.uncertain_points"
    monkeypatch.setattr(place, lambda masks, count: inner)
    (target,) = targets(2)
    full = MaskTargets(target.classes, torch.tensor([True, False]).view(2, 1, 1).expand(2, 8, 8))
    levels = torch.tensor([1.0, -2.0, 0.5])
    masks = levels.view(1, 1, 3, 1, 1).expand(1, 1, 3, 4, 4)
    logits = torch.full((1, 1, 3, CLASSES + 1), -1.0)
    logits[0, 0, 0, 0] = logits[0, 0, 1, 1] = 3.0  # query 0 is object 0, query 1 object 1
    losses = criterion()(logits, masks, [full])
    p = levels.sigmoid()
    entropy = -torch.log(p[0]) - torch.log(1 - p[1])
    dice = 1 - (2 * 50 * p[0] + 1) / (50 * p[0] + 50 + 1) + 1 - 1 / (50 * p[1] + 1)
    assert float(losses["loss_mask"]) == pytest.approx(5 * float(entropy) / 2, rel=1e-5)
    assert float(losses["loss_dice"]) == pytest.approx(5 * float(dice) / 2, rel=1e-5)
    labels, weight = torch.tensor([0, 1, CLASSES]), torch.tensor([1.0] * CLASSES + [0.1])
    expected = 2 * F.cross_entropy(logits[0, 0], labels, weight=weight)
    assert float(losses["loss_cls"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (9, 1)])
def test_any_number_of_objects(counts):
    logits, masks = predictions(2, 2, 4)
    losses = criterion()(logits, masks, targets(*counts))
    assert set(losses) == {*KINDS, *(f"d0.{kind}" for kind in KINDS)}
    sum(losses.values()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(masks.grad).all()
    assert bool(masks.grad.any()) == any(counts)


def test_extreme_logits_are_finite():
    logits, masks = predictions(2, 1, 4)
    losses = criterion()(logits * 1e4, masks * 1e4, targets(2))
    assert all(torch.isfinite(loss) for loss in losses.values())
    half = criterion()(logits.half(), masks.half(), targets(2))
    assert all(loss.dtype == torch.float32 for loss in half.values())


# ------------------------------------------------ the model


class Strides(Backbone):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 8, 1)

    size_divisibility = 32

    def forward(self, x):
        x = self.mix(x)
        return {f"c{k}": nn.functional.avg_pool2d(x, 2**k) for k in range(2, 6)}

    def output_shape(self):
        return {f"c{k}": ShapeSpec(channels=8, stride=2**k) for k in range(2, 6)}


def build():
    torch.manual_seed(0)
    node = detr.mask2former(
        backbone=nn.Identity(),
        widths={f"c{k}": 8 for k in range(2, 6)},
        num_classes=CLASSES,
        channels=16,
    )
    node.pixel_decoder.update(layers=1, heads=2, points=2, feedforward=32, norm_groups=4)
    node.decoder.update(layers=3, heads=2, feedforward=32, num_queries=6)
    node.criterion.num_points = 100
    model = instantiate(node)
    model.backbone = Strides()
    return model


def image(height, width, boxes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = Instances((height, width))
    corner = (torch.rand(boxes, 2, generator=g) * 16).floor()
    found.gt_boxes = Boxes(torch.cat([corner, corner + 12], dim=1))
    found.gt_classes = torch.arange(boxes) % CLASSES
    masks = torch.zeros(boxes, height, width, dtype=torch.bool)
    for mask, (x, y) in zip(masks, corner.int().tolist()):
        mask[y : y + 12, x : x + 12] = True
    found.gt_masks = BitMasks(masks)
    pixels = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    return {"image": pixels, "instances": found, "height": height, "width": width}


@pytest.mark.parametrize("boxes", [(2, 1), (0, 3), (0, 0)])
def test_losses_reach_every_parameter(boxes):
    model = build().train()
    losses = model([image(40, 64, count) for count in boxes])
    assert set(losses) == {*KINDS, *(f"d{k}.{kind}" for k in range(3) for kind in KINDS)}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_learns_a_batch():
    model = build().train()
    batch = [image(48, 64, 2, seed) for seed in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(40):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


def test_polygons_are_masks_too():
    model = build()
    given = image(32, 32, 1)
    x0, y0, x1, y1 = given["instances"].gt_boxes.tensor[0].tolist()
    other = Instances((32, 32))
    other.gt_classes = given["instances"].gt_classes
    other.gt_masks = PolygonMasks([[torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).numpy()]])
    ours, theirs = (model._targets(each, (64, 32)) for each in (given["instances"], other))
    assert ours.masks.shape == (1, 64, 32)
    assert torch.equal(ours.masks, theirs.masks)


def test_results():
    model = build().eval()
    with torch.no_grad():
        found = model([{**image(40, 50), "height": 80, "width": 90}, image(64, 32)])
    sizes = [(80, 90), (64, 32)]
    for each, size in zip(found, sizes):
        each = each["instances"]
        assert each.image_size == size
        assert each.pred_masks.shape == (6 * CLASSES, *size)
        assert each.pred_masks.dtype == torch.bool
        some = each.pred_masks.flatten(1).any(1)
        expected = masks_to_boxes(each.pred_masks[some]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert torch.equal(each.pred_boxes.tensor[some], expected)
        assert not each.pred_boxes.tensor[~some].any()
        assert not each.scores[~some].any()


def test_selection_by_loop():
    model = build()
    model.max_detections = 4
    logits, masks = torch.randn(6, CLASSES + 1), torch.randn(6, 8, 8)
    found = masked_instances(*model.select(logits, masks, (32, 32), (32, 32)), (32, 32))
    scores = logits.softmax(1)
    pairs = sorted(itertools.product(range(6), range(CLASSES)), key=lambda i: -scores[i])[:4]
    for i, (q, k) in enumerate(pairs):
        large = F.interpolate(masks[None, q : q + 1], size=(32, 32), mode="bilinear")[0, 0]
        inside = large > 0
        assert torch.equal(found.pred_masks[i], inside)
        assert int(found.pred_classes[i]) == k
        score = scores[q, k] * large[inside].sigmoid().mean()
        assert float(found.scores[i]) == pytest.approx(float(score), rel=1e-4)


def test_queries_look_inside_their_masks():
    decoder = MaskDecoder(channels=8, heads=2, num_queries=3)
    masks = torch.full((1, 3, 4, 4), -1.0)
    masks[0, 0, :, :2] = 1.0
    masks[0, 2] = 1.0
    ignored = decoder._ignored(masks, (4, 4))
    assert ignored.shape == (2, 3, 16)
    left = torch.tensor([False, False, True, True]).repeat(4)
    assert torch.equal(ignored, torch.stack([left, left & False, left & False]).expand(2, -1, -1))


def test_checkpointed_layers():
    model = build().train()
    assert enable_activation_checkpointing(model) == 4
    sum(model([image(40, 64)]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
