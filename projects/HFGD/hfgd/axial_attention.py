"""Axial attention: every pixel sees its column, then its row.

Letters: N images, C channels, H and W of the map, L lines, T pixels of a line, M heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.errors import UserError

from .layers import glorot, start_alike

__all__ = ["AxialAttention", "LineAttention"]


class LineAttention(nn.Module):
    """Multi-head self-attention within each line, without residual and without positions.

    Lines are the batch of PyTorch's fused kernels, so the T x T maps are never in memory.

    Args:
        channels: C.
        heads: M, which divides C.
    """

    def __init__(self, *, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise UserError(
                f"{channels} channels cannot be split into {heads} attention heads; change "
                "MODEL.HFGD.HFGM.AA_HEADS / aa_heads of HFGDHead"
            )
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.o = nn.Linear(channels, channels)
        for layer in (self.q, self.k, self.v, self.o):
            glorot(layer)
        start_alike(self.q, self.k)

    def forward(self, lines: Tensor) -> Tensor:
        """``(L, T, C)`` to the same shape."""
        query = self._split(self.q(lines))
        key = self._split(self.k(lines))
        found = F.scaled_dot_product_attention(query, key, self._split(self.v(lines)))
        return self.o(found.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """``(L, T, C)`` to ``(L, M, T, C / M)``, a view."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AxialAttention(nn.Module):
    """Attention within columns, then within rows.

    Args:
        channels, heads: see :class:`LineAttention`.
        residual: whether each of the two adds to its input.
    """

    def __init__(self, *, channels: int, heads: int = 4, residual: bool = True):
        super().__init__()
        self.residual = residual
        self.column = LineAttention(channels=channels, heads=heads)
        self.row = LineAttention(channels=channels, heads=heads)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        # copied once, instead of once for each of q, k and v
        columns = x.permute(0, 3, 2, 1).contiguous()
        found = self.column(columns.flatten(0, 1)).view_as(columns)
        columns = columns + found if self.residual else found
        rows = columns.transpose(1, 2).contiguous()
        found = self.row(rows.flatten(0, 1)).view_as(rows)
        rows = rows + found if self.residual else found
        return rows.permute(0, 3, 1, 2)
