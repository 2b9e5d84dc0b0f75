"""The parts of Conditional DETR and DAB-DETR that yaml configs describe."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from d2dense.errors import UserError

from .conditional_decoder import ConditionalDecoder
from .heads import PredictionHeads
from .single_scale_encoder import SingleScaleEncoder
from .single_scale_queries import AnchorQueries, PointQueries

__all__ = ["conditional", "dab"]

# what the parts below do not have: key of MODEL.DETR -> the value that says so
_FIXED = {"LEVELS": 1, "TWO_STAGE": False, "DENOISING.QUERIES": 0}


def conditional(node: CfgNode) -> dict[str, nn.Module]:
    """Return the parts of Conditional DETR."""
    _check(node)
    return {
        "encoder": SingleScaleEncoder(**_encoder(node)),
        "queries": PointQueries(num_queries=node.NUM_QUERIES, channels=node.CHANNELS),
        "decoder": ConditionalDecoder(**_decoder(node)),
        "heads": _heads(node),
    }


def dab(node: CfgNode) -> dict[str, nn.Module]:
    """Return the parts of DAB-DETR."""
    _check(node)
    return {
        "encoder": SingleScaleEncoder(**_encoder(node), activation="prelu", scale_positions=True),
        "queries": AnchorQueries(num_queries=node.NUM_QUERIES),
        "decoder": ConditionalDecoder(
            **_decoder(node),
            activation="prelu",
            anchors=True,
            look_forward_twice=node.LOOK_FORWARD_TWICE,
        ),
        "heads": _heads(node),
    }


def _check(node: CfgNode) -> None:
    found = {"LEVELS": node.LEVELS, "TWO_STAGE": node.TWO_STAGE}
    found["DENOISING.QUERIES"] = node.DENOISING.QUERIES
    for key, value in _FIXED.items():
        if found[key] != value:
            raise UserError(
                f"MODEL.DETR.{key} is {found[key]!r}; with TRANSFORMER {node.TRANSFORMER!r} it "
                f"must be {value!r}"
            )


def _layers(node: CfgNode) -> dict[str, Any]:
    return {
        "channels": node.CHANNELS,
        "heads": node.HEADS,
        "feedforward": node.FEEDFORWARD,
        "dropout": node.DROPOUT,
    }


def _encoder(node: CfgNode) -> dict[str, Any]:
    return {
        **_layers(node),
        "layers": node.ENCODER_LAYERS,
        "temperature": node.POSITION_TEMPERATURE,
        "offset": node.POSITION_OFFSET,
    }


def _decoder(node: CfgNode) -> dict[str, Any]:
    return {**_layers(node), "layers": node.DECODER_LAYERS}


def _heads(node: CfgNode) -> PredictionHeads:
    return PredictionHeads(
        channels=node.CHANNELS,
        num_classes=node.NUM_CLASSES,
        layers=node.DECODER_LAYERS,
        size_bias=0.0,
        eps=node.REFERENCE_EPS,
    )
