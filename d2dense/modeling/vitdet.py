"""Detectron2's plain vision transformer (https://arxiv.org/abs/2203.16527) under the names of
arguments and yacs keys that :class:`~d2dense.modeling.vit.EVA02ViT` has.

Letters: N images, C channels, H and W height and width of the map of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.vit import ViT
from torch import nn

from d2dense.errors import UserError

from .vit import common_arguments

__all__ = ["ViTDet"]


@BACKBONE_REGISTRY.register()
class ViTDet(ViT):
    """One map ``res4`` of stride ``patch`` (16), ``(N, C, H, W)``. The defaults are ViT-B as ViTDet
    uses it on COCO.

    Args:
        channels: C
        depth: number of blocks
        heads: of the attention
        patch: side of a patch in pixels, to multiples of which batches are filled up
        mlp_ratio: width of the perceptrons, relative to C
        window: side of the windows in tokens
        global_blocks: numbers of the blocks that attend everywhere
        position_side: side of the grid of learned positions, which is resized to that of the
            tokens
        image_size: side of the images, in pixels, for whose tokens global blocks have relative
            positions; they are resized for others
        drop_path_rate: of the last block; rises linearly from 0

    Raises:
        UserError: channels that the heads do not divide, or blocks that there are not.
    """

    @configurable
    def __init__(
        self,
        *,
        channels: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        mlp_ratio: float = 4.0,
        window: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        position_side: int = 14,
        image_size: int = 1024,
        drop_path_rate: float = 0.1,
    ):
        if channels % heads or any(not 0 <= each < depth for each in global_blocks):
            raise UserError(
                f"ViTDet of {channels} channels, {heads} heads and {depth} blocks, of which "
                f"{list(global_blocks)} attend everywhere; expected heads that divide the channels "
                f"and numbers from 0 to {depth - 1} (MODEL.VIT / channels, heads, depth, "
                "global_blocks)"
            )
        super().__init__(
            img_size=image_size,
            patch_size=patch,
            embed_dim=channels,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            window_block_indexes=[i for i in range(depth) if i not in global_blocks],
            pretrain_img_size=position_side * patch,
            out_feature="res4",
        )
        self.patch = patch

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {**common_arguments(cfg), "image_size": cfg.MODEL.VIT.IMAGE_SIZE}

    @property
    def size_divisibility(self) -> int:
        return self.patch
