"""Anchors, their assignment and sampling: the recorded cases, and loops over boxes."""

import functools
import math
import statistics

import numpy as np
import pytest
import torch

from codetr.heads import objects as objects_module
from codetr.heads.anchors import CellAnchors, inside_images, octaves
from codetr.heads.assignment import ATSSAssigner, IoUAssigner
from codetr.heads.boxes import BoxCoder, clip
from codetr.heads.objects import pad_objects, paired_iou
from codetr.heads.sampling import Sampler
from tests.modeling.detr import recorded
from tests.projects.codetr import plain

STRIDES = (8, 16, 32, 64, 128)
SIZES = [(192, 256), (160, 208), (190, 100)]
there = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


def maps(images=2):
    return [torch.zeros(images, 1, -(-192 // s), -(-256 // s)) for s in STRIDES]


def nine():
    return CellAnchors(strides=STRIDES, scales=octaves(4.0, 3), ratios=(0.5, 1.0, 2.0))


@functools.cache
def units():
    return np.load(recorded.UNITS)


def recorded_objects():
    file = units()
    given = [
        plain.instances(SIZES[i], file[f"atss_gt_box{i}"], file[f"atss_gt_label{i}"])
        for i in (0, 1)
    ]
    return pad_objects(given, torch.device("cpu"))


@there
def test_anchors_are_the_recorded_ones():
    cell = next(iter(nine().cell_anchors))
    assert recorded.error(cell, units()["rpn_cell_anchors_stride8"]) < 1e-5
    levels = CellAnchors(strides=STRIDES).of(maps())
    first = torch.stack([level[0] for level in levels])
    assert recorded.error(first, units()["atss_anchor_first"]) == 0
    inside = inside_images(maps(), STRIDES, torch.tensor(SIZES[:2]).float())
    parts = inside.split([len(level) for level in levels], dim=1)
    counts = torch.stack([part.sum(dim=1) for part in parts], dim=1)
    assert (counts.numpy() == units()["atss_valid_counts"]).all()


@there
@pytest.mark.parametrize(
    ("name", "stds"), [("delta_decode", (0.1, 0.1, 0.2, 0.2)), ("delta_decode_rpn", (1.0,) * 4)]
)
def test_boxes_are_decoded_as_recorded(name, stds):
    boxes = torch.from_numpy(units()["nms_in_box"][:30])
    deltas = torch.randn(30, 4, generator=torch.Generator().manual_seed(21)) * 3
    found = clip(BoxCoder(stds=stds).decode(boxes, deltas), torch.tensor([256.0, 192, 256, 192]))
    assert recorded.error(found, units()[name]) < 5e-5


def test_encoding_is_the_inverse_of_decoding():
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, generator=draw) * 100
    boxes, targets = torch.cat(
        [corners, corners + 1 + 50 * torch.rand(2, 50, 2, generator=draw)], 2
    )
    coder = BoxCoder(stds=(0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(coder.decode(boxes, coder.encode(boxes, targets)), targets)


@there
def test_atss_is_the_recorded_one():
    objects = recorded_objects()
    inside = inside_images(maps(), STRIDES, objects.sizes)
    found = ATSSAssigner()(CellAnchors(strides=STRIDES).of(maps()), inside, objects)
    for i in (0, 1):
        positive = found.positive[i].numpy()
        assert (positive.nonzero()[0] == units()[f"atss_pos_index{i}"]).all()
        assert (found.matched[i].numpy()[positive] == units()[f"atss_pos_gt{i}"]).all()
    assert torch.equal(found.negative, inside & ~found.positive)


@there
def test_the_rpn_assigns_as_recorded():
    objects = recorded_objects()
    inside = inside_images(maps(), STRIDES, objects.sizes, per_cell=9)
    assigner = IoUAssigner(positive=0.7, negative=0.3, claim=0.3)
    found = assigner(torch.cat(nine().of(maps())), inside, objects)
    positive, negative = found.positive[1].numpy(), found.negative[1].numpy()
    assert (positive.nonzero()[0] == units()["rpn_assign1_pos_index"]).all()
    assert (found.matched[1].numpy()[positive] == units()["rpn_assign1_pos_gt"]).all()
    valid = inside[1].numpy()
    ignored = valid & ~positive & ~negative
    counts = [int(mask.sum()) for mask in (~valid, ignored, negative, positive)]
    assert counts == units()["rpn_assign1_counts_invalid_ignore_neg_pos"].tolist()


# ------------------------------------------------ loops


def by_loop_iou(anchors, valid, boxes, *, positive, negative, claim):
    """(anchor -> its object, negatives), one after the other."""
    owner, negatives = {}, set()
    for a, anchor in enumerate(anchors):
        if not valid[a]:
            continue
        overlaps = [plain.iou(anchor, box) for box in boxes]
        best = max(overlaps, default=-1.0)
        if best >= positive:
            owner[a] = overlaps.index(best)
        elif best < negative:
            negatives.add(a)
    if claim is not None:
        for g, box in enumerate(boxes):
            overlaps = [plain.iou(x, box) if valid[a] else -1.0 for a, x in enumerate(anchors)]
            best = max(overlaps)
            if best >= claim and best > 0:
                for a, value in enumerate(overlaps):
                    if value == best:
                        owner[a] = g
    return owner, negatives - set(owner)


def by_loop_atss(levels, valid, boxes):
    owner, overlap = {}, {}
    for g, box in enumerate(boxes):
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, first = [], 0
        for level in levels:
            places = []
            for k, anchor in enumerate(level):
                if valid[first + k]:
                    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
                    places.append((math.dist(centre, (x, y)), first + k, x, y, anchor))
            candidates += sorted(places)[:9]
            first += len(level)
        overlaps = [plain.iou(each[4], box) for each in candidates]
        limit = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for value, (_, a, x, y, _) in zip(overlaps, candidates):
            sides = (x - box[0], y - box[1], box[2] - x, box[3] - y)
            if value >= limit and min(sides) > 0.01 and value > overlap.get(a, -1.0):
                owner[a], overlap[a] = g, value
    return owner


def compare(found, image, owner, negatives):
    positive = found.positive[image].nonzero()[:, 0].tolist()
    assert {a: int(found.matched[image, a]) for a in positive} == owner
    assert set(found.negative[image].nonzero()[:, 0].tolist()) == negatives


@pytest.fixture(params=[2**24, 6000], ids=["at_once", "in_slices"])
def slices(request, monkeypatch):
    monkeypatch.setattr(objects_module, "_ELEMENTS", request.param)


@pytest.mark.parametrize("claim", [None, 0.0, 0.3])
def test_largest_overlaps_equal_a_loop(slices, claim):
    given = plain.random_instances(3, SIZES, (12, 0, 5), num_classes=4)
    objects = pad_objects(given, torch.device("cpu"))
    strides = STRIDES[1:4]
    few = [torch.zeros(3, 1, -(-192 // s), -(-256 // s)) for s in strides]
    generator = CellAnchors(strides=strides, scales=(4.0, 6.0), ratios=(0.25, 4.0))  # whole sides
    anchors = torch.cat(generator.of(few))
    inside = inside_images(few, strides, objects.sizes, per_cell=4)
    settings = {"positive": 0.5, "negative": 0.3, "claim": claim}
    found = IoUAssigner(**settings)(anchors, inside, objects)
    for image, each in enumerate(given):
        boxes = each.gt_boxes.tensor.tolist()
        owner, negatives = by_loop_iou(anchors.tolist(), inside[image], boxes, **settings)
        compare(found, image, owner, negatives)
    assert found.positive[0].sum() > 5


def test_atss_equals_a_loop(slices):
    given = plain.random_instances(4, SIZES, (20, 0, 3), num_classes=4)
    objects = pad_objects(given, torch.device("cpu"))
    levels = CellAnchors(strides=STRIDES).of(maps())
    inside = inside_images(maps(), STRIDES, objects.sizes)
    found = ATSSAssigner()(levels, inside, objects)
    lists = [level.tolist() for level in levels]
    for image, each in enumerate(given):
        owner = by_loop_atss(lists, inside[image].tolist(), each.gt_boxes.tensor.tolist())
        negatives = set(inside[image].nonzero()[:, 0].tolist()) - set(owner)
        compare(found, image, owner, negatives)
    assert found.positive[0].sum() > 20


def test_a_claimed_anchor_belongs_to_the_last_claimant():
    """Both boxes overlap the one anchor most; by the largest overlap it would be the first's."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    given = [plain.instances((64, 64), [[0, 0, 10, 8], [0, 0, 10, 5]], [1, 2])]
    objects = pad_objects(given, torch.device("cpu"))
    inside = torch.ones(1, 2, dtype=torch.bool)
    found = IoUAssigner(positive=0.7, negative=0.3, claim=0.3)(anchors, inside, objects)
    assert found.positive.tolist() == [[True, False]]
    assert found.matched[0, 0] == 1
    found = IoUAssigner(positive=0.7, negative=0.3, claim=0.6)(anchors, inside, objects)
    assert found.matched[0, 0] == 0


def test_overlap():
    draw = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 40, 2, generator=draw) * 50
    ours, theirs = torch.cat([corners, corners + torch.rand(2, 40, 2, generator=draw) * 40], dim=2)
    found = paired_iou(ours, theirs)
    for value, a, b in zip(found.tolist(), ours.tolist(), theirs.tolist()):
        assert value == pytest.approx(plain.iou(a, b), abs=1e-6)
    nothing = torch.zeros(1, 4)
    assert paired_iou(nothing, nothing).item() == 0


# ------------------------------------------------ samples


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("positives", [0, 5, 200])
def test_samples(random, positives):
    torch.manual_seed(0)
    positive = torch.zeros(2, 1000, dtype=torch.bool)
    positive[0, 100 : 100 + positives] = True
    negative = ~positive
    negative[:, 900:] = False
    found = Sampler(samples=64, positive_share=0.25, random=random)(positive, negative)
    assert not (found[0] & ~positive).any()
    assert not (found[1] & ~negative).any()
    most = min(positives, 16)
    assert found[0].sum(dim=1).tolist() == [most, 0]
    assert found[1].sum(dim=1).tolist() == [64 - most, 64]
    first = found[0][0].nonzero()[:, 0].tolist() == list(range(100, 100 + most))
    assert first == (not random or positives < 200)
    assert (found[1][1].nonzero()[:, 0].tolist() == list(range(64))) == (not random)


def test_all_samples():
    positive = torch.rand(2, 50) < 0.3
    found = Sampler(samples=None)(positive, ~positive)
    assert torch.equal(found[0], positive)
    assert torch.equal(found[1], ~positive)
