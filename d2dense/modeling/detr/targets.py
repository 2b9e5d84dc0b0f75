"""Annotated objects of a batch as padded tensors.

Letters: N images, G most objects in an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from d2dense.errors import UserError

__all__ = ["Targets", "build_targets", "image_size_tensor"]


class Targets(NamedTuple):
    """What there is in each image.

    Attributes:
        classes: ``(N, G)``, 0 in rows without an object.
        boxes: ``(N, G, 4)``, cxcywh relative to the image; a whole image in rows without one.
        counts: objects per image, numbers of the host.
        sizes: ``(N, 1, 4)``, width, height, width, height of the images in pixels.
    """

    classes: Tensor
    boxes: Tensor
    counts: list[int]
    sizes: Tensor

    def repeated(self, times: int) -> Targets:
        """Return as many copies of each object."""
        return self._replace(
            classes=self.classes.repeat_interleave(times, dim=1),
            boxes=self.boxes.repeat_interleave(times, dim=1),
            counts=[times * count for count in self.counts],
        )


def image_size_tensor(image_sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return ``(N, 2)``, height and width, float32, without waiting for the device."""
    if torch.jit.is_tracing():  # the sizes are tensors
        return torch.stack([torch.stack(tuple(size)) for size in image_sizes]).to(device).float()
    return torch.tensor(image_sizes, dtype=torch.float32).to(device, non_blocking=True)


def build_targets(
    instances: Sequence[Instances],
    device: torch.device,
    *,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    num_classes: int | None = None,
) -> Targets:
    """Return the targets of a batch, whose instances have ``gt_boxes`` and ``gt_classes``.

    Args:
        image_sizes: heights and widths that boxes are relative to; None: the instances' own
        num_classes: what classes are checked against

    Raises:
        UserError: a class is out of range.
    """
    _check_classes(instances, num_classes)
    if image_sizes is None:
        image_sizes = [each.image_size for each in instances]
    sizes = image_size_tensor(image_sizes, device).flip(1).repeat(1, 2)[:, None]
    boxes = [each.gt_boxes.tensor.to(device, torch.float32, True) for each in instances]
    classes = [each.gt_classes.to(device, non_blocking=True) for each in instances]
    relative = box_convert(pad_sequence(boxes, batch_first=True) / sizes, "xyxy", "cxcywh")
    counts = [len(each) for each in instances]
    missing = ~mask_of(counts, relative.shape[1], device)
    whole = relative.new_full((4,), 0.5)
    whole[2:] = 1.0
    return Targets(
        classes=pad_sequence(classes, batch_first=True),
        boxes=torch.where(missing[..., None], whole, relative),
        counts=counts,
        sizes=sizes,
    )


def _check_classes(instances: Sequence[Instances], num_classes: int | None) -> None:
    """Say which class is out of range; loaders leave the classes on the host, so nobody waits."""
    given = [each.gt_classes for each in instances if len(each)]
    if num_classes is None or not given:
        return
    classes = torch.cat(given)
    if classes.is_meta:
        return
    for found in (int(classes.min()), int(classes.max())):
        if not 0 <= found < num_classes:
            raise UserError(
                f"an object has class {found}, but the model has the classes 0 to "
                f"{num_classes - 1}; correct the annotations or their category ids, or "
                "MODEL.DETR.NUM_CLASSES (yaml), model.num_classes (lazy)"
            )


def mask_of(counts: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Return ``(N, length)``, True in the first rows, as many as ``counts`` says."""
    ends = torch.tensor(counts).to(device, non_blocking=True)
    return torch.arange(length, device=device) < ends[:, None]
