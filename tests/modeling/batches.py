"""Tiny features, proposals and targets for heads that work on regions."""

from __future__ import annotations

import torch
from detectron2.structures import BitMasks, Boxes, Instances

LEVELS = {"p2": 4, "p3": 8}
CHANNELS, SIZE = 8, 128


def features(
    num_images: int = 2, seed: int = 1, channels: int = CHANNELS
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(num_images, channels, SIZE // s, SIZE // s, generator=generator)
        for name, s in LEVELS.items()
    }


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * SIZE * 0.7
    size = 4 + torch.rand(count, 2, generator=generator) * SIZE * 0.5
    return torch.cat([corner, (corner + size).clamp(max=SIZE)], dim=1)


def proposals(counts=(40, 30), seed: int = 2) -> list[Instances]:
    result = []
    for n, count in enumerate(counts):
        boxes = random_boxes(count, seed + n)
        fields = {"proposal_boxes": Boxes(boxes), "objectness_logits": torch.zeros(count)}
        result.append(Instances((SIZE, SIZE), **fields))
    return result


def targets(
    counts=(4, 3), num_classes: int = 5, masks: bool = False, seed: int = 5
) -> list[Instances]:
    result = []
    for n, count in enumerate(counts):
        target = Instances((SIZE, SIZE))
        target.gt_boxes = Boxes(random_boxes(count, seed + n))
        target.gt_classes = torch.arange(count) % num_classes
        if masks:
            target.gt_masks = BitMasks(torch.zeros(count, SIZE, SIZE, dtype=torch.bool))
            for mask, box in zip(target.gt_masks.tensor, target.gt_boxes.tensor.long().tolist()):
                mask[box[1] : box[3], box[0] : box[2]] = True
        result.append(target)
    return result
