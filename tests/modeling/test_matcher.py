"""The anchor matcher against Detectron2's, and against loops."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher

from d2dense.errors import UserError
from d2dense.modeling import AnchorMatcher
from tests.modeling.waiting import OpCounter


def random_iou(boxes: int, anchors: int, seed: int = 0) -> torch.Tensor:
    """Few distinct values, hence ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (boxes, anchors), generator=generator) / 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low", ["best", "none"])
@pytest.mark.parametrize(
    ("thresholds", "labels"), [([0.4, 0.5], [0, -1, 1]), ([0.5], [0, 1]), ([0.3, 0.7], [0, -1, 1])]
)
def test_equals_detectron2s(seed, low, thresholds, labels):
    iou = random_iou(4, 30, seed)
    theirs = Matcher(thresholds, labels, allow_low_quality_matches=low == "best")(iou)
    ours = AnchorMatcher(thresholds=thresholds, labels=labels, low_quality_matches=low)(iou)
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("seed", range(5))
def test_own_gives_an_anchor_to_the_last_box_that_chose_it(seed):
    iou = random_iou(4, 30, seed)
    matches, labels = AnchorMatcher(low_quality_matches="own")(iou)
    for anchor, column in enumerate(iou.T.tolist()):
        box = column.index(max(column))
        label = 1 if max(column) >= 0.5 else -1 if max(column) >= 0.4 else 0
        for other in range(4):
            if column[other] == max(iou[other].tolist()) > 0:
                box, label = other, 1
        assert (matches[anchor], labels[anchor]) == (box, label)


def test_a_box_without_any_overlap_has_no_anchor():
    iou = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.6]])
    for low in ("best", "own"):
        _, labels = AnchorMatcher(low_quality_matches=low)(iou)
        assert labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape):
    matches, labels = AnchorMatcher()(torch.zeros(shape))
    assert matches.tolist() == labels.tolist() == [0] * shape[1]


def test_the_counter_sees_what_waits():
    x = torch.arange(4)
    with OpCounter() as counter:
        x[x > 1], x.nonzero(), x[torch.tensor([0])]
    assert counter.waiting == 2


def test_nothing_waits():
    for low in ("best", "own", "none"):
        with OpCounter() as counter:
            AnchorMatcher(low_quality_matches=low)(random_iou(4, 30))
        assert counter.total > 0
        assert counter.waiting == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low_quality_matches": "all"}, "LOW_QUALITY_MATCHES.*'all'; expected one of none, best"),
        ({"thresholds": [0.5, 0.4]}, "expected increasing ones"),
        ({"labels": [0, 1]}, "one label more"),
        ({"labels": [0, 2, 1]}, "expected -1, 0 and 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        AnchorMatcher(**arguments)
