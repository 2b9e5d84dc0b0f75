"""Customised positive queries: which candidates are chosen, and what queries are made of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from codetr import Candidates, PositiveQueries
from codetr.positive_queries import Selected, select
from d2dense.modeling.detr import Queries
from d2dense.modeling.detr.queries import join
from tests.modeling.waiting import OpCounter

CLASSES, WIDTH = 5, 8
SIZES = torch.tensor([[[100.0, 50.0, 100.0, 50.0]], [[80.0, 40.0, 80.0, 40.0]]])


def candidates(positives, *, count=40, unusable=(), rows=None, seed=0) -> Candidates:
    """Candidates of two images, ``positives`` are their places."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.full((2, count), CLASSES)
    usable = torch.ones(2, count, dtype=torch.bool)
    for image, places in enumerate(positives):
        labels[image, list(places)] = torch.randint(CLASSES, (len(places),), generator=draw)
    usable[:, list(unusable)] = False
    corners, sides = torch.rand(2, 2, count, 2, generator=draw) * 30
    boxes = torch.cat([corners, corners + sides], dim=2)
    features = torch.randn(2, count if rows is None else 7, WIDTH, generator=draw)
    return Candidates(boxes, labels, boxes.flip(1), usable, features.requires_grad_(), rows)


def chosen(found: Selected, given: Candidates, image: int) -> list[int]:
    """The candidates that queries were made of, found by their boxes."""
    pixels = found.boxes[image] * SIZES[image]
    centres = (given.boxes[image][:, :2] + given.boxes[image][:, 2:]) / 2
    distance = (pixels[:, None, :2] - centres).abs().sum(dim=2)
    assert (distance.amin(dim=1)[found.there[image]] < 1e-4).all()
    return distance.argmin(dim=1)[found.there[image]].tolist()


def expected_choice(labels, usable, count) -> list[int]:
    """First positives, then negatives, each in their order."""
    places = [a for a in range(len(labels)) if usable[a]]
    positives = [a for a in places if labels[a] != CLASSES][:count]
    negatives = [a for a in places if labels[a] == CLASSES]
    return positives + negatives[: count - len(positives)]


