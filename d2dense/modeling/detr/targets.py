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


def image_size_tensor(image_sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return ``(N, 2)``, height and width, float32, without waiting for the device."""
    if torch.jit.is_tracing():  # the sizes are tensors
        return torch.stack([torch.stack(tuple(size)) for size in image_sizes]).to(device).float()
    return torch.tensor(image_sizes, dtype=torch.float32).to(device, non_blocking=True)


def build_targets(instances: Sequence[Instances], device: torch.device) -> Targets:
    """Return the targets of a batch, whose instances have ``gt_boxes`` and ``gt_classes``."""
    size = image_size_tensor([each.image_size for each in instances], device)
    sizes = size.flip(1).repeat(1, 2)[:, None]
    boxes = [each.gt_boxes.tensor.to(device, torch.float32) for each in instances]
    classes = [each.gt_classes.to(device) for each in instances]
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


def mask_of(counts: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Return ``(N, length)``, True in the first rows, as many as ``counts`` says."""
    counts = torch.tensor(counts).to(device, non_blocking=True)
    return torch.arange(length, device=device) < counts[:, None]
