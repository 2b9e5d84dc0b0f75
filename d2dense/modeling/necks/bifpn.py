"""BiFPN of EfficientDet (https://arxiv.org/abs/1911.09070): weighted fusion down and up again.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from .pyramid import Pyramid, conv_norm, resize

__all__ = ["BiFPN", "FusionNode"]

_EPS = 1e-4


class FusionNode(nn.Module):
    """Weighted mean of maps of one size, activation, and a depth-wise separable 3 x 3 convolution.

    The weights are kept from being negative and divided by their sum (section 3.3 of the paper).

    Args:
        num_inputs: how many maps
        channels: C
        norm: after the convolution
    """

    def __init__(self, num_inputs: int, channels: int, norm: str):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = conv_norm(channels, channels, 1, norm)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Maps ``(N, C, Hi, Wi)`` to one of the same shape."""
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + _EPS)
        fused = sum(weight.to(x.dtype) * x for weight, x in zip(weights.unbind(), inputs))
        return self.pointwise(self.depthwise(F.silu(fused)))


class _Layer(nn.Module):
    """One pass from the coarsest level to the finest and back."""

    def __init__(self, num_levels: int, channels: int, norm: str):
        super().__init__()
        last = num_levels - 1
        self.down = nn.ModuleList(FusionNode(2, channels, norm) for _ in range(last))
        self.up = nn.ModuleList(
            FusionNode(2 if level == last else 3, channels, norm) for level in range(1, num_levels)
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        middle = [levels[-1]]
        for node, level in zip(reversed(self.down), reversed(levels[:-1])):
            middle.insert(0, node([level, resize(middle[0], level)]))
        out = middle[:1]
        for k, node in enumerate(self.up, start=1):
            below = F.max_pool2d(out[-1], 3, stride=2, padding=1)
            own = [levels[k]] if k == len(self.up) else [levels[k], middle[k]]
            out.append(node([*own, resize(below, levels[k])]))
        return out


class BiFPN(Pyramid):
    """BiFPN around a backbone: ``num_layers`` times down and up.

    Args:
        bottom_up: the backbone
        in_features: names of its maps, each of half the size of the one before
        out_channels: C
        num_layers: how often the levels are fused
        num_levels: how many levels come out, ``p<k>`` at stride 2^k; coarser ones than the inputs
            are max-pooled
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
        num_layers: int = 7,
        num_levels: int = 5,
        norm: str = "BN",
        size_divisibility: int | None = None,
    ):
        super().__init__(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=out_channels,
            num_levels=num_levels,
            norm=norm,
            size_divisibility=size_divisibility,
        )
        self.layers = nn.ModuleList(
            _Layer(num_levels, out_channels, norm) for _ in range(num_layers)
        )

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        for layer in self.layers:
            levels = layer(levels)
        return levels
