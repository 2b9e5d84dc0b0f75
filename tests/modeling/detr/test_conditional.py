"""The parts of Conditional DETR and DAB-DETR against one query, one head at a time."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from d2dense.errors import UserError
from d2dense.modeling.detr import (
    AnchorQueries,
    ConditionalDecoder,
    Memory,
    PointQueries,
    PredictionHeads,
    Queries,
    SingleScaleEncoder,
)
from d2dense.modeling.detr.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
)

C, HEADS, WIDTH = 16, 4, 4  # channels, heads, channels of a head


def noisy(module):
    """Parameters away from their initial values, biases and norms included."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module


def memory(n=2, shape=(3, 4), seed=5):
    g = torch.Generator().manual_seed(seed)
    tokens, positions = torch.randn(2, n, shape[0] * shape[1], C, generator=g)
    padding = torch.zeros(n, *shape, dtype=torch.bool)
    padding[-1, 2:] = True
    padding[-1, :, 3:] = True
    return Memory(tokens, [shape], padding.flatten(1), torch.ones(n, 1, 2), positions)


def rows(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(halves, values, blocked, output):
    """Softmax over keys, for every image, head and query alone.

    Args:
        halves: pairs of queries (N, Q, C) and keys (N, S, C), compared side by side in each head
        blocked: (image, query, key) -> bool
    """
    n, q, _ = halves[0][0].shape
    result = torch.zeros(n, q, C)
    for i in range(n):
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            for j in range(q):
                keys = [k for k in range(values.shape[1]) if not blocked(i, j, k)]
                scores = []
                for k in keys:
                    asked = torch.cat([query[i, j, part] for query, _ in halves])
                    there = torch.cat([key[i, k, part] for _, key in halves])
                    scores.append((asked * there).sum() / math.sqrt(len(asked)))
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                for weight, k in zip(weights, keys):
                    result[i, j, part] += weight * values[i, k, part]
    return apply(output, result)


def apply(layer, x):
    return linear(x, layer.weight, layer.bias)


def two_layers(layers, x):
    return apply(layers[2], apply(layers[0], x).clamp(min=0))


def normed(norm, x):
    return layer_norm(x, (C,), norm.weight, norm.bias)


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


# ------------------------------------------------ encoder


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
