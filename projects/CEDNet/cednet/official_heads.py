"""Names and orders that MMDetection gives to the parts of detectors around the backbone.

Each function returns, for a module of Detectron2 or ours, part of ours -> theirs; other parts have
no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from torch import Tensor, nn

from d2dense.checkpoint.mmdetection import (
    DECODER_ATTENTIONS,
    ENCODER_ATTENTIONS,
    transformer_layers,
)
from d2dense.errors import UserError
from d2dense.modeling.detr import DeformableDETR
from d2dense.modeling.mask2former import Mask2Former

__all__ = ["CLASS_KEYS", "HEADS", "Layout", "layouts"]

Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

# their names whose shape follows the number of classes -> our config key of that number
CLASS_KEYS = {
    r"bbox_head\.retina_cls\.": "MODEL.RETINANET.NUM_CLASSES (yaml) or model.num_classes (lazy)",
    r"roi_head\..*\.(fc_cls|fc_reg|conv_logits)\.": (
        "MODEL.ROI_HEADS.NUM_CLASSES (yaml) or model.roi_heads.num_classes (lazy)"
    ),
    r"bbox_head\.cls_branches\.": "MODEL.DETR.NUM_CLASSES (yaml) or model.num_classes (lazy)",
    r"panoptic_head\.cls_embed\.": "model.num_classes (lazy)",
    r"(decode|auxiliary)_head\.conv_seg\.": (
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES (yaml) or model.sem_seg_head.num_classes (lazy)"
    ),
}


def _retinanet(model: RetinaNet) -> dict[str, str]:
    head = model.head
    if not isinstance(head, RetinaNetHead):
        return {}
    parts = {"head.cls_score": "bbox_head.retina_cls", "head.bbox_pred": "bbox_head.retina_reg"}
    for ours, theirs in (("cls_subnet", "cls_convs"), ("bbox_subnet", "reg_convs")):
        layers = getattr(head, ours)
        convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        for k, i in enumerate(convs):
            parts[f"head.{ours}.{i}"] = f"bbox_head.{theirs}.{k}.conv"
    return parts


def _rpn(rpn: RPN) -> dict[str, str]:
    if not isinstance(rpn.rpn_head, StandardRPNHead):
        return {}
    names = {"conv": "rpn_conv", "objectness_logits": "rpn_cls", "anchor_deltas": "rpn_reg"}
    return {
        f"rpn_head.{ours}.{kind}": f"rpn_head.{theirs}.{kind}"
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


def _regions(heads: StandardROIHeads) -> dict[str, str]:
    parts = {}
    for head, k in _stages(heads.box_head):
        if isinstance(head, FastRCNNConvFCHead):
            for i in range(len(head.conv_norm_relus)):
                parts[f"box_head{k}.conv{i + 1}"] = f"roi_head.bbox_head{k}.shared_convs.{i}"
            for i in range(len(head.fcs)):
                parts[f"box_head{k}.fc{i + 1}"] = f"roi_head.bbox_head{k}.shared_fcs.{i}"
    for predictor, k in _stages(heads.box_predictor):
        if isinstance(predictor, FastRCNNOutputLayers):
            parts[f"box_predictor{k}.cls_score"] = f"roi_head.bbox_head{k}.fc_cls"
            parts[f"box_predictor{k}.bbox_pred"] = f"roi_head.bbox_head{k}.fc_reg"
    for head, k in _stages(getattr(heads, "mask_head", None)):
        if isinstance(head, MaskRCNNConvUpsampleHead):
            for i in range(len(head.conv_norm_relus)):
                parts[f"mask_head{k}.mask_fcn{i + 1}"] = f"roi_head.mask_head{k}.convs.{i}"
            parts[f"mask_head{k}.deconv"] = f"roi_head.mask_head{k}.upsample"
            for kind in ("weight", "bias"):
                theirs = f"roi_head.mask_head{k}.conv_logits.{kind}"
                parts[f"mask_head{k}.predictor.{kind}"] = theirs
    return parts


def _stages(part: nn.Module | None) -> Iterator[tuple[nn.Module | None, str]]:
    """Yield the parts of a cascade and the ends of their names; or the part itself and ``""``."""
    if isinstance(part, nn.ModuleList):
        yield from ((each, f".{k}") for k, each in enumerate(part))
    else:
        yield part, ""


def _deformable_detr(model: DeformableDETR) -> dict[str, str]:
    head, transformer = "bbox_head", "bbox_head.transformer"
    parts = {
        "encoder.level_embedding": f"{transformer}.level_embeds",
        "queries.embedding": f"{head}.query_embedding",
        "queries.reference_points": f"{transformer}.reference_points",
    }
    for name, attentions in (("encoder", ENCODER_ATTENTIONS), ("decoder", DECODER_ATTENTIONS)):
        layers = transformer_layers(len(getattr(model, name).layers), attentions)
        parts |= {f"{name}.{k}": f"{transformer}.{name}.{v}" for k, v in layers.items()}
    for i in range(len(model.heads.classes)):
        parts[f"heads.classes.{i}"] = f"{head}.cls_branches.{i}"
        parts[f"heads.boxes.{i}.layers"] = f"{head}.reg_branches.{i}"
    return parts


def _mask2former(model: Mask2Former) -> dict[str, str]:
    head = "panoptic_head"
    pixels = f"{head}.pixel_decoder"
    parts = {
        "pixel_decoder.encoder.level_embedding": f"{pixels}.level_encoding.weight",
        "pixel_decoder.mask_features": f"{pixels}.mask_feature",
        "decoder.content": f"{head}.query_feat",
        "decoder.position": f"{head}.query_embed",
        "decoder.level": f"{head}.level_embed",
        "decoder.norm": f"{head}.transformer_decoder.post_norm",
        "decoder.classes": f"{head}.cls_embed",
        "decoder.masks": f"{head}.mask_embed",
    }
    convs = {f"inputs.{i}": f"input_convs.{i}" for i in range(len(model.pixel_decoder.inputs))}
    for ours, theirs in (
        convs | {"lateral": "lateral_convs.0", "output": "output_convs.0"}
    ).items():
        for kind in ("weight", "bias"):
            parts[f"pixel_decoder.{ours}.{kind}"] = f"{pixels}.{theirs}.conv.{kind}"
        parts[f"pixel_decoder.{ours}.norm"] = f"{pixels}.{theirs}.gn"
    encoder = transformer_layers(len(model.pixel_decoder.encoder.layers), ENCODER_ATTENTIONS)
    parts |= {f"pixel_decoder.encoder.{k}": f"{pixels}.encoder.{v}" for k, v in encoder.items()}
    attentions = {"cross_attention": "attentions.0.attn", "self_attention": "attentions.1.attn"}
    decoder = transformer_layers(len(model.decoder.layers), attentions)
    return parts | {f"decoder.{k}": f"{head}.transformer_decoder.{v}" for k, v in decoder.items()}


HEADS: dict[type, Callable[[nn.Module], dict[str, str]]] = {
    DeformableDETR: _deformable_detr,
    Mask2Former: _mask2former,
    RetinaNet: _retinanet,
    RPN: _rpn,
    StandardROIHeads: _regions,
}


# ------------------------------------------------ order of the anchors


def layouts(module: nn.Module) -> dict[str, Layout]:
    """Return, for tensors of ``module`` whose rows are ordered differently, the functions that
    bring their rows into our order and into theirs.

    Both put the rows of one anchor together. The anchors of a position are ordered by size, then
    ratio here; by ratio, then size there, from small to large.
    """
    if isinstance(module, RetinaNet):
        parts = ("head.cls_score", "head.bbox_pred")
    elif isinstance(module, RPN):
        parts = ("rpn_head.objectness_logits", "rpn_head.anchor_deltas")
    else:
        return {}
    if not isinstance(module.anchor_generator, DefaultAnchorGenerator):
        return {}
    to_ours = partial(_to_ours, generator=module.anchor_generator)
    to_theirs = partial(_to_theirs, generator=module.anchor_generator)
    return {f"{part}.{kind}": (to_ours, to_theirs) for part in parts for kind in ("weight", "bias")}


def _to_ours(value: Tensor, generator: DefaultAnchorGenerator) -> Tensor:
    return _reordered(value, generator, _inverse)


def _to_theirs(value: Tensor, generator: DefaultAnchorGenerator) -> Tensor:
    return _reordered(value, generator, list)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _reordered(
    value: Tensor,
    generator: DefaultAnchorGenerator,
    rows_of: Callable[[tuple[int, ...]], list[int]],
) -> Tensor:
    if value.is_meta:
        return value  # without values there is no order
    order = _their_order(generator)
    if value.shape[0] % len(order) != 0:
        return value  # of another number of anchors: its shape is the error to report
    return value.unflatten(0, (len(order), -1))[rows_of(order)].flatten(0, 1)


def _their_order(generator: DefaultAnchorGenerator) -> tuple[int, ...]:
    """Return the indices of our anchors in their order, found from the anchors themselves."""
    orders = {_sorted_by_ratio(cells) for cells in generator.cell_anchors}
    if len(orders) > 1:
        raise UserError(
            "anchors of the levels are in different orders, but share one predictor: list the "
            "sizes and ratios of every level (MODEL.ANCHOR_GENERATOR.SIZES, ASPECT_RATIOS) in the "
            "same order"
        )
    return orders.pop()


def _sorted_by_ratio(cells: Tensor) -> tuple[int, ...]:
    """Return the indices of anchors ``(A, 4)``, xyxy, from small to large ratio, then size."""
    if cells.is_meta:
        raise ValueError("anchors on the meta device have no values: build the model elsewhere")
    sides = (cells[:, 2:] - cells[:, :2]).double()
    ratios = (sides[:, 1] / sides[:, 0]).log().mul(1e3).round().tolist()  # equal up to rounding
    areas = sides.prod(dim=1).tolist()
    return tuple(sorted(range(len(cells)), key=lambda i: (ratios[i], areas[i])))
