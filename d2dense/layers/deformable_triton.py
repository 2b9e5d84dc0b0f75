"""Multi-scale deformable attention's sampling as one Triton kernel for each direction.

A program computes some rows (one query of one head each) with all their channels; it goes through
levels and points, sums in float32 whatever the types of the arguments are, and never writes a
sample to memory. Importing this module needs Triton; ``deformable_op`` asks first.

Letters: N batch, S positions of all levels together, M heads, D channels per head, Q queries,
L levels, P points per level and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_LEVELS", "backward", "forward"]

Shapes = Sequence[tuple[int, int]]

MAX_LEVELS = 8
_ELEMENTS = 1024  # of the sums, per program: 8 for each thread
# Sizes of levels are plain arguments, Hl 2^32 + Wl: a tensor of them would have to be copied from
# the host. They change from batch to batch, and the kernels are not compiled again for lucky ones.
_VARYING = ["rows", "queries", "positions", *(f"size{level}" for level in range(MAX_LEVELS))]


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Return ``(N, Q, M D)`` of ``value``'s type; arguments as for ``deformable_sampling``, of
    16 or 32 bits each.
    """
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    n, q, m = weights.shape[:3]
    result = value.new_empty(n, q, m * value.shape[3])
    _launch(_read, value, shapes, locations, weights, result)
    return result


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``value``, ``locations`` and ``weights``, given that of the result.
    That of ``value`` is added up by atomic operations, so its last bits vary.
    """
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    to_value = torch.zeros_like(value, dtype=torch.float32)
    to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
    grads = (grad.contiguous(), to_value, to_locations, to_weights)
    _launch(_spread, value, shapes, locations, weights, *grads)
    return to_value.to(value.dtype), to_locations, to_weights


def _launch(kernel, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *more):
    _, positions, heads, channels = value.shape
    queries, _, levels, points = weights.shape[1:]
    rows = weights.shape[0] * queries * heads
    padded = triton.next_power_of_2(channels)
    block = max(1, _ELEMENTS // padded)
    sizes = [height << 32 | width for height, width in shapes] + [0] * (MAX_LEVELS - levels)
    constants = {"HEADS": heads, "CHANNELS": channels, "LEVELS": levels, "POINTS": points}
    grid = (triton.cdiv(rows, block),)
    tensors = (value, locations, weights, *more)
    with torch.cuda.device_of(value):
        kernel[grid](
            *tensors, rows, queries, positions, *sizes, **constants, ROWS=block, PADDED=padded
        )


@triton.jit
def _rows_of_program(
    rows,
    queries,
    positions,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the program's rows of (N, Q, M), which of them there are, the offsets of their
    channels in (N, Q, M, D) and, without the position, in (N, S, M, D), and which channels there
    are.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)[None, :]
    image = row // HEADS // queries
    begin = ((image * positions * HEADS + row % HEADS) * CHANNELS)[:, None] + channel
    return row, row < rows, (row * CHANNELS)[:, None] + channel, begin, channel < CHANNELS


@triton.jit
def _unpack(size):
    return (size.to(tl.int64) >> 32).to(tl.int32), size.to(tl.int32)


@triton.jit
def _split(relative, size):
    """Return the lower of the two pixels around relative positions along an axis, the share of the
    upper one, and whether any of both is on the map.
    """
    where = relative.to(tl.float32) * size - 0.5
    near = (where > -1) & (where < size)
    where = tl.where(near, where, -1.0)  # NaN and what no whole number can hold
    lower = tl.floor(where)
    return lower.to(tl.int32), where - lower, near


@triton.jit
def _point(locations, weights, point, real, height, width):
    """Return a point's upper left neighbour, the shares of the right and the lower neighbours,
    whether it is near the map, and its weight.
    """
    x, right, near_x = _split(tl.load(locations + 2 * point, mask=real, other=0.0), width)
    y, low, near_y = _split(tl.load(locations + 2 * point + 1, mask=real, other=0.0), height)
    weight = tl.load(weights + point, mask=real, other=0.0).to(tl.float32)
    return x, y, right, low, near_x & near_y & real, weight


@triton.jit
def _place(first, x, y, height, width, near, stride):
    """Return the offset of pixel (y, x) of a level in ``value``, and whether it is on the map."""
    inside = near & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = first + y.to(tl.int64) * width + x
    return (pixel * stride)[:, None], inside[:, None]


@triton.jit(do_not_specialize=_VARYING)
def _read(
    value,  # (N, S, M, D)
    locations,  # (N, Q, M, L, P, 2)
    weights,  # (N, Q, M, L, P)
    result,  # (N, Q, M, D)
    rows,
    queries,
    positions,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    sizes = (size0, size1, size2, size3, size4, size5, size6, size7)
    row, real, outputs, begin, exists = _rows_of_program(
        rows, queries, positions, HEADS, CHANNELS, ROWS, PADDED
    )
    values = value + begin
    total = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    first = tl.full((), 0, tl.int64)
    for level in tl.static_range(LEVELS):
        height, width = _unpack(sizes[level])
        for k in range(POINTS):
            point = row * (LEVELS * POINTS) + level * POINTS + k
            x, y, right, low, near, weight = _point(locations, weights, point, real, height, width)
            for corner in tl.static_range(4):
                share = (right if corner % 2 else 1 - right) * (low if corner // 2 else 1 - low)
                place, inside = _place(
                    first, x + corner % 2, y + corner // 2, height, width, near, HEADS * CHANNELS
                )
                read = tl.load(values + place, mask=inside & exists, other=0.0).to(tl.float32)
                total += (share * weight)[:, None] * read
        first += height.to(tl.int64) * width
    tl.store(result + outputs, total.to(result.dtype.element_ty), mask=real[:, None] & exists)


@triton.jit
def _spread_point(
    value,
    to_value,
    begin,
    own,
    exists,
    first,
    height,
    width,
    stride,
    x,
    y,
    right,
    low,
    near,
    weight,
):
    """Add a point's share of the gradient ``own`` to its neighbours; return what its weight gets,
    and what its position in pixels gets per weight.
    """
    along, along_x, along_y = weight * 0, weight * 0, weight * 0
    for corner in tl.static_range(4):
        across = right if corner % 2 else 1 - right
        down = low if corner // 2 else 1 - low
        place, inside = _place(first, x + corner % 2, y + corner // 2, height, width, near, stride)
        place, inside = begin + place, inside & exists
        part = (across * down * weight)[:, None] * own
        tl.atomic_add(to_value + place, part, mask=inside, sem="relaxed")
        read = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
        product = tl.sum(read * own, axis=1)
        along += across * down * product
        along_x += down * (product if corner % 2 else -product)
        along_y += across * (product if corner // 2 else -product)
    return along, along_x, along_y


@triton.jit(do_not_specialize=_VARYING)
def _spread(
    value,  # (N, S, M, D)
    locations,  # (N, Q, M, L, P, 2)
    weights,  # (N, Q, M, L, P)
    grad,  # (N, Q, M, D), of the result
    to_value,  # (N, S, M, D), float32 zeros
    to_locations,
    to_weights,
    rows,
    queries,
    positions,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    sizes = (size0, size1, size2, size3, size4, size5, size6, size7)
    row, real, outputs, begin, exists = _rows_of_program(
        rows, queries, positions, HEADS, CHANNELS, ROWS, PADDED
    )
    own = tl.load(grad + outputs, mask=real[:, None] & exists, other=0.0).to(tl.float32)
    first = tl.full((), 0, tl.int64)
    for level in tl.static_range(LEVELS):
        height, width = _unpack(sizes[level])
        for k in range(POINTS):
            point = row * (LEVELS * POINTS) + level * POINTS + k
            x, y, right, low, near, weight = _point(locations, weights, point, real, height, width)
            stride: tl.constexpr = HEADS * CHANNELS
            to_weight, to_x, to_y = _spread_point(
                value,
                to_value,
                begin,
                own,
                exists,
                first,
                height,
                width,
                stride,
                x,
                y,
                right,
                low,
                near,
                weight,
            )
            kind = to_locations.dtype.element_ty
            tl.store(to_locations + 2 * point, (to_x * weight * width).to(kind), mask=real)
            tl.store(to_locations + 2 * point + 1, (to_y * weight * height).to(kind), mask=real)
            tl.store(to_weights + point, to_weight.to(to_weights.dtype.element_ty), mask=real)
        first += height.to(tl.int64) * width
