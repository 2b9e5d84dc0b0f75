"""Feature sharing between the stages of a cascade.

Letters: n stages, R regions over all images, C channels, S side of the pooled map, D size of the
    class feature.
``X^i`` is the feature pooled from the boxes that stage i receives, ``(R_i, C, S, S)``. Stages count
from 0 in the code, from 1 in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable

import fvcore.nn.weight_init as weight_init
import torch
from torch import Tensor, nn

from d2dense.errors import UserError

__all__ = ["LFS_MODES", "ClassificationHeads", "LocalizationHead"]

LFS_MODES = ("recompute", "cached")


class ClassificationHeads(nn.ModuleList):
    """The fc heads ``T_1 .. T_n`` of a cascade, one per stage, and the class features made of them.

    With sharing (CFS, Eq. 1) the class feature of stage i is ``T_1(X^i) + ... + T_i(X^i)``: every
    earlier head is applied to the *current* stage's pooled feature, and nothing stops the gradient.
    Without sharing it is ``T_i(X^i)``. Sharing adds no parameters.

    Args:
        heads: one module per stage, ``(R, C, S, S) -> (R, D)``
        sharing: CFS on or off
    """

    def __init__(self, heads: Iterable[nn.Module], *, sharing: bool = True):
        super().__init__(heads)
        self.sharing = sharing

    def own(self, x: Tensor, stage: int) -> Tensor:
        """Return ``T_stage(x)``, ``(R, D)``."""
        feature = x
        for j, head in enumerate(self):
            if j == stage:
                feature = head(x)
        return feature

    def forward(self, pooled: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        """Return the class feature of every stage on its own regions, ``n x (R_i, D)``.

        A shared head runs once, on the regions of all the stages that use it: n matrix products
            instead of n (n + 1) / 2.

        Args:
            pooled: ``X^1 .. X^m`` of the first m stages
            own: ``T_i(X^i)`` of the same stages where the caller has them already, else an empty
                list
        """
        features = list(own)
        if not self.sharing:
            if len(own) == 0:
                for j, head in enumerate(self):
                    if j < len(pooled):
                        features.append(head(pooled[j]))
            return features
        first_use = (
            1 if len(own) > 0 else 0
        )  # own features at hand: head j is needed from stage j + 1 on
        sizes = [x.shape[0] for x in pooled]
        stacked = torch.cat(pooled)
        start = 0
        if first_use == 1:
            start = sizes[0]
        for j, head in enumerate(self):
            stage = j + first_use
            if stage < len(pooled):
                for part in head(stacked[start:]).split(sizes[stage:]):
                    if stage < len(features):
                        features[stage] = features[stage] + part
                    else:
                        features.append(part)
                    stage += 1
                start = start + sizes[j + first_use]
        return features

    def cumulative(self, x: Tensor, final: int, own: list[Tensor]) -> list[Tensor]:
        """Return the class features of stages 0..final, all evaluated on the same ``x``.

        Args:
            x: pooled feature of stage ``final``
            own: empty, or a list that ends with ``T_final(x)``
        """
        features: list[Tensor] = []
        for j, head in enumerate(self):
            if j <= final:
                if j == final and len(own) > 0:
                    feature = own[-1]
                else:
                    feature = head(x)
                if self.sharing and j > 0:
                    feature = features[-1] + feature
                features.append(feature)
        return features

    def at(self, x: Tensor, stage: int, own: list[Tensor]) -> Tensor:
        """Return the class feature of one stage on ``x``; arguments as in :meth:`cumulative`."""
        if self.sharing:
            return self.cumulative(x, stage, own)[-1]
        if len(own) > 0:
            return own[-1]
        return self.own(x, stage)


class _PlainConvs(nn.Module):
    """``B = F_2(F_1(X))``: two 3 x 3 convolutions with ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        return torch.relu_(self.conv2(torch.relu_(self.conv1(x))))


class _RelayConvs(nn.Module):
    """``B_i = X + G(F(B_{i-1}))`` (Eq. 2): a 3 x 3 convolution on the previous stage's feature,
    then a 1 x 1 relay.
    """

    def __init__(self, channels: int, relu_after_1x1: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relay = nn.Conv2d(channels, channels, 1)
        self.relu_after_1x1 = relu_after_1x1

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        relayed = self.relay(torch.relu_(self.conv1(previous)))
        if self.relu_after_1x1:
            relayed = torch.relu_(relayed)
        return x + relayed


class LocalizationHead(nn.ModuleList):
    """Convolutional localisation feature ``B_i`` of each stage, ``(R, C, S, S) -> (R, C, S, S)``.

    With sharing (LFS, Eq. 2) stage i continues the chain of all earlier stages' convolutions;
    without, each stage has two 3 x 3 convolutions of its own. Convolutions have biases and no norm;
    He-normal initialisation.

    Args:
        channels: C
        num_stages: n
        sharing: LFS on or off
        mode: ``recompute`` runs the whole chain on the current stage's ``X^i`` (the paper's
            equation); ``cached`` continues from the ``B_{i-1}`` that the previous stage computed on
            ``X^{i-1}``
        relu_after_1x1: ReLU after the 1 x 1 relay convolution; the paper does not show activations
    """

    def __init__(
        self,
        *,
        channels: int,
        num_stages: int,
        sharing: bool = True,
        mode: str = "recompute",
        relu_after_1x1: bool = True,
    ):
        if mode not in LFS_MODES:
            raise UserError(f"LFS_MODE is {mode!r}; expected one of {', '.join(LFS_MODES)}")
        stages: list[nn.Module] = [_PlainConvs(channels)]
        for _ in range(1, num_stages):
            stages.append(
                _RelayConvs(channels, relu_after_1x1) if sharing else _PlainConvs(channels)
            )
        super().__init__(stages)
        self.recompute = sharing and mode == "recompute"
        self.cached = sharing and mode == "cached"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight_init.c2_msra_fill(module)

    def forward(self, x: Tensor, stage: int, previous: Tensor) -> Tensor:
        """Return ``B_stage``.

        Args:
            x: pooled feature ``X`` of the current stage
            stage: index of the current stage, from 0
            previous: ``B_{stage-1}`` of the same regions; only read in ``cached`` mode (pass ``x``
                otherwise)
        """
        feature = previous if self.cached else x
        for j, convs in enumerate(self):
            if j == stage or (self.recompute and j < stage):
                feature = convs(x, feature)
        return feature
