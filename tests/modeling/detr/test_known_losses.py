"""Losses of queries whose targets are known, of the encoder, and towards the IoU; against recorded
values and slow loops.
"""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_convert, generalized_box_iou

from d2dense.errors import UserError
from d2dense.modeling.box_regression import giou_loss
from d2dense.modeling.detr import (
    DETRCriterion,
    EncoderPredictions,
    HungarianMatcher,
    build_targets,
)
from d2dense.modeling.detr.criterion import aligned_iou, quality_focal_loss
from tests.modeling.detr import recorded

CLASSES = 5
SIZES = [(90, 120), (64, 100)]
needs_recording = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


def criterion(**options):
    return DETRCriterion(matcher=HungarianMatcher(), num_classes=CLASSES, **options)


def seeded(seed, *shape, uniform=False):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) if uniform else torch.randn(shape, generator=g)


def recorded_labels():
    return torch.randint(0, 6, (20,), generator=torch.Generator().manual_seed(17))


@needs_recording
def test_the_recorded_quality_focal_loss():
    units, logits, labels = np.load(recorded.UNITS), seeded(16, 20, 5), recorded_labels()
    quality = torch.nn.functional.one_hot(labels, 6)[:, :5] * seeded(18, 20, uniform=True)[:, None]
    loss = quality_focal_loss(logits, quality).sum(dim=1)
    assert recorded.error(loss, units["qfl_elem"]) < 1e-5
    assert float(loss.sum() / 7) == pytest.approx(float(units["qfl_avg7"]), rel=1e-5)


