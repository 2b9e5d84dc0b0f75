"""Encodings of boxes, and proposals, against recorded values and slow loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2dense.modeling.detr import (
    BoxEmbedding,
    BoxPositions,
    Memory,
    TwoStageQueries,
    inverse_sigmoid,
)
from d2dense.modeling.detr.memory import valid_ratios
from d2dense.modeling.detr.proposals import anchor_boxes
from tests.modeling.detr import recorded

needs_recording = pytest.mark.skipif(not recorded.THERE, reason="no recorded outputs here")


def memory_of(masks, tokens=None):
    """A memory of these padding masks (N, Hl, Wl)."""
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    shapes = [tuple(mask.shape[1:]) for mask in masks]
    ratios = torch.stack([valid_ratios(mask) for mask in masks], dim=1)
    tokens = torch.randn(*padding.shape, 8) if tokens is None else tokens
    return Memory(tokens, shapes, padding, ratios)


def three_quarters(shapes):
    masks = []
    for h, w in shapes:
        mask = torch.zeros(2, h, w, dtype=torch.bool)
        mask[1, int(0.75 * h) :] = True
        mask[1, :, int(0.75 * w) :] = True
        masks.append(mask)
    return masks


# ------------------------------------------------ encodings


@needs_recording
def test_the_recorded_encodings():
    units = np.load(recorded.UNITS)
    boxes = torch.rand(1, 7, 4, generator=torch.Generator().manual_seed(10))
    embedding = BoxEmbedding(channels=256, out_channels=256)
    positions = BoxPositions(channels=256)
    seen = []
    for layer in (embedding.linear, positions.layers):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embedding(inverse_sigmoid(boxes).sigmoid())
    positions(boxes)
    assert recorded.error(seen[0][..., ::8], units["proposal_pe"]) < 1e-5
    assert recorded.error(seen[1][..., ::8], units["dino_sine"]) < 1e-5


def test_an_embedding_by_hand():
    module = BoxEmbedding(channels=8, out_channels=16)
    box = [0.25, 0.5, 0.1, 0.9]
    waves = []
    for value in box:
        for k in range(2):
            angle = value * 2 * math.pi / 10000 ** (2 * k / 4)
            waves += [math.sin(angle), math.cos(angle)]
    linear = F.linear(torch.tensor(waves), module.linear.weight, module.linear.bias)
    expected = F.layer_norm(linear, (16,))
    assert torch.allclose(module(torch.tensor([[box]]))[0, 0], expected, atol=1e-5)


def test_inverse_sigmoid():
    x = torch.tensor([-0.3, 0.0, 0.2, 0.9999999, 1.0, 1.7], requires_grad=True)
    y = inverse_sigmoid(x, 1e-3)
    expected = [math.log(1e-3), math.log(1e-3), math.log(0.25), *[math.log(1e3)] * 3]
    assert y.tolist() == pytest.approx(expected, rel=1e-5)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


# ------------------------------------------------ proposals


@needs_recording
def test_the_recorded_anchors():
    boxes, valid = anchor_boxes(memory_of(three_quarters(((12, 16), (6, 8)))))
    expected = torch.from_numpy(np.load(recorded.UNITS)["enc_proposals_logit"])
    assert torch.equal(valid, torch.isfinite(expected).all(dim=-1))
    found = torch.logit(boxes).masked_fill(~valid[..., None], torch.inf)
    assert torch.allclose(found[valid], expected[valid], atol=1e-5)
    assert (expected[~valid] == torch.inf).all()


def test_anchors_at_the_limits():
    # the first centre of 50 cells is at 0.01, the last at 0.99: neither is valid
    _, valid = anchor_boxes(memory_of([torch.zeros(1, 2, 50, dtype=torch.bool)]))
    assert valid[0].view(2, 50).tolist() == [[False, *[True] * 48, False]] * 2
    # the same with padding to any width
    for width in range(51, 120):
        mask = torch.zeros(1, 2, width, dtype=torch.bool)
        mask[:, :, 50:] = True
        _, valid = anchor_boxes(memory_of([mask]))
        assert valid[0].view(2, width)[:, :50].tolist() == [[False, *[True] * 48, False]] * 2
        assert not valid[0].view(2, width)[:, 50:].any()


def slow_proposals(module, memory, image):
    """Position by position: logits, boxes and validity."""
    start, rows = 0, []
    for level, (height, width) in enumerate(memory.shapes):
        there = ~memory.padding[image, start : start + height * width].view(height, width)
        rows_valid, columns_valid = int(there[:, 0].sum()), int(there[0].sum())
        for i in range(height):
            for j in range(width):
                token = memory.tokens[image, start + i * width + j]
                box = [(j + 0.5) / columns_valid, (i + 0.5) / rows_valid, *[0.05 * 2**level] * 2]
                valid = bool(there[i, j]) and all(0.01 < value < 0.99 for value in box)
                state = module.norm(module.transform(token if valid else token * 0))
                shift = module.boxes.layers(state)
                logit = torch.tensor([math.log(v / (1 - v)) if valid else math.inf for v in box])
                rows.append((module.classes(state), (shift + logit).sigmoid(), valid))
        start += height * width
    return rows


@pytest.mark.parametrize("binary", [True, False])
@torch.no_grad()
def test_proposals_by_loop(binary):
    torch.manual_seed(0)
    memory = memory_of(three_quarters(((8, 12), (4, 6), (2, 3))))
    module = TwoStageQueries(
        num_queries=20, channels=8, num_classes=5, binary=binary, positions=binary
    )
    nn.init.normal_(module.boxes.layers[-1].weight)
    found = module(memory)
    proposals = found.proposals
    predictions = module.encoder_predictions(proposals)
    assert predictions.binary == binary
    for i in range(2):
        rows = slow_proposals(module, memory, i)
        scores = [float(logits[0] if binary else logits.max()) for logits, _, _ in rows]
        assert proposals.scores[i].tolist() == pytest.approx(scores, abs=1e-5)
        best = sorted(range(len(rows)), key=lambda k: -scores[k])[:20]
        top = [scores[k] for k in best]
        assert proposals.top_scores[i].tolist() == pytest.approx(top, abs=1e-5)
        assert [scores[k] for k in proposals.index[i]] == pytest.approx(top, abs=1e-5)
        chosen = torch.stack([rows[k][1] for k in proposals.index[i]])
        assert torch.allclose(found.references[i], chosen, atol=1e-5)
        assert torch.equal(proposals.boxes[i], found.references[i])
        which = range(len(rows)) if binary else proposals.index[i].tolist()
        for column, number in ((predictions.logits, 0), (predictions.boxes, 1)):
            expected = torch.stack([rows[k][number] for k in which])
            assert torch.allclose(column[i], expected, atol=1e-5)
    assert torch.equal(found.content, module.content.weight.expand(2, -1, -1))
    if binary:
        whole = module.positions(found.references)
        assert torch.equal(found.position, whole[..., :8])
    else:
        assert found.position is None


@pytest.mark.parametrize("binary", [True, False])
def test_fewer_positions_than_queries(binary):
    module = TwoStageQueries(num_queries=20, channels=8, num_classes=5, binary=binary)
    found = module(memory_of([torch.zeros(2, 3, 4, dtype=torch.bool)]))
    assert found.references.shape == (2, 20, 4)
    assert (found.references[:, 12:] == 1).all()
    assert (found.proposals.index[:, :12] < 12).all()
    assert (found.proposals.index[:, 12:] >= 12).all()
    predictions = module.encoder_predictions(found.proposals)
    assert predictions.logits.shape[1] == (12 if binary else 20)
    (predictions.boxes.sum() + predictions.logits.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.boxes.parameters())


def test_no_gradient_of_the_decoder_reaches_the_proposals():
    module = TwoStageQueries(num_queries=5, channels=8, num_classes=5)
    found = module(memory_of([torch.zeros(1, 6, 8, dtype=torch.bool)]))
    assert not found.references.requires_grad
    found.position.sum().backward()
    assert module.boxes.layers[0].weight.grad is None
    assert module.positions.linear.weight.grad is not None


def test_infinite_states_do_not_become_numbers_that_are_none():
    module = TwoStageQueries(num_queries=5, channels=8, num_classes=5)
    nn.init.constant_(module.boxes.layers[-1].bias, -torch.inf)
    found = module(memory_of([torch.ones(1, 6, 8, dtype=torch.bool)]))
    assert (found.references == 1).all()
