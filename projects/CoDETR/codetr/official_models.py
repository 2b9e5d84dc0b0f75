"""The official models as lazy nodes, with the official settings."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from . import nodes

__all__ = ["MODELS"]


def _official(node: DictConfig, *, soft: bool = False) -> DictConfig:
    """Set how the official code suppresses detections.

    Args:
        soft: those of the auxiliary heads softly, of regions up to 1000
    """
    regions, dense = node.auxiliary_heads
    for each in (node, regions, regions.rpn, dense):
        each.by_offset = True
    if soft:
        regions.update(soft_nms=True, max_detections=1000)
        dense.soft_nms = True
    return node


MODELS: dict[str, Callable[[], DictConfig]] = {
    "co_deformable_detr_r50_1x": lambda: _official(nodes.co_deformable_detr()),
    "co_dino_5scale_r50_1x": lambda: _official(nodes.co_dino()),
    "co_dino_5scale_swin_large": lambda: _official(
        nodes.co_dino(nodes.swin("large", drop_path=0.3))
    ),
    "co_dino_5scale_vit_large": lambda: _official(nodes.co_dino_vit_large(), soft=True),
    "co_dino_5scale_lsj_vit_large_lvis": lambda: _official(
        nodes.co_dino_vit_large_lvis(), soft=True
    ),
}
