"""Detectron2's feature pyramid with a choice of what batches are filled up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from .pyramid import checked_divisibility, checked_shapes

__all__ = ["PaddedFPN"]


class PaddedFPN(FPN):
    """Detectron2's ``FPN``: levels ``p<k>``, ``(N, C, H / 2^k, W / 2^k)``.

    Args:
        bottom_up: the backbone
        in_features: names of its maps, each of half the size of the one before
        out_channels: C
        norm: of the convolutions; empty: none
        top_block: a module; or what makes one of the channels of the last input and
            ``out_channels``, such as Detectron2's class ``LastLevelP6P7``, for whatever backbone
            is below
        fuse_type: ``"sum"`` or ``"avg"`` of a level and the enlarged one above
        size_divisibility: to what multiple batches are filled up; None: the coarsest stride of the
            inputs

    Raises:
        UserError: maps that the backbone does not have, or whose strides do not double.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        top_block: nn.Module | Callable[[int, int], nn.Module] | None = None,
        fuse_type: str = "sum",
        size_divisibility: int | None = None,
    ):
        shapes = checked_shapes(bottom_up, in_features)
        top: Any = top_block
        if top_block is not None and not isinstance(top_block, nn.Module):
            top = top_block(shapes[-1].channels, out_channels)
            top.in_feature = in_features[-1]
        super().__init__(
            bottom_up=bottom_up,
            in_features=list(in_features),
            out_channels=out_channels,
            norm=norm,
            top_block=top,
            fuse_type=fuse_type,
        )
        own: int = self._size_divisibility
        self._size_divisibility: int = checked_divisibility(size_divisibility, own)
