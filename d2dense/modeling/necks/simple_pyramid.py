"""Levels for detection transformers from the one map of a plain vision transformer.

Letters: N images, C channels, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import LayerNorm2d

__all__ = ["SIMPLE_LEVELS", "SimplePyramid"]

# level -> powers of two by which it is finer than the map at stride 16
_FINER = {"p2": 2, "p3": 1, "p4": 0, "p5": -1, "p6": -2, "p7": -3}
SIMPLE_LEVELS = ("p2", "p3", "p4", "p5", "p6")  # Co-DETR's


class SimplePyramid(nn.Module):
    """Co-DETR's pyramid around a plain vision transformer: each level comes from the map at stride
    16 by itself, enlarged by nearest neighbours and 3 x 3 convolutions, or max-pooled, and ends
    with a 1 x 1 and a 3 x 3 convolution. Every convolution has a channel norm in place of a bias,
    and GELU between them.

    Args:
        in_channels: of the map
        out_channels: C of all levels
        levels: some of ``p2`` to ``p7``, finest first; ``p<k>`` has stride 2^k. Co-DETR's end
            with ``p6``; each coarser one has a strided convolution more.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1024,
        out_channels: int = 256,
        levels: Sequence[str] = SIMPLE_LEVELS,
    ):
        super().__init__()
        if not levels or list(levels) != [name for name in _FINER if name in levels]:
            raise UserError(
                f"levels of SimplePyramid are {', '.join(levels) or 'none'}; expected some of "
                f"{', '.join(_FINER)}, finest first"
            )
        self.levels = nn.ModuleDict(
            {name: _branch(in_channels, out_channels, _FINER[name]) for name in levels}
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(N, C, Hl, Wl)`` per level from the backbone's map, the last of ``maps``."""
        return [branch(maps[-1]) for branch in self.levels.values()]


def _branch(in_channels: int, out_channels: int, finer: int) -> nn.Sequential:
    """Return the layers of one level."""
    layers: list[nn.Module] = []
    width = in_channels
    for doubling in range(finer):
        narrower = in_channels // 2 if doubling == 0 else out_channels
        layers += [nn.Upsample(scale_factor=2, mode="nearest"), *_conv(width, narrower, 3)]
        layers.append(nn.GELU())
        width = narrower
    if finer < 0:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    for _ in range(-1 - finer):
        layers += [*_conv(width, width, 3, stride=2), nn.GELU()]
    layers += [*_conv(width, out_channels, 1), nn.GELU(), *_conv(out_channels, out_channels, 3)]
    return nn.Sequential(*layers)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return [conv, LayerNorm2d(out_channels)]
