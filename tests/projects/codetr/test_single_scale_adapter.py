"""The pyramid of a detector whose encoder has one map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codetr.single_scale_adapter import SingleScaleAdapter
from d2dense.modeling.detr import Memory


def memory_of(maps):
    n, _, height, width = maps.shape
    return Memory(
        tokens=maps.flatten(2).transpose(1, 2),
        shapes=[(height, width)],
        padding=torch.zeros(n, height * width, dtype=torch.bool),
        valid_ratios=torch.ones(n, 1, 2),
    )


def build(**changes):
    return SingleScaleAdapter(channels=8, groups=4, **changes)


def test_strides_8_to_128_from_32():
    levels = build()(memory_of(torch.randn(2, 8, 5, 7)))
    sizes = [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]
    assert [tuple(each.shape) for each in levels] == [(2, 8, *size) for size in sizes]


def test_each_level_comes_from_the_next_one():
    adapter = build()
    for p in adapter.parameters():
        if p.ndim == 1:
            nn.init.normal_(p)
    maps = torch.randn(1, 8, 3, 4)
    levels = adapter(memory_of(maps))
    assert torch.equal(levels[2], maps)

    def normed(conv, norm, x, stride):
        x = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=1)
        groups = x.unflatten(1, (4, 2))
        mean = groups.mean(dim=(2, 3, 4), keepdim=True)
        deviation = groups.var(dim=(2, 3, 4), keepdim=True, correction=0)
        x = ((groups - mean) / (deviation + 1e-5).sqrt()).flatten(1, 2)
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    def doubled(x):  # each new cell is a quarter of a cell beside an old centre
        for dim in (2, 3):
            size = x.shape[dim]
            centre = (torch.arange(2 * size) + 0.5) / 2 - 0.5
            low = centre.clamp(0, size - 1).floor().long()
            high = (low + 1).clamp(max=size - 1)
            share = (centre.clamp(0, size - 1) - low).view(-1, *[1] * (3 - dim))
            x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
        return x

    for level, (conv, norm) in zip((1, 0), adapter.upward):
        expected = normed(conv, norm, doubled(levels[level + 1]), 1)
        assert torch.allclose(levels[level], expected, atol=1e-5)
    for level, (conv, norm) in zip((3, 4), adapter.downward):
        expected = normed(conv, norm, levels[level - 1], 2)
        assert torch.allclose(levels[level], expected, atol=1e-5)


def test_gradients_reach_the_encoder_and_every_parameter():
    adapter = build()
    maps = torch.randn(1, 8, 3, 4, requires_grad=True)
    sum(each.square().sum() for each in adapter(memory_of(maps))).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters() if p.ndim > 1)
    assert maps.grad.any()


@pytest.mark.parametrize(("finer", "coarser"), [(0, 0), (1, 0), (0, 3)])
def test_other_pyramids(finer, coarser):
    levels = build(finer=finer, coarser=coarser)(memory_of(torch.randn(1, 8, 8, 8)))
    assert [each.shape[2] for each in levels] == [16, 8, 4, 2, 1][1 - finer : 2 + coarser]


def test_trace_follows_other_sizes():
    adapter = build().eval()

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter = adapter

        def forward(self, maps):
            tokens = maps.flatten(2).transpose(1, 2)
            memory = Memory(tokens, [(maps.shape[2], maps.shape[3])], maps, maps)
            return self.adapter(memory)

    with torch.no_grad():
        traced = torch.jit.trace(Maps(), torch.randn(1, 8, 4, 6), check_trace=False)
        for size in ((2, 8, 3, 5), (3, 8, 7, 2)):
            given = torch.randn(size)
            for ours, theirs in zip(traced(given), Maps()(given)):
                assert torch.allclose(ours, theirs, atol=1e-5)
