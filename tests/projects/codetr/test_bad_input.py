"""Annotations and images that are unusual or wrong: one line, or a defined result, for every
detector of the family.
"""

from __future__ import annotations

import pytest
import torch

from codetr import nodes
from d2dense.errors import UserError
from d2dense.modeling.detr import DETRCriterion
from tests.projects.codetr import family

bases = pytest.mark.parametrize("base", family.BASES)
SIZE = (64, 96)


def train(model, batch):
    """The losses, after a backward pass without surprises."""
    losses = model(batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.isfinite(), name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return losses


def matched(model, batch, monkeypatch):
    """Boxes and labels of the queries of the last layer that got an object, and what losses are
    divided by.
    """
    calls, known = [], DETRCriterion.known_losses

    def noting(self, logits, boxes, **given):
        calls.append(given)
        return known(self, logits, boxes, **given)

    monkeypatch.setattr(DETRCriterion, "known_losses", noting)
    train(model, batch)
    main = calls[0]  # of the decoder's queries
    there = main["box_weights"][-1] > 0
    return main["targets"][-1][there], main["labels"][-1][there], float(main["number"])


@bases
def test_more_boxes_than_queries(base, monkeypatch):
    """All queries get an object, no object two, and the rest of them none."""
    steps = torch.arange(family.QUERIES + 15.0)
    boxes = torch.stack([steps, steps / 2, steps + 20, steps / 2 + 25], dim=1).tolist()
    model = family.detector(base, *family.PAIR)
    targets, labels, number = matched(model, [family.image(*SIZE, boxes)], monkeypatch)
    assert number == len(targets) == family.QUERIES
    assert len({tuple(each) for each in targets.tolist()}) == family.QUERIES
    assert (labels < family.CLASSES).all()


@bases
def test_duplicate_boxes(base, monkeypatch):
    """Each is an object of its own, with its own class."""
    boxes = [[10, 20, 60, 50]] * 5
    model = family.detector(base, *family.PAIR)
    batch = [family.image(*SIZE, boxes, [0, 1, 2, 2, 2])]
    targets, labels, number = matched(model, batch, monkeypatch)
    assert number == len(targets) == 5
    expected = torch.tensor([35 / 96, 35 / 64, 50 / 96, 30 / 64])
    torch.testing.assert_close(targets, expected.expand(5, -1))
    assert sorted(labels.tolist()) == [0, 1, 2, 2, 2]


@bases
def test_boxes_without_area(base, monkeypatch):
    """They are objects for the queries, and their other numbers are learned."""
    boxes = [[10, 20, 10, 50], [5, 5, 50, 5], [30, 30, 30, 30]]
    model = family.detector(base, *family.PAIR)
    targets, _, number = matched(model, [family.image(*SIZE, boxes)], monkeypatch)
    assert number == len(targets) == 3
    assert sorted(targets[:, 2].tolist()) == pytest.approx([0, 0, 45 / 96])


@bases
@pytest.mark.parametrize("label", [-1, family.CLASSES, 255])
@pytest.mark.parametrize("heads", [(), family.PAIR], ids=len)
def test_a_class_out_of_range(base, heads, label):
    """One line says which, what there is, and both keys; nothing is computed before."""
    model = family.detector(base, *heads)
    batch = [family.image(*SIZE, [[1, 2, 30, 40]]), family.image(*SIZE, [[1, 2, 30, 40]], [label])]
    with pytest.raises(UserError) as error:
        model(batch)
    message = str(error.value)
    assert f"class {label}," in message
    assert f"0 to {family.CLASSES - 1}" in message
    assert "MODEL.DETR.NUM_CLASSES" in message
    assert "model.num_classes" in message
    assert "\n" not in message


@pytest.mark.parametrize(("base", "heads"), family.SETS[1::2] + family.SETS[12:])
def test_one_class(base, heads):
    model = family.detector(base, *heads, classes=1)
    train(model, family.batch((3, 0), [SIZE, (40, 50)], classes=1))
    with torch.no_grad():
        found = model.eval()([family.image(*SIZE)])[0]["instances"]
    assert len(found) == family.QUERIES  # fewer pairs of query and class than asked for
    assert (found.pred_classes == 0).all()


SIZES = {
    "mixed": [(64, 96), (33, 128), (100, 17)],
    "tiny": [(1, 1), (3, 40)],
    "alone": [(1, 1)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@bases
def test_sizes(base, sizes):
    """Images of several sizes together, or of hardly a pixel: they train and are detected in."""
    model = family.detector(base, *family.PAIR)
    batch = [family.image(h, w, [[0, 0, w, h], [w / 4, h / 4, w / 2, h]]) for h, w in sizes]
    train(model, batch)
    with torch.no_grad():
        results = model.eval()(batch)
    for result, size in zip(results, sizes):
        found = result["instances"]
        assert found.image_size == size
        limits = torch.tensor([size[1], size[0]] * 2)
        assert (found.pred_boxes.tensor >= 0).all()
        assert (found.pred_boxes.tensor <= limits).all()
        assert found.scores.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nodes.dino(levels=3), "DINO with 3 levels; expected 4 or 5"),
        (lambda: nodes.swin("huge", drop_path=0.1), "Swin of size 'huge'; expected one of tiny, "),
    ],
    ids=["levels", "swin"],
)
def test_parts_of_configs(build, message):
    """What a lazy config may ask for and is not there is one line."""
    with pytest.raises(UserError, match=message):
        build()
