"""The official models as lazy nodes, with the official settings."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from . import nodes

__all__ = ["MODELS"]

MODELS: dict[str, Callable[[], DictConfig]] = {
    "co_deformable_detr_r50_1x": nodes.co_deformable_detr,
    "co_dino_5scale_r50_1x": nodes.co_dino,
    "co_dino_5scale_swin_large": lambda: nodes.co_dino(nodes.swin("large", drop_path=0.3)),
    "co_dino_5scale_vit_large": nodes.co_dino_vit_large,
    "co_dino_5scale_lsj_vit_large_lvis": nodes.co_dino_vit_large_lvis,
}