@needs_recording
def test_the_recorded_focal_loss():
    logits, labels = seeded(16, 20, 5), recorded_labels()
    losses = criterion().known_losses(
        logits[None, None],
        torch.full((1, 1, 20, 4), 0.5),
        labels=labels[None],
        targets=torch.full((1, 20, 4), 0.5),
        box_weights=torch.zeros(1, 20),
        sizes=torch.ones(1, 1, 4),
        number=torch.tensor(7.0),
    )
    expected = float(np.load(recorded.UNITS)["focal_avg7"])
    assert float(losses["loss_cls"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["loss_bbox"]) == float(losses["loss_iou"]) == 0.0


@needs_recording
def test_the_recorded_overlap():
    units = np.load(recorded.UNITS)
    boxes = torch.from_numpy(units["nms_in_box"])
    assert recorded.error(giou_loss(boxes[:20], boxes[20:40]), units["giou_elem"]) < 1e-5


def random_boxes(*shape):
    return torch.cat([torch.rand(*shape, 2) * 0.4 + 0.3, torch.rand(*shape, 2) * 0.3 + 0.1], dim=-1)


def iou_of(box, other):
    """In double precision, of cxcywh."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = (
        box_convert(each.double(), "cxcywh", "xyxy").tolist() for each in (box, other)
    )
    both = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both
    return both / max(union, 1e-6)


def class_loss(logit, target, positive, kind):
    p = 1 / (1 + math.exp(-logit))
    entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
    if kind == "quality_focal":
        return abs(target - p) ** 2 * entropy
    return 0.25 * (1 - p) ** 2 * entropy if positive else 0.75 * p**2 * entropy


@pytest.mark.parametrize("kind", ["focal", "quality_focal"])
def test_known_losses_by_loop(kind):
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, 6, CLASSES), random_boxes(2, 2, 6)
    labels, targets = torch.randint(0, CLASSES + 1, (2, 6)), random_boxes(2, 6)
    label_weights = torch.tensor([[1.0, 1, 1, 0, 1, 1], [1, 1, 0.5, 1, 1, 1]])
    weights = (labels < CLASSES).float()
    sizes = torch.tensor([[[w, h, w, h]] for h, w in SIZES], dtype=torch.float32)
    losses = criterion(class_loss=kind, class_weight=3.0).known_losses(
        logits,
        boxes,
        labels=labels,
        targets=targets,
        box_weights=weights,
        label_weights=label_weights,
        sizes=sizes,
        number=torch.tensor(4.0),
    )
    for layer, prefix in enumerate(("d0.", "")):
        of_classes = distance = overlap = 0.0
        for i in range(2):
            for q in range(6):
                label, box = int(labels[i, q]), boxes[layer, i, q]
                for k in range(CLASSES):
                    positive = k == label
                    target = float(positive)
                    if kind == "quality_focal":
                        target *= iou_of(box, targets[i, q])
                    loss = class_loss(float(logits[layer, i, q, k]), target, positive, kind)
                    of_classes += 3.0 * loss * float(label_weights[i, q])
                if label == CLASSES:
                    continue
                distance += 5.0 * float((box - targets[i, q]).abs().sum())
                pixels = [
                    box_convert(each[None], "cxcywh", "xyxy") * sizes[i]
                    for each in (box, targets[i, q])
                ]
                overlap += 2.0 * float(1 - generalized_box_iou(*pixels))
        expected = {"cls": of_classes, "bbox": distance, "iou": overlap}
        for name, value in expected.items():
            assert float(losses[f"{prefix}loss_{name}"]) == pytest.approx(value / 4, rel=1e-4)


def test_the_target_of_quality_has_no_gradient_but_its_factor_has():
    logits, boxes = torch.randn(1, 1, 3, CLASSES), random_boxes(1, 1, 3)
    logits.requires_grad_(), boxes.requires_grad_()
    given = {
        "labels": torch.tensor([[1, 2, CLASSES]]),
        "targets": random_boxes(1, 3),
        "box_weights": torch.tensor([[1.0, 1, 0]]),
        "sizes": torch.ones(1, 1, 4),
        "number": torch.tensor(1.0),
    }
    loss = criterion(class_loss="quality_focal").known_losses(logits, boxes, **given)["loss_cls"]
    of_logits, of_boxes = torch.autograd.grad(loss, (logits, boxes), allow_unused=True)
    assert of_boxes is None
    step, wanted = 1e-3, logits.detach().double()
    for q, k in ((0, 1), (0, 0), (2, 3)):
        values = []
        for sign in (1, -1):
            moved = wanted.clone()
            moved[0, 0, q, k] += sign * step
            quality = torch.zeros(3, CLASSES, dtype=torch.float64)
            for row, label in ((0, 1), (1, 2)):
                quality[row, label] = iou_of(boxes[0, 0, row].detach(), given["targets"][0, row])
            values.append(float(quality_focal_loss(moved[0, 0], quality).sum()))
        slope = 2.0 * (values[0] - values[1]) / (2 * step)
        assert float(of_logits[0, 0, q, k]) == pytest.approx(slope, rel=1e-3)


def test_iou_of_tiny_and_of_equal_boxes():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 5e-4, 5e-4], [0.5, 0.5, 0.0, 0.0]])
    assert aligned_iou(boxes, boxes).tolist() == pytest.approx([1.0, 0.25, 0.0], rel=1e-2)


# ------------------------------------------------ the encoder


def instances(count, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = Instances(size)
    corner = torch.rand(count, 2, generator=g) * 40
    found.gt_boxes = Boxes(torch.cat([corner, corner + 5 + corner.flip(1) / 2], dim=1))
    found.gt_classes = torch.arange(count) % (CLASSES - 1) + 1
    return found


def targets_of(*counts):
    given = [instances(count, size, i) for i, (count, size) in enumerate(zip(counts, SIZES))]
    return build_targets(given, torch.device("cpu"), num_classes=CLASSES)


@pytest.mark.parametrize("binary", [True, False])
def test_the_encoder_is_one_more_set(binary):
    torch.manual_seed(0)
    given = targets_of(3, 1)
    logits, boxes = torch.randn(2, 2, 6, CLASSES), random_boxes(2, 2, 6)
    encoder = EncoderPredictions(torch.randn(2, 9, CLASSES), random_boxes(2, 9), binary)
    losses = criterion()(logits, boxes, given, encoder)
    alone = criterion()(logits, boxes, given)
    classes = torch.zeros_like(given.classes) if binary else given.classes
    encoded = criterion()(
        encoder.logits[None], encoder.boxes[None], given._replace(classes=classes)
    )
    expected = alone | {f"enc_{name}": loss for name, loss in encoded.items()}
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_one_copy_to_the_host_with_the_encoder(monkeypatch):
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or to_host(self)
    )
    encoder = EncoderPredictions(torch.randn(2, 9, CLASSES), random_boxes(2, 9), True)
    criterion()(torch.randn(2, 2, 6, CLASSES), random_boxes(2, 2, 6), targets_of(3, 1), encoder)
    assert copies == [2 * 2 * 6 * 3 + 2 * 9 * 3]


# ------------------------------------------------ what breaks others

BOXES = {
    "none": torch.zeros(0, 4),
    "a thousand": torch.rand(1000, 2).repeat(1, 2) * 60 + torch.tensor([0.0, 0, 20, 20]),
    "the same": torch.tensor([[10.0, 10, 50, 60]]).expand(9, -1),
    "no area": torch.tensor([[10.0, 10, 10, 10], [0, 0, 50, 0], [90, 64, 90, 64]]),
    "tiny": torch.tensor([[10.0, 10, 10.001, 10.001]]),
    "huge": torch.tensor([[0.0, 0, 100, 64], [-1e6, -1e6, 1e6, 1e6]]),
}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("kind", ["focal", "quality_focal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_for_any_boxes(boxes, kind, dtype):
    torch.manual_seed(0)
    first, second = Instances(SIZES[0]), Instances(SIZES[1])
    first.gt_boxes, second.gt_boxes = Boxes(boxes.clone()), Boxes(boxes[:1].clone())
    for each in (first, second):
        each.gt_classes = torch.arange(len(each.gt_boxes)) % CLASSES
    given = build_targets([first, second], torch.device("cpu"), num_classes=CLASSES)
    inputs = [torch.randn(2, 2, 6, CLASSES) * 9, random_boxes(2, 2, 6)]
    inputs += [torch.randn(2, 8, CLASSES), random_boxes(2, 8)]
    inputs[0][:, :, 0] = torch.tensor([-6e4, 6e4, 0, 100, -100])
    inputs[1][:, :, 1, 2:], inputs[1][:, :, 2], inputs[3][:, 3] = 0.0, 1.0, 1.0
    inputs = [each.to(dtype).requires_grad_() for each in inputs]
    losses = criterion(class_loss=kind)(
        *inputs[:2], given, EncoderPredictions(*inputs[2:], kind == "focal")
    )
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(each.grad).all() for each in inputs)


@pytest.mark.parametrize("number", [-1, CLASSES, 255])
def test_classes_out_of_range_are_a_mistake(number):
    given = [instances(2, SIZES[0]), instances(3, SIZES[1])]
    given[1].gt_classes[1] = number
    with pytest.raises(UserError, match=rf"class {number}, but the model has the classes 0 to 4"):
        build_targets(given, torch.device("cpu"), num_classes=CLASSES)


def test_one_class():
    criterion_of_one = DETRCriterion(matcher=HungarianMatcher(), num_classes=1)
    given = targets_of(3, 1)
    given = given._replace(classes=given.classes * 0)
    losses = criterion_of_one(torch.randn(1, 2, 6, 1), random_boxes(1, 2, 6), given)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
