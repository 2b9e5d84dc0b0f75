"""Contrastive denoising queries (DINO, section 3.3): noised objects beside the matched queries.

Letters: N images, C channels, G most objects in an image, T objects of all images, R groups,
P = 2 R G noised queries per image, Q matched queries, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .boxes import inverse_sigmoid
from .queries import Queries
from .targets import Targets, mask_of

__all__ = ["ContrastiveDenoising", "NoisedQueries"]


class NoisedQueries(NamedTuple):
    """Queries made of objects: R groups of G that should give their objects, and G that should be
    background; slots beyond an image's objects are background too.

    Attributes:
        content: ``(N, P, C)``, embedded classes; zero in empty slots.
        references: ``(N, P, 4)``, cxcywh relative to the image; 0.5 in empty slots.
        labels: ``(N, P)``; K is background.
        targets: ``(N, P, 4)``, the objects' boxes.
        box_weights: ``(N, P)``, 1 where a query has an object.
        groups: R.
        number: queries with an object in this process.
    """

    content: Tensor
    references: Tensor
    labels: Tensor
    targets: Tensor
    box_weights: Tensor
    groups: int
    number: int

    def join(self, queries: Queries) -> Queries:
        """Return these queries in front of the matched ones, which do not hear them; groups do not
        hear each other.
        """
        noised, matched = self.content.shape[1], queries.content.shape[1]
        rows = torch.arange(noised + matched, device=self.content.device)
        size = max(noised // self.groups, 1)
        group = torch.where(rows < noised, rows // size, -1)
        mask = (group != group[:, None]) & (rows < noised)
        return queries._replace(
            content=torch.cat([self.content, queries.content], dim=1),
            references=torch.cat([self.references, queries.references], dim=1),
            mask=mask,
        )


class Noise(NamedTuple):
    """Random numbers of all 2 R T queries, group by group, objects and background, image by image.

    Attributes:
        flipped: ``(2 R T,)``, True where the class is replaced.
        classes: ``(2 R T,)``, by which.
        shifts: ``(2 R T, 4)``, of the corners xyxy, in halves of the box's sides.
    """

    flipped: Tensor
    classes: Tensor
    shifts: Tensor


class ContrastiveDenoising(nn.Module):
    """Makes noised queries.

    Args:
        num_classes: K
        channels: C
        num_queries: of an image with objects, about; as many groups of all objects as fit, at least
            one
        label_noise: half of it is the probability of another class
        box_noise: how far corners move: up to half the box's sides times this, and of background up
            to twice that
        eps: references are at least this far from 0 and 1
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        channels: int = 256,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        eps: float = 1e-3,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise, self.box_noise = label_noise, box_noise
        self.eps = eps
        self.label_embedding = nn.Embedding(num_classes, channels)

    def forward(self, targets: Targets) -> NoisedQueries:
        """Return the noised queries of a batch; none of them where there is no object at all."""
        largest = max(targets.counts, default=0)
        groups = max(1, self.num_queries // largest) if largest else 1
        device, n = targets.boxes.device, len(targets.counts)
        noise = self.draw(groups, sum(targets.counts))
        # random numbers are drawn on the host, for objects that are there: nobody waits
        host = mask_of(targets.counts, largest, torch.device("cpu"))

        def spread(values: Tensor) -> Tensor:
            """Return ``(N, 2 R, G, ...)`` of ``(2 R T, ...)``."""
            slots = values.new_zeros((2 * groups, n, largest, *values.shape[1:]))
            slots[:, host] = values.unflatten(0, (2 * groups, sum(targets.counts)))
            return slots.transpose(0, 1).to(device, non_blocking=True)

        flipped, drawn, shifts = (spread(each) for each in noise)
        there = mask_of(targets.counts, largest, device)[:, None].expand_as(flipped)
        classes = targets.classes[:, None].expand_as(drawn)
        boxes = targets.boxes[:, None].expand_as(shifts)
        content = self.label_embedding(torch.where(flipped, drawn, classes))
        logits = inverse_sigmoid(self._shifted(boxes, shifts), self.eps)
        positive = torch.arange(2 * groups, device=device)[:, None] % 2 == 0
        positive = there & positive
        return NoisedQueries(
            content=(content * there[..., None]).flatten(1, 2),
            references=(logits * there[..., None]).sigmoid().flatten(1, 2),
            labels=torch.where(positive, classes, self.num_classes).flatten(1, 2),
            targets=boxes.flatten(1, 2),
            box_weights=positive.float().flatten(1, 2),
            groups=groups,
            number=groups * sum(targets.counts),
        )

    def draw(self, groups: int, objects: int) -> Noise:
        """Return random numbers for R groups of T objects, on the host."""
        count = 2 * groups * objects
        flipped = torch.zeros(count, dtype=torch.bool)
        classes = torch.zeros(count, dtype=torch.int64)
        shifts = torch.zeros(count, 4)
        if self.label_noise > 0:
            flipped = torch.rand(count) < 0.5 * self.label_noise
            classes[flipped] = torch.randint(0, self.num_classes, (int(flipped.sum()),))
        if self.box_noise > 0:
            signs = torch.randint(0, 2, (count, 4), dtype=torch.float32) * 2 - 1
            parts = torch.rand(count, 4).view(groups, 2, objects, 4)
            parts[:, 1] += 1.0  # background moves further than objects
            shifts = parts.view(count, 4) * signs
        return Noise(flipped, classes, shifts)

    def _shifted(self, boxes: Tensor, shifts: Tensor) -> Tensor:
        """Return cxcywh boxes ``(..., 4)`` with moved corners, cut at the image's border."""
        if self.box_noise <= 0:
            return boxes
        reach = boxes[..., 2:].repeat(*[1] * (boxes.ndim - 1), 2) / 2
        corners = box_convert(boxes, "cxcywh", "xyxy") + shifts * reach * self.box_noise
        return box_convert(corners.clamp(0.0, 1.0), "xyxy", "cxcywh")
