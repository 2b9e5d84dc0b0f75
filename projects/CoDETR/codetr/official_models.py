"""The official models as lazy nodes, with the official settings."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from . import nodes

__all__ = ["MODELS"]

_LVIS_CLASSES = 1203


def _vit(node: DictConfig) -> DictConfig:
    """Set what the models on ViT-L have in common."""
    node.denoising.update(num_queries=300, box_noise=0.4)
    node.max_detections = 1000
    node.auxiliary_heads[0].rpn.update(test_candidates=8000, test_proposals=2000, nms_threshold=0.9)
    return node


def co_dino_vit_large() -> DictConfig:
    """Return the model for COCO, after Objects365."""
    node = _vit(nodes.co_dino(nodes.vit_large(), num_queries=1500))
    node.auxiliary_heads[0].update(convs=4, fcs=1, class_agnostic=True, stds=[0.05, 0.05, 0.1, 0.1])
    return node


def co_dino_vit_large_lvis() -> DictConfig:
    """Return the model for LVIS, after Objects365, on squares of 1536 pixels."""
    body = nodes.vit_large(
        window=16, global_blocks=list(range(2, 24, 3)), rotary_side=96, drop_path_rate=0.3
    )
    node = _vit(nodes.co_dino(body, num_classes=_LVIS_CLASSES))
    node.mask_padding = False
    return node


MODELS: dict[str, Callable[[], DictConfig]] = {
    "co_deformable_detr_r50_1x": nodes.co_deformable_detr,
    "co_dino_5scale_r50_1x": nodes.co_dino,
    "co_dino_5scale_swin_large": lambda: nodes.co_dino(nodes.swin("large", drop_path=0.3)),
    "co_dino_5scale_vit_large": co_dino_vit_large,
    "co_dino_5scale_lsj_vit_large_lvis": co_dino_vit_large_lvis,
}
