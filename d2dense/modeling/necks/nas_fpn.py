"""NAS-FPN (https://arxiv.org/abs/1904.07392): the searched pyramid of seven merging cells.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from .pyramid import Pyramid, conv_norm, resize

__all__ = ["NASFPN"]


class _Stage(nn.Module):
    """Seven merging cells (figure 6 of the paper) on levels p3 to p7."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        names = ("p4_first", "p4_second", "p3", "p4", "p5", "p7", "p6")
        self.convs = nn.ModuleDict({name: conv_norm(channels, channels, 3, norm) for name in names})

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        p3, p4, p5, p6, p7 = levels
        p4_first = self._conv("p4_first", _attend(p6, p4, p4))
        p4_second = self._conv("p4_second", p4_first + p4)
        p3 = self._conv("p3", resize(p4_second, p3) + p3)
        p4 = self._conv("p4", resize(p3, p4) + p4_second)
        p5 = self._conv("p5", p5 + _attend(p4, p3, p5))
        p7 = self._conv("p7", p7 + _attend(p5, p4_second, p7))
        p6 = self._conv("p6", _attend(p7, p5, p6))
        return [p3, p4, p5, p6, p7]

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self.convs[name](F.relu(x))


def _attend(semantic: Tensor, detail: Tensor, like: Tensor) -> Tensor:
    """Merge by global pooling, at the size of ``like``: the channels of ``semantic`` count as much
    as the mean of ``detail`` says.
    """
    semantic, detail = (resize(each, like) for each in (semantic, detail))
    attention = detail.mean(dim=(2, 3), keepdim=True).sigmoid()
    return detail + attention * semantic


class NASFPN(Pyramid):
    """NAS-FPN around a backbone: levels ``p3`` to ``p7``, merged ``num_stages`` times.

    Args:
        bottom_up: the backbone
        in_features: names of its maps at strides 8, 16 and 32
        out_channels: C
        num_stages: how often the searched cells are repeated
        norm: of the convolutions
        size_divisibility: to what multiple batches are filled up; None: the coarsest stride of the
            inputs
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str] = ("res3", "res4", "res5"),
        out_channels: int = 256,
        num_stages: int = 7,
        norm: str = "BN",
        size_divisibility: int | None = None,
    ):
        super().__init__(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=out_channels,
            num_levels=5,
            norm=norm,
            size_divisibility=size_divisibility,
        )
        self.stages = nn.ModuleList(_Stage(out_channels, norm) for _ in range(num_stages))

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        for stage in self.stages:
            levels = stage(levels)
        return levels
