"""The plain vision transformer of EVA-02 (https://arxiv.org/abs/2303.11331) as a detector's
backbone: most blocks attend within windows, some everywhere.

Letters: N images, C channels, H and W height and width of the map of tokens, B windows of all
images together, T tokens of a window or a map, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import is_recorded, join_windows, padded_to_multiple, split_windows

__all__ = ["EVA02ViT", "MapAttention", "common_arguments", "rotary_table"]

_FEATURE = "res4"
_FREQUENCIES = 10000.0
# The side of the grid that the model was pre-trained on; all others are scaled to it.
_ROTARY_SIDE = 16.0


def rotary_table(
    height: int, width: int, channels: int, like: Tensor, *, side: int | None = None
) -> Tensor:
    """Return sines, then cosines, of the rotary embedding of every token, ``(H * W, 2 * D)``, as
    timm's attention takes it.

    The first half of the channels turns with the row, the second with the column. Channels 2i and
    2i + 1 of a half are turned together, by ``10000^(-4i / D)`` per unit.

    Args:
        height, width: H, W
        channels: D
        like: has the device
        side: of the grid, in tokens, that is 16 units high and wide; None: H and W
    """
    steps = torch.arange(0, channels // 2, 2, dtype=torch.float32, device=like.device)
    frequencies = 1.0 / _FREQUENCIES ** (steps / (channels // 2))
    halves = []
    for length in (height, width):
        position = torch.arange(length, device=like.device)
        position = position / (side or length) * _ROTARY_SIDE
        halves.append((position[:, None] * frequencies).repeat_interleave(2, dim=1))
    rows = halves[0][:, None].expand(-1, halves[1].shape[0], -1)
    columns = halves[1][None].expand(halves[0].shape[0], -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MapAttention(nn.Module):
    """Attention among the tokens of a map, or of windows of it.

    Maps that windows do not divide are filled up with zeros at the right and the bottom; the
    filling takes part in the attention.

    Args:
        attention: ``(B, T, C)`` and the table of :func:`rotary_table` for T tokens -> ``(B, T, C)``
        window: side of the windows; None: the whole map is one
    """

    def __init__(self, attention: nn.Module, *, window: int | None):
        super().__init__()
        self.attention = attention
        self.window = window

    def forward(self, x: Tensor, rope: Tensor, attn_mask: None = None) -> Tensor:
        """``(N, H, W, C)`` to the same shape; the names are those that timm's block uses.

        Args:
            rope: the table of :func:`rotary_table` for a window, or for the map if there are none
            attn_mask: timm passes it; there is none
        """
        n, h, w, c = x.shape
        side = self.window
        if side is None:
            return self.attention(x.flatten(1, 2), rope=rope).reshape(n, h, w, c)
        x = padded_to_multiple(x, side)
        windows = self.attention(split_windows(x, side, side), rope=rope)
        return join_windows(windows, side, side, x.shape[1], x.shape[2])[:, :h, :w]

    def extra_repr(self) -> str:
        return f"window={self.window}"


@BACKBONE_REGISTRY.register()
class EVA02ViT(Backbone):
    """One map ``res4`` of stride ``patch`` (16), ``(N, C, H, W)``. The defaults are ViT-L as
    Co-DETR uses it on COCO.

    Images may have any size; they are filled up with zeros to whole patches.

    Args:
        channels: C
        depth: number of blocks
        heads: of the attention
        patch: side of a patch in pixels
        mlp_ratio: width of the perceptrons, relative to C
        window: side of the windows in tokens
        global_blocks: numbers of the blocks that attend everywhere
        position_side: side of the grid of learned positions, which is resized to that of the
            tokens
        rotary_side: of the grid, in tokens, to which the rotary embedding of global blocks scales
            positions; None: the height and width of each map
        drop_path_rate: of the last block; rises linearly from 0
        size_divisibility: to what multiple batches are filled up; a multiple of ``patch``
    """

    @configurable
    def __init__(
        self,
        *,
        channels: int = 1024,
        depth: int = 24,
        heads: int = 16,
        patch: int = 16,
        mlp_ratio: float = 8 / 3,
        window: int = 24,
        global_blocks: Sequence[int] = (3, 7, 11, 15, 19, 23),
        position_side: int = 32,
        rotary_side: int | None = None,
        drop_path_rate: float = 0.4,
        size_divisibility: int = 32,
    ):
        super().__init__()
        _check(channels, depth, heads, patch, global_blocks, size_divisibility)
        self.patch = patch
        self.window = window
        self.position_side = position_side
        self.rotary_side = rotary_side
        self.head_channels = channels // heads
        self._size_divisibility = size_divisibility
        self.patch_embed = nn.Conv2d(3, channels, patch, stride=patch)
        # the first entry is the class token's in pre-training; it is kept for the weights' sake
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + position_side**2, channels))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            _block(channels, heads, mlp_ratio, rate, None if i in global_blocks else window)
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(channels)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.VIT
        return {
            **common_arguments(cfg),
            "rotary_side": node.ROTARY_SIDE,
            "size_divisibility": node.SIZE_DIVISIBILITY,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map of normalised images ``(N, 3, height, width)`` by name."""
        x = padded_to_multiple(x.permute(0, 2, 3, 1), self.patch).permute(0, 3, 1, 2)
        x = self.patch_embed(x).permute(0, 2, 3, 1).contiguous()  # or every norm would copy it
        h, w = x.shape[1], x.shape[2]
        x = x + self._positions(h, w)
        table = partial(rotary_table, channels=self.head_channels, like=x)
        ropes = {
            self.window: table(self.window, self.window),
            None: table(h, w, side=self.rotary_side),
        }
        for block in self.blocks:
            x = block(x, rope=ropes[block.attn.window])
        return {_FEATURE: self.norm(x).permute(0, 3, 1, 2)}

    def _positions(self, h: int, w: int) -> Tensor:
        """Return the learned positions of H by W tokens, ``(1, H, W, C)``."""
        side = self.position_side
        grid = self.position_embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if is_recorded() or (h, w) != (side, side):
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {_FEATURE: ShapeSpec(channels=self.norm.weight.shape[0], stride=self.patch)}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    # ------------------------------------------------ layer-wise learning rates

    @property
    def num_layers(self) -> int:
        """Layers of the rule for layer-wise decay: one per block; patches and positions are layer
        0.
        """
        return len(self.blocks)

    def layer_id(self, name: str) -> int | None:
        """Return the layer of the parameter ``name``; None for those without decay, the last norm's
        and everything else's.
        """
        if name.startswith(("patch_embed.", "position_embedding")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return None


def common_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments that all vision transformers take from ``MODEL.VIT``."""
    node = cfg.MODEL.VIT
    return {
        "channels": node.CHANNELS,
        "depth": node.DEPTH,
        "heads": node.HEADS,
        "patch": node.PATCH,
        "mlp_ratio": node.MLP_RATIO,
        "window": node.WINDOW,
        "global_blocks": node.GLOBAL_BLOCKS,
        "position_side": node.POSITION_SIDE,
        "drop_path_rate": node.DROP_PATH,
    }


def _check(
    channels: int,
    depth: int,
    heads: int,
    patch: int,
    global_blocks: Sequence[int],
    size_divisibility: int,
) -> None:
    if channels % (4 * heads):
        raise UserError(
            f"{channels} channels of EVA02ViT cannot be rotated by row and column in {heads} "
            "heads; expected a multiple of four times the heads (MODEL.VIT.CHANNELS, HEADS / "
            "channels, heads)"
        )
    if any(not 0 <= each < depth for each in global_blocks):
        raise UserError(
            f"global_blocks of EVA02ViT (MODEL.VIT.GLOBAL_BLOCKS) are {list(global_blocks)}; "
            f"expected numbers from 0 to {depth - 1}"
        )
    if size_divisibility < 1 or size_divisibility % patch:
        raise UserError(
            f"size_divisibility of EVA02ViT (MODEL.VIT.SIZE_DIVISIBILITY) is {size_divisibility}; "
            f"expected a multiple of the patch of {patch} pixels"
        )


def _block(
    channels: int, heads: int, mlp_ratio: float, drop_path: float, window: int | None
) -> nn.Module:
    """Return timm's block, which is the same at every place of a map, with attention in windows."""
    from timm.models.eva import EvaBlock

    block = EvaBlock(
        channels,
        heads,
        qkv_fused=False,
        mlp_ratio=mlp_ratio,
        swiglu_mlp=True,
        scale_mlp=True,
        num_prefix_tokens=0,
        drop_path=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    block.attn = MapAttention(block.attn, window=window)
    return block


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
