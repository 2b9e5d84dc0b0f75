"""Norms by name, and layer norm over channels against its definition."""

from __future__ import annotations

import pytest
import torch

from d2dense.errors import UserError
from d2dense.layers import NORMS, LayerNorm2d, MLP2d, build_norm


def test_layer_norm_is_per_pixel_over_channels():
    torch.manual_seed(0)
    norm = LayerNorm2d(5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 1e-3 * torch.randn(2, 5, 3, 4)  # small enough for eps to show
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    for order in (torch.contiguous_format, torch.channels_last):
        assert torch.allclose(norm(x.contiguous(memory_format=order)), expected, atol=1e-6)


def test_images_in_channels_last_memory_stay_there():
    x = torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    for module in (LayerNorm2d(8), MLP2d(8)):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NORMS)
def test_every_name_builds_a_norm_of_that_many_channels(name):
    norm = build_norm(name, 32)
    assert norm.weight.shape == (32,)


def test_unknown_names_are_named():
    with pytest.raises(UserError, match="did you mean 'SyncBN'"):
        build_norm("SyncBn", 8)
