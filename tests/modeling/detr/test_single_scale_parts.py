"""Encoder, query sources and initial values of Conditional DETR and DAB-DETR."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from d2dense.errors import UserError
from d2dense.modeling.detr import (
    AnchorQueries,
    ConditionalDecoder,
    PointQueries,
    PredictionHeads,
    Queries,
    SingleScaleEncoder,
)
from tests.modeling.detr.plain_attention import (
    HEADS,
    C,
    apply,
    memory,
    noisy,
    normed,
    rows,
    slow_attention,
    two_layers,
)


@pytest.mark.parametrize("scaled", [False, True])
def test_encoder(scaled):
    ours = noisy(
        SingleScaleEncoder(
            channels=C,
            layers=2,
            heads=HEADS,
            feedforward=12,
            dropout=0.0,
            activation="prelu" if scaled else "relu",
            temperature=20.0,
            scale_positions=scaled,
        )
    ).eval()
    maps = rows(2, C, 3, 4)
    sizes = torch.tensor([[96.0, 128.0], [64.0, 97.0]])  # 2 of 3 rows, all 4 columns of cells
    found = ours([maps], sizes, (96, 128))
    there = [(3, 4), (2, 4)]
    padding = [
        [row >= h or column >= w for row in range(3) for column in range(4)] for h, w in there
    ]
    assert found.padding.tolist() == padding
    assert found.shapes == [(3, 4)]
    assert torch.allclose(found.valid_ratios, torch.tensor([[[1.0, 1.0]], [[1.0, 2 / 3]]]))
    positions = torch.zeros(2, 12, C)
    for i, (height, width) in enumerate(there):
        for row in range(3):
            for column in range(4):
                waves = []
                for at, size in ((min(row + 1, height), height), (column + 1, width)):
                    for c in range(C // 2):
                        angle = at / size * 2 * math.pi / 20 ** (2 * (c // 2) / (C // 2))
                        waves.append(math.cos(angle) if c % 2 else math.sin(angle))
                positions[i, row * 4 + column] = torch.tensor(waves)
    hidden = torch.tensor(padding)[..., None]  # where positions may say anything
    positions = torch.where(hidden, found.positions, positions)
    assert torch.allclose(found.positions, positions, atol=1e-4)

    tokens = maps.flatten(2).transpose(1, 2)
    for layer in ours.layers:
        place = positions * two_layers(ours.scale, tokens) if scaled else positions
        parts = layer.attention.in_proj_weight.chunk(3), layer.attention.in_proj_bias.chunk(3)
        query, key = (linear(tokens + place, parts[0][i], parts[1][i]) for i in (0, 1))
        read = slow_attention(
            [(query, key)],
            linear(tokens, parts[0][2], parts[1][2]),
            lambda i, j, k: padding[i][k],
            layer.attention.out_proj,
        )
        tokens = normed(layer.norm1, tokens + read)
        hidden = apply(layer.ffn.linear1, tokens)
        slope = layer.ffn.activation.weight if scaled else 0.0
        hidden = torch.where(hidden > 0, hidden, hidden * slope)
        tokens = normed(layer.norm2, tokens + apply(layer.ffn.linear2, hidden))
    assert torch.allclose(found.tokens, tokens, atol=1e-4)


def test_encoder_takes_one_map():
    ours = SingleScaleEncoder(channels=C, layers=1, heads=HEADS, feedforward=12)
    for maps in ([rows(1, C, 2, 2)] * 2, [rows(1, 8, 2, 2)]):
        with pytest.raises(UserError, match="takes one map of 16 channels"):
            ours(maps, torch.tensor([[64.0, 64.0]]), (64, 64))


# ------------------------------------------------ query sources and initial values


def test_points_follow_from_positions():
    queries = noisy(PointQueries(num_queries=5, channels=C))
    found = queries(memory())
    table = queries.embedding.weight
    assert torch.equal(found.content, torch.zeros(2, 5, C))
    assert torch.equal(found.position, table.expand(2, -1, -1))
    points = two_layers(queries.reference_points, table).sigmoid()
    assert torch.allclose(found.references, points.expand(2, -1, -1))


def test_anchors_start_all_over_the_image():
    queries = AnchorQueries(num_queries=4000)
    found = queries(memory())
    assert found.position is None
    assert torch.equal(found.content, torch.zeros(2, 4000, C))
    assert torch.equal(found.references[0], found.references[1])
    centres = found.references[0, :, :2].detach()
    shares = torch.histc(centres, 10, 0, 1) / centres.numel()
    assert torch.allclose(shares, torch.full((10,), 0.1), atol=0.02)
    sides = torch.logit(found.references[0, :, 2:].detach())
    assert abs(float(sides.mean())) < 0.05
    assert abs(float(sides.std()) - 1) < 0.05
    assert [name for name, p in queries.named_parameters() if p.requires_grad] == ["sides"]
    free = AnchorQueries(num_queries=3, freeze_centres=False)
    assert all(p.requires_grad for p in free.parameters())


def test_initial_matrices():
    parts = (
        SingleScaleEncoder(channels=64, layers=1, heads=4, feedforward=96, scale_positions=True),
        ConditionalDecoder(channels=64, layers=2, heads=4, feedforward=96, anchors=True),
        PointQueries(num_queries=5, channels=64).reference_points,
    )
    for part in parts:
        for name, p in part.named_parameters():
            if p.ndim > 1:
                limit = math.sqrt(6 / sum(p.shape))
                assert 0.9 * limit < float(p.detach().abs().max()) <= limit, name
                assert abs(float(p.detach().std()) / (limit / math.sqrt(3)) - 1) < 0.15, name


@pytest.mark.parametrize("width", [2, 4])
def test_first_boxes(width):
    references = torch.rand(1, 5, width) * 0.8 + 0.1
    untouched = PredictionHeads(channels=C, num_classes=2, layers=3, size_bias=0.0)
    boxes = untouched.predict_boxes(0, rows(1, 5, C), references)
    half = torch.full((1, 5, 2), 0.5)
    expected = references if width == 4 else torch.cat([references, half], dim=-1)
    assert torch.allclose(boxes, expected, atol=1e-6)
    assert torch.allclose(untouched.classes[0].bias, torch.full((2,), -math.log(99)))


def test_dropout_in_training_only():
    ours = nn.ModuleList([ConditionalDecoder(channels=C, layers=2, heads=HEADS, feedforward=12)])
    start = Queries(torch.zeros(2, 5, C), rows(2, 5, C), torch.rand(2, 5, 2))
    results = [
        ours.train(mode)[0](start, memory(), None)[0][-1] for mode in (True, True, False, False)
    ]
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[2], results[3])
