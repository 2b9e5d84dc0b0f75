"""Losses of sets of predictions: after one-to-one matching, or with targets that are known.

Letters: N images, Q queries, K classes, G most objects in an image, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.ops import box_convert

from d2dense.errors import UserError
from d2dense.modeling.box_regression import giou_loss

from .federated import FederatedClasses
from .matcher import HungarianMatcher, Matches
from .proposals import EncoderPredictions
from .targets import Targets

__all__ = [
    "CLASS_LOSSES",
    "DETRCriterion",
    "aligned_iou",
    "mean_over_processes",
    "quality_focal_loss",
]

CLASS_LOSSES = ("focal", "quality_focal")


def mean_over_processes(number: int, *, device: torch.device) -> Tensor:
    """Return the mean of each process's ``number``, at least 1, as a scalar on ``device``, without
    waiting for it. All processes must call it equally often.
    """
    mean = torch.full((), float(number), device=device)
    if comm.get_world_size() > 1:
        dist.all_reduce(mean)
        mean = mean / comm.get_world_size()
    return mean.clamp(min=1.0)


def quality_focal_loss(logits: Tensor, quality: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Return the cross entropy with a soft target, times the distance to it to the power of
    ``gamma`` (Generalized Focal Loss, equation 5), element by element.

    Args:
        logits: ``(..., K)``
        quality: ``(..., K)``, the IoU in the object's class, else 0
    """
    loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return loss * (quality - logits.sigmoid()).abs() ** gamma


