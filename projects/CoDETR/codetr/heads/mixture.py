"""Mixtures of two Gaussians on a line, fitted for many small samples at once.

Letters: S samples in any number of dimensions, V values in a sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixture", "fit_mixture"]


class Mixture(NamedTuple):
    """Two weighted normal distributions for each sample.

    Attributes:
        weights, means, variances: ``(S, 2)``
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_densities(self, values: Tensor) -> Tensor:
        """Return the logarithm of weight times density, ``(S, V, 2)``, of values ``(S, V)``."""
        weights, means, variances = (each[..., None, :] for each in self)
        distance = (values[..., None] - means).square() / variances
        return weights.log() - 0.5 * (math.log(2 * math.pi) + variances.log() + distance)


@torch.no_grad()
def fit_mixture(
    values: Tensor,
    mask: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-3,
    regularization: float = 1e-6,
) -> Mixture:
    """Fit by expectation-maximisation, in double precision, from equal weights, the smallest and
    the largest value as means and variances of 1.

    Every sample stops by itself where the mean log-likelihood of its values rises by less than
    ``tolerance``: the rule and the two constants of scikit-learn, whose fit is meant. All take part
    in all iterations nevertheless, so that nobody waits for the device. Of samples like the losses
    of candidates one in seven hundred needs more than 30 iterations.

    Args:
        values: ``(S, V)``
        mask: ``(S, V)``, False for values that only fill up; a sample may have none
        iterations: at most
        regularization: is added to the variances
    """
    values = torch.where(mask, values.double(), 0.0)
    count = mask.sum(dim=-1).clamp(min=1).double()
    some = mask.any(dim=-1)
    ends = [
        values.masked_fill(~mask, math.inf).amin(dim=-1),
        values.masked_fill(~mask, -math.inf).amax(dim=-1),
    ]
    means = torch.stack([torch.where(some, end, 0.0) for end in ends], dim=-1)
    mixture = Mixture(torch.full_like(means, 0.5), means, torch.ones_like(means))
    likelihood = torch.full_like(count, -math.inf)
    running = torch.ones_like(some)
    for _ in range(iterations):
        logs = mixture.log_densities(values)
        total = logs.logsumexp(dim=-1)
        shares = (logs - total[..., None]).exp() * mask[..., None]
        updated = _maximise(values, shares, count, regularization)
        mixture = Mixture(
            *(torch.where(running[..., None], *pair) for pair in zip(updated, mixture))
        )
        previous, likelihood = likelihood, (total * mask).sum(dim=-1) / count
        running = running & ~((likelihood - previous).abs() < tolerance)
    return mixture


def _maximise(values: Tensor, shares: Tensor, count: Tensor, regularization: float) -> Mixture:
    sizes = shares.sum(dim=-2) + 10 * torch.finfo(shares.dtype).eps
    means = (shares * values[..., None]).sum(dim=-2) / sizes
    spread = (shares * (values[..., None] - means[..., None, :]).square()).sum(dim=-2)
    return Mixture(sizes / count[..., None], means, spread / sizes + regularization)
