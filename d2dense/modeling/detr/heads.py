"""Classes and boxes from the states of the decoder.

Letters: N images, C channels, Q queries, K classes, D decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2dense.layers import Linear

from .boxes import inverse_sigmoid

__all__ = ["BoxHead", "PredictionHeads"]


class BoxHead(nn.Module):
    """Three linear layers ``C -> 4``; at the start it moves nothing.

    Args:
        channels: C
        size_bias: initial logit of width and height
        eps: references count as at least this far from 0 and 1
    """

    def __init__(self, *, channels: int, size_bias: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.layers = nn.Sequential(
            Linear(channels, channels),
            nn.ReLU(),
            Linear(channels, channels),
            nn.ReLU(),
            Linear(channels, 4),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        nn.init.constant_(self.layers[-1].bias[2:], size_bias)

    def forward(self, state: Tensor, references: Tensor) -> Tensor:
        """Return boxes ``(N, Q, 4)``, cxcywh relative to the image, float32.

        Args:
            state: ``(N, Q, C)``
            references: ``(N, Q, 2 or 4)``, to which the outputs are added before the sigmoid
        """
        shift = self.layers(state).float()
        start = inverse_sigmoid(references, self.eps)
        if start.shape[-1] == 2:
            return torch.cat([shift[..., :2] + start, shift[..., 2:]], dim=-1).sigmoid()
        return (shift + start).sigmoid()


class PredictionHeads(nn.Module):
    """A classifier and a box head for each decoder layer.

    Args:
        channels: C
        num_classes: K
        layers: D
        shared: all layers have the same heads, as without box refinement
        prior: initial score of every class
        size_bias: initial logit of the first layer's width and height; 0 where references are boxes
        eps: of the references, see :class:`BoxHead`
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        num_classes: int = 80,
        layers: int = 6,
        shared: bool = True,
        prior: float = 0.01,
        size_bias: float = -2.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.num_classes = num_classes
        classes, boxes = [], []
        for layer in range(1 if shared else layers):
            classes.append(Linear(channels, num_classes))
            nn.init.constant_(classes[-1].bias, math.log(prior / (1 - prior)))
            # boxes start at a small size, refined ones at that of their references
            bias = 0.0 if layer else size_bias
            boxes.append(BoxHead(channels=channels, size_bias=bias, eps=eps))
        copies = layers if shared else 1
        self.classes = nn.ModuleList(classes * copies)
        self.boxes = nn.ModuleList(boxes * copies)

    def predict_boxes(self, layer: int, state: Tensor, references: Tensor) -> Tensor:
        """Return the boxes ``(N, Q, 4)`` of one layer, cxcywh relative to the image.

        Args:
            layer: from 0 on
            state, references: see :class:`BoxHead`
        """
        return self.boxes[layer](state, references)

    def forward(
        self, states: Sequence[Tensor], references: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``(D, N, Q, K)`` and boxes ``(D, N, Q, 4)``, cxcywh relative to the image.

        Args:
            states, references: of each layer; or of fewer, the last ones
        """
        first = len(self.classes) - len(states)
        logits, boxes = [], []
        for layer, (state, reference) in enumerate(zip(states, references), start=first):
            logits.append(self.classes[layer](state))
            boxes.append(self.predict_boxes(layer, state, reference))
        return torch.stack(logits), torch.stack(boxes)
