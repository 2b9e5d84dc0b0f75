"""The parts of detectors that yaml configs describe, by the kind of their transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from d2dense.errors import UserError
from d2dense.modeling.necks.simple_pyramid import SIMPLE_LEVELS, SimplePyramid

from . import single_scale
from .boxes import BoxPositions
from .channel_mapper import ChannelMapper
from .criterion import DETRCriterion
from .decoder import DeformableDecoder
from .denoising import ContrastiveDenoising
from .encoder import DeformableEncoder
from .federated import federated_classes
from .heads import PredictionHeads
from .matcher import HungarianMatcher
from .one_to_many import OneToManyQueries
from .proposals import TwoStageQueries
from .queries import LearnedQueries

__all__ = ["NECKS", "TRANSFORMERS", "criterion", "neck", "transformer"]

NECKS = ("none", "channel_mapper", "projection", "simple_pyramid")


def _one_of(key: str, value: str, known) -> None:
    if value not in known:
        raise UserError(f"MODEL.DETR.{key} is {value!r}; expected one of {', '.join(known)}")


def neck(node: CfgNode, shapes: dict[str, ShapeSpec]) -> nn.Module | None:
    """Return what makes levels of the backbone's maps."""
    _one_of("NECK", node.NECK, NECKS)
    if node.NECK == "none":
        return None
    if node.NECK == "simple_pyramid":
        return SimplePyramid(
            in_channels=shapes[node.IN_FEATURES[-1]].channels,
            out_channels=node.CHANNELS,
            levels=SIMPLE_LEVELS[-node.LEVELS :],
        )
    return ChannelMapper(
        input_shape=shapes,
        in_features=node.IN_FEATURES,
        out_channels=node.CHANNELS,
        levels=node.LEVELS,
        norm_groups=0 if node.NECK == "projection" else 32,
    )


def deformable(node: CfgNode) -> dict[str, nn.Module]:
    """Return the parts of Deformable DETR, and of what builds on it."""
    width = {"channels": node.CHANNELS}
    attention = {"levels": node.LEVELS, "heads": node.HEADS, "points": node.POINTS, **width}
    layers = {**attention, "feedforward": node.FEEDFORWARD, "dropout": node.DROPOUT}
    from_boxes = node.QUERY_POSITIONS == "references"
    return {
        "encoder": DeformableEncoder(
            **layers,
            layers=node.ENCODER_LAYERS,
            temperature=node.POSITION_TEMPERATURE,
            offset=node.POSITION_OFFSET,
        ),
        "queries": _queries(node),
        "decoder": DeformableDecoder(
            **layers,
            layers=node.DECODER_LAYERS,
            box_refinement=node.BOX_REFINEMENT,
            look_forward_twice=node.LOOK_FORWARD_TWICE,
            final_norm=node.FINAL_NORM,
            positions=BoxPositions(**width) if from_boxes else None,
        ),
        "heads": PredictionHeads(
            **width,
            num_classes=node.NUM_CLASSES,
            layers=node.DECODER_LAYERS,
            shared=not node.BOX_REFINEMENT,
            size_bias=0.0 if node.TWO_STAGE else -2.0,
            eps=node.REFERENCE_EPS,
        ),
        "denoising": _denoising(node),
        "one_to_many": _one_to_many(node),
    }


def _queries(node: CfgNode) -> nn.Module:
    _one_of("QUERY_POSITIONS", node.QUERY_POSITIONS, ("queries", "references"))
    if node.TWO_STAGE:
        return TwoStageQueries(
            num_queries=node.NUM_QUERIES,
            channels=node.CHANNELS,
            num_classes=node.NUM_CLASSES,
            binary=node.BINARY_PROPOSALS,
            positions=node.QUERY_POSITIONS == "queries",
        )
    if node.QUERY_POSITIONS == "references":
        raise UserError(
            "MODEL.DETR.QUERY_POSITIONS is 'references', which takes the boxes of two stages; set "
            "TWO_STAGE to True, or QUERY_POSITIONS to queries"
        )
    return LearnedQueries(num_queries=node.NUM_QUERIES, channels=node.CHANNELS)


def _denoising(node: CfgNode) -> nn.Module | None:
    if not node.DENOISING.QUERIES:
        return None
    if node.QUERY_POSITIONS != "references":
        raise UserError(
            f"MODEL.DETR.DENOISING.QUERIES is {node.DENOISING.QUERIES} with QUERY_POSITIONS "
            f"{node.QUERY_POSITIONS!r}; noised queries have no positions of their own, set "
            "QUERY_POSITIONS to references or DENOISING.QUERIES to 0"
        )
    return ContrastiveDenoising(
        num_classes=node.NUM_CLASSES,
        channels=node.CHANNELS,
        num_queries=node.DENOISING.QUERIES,
        label_noise=node.DENOISING.LABEL_NOISE,
        box_noise=node.DENOISING.BOX_NOISE,
    )


def _one_to_many(node: CfgNode) -> nn.Module | None:
    if not node.ONE_TO_MANY.QUERIES:
        return None
    return OneToManyQueries(
        num_queries=node.ONE_TO_MANY.QUERIES,
        channels=node.CHANNELS,
        repeats=node.ONE_TO_MANY.REPEATS,
        weight=node.ONE_TO_MANY.WEIGHT,
    )


# MODEL.DETR.TRANSFORMER -> its node's encoder, queries, decoder, heads, and queries that only
# training has (None: none)
TRANSFORMERS: dict[str, Callable[[CfgNode], dict[str, nn.Module | None]]] = {
    "deformable": deformable,
    "conditional": single_scale.conditional,
    "dab": single_scale.dab,
}


def transformer(node: CfgNode) -> dict[str, nn.Module | None]:
    """Return the parts of the kind that ``MODEL.DETR.TRANSFORMER`` names."""
    _one_of("TRANSFORMER", node.TRANSFORMER, TRANSFORMERS)
    own = TRANSFORMERS[node.TRANSFORMER](node)
    return {"denoising": None, "one_to_many": None, **own}


def criterion(node: CfgNode, datasets: Sequence[str] = ()) -> DETRCriterion:
    """Return the losses; the matching cost has their weights, but its own one of classes.

    Args:
        datasets: for training, whose images with each class are counted for a federated loss
    """
    weights = {
        "l1_weight": node.L1_WEIGHT,
        "giou_weight": node.GIOU_WEIGHT,
        "alpha": node.FOCAL_ALPHA,
        "gamma": node.FOCAL_GAMMA,
    }
    return DETRCriterion(
        matcher=HungarianMatcher(class_weight=node.CLASS_COST, **weights),
        num_classes=node.NUM_CLASSES,
        class_weight=node.CLASS_WEIGHT,
        class_loss=node.CLASS_LOSS,
        federated=_federated(node, datasets),
        **weights,
    )


def _federated(node: CfgNode, datasets: Sequence[str]) -> nn.Module | None:
    if not node.FEDERATED.ENABLED:
        return None
    return federated_classes(
        dataset=list(datasets),
        number=node.FEDERATED.CLASSES,
        power=node.FEDERATED.POWER,
        num_classes=node.NUM_CLASSES,
    )
