"""The core of multi-scale deformable attention: weighted sums of samples from several maps.

Letters: N batch, S positions of all levels together, M heads, D channels per head, Q queries,
L levels, P points per level and head, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import deformable_op

__all__ = ["deformable_sampling", "is_recorded", "sample_by_grid"]

Shapes = Sequence[tuple[int, int]]


def deformable_sampling(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return for every query and head the weighted sum of what its points read, ``(N, Q, M D)``.

    A point reads its level by bilinear interpolation; pixel (row i, column j) has its centre at
    ((j + 0.5) / Wl, (i + 0.5) / Hl), and outside the map everything is zero. 16-bit types are
    computed in float32, where positions are exact enough, and returned as they came.

    The CPU and, where Triton works, CUDA have a faster way with a first gradient only;
    other devices, tracing and exporting use :func:`sample_by_grid`.

    Args:
        value: ``(N, S, M, D)``, the levels one after the other, each row by row
        shapes: (Hl, Wl) per level; their areas add up to S
        locations: ``(N, Q, M, L, P, 2)``, x and y relative to the level's size
        weights: ``(N, Q, M, L, P)``
    """
    dtype, exact = value.dtype, torch.promote_types(value.dtype, torch.float32)
    locations, weights = locations.to(exact), weights.to(exact)
    if deformable_op.is_supported(value, shapes) and not is_recorded():
        return deformable_op.sample(value, shapes, locations, weights)
    return sample_by_grid(value.to(exact), shapes, locations, weights).to(dtype)


def sample_by_grid(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Do what :func:`deformable_sampling` does for any device, with differentiable and traceable
    operators only; the same arguments and result, but of one type. Levels are added up one by one,
    so only one level's samples exist at a time unless autograd keeps them.
    """
    n, _, m, _ = value.shape
    # heads become images by cat: merging two dynamic sizes stops torch.export
    maps = torch.cat(value.permute(2, 0, 3, 1).unbind())  # (M N, D, S)
    grids = torch.cat((2 * locations - 1).unbind(dim=2))
    shares = torch.cat(weights.unbind(dim=2))[:, None]  # (M N, 1, Q, L, P)
    total = value.new_zeros(1)
    for level, (start, height, width) in enumerate(_spans(shapes)):
        image = maps[:, :, start : start + height * width].unflatten(2, (height, width))
        samples = F.grid_sample(image, grids[:, :, level], align_corners=False)
        total = total + (samples * shares[..., level, :]).sum(dim=-1)
    total = torch.cat(total.view(m, n, *total.shape[1:]).unbind(), dim=1)
    return total.transpose(1, 2).contiguous()  # a linear layer follows, one product of its rows


def _spans(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """Yield (first position, height, width) of each level."""
    start = 0
    for height, width in shapes:
        yield start, height, width
        start = start + height * width


def is_recorded() -> bool:
    """Return whether what runs is recorded for use without this library."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return True
    # the public is_exporting is True under torch.compile too
    return getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_compiling())
