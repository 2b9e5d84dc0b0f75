"""The paper's models as lazy nodes; every call returns a new one::

model = nodes.co_dino(nodes.swin("large"))
model.num_classes = 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from omegaconf import DictConfig

from d2dense.config import detr, single_scale_detr
from d2dense.errors import UserError
from d2dense.modeling import EVA02ViT, Swin
from d2dense.modeling.necks import SimplePyramid

from . import heads as parts
from .adapter import MultiScaleAdapter
from .heads.rpn import ProposalNetwork
from .meta_arch import CoDETR
from .positive_queries import PositiveQueries
from .single_scale_adapter import SingleScaleAdapter

__all__ = [
    "COLLABORATORS",
    "Body",
    "co_deformable_detr",
    "co_dino",
    "co_dino_vit_large",
    "co_dino_vit_large_lvis",
    "collaborative",
    "conditional_detr",
    "dab_detr",
    "deformable_detr",
    "deformable_detr_plus_plus",
    "dino",
    "dino_with_heads",
    "h_deformable_detr",
    "resnet50",
    "swin",
    "vit_large",
]

_SWINS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24], "window": 7},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "heads": [3, 6, 12, 24], "window": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32], "window": 12},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "heads": [6, 12, 24, 48], "window": 12},
}
_FINEST = {4: "res2", 8: "res3", 32: "res5"}  # stride -> map


class Body(NamedTuple):
    """A backbone and what is known of its maps.

    Attributes:
        node: of the backbone.
        widths: channels of its maps by name, finest first.
        pyramid: levels come from the one map of a plain vision transformer.
    """

    node: DictConfig
    widths: dict[str, int]
    pyramid: bool = False


def resnet50() -> Body:
    """Return ResNet-50 in torchvision's layout: frozen norms, and a frozen stem and first stage."""
    node = L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=[],
        freeze_at=2,
    )
    return Body(node, {f"res{k}": 64 * 2**k for k in range(2, 6)})


def swin(size: str, *, drop_path: float, size_divisibility: int = 0) -> Body:
    """Return a Swin as Microsoft made it.

    Args:
        size: ``tiny``, ``small``, ``base`` or ``large``.
        drop_path: rate of the last block; it grows linearly from 0.
        size_divisibility: to what multiple batches are filled up; 0: none.

    Raises:
        UserError: another size.
    """
    if size not in _SWINS:
        raise UserError(f"Swin of size {size!r}; expected one of {', '.join(_SWINS)}")
    settings = _SWINS[size]
    node = L(Swin)(
        **settings, drop_path_rate=drop_path, out_features=[], size_divisibility=size_divisibility
    )
    return Body(node, {f"res{k + 2}": settings["embed_dim"] * 2**k for k in range(4)})


def vit_large(**changes) -> Body:
    """Return EVA-02's ViT-L as on COCO; ``changes`` are arguments of :class:`EVA02ViT`."""
    return Body(L(EVA02ViT)(**changes), {"res4": 1024}, pyramid=True)


def _finished(body: Body, stride: int, levels: int, channels: int = 256, **_) -> dict[str, Any]:
    """Return backbone, its maps from ``stride`` on, and the neck that makes ``levels`` of them."""
    if body.pyramid:
        neck = L(SimplePyramid)(in_channels=body.widths["res4"], out_channels=channels)
        return {"backbone": body.node, "in_features": ["res4"], "neck": neck, "levels": levels}
    names = list(body.widths)
    names = names[names.index(_FINEST[stride]) :]
    body.node.out_features = names
    return {
        "backbone": body.node,
        "in_features": names,
        "neck": detr.channel_mapper(
            widths={name: body.widths[name] for name in names}, channels=channels, levels=levels
        ),
        "levels": levels,
    }


# ------------------------------------------------ detectors without auxiliary heads


def deformable_detr(body: Body | None = None, **settings) -> DictConfig:
    """Return Deformable DETR in one stage without box refinement.

    Args:
        body: None: ResNet-50
        settings: ``num_classes``, ``channels``
    """
    parts = _finished(body or resnet50(), 8, 4, **settings)
    return detr.deformable_detr(**parts, **settings)


def deformable_detr_plus_plus(
    body: Body | None = None, *, num_queries: int = 300, **settings
) -> DictConfig:
    """Return Deformable-DETR++: two stages, box refinement, learned contents, look forward twice.
    With more queries it detects 300 objects, not 100.
    """
    parts = _finished(body or resnet50(), 8, 4, **settings)
    node = detr.deformable_detr_plus_plus(**parts, **settings)
    node.queries.num_queries = num_queries
    node.max_detections = 300 if num_queries > 300 else 100
    return node


def h_deformable_detr(body: Body | None = None, **settings) -> DictConfig:
    """Return H-Deformable-DETR: Deformable-DETR++ with hybrid matching.

    Args: see :func:`deformable_detr_plus_plus`
    """
    return detr.hybrid_matching(deformable_detr_plus_plus(body, **settings))


