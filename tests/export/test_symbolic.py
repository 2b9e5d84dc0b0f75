"""What stands in for Detectron2's functions while a graph is recorded computes what they do."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import rpn
from detectron2.structures import Boxes, ImageList

from d2dense.export import adapt
from d2dense.export.symbolic import symbolic_sizes
from d2dense.export.untrained import spread_outputs
from tests.export.exportable import picture, tiny_model

SIZES = [(96, 128), (65, 97), (40, 170)]


def both(function):
    """Return what ``function`` gives with Detectron2's functions and with the replacements."""
    with torch.no_grad():
        expected = function()
        with symbolic_sizes():
            return expected, function()


@pytest.mark.parametrize(
    "kind",
    [
        {"mask": True},
        {"mask": True, "heads": "StandardROIHeads"},
        {"heads": "CascadeROIHeads"},
        {"arch": "RetinaNet"},
        {"arch": "SemanticSegmentor"},
    ],
    ids=lambda kind: "-".join(map(str, kind.values())),
)
def test_models_give_the_same(kind):
    adapter = adapt(spread_outputs(tiny_model(**kind), picture(96, 128))).eval()
    for size in SIZES:
        image = picture(*size)
        expected, found = both(lambda image=image: adapter(image))
        assert expected[0].shape[0] > 0
        for a, b in zip(expected, found):
            assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ["GeneralizedRCNN", "RetinaNet"])
def test_nothing_found(arch):
    model = tiny_model(arch=arch)
    for part in model.modules():
        if hasattr(part, "test_score_thresh"):
            part.test_score_thresh = 1.1
    expected, found = both(lambda: adapt(model)(picture(96, 128)))
    assert [tuple(each.shape) for each in found] == [(0, 4), (0,), (0,)]
    assert [each.dtype for each in found] == [each.dtype for each in expected]


def test_proposals_that_are_not_finite_or_empty_are_dropped():
    torch.manual_seed(0)
    corners = torch.rand(1, 60, 2) * 80
    boxes = torch.cat([corners, corners + torch.rand(1, 60, 2) * 30], dim=2)
    boxes[0, 3, 1], boxes[0, 7] = float("inf"), torch.tensor([5.0, 5.0, 5.0, 9.0])
    scores = torch.randn(1, 60)
    scores[0, 11] = float("nan")

    def proposals():
        levels = [boxes[:, :40].clone(), boxes[:, 40:].clone()], [scores[:, :40], scores[:, 40:]]
        found = rpn.find_top_rpn_proposals(*levels, [(90, 100)], 0.5, 30, 25, 0.0, False)[0]
        return found.proposal_boxes.tensor, found.objectness_logits

    expected, found = both(proposals)
    assert 0 < len(expected[1]) <= 25
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_pooling_from_levels(count):
    torch.manual_seed(count)
    pooler = ROIPooler(3, [0.25, 0.125, 0.0625], 2, "ROIAlignV2", canonical_level=3)
    levels = [torch.randn(1, 2, 128 // 2**k, 160 // 2**k) for k in range(3)]
    corners = torch.rand(count, 2) * 300
    boxes = Boxes(torch.cat([corners, corners + torch.rand(count, 2) * 400 + 4], dim=1))
    expected, found = both(lambda: pooler(levels, [boxes]))
    assert found.shape == (count, 2, 3, 3)
    assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("divisor", "constraints"),
    [(0, None), (32, {}), (8, {"size_divisibility": 16}), (32, {"square_size": 128})],
)
def test_filling_up(divisor, constraints):
    image = torch.rand(3, 65, 97)

    def filled():
        batch = ImageList.from_tensors([image], divisor, 0.5, constraints)
        return batch.tensor, torch.tensor(batch.image_sizes)

    expected, found = both(filled)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_everything_is_put_back():
    before = ROIPooler.forward, Boxes.clip, ImageList.from_tensors
    with pytest.raises(KeyError), symbolic_sizes():
        raise KeyError
    assert (ROIPooler.forward, Boxes.clip, ImageList.from_tensors) == before
