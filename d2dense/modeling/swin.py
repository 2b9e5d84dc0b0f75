"""Detectron2's Swin transformer (https://arxiv.org/abs/2103.14030) for both kinds of config, and
traceable.

Letters: N images, C channels, H and W height and width of a map, S side of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.swin import PatchEmbed, PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import join_windows, missing, padded_to_multiple, split_windows

__all__ = ["Swin"]

_FEATURES = ("res2", "res3", "res4", "res5")
# Added to the scores of pairs that are no neighbours in the map.
_STRANGERS = -100.0


@BACKBONE_REGISTRY.register()
class Swin(Backbone):
    """Feature maps ``res2`` at stride 4 to ``res5`` at stride 32, ``(N, C, H, W)``, each with a
    layer norm. Sizes are rounded up. The defaults are Swin-T; parameters and values are those of
    Detectron2's class, of whose parts it is made.

    Args:
        embed_dim: C of ``res2``; each further map has twice as many
        depths, heads: blocks and attention heads of the four stages
        window: S
        drop_path_rate: of the last block; rises linearly from 0
        out_features: which maps are returned; the others have no norm
        size_divisibility: to what multiple batches are filled up; 0: none
    """

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        drop_path_rate: float = 0.2,
        out_features: Sequence[str] = _FEATURES,
        size_divisibility: int = 0,
    ):
        super().__init__()
        unknown = set(out_features) - set(_FEATURES)
        if unknown or not out_features or len(depths) != 4 or len(heads) != 4:
            raise UserError(
                f"Swin has four stages and the maps {', '.join(_FEATURES)}; found depths "
                f"{list(depths)}, heads {list(heads)}, out_features {list(out_features)} "
                "(MODEL.SWIN)"
            )
        self.patch_embed = PatchEmbed(embed_dim=embed_dim, norm_layer=nn.LayerNorm)
        widths = [embed_dim * 2**i for i in range(4)]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            _Stage(width, heads=m, window=window, drop_path=each.tolist(), last=width == widths[-1])
            for width, m, each in zip(widths, heads, rates)
        )
        self._out = {i: name for i, name in enumerate(_FEATURES) if name in out_features}
        self._shapes = {
            name: ShapeSpec(channels=widths[i], stride=2 ** (i + 2))
            for i, name in self._out.items()
        }
        for i in self._out:
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i]))
        self._size_divisibility = size_divisibility
        self.apply(_initialise)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.SWIN
        return {
            "embed_dim": node.EMBED_DIM,
            "depths": node.DEPTHS,
            "heads": node.HEADS,
            "window": node.WINDOW,
            "drop_path_rate": node.DROP_PATH,
            "out_features": node.OUT_FEATURES,
            "size_divisibility": node.SIZE_DIVISIBILITY,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of normalised images ``(N, 3, height, width)`` by name."""
        # Detectron2's parts decide by the size whether to fill up, which a trace writes down; they
        # get what needs no filling.
        x = padded_to_multiple(x.permute(0, 2, 3, 1), self.patch_embed.patch_size[0])
        x = self.patch_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        maps = {}
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self._out:
                maps[self._out[i]] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2)
            if layer.downsample is not None:
                x = _halved(x, layer.downsample)
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


class _Stage(nn.Module):
    """Blocks at one size, every second one with its windows moved; and, before the next stage, what
    halves the map, which is left to the caller.
    """

    def __init__(
        self, channels: int, *, heads: int, window: int, drop_path: Sequence[float], last: bool
    ):
        super().__init__()
        self.window = window
        self.shift = window // 2
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                heads=heads,
                window=window,
                shift=self.shift if i % 2 else 0,
                drop_path=rate,
            )
            for i, rate in enumerate(drop_path)
        )
        self.downsample = None if last else PatchMerging(channels)

    def forward(self, x: Tensor) -> Tensor:
        mask = strangers(x, self.window, self.shift)
        for block in self.blocks:
            x = block(x, mask)
        return x


class SwinBlock(SwinTransformerBlock):
    """Detectron2's block for maps of any size.

    Args:
        channels: C
        heads: of the attention
        window: S
        shift: by how much windows are moved right and down
        drop_path: probability with which training leaves out each half of the block
    """

    def __init__(self, channels: int, *, heads: int, window: int, shift: int, drop_path: float):
        super().__init__(channels, heads, window_size=window, shift_size=shift)
        # computed, so no part of checkpoints
        index = self.attn.relative_position_index
        self.attn.register_buffer("relative_position_index", index, persistent=False)
        if drop_path > 0:
            from timm.layers import DropPath

            self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(N, H, W, C)`` to the same shape; ``mask`` is that of :func:`strangers`."""
        h, w, side, shift = x.shape[1], x.shape[2], self.window_size, self.shift_size
        y = padded_to_multiple(self.norm1(x), side)
        rows, columns = y.shape[1], y.shape[2]
        if shift > 0:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = self.attn(split_windows(y, side, side), mask if shift > 0 else None)
        y = join_windows(y, side, side, rows, columns)
        if shift > 0:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + self.drop_path(y[:, :h, :w])
        return x + self.drop_path(self.mlp(self.norm2(x)))


def strangers(x: Tensor, side: int, shift: int) -> Tensor:
    """Return -100 where the two places of a pair come from different edges of the map after windows
    were moved, else 0, as ``(windows of one image, S * S, S * S)``.

    Args:
        x: ``(N, H, W, C)``, has the size and type
        side: S
        shift: by how much windows are moved right and down
    """
    parts = []  # of each axis: 0 whole windows, 1 the end, 2 what came around
    for length in (x.shape[1], x.shape[2]):
        length = length + missing(length, side)
        place = torch.arange(length, device=x.device)
        parts.append((place >= length - side).long() + (place >= length - shift).long())
    regions = (3 * parts[0][:, None] + parts[1])[None, :, :, None]
    regions = split_windows(regions, side, side).squeeze(-1)
    return (regions[:, :, None] != regions[:, None, :]).to(x.dtype) * _STRANGERS


def _halved(x: Tensor, merging: nn.Module) -> Tensor:
    x = padded_to_multiple(x, 2)
    n, h, w = x.shape[0], x.shape[1], x.shape[2]
    return merging(x.flatten(1, 2), h, w).reshape(n, h // 2, w // 2, -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
