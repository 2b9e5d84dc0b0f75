"""The core of multi-scale deformable attention: weighted sums of samples from several maps.

Letters: N batch, S positions of all levels together, M heads, D channels per head, Q queries,
L levels, P points per level and head, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deformable_sampling", "sample_by_grid"]

Shapes = Sequence[tuple[int, int]]


def deformable_sampling(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return for every query and head the weighted sum of what its points read, ``(N, Q, M D)``.

    A point reads its level by bilinear interpolation; pixel (row i, column j) has its centre at
    ((j + 0.5) / Wl, (i + 0.5) / Hl), and outside the map everything is zero. 16-bit types are
    computed in float32, where positions are exact enough, and returned as they came.

    Args:
        value: ``(N, S, M, D)``, the levels one after the other, each row by row
        shapes: (Hl, Wl) per level; their areas add up to S
        locations: ``(N, Q, M, L, P, 2)``, x and y relative to the level's size
        weights: ``(N, Q, M, L, P)``
    """
    dtype = value.dtype
    if dtype in (torch.float16, torch.bfloat16):
        value, locations, weights = value.float(), locations.float(), weights.float()
    locations, weights = locations.to(value.dtype), weights.to(value.dtype)
    if value.device.type == "cpu" and not _is_traced():
        result = _SampleOnCpu.apply(value, locations, weights, shapes)
    else:
        result = sample_by_grid(value, shapes, locations, weights)
    return result.to(dtype)


def sample_by_grid(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Do what :func:`deformable_sampling` does for any device, with differentiable and traceable
    operators only. Levels are added up one by one, so only one level's samples exist at a time
    unless autograd keeps them.
    """
    n, _, m, d = value.shape
    q = locations.shape[1]
    maps, grids = _heads_first(value), _as_grid(locations)
    shares = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (N M, 1, Q, L, P)
    total = value.new_zeros(1)
    for level, (start, height, width) in enumerate(_spans(shapes)):
        image = maps[:, :, start : start + height * width].unflatten(2, (height, width))
        samples = _read(image, grids[:, :, level])
        total = total + (samples * shares[..., level, :]).sum(dim=-1)
    return total.reshape(n, m * d, q).transpose(1, 2)


class _SampleOnCpu(torch.autograd.Function):
    """The same result and gradients in less time and memory.

    Forward gathers rows of D numbers that are next to each other in memory; backward goes through
    few heads at a time, whose samples fit into the cache and are computed again, not kept.
    """

    @staticmethod
    def forward(ctx, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = [(int(height), int(width)) for height, width in shapes]
        return _sample_by_rows(value, ctx.shapes, locations, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights = ctx.saved_tensors
        n, _, m, d = value.shape
        q, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
        maps, grids = _heads_first(value), _as_grid(locations)
        shares = weights.transpose(1, 2).reshape(n * m, 1, q, levels, points)
        grad = grad.reshape(n, q, m, d).permute(0, 2, 3, 1).reshape(n * m, d, q, 1)
        to_maps, to_grids = torch.zeros_like(maps), torch.zeros_like(grids)
        to_shares = torch.zeros_like(shares)
        for heads in _chunks(n * m, torch.get_num_threads()):
            own = grad[heads]
            for level, (start, height, width) in enumerate(_spans(ctx.shapes)):
                pixels = slice(start, start + height * width)
                image = maps[heads, :, pixels].unflatten(2, (height, width))
                grid = grids[heads, :, level]
                to_shares[heads, 0, :, level] = _read(image, grid).mul_(own).sum(dim=1)
                to_image, to_grids[heads, :, level] = torch.ops.aten.grid_sampler_2d_backward(
                    own * shares[heads, :, :, level], image, grid, 0, 0, False, [True, True]
                )
                to_maps[heads, :, pixels] = to_image.flatten(2)
        return (
            to_maps.unflatten(0, (n, m)).permute(0, 3, 1, 2),
            2 * to_grids.reshape(n, m, q, levels, points, 2).transpose(1, 2),
            to_shares.reshape(n, m, q, levels, points).transpose(1, 2),
            None,
        )


def _sample_by_rows(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum the four neighbours of all points as rows of a table, in one pass."""
    n, s, m, d = value.shape
    q = locations.shape[1]
    if n * q == 0 or s == 0:
        return value.new_zeros(n, q, m * d)
    whole = {"dtype": torch.int32 if value.numel() // d < 2**31 else torch.int64}
    images = torch.arange(n, **whole).view(n, 1, 1, 1) * (s * m)
    heads = torch.arange(m, **whole).view(1, 1, m, 1)
    rows, shares = [], []
    for level, (start, height, width) in enumerate(_spans(shapes)):
        across = _neighbours(locations[:, :, :, level, :, 0], width)
        down = _neighbours(locations[:, :, :, level, :, 1], height)
        for i, share_y in down:
            share_y = share_y * weights[:, :, :, level]
            for j, share_x in across:
                position = (i * width + j + start).to(**whole)
                rows.append(position * m + heads + images)
                shares.append(share_x * share_y)
    rows = torch.cat(rows, dim=-1).view(n * q * m, -1)
    shares = torch.cat(shares, dim=-1).view(n * q * m, -1)
    table = value.reshape(n * s * m, d)
    summed = F.embedding_bag(rows, table, mode="sum", per_sample_weights=shares)
    return summed.view(n, q, m * d)


def _neighbours(where: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two pixels around relative positions along an axis, and the share of each, which
    is zero outside.
    """
    # far away, where whole numbers would overflow, is as outside as just beside
    where = torch.nan_to_num(where * size - 0.5, nan=-2.0).clamp(-2.0, size + 1.0)
    lower = where.floor()
    share = where - lower
    found = []
    for pixel, part in ((lower, 1 - share), (lower + 1, share)):
        inside = (pixel >= 0) & (pixel < size)
        found.append((pixel.clamp(0, size - 1), part * inside))
    return found


def _heads_first(value: Tensor) -> Tensor:
    """``(N, S, M, D)`` -> ``(N M, D, S)``."""
    return value.permute(0, 2, 3, 1).flatten(0, 1)


def _as_grid(locations: Tensor) -> Tensor:
    """Relative positions -> ``grid_sample``'s, from -1 to 1, ``(N M, Q, L, P, 2)``."""
    return (2 * locations - 1).transpose(1, 2).flatten(0, 1)


def _read(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _spans(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """Yield (first position, height, width) of each level."""
    start = 0
    for height, width in shapes:
        yield start, height, width
        start = start + height * width


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, start + size)


def _is_traced() -> bool:
    return torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling()
