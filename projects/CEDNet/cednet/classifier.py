"""CEDNet for image classification, with a classifier at the end of every stage.

Letters: N images, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import ConvNormAct
from .trunk import CEDNetTrunk, init_weights

__all__ = ["CEDNetClassifier", "StageClassifier"]

_HIDDEN = 2048


class StageClassifier(nn.Module):
    """Class scores from C5: 1x1 convolution to 2048, mean over the map, layer norm, linear.

    Args:
        in_channels: of C5.
        num_classes: K.
        norm, activation: of the convolution.
        init_scale: factor on the initial weights of the linear layer.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        norm: str = "LN",
        activation: str = "gelu",
        init_scale: float = 1.0,
    ):
        super().__init__()
        self.conv = ConvNormAct(in_channels, _HIDDEN, 1, norm=norm, activation=activation)
        self.norm = nn.LayerNorm(_HIDDEN, eps=1e-6)
        self.linear = nn.Linear(_HIDDEN, num_classes)
        self.apply(init_weights)
        self.linear.weight.data.mul_(init_scale)

    def forward(self, c5: Tensor) -> Tensor:
        """Return ``(N, K)``."""
        return self.linear(self.norm(self.conv(c5).mean((2, 3))))


class CEDNetClassifier(nn.Module):
    """A trunk and one classifier per stage.

    Args:
        trunk: the network, normally without a last decoder.
        heads: one per stage, from C5 to class scores.
        all_stages: also in evaluation return the scores of all stages.
    """

    def __init__(
        self, *, trunk: CEDNetTrunk, heads: list[StageClassifier], all_stages: bool = False
    ):
        super().__init__()
        if len(heads) != len(trunk.stages):
            raise ValueError(f"{len(heads)} classifiers for {len(trunk.stages)} stages")
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)
        self.all_stages = all_stages

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the scores ``(N, K)`` of the last stage; in training, the list of all stages'.

        Args:
            x: ``(N, 3, H, W)``, normalised.
        """
        _, stages = self.trunk(x)
        if self.training or self.all_stages:
            scores: list[Tensor] = []
            for k, head in enumerate(self.heads):
                scores.append(head(stages[k][2]))
            return scores
        return self.heads[-1](stages[-1][2])
