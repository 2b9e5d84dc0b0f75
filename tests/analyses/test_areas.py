"""Area curves against a direct count."""

import numpy as np
import pytest
import torch

from d2dense.analyses.areas import COMMON_THRESHOLDS, AreaCurve, relative, relative_thresholds


def maps():
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, 9), (16, 5), (4, 4)]
    return [torch.rand(size, generator=generator) ** 6 * k for k, size in enumerate(sizes, 1)]


def direct(gradients, thresholds):
    """Return mean over images of the share of pixels above each threshold, pixel by pixel."""
    areas = []
    for t in thresholds:
        shares = []
        for gradient in gradients:
            above = sum(float(g) > t for g in gradient.flatten())
            shares.append(above / gradient.numel())
        areas.append(np.mean(shares))
    return areas


@pytest.mark.parametrize("thresholds", [relative_thresholds(20), COMMON_THRESHOLDS[400:]])
def test_equals_a_direct_count(thresholds):
    curve = AreaCurve(thresholds)
    for each in maps():
        curve.add(each)
    expected = direct(maps(), thresholds.tolist())
    assert sum(0 < area < 1 for area in expected) > 0
    np.testing.assert_allclose(curve.areas.numpy(), expected, rtol=1e-12, atol=0)
    assert curve.count == 3
    assert curve.largest == max(float(each.max()) for each in maps())


def test_above_means_strictly_above():
    curve = AreaCurve(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    curve.add(torch.tensor([[0.0, 0.25], [0.5, 1.0]]))
    assert curve.areas.tolist() == [0.75, 0.5, 0.25, 0.0]


def test_area_under_is_the_integral():
    curve = AreaCurve(relative_thresholds(100_000))
    for each in maps():
        curve.add(relative(each))
    integral = float(torch.trapezoid(curve.areas, curve.thresholds))
    assert curve.area_under == pytest.approx(integral, rel=1e-3)


def test_a_map_relative_to_its_own_largest_value():
    assert relative(torch.tensor([1.0, 4.0])).tolist() == [0.25, 1.0]
    assert relative(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_no_gradient_is_no_area_and_no_image_neither():
    curve = AreaCurve(relative_thresholds(4))
    assert curve.areas.tolist() == [0] * 5
    curve.add(torch.zeros(3, 3))
    assert curve.areas.tolist() == [0] * 5
    assert (curve.area_under, curve.largest, curve.count) == (0, 0, 1)


def test_common_thresholds_cover_all_sizes():
    assert COMMON_THRESHOLDS[0] == 0
    assert COMMON_THRESHOLDS[1] < 1e-17
    assert COMMON_THRESHOLDS[-1] > 1e6
    ratios = COMMON_THRESHOLDS[2:] / COMMON_THRESHOLDS[1:-1]
    assert ratios.max() == pytest.approx(2 ** (1 / 8))
