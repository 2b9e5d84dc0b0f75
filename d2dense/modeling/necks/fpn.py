"""Detectron2's feature pyramid with a choice of what batches are filled up to."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from .pyramid import checked_divisibility

__all__ = ["PaddedFPN"]


class PaddedFPN(FPN):
    """Detectron2's ``FPN``.

    Args:
        size_divisibility: to what multiple batches are filled up; None: the coarsest stride of the
            inputs. The other arguments are Detectron2's.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        size_divisibility: int | None = None,
    ):
        super().__init__(
            bottom_up=bottom_up,
            in_features=list(in_features),
            out_channels=out_channels,
            norm=norm,
            top_block=top_block,
            fuse_type=fuse_type,
        )
        self._size_divisibility = checked_divisibility(size_divisibility, self._size_divisibility)
