"""The Faster R-CNN head: proposals, samples and losses against loops over regions."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from codetr.heads import HEADS
from codetr.heads.objects import pad_objects
from codetr.heads.rpn import ProposalNetwork, Proposals
from d2dense.config import get_cfg
from tests.projects.codetr import plain, tiny

SIZES = [(64, 96), (48, 80)]
LEVEL_STRIDES = (*tiny.STRIDES, 32)


def head(**settings):
    torch.manual_seed(0)
    made = tiny.rcnn(**settings)
    for name, parameter in made.named_parameters():
        if not name.startswith("box_head"):
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def random_case(counts=(6, 3)):
    maps = plain.random_maps(1, SIZES[0], LEVEL_STRIDES, images=2, channels=tiny.CHANNELS)
    return maps, plain.random_instances(2, SIZES, counts, num_classes=tiny.CLASSES)


def flat(levels, size) -> list:
    return torch.cat(
        [each.permute(0, 2, 3, 1).reshape(len(each), -1, size) for each in levels], dim=1
    ).tolist()


def anchors_of(maps):
    scales = [4 * 2 ** (k / 3) for k in range(3)]
    return plain.grid(maps, LEVEL_STRIDES, scales=scales, ratios=(0.5, 1.0, 2.0))


@torch.no_grad()
def test_proposals_equal_a_loop():
    made, (maps, objects) = head(rpn={"train_candidates": 60, "train_proposals": 25}), random_case()
    padded = pad_objects(objects, torch.device("cpu"))
    _, found = made.rpn.losses(maps, padded)
    logits, deltas = made.rpn.predict(maps)
    logits, deltas, places = flat(logits, 1), flat(deltas, 4), anchors_of(maps)
    for image, (height, width) in enumerate(SIZES):
        kept = []
        for level in range(3):
            numbers = [a for a, place in enumerate(places) if place[0] == level]
            scored = sorted(
                ((plain.sigmoid(logits[image][a][0]), a) for a in numbers), reverse=True
            )
            of_level = []
            for score, a in scored[:60]:
                box = plain.decode(places[a][3], deltas[image][a])
                box = [min(max(x, 0.0), side) for x, side in zip(box, [width, height] * 2)]
                empty = box[2] <= box[0] or box[3] <= box[1]
                if not empty and all(plain.iou(box, other) <= 0.7 for _, other in of_level):
                    of_level.append((score, box))
            kept += of_level
        kept = sorted(kept, reverse=True)[:25]
        there = found.there[image]
        assert int(there.sum()) == len(kept)
        assert found.scores[image, there].tolist() == pytest.approx([k[0] for k in kept], rel=1e-4)
        boxes = torch.tensor([k[1] for k in kept])
        torch.testing.assert_close(found.boxes[image, there], boxes, rtol=1e-3, atol=1e-3)


def test_losses_of_proposals_equal_a_loop():
    made, (maps, objects) = head(rpn={"samples": None}), random_case((6, 0))
    padded = pad_objects(objects, torch.device("cpu"))
    losses, _ = made.rpn.losses(maps, padded)
    logits, deltas = made.rpn.predict(maps)
    logits, deltas, places = flat(logits, 1), flat(deltas, 4), anchors_of(maps)
    entropy = distance = number = 0.0
    for image, (height, width) in enumerate(SIZES):
        boxes = objects[image].gt_boxes.tensor.tolist()
        valid = [
            row * LEVEL_STRIDES[level] < height and column * LEVEL_STRIDES[level] < width
            for level, row, column, _ in places
        ]
        overlaps = [
            [plain.iou(place[3], box) if ok else -1.0 for box in boxes]
            for place, ok in zip(places, valid)
        ]
        owner, negatives = {}, set()
        for a, row in enumerate(overlaps):
            best = max(row, default=0.0)
            if valid[a] and best >= 0.7:
                owner[a] = row.index(best)
            elif valid[a] and best < 0.3:
                negatives.add(a)
        for g in range(len(boxes)):
            best = max(row[g] for row in overlaps)
            if best >= 0.3:
                owner |= {a: g for a, row in enumerate(overlaps) if row[g] >= best - 1e-6}
        negatives -= set(owner)
        number += max(1, len(owner)) + max(1, len(negatives))
        for a in owner.keys() | negatives:
            entropy += plain.bce(logits[image][a][0], float(a in owner))
        for a, g in owner.items():
            anchor, box = places[a][3], boxes[g]
            side = (anchor[2] - anchor[0], anchor[3] - anchor[1])
            for axis in (0, 1):
                shift = (box[axis] + box[axis + 2] - anchor[axis] - anchor[axis + 2]) / 2
                distance += abs(deltas[image][a][axis] - shift / side[axis])
                scale = math.log((box[axis + 2] - box[axis]) / side[axis])
                distance += abs(deltas[image][a][axis + 2] - scale)
    expected = {"loss_rpn_cls": entropy / number, "loss_rpn_bbox": distance / number}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


def given_proposals(boxes) -> Proposals:
    boxes = torch.tensor([boxes], dtype=torch.float32)
    there = torch.ones(boxes.shape[:2], dtype=torch.bool)
    return Proposals(boxes, torch.ones(boxes.shape[:2]), there)


def test_annotated_boxes_are_the_first_regions():
    """They are their own, even where another box is their equal; then proposals by overlap."""
    objects = [
        plain.instances((64, 96), [[8, 8, 40, 40], [8, 8, 40, 40], [50, 8, 90, 60]], [1, 2, 3])
    ]
    padded = pad_objects(objects, torch.device("cpu"))
    proposals = given_proposals([[0, 0, 5, 5], [50, 8, 88, 60], [8, 8, 40, 39], [60, 0, 70, 9]])
    regions = head(samples=None).sample(proposals, padded)
    assert regions.labels[0].tolist() == [1, 2, 3, 3, 1, 5, 5]
    assert regions.matched[0].tolist() == [0, 1, 2, 2, 0, 0, 0]
    assert regions.positive[0].tolist() == [True] * 5 + [False] * 2
    assert regions.there.all()
    assert torch.equal(regions.boxes[0, 3], proposals.boxes[0, 1])
    assert torch.equal(regions.boxes[0, 5:], proposals.boxes[0, [0, 3]])
    assert torch.equal(regions.targets[0, 3], padded.boxes[0, 2])
    few = head(samples=4, positive_share=0.5, random_sampling=False).sample(proposals, padded)
    assert few.labels[0].tolist() == [1, 2, 5, 5]


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_of_regions_equal_a_loop(agnostic):
    made, (maps, objects) = head(class_agnostic=agnostic, samples=None), random_case((4, 0))
    losses, candidates = made.losses(maps, objects)
    with torch.no_grad():
        padded = pad_objects(objects, torch.device("cpu"))
        regions = made.sample(made.rpn.losses(maps, padded)[1], padded)
        pooled = made.pool(maps, regions.boxes)
        logits, deltas = made.predict(pooled)
    there, positive = regions.there.flatten(), regions.positive.flatten()
    labels, number = regions.labels.flatten(), int(there.sum())
    boxes, targets = regions.boxes.flatten(0, 1), regions.targets.flatten(0, 1)
    overlap = 0.0
    for r in positive.nonzero()[:, 0].tolist():
        own = deltas[r] if agnostic else deltas[r].view(-1, 4)[labels[r]]
        decoded = plain.decode(boxes[r].tolist(), own.tolist(), (0.1, 0.1, 0.2, 0.2))
        overlap += 1 - plain.giou(decoded, targets[r].tolist())
    entropy = F.cross_entropy(logits[there], labels[there], reduction="sum")
    assert losses["loss_cls"].item() == pytest.approx(entropy.item() / number, rel=1e-4)
    assert losses["loss_bbox"].item() == pytest.approx(10 * overlap / number, rel=1e-4)
    fewest = int(regions.there.sum(dim=1).min())
    assert candidates.usable.sum(dim=1).tolist() == [fewest, fewest]
    means = pooled.view(2, -1, *pooled.shape[1:])[0, 3].mean(dim=(1, 2))
    torch.testing.assert_close(candidates.features[0, 3], means)
    assert torch.equal(candidates.labels, regions.labels)


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_every_parameter_gets_a_gradient(counts):
    made, (maps, objects) = head(), random_case(counts)
    _, candidates, found = plain.gradients(made, maps, objects)
    assert all(each is not None and each.isfinite().all() for each in found)
    assert not candidates.boxes.requires_grad  # proposals are detached
    assert candidates.features.requires_grad


def test_waits_for_the_device(monkeypatch):
    """For what suppression leaves, and for how many regions each level has: whatever the batch."""
    reads, tolist = [], torch.Tensor.tolist
    made = head()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    for images in (1, 2):
        reads.clear()
        maps, objects = random_case()
        made.losses([each[:images] for each in maps], objects[:images])
        assert len(reads) == 1


def test_a_head_with_convolutions():
    """That of the vision transformer: four convolutions with group norm, one linear layer."""
    made = tiny.rcnn(convs=4, fcs=1, class_agnostic=True)
    names = {name for name, _ in made.box_head.named_parameters()}
    assert {"conv4.weight", "conv4.norm.weight", "fc1.weight"} <= names
    assert "fc2.weight" not in names
    assert "conv1.bias" not in names
    assert made.boxes.weight.shape == (4, 32)


def test_yaml_defaults_are_the_constructors():
    settings = {"channels": 32, "strides": (8, 16, 32, 64, 128), "num_classes": 3}
    for name in ("faster_rcnn", "atss"):
        theirs = inspect.signature(HEADS[name]).parameters
        given = HEADS[name].from_config(get_cfg(), **settings)
        for key, value in given.items():
            if key not in {*settings, "rpn"}:
                default = theirs[key].default
                assert value == (list(default) if isinstance(value, list) else default), key
    from_yaml = HEADS["faster_rcnn"](get_cfg(), **settings).rpn
    usual = ProposalNetwork(channels=32, strides=settings["strides"])
    for key in ("train_limits", "test_limits", "class_weight", "box_weight"):
        assert getattr(from_yaml, key) == getattr(usual, key), key
    assert vars(from_yaml.sampler) == vars(usual.sampler)
