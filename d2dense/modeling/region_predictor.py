"""Class and box layers of R-CNN heads, with losses over the regions of a whole batch.

Letters: R regions over all images, K foreground classes, D size of the region feature.
"""

from __future__ import annotations

import torch
from detectron2.layers import cross_entropy
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor

from .box_regression import box_losses
from .regions import Regions

__all__ = ["RegionPredictor"]


class RegionPredictor(FastRCNNOutputLayers):
    """Detectron2's ``FastRCNNOutputLayers`` with the same arguments, parameters and loss values;
    its losses need no host synchronisation.

    ``forward`` returns class logits ``(R, K + 1)``, background last, and box deltas ``(R, 4 K)``,
    or ``(R, 4)`` with ``cls_agnostic_bbox_reg``.
    """

    def scores(self, logits: Tensor) -> Tensor:
        """Return the class probabilities ``(R, K + 1)`` of logits."""
        if self.use_sigmoid_ce:
            return logits.sigmoid()
        return torch.softmax(logits, dim=-1)

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Apply deltas to absolute xyxy boxes ``(R, 4)``; computed in float32 and not clipped."""
        return self.box2box_transform.apply_deltas(deltas, boxes)

    def deltas_of(self, deltas: Tensor, classes: Tensor) -> Tensor:
        """Return the deltas ``(R, 4)`` of one foreground class ``(R,)`` per region; those of
        class-agnostic regression are everybody's.
        """
        if deltas.shape[1] == 4:
            return deltas
        index = classes[:, None, None].expand(-1, 1, 4)
        return deltas.view(-1, self.num_classes, 4).gather(1, index).squeeze(1)

    @torch.jit.unused
    def region_losses(self, logits: Tensor, deltas: Tensor, regions: Regions) -> dict[str, Tensor]:
        """Return ``loss_cls`` (mean over regions) and ``loss_box_reg`` (foreground sum / all
        regions), weighted.

        Args:
            logits: ``(R, K + 1)``, background last
            deltas: ``(R, 4)``, or ``(R, 4 K)`` where regression is class-specific
        """
        logits = logits.float()
        if self.use_sigmoid_ce:
            loss_cls = self.sigmoid_cross_entropy_loss(logits, regions.classes)
        else:
            loss_cls = cross_entropy(logits, regions.classes, reduction="mean")
        losses = {"loss_cls": loss_cls, "loss_box_reg": self._box_loss(deltas.float(), regions)}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _box_loss(self, deltas: Tensor, regions: Regions) -> Tensor:
        fg = regions.foreground
        boxes, gt_boxes = regions.boxes[fg], regions.gt_boxes[fg]
        losses = box_losses(
            self.deltas_of(deltas[fg], regions.classes[fg]),
            boxes,
            gt_boxes,
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return losses.sum() / max(regions.classes.numel(), 1)
