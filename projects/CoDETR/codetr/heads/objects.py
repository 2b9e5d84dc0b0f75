"""Annotated objects of a batch as padded tensors, in pixels.

Letters: N images, G most objects in an image (at least 1), A anchors or other candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from d2dense.modeling.detr.targets import image_size_tensor, mask_of

__all__ = ["Objects", "chunks", "pad_objects", "paired_iou"]

_ELEMENTS = 2**24  # of one temporary tensor of pairs


class Objects(NamedTuple):
    """What there is in each image.

    Attributes:
        boxes: ``(N, G, 4)``, xyxy in pixels, zero in rows without an object.
        classes: ``(N, G)``, 0 in rows without an object.
        there: ``(N, G)``, False in rows without an object.
        sizes: ``(N, 2)``, height and width of the images without padding.
    """

    boxes: Tensor
    classes: Tensor
    there: Tensor
    sizes: Tensor

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes ``(N, A, 4)`` and classes ``(N, A)`` of rows ``(N, A)``."""
        boxes = self.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return boxes, self.classes.gather(1, index)

    @property
    def limits(self) -> Tensor:
        """Width, height, width, height of the images, ``(N, 1, 4)``."""
        return self.sizes.flip(1).repeat(1, 2)[:, None]


def pad_objects(instances: Sequence[Instances], device: torch.device) -> Objects:
    """Return the objects of a batch, whose instances have ``gt_boxes`` and ``gt_classes``, without
    waiting for the device.
    """
    boxes = [each.gt_boxes.tensor.to(device, torch.float32, True) for each in instances]
    classes = [each.gt_classes.to(device, non_blocking=True) for each in instances]
    counts = [len(each) for each in instances]
    length = max(counts)
    boxes, classes = (pad_sequence(each, batch_first=True) for each in (boxes, classes))
    if length == 0:  # one row that is not there spares everybody else empty tensors
        boxes, classes = boxes.new_zeros(len(counts), 1, 4), classes.new_zeros(len(counts), 1)
    return Objects(
        boxes=boxes,
        classes=classes.long(),
        there=mask_of(counts, max(length, 1), device),
        sizes=image_size_tensor([each.image_size for each in instances], device),
    )


def chunks(objects: Objects, candidates: int) -> Iterator[slice]:
    """Yield slices of the G objects that keep a tensor of pairs with ``candidates`` small."""
    images, length = objects.there.shape
    step = max(1, _ELEMENTS // max(1, images * candidates))
    for first in range(0, length, step):
        yield slice(first, first + step)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of xyxy boxes whose shapes ``(..., 4)`` broadcast; 0 where nothing is
    shared.
    """
    sides = []
    for low, high in ((0, 2), (1, 3)):  # axis by axis takes half the memory
        first = torch.maximum(boxes[..., low], others[..., low])
        sides.append((torch.minimum(boxes[..., high], others[..., high]) - first).clamp(min=0))
    shared = sides[0] * sides[1]
    areas = [(each[..., 2:] - each[..., :2]).prod(dim=-1) for each in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)
