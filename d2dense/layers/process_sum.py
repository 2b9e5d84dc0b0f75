"""Sums over the processes of a run that gradients pass through."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

__all__ = ["number_of_processes", "sum_over_processes"]


def number_of_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes, which must all call it equally often.

    The gradient is the sum of the processes' gradients. So where every process computes the same
    loss from such a sum, and gradients are averaged over the processes afterwards (as
    ``DistributedDataParallel`` does), parameters get the gradient of one process with all the data.

    A module that calls it in its forward says so with an attribute ``exchanges_in_forward = True``.
    """
    return values if number_of_processes() == 1 else all_reduce(values)
