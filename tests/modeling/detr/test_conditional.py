"""Conditional attention and its decoder against one query, one head at a time."""

import math

import pytest
import torch

from d2dense.errors import UserError
from d2dense.modeling.detr import ConditionalDecoder, PredictionHeads, Queries
from d2dense.modeling.detr.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
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

# ------------------------------------------------ attention


@pytest.mark.parametrize("mask", ["none", "of queries", "of images"])
def test_self_attention(mask):
    layer = noisy(ConditionalSelfAttention(channels=C, heads=HEADS, dropout=0.0))
    content, position = rows(2, 5, C), rows(2, 5, C, seed=8)
    given = {
        "none": None,
        "of queries": torch.rand(5, 5) < 0.4,
        "of images": torch.rand(2, 5, 5) < 0.4,
    }[mask]
    if given is not None:
        given = given & ~torch.eye(5, dtype=torch.bool)

    def blocked(i, j, k):
        return given is not None and bool(given.expand(2, 5, 5)[i, j, k])

    query = apply(layer.content_query, content) + apply(layer.position_query, position)
    key = apply(layer.content_key, content) + apply(layer.position_key, position)
    values = apply(layer.value, content)
    expected = slow_attention([(query, key)], values, blocked, layer.output)
    assert torch.allclose(layer(content, position, given), expected, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_cross_attention(first):
    layer = noisy(ConditionalCrossAttention(channels=C, heads=HEADS, dropout=0.0, first=first))
    content, position, spatial = rows(3, 2, 5, C)
    seen = memory()
    result = layer(content, position, spatial, seen.tokens, seen.positions, seen.padding)
    expected = slow_cross_attention(layer, content, position, spatial, seen, first)
    assert torch.allclose(result, expected, atol=1e-5)


def slow_cross_attention(layer, content, position, spatial, seen, first):
    query, key = apply(layer.content_query, content), apply(layer.content_key, seen.tokens)
    place = apply(layer.position_key, seen.positions)
    if first:
        query, key = query + apply(layer.position_query, position), key + place
    return slow_attention(
        [(query, key), (apply(layer.spatial_query, spatial), place)],
        apply(layer.value, seen.tokens),
        lambda i, j, k: bool(seen.padding[i, k]),
        layer.output,
    )


# ------------------------------------------------ decoder


def slow_sines(value):
    """8 channels of one coordinate, sine and cosine by turns."""
    angles = [2 * math.pi * value / 10000 ** (2 * (i // 2) / (C // 2)) for i in range(C // 2)]
    return [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]


def sines_of(references, order):
    flat = [
        [wave for i in order for wave in slow_sines(each[i])]
        for each in references.flatten(0, 1).tolist()
    ]
    return torch.tensor(flat).view(*references.shape[:2], -1)


def slow_layer(layer, content, position, spatial, seen, first, slope):
    query = apply(layer.self_attention.content_query, content)
    query = query + apply(layer.self_attention.position_query, position)
    key = apply(layer.self_attention.content_key, content)
    key = key + apply(layer.self_attention.position_key, position)
    values = apply(layer.self_attention.value, content)
    heard = slow_attention(
        [(query, key)], values, lambda i, j, k: False, layer.self_attention.output
    )
    content = normed(layer.norm1, content + heard)
    read = slow_cross_attention(layer.cross_attention, content, position, spatial, seen, first)
    content = normed(layer.norm2, content + read)
    hidden = apply(layer.ffn.linear1, content)
    hidden = torch.where(hidden > 0, hidden, hidden * slope(layer))
    return normed(layer.norm3, content + apply(layer.ffn.linear2, hidden))


def decoder(**changes):
    return noisy(
        ConditionalDecoder(
            channels=C, layers=3, heads=HEADS, feedforward=12, dropout=0.0, **changes
        )
    ).eval()


def test_decoder_of_points():
    ours, seen = decoder(), memory()
    start = Queries(torch.zeros(2, 5, C), rows(2, 5, C), torch.rand(2, 5, 2))
    states, references = ours(start, seen, None)
    content = start.content
    for i, layer in enumerate(ours.layers):
        spatial = sines_of(start.references, (1, 0))
        if i > 0:
            spatial = spatial * two_layers(ours.scale, content)
        content = slow_layer(
            layer, content, start.position, spatial, seen, i == 0, lambda layer: 0.0
        )
        assert torch.allclose(states[i], normed(ours.norm, content), atol=1e-4)
        assert references[i] is start.references
    assert ours.layers[0].cross_attention.position_query is not None
    assert all(each.cross_attention.position_query is None for each in ours.layers[1:])


def heads(**changes):
    return noisy(PredictionHeads(channels=C, num_classes=2, layers=3, size_bias=0.0, **changes))


def test_decoder_of_anchors():
    ours, seen, boxes = decoder(anchors=True, activation="prelu"), memory(), heads()
    start = Queries(torch.zeros(2, 5, C), None, torch.rand(2, 5, 4) * 0.8 + 0.1)
    with torch.no_grad():
        states, references = ours(start, seen, boxes.predict_boxes)
    content, box = start.content, start.references
    for i, layer in enumerate(ours.layers):
        assert torch.allclose(references[i], box, atol=1e-4)
        position = two_layers(ours.positions.layers, sines_of(box, (1, 0, 2, 3)))
        spatial = sines_of(box, (1, 0))
        if i > 0:
            spatial = spatial * two_layers(ours.scale, content)
        width, height = two_layers(ours.side, content).sigmoid().unbind(-1)
        y, x = spatial[..., : C // 2], spatial[..., C // 2 :]
        y = y * (height / box[..., 3])[..., None]
        x = x * (width / box[..., 2])[..., None]
        content = slow_layer(
            layer,
            content,
            position,
            torch.cat([y, x], dim=-1),
            seen,
            i == 0,
            lambda layer: layer.ffn.activation.weight,
        )
        assert torch.allclose(states[i], normed(ours.norm, content), atol=1e-4)
        shift = boxes.boxes[0].layers(content)  # of the state without the last norm
        box = (shift + (box / (1 - box)).log()).sigmoid()


@pytest.mark.parametrize("twice", [False, True])
def test_references_carry_gradients_to_heads_alone(twice):
    ours, boxes = decoder(anchors=True, look_forward_twice=twice), heads()
    start = Queries(torch.zeros(1, 5, C), None, torch.rand(1, 5, 4) * 0.8 + 0.1)
    _, references = ours(start, memory(1), boxes.predict_boxes)
    assert [each.requires_grad for each in references] == [False, twice, twice]
    ours.look_forward_twice = not twice
    _, others = ours(start, memory(1), boxes.predict_boxes)
    assert all(torch.equal(*pair) for pair in zip(references, others))


def test_given_positions_replace_those_of_anchors():
    ours, boxes, seen = decoder(anchors=True), heads(), memory()
    start = Queries(torch.zeros(2, 5, C), None, torch.rand(2, 5, 4) * 0.8 + 0.1)
    first = ours.positions(start.references)
    same = ours(start._replace(position=first), seen, boxes.predict_boxes)[0]
    free = ours(start, seen, boxes.predict_boxes)[0]
    assert torch.equal(same[0], free[0])
    assert not torch.allclose(same[1], free[1], atol=1e-4)  # whose positions follow the boxes


@pytest.mark.parametrize("anchors", [False, True])
def test_masked_groups_do_not_hear_each_other(anchors):
    ours, boxes, seen = decoder(anchors=anchors), heads(), memory()
    whole = Queries(
        rows(2, 5, C), rows(2, 5, C, seed=1), torch.rand(2, 5, 4 if anchors else 2) * 0.8 + 0.1
    )
    group = torch.tensor([0, 0, 1, 1, 1])
    mask = group[:, None] != group
    together = ours(whole._replace(mask=mask), seen, boxes.predict_boxes)[0]
    for number in (0, 1):
        own = Queries(*(each[:, group == number] for each in whole[:3]))
        alone = ours(own, seen, boxes.predict_boxes)[0]
        for ours_, theirs in zip(together, alone):
            assert torch.allclose(ours_[:, group == number], theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_without_width_and_queries_of_no_number(dtype):
    ours, boxes = decoder(anchors=True), heads()
    flat = torch.tensor([[0.5, 0.5, 0.0, 0.2], [1.2, -0.1, 0.3, 1e-9], [0.0, 1.0, 1.4, 1.0]])
    start = Queries(torch.zeros(1, 3, C), None, flat[None])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        states, references = ours(start, memory(1), boxes.predict_boxes)
        assert all(each.isfinite().all() for each in (*states, *references))
        sum(each.float().square().sum() for each in states).backward()
        none = Queries(start.content[:, :0], None, flat[None, :0])
        assert ours(none, memory(1), boxes.predict_boxes)[0][-1].shape == (1, 0, C)
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_memory_without_positions():
    start = Queries(torch.zeros(2, 5, C), rows(2, 5, C), torch.rand(2, 5, 2))
    with pytest.raises(UserError, match="SingleScaleEncoder"):
        decoder()(start, memory()._replace(positions=None), None)


@pytest.mark.parametrize("anchors", [False, True])
def test_references_of_the_other_kind(anchors):
    wrong = Queries(torch.zeros(2, 5, C), rows(2, 5, C), torch.rand(2, 5, 2 if anchors else 4))
    with pytest.raises(UserError, match=f"of {2 if anchors else 4} numbers"):
        decoder(anchors=anchors)(wrong, memory(), heads().predict_boxes)
