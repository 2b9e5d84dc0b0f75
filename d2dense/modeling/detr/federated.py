"""Classification losses for data that is not annotated for all classes (LVIS): some classes count.

Letters: K classes.
"""

from __future__ import annotations

import torch
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from torch import Tensor, nn

__all__ = ["FederatedClasses", "federated_classes"]


class FederatedClasses(nn.Module):
    """The classes that count in a batch: all that occur, and others by chance until there are
    enough (federated loss of CenterNet2, https://arxiv.org/abs/2103.07461, section 5.3).

    Args:
        weights: of each class, the higher the more often it is drawn, ``(K,)``
        number: classes that count, if no more occur
    """

    def __init__(self, weights: Tensor, *, number: int = 50):
        super().__init__()
        self.number = min(number, len(weights))
        self.register_buffer("log_weights", weights.float().log(), persistent=False)

    def forward(self, occur: Tensor) -> Tensor:
        """Return which classes count, ``(K,)``, without waiting for the device.

        Args:
            occur: ``(K,)``, True for classes of which there are objects
        """
        # the largest of logarithms with Gumbel noise are a draw without replacement
        keys = self.log_weights - torch.empty_like(self.log_weights).exponential_().log()
        drawn = keys.masked_fill(occur, torch.inf).topk(self.number).indices
        return occur.scatter(0, drawn, True)


def federated_classes(
    *, dataset: str = "lvis_v1_train", number: int = 50, power: float = 0.5
) -> FederatedClasses:
    """Return :class:`FederatedClasses` whose weights are numbers of images to the ``power``.

    Args:
        dataset: a registered name, whose metadata says in how many images each class is
    """
    return FederatedClasses(get_fed_loss_cls_weights(dataset, power), number=number)