def dino(
    body: Body | None = None, *, num_queries: int = 900, levels: int = 5, **settings
) -> DictConfig:
    """Return DINO.

    Args:
        body: backbone; ResNet-50 by default.
        num_queries: how many of the encoder's proposals become queries.
        levels: 5 from stride 4 on, or 4 from stride 8 on.
        settings: ``num_classes`` and ``channels`` of :func:`d2dense.config.detr.dino`.

    Raises:
        UserError: another number of levels.
    """
    if levels not in (4, 5):
        raise UserError(f"DINO with {levels} levels; expected 4 or 5")
    stride = 4 if levels == 5 else 8
    node = detr.dino(**_finished(body or resnet50(), stride, levels, **settings), **settings)
    node.queries.num_queries = num_queries
    return node


def conditional_detr(body: Body | None = None, **settings) -> DictConfig:
    """Return Conditional DETR on the map of stride 32."""
    return _single_scale(single_scale_detr.conditional_detr, body, settings)


def dab_detr(body: Body | None = None, **settings) -> DictConfig:
    """Return DAB-DETR on the map of stride 32."""
    return _single_scale(single_scale_detr.dab_detr, body, settings)


def _single_scale(build, body: Body | None, settings: dict[str, Any]) -> DictConfig:
    body = body or resnet50()
    body.node.out_features = ["res5"]
    return build(backbone=body.node, widths={"res5": body.widths["res5"]}, **settings)


# ------------------------------------------------ auxiliary heads

COLLABORATORS = ("faster_rcnn", "atss")  # the paper's choice for K = 2


def collaborative(node: DictConfig, *names: str, **queries) -> DictConfig:
    """Return a detector with these auxiliary heads, from the node of one without; K = 0 where there
    are none.

    Args:
        node: of this module; it is changed
        names: of :data:`codetr.heads.HEADS`, in the order of their numbers
        queries: arguments of :class:`PositiveQueries`
    """
    channels = node.encoder.channels
    single = "levels" not in node.encoder
    strides = [8, 16, 32, 64, 128]
    if not single and node.encoder.levels == 5:
        strides = [4, *strides]
    node._target_ = CoDETR
    if not names:
        return node
    adapter = SingleScaleAdapter if single else MultiScaleAdapter
    node.adapter = L(adapter)(channels=channels)
    node.auxiliary_heads = [_head(name, channels, strides) for name in names]
    node.positive_queries = L(PositiveQueries)(heads=len(names), channels=channels, **queries)
    return node


def _head(name: str, channels: int, strides: Sequence[int]) -> DictConfig:
    settings = {"channels": channels, "strides": list(strides), "num_classes": "${...num_classes}"}
    if name not in parts.HEADS:
        raise UserError(f"auxiliary head {name!r}; expected one of {', '.join(parts.HEADS)}")
    if issubclass(parts.HEADS[name], parts.FasterRCNNHead):
        settings["rpn"] = L(ProposalNetwork)(channels=channels, strides=list(strides))
        settings["roi_levels"] = len(strides) - 1
    return L(parts.HEADS[name])(**settings)


def co_deformable_detr(
    body: Body | None = None, *names: str, num_queries: int = 300, **settings
) -> DictConfig:
    """Return Co-Deformable-DETR, with the head embedding that the official weights have.

    Args:
        names: of the auxiliary heads; none given: :data:`COLLABORATORS`
    """
    node = deformable_detr_plus_plus(body, num_queries=num_queries, **settings)
    return collaborative(node, *(names or COLLABORATORS), head_embedding="scalar")


def co_dino(body: Body | None = None, *names: str, **settings) -> DictConfig:
    """Return Co-DINO with quality focal loss and soft suppression (Table 4).

    Args: see :func:`co_deformable_detr` and :func:`dino`
    """
    node = dino_with_heads(body, *(names or COLLABORATORS), **settings)
    node.criterion.class_loss = "quality_focal"
    node.soft_nms_iou = 0.8
    return node


def dino_with_heads(body: Body | None = None, *names: str, **settings) -> DictConfig:
    """Return DINO with auxiliary heads and its own loss (Table 3)."""
    return collaborative(dino(body, **settings), *names, positions=False, features=False)


def _large_vit(node: DictConfig) -> DictConfig:
    """Set what the models on ViT-L have in common."""
    node.denoising.update(num_queries=300, box_noise=0.4)
    node.max_detections = 1000
    node.auxiliary_heads[0].rpn.update(
        test_candidates=8000, test_proposals=2000, test_nms_threshold=0.9
    )
    return node


def co_dino_vit_large(**settings) -> DictConfig:
    """Return the model for COCO, after Objects365."""
    node = _large_vit(co_dino(vit_large(), num_queries=1500, **settings))
    node.auxiliary_heads[0].update(convs=4, fcs=1, class_agnostic=True, stds=[0.05, 0.05, 0.1, 0.1])
    return node


def co_dino_vit_large_lvis() -> DictConfig:
    """Return the model for LVIS, after Objects365, on squares of 1536 pixels."""
    body = vit_large(
        window=16, global_blocks=list(range(2, 24, 3)), rotary_side=96, drop_path_rate=0.3
    )
    node = _large_vit(co_dino(body, num_classes=1203))
    node.mask_padding = False
    return node
