"""Multi-scale deformable attention's sampling on the CPU, in few passes over the memory.

Every level gets a border of zeros, one pixel wide. A point then always has four neighbours, which
are rows of one table at fixed distances from the first; reading a query is one weighted sum of
rows, which ``embedding_bag`` does without keeping a sample. Backward needs the same sum the other
way round: sorted by their first neighbours, the points of a pixel are a bag of gradients.

Letters: S positions of all levels together, M heads, D channels per head, Q queries, L levels,
P points per level and head; T positions with the borders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "forward"]

Shapes = Sequence[tuple[int, int]]

_AT_ONCE = 1024  # queries whose points fit into the caches together


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Return ``(N, Q, M D)`` of value's type; arguments as for ``deformable_sampling``. Locations
    and weights have the type in which all is computed.
    """
    n, _, m, d = value.shape
    q = locations.shape[1]
    bordered = _Bordered(shapes, weights, d)
    result = value.new_empty(n, q, m * d)
    for image in range(n):
        table = bordered.table(value[image])
        queries = (each[image].split(_AT_ONCE) for each in (locations, weights, result))
        for places, parts, out in zip(*queries):
            first, share = bordered.cells(bordered.position(places))
            neighbours, shares = bordered.neighbours(first), _bilinear(share, parts)
            read = F.embedding_bag(
                neighbours.flatten(1), table, mode="sum", per_sample_weights=shares.flatten(1)
            )
            out.copy_(read.view(-1, m * d))
    return result


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, given that of the result."""
    n, _, m, d = value.shape
    bordered = _Bordered(shapes, weights, d)
    to_value = weights.new_zeros(value.shape)
    to_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    to_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    for image in range(n):
        own = grad[image].reshape(-1, d).to(weights.dtype)  # (Q M, D)
        position = bordered.position(locations[image])
        first, share = bordered.cells(position)
        products = _products(own, bordered.table(value[image]), bordered.neighbours(first))
        slopes, to_weights[image] = _slopes(products, share, weights[image])
        slopes = slopes.mul_(bordered.size).mul_(bordered.is_inside(position))
        to_locations[image] = slopes
        del products, slopes, position
        shares = _bilinear(share, weights[image])
        for corner, sums in enumerate(_sums_of_rows(own, first, shares, bordered.rows)):
            bordered.add_inner(to_value[image], sums.view(-1, m, d), corner)
    return to_value.to(value.dtype), to_locations, to_weights


class _Bordered:
    """Where things are in a table of all levels with borders, ``(T M, D)``: pixel (i, j) of a level
    is at (i + 1, j + 1) of its bordered map, and the heads of a position are neighbouring rows.
    """

    def __init__(self, shapes: Shapes, weights: Tensor, channels: int):
        queries, self.heads, levels, points = weights.shape[1:]
        self.shapes, self.channels = shapes, channels
        starts = [start for _, start in self._levels()]
        self.rows = sum((h + 2) * (w + 2) for h, w in shapes) * self.heads
        entries = queries * self.heads * levels * points * 4
        whole = torch.int32 if max(self.rows, entries) < 2**31 else torch.int64
        like = {"dtype": weights.dtype}
        alike = (self.heads, levels, points)
        # one number per head, level and point, so that vectors of the inner loops are long
        sizes = torch.tensor([(w, h) for h, w in shapes], **like).view(1, levels, 1, 2)
        self.size = sizes.expand(*alike, 2).contiguous()
        self.pitch = self.size[..., 0] + 2
        heads = torch.arange(self.heads, dtype=whole).view(-1, 1, 1)
        begin = torch.tensor(starts, dtype=whole).view(1, levels, 1)
        self.begin = (begin * self.heads + heads).expand(alike).contiguous()
        below = self.pitch[0].flatten().to(whole)
        steps = torch.stack([0 * below, 0 * below + 1, below, below + 1])
        self.steps = steps * self.heads  # (4, L P), from the upper left neighbour

    def position(self, locations: Tensor) -> Tensor:
        """Relative locations -> pixels of the bordered maps, 0 at the centre of the first one."""
        return torch.addcmul(self.size.new_full((), 0.5), locations, self.size)

    def is_inside(self, position: Tensor) -> Tensor:
        """Return which coordinates are nearer than a pixel to the map."""
        return (position > 0) & (position < self.size + 1)

    def cells(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each point's upper left neighbour, ``(Q M, L P)``, and the share of the
        right and lower neighbours, ``(Q, M, L, P, 2)``. What is far away reads the border alone.
        """
        # unlike clamp, these two replace NaN
        share = torch.fmax(position, self.size.new_zeros(()))
        torch.fmin(share, self.size + 1, out=share)
        lower = torch.minimum(share.floor(), self.size)
        share -= lower
        lower = lower.to(self.steps.dtype)
        first = torch.addcmul(lower[..., 0], lower[..., 1], self.pitch.to(lower.dtype))
        first = first.mul_(self.heads).add_(self.begin)
        return first.view(-1, self.steps.shape[1]), share

    def neighbours(self, first: Tensor) -> Tensor:
        """``(Q M, L P)`` -> the rows of all four neighbours, ``(Q M, 4, L P)``."""
        return first[:, None] + self.steps

    def table(self, value: Tensor) -> Tensor:
        """``(S, M, D)`` -> ``(T M, D)``."""
        table = self.size.new_zeros(self.rows // self.heads, self.heads, self.channels)
        for inner, outer in self._maps(value, table):
            outer[1:-1, 1:-1] = inner
        return table.flatten(0, 1)

    def add_inner(self, value: Tensor, table: Tensor, corner: int) -> None:
        """Add ``(T, M, D)``, kept at upper left neighbours, to a corner's pixels ``(S, M, D)``."""
        down, right = divmod(corner, 2)
        for inner, outer in self._maps(value, table):
            height, width = inner.shape[:2]
            inner += outer[1 - down :, 1 - right :][:height, :width]

    def _maps(self, value: Tensor, table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each level of both as maps, ``(Hl, Wl, M, D)`` and with border."""
        start = 0
        for (height, width), border in self._levels():
            inner = value[start : start + height * width].unflatten(0, (height, width))
            end = border + (height + 2) * (width + 2)
            yield inner, table[border:end].unflatten(0, (height + 2, width + 2))
            start += height * width

    def _levels(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Yield each level's size and the first position of its bordered map."""
        start = 0
        for height, width in self.shapes:
            yield (height, width), start
            start += (height + 2) * (width + 2)


def _bilinear(share: Tensor, weights: Tensor) -> Tensor:
    """Return the shares of the four neighbours times the weight, ``(Q M, 4, L P)``."""
    q, m, levels, points = weights.shape
    right, low = (share[..., axis].reshape(q * m, -1) for axis in (0, 1))
    weights = weights.reshape(q * m, -1)
    result = weights.new_empty(q * m, 4, levels * points)
    below = low * weights
    for row, part in enumerate((weights - below, below)):
        torch.mul(part, right, out=result[:, 2 * row + 1])
        torch.sub(part, result[:, 2 * row + 1], out=result[:, 2 * row])
    return result


def _products(grad: Tensor, table: Tensor, neighbours: Tensor) -> Tensor:
    """Return the products of each query's gradient with each of its neighbours' values,
    ``(Q M, 4, L P)``: what each neighbour's share would get.
    """
    each = neighbours[0].numel()
    begins = torch.arange(0, neighbours.numel() + 1, each, dtype=neighbours.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors say that they are young
        wanted = torch.sparse_csr_tensor(
            begins,
            neighbours.flatten(),
            grad.new_zeros(neighbours.numel()),
            (grad.shape[0], table.shape[0]),
            check_invariants=False,
        )
    # the product of two matrices at given places only: each row's neighbours
    products = torch.sparse.sampled_addmm(wanted, grad, table.t(), beta=0.0)
    return products.values().view(neighbours.shape)


def _slopes(products: Tensor, share: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of positions in pixels, ``(Q, M, L, P, 2)``, and of weights, from those
    of the neighbours' shares: the chain rule of bilinear interpolation.
    """
    right, low = (share[..., axis].reshape(products[:, 0].shape) for axis in (0, 1))
    flat = weights.reshape(right.shape)
    across = products[:, 1] - products[:, 0], products[:, 3] - products[:, 2]
    upper = torch.addcmul(products[:, 0], right, across[0])
    down = torch.addcmul(products[:, 2], right, across[1]).sub_(upper)
    slopes = share.new_empty(*right.shape, 2)
    torch.mul(torch.lerp(*across, low), flat, out=slopes[..., 0])
    torch.mul(down, flat, out=slopes[..., 1])
    to_weights = upper.addcmul_(down, low)
    return slopes.view(share.shape), to_weights.view(weights.shape)


def _sums_of_rows(grad: Tensor, first: Tensor, shares: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield for each corner, ``(rows, D)``: for every row of the table the sum of ``grad`` times
    the corner's share over all points whose upper left neighbour it is.
    """
    points = first.shape[1]
    keys, order = first.flatten().sort()
    begins = torch.searchsorted(
        keys, torch.arange(rows, dtype=keys.dtype), out_int32=keys.dtype == torch.int32
    )
    queries = order.div(points, rounding_mode="floor").to(keys.dtype)
    for corner in range(4):
        own = shares[:, corner].flatten()[order]
        yield F.embedding_bag(queries, grad, begins, mode="sum", per_sample_weights=own)
