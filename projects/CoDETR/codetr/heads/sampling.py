"""A balanced choice of anchors or proposals, without waiting for the device.

Letters: N images, A candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sampler"]


class Sampler:
    """Some of the positives, and as many negatives as fill up the number of samples.

    Args:
        samples: per image; None: all candidates
        positive_share: most of the samples that are positive
        random: otherwise the first ones are chosen
    """

    def __init__(
        self, *, samples: int | None = 256, positive_share: float = 0.5, random: bool = True
    ):
        self.samples, self.positive_share, self.random = samples, positive_share, random

    def __call__(self, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Return which positives and which negatives are chosen, all ``(N, A)``."""
        if self.samples is None:
            return positive, negative
        most = torch.full_like(positive[:, 0], int(self.samples * self.positive_share), dtype=int)
        positive = self.choose(positive, most, int(self.samples * self.positive_share))
        missing = self.samples - positive.sum(dim=1)
        return positive, self.choose(negative, missing, self.samples)

    def choose(self, mask: Tensor, numbers: Tensor, most: int) -> Tensor:
        """Return at most ``numbers`` ``(N,)``, none of them above ``most``, of each row's True ones
        in ``mask`` ``(N, A)``.
        """
        if self.random:
            keys = torch.rand(mask.shape, device=mask.device)
        else:
            keys = 1 - torch.arange(mask.shape[1], device=mask.device, dtype=torch.float64) / max(
                1, mask.shape[1]
            )
        keys = keys.expand_as(mask).masked_fill(~mask, -1.0)
        index = keys.topk(min(most, mask.shape[1]), dim=1).indices  # best first
        within = torch.arange(index.shape[1], device=mask.device) < numbers[:, None]
        return torch.zeros_like(mask).scatter(1, index, within) & mask
