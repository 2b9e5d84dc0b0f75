"""Matching and losses against brute force and slow loops, and the cases that break them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from d2dense.modeling.detr import DETRCriterion, HungarianMatcher, build_targets, matcher

CLASSES = 5


def instances(boxes, size=(90, 120)):
    found = Instances(size)
    found.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.arange(len(found.gt_boxes)) % CLASSES
    return found


def objects(count, size=(90, 120)):
    corner = torch.rand(count, 2) * torch.tensor([size[1] - 30.0, size[0] - 30.0])
    return instances(torch.cat([corner, corner + 2 + torch.rand(count, 2) * 25], dim=1), size)


def predictions(layers, images, queries):
    logits = torch.randn(layers, images, queries, CLASSES)
    boxes = torch.rand(layers, images, queries, 4) * 0.4 + 0.1
    return logits.requires_grad_(), boxes.requires_grad_()


def targets(*given):
    return build_targets(given, torch.device("cpu"))


def pair_cost(logit, box, target, i):
    """The cost of one prediction and object i, by its definition."""
    height, width = target.image_size
    size = torch.tensor([width, height, width, height])
    gt = target.gt_boxes.tensor[i : i + 1]
    p = logit[target.gt_classes[i]].sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    l1 = (box - box_convert(gt / size, "xyxy", "cxcywh")[0]).abs().sum()
    giou = generalized_box_iou(box_convert(box[None], "cxcywh", "xyxy") * size, gt)[0, 0]
    return 2 * focal + 5 * l1 - 2 * giou


def test_cost_and_matches_by_brute_force():
    given = [objects(3), objects(0), objects(2, (64, 100))]
    logits, boxes = (each.detach() for each in predictions(2, 3, 4))
    cost = HungarianMatcher().cost(logits, boxes, targets(*given))
    found = HungarianMatcher()(logits, boxes, targets(*given))
    assert found.found.tolist() == [[[True] * 3, [False] * 3, [True, True, False]]] * 2
    for layer, image in itertools.product(range(2), range(3)):
        target, count = given[image], len(given[image])
        table = [
            [
                pair_cost(logits[layer, image, q], boxes[layer, image, q], target, i)
                for q in range(4)
            ]
            for i in range(count)
        ]
        for q, i in itertools.product(range(4), range(count)):
            assert float(cost[layer, image, q, i]) == pytest.approx(float(table[i][q]), rel=1e-4)
        best = min(
            itertools.permutations(range(4), count),
            key=lambda chosen: sum(float(row[q]) for row, q in zip(table, chosen)),
        )
        assert found.queries[layer, image, :count].tolist() == list(best)


def test_more_objects_than_queries():
    given = [objects(9), objects(1)]
    logits, boxes = predictions(1, 2, 4)
    found = HungarianMatcher()(logits, boxes, targets(*given))
    assert found.found.sum(dim=2).tolist() == [[4, 1]]
    assert sorted(found.queries[0, 0][found.found[0, 0]].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_predictions_that_are_no_numbers_are_matched_last(bad):
    logits, boxes = (each.detach() for each in predictions(1, 1, 4))
    boxes[0, 0, 1:3] = bad
    logits[0, 0, 3] = bad if bad != bad else 0.0
    found = HungarianMatcher()(logits, boxes, targets(objects(1)))
    assert found.found.all()
    assert found.queries.item() in (0, 3)


def test_one_copy_to_the_host(monkeypatch):
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or to_host(self)
    )
    logits, boxes = predictions(6, 3, 7)
    given = targets(objects(2), objects(0), objects(4))
    HungarianMatcher()(logits, boxes, given)
    assert copies == [(6 * 3 * 7 * 4,)]
    more, others = predictions(1, 3, 11)
    HungarianMatcher().match([(logits, boxes, given), (more, others, given)])
    assert copies[1:] == [(6 * 3 * 7 * 4 + 3 * 11 * 4,)]


# ------------------------------------------------ losses


def criterion(**options):
    return DETRCriterion(matcher=HungarianMatcher(), num_classes=CLASSES, **options)


def by_loop(logits, boxes, given):
    """The losses of one layer, image by image."""
    found = HungarianMatcher()(logits[None], boxes[None], targets(*given))
    total, number = torch.zeros(3), 0
    for i, target in enumerate(given):
        height, width = target.image_size
        size = torch.tensor([width, height, width, height])
        one_hot = torch.zeros_like(logits[i])
        for g in range(len(target)):
            if not found.found[0, i, g]:
                continue
            q = found.queries[0, i, g]
            one_hot[q, target.gt_classes[g]] = 1
            gt = target.gt_boxes.tensor[g : g + 1]
            l1 = F.l1_loss(boxes[i, q], box_convert(gt / size, "xyxy", "cxcywh")[0])
            xyxy = box_convert(boxes[i, q][None], "cxcywh", "xyxy") * size
            giou = generalized_box_iou(xyxy, gt)[0, 0]
            total = total + torch.stack([torch.zeros(()), 5 * 4 * l1, 2 * (1 - giou)])
            number += 1
        focal = sigmoid_focal_loss(logits[i], one_hot, alpha=0.25, gamma=2, reduction="sum")
        total = total + torch.stack([2 * focal, torch.zeros(()), torch.zeros(())])
    return total / max(number, 1)


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0), (1,), (9, 2)])
def test_losses_and_gradients_by_loop(counts):
    given = [objects(count, (64 + 8 * i, 120)) for i, count in enumerate(counts)]
    logits, boxes = predictions(2, len(counts), 4)
    losses = criterion()(logits, boxes, targets(*given))
    kinds = ("loss_cls", "loss_bbox", "loss_iou")
    assert set(losses) == {*kinds, *(f"d0.{kind}" for kind in kinds)}
    expected = torch.stack([by_loop(logits[layer], boxes[layer], given) for layer in range(2)])
    for layer, prefix in enumerate(("d0.", "")):
        found = torch.stack([losses[prefix + kind] for kind in kinds])
        assert torch.allclose(found, expected[layer], rtol=1e-4)
    ours = torch.autograd.grad(sum(losses.values()), (logits, boxes))
    theirs = torch.autograd.grad(expected.sum(), (logits, boxes), allow_unused=True)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    if theirs[1] is not None:
        assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_the_weights():
    logits, boxes = predictions(1, 1, 4)
    given = targets(objects(2))
    once = criterion()(logits, boxes, given)
    twice = criterion(class_weight=4.0, l1_weight=15.0, giou_weight=8.0)(logits, boxes, given)
    ratios = {name: float((twice[name] / once[name]).detach()) for name in once}
    expected = {"loss_cls": 2.0, "loss_bbox": 3.0, "loss_iou": 4.0}
    assert ratios == pytest.approx(expected)


def test_the_number_of_objects_is_the_mean_over_processes(monkeypatch):
    logits, boxes = predictions(1, 1, 4)
    given = targets(objects(2))
    alone = criterion()(logits, boxes, given)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    # the other process has six objects
    monkeypatch.setattr("torch.distributed.all_reduce", lambda number: number.add_(6))
    together = criterion()(logits, boxes, given)
    assert all(torch.allclose(together[name], alone[name] * 2 / 4) for name in alone)


EXTREME = {
    "none": torch.zeros(0, 4),
    "a thousand": torch.rand(1000, 4).cumsum(dim=1) * 30,
    "tiny": torch.tensor([[10.0, 10.0, 10.0 + 1e-4, 10.0 + 1e-4], [5.0, 5.0, 5.0, 5.0]]),
    "huge": torch.tensor([[0.0, 0.0, 120.0, 90.0], [-1e6, -1e6, 1e6, 1e6]]),
}


@pytest.mark.parametrize("boxes", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_for_any_boxes(boxes, dtype):
    logits, found = predictions(2, 2, 6)
    with torch.no_grad():
        found[:, :, 0, 2:] = 0.0  # without area
        found[:, :, 1] = 0.5
        logits[:, :, 2:4] = torch.tensor([[-6e4], [6e4]])
    losses = criterion()(
        logits.to(dtype), found.to(dtype), targets(instances(boxes), instances(boxes[:1]))
    )
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(found.grad).all()


def test_autocast_does_not_change_the_losses():
    logits, boxes = predictions(2, 2, 6)
    given = targets(objects(3), objects(1))
    plain = criterion()(logits, boxes, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = criterion()(logits, boxes, given)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


# ------------------------------------------------ many queries


def crowded(queries, count, spread):
    """Costs ``(Q, G)`` of objects that want the same queries, unless ``spread`` is large."""
    g = torch.Generator().manual_seed(count)
    common = torch.rand(queries, 1, generator=g)
    return (common + spread * torch.rand(queries, count, generator=g)).double().numpy()


@pytest.mark.parametrize(
    ("queries", "count", "spread"),
    [
        (30, 4, 0.01),
        (30, 4, 10.0),
        (200, 50, 0.1),
        (7, 3, 1.0),
        (7, 7, 1.0),
        (5, 9, 1.0),
        (9, 0, 1.0),
    ],
)
def test_queries_that_are_left_out_change_no_assignment(monkeypatch, queries, count, spread):
    monkeypatch.setattr(matcher, "_SMALL", 0)
    table = crowded(queries, count, spread)
    rows, columns = matcher._least(table.T)
    theirs = linear_sum_assignment(table)
    assert sorted(zip(columns.tolist(), rows.tolist())) == list(zip(*(x.tolist() for x in theirs)))


def test_ties_cost_no_more(monkeypatch):
    monkeypatch.setattr(matcher, "_SMALL", 0)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        table = torch.randint(0, 4, (40, 6), generator=g).double().numpy()
        rows, columns = matcher._least(table.T)
        assert len(set(columns.tolist())) == len(set(rows.tolist())) == 6
        assert table[columns, rows].sum() == table[linear_sum_assignment(table)].sum()


def test_many_objects_look_at_few_of_many_queries(monkeypatch):
    """Objects in one place: scipy sees their candidates only (200 objects, 20,000 positions)."""
    seen = []
    monkeypatch.setattr(
        matcher, "linear_sum_assignment", lambda c: seen.append(c.shape) or linear_sum_assignment(c)
    )
    boxes = torch.rand(1, 1, 20_000, 4) * 0.2 + 0.1
    given = instances(torch.tensor([[20.0, 20.0, 60.0, 60.0]]).repeat(200, 1))
    given.gt_classes.zero_()
    found = HungarianMatcher()(torch.zeros(1, 1, 20_000, CLASSES), boxes, targets(given))
    assert seen[0] == (200, 200)  # the same boxes have the same cheapest queries
    assert len(found.queries.unique()) == 200
