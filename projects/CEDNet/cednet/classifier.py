"""CEDNet for image classification, with a classifier at the end of every stage.

Letters: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from d2dense.modeling import CLASSIFIER_REGISTRY

from .blocks import ConvNormAct
from .config import trunk_from_config
from .trunk import CEDNetTrunk, init_weights

__all__ = ["CEDNetClassifier", "StageClassifier", "classifier_of"]

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

    def embed(self, c5: Tensor) -> Tensor:
        """Return what the linear layer sees, ``(N, 2048)``, of C5 ``(N, in_channels, H, W)``."""
        return self.norm(self.conv(c5).mean((2, 3)))

    def forward(self, c5: Tensor) -> Tensor:
        """Return logits ``(N, K)`` of C5 ``(N, in_channels, H, W)``."""
        return self.linear(self.embed(c5))


def classifier_of(
    trunk: CEDNetTrunk, *, num_classes: int, init_scale: float = 1.0
) -> StageClassifier:
    """Return a classifier for a stage of ``trunk``, with its norm and activation; the other
    arguments are those of :class:`StageClassifier`.
    """
    return StageClassifier(
        in_channels=trunk.widths[-1],
        num_classes=num_classes,
        norm=trunk.norm,
        activation=trunk.activation,
        init_scale=init_scale,
    )


@CLASSIFIER_REGISTRY.register()
class CEDNetClassifier(nn.Module):
    """A trunk and one classifier per stage.

    Args:
        trunk: the network, normally without a last decoder.
        num_classes: K, for the classifiers that are made here.
        init_scale: of those; the official 1 is for 1000 classes, fewer start from larger scores
            (10 classes: a loss of 10 instead of 2.3).
        heads: classifiers to use instead, one per stage, from C5 to class scores.
        all_stages: also in evaluation return the scores of all stages.
    """

    @configurable
    def __init__(
        self,
        *,
        trunk: CEDNetTrunk,
        num_classes: int = 1000,
        init_scale: float = 1.0,
        heads: Sequence[StageClassifier] | None = None,
        all_stages: bool = False,
    ):
        super().__init__()
        if heads is None:
            heads = [
                classifier_of(trunk, num_classes=num_classes, init_scale=init_scale)
                for _ in trunk.stages
            ]
        if len(heads) != len(trunk.stages):
            raise ValueError(f"{len(heads)} classifiers for {len(trunk.stages)} stages")
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)
        self.all_stages = all_stages

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "trunk": trunk_from_config(cfg.MODEL.CEDNET, in_channels=len(cfg.MODEL.PIXEL_MEAN)),
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            "init_scale": cfg.MODEL.CLASSIFIER.INIT_SCALE,
        }

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

    def fold_for_inference(self) -> None:
        """Keep the classifier of the last stage alone, unless all are asked for."""
        if not self.all_stages:
            self.heads = self.heads[-1:]
