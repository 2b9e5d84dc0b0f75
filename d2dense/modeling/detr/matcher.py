"""One-to-one matching of predictions and objects.

Letters: N images, Q queries, K classes, G most objects in an image, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

from d2dense.modeling.box_regression import giou_loss

from .targets import Targets

__all__ = ["HungarianMatcher", "Matches"]

_INVALID = 1e6  # cost where a prediction is not finite
_SMALL = 2**16  # pairs of one image among which the assignment is found at once


class Matches(NamedTuple):
    """Which query each object got.

    Attributes:
        queries: ``(D, N, G)``; any number where there is none.
        found: ``(D, N, G)``, True where an object has a query.
    """

    queries: Tensor
    found: Tensor


class HungarianMatcher(nn.Module):
    """The assignment of least total cost, of all images, layers and sets of predictions with one
    copy to the host.

    The cost is computed in float32: focal loss as positive minus as negative, L1 distance of
    relative cxcywh, and negative generalised IoU in pixels, each times its weight.

    Args:
        class_weight, l1_weight, giou_weight: of the three terms
        alpha, gamma: of the focal loss
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Matches:
        """Return the matches of every layer.

        Args:
            logits: ``(D, N, Q, K)``
            boxes: ``(D, N, Q, 4)``, cxcywh relative to the image
        """
        return self.match([(logits, boxes, targets)])[0]

    @torch.no_grad()
    def match(self, sets: Sequence[tuple[Tensor, Tensor, Targets]]) -> list[Matches]:
        """Return the matches of several sets of predictions, each as in :meth:`forward`."""
        costs = [self.cost(logits.float(), boxes.float(), given) for logits, boxes, given in sets]
        flat = torch.cat([cost.flatten() for cost in costs])
        flat = flat.nan_to_num(nan=_INVALID, posinf=_INVALID, neginf=-_INVALID)
        tables = flat.cpu().numpy()  # the one wait
        starts = np.cumsum([0] + [cost.numel() for cost in costs])
        return [
            _assign(tables[start : start + cost.numel()].reshape(cost.shape), given, cost.device)
            for start, cost, (_, _, given) in zip(starts, costs, sets)
        ]

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Return the cost of every pair, ``(D, N, Q, G)``: focal, L1 and generalised IoU, weighted.

        Args:
            logits: ``(D, N, Q, K)``, float32
            boxes: ``(D, N, Q, 4)``, cxcywh relative to the image, float32
        """
        score = logits.sigmoid()
        positive = self.alpha * (1 - score) ** self.gamma * -(score + 1e-12).log()
        negative = (1 - self.alpha) * score**self.gamma * -(1 - score + 1e-12).log()
        classes = targets.classes[None, :, None].expand(*logits.shape[:3], -1)
        of_class = (positive - negative).gather(3, classes)
        distance = torch.cdist(boxes, targets.boxes[None].expand(len(boxes), -1, -1, -1), p=1)
        ours, theirs = (
            box_convert(each, "cxcywh", "xyxy") * targets.sizes for each in (boxes, targets.boxes)
        )
        overlap = 1 - giou_loss(ours[:, :, :, None], theirs[None, :, None], eps=1e-6)
        return self.class_weight * of_class + self.l1_weight * distance - self.giou_weight * overlap


def _assign(table: np.ndarray, targets: Targets, device: torch.device) -> Matches:
    """Return the matches of least cost from that of every pair, ``(D, N, Q, G)``."""
    d, n, _, g = table.shape
    queries, found = np.zeros((d, n, g), dtype=np.int64), np.zeros((d, n, g), dtype=bool)
    for layer, image in np.ndindex(d, n):
        columns, rows = _least(table[layer, image, :, : targets.counts[image]].T)
        queries[layer, image, columns] = rows
        found[layer, image, columns] = True
    return Matches(*(torch.from_numpy(x).to(device, non_blocking=True) for x in (queries, found)))


def _least(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the assignment of least total cost of ``(G, Q)``.

    Where there are many queries, those that are not among the G cheapest of any object are left out
    beforehand. That loses nothing: let an assignment give an object a query beyond its G cheapest.
    The other G - 1 objects leave one of these free; moving the object there costs no more, and the
    others stay. Object by object, an optimum becomes one without any such query, so the least cost
    is the same; and where costs are distinct, such a move costs less, so that no optimum had such a
    query at all.
    """
    objects, queries = costs.shape
    if costs.size <= _SMALL or queries < 2 * objects:
        return linear_sum_assignment(costs)
    costs = np.ascontiguousarray(costs)  # by object, as what follows reads it
    limits = np.partition(costs, objects - 1, axis=1)[:, objects - 1 : objects]
    kept = np.flatnonzero((costs <= limits).any(axis=0))
    rows, columns = linear_sum_assignment(costs[:, kept])
    return rows, kept[columns]
