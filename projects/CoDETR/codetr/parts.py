"""What yaml configs say of the collaborative parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from d2dense.errors import UserError

from .adapter import MultiScaleAdapter
from .heads import HEADS
from .positive_queries import PositiveQueries
from .single_scale_adapter import SingleScaleAdapter

__all__ = ["ADAPTERS", "collaboration"]

ADAPTERS = ("multi_scale", "single_scale")


def collaboration(cfg: CfgNode, strides: Sequence[int]) -> dict[str, Any]:
    """Return the arguments that ``CoDETR`` has beside those of its base.

    Args:
        strides: of the backbone's maps that are used, finest first
    """
    node, base = cfg.MODEL.CODETR, cfg.MODEL.DETR
    unknown = [name for name in node.AUXILIARY_HEADS if name not in HEADS]
    if unknown:
        raise UserError(
            f"MODEL.CODETR.AUXILIARY_HEADS has {unknown[0]!r}; expected any of {', '.join(HEADS)}"
        )
    adapter, strides = _adapter(node, base, strides)
    heads = [
        HEADS[name](cfg, channels=base.CHANNELS, strides=strides, num_classes=base.NUM_CLASSES)
        for name in node.AUXILIARY_HEADS
    ]
    return {
        "adapter": adapter if heads else None,
        "auxiliary_heads": heads,
        "positive_queries": _queries(node.QUERIES, base, len(heads))
        if node.TRAIN_QUERIES
        else None,
        "query_weight": node.QUERY_WEIGHT,
        "head_weight": node.HEAD_WEIGHT,
        "federated_heads": node.FEDERATED_HEADS,
        "train_heads": node.TRAIN_HEADS,
        "one_pass": node.ONE_PASS,
        "evaluate_branch": node.EVALUATE_BRANCH,
    }


def _adapter(
    node: CfgNode, base: CfgNode, strides: Sequence[int]
) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the adapter, and the strides of its maps."""
    if node.ADAPTER not in ADAPTERS:
        raise UserError(
            f"MODEL.CODETR.ADAPTER is {node.ADAPTER!r}; expected one of {', '.join(ADAPTERS)}"
        )
    levels = list(strides)
    if base.NECK == "simple_pyramid":  # levels around its one map
        levels = _around(levels[-1])[-base.LEVELS :]
    while len(levels) < base.LEVELS:  # those that the neck adds
        levels.append(2 * levels[-1])
    if node.ADAPTER == "single_scale":
        return SingleScaleAdapter(channels=base.CHANNELS), tuple(_around(levels[-1]))
    return MultiScaleAdapter(channels=base.CHANNELS), (*levels, 2 * levels[-1])


def _around(stride: int) -> list[int]:
    return [stride // 4, stride // 2, stride, 2 * stride, 4 * stride]


def _queries(node: CfgNode, base: CfgNode, heads: int) -> PositiveQueries:
    return PositiveQueries(
        heads=heads,
        channels=base.CHANNELS,
        positions=base.QUERY_POSITIONS == "queries",
        features=node.FEATURES,
        head_embedding=node.HEAD_EMBEDDING,
        points=base.TRANSFORMER == "conditional",
        least=node.LEAST,
        most=node.MOST,
        random=node.RANDOM,
        negatives=node.NEGATIVES,
    )
