"""Classification losses for data that is not annotated for all classes (LVIS): some classes count.

Letters: K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2dense.errors import UserError

__all__ = ["FederatedClasses", "federated_classes"]

logger = logging.getLogger(__name__)


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
    *,
    dataset: str | Sequence[str] = "lvis_v1_train",
    number: int = 50,
    power: float = 0.5,
    num_classes: int | None = None,
) -> FederatedClasses:
    """Return :class:`FederatedClasses` whose weights are numbers of images to the ``power``.

    Args:
        dataset: a registered name, or several with the same classes. In how many images each class
            is, the categories of its annotations say (``image_count``, as LVIS has it), or else the
            images are counted; in a run of several processes all of them must call this together.
        num_classes: where the dataset is not there, as when a trained model predicts, that many
            classes get the same weight; None: it must be there

    Raises:
        UserError: an unknown name, files that do not exist, or datasets whose classes differ.
    """
    from d2dense.data.classes import image_counts  # that package is not needed to build a model

    try:
        counts = torch.tensor(image_counts(dataset), dtype=torch.float32)
    except UserError as error:
        if num_classes is None:
            raise
        logger.warning("no numbers of images per class, which only training needs: %s", error)
        counts = torch.ones(num_classes)
    return FederatedClasses(counts**power, number=number)
