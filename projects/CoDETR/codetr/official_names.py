"""Names of the official code for the tensors of our detectors (the source ``codetr``)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from d2dense.checkpoint import Correspondence
from d2dense.checkpoint.mmdetection import (
    DECODER_ATTENTIONS,
    ENCODER_ATTENTIONS,
    renamed,
    transformer_layers,
)
from d2dense.errors import UserError
from d2dense.modeling.detr import DeformableDETR, TwoStageQueries

from . import official_backbones
from .heads.atss import ATSSHead
from .heads.faster_rcnn import FasterRCNNHead
from .heads.mask_rcnn import MaskRCNNHead
from .meta_arch import CoDETR

__all__ = ["correspondence"]

_CLASSES = "MODEL.DETR.NUM_CLASSES (yaml) or model.num_classes (lazy)"
# their names whose shape follows the number of classes
_CLASS_KEYS = {
    r"query_head\.(cls_branches|label_embedding)\.": _CLASSES,
    r"roi_head\.\d+\.bbox_head\.(fc_cls|fc_reg)\.": _CLASSES,
    r"roi_head\.\d+\.mask_head\.conv_logits\.": _CLASSES,
    r"bbox_head\.\d+\.atss_cls\.": _CLASSES,
}
# what a detector without auxiliary heads leaves behind
_COLLABORATION = (
    r"rpn_head\.|roi_head\.|bbox_head\.|query_head\.downsample\."
    r"|query_head\.transformer\.(aux_pos_trans|pos_feats|head_pos_embed)"
)
_COMPUTED = "relative_position_index"
_HEAD, _TRANSFORMER = "query_head", "query_head.transformer"


def correspondence(model: nn.Module, names: Collection[str]) -> Correspondence:
    """Return which official names belong to the tensors of ``model``.

    Args:
        model: a detection transformer in two stages, with auxiliary heads or without.
        names: those of the official file; empty for the names of ``model``.

    Raises:
        UserError: a model that the official code does not have.
    """
    if not isinstance(model, DeformableDETR) or not isinstance(model.queries, TwoStageQueries):
        raise UserError(
            f"codetr has names for Co-DETRs on Deformable-DETR++ or DINO, not for this "
            f"{type(model).__name__}; use the config of such a model"
        )
    pairs = renamed(model.state_dict(), _parts(model))
    constants: dict[str, Tensor] = {}
    for part in ("backbone", "neck"):
        module = getattr(model, part)
        if module is None:
            continue
        try:
            known = official_backbones.names(module)
        except ValueError as error:
            raise UserError(f"codetr: {error}; use the config of a model that it has") from error
        pairs |= {f"{part}.{ours}": f"{part}.{theirs}" for ours, theirs in known.items()}
        values = official_backbones.constants(module)
        constants |= {f"{part}.{name}": value for name, value in values.items()}
    computed = {ours: theirs for ours, theirs in pairs.items() if ours.endswith(_COMPUTED)}
    if names:  # of no use in a file: the model has them
        pairs = {ours: theirs for ours, theirs in pairs.items() if ours not in computed}
        own = model.state_dict()
        constants |= {theirs: own[ours] for ours, theirs in computed.items()}
    alone = not isinstance(model, CoDETR) or not len(model.auxiliary_heads)
    return Correspondence(
        names=pairs,
        constants=constants,
        unused=_COLLABORATION if alone else "$^",
        fresh=rf".*{_COMPUTED}$",
        class_keys=_CLASS_KEYS,
    )


def _parts(model: DeformableDETR) -> dict[str, str]:
    """Return our modules and tensors -> theirs, all but the backbone and the neck."""
    parts = {"encoder.level_embedding": f"{_TRANSFORMER}.level_embeds"}
    for name, attentions in (("encoder", ENCODER_ATTENTIONS), ("decoder", DECODER_ATTENTIONS)):
        layers = transformer_layers(len(getattr(model, name).layers), attentions)
        parts |= {f"{name}.{k}": f"{_TRANSFORMER}.{name}.{v}" for k, v in layers.items()}
    count = len(model.heads.classes)
    for i in range(count):
        parts[f"heads.classes.{i}"] = f"{_HEAD}.cls_branches.{i}"
        parts[f"heads.boxes.{i}.layers"] = f"{_HEAD}.reg_branches.{i}"
    from_boxes = model.queries.positions is None  # as in DINO
    parts |= {
        "queries.transform": f"{_TRANSFORMER}.enc_output",
        "queries.norm": f"{_TRANSFORMER}.enc_output_norm",
        "queries.classes": f"{_HEAD}.cls_branches.{count}",
        "queries.boxes.layers": f"{_HEAD}.reg_branches.{count}",
        "queries.content": (
            f"{_TRANSFORMER}.query_embed" if from_boxes else f"{_HEAD}.query_embedding"
        ),
        "queries.positions.linear": f"{_TRANSFORMER}.pos_trans",
        "queries.positions.norm": f"{_TRANSFORMER}.pos_trans_norm",
        "decoder.positions.layers": f"{_TRANSFORMER}.decoder.ref_point_head",
        "decoder.norm": f"{_TRANSFORMER}.decoder.norm",
        "denoising.label_embedding": f"{_HEAD}.label_embedding",
    }
    if isinstance(model, CoDETR):
        parts |= _collaboration(model)
    return parts


def _collaboration(model: CoDETR) -> dict[str, str]:
    parts = {
        "adapter.downsample": f"{_HEAD}.downsample",
        "positive_queries.head_embedding": f"{_TRANSFORMER}.head_pos_embed.weight",
    }
    numbers = {"roi_head": 0, "bbox_head": 0}
    for i, head in enumerate(model.auxiliary_heads):
        parts |= {
            f"positive_queries.embeddings.{i}.linear": f"{_TRANSFORMER}.aux_pos_trans.{i}",
            f"positive_queries.embeddings.{i}.norm": f"{_TRANSFORMER}.aux_pos_trans_norm.{i}",
            f"positive_queries.features.{i}.0": f"{_TRANSFORMER}.pos_feats_trans.{i}",
            f"positive_queries.features.{i}.1": f"{_TRANSFORMER}.pos_feats_norm.{i}",
        }
        if type(head) not in _NAMINGS:
            continue
        kind, naming = _NAMINGS[type(head)]
        own = naming(head, f"{kind}.{numbers[kind]}")
        parts |= {f"auxiliary_heads.{i}.{ours}": theirs for ours, theirs in own}
        numbers[kind] += 1
    return parts


def _faster_rcnn(head: FasterRCNNHead, roi_head: str) -> Iterator[tuple[str, str]]:
    yield "rpn.head.conv", "rpn_head.rpn_conv"
    yield "rpn.head.objectness_logits", "rpn_head.rpn_cls"
    yield "rpn.head.anchor_deltas", "rpn_head.rpn_reg"
    theirs = f"{roi_head}.bbox_head"
    for i in range(len(head.box_head.conv_norm_relus)):
        conv = f"{theirs}.shared_convs.{i}"
        yield f"box_head.conv{i + 1}.weight", f"{conv}.conv.weight"
        yield f"box_head.conv{i + 1}.norm", f"{conv}.gn"
    for i in range(len(head.box_head.fcs)):
        yield f"box_head.fc{i + 1}", f"{theirs}.shared_fcs.{i}"
    yield "classes", f"{theirs}.fc_cls"
    yield "boxes", f"{theirs}.fc_reg"


def _mask_rcnn(head: MaskRCNNHead, roi_head: str) -> Iterator[tuple[str, str]]:
    yield from _faster_rcnn(head, roi_head)
    theirs = f"{roi_head}.mask_head"
    for i in range(len(head.mask_head.conv_norm_relus)):
        yield f"mask_head.mask_fcn{i + 1}", f"{theirs}.convs.{i}.conv"
    yield "mask_head.deconv", f"{theirs}.upsample"
    yield "mask_head.predictor", f"{theirs}.conv_logits"


def _atss(head: ATSSHead, theirs: str) -> Iterator[tuple[str, str]]:
    for ours, convs in (("class_tower", "cls_convs"), ("box_tower", "reg_convs")):
        layers = [i for i, each in enumerate(getattr(head, ours)) if isinstance(each, nn.Conv2d)]
        for k, i in enumerate(layers):
            yield f"{ours}.{i}", f"{theirs}.{convs}.{k}.conv"
            yield f"{ours}.{i + 1}", f"{theirs}.{convs}.{k}.gn"
    yield "classes", f"{theirs}.atss_cls"
    yield "boxes", f"{theirs}.atss_reg"
    yield "centerness", f"{theirs}.atss_centerness"
    for level in range(len(head.strides)):
        yield f"scales.scales.{level}", f"{theirs}.scales.{level}.scale"


# the official code has two lists of heads, each numbered on its own
_NAMINGS = {
    FasterRCNNHead: ("roi_head", _faster_rcnn),
    MaskRCNNHead: ("roi_head", _mask_rcnn),
    ATSSHead: ("bbox_head", _atss),
}
