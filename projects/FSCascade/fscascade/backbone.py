"""ResNets of basic blocks with any width, for models that are small enough for a CPU.

Detectron2's own builder insists on 64 channels for ResNet-18 and -34.
"""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn

from d2dense.errors import UserError

__all__ = ["basic_stages", "build_basic_resnet_fpn_backbone"]

_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def basic_stages(
    *, depth: int, stem_channels: int, res2_channels: int, norm: str = "BN"
) -> list[list[nn.Module]]:
    """Return the stages res2 .. res5 of a ResNet of basic blocks; channels double at every stage.

    Args:
        depth: 10, 18 or 34 layers
        stem_channels: channels that enter res2
        res2_channels: channels of res2
    """
    if depth not in _BLOCKS:
        known = ", ".join(map(str, _BLOCKS))
        raise UserError(f"a basic ResNet of depth {depth} does not exist; expected one of {known}")
    stages, channels = [], stem_channels
    for k, blocks in enumerate(_BLOCKS[depth]):
        out_channels = res2_channels * 2**k
        stage = ResNet.make_stage(
            BasicBlock,
            blocks,
            stride_per_block=[1 if k == 0 else 2] + [1] * (blocks - 1),
            in_channels=channels,
            out_channels=out_channels,
            norm=norm,
        )
        stages.append(stage)
        channels = out_channels
    return stages


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a feature pyramid on such a ResNet from the usual keys of Detectron2's ResNet-FPN."""
    node = cfg.MODEL.RESNETS
    bottom_up = ResNet(
        BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM),
        basic_stages(
            depth=node.DEPTH,
            stem_channels=node.STEM_OUT_CHANNELS,
            res2_channels=node.RES2_OUT_CHANNELS,
            norm=node.NORM,
        ),
        out_features=node.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
    )
