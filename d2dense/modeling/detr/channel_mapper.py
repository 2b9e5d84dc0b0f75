"""Maps of one width from those of a backbone, without fusion.

Letters: N images, C channels, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

__all__ = ["ChannelMapper"]


class ChannelMapper(nn.Module):
    """A 1x1 convolution per map, and coarser levels by strided 3x3 convolutions, the first from the
    backbone's last map; all with group norm, or with a bias.

    Args:
        input_shape: channels of the backbone's maps by name
        in_features: which of them, finest first
        out_channels: C of all levels
        levels: how many there are in the end
        norm_groups: of the group norm; 0: none

    Raises:
        UserError: a map that the backbone does not have, or fewer levels than maps.
    """

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int = 256,
        levels: int = 4,
        norm_groups: int = 32,
    ):
        super().__init__()
        for name in in_features:
            if name not in input_shape:
                raise UserError(
                    f"ChannelMapper takes the map {name!r}, but the backbone has "
                    f"{', '.join(input_shape)}{nearest(name, input_shape)}; change "
                    "MODEL.DETR.IN_FEATURES / model.in_features, or the backbone's maps"
                )
        if not 0 < len(in_features) <= levels:
            raise UserError(
                f"ChannelMapper makes {levels} levels of the maps {', '.join(in_features)}; "
                "expected one map or more, and no fewer levels (MODEL.DETR.IN_FEATURES, LEVELS / "
                "model.in_features, levels)"
            )
        widths = [input_shape[name].channels for name in in_features]

        def conv(channels: int, kernel: int, stride: int) -> Conv2d:
            return Conv2d(
                channels,
                out_channels,
                kernel,
                stride=stride,
                padding=kernel // 2,
                bias=not norm_groups,
                norm=nn.GroupNorm(norm_groups, out_channels) if norm_groups else None,
            )

        self.convs = nn.ModuleList(conv(width, 1, 1) for width in widths)
        extra = [widths[-1]] + [out_channels] * levels
        self.extra_convs = nn.ModuleList(
            conv(width, 3, 2) for width in extra[: levels - len(widths)]
        )
        for each in (*self.convs, *self.extra_convs):
            nn.init.xavier_uniform_(each.weight)
            if each.bias is not None:
                nn.init.zeros_(each.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(N, C, Hl, Wl)`` per level from the backbone's maps."""
        levels = [conv(each) for conv, each in zip(self.convs, maps)]
        last = maps[-1]
        for conv in self.extra_convs:
            last = conv(last)
            levels.append(last)
        return levels
