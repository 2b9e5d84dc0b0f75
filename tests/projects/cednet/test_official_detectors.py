"""Whole detectors with official weights against an independent statement of what MMDetection
computes with them.
"""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from cednet import official
from d2dense.checkpoint import convert
from tests.projects.cednet import golden, tiny
from tests.projects.cednet.mmdetection import STDS, Heads, cell_anchors, decode

K = 3
SIZE = (96, 128)
OCTAVES = [4 * 2 ** (i / 3) for i in range(3)]


def with_weights(model, weights):
    model.load_state_dict(convert(weights, "cednet", model), strict=False)
    return model


def filled(model, salt=""):
    """Official weights for it, by the reference's rule."""
    return golden.filled(
        [(name, list(v.shape), str(v.dtype)) for name, v in official.state_dict(model).items()],
        salt,
    )


def zeroed(model):
    """Official weights that leave only the biases that a test sets."""
    weights = filled(model)
    heads = ("bbox_head.", "rpn_head.", "roi_head.")
    return {k: torch.zeros_like(v) if k.startswith(heads) else v for k, v in weights.items()}


@torch.no_grad()
def features_of(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    images = model.preprocess_image([{"image": image}])
    return images, model.backbone(images.tensor)


def assert_equal(found: Instances, scores, classes, boxes):
    assert len(found) == len(scores) > 20
    assert len(set(classes.tolist())) == K
    assert torch.equal(found.pred_classes, classes)
    assert torch.allclose(found.scores, scores, atol=1e-5)
    assert torch.allclose(found.pred_boxes.tensor, boxes, atol=1e-3)


# ------------------------------------------------ everything at once


@torch.no_grad()
def test_retinanet_finds_what_mmdetection_finds():
    model = tiny.detector("retinanet")
    weights = filled(model)
    images, features = features_of(with_weights(model, weights))
    levels = [features[name] for name in tiny.RETINA]
    (found,) = model.forward_inference(images, levels, model.head(levels))
    found.pred_boxes.clip(SIZE)
    assert_equal(found, *Heads(weights).retinanet(levels, SIZE, K, clip_first=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"])
def test_two_stage_detectors_find_what_mmdetection_finds(kind):
    model = tiny.detector(kind)
    weights = filled(model)
    for name, value in weights.items():  # regions differ more, so that every class wins somewhere
        if name.endswith(("fc_cls.weight", "fc_reg.weight", "conv_logits.weight")):
            weights[name] = 8 * (value - value.mean(1, keepdim=True))
    heads = Heads(weights)
    images, features = features_of(with_weights(model, weights))
    generator = torch.Generator().manual_seed(0)
    features = {k: torch.randn(v.shape, generator=generator) for k, v in features.items()}
    levels = [features[name] for name in tiny.TWO_STAGE]

    (ours,), _ = model.proposal_generator(images, features)
    theirs = heads.proposals(levels, SIZE)
    assert len(theirs) > 100
    assert torch.allclose(ours.proposal_boxes.tensor, theirs, atol=1e-3)

    (found,), _ = model.roi_heads(images, features, [ours])
    if kind == "cascade_mask_rcnn":
        *expected, masks = heads.cascade(levels, SIZE, theirs, K)
    elif kind == "mask_rcnn":
        *expected, masks = heads.mask_rcnn(levels, SIZE, theirs, K)
    else:
        expected, masks = heads.faster_rcnn(levels, SIZE, theirs, K), None
    assert_equal(found, *expected)
    assert found.has("pred_masks") == (masks is not None)
    if masks is not None:
        assert torch.allclose(found.pred_masks[:, 0], masks, atol=1e-4)


# ------------------------------------------------ single channels


DELTAS = torch.tensor([0.1, -0.2, 0.3, -0.4])


def moved(box, deltas):
    """A box (xyxy) after deltas (x, y, width, height)."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + deltas[0] * width, (y1 + y2) / 2 + deltas[1] * height
    half_width, half_height = width * math.exp(deltas[2]) / 2, height * math.exp(deltas[3]) / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


@pytest.fixture(scope="module")
def retinanet():
    return tiny.detector("retinanet")


@torch.no_grad()
@pytest.mark.parametrize("scale", range(3))
@pytest.mark.parametrize(("number", "ratio"), enumerate((0.5, 1.0, 2.0)))
def test_channels_of_one_anchor_of_retinanet(retinanet, number, ratio, scale):
    anchor, label = 3 * number + scale, scale  # ratio first, then scale
    weights = zeroed(retinanet)
    weights["bbox_head.retina_cls.bias"] -= 9
    weights["bbox_head.retina_cls.bias"][anchor * K + label] = 2
    weights["bbox_head.retina_reg.bias"][4 * anchor : 4 * anchor + 4] = DELTAS
    images, features = features_of(with_weights(retinanet, weights))
    levels = [features[name] for name in tiny.RETINA]
    (found,) = retinanet.forward_inference(images, levels, retinanet.head(levels))
    assert len(found) > 5
    assert set(found.pred_classes.tolist()) == {label}
    side = OCTAVES[scale]
    expected = {}
    for stride in (8, 16, 32, 64, 128):
        width, height = stride * side / math.sqrt(ratio), stride * side * math.sqrt(ratio)
        x1, y1, x2, y2 = moved([-width / 2, -height / 2, width / 2, height / 2], DELTAS.tolist())
        expected[stride] = torch.tensor([x1, y1, x2, y2])
    for box in found.pred_boxes.tensor:
        fits = []
        for stride, cell in expected.items():
            steps = (box - cell) / stride  # how many positions from the first one
            fits.append(torch.allclose(steps, steps[:2].round().repeat(2), atol=1e-3))
        assert any(fits), box


@pytest.mark.parametrize("scales", [OCTAVES, [2.0, 3.0], [3.0, 2.0]])
def test_anchors_of_ours_in_their_order(scales):
    """The permutation itself, from the anchors of both; of two scales it is not its own inverse."""
    model = tiny.detector("retinanet", scales=scales)
    ours = next(iter(model.anchor_generator.cell_anchors))
    theirs = torch.tensor(cell_anchors(8, sorted(scales)))
    numbers = torch.arange(float(len(theirs)))
    weights = zeroed(model)
    weights["bbox_head.retina_cls.bias"] = numbers.repeat_interleave(K)
    weights["bbox_head.retina_reg.bias"] = numbers.repeat_interleave(4)
    head = with_weights(model, weights).head
    for bias, count in ((head.cls_score.bias, K), (head.bbox_pred.bias, 4)):
        order = bias.detach().view(-1, count)
        assert (order == order[:, :1]).all()
        assert torch.allclose(ours, theirs[order[:, 0].long()], atol=1e-4)
    assert not torch.equal(order[:, 0], numbers)
    back = official.state_dict(model)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@torch.no_grad()
@pytest.mark.parametrize("anchor", range(3))
def test_channels_of_one_anchor_of_the_rpn(anchor):
    model = tiny.detector("faster_rcnn")
    weights = zeroed(model)
    weights["rpn_head.rpn_cls.bias"][anchor] = 5
    weights["rpn_head.rpn_reg.bias"][4 * anchor : 4 * anchor + 4] = DELTAS
    _, features = features_of(with_weights(model, weights))
    logits, deltas = model.proposal_generator.rpn_head([features["p2"]])
    cells = next(iter(model.proposal_generator.anchor_generator.cell_anchors))
    cell = cells[logits[0][0, :, 0, 0].argmax()]
    width, height = (cell[2:] - cell[:2]).tolist()
    assert height / width == pytest.approx((0.5, 1.0, 2.0)[anchor], rel=1e-4)
    assert math.sqrt(height * width) == pytest.approx(8 * 4, rel=1e-4)
    assert torch.equal(deltas[0][0, 4 * anchor : 4 * anchor + 4, 0, 0], DELTAS)


def given(boxes):
    proposals = Instances(SIZE)
    proposals.proposal_boxes = Boxes(torch.tensor(boxes))
    proposals.objectness_logits = torch.zeros(len(boxes))
    return [proposals]


@torch.no_grad()
@pytest.mark.parametrize("label", range(K))
def test_deltas_and_masks_of_one_class(label):
    model = tiny.detector("mask_rcnn")
    weights = zeroed(model)
    weights["roi_head.bbox_head.fc_cls.bias"][label] = 4
    weights["roi_head.bbox_head.fc_reg.bias"][4 * label : 4 * label + 4] = DELTAS
    weights["roi_head.mask_head.conv_logits.bias"][label] = 2
    images, features = features_of(with_weights(model, weights))
    box = [40.0, 30.0, 72.0, 54.0]
    (found,), _ = model.roi_heads(images, features, given([box]))
    assert found.pred_classes.tolist() == [label]
    expected = moved(box, [0.01, -0.02, 0.06, -0.08])  # by deviations of 0.1, 0.1, 0.2, 0.2
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert found.scores.item() == pytest.approx(math.exp(4) / (math.exp(4) + K), abs=1e-5)
    assert found.pred_masks.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-2))] * 784)


@torch.no_grad()
def test_stages_of_the_cascade():
    """Boxes go through all stages by the class of each; logits and mask probabilities are averaged,
    the former before the softmax, the latter after the sigmoid.
    """
    model = tiny.detector("cascade_mask_rcnn")
    weights = zeroed(model)
    logits = torch.tensor([[3.0, 0, 0, 0], [0, 0, 6.0, 0], [0, 2.0, 3.0, 0]])
    masks = (-3.0, 1.0, 5.0)
    for k in range(3):
        weights[f"roi_head.bbox_head.{k}.fc_cls.bias"] = logits[k]
        weights[f"roi_head.bbox_head.{k}.fc_reg.bias"] = torch.cat([DELTAS, -DELTAS, 2 * DELTAS])
        weights[f"roi_head.mask_head.{k}.conv_logits.bias"][2] = masks[k]
    images, features = features_of(with_weights(model, weights))
    box = [40.0, 30.0, 72.0, 54.0]
    (found,), _ = model.roi_heads(images, features, given([box]))
    scores = logits.mean(0).softmax(0)[:3]
    order = scores.argsort(descending=True)
    order = order[scores[order] > 0.05]
    assert found.pred_classes.tolist() == order.tolist()
    assert found.scores.tolist() == pytest.approx(scores[order].tolist(), abs=1e-5)
    first = moved(box, [d * s for d, s in zip(DELTAS.tolist(), STDS[0])])  # class 0
    second = moved(first, [2 * d * s for d, s in zip(DELTAS.tolist(), STDS[1])])  # class 2
    third = moved(second, [2 * d * s for d, s in zip(DELTAS.tolist(), STDS[2])])
    assert found.pred_classes[0] == 2
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx(third, abs=1e-3)
    mean = sum(1 / (1 + math.exp(-m)) for m in masks) / 3
    assert found.pred_masks[0].flatten().tolist() == pytest.approx([mean] * 784, abs=1e-5)


def test_boxes_grow_by_the_same_limit():
    boxes, deltas = torch.tensor([[10.0, 10.0, 14.0, 18.0]]), torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    model = tiny.detector("retinanet")
    ours = model.box2box_transform.apply_deltas(deltas, boxes)
    assert (ours[0, 2] - ours[0, 0]).item() == pytest.approx(4 * 1000 / 16, rel=1e-5)
    assert torch.allclose(ours, decode(boxes, deltas))
