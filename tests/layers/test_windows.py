"""Windows of maps, against slices."""

import pytest
import torch

from d2dense.layers import join_windows, padded_to_multiple, split_windows


@pytest.mark.parametrize(("height", "width"), [(2, 3), (4, 1), (4, 6)])
def test_windows_are_slices_in_reading_order(height, width):
    x = torch.randn(2, 4, 6, 5)
    slices = [
        image[top : top + height, left : left + width].reshape(-1, 5)
        for image in x
        for top in range(0, 4, height)
        for left in range(0, 6, width)
    ]
    windows = split_windows(x, height, width)
    assert torch.equal(windows, torch.stack(slices))
    assert torch.equal(join_windows(windows, height, width, 4, 6), x)


@pytest.mark.parametrize(("size", "filled"), [((4, 6), (4, 6)), ((3, 5), (4, 6)), ((1, 1), (2, 2))])
def test_maps_are_filled_up_with_zeros_at_the_end(size, filled):
    x = torch.randn(2, *size, 3)
    expected = torch.zeros(2, *filled, 3)
    expected[:, : size[0], : size[1]] = x
    assert torch.equal(padded_to_multiple(x, 2), expected)
