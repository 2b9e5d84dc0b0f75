"""timm's windows for images of any size: filled up so that PyTorch sees what is divisible.

timm's own remainders of remainders compute the same, but no size that follows from them can be
compared with another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor

from d2dense.layers import join_windows, missing, padded_to_multiple, split_windows
from d2dense.modeling.swin import strangers

__all__ = ["REPLACEMENTS"]

_merge_filled, _embed_filled = PatchMerging.forward, PatchEmbed.forward


def _attend_in_windows(self: SwinTransformerBlock, x: Tensor) -> Tensor:
    """timm's ``SwinTransformerBlock._attn`` of maps ``(N, H, W, C)``."""
    height, width = x.shape[1:3]
    (side, _), (shift, _) = self.window_size, self.shift_size
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    x = padded_to_multiple(x, side)
    rows, columns = x.shape[1:3]
    mask = strangers(x, side, shift) if shift else None
    x = self.attn(split_windows(x, side, side), mask=mask)
    x = join_windows(x, side, side, rows, columns)[:, :height, :width]
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def _merge(self: PatchMerging, x: Tensor) -> Tensor:
    return _merge_filled(self, padded_to_multiple(x, 2))


def _embed(self: PatchEmbed, x: Tensor) -> Tensor:
    if self.dynamic_img_pad:
        (height, width), (rows, columns) = x.shape[-2:], self.patch_size
        x = F.pad(x, (0, missing(width, columns), 0, missing(height, rows)))
    return _embed_filled(self, x)


REPLACEMENTS = (
    (SwinTransformerBlock, "_attn", _attend_in_windows),
    (PatchMerging, "forward", _merge),
    (PatchEmbed, "forward", _embed),
)
