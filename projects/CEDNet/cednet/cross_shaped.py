"""Self-attention within cross-shaped windows (CSwin Transformer), and over the whole map.

Letters: N images, H and W height and width of a map, C channels, M heads, S width of a stripe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.layers import join_windows, split_windows

__all__ = ["CrossShapedAttention", "GlobalAttention"]


class _RegionAttention(nn.Module):
    """Attention within rectangles of a map, plus a depth-wise 3x3 convolution of the values (the
    positional encoding) that ends at their borders.

    Args:
        channels: channels of queries, keys and values.
        heads: divides ``channels``.
    """

    def __init__(self, channels: int, *, heads: int):
        super().__init__()
        self.heads = heads
        self.position = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Maps ``(N, H, W, C)`` to one of that shape; ``height`` and ``width`` divide H and W."""
        h, w, c = v.shape[1], v.shape[2], v.shape[3]
        values = split_windows(v, height, width)
        attended = F.scaled_dot_product_attention(
            self._heads(split_windows(q, height, width)),
            self._heads(split_windows(k, height, width)),
            self._heads(values),
        )
        regions = values.shape[0]
        local = self.position(values.reshape(regions, height, width, c).permute(0, 3, 1, 2))
        attended = attended.transpose(1, 2).reshape(regions, height, width, c)
        out = attended + local.permute(0, 2, 3, 1)
        return join_windows(out, height, width, h, w)

    def _heads(self, x: Tensor) -> Tensor:
        # no -1: it would be ambiguous where there is no image
        side = x.shape[2] // self.heads
        return x.reshape(x.shape[0], x.shape[1], self.heads, side).transpose(1, 2)


class CrossShapedAttention(nn.Module):
    """Half of the heads attend within vertical stripes, half within horizontal ones.

    A map that the stripes do not divide is filled up with zeros on both sides; the filling takes
    part in the attention.

    Args:
        channels: C.
        heads: M, even, divides C.
        stripe: S.
    """

    def __init__(self, channels: int, *, heads: int, stripe: int):
        super().__init__()
        if heads % 2 or channels % heads:
            raise ValueError(f"{heads} heads: expected an even number that divides {channels}")
        self.stripe = stripe
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.vertical = _RegionAttention(channels // 2, heads=heads // 2)
        self.horizontal = _RegionAttention(channels // 2, heads=heads // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H, W, C)`` to the same shape."""
        h, w, c = x.shape[1], x.shape[2], x.shape[3]
        qkv = self.qkv(x)
        first, second = qkv.reshape(x.shape[0], h, w, 3, 2, c // 2).unbind(4)

        missing = (self.stripe - w % self.stripe) % self.stripe
        before = missing // 2
        first = F.pad(first, (0, 0, 0, 0, before, missing - before))
        q, k, v = first.unbind(3)
        columns = self.vertical(q, k, v, h, self.stripe)[:, :, before : before + w]

        missing = (self.stripe - h % self.stripe) % self.stripe
        before = missing // 2
        second = F.pad(second, (0, 0, 0, 0, 0, 0, before, missing - before))
        q, k, v = second.unbind(3)
        rows = self.horizontal(q, k, v, self.stripe, w)[:, before : before + h]
        return self.proj(torch.cat([columns, rows], -1))


class GlobalAttention(nn.Module):
    """Every pixel attends to the whole map: the long-range counterpart of
    :class:`CrossShapedAttention`.
    """

    def __init__(self, channels: int, *, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.everywhere = _RegionAttention(channels, heads=heads)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H, W, C)`` to the same shape."""
        h, w = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.everywhere(q, k, v, h, w))
