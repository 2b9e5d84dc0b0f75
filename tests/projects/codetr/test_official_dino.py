"""What Co-DINO's decoder does differently, against loops over layers: positions from references,
refinement without the last norm, references that stay in the graph.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate

from codetr import nodes
from d2dense.modeling.detr import Memory

C, N, Q = 64, 2, 7
SHAPES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]


@pytest.fixture(scope="module")
def model():
    node = nodes.co_dino(channels=C, num_classes=5, num_queries=Q)
    for part in (node.encoder, node.decoder):
        part.update(layers=3, heads=4, feedforward=32)
    node.auxiliary_heads, node.positive_queries = [], None
    torch.manual_seed(0)
    model = instantiate(node).eval()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def memory():
    torch.manual_seed(1)
    count = sum(h * w for h, w in SHAPES)
    ratios = torch.rand(N, len(SHAPES), 2) * 0.4 + 0.6
    tokens = torch.randn(N, count, C)
    return Memory(tokens, SHAPES, torch.zeros(N, count, dtype=torch.bool), ratios)


def sines(number, width):
    """sin and cos of one number in [0, 1], alternately."""
    values = []
    for i in range(width):
        angle = 2 * math.pi * number / 10000 ** (2 * (i // 2) / width)
        values.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return values


def logit(x):
    return (x.clamp(0, 1).clamp(min=1e-3) / (1 - x.clamp(0, 1)).clamp(min=1e-3)).log()


def by_hand(model, memory):
    """Logits and boxes of all layers for the queries that the memory gives."""
    queries = model.queries(memory)
    content, reference = queries.content, queries.references
    shown = reference
    perceptron = model.decoder.positions.layers
    logits, boxes = [], []
    for layer, classes, head in zip(model.decoder.layers, model.heads.classes, model.heads.boxes):
        ratio = memory.valid_ratios  # x, y per level
        scaled = reference[:, :, None] * torch.cat([ratio, ratio], dim=-1)[:, None]
        rows = [
            [[x for k in (1, 0, 2, 3) for x in sines(float(box[k]), C // 2)] for box in image]
            for image in scaled[:, :, 0]
        ]
        position = perceptron(torch.tensor(rows))
        content = layer(content, position, scaled, memory)
        normed = F.layer_norm(
            content, (C,), model.decoder.norm.weight, model.decoder.norm.bias, 1e-5
        )
        logits.append(classes(normed))
        boxes.append((head.layers(normed) + logit(shown)).sigmoid())
        shown = (head.layers(content) + logit(reference)).sigmoid()
        reference = shown.detach()
    return torch.stack(logits), torch.stack(boxes)


def test_layers_start_from_boxes_of_states_without_the_norm(model, memory):
    torch.nn.init.normal_(model.decoder.norm.weight, mean=1.0, std=0.3)
    expected = by_hand(model, memory)
    found = model.decode(memory)
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_the_loss_of_a_layer_reaches_the_box_head_before_but_no_further(model, memory):
    _, boxes = model.decode(memory)
    _, expected = by_hand(model, memory)
    for target in range(3):
        for of in range(3):
            weight = model.heads.boxes[of].layers[-1].weight
            grads = [
                torch.autograd.grad(
                    each[target].sum(), weight, retain_graph=True, allow_unused=True
                )
                for each in (boxes, expected)
            ]
            ours, theirs = (0 * weight if g is None else g for (g,) in grads)
            assert torch.allclose(ours, theirs, atol=1e-4), (target, of)
            assert bool(ours.any()) == (of in (target, target - 1))
