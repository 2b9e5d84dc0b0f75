"""The official code's models by name, built from our classes and filled with its weights.

What comes out equals the official model in evaluation. Its oddities, which are options elsewhere,
are set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2dense.checkpoint import convert, convert_back
from d2dense.errors import UserError, nearest
from d2dense.modeling.upernet import UperNetHead

from .backbone import CEDNet
from .blocks import BottleneckFamily, CSwinFamily, NextFamily, SwinFamily
from .classifier import CEDNetClassifier, StageClassifier
from .trunk import CEDNetTrunk
from .window import WindowAttention, relative_positions

__all__ = ["VARIANTS", "build", "load", "state_dict"]

_T = {"widths": (96, 192, 352, 512), "blocks": (2, 4, 2), "num_stages": 3}
_S = {"widths": (96, 192, 352, 512), "blocks": (2, 7, 2), "num_stages": 4}
_B = {"widths": (128, 256, 448, 704), "blocks": (2, 7, 2), "num_stages": 4}

# name -> (family of blocks, arguments of the trunk)
_TRUNKS: dict[str, tuple[type, dict[str, Any]]] = {
    "next_tiny": (NextFamily, _T),
    "next_small": (NextFamily, _S),
    "next_base": (NextFamily, _B),
    "swin_tiny": (SwinFamily, {**_T, "widths": (96, 160, 288, 416)}),
    "cswin_tiny": (CSwinFamily, {**_T, "widths": (64, 128, 256, 320), "blocks": (2, 8, 1)}),
    "res50": (BottleneckFamily, {**_T, "widths": (64, 128, 256, 384), "blocks": (1, 4, 2)}),
    "next_tiny_unet": (NextFamily, {**_T, "style": "unet"}),
    "next_tiny_hourglass": (
        NextFamily,
        {**_T, "style": "hourglass", "widths": (96, 160, 320, 512)},
    ),
    "next_tiny_fpnvariant": (
        NextFamily,
        {**_T, "style": "fpn_convs", "widths": (96, 160, 304, 448)},
    ),
    "next_tiny_lastdec": (NextFamily, _T),
}
# whose detectors have a decoder in the last stage
_LAST_DECODER = (
    "next_tiny_unet",
    "next_tiny_hourglass",
    "next_tiny_fpnvariant",
    "next_tiny_lastdec",
)

_FEATURES = {
    "det_retina": ("p3", "p4", "p5", "p6", "p7"),
    "det_twostage": ("p2", "p3", "p4", "p5", "p6"),
    "det_defdetr": ("p3", "p4", "p5", "p6"),
    "det_mask2former": ("c2", "c3", "c4", "c5"),
}
_KINDS = {
    "cls": (
        "next_tiny",
        "next_small",
        "next_base",
        "swin_tiny",
        "res50",
        "next_tiny_fpnvariant",
        "next_tiny_unet",
        "next_tiny_hourglass",
    ),
    "det_retina": tuple(_TRUNKS),
    "det_twostage": ("next_tiny", "next_small", "next_base", "swin_tiny", "cswin_tiny"),
    "det_defdetr": ("next_tiny", "next_small", "next_base", "res50"),
    "det_mask2former": ("next_tiny", "res50"),
    "seg_upernet": ("next_tiny", "next_small", "next_base"),
    "full_upernet": ("next_tiny", "next_small", "next_base"),
    "full_retinanet": ("next_tiny",),
    "full_mask_rcnn": ("next_tiny",),
    "full_cascade_mask_rcnn": ("next_tiny",),
    "full_deformable_detr": ("next_tiny",),
    "full_mask2former": ("next_tiny",),
}
_PARTS = {f"{kind}_{trunk}": (kind, trunk) for kind, names in _KINDS.items() for trunk in names}

VARIANTS: tuple[str, ...] = tuple(_PARTS)
_NOT_THERE = (
    "full_retinanet",
    "full_mask_rcnn",
    "full_cascade_mask_rcnn",
    "full_deformable_detr",
    "full_mask2former",
)


class _FeatureTuple(nn.Module):
    """A backbone that returns its maps in order instead of by name."""

    def __init__(self, backbone: CEDNet):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(x).values())


class _Segmenter(nn.Module):
    """A backbone and an UperNet head, without pre- and post-processing."""

    def __init__(self, backbone: CEDNet, head: UperNetHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {
            "decode_logits": self.head.scores(features),
            "aux_logits": self.head.auxiliary_scores(features),
        }


def load(variant: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return an official model in eval mode with its weights.

    It takes a normalised float image batch ``(N, 3, H, W)`` and returns, for ``cls_*``, the scores
    ``(N, 1000)`` of all stages as a list; for ``det_*`` and ``seg_*``, the tuple of feature maps in
    the official order; for ``full_upernet_*``, a dict of ``decode_logits`` and ``aux_logits``
    before they are enlarged.

    Args:
        variant: one of :data:`VARIANTS`.
        state_dict: the official weights under the official names; those of ``det_*`` and ``seg_*``
            with or without ``backbone.`` in front.

    Raises:
        UserError: an unknown variant, or weights that are missing, unused or of another shape.
    """
    with torch.device("meta"):
        model = build(variant)
    # the weights become the model's own tensors, so the initial ones need no memory
    model.to_empty(device="cpu")
    _restore_constants(model)
    own = model.state_dict()
    weights = convert(state_dict, "cednet", model)
    for name in own.keys() - weights.keys():
        weights[name] = torch.zeros_like(own[name])  # counts of batches, which nothing reads
    model.load_state_dict(weights)
    return model.eval()


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model from :func:`load` or :func:`build` under the official names;
    those of ``det_*`` and ``seg_*`` without ``backbone.``.
    """
    if isinstance(model, _FeatureTuple):
        model = model.backbone
    return convert_back(model, "cednet")


def build(variant: str) -> nn.Module:
    """Return an official model with fresh weights.

    Raises:
        UserError: an unknown variant.
    """
    if variant not in _PARTS:
        raise UserError(f"unknown official model {variant!r}{nearest(variant, VARIANTS)}")
    kind, trunk_name = _PARTS[variant]
    if kind in _NOT_THERE:
        raise UserError(f"the official model {variant!r} is not supported yet, only its backbone")
    if kind == "cls":
        return _classifier(trunk_name)
    if kind in _FEATURES:
        trunk = _trunk(trunk_name, last_decoder=trunk_name in _LAST_DECODER)
        return _FeatureTuple(CEDNet(trunk=trunk, out_features=_FEATURES[kind]))
    trunk = _trunk(trunk_name, layer_scale=1.0)
    earlier = [f"stage{k}_c3" for k in range(len(trunk.stages) - 1, 0, -1)]
    backbone = CEDNet(trunk=trunk, out_features=["c2", "c3", "c4", "c5", *earlier])
    if kind == "seg_upernet":
        return _FeatureTuple(backbone)
    head = UperNetHead(
        input_shape=backbone.output_shape(),
        in_features=["c2", "c3", "c4", "c5"],
        num_classes=150,
        auxiliary_feature=earlier[0],
    )
    return _Segmenter(backbone, head)


def _classifier(trunk_name: str) -> nn.Module:
    options = {"roll_back_unshifted": True} if trunk_name == "swin_tiny" else {}
    trunk = _trunk(trunk_name, **options)
    norm, activation = ("BN", "relu") if trunk_name == "res50" else ("LN", "gelu")
    heads = [
        StageClassifier(
            in_channels=trunk.widths[-1], num_classes=1000, norm=norm, activation=activation
        )
        for _ in trunk.stages
    ]
    return CEDNetClassifier(trunk=trunk, heads=heads, all_stages=True)


def _trunk(name: str, *, last_decoder: bool = False, **family_options) -> CEDNetTrunk:
    family, options = _TRUNKS[name]
    return CEDNetTrunk(
        family=family(**family_options),
        last_decoder=last_decoder,
        official_drop_path=True,
        **options,
    )


def _restore_constants(model: nn.Module) -> None:
    """Compute the tensors again that are part of no state and were lost on the way."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.position_index.copy_(relative_positions(module.window))