def aligned_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU ``(...)`` of each box with the one at its place, cxcywh relative to the image
    ``(..., 4)``; unions count as a millionth at least.
    """
    boxes, others = (box_convert(each, "cxcywh", "xyxy") for each in (boxes, others))
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(
        boxes[..., :2], others[..., :2]
    )
    both = sides.clamp(min=0).prod(dim=-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(dim=-1) for each in (boxes, others)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-6)


class DETRCriterion(nn.Module):
    """Classification, L1 and generalised IoU loss of every layer, each divided by the number of
    objects (the mean over the processes, at least 1); all in float32.

    Args:
        matcher: see :class:`HungarianMatcher`
        num_classes: K
        class_weight, l1_weight, giou_weight: of the losses
        class_loss: "focal", or "quality_focal", whose target is the IoU of the box
        alpha: of the focal loss
        gamma: of either
        federated: chooses the classes that count in each set of predictions; None: all
    """

    exchanges_in_forward = True  # numbers of objects, over all processes

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int = 80,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_loss: str = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        federated: FederatedClasses | None = None,
    ):
        super().__init__()
        if class_loss not in CLASS_LOSSES:
            raise UserError(
                f"class_loss (MODEL.DETR.CLASS_LOSS) is {class_loss!r}; expected one of "
                f"{', '.join(CLASS_LOSSES)}"
            )
        self.matcher = matcher
        self.num_classes = num_classes
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.class_loss, self.alpha, self.gamma = class_loss, alpha, gamma
        self.federated = federated

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        encoder: EncoderPredictions | None = None,
        others: Mapping[str, tuple[Tensor, Tensor, Targets]] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` and ``loss_iou`` of the last layer, the same with
        ``d0.``, ``d1.``, ... in front of those before it, and with ``enc_`` of the encoder.

        Args:
            logits: ``(D, N, Q, K)``
            boxes: ``(D, N, Q, 4)``, cxcywh relative to the image
            encoder: its predictions
            others: further sets of logits, boxes and targets; the keys come before ``loss_`` in
                names
        """
        sets = {"": (logits, boxes, targets)}
        if encoder is not None:
            # a set of its own: it may have other classes and other numbers of predictions
            classes = targets.classes * 0 if encoder.binary else targets.classes
            of_encoder = encoder.logits[None], encoder.boxes[None]
            sets["enc_"] = (*of_encoder, targets._replace(classes=classes))
        sets |= others or {}
        losses = {}
        for (key, each), matches in zip(sets.items(), self.matcher.match(list(sets.values()))):
            found = self._matched_losses(*each, matches)
            losses |= {name.replace("loss_", f"{key}loss_"): loss for name, loss in found.items()}
        return losses

    def _matched_losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, matches: Matches
    ) -> dict[str, Tensor]:
        """Return the losses of queries that got objects, the others being background."""
        d, n, q, _ = logits.shape
        spare = torch.where(matches.found, matches.queries, q)  # one more row for the others
        labels = torch.full((d, n, q + 1), self.num_classes, device=logits.device)
        labels = labels.scatter(2, spare, targets.classes.expand_as(spare))
        theirs = targets.boxes.new_zeros((d, n, q + 1, 4))
        theirs = theirs.scatter(
            2, spare[..., None].expand(-1, -1, -1, 4), targets.boxes.expand(d, -1, -1, -1)
        )
        weights = torch.zeros_like(labels, dtype=torch.float32).scatter(2, spare, 1.0)
        matched = sum(min(count, q) for count in targets.counts)
        return self.known_losses(
            logits,
            boxes,
            labels=labels[:, :, :q],
            targets=theirs[:, :, :q],
            box_weights=weights[:, :, :q],
            sizes=targets.sizes,
            number=mean_over_processes(matched, device=logits.device),
        )

    def known_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        *,
        labels: Tensor,
        targets: Tensor,
        box_weights: Tensor,
        sizes: Tensor,
        number: Tensor,
        label_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of queries whose targets are given, under the names of :meth:`forward`.

        Args:
            logits: ``(D, N, Q, K)``
            boxes: ``(D, N, Q, 4)``, cxcywh relative to the image
            labels: ``(N, Q)`` or ``(D, N, Q)``; K is background
            targets: ``(N, Q, 4)`` or ``(D, N, Q, 4)``, as ``boxes``; any where weights are zero
            box_weights, label_weights: ``(N, Q)`` or ``(D, N, Q)``, of the box losses and of the
                classification loss; None: 1
            sizes: see :class:`Targets`
            number: what sums are divided by, see :func:`mean_over_processes`
        """
        logits, boxes = logits.float(), boxes.float()  # nothing below is a product of matrices
        # boxes that do not count get a harmless target: infinities times zero would be no number
        targets = torch.where(box_weights[..., None] > 0, targets, boxes.detach())
        classes = self._class_losses(logits, boxes, labels, targets)
        if label_weights is not None:
            classes = classes * label_weights
        distance = (boxes - targets).abs().sum(dim=-1)
        pixels = (box_convert(each, "cxcywh", "xyxy") * sizes for each in (boxes, targets))
        parts = {
            "loss_cls": self.class_weight * classes.sum(dim=(1, 2)),
            "loss_bbox": self.l1_weight * (distance * box_weights).sum(dim=(1, 2)),
            "loss_iou": self.giou_weight * (giou_loss(*pixels) * box_weights).sum(dim=(1, 2)),
        }
        return _by_layer({name: loss / number for name, loss in parts.items()})

    def _class_losses(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the sum over the classes, ``(D, N, Q)``."""
        one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        one_hot = one_hot.to(logits.dtype).expand_as(logits)
        if self.class_loss == "focal":
            loss = sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=self.gamma)
        else:
            quality = one_hot * aligned_iou(boxes.detach(), targets)[..., None]
            loss = quality_focal_loss(logits, quality, gamma=self.gamma)
        if self.federated is not None:
            loss = loss * self.federated((one_hot > 0).flatten(0, -2).any(dim=0))
        return loss.sum(dim=-1)


def _by_layer(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return every layer's loss under a name of its own, from ``(D,)`` each."""
    return {
        name if layer == len(losses) - 1 else f"d{layer}.{name}": loss
        for name, losses in parts.items()
        for layer, loss in enumerate(losses.unbind())
    }
