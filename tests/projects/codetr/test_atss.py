"""The ATSS head against loops over anchors."""

import math

import pytest
import torch

from codetr import ATSSHead
from codetr.heads.anchors import inside_images
from codetr.heads.objects import pad_objects
from tests.modeling.waiting import OpCounter
from tests.projects.codetr import plain

SIZES = [(192, 256), (160, 208), (190, 100)]
STRIDES = (8, 16, 32, 64, 128)
CLASSES = 4
STDS = (0.1, 0.1, 0.2, 0.2)


def head(**settings) -> ATSSHead:
    torch.manual_seed(0)
    made = ATSSHead(channels=32, num_classes=CLASSES, strides=STRIDES, **settings)
    for parameter in made.parameters():  # scores and boxes far from those of the start
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 0), std=0.1)
    return made


def random_case(counts=(7, 0, 12)):
    maps = plain.random_maps(1, SIZES[0], STRIDES, images=3, channels=32)
    return maps, plain.random_instances(2, SIZES, counts, num_classes=CLASSES)


def flat(levels) -> list:
    """Outputs of all levels by image and anchor."""
    return torch.cat([each.flatten(2).transpose(1, 2) for each in levels], dim=1).tolist()


def centre_rating(anchor, box) -> float:
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    across, down = (x - box[0], box[2] - x), (y - box[1], box[3] - y)
    return math.sqrt(min(across) / max(across) * min(down) / max(down))


def test_losses_equal_a_loop():
    made, (maps, objects) = head(), random_case()
    losses, found = made.losses(maps, objects)
    padded = pad_objects(objects, torch.device("cpu"))
    inside = inside_images(maps, STRIDES, padded.sizes)
    assigned = made.assigner(made.anchors.of(maps), inside, padded)
    logits, deltas, ratings = (flat(each) for each in made.predict(maps))
    anchors = [place[3] for place in plain.grid(maps, STRIDES)]
    number = rated = classes = overlap = centred = 0.0
    for image, each in enumerate(objects):
        boxes = each.gt_boxes.tensor.tolist()
        number += max(1, int(assigned.positive[image].sum()))
        for a, anchor in enumerate(anchors):
            if not inside[image, a]:
                assert found.labels[image, a] == CLASSES
                assert found.boxes[image, a].tolist() == [0, 0, 0, 0]
                continue
            assert found.boxes[image, a].tolist() == pytest.approx(anchor)
            label = CLASSES
            if assigned.positive[image, a]:
                owner = int(assigned.matched[image, a])
                label, box = int(each.gt_classes[owner]), boxes[owner]
                rating = centre_rating(anchor, box)
                decoded = plain.decode(anchor, deltas[image][a], STDS)
                rated += rating
                overlap += rating * (1 - plain.giou(decoded, box))
                centred += plain.bce(ratings[image][a][0], rating)
                assert found.targets[image, a].tolist() == pytest.approx(box)
            classes += plain.focal(logits[image][a], label)
            assert found.labels[image, a] == label
    assert rated > 1
    expected = {
        "loss_cls": classes / number,
        "loss_bbox": 2 * overlap / rated,
        "loss_centerness": centred / number,
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert found.usable.all()
    cells = [each.flatten(2).transpose(1, 2) for each in maps]
    assert torch.equal(found.features, torch.cat(cells, dim=1))


def test_weights():
    maps, objects = random_case()
    usual, _ = head().losses(maps, objects)
    weights = {"class_weight": 3.0, "giou_weight": 4.0, "centerness_weight": 5.0}
    found, _ = head(**weights).losses(maps, objects)
    for name, factor in (("loss_cls", 3), ("loss_bbox", 2), ("loss_centerness", 5)):
        torch.testing.assert_close(found[name], factor * usual[name])


@pytest.mark.parametrize("counts", [(3, 2, 5), (0, 0, 0)])
def test_every_parameter_gets_a_gradient(counts):
    made, (maps, objects) = head(), random_case(counts)
    _, _, found = plain.gradients(made, maps, objects)
    assert all(each is not None and each.isfinite().all() for each in found)


def test_losses_never_wait_for_the_device():
    made, (maps, objects) = head(), random_case()
    with OpCounter() as ops:
        losses, _ = made.losses(maps, objects)
        sum(losses.values()).backward()
    assert ops.waiting == 0


@torch.no_grad()
def test_detections_equal_a_loop():
    """Pairs of anchor and class, the best of each level, suppressed within a class."""
    limits = {"candidates_per_level": 40, "max_detections": 12, "score_threshold": 0.3}
    made, (maps, _) = head(**limits), random_case()
    found = made.detect(maps, SIZES)
    outputs = made.predict(maps)
    logits, deltas, ratings = (flat(each) for each in outputs)
    places = plain.grid(maps, STRIDES)
    for image, (height, width) in enumerate(SIZES):
        pairs = []
        for level in range(len(STRIDES)):
            of_level = [
                (plain.sigmoid(logit), a, label)
                for a, place in enumerate(places)
                if place[0] == level
                for label, logit in enumerate(logits[image][a])
            ]
            pairs += [each for each in sorted(of_level, reverse=True)[:40] if each[0] > 0.3]
        scored = []
        for score, a, label in pairs:
            box = plain.decode(places[a][3], deltas[image][a], STDS)
            box = [min(max(x, 0.0), side) for x, side in zip(box, [width, height] * 2)]
            scored.append((score * plain.sigmoid(ratings[image][a][0]), label, box))
        kept = []
        for score, label, box in sorted(scored, reverse=True):
            if all(label != other[1] or plain.iou(box, other[2]) <= 0.6 for other in kept):
                kept.append((score, label, box))
        kept = kept[:12]
        assert found[image].image_size == (height, width)
        assert len(found[image]) == len(kept) > 0
        assert found[image].scores.tolist() == pytest.approx([k[0] for k in kept], rel=1e-4)
        assert found[image].pred_classes.tolist() == [k[1] for k in kept]
        boxes = torch.tensor([k[2] for k in kept])
        torch.testing.assert_close(found[image].pred_boxes.tensor, boxes, rtol=1e-3, atol=1e-3)
