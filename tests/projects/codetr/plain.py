"""Losses, boxes and anchors of one place at a time, in plain Python numbers: what the batched heads
are compared with.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from detectron2.structures import Boxes, Instances


def instances(size: tuple[int, int], boxes, classes) -> Instances:
    """Objects of an image of ``size`` (height, width), boxes in xyxy."""
    result = Instances(size)
    result.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return result


def random_instances(
    seed: int, sizes, counts, *, num_classes: int, least: float = 0.02
) -> list[Instances]:
    """Boxes somewhere in the images, as wide and high as ``least`` of them or more."""
    draw = torch.Generator().manual_seed(seed)
    result = []
    for (height, width), count in zip(sizes, counts):
        ends = torch.rand(count, 2, 2, generator=draw) ** 1.3
        low, high = ends.amin(dim=1), ends.amax(dim=1)
        boxes = torch.cat([low, high + least], dim=1) * torch.tensor([width, height] * 2)
        classes = torch.randint(num_classes, (count,), generator=draw)
        result.append(instances((height, width), boxes, classes))
    return result


def random_maps(seed: int, size: tuple[int, int], strides, *, images: int, channels: int):
    """Maps of a padded batch, with gradient."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [[-(-side // stride) for side in size] for stride in strides]
    return [
        torch.randn(images, channels, *shape, generator=draw).requires_grad_() for shape in shapes
    ]


def gradients(head, maps, objects):
    """Losses and candidates, and the gradients of the parameters and maps by the losses' sum."""
    losses, candidates = head.losses(maps, objects)
    wanted = [*head.parameters(), *maps]
    found = torch.autograd.grad(sum(losses.values()), wanted, allow_unused=True)
    return losses, candidates, found


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (area(a) + area(b) - width * height)


def giou(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area(a) + area(b) - width * height
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (around - union) / around


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def focal(logits, label: int, *, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """Of all classes; a label that is no class is the background."""
    total = 0.0
    for number, logit in enumerate(logits):
        p = sigmoid(logit)
        if number == label:
            total -= alpha * (1 - p) ** gamma * math.log(p)
        else:
            total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


def decode(anchor, deltas, stds=(1.0, 1.0, 1.0, 1.0)) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds))
    limit = math.log(1000 / 16)
    width_out = width * math.exp(max(-limit, min(limit, dw)))
    height_out = height * math.exp(max(-limit, min(limit, dh)))
    x, y = x + dx * width, y + dy * height
    return [x - width_out / 2, y - height_out / 2, x + width_out / 2, y + height_out / 2]


def grid(maps, strides, *, scales=(8.0,), ratios=(1.0,)):
    """Anchors around the corners of the cells: (level, row, column, box)."""
    places = []
    for level, (each, stride) in enumerate(zip(maps, strides)):
        for row in range(each.shape[2]):
            for column in range(each.shape[3]):
                for ratio in ratios:  # height by width
                    for scale in scales:
                        width = scale * stride / math.sqrt(ratio)
                        height = scale * stride * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                        places.append((level, row, column, box))
    return places


def fit_mixture(values: np.ndarray, *, steps: int = 100, tolerance: float = 1e-3):
    """Expectation-maximisation as in any textbook; started and stopped as the head does."""
    means = np.array([values.min(), values.max()])
    variances, weights = np.ones(2), np.full(2, 0.5)
    before = -np.inf
    for _ in range(steps):
        density = np.array(
            [
                w / np.sqrt(2 * np.pi * v) * np.exp(-((values - m) ** 2) / (2 * v))
                for w, m, v in zip(weights, means, variances)
            ]
        )  # (2, V)
        now = np.log(density.sum(axis=0)).mean()
        share = density / density.sum(axis=0)
        for part in range(2):
            size = share[part].sum()
            weights[part] = size / len(values)
            means[part] = (share[part] * values).sum() / size
            variances[part] = (share[part] * (values - means[part]) ** 2).sum() / size + 1e-6
        if abs(now - before) < tolerance:
            break
        before = now
    return weights, means, variances
