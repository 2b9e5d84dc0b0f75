"""Area of the important regions (appendix B of the CEDNet paper): the share of pixels whose input
gradient is above a threshold, as a curve over the threshold.

The paper says that both axes are normalised, not how. Here: each gradient map is divided by its own
largest value, so that thresholds run from 0 to 1 and models with larger losses are not favoured;
areas are shares of the image's pixels; curves are means over the images.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AreaCurve"]


class AreaCurve:
    """Mean share of pixels with ``g / max(g) > t`` at thresholds ``t = 0, 1 / bins, ..., 1``.

    Exact at these thresholds; memory does not grow with the number of images. An image without any
    gradient counts as an area of 0.

    Args:
        bins: steps of t.
    """

    def __init__(self, bins: int = 1000):
        self.thresholds = torch.arange(bins + 1, dtype=torch.float64) / bins
        self.count = 0
        self._areas = torch.zeros_like(self.thresholds)
        self._area_under = 0.0

    def add(self, gradient: Tensor) -> float:
        """Add a map of any shape without negative values; return the area under its own curve,
        which is the mean of ``g / max(g)``.
        """
        values = gradient.double().flatten()
        largest = values.max()
        if largest > 0:
            values = values / largest
        below = torch.searchsorted(self.thresholds, values)  # thresholds that each value exceeds
        counts = torch.bincount(below, minlength=len(self.thresholds) + 1)
        self._areas += counts.flip(0).cumsum(0).flip(0)[1:] / len(values)
        area_under = float(values.mean())
        self._area_under += area_under
        self.count += 1
        return area_under

    @property
    def areas(self) -> Tensor:
        """Mean area ``(bins + 1,)`` at each threshold, 0 before any image."""
        return self._areas / max(self.count, 1)

    @property
    def area_under(self) -> float:
        """Integral of the curve over all t from 0 to 1, not only those of the table."""
        return self._area_under / max(self.count, 1)
