"""Any backbone under any head: parts of lazy models take their shapes from the backbone, and what a
head takes is compared with what the backbone gives, in one line where they do not go together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2dense.errors import UserError, nearest

__all__ = ["Need", "check_config", "check_model", "instantiate_model", "needs_of"]


class Need(NamedTuple):
    """What a head takes of a backbone.

    Attributes:
        keys: settings that name the maps, for messages.
        names: of the maps, finest first.
        strides: that they must have; None: any.
        channels: that each must have; None: any.
        one_width: whether all must have equally many.
    """

    keys: str
    names: Sequence[str]
    strides: Sequence[int] | None = None
    channels: Sequence[int] | None = None
    one_width: bool = False


# ------------------------------------------------ lazy models


def instantiate_model(node: DictConfig) -> Any:
    """Instantiate a lazy model whose parts take their ``input_shape`` from its ``backbone``.

    A part that stands on the backbone says ``input_shape`` as a mapping from names of maps, or as
    None. What stands there is for those who call Detectron2's ``instantiate`` themselves; here the
    backbone's own shapes count, so that another backbone is one line of a config.
    """
    if "backbone" not in node or not list(_on_backbone(node)):
        return instantiate(node)
    backbone = instantiate(node.backbone)
    if not hasattr(backbone, "output_shape"):
        return instantiate(node)
    node = copy.deepcopy(node)
    shapes = backbone.output_shape()
    for part in _on_backbone(node):
        part.input_shape = {
            name: L(ShapeSpec)(channels=shape.channels, stride=shape.stride)
            for name, shape in shapes.items()
        }
    node.backbone = backbone
    return instantiate(node)


def _on_backbone(node: DictConfig) -> Iterator[DictConfig]:
    """Yield the parts below ``node`` that have maps by name as ``input_shape``."""
    for key in node:
        if key == "backbone" or OmegaConf.is_interpolation(node, key):
            continue
        part = node[key]
        if not isinstance(part, DictConfig):
            continue
        if "input_shape" in part and not OmegaConf.is_interpolation(part, "input_shape"):
            shape = part.input_shape
            if shape is None or (isinstance(shape, DictConfig) and "_target_" not in shape):
                yield part
        yield from _on_backbone(part)


# ------------------------------------------------ does it fit?


def check_model(model: nn.Module) -> None:
    """Compare what the heads of a built model take with what its backbone gives.

    Raises:
        UserError: a map that the backbone does not have, or one of another stride or width.
    """
    backbone = getattr(model, "backbone", None)
    shapes_of = getattr(backbone, "output_shape", None)
    if shapes_of is not None:
        for need in needs_of(model):
            _check(need, shapes_of(), type(backbone).__name__)


def check_config(cfg: CfgNode) -> None:
    """Say why no model can be built from a yacs config, where it is that the heads' maps are none
    of the backbone's; else do nothing. It builds the backbone.

    Raises:
        UserError: as in :func:`check_model`.
    """
    name = cfg.MODEL.BACKBONE.NAME
    try:
        shapes = build_backbone(cfg).output_shape()
    except KeyError as error:
        missing = error.args[0]
        if missing not in cfg.MODEL.FPN.IN_FEATURES:
            return
        raise UserError(
            f"MODEL.FPN.IN_FEATURES names {missing!r}, but what is below the pyramid {name} does "
            "not return it (MODEL.RESNETS.OUT_FEATURES)"
        ) from None
    except Exception:  # constructors raise anything; the caller reports what the model raised
        return
    for need in _needs_of_config(cfg):
        _check(need, shapes, name)


def needs_of(model: nn.Module) -> list[Need]:
    """Return what the heads of a detector or segmenter take, from their modules."""
    return [
        *_anchor_needs(model),
        *_region_needs(getattr(model, "roi_heads", None)),
        *_transformer_needs(model),
        *_segmenter_needs(getattr(model, "sem_seg_head", None)),
    ]


def _anchor_needs(model: nn.Module) -> Iterator[Need]:
    proposals = getattr(model, "proposal_generator", None)
    for owner, attribute, levels, keys in (
        (
            proposals,
            "rpn_head",
            "in_features",
            "MODEL.RPN.IN_FEATURES / model.proposal_generator.in_features",
        ),
        (
            model,
            "head",
            "head_in_features",
            "MODEL.RETINANET.IN_FEATURES / model.head_in_features",
        ),
    ):
        head, names = getattr(owner, attribute, None), getattr(owner, levels, None)
        if owner is not None and isinstance(head, nn.Module) and names is not None:
            yield Need(
                keys,
                list(names),
                strides=list(owner.anchor_generator.strides),
                channels=_width(head, len(names)),
                one_width=True,
            )


def _region_needs(heads: nn.Module | None) -> Iterator[Need]:
    for kind in ("box", "mask"):
        names = getattr(heads, f"{kind}_in_features", None)
        pooler, head = getattr(heads, f"{kind}_pooler", None), getattr(heads, f"{kind}_head", None)
        if not names or pooler is None:
            continue
        yield Need(
            f"MODEL.ROI_HEADS.IN_FEATURES / model.roi_heads.{kind}_in_features",
            list(names),
            strides=[round(1 / level.spatial_scale) for level in pooler.level_poolers],
            channels=_width(head, len(names), area=pooler.output_size[0] * pooler.output_size[1]),
            one_width=True,
        )


def _transformer_needs(model: nn.Module) -> Iterator[Need]:
    names, encoder = getattr(model, "in_features", None), getattr(model, "encoder", None)
    if names is None or not isinstance(encoder, nn.Module):
        return
    neck, keys = getattr(model, "neck", None), "MODEL.DETR.IN_FEATURES / model.in_features"
    widths = None
    if neck is None:
        levels = getattr(encoder, "level_embedding", None)
        if levels is not None:
            if len(names) != len(levels):
                raise UserError(
                    f"the encoder has {len(levels)} levels, but {keys} names {', '.join(names)}; "
                    "name as many maps, or let a neck add levels (MODEL.DETR.NECK channel_mapper / "
                    "model.neck=detr.channel_mapper())"
                )
            widths = [levels.shape[1]] * len(names)
    elif hasattr(neck, "convs"):  # a convolution per map
        widths = [conv.in_channels for conv in neck.convs]
    yield Need(keys, list(names), channels=widths)


def _segmenter_needs(head: nn.Module | None) -> Iterator[Need]:
    names = getattr(head, "in_features", None)
    if names is not None:
        keys = "MODEL.SEM_SEG_HEAD.IN_FEATURES / model.sem_seg_head.in_features"
        yield Need(keys, list(names))


def _width(head: nn.Module | None, levels: int, *, area: int = 1) -> list[int] | None:
    """Return the channels of the maps that a head takes: those of its first layer.

    Args:
        area: pixels per region, all of which a first linear layer sees
    """
    for layer in () if head is None else head.modules():
        if isinstance(layer, nn.Conv2d):
            return [layer.in_channels] * levels
        if isinstance(layer, nn.Linear):
            return [layer.in_features // area] * levels
    return None


def _needs_of_config(cfg: CfgNode) -> list[Need]:
    model = cfg.MODEL
    by_architecture = {
        "GeneralizedRCNN": [
            Need("MODEL.RPN.IN_FEATURES", model.RPN.IN_FEATURES, one_width=True),
            Need("MODEL.ROI_HEADS.IN_FEATURES", model.ROI_HEADS.IN_FEATURES, one_width=True),
        ],
        "RetinaNet": [
            Need("MODEL.RETINANET.IN_FEATURES", model.RETINANET.IN_FEATURES, one_width=True)
        ],
        "DeformableDETR": [Need("MODEL.DETR.IN_FEATURES", model.DETR.IN_FEATURES)],
        "Segmenter": [Need("MODEL.SEM_SEG_HEAD.IN_FEATURES", model.SEM_SEG_HEAD.IN_FEATURES)],
    }
    same = {"BatchRetinaNet": "RetinaNet", "CoDETR": "DeformableDETR"}
    name = model.META_ARCHITECTURE
    return by_architecture.get(same.get(name, name), [])


def _check(need: Need, shapes: Mapping[str, ShapeSpec], backbone: str) -> None:
    given = ", ".join(
        f"{name} ({shape.channels} channels, stride {shape.stride})"
        for name, shape in shapes.items()
    )
    for name in need.names:
        if name not in shapes:
            raise UserError(
                f"{need.keys} names {name!r}, but the backbone {backbone} gives {given}"
                f"{nearest(name, shapes)}; name some of these, or let the backbone give others"
            )
    strides = [shapes[name].stride for name in need.names]
    if need.strides is not None and strides != list(need.strides):
        raise UserError(
            f"{need.keys} are {', '.join(need.names)} with strides {strides}, but the head's "
            f"anchors or regions are made for {list(need.strides)}; the backbone {backbone} gives "
            f"{given}"
        )
    widths = [shapes[name].channels for name in need.names]
    if need.channels is not None and widths != list(need.channels):
        raise UserError(
            f"{need.keys} are {', '.join(need.names)} with {widths} channels, but the head takes "
            f"{list(need.channels)}; make the backbone's levels or the head as wide (out_channels "
            f"of a pyramid, channels of the head); the backbone {backbone} gives {given}"
        )
    if need.one_width and len(set(widths)) > 1:
        raise UserError(
            f"{need.keys} are {', '.join(need.names)} with {widths} channels, but the head takes "
            f"levels of one width; put a pyramid around the backbone {backbone}, such as "
            "build_timm_fpn_backbone / PaddedFPN, or take its own levels"
        )
