"""Federated data: which classes have a loss in the auxiliary heads."""

import pytest
import torch
from torch import nn

from codetr.heads import HEADS
from codetr.heads.objects import pad_objects
from d2dense.config.defaults import get_cfg
from d2dense.modeling.detr import parts
from tests.projects.codetr import plain
from tests.projects.codetr.tiny import CLASSES, STRIDES, detector, inputs, rcnn

SIZE = (96, 128)
SETTINGS = {"channels": 32, "strides": (*STRIDES, 32), "num_classes": CLASSES}
DENSE = ["atss", "retinanet", "fcos", "paa", "gfl"]
# what occurs in the images below; class 3 is drawn beside it
OCCURS, COUNTED = [1, 4], [1, 3, 4]


class Given(nn.Module):
    """Lets class 3 count beside those that occur, and remembers these."""

    def forward(self, occur):
        self.occur = occur
        return occur | (torch.arange(CLASSES) == 3)


def head_of(name):
    torch.manual_seed(0)
    head = HEADS[name](**SETTINGS)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.05)
    return head


def case():
    boxes = [[10.0, 10, 60, 70], [50, 20, 120, 90]]
    maps = plain.random_maps(1, SIZE, SETTINGS["strides"], images=2, channels=32)
    objects = [
        plain.instances(SIZE, boxes, [4, 1]),
        plain.instances(SIZE, boxes[:1], [4]),  # padded with a row of class 0
    ]
    return maps, objects


@pytest.mark.parametrize("name", DENSE)
def test_dense_heads_learn_only_classes_that_count(name):
    """The gradient of each class's output: that of the whole loss, or none."""
    maps, objects = case()
    head = head_of(name)
    found = []
    for federated in (None, Given()):
        head.federated = federated
        head.zero_grad()
        losses, candidates = head.losses(maps, objects)
        losses["loss_cls"].backward()
        layer = getattr(head, "classes", None) or head.layers.cls_score
        found.append((layer.bias.grad.view(-1, CLASSES).sum(dim=0), losses, candidates))
    assert head.federated.occur.nonzero()[:, 0].tolist() == OCCURS
    (whole, before, _), (some, after, candidates) = found
    others = [c for c in range(CLASSES) if c not in COUNTED]
    assert torch.allclose(some[COUNTED], whole[COUNTED])
    assert whole[others].abs().min() > 0
    assert not some[others].any()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "loss_cls")
    assert set(candidates.labels[candidates.labels < CLASSES].tolist()) <= set(OCCURS)


def test_softmax_of_classes_that_count_and_the_background():
    head = rcnn()
    objects = pad_objects(case()[1], torch.device("cpu"))
    logits = torch.randn(7, CLASSES + 1)
    assert head.counting(logits, objects) is logits
    head.federated = Given()
    probabilities = head.counting(logits, objects).softmax(dim=1)
    expected = torch.zeros(7, CLASSES + 1)
    kept = [*COUNTED, CLASSES]
    expected[:, kept] = logits[:, kept].softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)


def test_faster_rcnn_learns_only_classes_that_count():
    torch.manual_seed(0)
    head = rcnn()
    head.federated = Given()
    losses, _ = head.losses(*case())
    assert all(loss.isfinite() for loss in losses.values())
    losses["loss_cls"].backward()
    learns = head.classes.bias.grad != 0
    assert learns.nonzero()[:, 0].tolist() == [*COUNTED, CLASSES]


def test_no_objects_at_all():
    maps, _ = case()
    for name in DENSE:
        head = head_of(name)
        head.federated = Given()
        losses, _ = head.losses(maps, [plain.instances(SIZE, [], [])] * 2)
        assert not head.federated.occur.any()
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("heads", [True, False])
def test_the_detector_hands_its_own_on(heads):
    model = detector()
    federated = Given()
    arguments = {**model._modules, "num_classes": CLASSES}
    model.criterion.federated = federated
    other = type(model)(
        **{k: arguments[k] for k in ("backbone", "encoder", "queries", "decoder", "heads")},
        neck=None,
        in_features=model.in_features,
        criterion=model.criterion,
        num_classes=CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[60.0] * 3,
        adapter=model.adapter,
        auxiliary_heads=list(model.auxiliary_heads),
        positive_queries=model.positive_queries,
        federated_heads=heads,
    )
    given = [head.federated for head in other.auxiliary_heads]
    assert given == [federated if heads else None] * 2
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(loss.isfinite() for loss in other.train()(inputs()).values())


def test_yaml_keys():
    node = get_cfg().MODEL.DETR
    node.NUM_CLASSES = 1203
    node.FEDERATED.update(ENABLED=True, CLASSES=40, POWER=1.0)
    criterion = parts.criterion(node, ["lvis_v1_train"])
    node.FEDERATED.POWER = 0.5
    half = parts.criterion(node, ["lvis_v1_train"])
    assert criterion.federated.number == 40
    torch.testing.assert_close(criterion.federated.log_weights, 2 * half.federated.log_weights)
    node.FEDERATED.ENABLED = False
    assert parts.criterion(node, ["lvis_v1_train"]).federated is None
