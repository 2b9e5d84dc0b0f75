"""Attention that positions get, against loops over queries, heads and points."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from scipy.optimize import linear_sum_assignment
from torch import nn

from d2dense import config
from d2dense.analyses.attention_maps import attention_levels, received_attention, record_reading
from d2dense.config import single_scale_detr
from d2dense.errors import UserError
from d2dense.layers import MultiScaleDeformableAttention
from d2dense.modeling.detr.conditional_attention import ConditionalCrossAttention
from tests.analyses.tiny import DETR, build, sample

SHAPES = [(4, 5), (2, 3)]
HEADS, POINTS = 2, 3


def spread(offsets, scores, references, shapes, queries, heads):
    """The maps of all levels by loops: bilinear weights of the four cells around each point.

    Args:
        offsets: (Q, heads * levels * points * 2), in pixels around points or for boxes
        scores: (Q, heads * levels * points), before the softmax
        references: (Q, levels, 2 or 4)
    """
    maps = [np.zeros(shape) for shape in shapes]
    points = scores.shape[1] // (heads * len(shapes))
    for query in queries:
        for head in range(heads):
            row = scores[query].reshape(heads, -1)[head]
            weights = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            places = offsets[query].reshape(heads, len(shapes), points, 2)[head]
            for level, (height, width) in enumerate(shapes):
                reference = references[query, level]
                for point in range(points):
                    x, y = places[level, point]
                    if len(reference) == 2:
                        x, y = reference[0] * width + x, reference[1] * height + y
                    else:
                        x = (reference[0] + x / points * reference[2] / 2) * width
                        y = (reference[1] + y / points * reference[3] / 2) * height
                    for i in range(height):
                        for j in range(width):
                            near = max(0, 1 - abs(y - i - 0.5)) * max(0, 1 - abs(x - j - 0.5))
                            maps[level][i, j] += near * weights[level * points + point]
    return maps


@pytest.mark.parametrize("size", [2, 4])
def test_deformable_attention_against_loops(size):
    attention = MultiScaleDeformableAttention(channels=8, heads=HEADS, levels=2, points=POINTS)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    count, total = 6, sum(h * w for h, w in SHAPES)
    query, values = torch.randn(1, count, 8), torch.randn(1, total, 8)
    references = torch.rand(1, count, 2, size) * 1.2 - 0.1  # some beyond the border
    padding = torch.zeros(1, total, dtype=torch.bool)
    padding[0, [4, 9, 14, 19, 22]] = True
    arguments = (query, references, values, SHAPES, padding)
    expected_result = attention(*arguments)  # with a graph too: without, sums round differently
    with record_reading([attention]) as (reading,):
        result = attention(*arguments)
    assert torch.equal(result, expected_result)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in attention.modules()
    )
    chosen = torch.tensor([True, False, True, True, False, False])
    found = received_attention(reading, chosen)
    maps = spread(
        attention.sampling_offsets(query)[0].detach().numpy(),
        attention.attention_weights(query)[0].detach().numpy(),
        references[0].numpy(),
        SHAPES,
        [0, 2, 3],
        HEADS,
    )
    expected = np.concatenate([each.flatten() for each in maps])
    expected[padding[0]] = 0
    assert expected.sum() < 3 * HEADS  # some attention is lost beyond the border
    np.testing.assert_allclose(found[0].detach().numpy(), expected, atol=1e-5)


def test_dense_attention_against_its_weights():
    attention = ConditionalCrossAttention(channels=8, heads=2, dropout=0.0)
    attention.requires_grad_(False)
    content, position, spatial = torch.randn(3, 1, 4, 8).unbind()
    tokens, positions = torch.randn(2, 1, 7, 8).unbind()
    padding = torch.tensor([[False] * 5 + [True] * 2])
    with record_reading([attention]) as (reading,):
        attention(content, position, spatial, tokens, positions, padding)
    found = received_attention(reading, torch.tensor([True, False, False, True]))[0]
    query, place = attention.content_query(content)[0], attention.spatial_query(spatial)[0]
    key, where = attention.content_key(tokens)[0], attention.position_key(positions)[0]
    expected = torch.zeros(7)
    for row in (0, 3):
        for head in (slice(0, 4), slice(4, 8)):
            scores = [
                float(query[row, head] @ key[s, head] + place[row, head] @ where[s, head])
                for s in range(5)
            ]
            powers = [math.exp(score / math.sqrt(8)) for score in scores]
            expected[:5] += torch.tensor(powers) / sum(powers)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_levels_of_a_detector_against_loops():
    """All of it: which queries get the objects, where they look, and the mean over the layers."""
    model = build(DETR)
    for layer in model.decoder.layers:
        nn.init.normal_(layer.cross_attention.attention_weights.weight, std=0.3)
    example, calls = sample(), {}
    attentions = [layer.cross_attention for layer in model.decoder.layers]
    hooks = [
        module.register_forward_hook(lambda m, given, out: calls.update({m: (given, out)}))
        for attention in attentions
        for module in (attention, attention.sampling_offsets, attention.attention_weights)
    ]
    with torch.no_grad():
        memory = model.encode(model.preprocess([example]))
        logits, boxes = model.decode(memory)
    for hook in hooks:
        hook.remove()
    cost = costs(logits[-1, 0], boxes[-1, 0], example)
    queries, _ = linear_sum_assignment(cost)
    expected = [np.zeros(shape) for shape in memory.shapes]
    for attention in attentions:
        offsets, scores = (
            calls[module][1][0].numpy()
            for module in (attention.sampling_offsets, attention.attention_weights)
        )
        references = calls[attention][0][1][0].numpy()
        maps = spread(offsets, scores, references, memory.shapes, queries, 4)
        expected = [total + each / 2 for total, each in zip(expected, maps)]
    padding = memory.padding[0].split([h * w for h, w in memory.shapes])
    levels = attention_levels(model, example)
    assert (levels.padded, levels.size) == ((96, 96), (75, 90))
    for found, level, hidden in zip(levels.maps, expected, padding, strict=True):
        level[hidden.view(level.shape).numpy()] = 0
        np.testing.assert_allclose(found[0].detach().numpy(), level, atol=1e-5)


def costs(logits, boxes, example):
    """Costs of queries and objects by loops: focal, L1 and generalised IoU."""
    height, width = example["instances"].image_size
    objects = zip(
        example["instances"].gt_boxes.tensor.tolist(), example["instances"].gt_classes.tolist()
    )
    table = []
    for (x0, y0, x1, y1), label in objects:
        column = []
        for logit, (cx, cy, w, h) in zip(logits, boxes.tolist()):
            p = float(logit[label].sigmoid())
            focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
            own = (
                (x0 + x1) / 2 / width,
                (y0 + y1) / 2 / height,
                (x1 - x0) / width,
                (y1 - y0) / height,
            )
            distance = sum(abs(a - b) for a, b in zip((cx, cy, w, h), own))
            a0, b0 = (cx - w / 2) * width, (cy - h / 2) * height
            a1, b1 = (cx + w / 2) * width, (cy + h / 2) * height
            both = max(0, min(a1, x1) - max(a0, x0)) * max(0, min(b1, y1) - max(b0, y0))
            union = (a1 - a0) * (b1 - b0) + (x1 - x0) * (y1 - y0) - both
            hull = (max(a1, x1) - min(a0, x0)) * (max(b1, y1) - min(b0, y0))
            giou = both / union - (hull - union) / hull
            column.append(2 * focal + 5 * distance - 2 * giou)
        table.append(column)
    return np.array(table).T


@pytest.mark.parametrize("name", ["conditional_detr", "dab_detr"])
def test_detectors_with_one_level(name):
    """Of the softmax nothing is lost, so the map sums to the matched queries times the heads."""
    base = config.load(DETR).model
    base.backbone.out_features = ["p5"]
    node = getattr(single_scale_detr, name)(
        backbone=base.backbone, widths={"p5": 32}, num_classes=10
    )
    node.queries.num_queries = 20
    model = instantiate(node).eval()
    levels = attention_levels(model, sample())
    (level,) = levels.maps
    heads = model.decoder.layers[0].cross_attention.heads
    assert float(level.detach().sum()) == pytest.approx(2 * heads, rel=1e-4)


def test_other_models_and_other_attention_are_one_line():
    with pytest.raises(UserError, match="Linear has no queries"):
        attention_levels(nn.Linear(1, 1), sample())
    message = "the cross attention MultiheadAttention has no projections"
    with pytest.raises(UserError, match=message), record_reading([nn.MultiheadAttention(4, 2)]):
        pass
