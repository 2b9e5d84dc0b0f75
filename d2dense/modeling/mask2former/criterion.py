"""Losses of Mask2Former after one-to-one matching.

Letters: N images, Q queries, K classes, D predictions, P points, G objects of an image, M matched
pairs of one prediction, H and W size of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from d2dense.modeling.detr.criterion import mean_over_processes

from .points import sample, uncertain_points

__all__ = ["Mask2FormerCriterion", "MaskTargets"]

_INVALID = 1e6  # cost where a prediction is not finite


class MaskTargets(NamedTuple):
    """The objects of one image.

    Attributes:
        classes: ``(G,)``.
        masks: ``(G, H', W')``, bool, of the whole batch's size.
    """

    classes: Tensor
    masks: Tensor


class Pairs(NamedTuple):
    """Matched pairs of all predictions, ``(D M,)`` each, one prediction after the other."""

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor  # number over all images


class Mask2FormerCriterion(nn.Module):
    """Cross entropy of classes, and of masks at points together with their dice loss.

    The matching costs are the same three terms with the same weights, at random points.

    Args:
        num_classes: K
        class_weight, mask_weight, dice_weight: of the three
        no_object_weight: of queries without an object in the cross entropy
        num_points: P
    """

    exchanges_in_forward = True  # numbers of objects, over all processes

    def __init__(
        self,
        *,
        num_classes: int = 80,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.class_weight, self.mask_weight, self.dice_weight = (
            class_weight,
            mask_weight,
            dice_weight,
        )
        self.no_object_weight = no_object_weight
        self.num_points = num_points

    def forward(
        self, logits: Tensor, masks: Tensor, targets: Sequence[MaskTargets]
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_mask`` and ``loss_dice`` of the last prediction, and the same
        with ``d0.``, ``d1.``, ... in front of those before it; all in float32.

        Args:
            logits: ``(D, N, Q, K + 1)``
            masks: logits ``(D, N, Q, H, W)``
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, masks = logits.float(), masks.float()
            pairs = self.match(logits, masks, targets)
            matched = len(pairs.layer) // len(logits)
            number = mean_over_processes(matched, device=logits.device)
            of_mask, dice = self._mask_losses(masks, targets, pairs)
            parts = {
                "loss_cls": self.class_weight * self._class_loss(logits, targets, pairs),
                "loss_mask": self.mask_weight / number * of_mask,
                "loss_dice": self.dice_weight / number * dice,
            }
        last = len(logits) - 1
        return {
            name if layer == last else f"d{layer}.{name}": loss
            for name, losses in parts.items()
            for layer, loss in enumerate(losses.unbind())
        }

    @torch.no_grad()
    def match(self, logits: Tensor, masks: Tensor, targets: Sequence[MaskTargets]) -> Pairs:
        """Return the pairs of least total cost, of all images and predictions with one copy to the
        host.

        Args:
            logits, masks: as in :meth:`forward`, float32
        """
        costs = [
            self.cost(logits[:, i], masks[:, i], target).flatten()
            for i, target in enumerate(targets)
        ]
        table = torch.cat(costs).nan_to_num(nan=_INVALID, posinf=_INVALID, neginf=-_INVALID)
        table = table.cpu().numpy()  # the one wait
        d, q = logits.shape[0], logits.shape[2]
        rows: list[list[np.ndarray]] = [[] for _ in range(d)]
        start = first = 0
        for image, target in enumerate(targets):
            count = len(target.classes)
            own = table[start : start + d * q * count].reshape(d, q, count)
            start += d * q * count
            for layer in range(d):
                query, of = linear_sum_assignment(own[layer])
                same = np.ones_like(query)
                rows[layer].append(np.stack([layer * same, image * same, query, first + of]))
            first += count
        found = np.concatenate([each for layer in rows for each in layer], axis=1)
        return Pairs(*torch.from_numpy(found).to(logits.device, non_blocking=True).unbind())

    def cost(self, logits: Tensor, masks: Tensor, target: MaskTargets) -> Tensor:
        """Return the cost of every pair in one image, ``(D, Q, G)``.

        Args:
            logits: ``(D, Q, K + 1)``
            masks: logits ``(D, Q, H, W)``
        """
        points = torch.rand(1, self.num_points, 2, device=masks.device)
        found = sample(masks[None], points)[0]  # (D, Q, P)
        real = sample(target.masks[None].to(masks.dtype), points)[0].T  # (P, G)
        entropy = F.softplus(-found) @ real + F.softplus(found) @ (1 - real)
        share = found.sigmoid()
        dice = (2 * (share @ real) + 1) / (share.sum(-1, keepdim=True) + real.sum(0) + 1)
        of_class = logits.softmax(dim=-1)[..., target.classes]
        return (
            -self.class_weight * of_class
            + self.mask_weight / self.num_points * entropy
            + self.dice_weight * (1 - dice)
        )

    def _class_loss(self, logits: Tensor, targets: Sequence[MaskTargets], pairs: Pairs) -> Tensor:
        """Return the weighted mean over images and queries, ``(D,)``."""
        classes = torch.cat([target.classes for target in targets])
        labels = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        labels[pairs.layer, pairs.image, pairs.query] = classes[pairs.object]
        weights = torch.where(labels == self.num_classes, self.no_object_weight, 1.0)
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        return (loss.view_as(labels) * weights).sum((1, 2)) / weights.sum((1, 2))

    def _mask_losses(
        self, masks: Tensor, targets: Sequence[MaskTargets], pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over matched pairs of the mean cross entropy and of dice, ``(D,)``."""
        found = masks[pairs.layer, pairs.image, pairs.query]  # (D M, H, W)
        if not len(found):
            nothing = found.sum() + masks.new_zeros(len(masks))
            return nothing, nothing
        real = torch.cat([target.masks for target in targets])
        points = uncertain_points(found, count=self.num_points)
        found = sample(found, points)
        real = sample(real[pairs.object].to(found.dtype), points)
        entropy = F.binary_cross_entropy_with_logits(found, real, reduction="none").mean(dim=1)
        share = found.sigmoid()
        dice = 1 - (2 * (share * real).sum(1) + 1) / (share.sum(1) + real.sum(1) + 1)
        return tuple(each.view(len(masks), -1).sum(dim=1) for each in (entropy, dice))