@pytest.mark.parametrize(
    ("positives", "most", "count"),
    [
        ((range(3, 8), [1]), 300, 9),  # at least nine
        ((range(5, 25), [0, 39]), 300, 20),  # as many as the image with the most
        ((range(5, 35), [7]), 12, 12),  # no more than the limit
        (([], []), 300, 9),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_the_choice(positives, most, count, random):
    given = candidates(positives, unusable=(2, 36))
    (found,) = select([given], SIZES, num_classes=CLASSES, most=most, random=random)
    assert found.boxes.shape == (2, count, 4)
    assert found.full
    assert found.there.all()
    for image in (0, 1):
        labels, usable = given.labels[image].tolist(), given.usable[image].tolist()
        expected = expected_choice(labels, usable, count)
        picked = chosen(found, given, image)
        if random:
            assert len(set(picked)) == count
            assert all(usable[a] for a in picked)
            kinds = [sum(labels[a] != CLASSES for a in each) for each in (picked, expected)]
            assert kinds[0] == kinds[1]
        else:
            assert picked == expected
        assert found.labels[image].tolist() == [labels[a] for a in picked]
        assert found.positive[image].tolist() == [labels[a] != CLASSES for a in picked]
        assert torch.equal(found.features[image], given.features[image, picked])
        x0, y0, x1, y1 = (given.targets[image, picked] / SIZES[image]).unbind(1)
        target = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
        torch.testing.assert_close(found.targets[image], target)


def test_the_choice_is_by_chance():
    given = candidates((range(20), range(20)))
    picks = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        (found,) = select([given], SIZES, num_classes=CLASSES, most=10)
        picks.append(chosen(found, given, 0))
    assert picks[0] == picks[2] != picks[1]


@pytest.mark.parametrize("negatives", [True, False])
def test_filling(negatives):
    """Where candidates are too few, or negatives are not wanted."""
    given = candidates(([2, 3], [1, 4, 5]), count=7, unusable=(6,))
    settings = {"num_classes": CLASSES, "random": False, "negatives": negatives}
    (found,) = select([given], SIZES, **settings)
    assert found.boxes.shape == (2, 9, 4)
    assert not found.full
    numbers = [6, 6] if negatives else [2, 3]
    assert found.there.sum(dim=1).tolist() == numbers
    assert found.positive.sum(dim=1).tolist() == [2, 3]
    assert not found.positive[~found.there].any()
    assert (found.boxes[~found.there] == 0).all()
    assert (found.features[~found.there] == 0).all()


def test_candidates_share_features():
    rows = torch.arange(40) // 6
    given = candidates(([1, 8], [30]), rows=rows)
    (found,) = select([given], SIZES, num_classes=CLASSES, random=False)
    for image in (0, 1):
        picked = chosen(found, given, image)
        assert torch.equal(found.features[image], given.features[image, rows[picked]])


def test_one_wait_for_all_heads(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    heads = [candidates((range(k), [1]), seed=k) for k in (1, 5, 12)]
    with OpCounter() as ops:
        select(heads, SIZES, num_classes=CLASSES)
    assert len(reads) == 1
    assert ops.waiting == 0


# ------------------------------------------------ queries


def selected(count=4, seed=0, missing=()) -> Selected:
    draw = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, count, 4, generator=draw) * 1.4 - 0.2  # some leave the image
    features = torch.randn(2, count, 8, generator=draw)
    there = torch.ones(2, count, dtype=torch.bool)
    there[1, list(missing)] = False
    labels = torch.zeros(2, count, dtype=torch.int64)
    return Selected(boxes, labels, boxes, there, there, features, not missing)


def encoded(boxes, width):
    """Sines and cosines of x, y, w and h, number by number."""
    result = []
    for box in boxes.reshape(-1, 4).tolist():
        row = []
        for value in box:
            value = min(max(value, 0.0), 1.0)
            odds = max(value, 1e-5) / max(1 - value, 1e-5)
            value = odds / (1 + odds)
            for i in range(width):
                angle = value * 2 * math.pi / 10000 ** (2 * (i // 2) / width)
                row.append(math.cos(angle) if i % 2 else math.sin(angle))
        result.append(row)
    return torch.tensor(result).view(*boxes.shape[:2], -1)


@pytest.mark.parametrize("embedding", ["channels", "scalar", "none"])
def test_queries_of_deformable_detr(embedding):
    torch.manual_seed(0)
    module = PositiveQueries(heads=2, channels=8, head_embedding=embedding)
    assert module.head_embedding is None or module.head_embedding.shape == (
        2,
        8 if embedding == "channels" else 1,
    )
    both = [selected(seed=0), selected(seed=1)]
    for head, (given, found) in enumerate(zip(both, module(both))):
        part = module.embeddings[head]
        z = F.linear(encoded(given.boxes, 4), part.linear.weight, part.linear.bias)
        z = F.layer_norm(z, (16,), part.norm.weight, part.norm.bias)
        added = 0 if embedding == "none" else module.head_embedding[head]
        linear, norm = module.features[head]
        feature = F.linear(given.features, linear.weight, linear.bias)
        feature = F.layer_norm(feature, (8,), norm.weight, norm.bias)
        torch.testing.assert_close(found.position, z[..., :8] + added, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.content, z[..., 8:] + feature, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.references, given.boxes)
        assert found.mask is None


def test_queries_of_dino():
    module = PositiveQueries(heads=1, channels=8, positions=False, features=False)
    given = selected()
    (found,) = module([given])
    part = module.embeddings[0]
    expected = F.linear(encoded(given.boxes, 4), part.linear.weight, part.linear.bias)
    expected = F.layer_norm(expected, (8,), part.norm.weight, part.norm.bias)
    torch.testing.assert_close(found.content, expected, rtol=1e-4, atol=1e-5)
    assert found.position is None
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"embeddings"}


@pytest.mark.parametrize("embedding", ["channels", "scalar"])
def test_one_head(embedding):
    module = PositiveQueries(heads=1, channels=8, head_embedding=embedding)
    assert len(module([selected()])) == 1


def test_nobody_hears_filling():
    module = PositiveQueries(heads=1, channels=8)
    (found,) = module([selected(missing=(2, 3))])
    blocked = torch.zeros(2, 4, 4, dtype=torch.bool)
    blocked[1, :, 2:] = True
    blocked[1, [2, 3], [2, 3]] = False  # somebody must be heard
    assert torch.equal(found.mask, blocked)


@pytest.mark.parametrize("masked", [False, True])
def test_groups_do_not_hear_each_other(masked):
    def group(count, mask):
        return Queries(torch.randn(2, count, 8), None, torch.rand(2, count, 4), mask)

    own = torch.rand(2, 3, 3) < 0.5 if masked else None
    found = join([group(3, own), group(2, None)])
    assert found.content.shape == (2, 5, 8)
    expected = torch.ones(2, 5, 5, dtype=torch.bool)
    expected[:, :3, :3] = False if own is None else own
    expected[:, 3:, 3:] = False
    assert torch.equal(found.mask.expand(2, -1, -1), expected)
