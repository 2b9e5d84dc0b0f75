"""Mask2Former for instance segmentation.

Letters: N images, Q queries, K classes, H and W size of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from torch import Tensor, nn

from .criterion import Mask2FormerCriterion, MaskTargets
from .mask_decoder import MaskDecoder
from .pixel_decoder import PixelDecoder

__all__ = ["Mask2Former", "masked_instances"]


class Mask2Former(nn.Module):
    """Backbone, pixel decoder, mask decoder, criterion.

    Args:
        backbone: feature maps by name
        in_features: which of them are used, finest first
        pixel_decoder: maps -> encoded maps and mask features
        decoder: these -> class and mask logits
        criterion: logits, masks and targets -> losses
        num_classes: K
        max_detections: per image, the pairs of query and class with the highest scores
        pixel_mean, pixel_std: per channel, in the order of ``input_format``
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        pixel_decoder: PixelDecoder,
        decoder: MaskDecoder,
        criterion: Mask2FormerCriterion,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        max_detections: int = 100,
        input_format: str = "RGB",
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = list(in_features)
        self.pixel_decoder = pixel_decoder
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else ``[{"instances": Instances}]`` with the fields
        ``pred_masks``, bool, ``pred_boxes`` around them, ``scores`` and ``pred_classes``, at the
        size that ``height`` and ``width`` of the input say.

        Args:
            batched_inputs: per image ``image``, ``(3, h, w)``, and in training ``instances`` with
                ``gt_classes`` and ``gt_masks``
        """
        images = self.preprocess(batched_inputs)
        logits, masks = self.predict(images.tensor)
        size = images.tensor.shape[2:]
        if self.training:
            targets = [self._targets(each["instances"], size) for each in batched_inputs]
            return self.criterion(logits, masks, targets)
        results = []
        for i, (given, own) in enumerate(zip(batched_inputs, images.image_sizes)):
            wanted = given.get("height", own[0]), given.get("width", own[1])
            found = self.select(logits[-1, i], masks[-1, i], size, own)
            results.append({"instances": masked_instances(*found, wanted)})
        return results

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Return the normalised images, filled up with zeros to one size."""
        images = [each["image"].to(self.device) for each in batched_inputs]
        images = [(each - self.pixel_mean) / self.pixel_std for each in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits ``(D, N, Q, K + 1)`` and mask logits ``(D, N, Q, H / 4, W / 4)`` of
        normalised images ``(N, 3, H, W)``.
        """
        features = self.backbone(images)
        maps = [features[name] for name in self.in_features]
        return self.decoder(*self.pixel_decoder(maps))

    def select(
        self,
        logits: Tensor,
        masks: Tensor,
        batch_size: Sequence[int],
        image_size: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pairs of query and class of one image: class probabilities ``(R,)``, best
        first, classes ``(R,)`` and mask logits ``(R, h, w)`` of its pixels.

        Args:
            logits: ``(Q, K + 1)``
            masks: logits ``(Q, H / 4, W / 4)``
            batch_size: (H, W)
            image_size: (h, w), without padding
        """
        scores = logits.float().softmax(dim=-1)[:, :-1].flatten()
        scores, index = scores.topk(min(self.max_detections, len(scores)))
        masks = masks[index // self.num_classes].float()[None]
        masks = F.interpolate(masks, size=tuple(batch_size), mode="bilinear", align_corners=False)
        return scores, index % self.num_classes, masks[0, :, : image_size[0], : image_size[1]]

    def _targets(self, instances: Instances, size: Sequence[int]) -> MaskTargets:
        """Return the objects with masks of the batch's size."""
        masks = instances.gt_masks
        height, width = instances.image_size
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width)
        masks = masks.tensor.to(self.device)
        padded = F.pad(masks, (0, size[1] - width, 0, size[0] - height))
        return MaskTargets(classes=instances.gt_classes.to(self.device), masks=padded)


def masked_instances(
    scores: Tensor, classes: Tensor, masks: Tensor, size: tuple[int, int]
) -> Instances:
    """Return detections at ``size`` (height, width); a score is that of the class times the mean
    probability inside the mask.

    Args:
        scores, classes: ``(R,)``
        masks: logits ``(R, h, w)``, of the whole image at any size
    """
    masks = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    shares = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = Instances(size)
    found.pred_masks = inside
    found.pred_boxes = Boxes(_boxes(inside))
    found.scores = scores * shares
    found.pred_classes = classes
    return found


def _boxes(masks: Tensor) -> Tensor:
    """Return the boxes around masks ``(R, h, w)``, xyxy in pixel borders; zeros without a pixel."""
    rows, columns = masks.any(dim=2), masks.any(dim=1)
    edges = []
    for line in (columns, rows):
        place = torch.arange(line.shape[1], device=line.device)
        low = torch.where(line, place, line.shape[1]).amin(dim=1)
        high = torch.where(line, place + 1, 0).amax(dim=1)
        edges.append((torch.minimum(low, high), high))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=1).float()
