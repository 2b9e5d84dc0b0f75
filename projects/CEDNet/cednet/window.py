"""Self-attention within square windows (Swin Transformer).

Letters: N images, H and W height and width of a map, C channels, M heads, S side of a window,
B windows of all images together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2dense.layers import join_windows, padded_to_multiple, split_windows

__all__ = ["WindowAttention", "relative_positions"]


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias per head and relative position.

    Maps that windows do not divide are filled up with zeros at the right and the bottom; the
    filling takes part in the attention.

    Args:
        channels: C.
        heads: M, divides C.
        window: S.
        shift: by how many pixels the windows are moved right and down, 0 <= shift < S; parts of a
            window that are no neighbours in the map then do not see each other.
        roll_back_unshifted: the quirk of the official classification model. Maps not higher than a
            window are not shifted, yet what comes out is moved as if they had been. Needed for
            equality with its weights at 224 pixels, where the coarsest map is 7 x 7.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        window: int = 7,
        shift: int = 0,
        roll_back_unshifted: bool = False,
    ):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        if not 0 <= shift < window:
            raise ValueError(f"shift is {shift}, expected 0 <= shift < window = {window}")
        self.heads = heads
        self.window = window
        self.shift = shift
        self.roll_back_unshifted = roll_back_unshifted
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.position_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        self.register_buffer("position_index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H, W, C)`` to the same shape."""
        side = self.window
        h, w = x.shape[1], x.shape[2]
        x = padded_to_multiple(x, side)
        rows, columns = x.shape[1], x.shape[2]
        shifted = self.shift > 0
        if self.roll_back_unshifted:
            shifted = shifted and h > side
        if shifted:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        windows = self._attend(split_windows(x, side, side), rows, columns, shifted)
        x = join_windows(windows, side, side, rows, columns)
        if self.shift > 0:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :h, :w].contiguous()

    def _attend(self, windows: Tensor, rows: int, columns: int, shifted: bool) -> Tensor:
        b, area, c = windows.shape
        qkv = self.qkv(windows).reshape(b, area, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.position_bias[self.position_index]  # (S * S, S * S, M)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias.permute(2, 0, 1)
        if shifted:
            mask = self._strangers(rows, columns, windows)
            scores = scores.reshape(-1, mask.shape[0], self.heads, area, area)
            scores = (scores + mask[:, None]).reshape(b, self.heads, area, area)
        out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, area, c))

    def _strangers(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return -100 where the two pixels of a pair come from different edges of the map, else 0,
        as (windows of one image, S * S, S * S).
        """
        y = self._regions(rows, like)
        x = self._regions(columns, like)
        regions = (3 * y[:, None] + x[None, :])[None, :, :, None]
        regions = split_windows(regions, self.window, self.window).squeeze(-1)
        return (regions[:, :, None] != regions[:, None, :]).to(like.dtype) * -100.0

    def _regions(self, length: int, like: Tensor) -> Tensor:
        """Number the parts of a rolled axis: 0 whole windows, 1 the end, 2 what came around."""
        position = torch.arange(length, device=like.device)
        return (position >= length - self.window).long() + (position >= length - self.shift).long()

    def extra_repr(self) -> str:
        quirk = ", roll_back_unshifted=True" if self.roll_back_unshifted else ""
        return f"heads={self.heads}, window={self.window}, shift={self.shift}{quirk}"


def relative_positions(window: int) -> Tensor:
    """Return the row of the bias table for every (query, key), ``(S * S, S * S)``.

    It counts ``query - key`` in y, then x, from ``1 - S``.
    """
    axis = torch.arange(window)
    y, x = axis.repeat_interleave(window), axis.repeat(window)
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx
