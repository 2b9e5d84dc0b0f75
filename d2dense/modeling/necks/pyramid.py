"""What pyramids have in common: a backbone below, levels of one width above.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from d2dense.errors import UserError, nearest
from d2dense.layers import build_norm, is_recorded

__all__ = ["Pyramid", "checked_divisibility", "checked_shapes", "conv_norm", "resize"]


def conv_norm(in_channels: int, out_channels: int, kernel: int, norm: str, **settings) -> Conv2d:
    """Return a convolution that keeps the size, with norm and no bias, or without norm.

    Args:
        kernel: its side, odd
        norm: a name that :func:`d2dense.layers.build_norm` knows; empty: none
        **settings: of Detectron2's ``Conv2d``
    """
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=kernel // 2,
        bias=not norm,
        norm=build_norm(norm, out_channels) if norm else None,
        **settings,
    )


def checked_shapes(
    bottom_up: Backbone, in_features: Sequence[str], *, num_levels: int | None = None
) -> list[ShapeSpec]:
    """Return the shapes of the maps that a pyramid stands on.

    Args:
        num_levels: how many levels the pyramid has; None: no fewer than maps

    Raises:
        UserError: a map that the backbone does not have, none at all, strides that do not double,
            or fewer levels than maps.
    """
    shapes: Mapping[str, ShapeSpec] = bottom_up.output_shape()
    for name in in_features:
        if name not in shapes:
            raise UserError(
                f"a pyramid cannot stand on {name!r}: {type(bottom_up).__name__} has "
                f"{', '.join(shapes)}{nearest(name, shapes)} (MODEL.FPN.IN_FEATURES / in_features)"
            )
    strides = [shapes[name].stride for name in in_features]
    too_few = num_levels is not None and num_levels < len(strides)
    if not strides or too_few or any(b != 2 * a for a, b in pairwise(strides)):
        levels = "" if num_levels is None else f" of {num_levels} levels"
        raise UserError(
            f"a pyramid{levels} cannot stand on {', '.join(in_features) or 'no map'} with "
            f"strides {strides}; expected strides that double, and as many levels or more "
            "(MODEL.FPN.IN_FEATURES / in_features, num_levels)"
        )
    return [shapes[name] for name in in_features]


def checked_divisibility(wanted: int | None, needed: int) -> int:
    """Return to what multiple batches are filled up: ``wanted``, or ``needed`` where that is None.

    Raises:
        UserError: not a multiple of ``needed``.
    """
    if wanted is None:
        return needed
    if wanted < 1 or wanted % needed:
        raise UserError(
            f"size_divisibility (MODEL.FPN.SIZE_DIVISIBILITY) is {wanted}, but the coarsest map "
            f"below this pyramid has stride {needed}; expected a multiple of it"
        )
    return wanted


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Return a map ``(N, C, H, W)`` at the height and width of ``like``: nearest neighbours up,
    maxima down.
    """
    if not is_recorded() and x.shape[-2:] == like.shape[-2:]:
        return x
    return _resized(x, like)


# A script inside a trace decides in every run. It must not return its argument: the trace would
# take what comes out for what went in, everywhere else too.
@torch.jit.script_if_tracing
def _resized(x: Tensor, like: Tensor) -> Tensor:
    height, width = like.shape[-2], like.shape[-1]
    if x.shape[-2] < height or x.shape[-1] < width:
        return F.interpolate(x, size=[height, width], mode="nearest")
    return F.adaptive_max_pool2d(x, [height, width])


class Pyramid(Backbone):
    """Levels of ``out_channels`` channels: one per input by a 1 x 1 convolution, and coarser ones
    by a 1 x 1 convolution of the last input and max-pooling. Subclasses fuse them.

    Args:
        bottom_up: the backbone
        in_features: names of its maps, each of half the size of the one before
        num_levels: how many levels come out; ``p<k>`` has stride 2^k
        norm: of the convolutions; empty: none
        size_divisibility: to what multiple batches are filled up; None: the coarsest stride of the
            inputs
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        num_levels: int,
        norm: str,
        size_divisibility: int | None,
    ):
        super().__init__()
        shapes = checked_shapes(bottom_up, in_features, num_levels=num_levels)
        strides = [shape.stride for shape in shapes]
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        widths = [shape.channels for shape in shapes]
        self.laterals = nn.ModuleList(conv_norm(c, out_channels, 1, norm) for c in widths)
        self.extra = None
        if num_levels > len(strides):
            self.extra = conv_norm(widths[-1], out_channels, 1, norm)
        strides += [strides[-1] * 2 ** (k + 1) for k in range(num_levels - len(strides))]
        self._shapes = {
            f"p{round(math.log2(stride))}": ShapeSpec(channels=out_channels, stride=stride)
            for stride in strides
        }
        self._size_divisibility = checked_divisibility(
            size_divisibility, strides[len(in_features) - 1]
        )

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        """Return as many maps of the same sizes, ``(N, C, Hi, Wi)``, finest first."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels ``(N, C, Hi, Wi)`` of normalised images ``(N, 3, H, W)``."""
        maps = self.bottom_up(x)
        maps = [maps[name] for name in self.in_features]
        levels = [lateral(each) for lateral, each in zip(self.laterals, maps)]
        coarser = maps[-1] if self.extra is None else self.extra(maps[-1])
        while len(levels) < len(self._shapes):
            coarser = F.max_pool2d(coarser, 3, stride=2, padding=1)
            levels.append(coarser)
        return dict(zip(self._shapes, self.fuse(levels)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility
