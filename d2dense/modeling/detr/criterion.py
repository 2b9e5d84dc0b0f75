"""Losses of the decoder's predictions after one-to-one matching.

Letters: N images, Q queries, K classes, G most objects in an image, D decoder layers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.ops import box_convert

from d2dense.modeling.box_regression import giou_loss

from .matcher import HungarianMatcher, Matches
from .targets import Targets

__all__ = ["DETRCriterion", "mean_over_processes"]


def mean_over_processes(number: int, *, device: torch.device) -> Tensor:
    """Return the mean of each process's ``number``, at least 1, without waiting for the device."""
    mean = torch.full((), float(number), device=device)
    if comm.get_world_size() > 1:
        dist.all_reduce(mean)
        mean = mean / comm.get_world_size()
    return mean.clamp(min=1.0)


class DETRCriterion(nn.Module):
    """Focal, L1 and generalised IoU loss of every layer, each divided by the number of matched
    objects of the batch (the mean over the processes, at least 1).

    Args:
        matcher: see :class:`HungarianMatcher`
        num_classes: K
        class_weight, l1_weight, giou_weight: of the losses
        alpha, gamma: of the focal loss
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int = 80,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.num_classes = num_classes
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` and ``loss_iou`` of the last layer, and the same with
        ``d0.``, ``d1.``, ... in front of those before it; all in float32.

        Args:
            logits: ``(D, N, Q, K)``
            boxes: ``(D, N, Q, 4)``, cxcywh relative to the image
        """
        logits, boxes = logits.float(), boxes.float()  # nothing below is a product of matrices
        matches = self.matcher(logits, boxes, targets)
        matched = sum(min(count, logits.shape[2]) for count in targets.counts)
        number = mean_over_processes(matched, device=logits.device)
        distance, overlap = self._box_losses(boxes, targets, matches)
        parts = {
            "loss_cls": self.class_weight / number * self._class_loss(logits, targets, matches),
            "loss_bbox": self.l1_weight / number * distance,
            "loss_iou": self.giou_weight / number * overlap,
        }
        last = len(logits) - 1
        return {
            name if layer == last else f"d{layer}.{name}": loss
            for name, losses in parts.items()
            for layer, loss in enumerate(losses.unbind())
        }

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
        """Return the sum over images, queries and classes, ``(D,)``."""
        d, n, q, k = logits.shape
        labels = torch.full((d, n, q + 1), k, device=logits.device)  # one more for the others
        slots = torch.where(matches.found, matches.queries, q)
        labels.scatter_(2, slots, targets.classes.expand_as(slots))
        one_hot = labels[:, :, :q, None] == torch.arange(k, device=logits.device)
        loss = sigmoid_focal_loss(
            logits, one_hot.to(logits.dtype), alpha=self.alpha, gamma=self.gamma
        )
        return loss.sum(dim=(1, 2, 3))

    def _box_losses(
        self, boxes: Tensor, targets: Targets, matches: Matches
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of L1 of relative cxcywh, and of 1 - generalised IoU in pixels, over the
        matched objects, both ``(D,)``.
        """
        index = matches.queries[..., None].expand(-1, -1, -1, 4)
        ours = boxes.gather(2, index)  # (D, N, G, 4)
        # objects without a query keep a harmless pair: infinities times zero would be no number
        found = matches.found[..., None]
        theirs = torch.where(found, targets.boxes.expand_as(ours), ours.detach())
        distance = (ours - theirs).abs().sum(dim=-1)
        pixels = (box_convert(each, "cxcywh", "xyxy") * targets.sizes for each in (ours, theirs))
        overlap = giou_loss(*pixels)
        return (
            (distance * matches.found).sum(dim=(1, 2)),
            (overlap * matches.found).sum(dim=(1, 2)),
        )
