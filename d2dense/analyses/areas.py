"""Area of the important regions (appendix B of the CEDNet paper): the share of an image's pixels
whose input gradient g is above a threshold t, as a curve over t, mean over the images.

The paper says that both axes are normalised, not how. Both readings are given here:

- *common*: thresholds are values of g, the same for all images and models, and the axis is divided
  by the largest g of all. A model whose loss is larger has larger areas.
- *relative*: each map is first divided by its own largest value. What counts is how concentrated a
  map is, whatever the size of the loss.

Letters: T thresholds.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COMMON_THRESHOLDS", "AreaCurve", "relative", "relative_thresholds"]

# 0, and eight steps per factor of two over all sizes that gradients have.
COMMON_THRESHOLDS = torch.cat(
    [torch.zeros(1, dtype=torch.float64), 2.0 ** (torch.arange(-60 * 8, 20 * 8 + 1).double() / 8)]
)


def relative_thresholds(steps: int = 1000) -> Tensor:
    """Return ``(steps + 1,)`` even thresholds from 0 to 1."""
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def relative(gradient: Tensor) -> Tensor:
    """Return a map ``(...)`` divided by its largest value, float64; zeros stay zeros."""
    largest = gradient.max()
    return gradient.double() / largest.double() if largest > 0 else gradient.double()


class AreaCurve:
    """Mean share of pixels with ``g > t``, exact at each threshold t; memory does not grow with the
    number of images.

    Args:
        thresholds: ``(T,)``, rising

    Attributes:
        count: images so far
        largest: g of all images
    """

    def __init__(self, thresholds: Tensor):
        self.thresholds = thresholds
        self.count = 0
        self.largest = 0.0
        self._areas = torch.zeros_like(thresholds)
        self._mean = 0.0

    def add(self, gradient: Tensor) -> None:
        """Add a map of any shape, without negative values."""
        values = gradient.double().flatten()
        exceeded = torch.searchsorted(self.thresholds, values)  # how many thresholds each is above
        counts = torch.bincount(exceeded, minlength=len(self.thresholds) + 1).double()
        self._areas += counts.flip(0).cumsum(0).flip(0)[1:] / len(values)
        self._mean += float(values.mean())
        self.largest = max(self.largest, float(values.max()))
        self.count += 1

    @property
    def areas(self) -> Tensor:
        """Mean area ``(T,)`` at each threshold; 0 before any image."""
        return self._areas / max(self.count, 1)

    @property
    def area_under(self) -> float:
        """Integral of the curve over all t from 0 on, which is the mean of g over pixels, then
        images; exact, whatever the thresholds.
        """
        return self._mean / max(self.count, 1)
