"""Mask R-CNN as an auxiliary head.

Letters: N images, C channels, R sampled regions per image, P positive regions of all images, G
objects of an image, K classes, M side of a predicted mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_inference
from detectron2.structures import BitMasks, Instances
from torch import Tensor
from torchvision.ops import roi_align

from d2dense.errors import UserError
from d2dense.modeling.regions import pool_lists

from .dense import average_factor
from .faster_rcnn import FasterRCNNHead, SampledRegions

__all__ = ["MaskRCNNHead", "crop_masks"]


class MaskRCNNHead(FasterRCNNHead):
    """The Faster R-CNN head with Detectron2's mask branch on the positive regions.

    The candidates are those of Faster R-CNN; annotated objects need ``gt_masks``.

    Args:
        mask_pooled_size: side of the mask branch's regions; masks have twice of it, M
        mask_convs: 3x3 convolutions of the mask branch
        mask_channels: their width
        mask_weight: of the loss
        channels, num_classes, **faster_rcnn: arguments of :class:`FasterRCNNHead`
    """

    @configurable
    def __init__(
        self,
        *,
        mask_pooled_size: int = 14,
        mask_convs: int = 4,
        mask_channels: int = 256,
        mask_weight: float = 1.0,
        channels: int = 256,
        num_classes: int = 80,
        **faster_rcnn: Any,
    ):
        super().__init__(channels=channels, num_classes=num_classes, **faster_rcnn)
        self.mask_pooler = self.make_pooler(mask_pooled_size)
        self.mask_head = MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=mask_pooled_size, width=mask_pooled_size),
            num_classes=num_classes,
            conv_dims=[mask_channels] * (mask_convs + 1),  # the last one is the upsampling's
        )
        self.mask_weight = mask_weight

    def predict_masks(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return logits of masks ``(sum of R_n, K, M, M)``, float32, in boxes ``(R_n, 4)`` per
        image; one wait for the device.
        """
        levels = [each.float() for each in maps[: self.roi_levels]]
        return self.mask_head.layers(pool_lists(self.mask_pooler, levels, list(boxes))).float()

    def further_losses(
        self, maps: Sequence[Tensor], regions: SampledRegions, instances: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Return ``loss_mask``, the mean over the positive regions and the pixels of their class's
        mask.

        The numbers of positive regions are a wait for the device, and so are polygons.
        """
        number = average_factor(regions.positive.sum())
        counts = regions.positive.sum(dim=1).tolist()  # positives are first among the regions
        boxes = [each[:count] for each, count in zip(regions.boxes, counts)]
        matched = [each[:count] for each, count in zip(regions.matched, counts)]
        labels = torch.cat([each[:count] for each, count in zip(regions.labels, counts)])
        logits = self.predict_masks(maps, boxes)
        chosen = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        logits = logits.gather(1, chosen)[:, 0]
        targets = torch.cat(
            [
                crop_masks(each, index, box, logits.shape[-1])
                for each, index, box in zip(instances, matched, boxes)
            ]
        )
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return {"loss_mask": self.mask_weight * entropy.mean(dim=(1, 2)).sum() / number}

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`; detections also have ``pred_masks`` ``(D, 1, M, M)``,
        probabilities within their boxes.
        """
        detections = super().detect(maps, image_sizes)
        logits = self.predict_masks(maps, [each.pred_boxes.tensor for each in detections])
        mask_rcnn_inference(logits, detections)
        return detections


@torch.no_grad()
def crop_masks(instances: Instances, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return what of the objects' masks lies in boxes, ``(P, side, side)``, 0 or 1, float32.

    Args:
        instances: of an image, with ``gt_masks`` if there are any
        index: ``(P,)``, the object of each box
        boxes: ``(P, 4)``, xyxy in pixels

    Raises:
        UserError: there are no masks.
    """
    if len(instances) == 0:
        return boxes.new_zeros(0, side, side)
    if not instances.has("gt_masks"):
        raise UserError(
            "the auxiliary head mask_rcnn needs masks, and the objects have none; load them "
            "(MODEL.MASK_ON True, in lazy configs dataloader.train.mapper.use_instance_mask=true) "
            "or use faster_rcnn"
        )
    masks = instances.gt_masks
    if not isinstance(masks, BitMasks):
        return masks[index].crop_and_resize(boxes, side).to(boxes)
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    whole = masks.tensor.to(boxes)[:, None]
    return (roi_align(whole, rois, side, 1.0, 0, aligned=True)[:, 0] >= 0.5).to(boxes)
