"""Dense heads that assign anchors to objects.

Letters: N images, C channels, A anchors of all levels together, Al anchors of level l, Hl and Wl
size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..auxiliary import Candidates
from .anchors import inside_images
from .assignment import Assignment
from .dense import DenseHead
from .objects import Objects, pad_objects

__all__ = ["AnchorHead"]


class AnchorHead(DenseHead):
    """A dense head all of whose anchors are candidates, those of objects and the background."""

    def assigned_losses(
        self, maps: Sequence[Tensor], levels: Sequence[Tensor], inside: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], Assignment]:
        """Return the losses and which object each anchor belongs to.

        Args:
            maps: ``(N, C, Hl, Wl)`` per level
            levels: anchors ``(Al, 4)`` per level, xyxy in pixels
            inside: ``(N, A)``, False for anchors of cells outside their image
        """
        raise NotImplementedError

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """See :class:`AuxiliaryHead`. As in the official code, anchors outside their image are
        background too as candidates, with a box of zeros.
        """
        objects = pad_objects(instances, maps[0].device)
        per_cell = self.anchors.per_cell
        inside = inside_images(maps, self.strides, objects.sizes, per_cell=per_cell)
        levels = self.anchors.of(maps)
        losses, assignment = self.assigned_losses(maps, levels, inside, objects)
        anchors = torch.cat(levels)
        classes = objects.classes.gather(1, assignment.matched)
        rows = None
        if per_cell > 1:
            rows = torch.arange(len(anchors), device=anchors.device) // per_cell
        return losses, Candidates(
            boxes=anchors * inside[..., None],
            labels=classes.masked_fill(~assignment.positive, self.num_classes),
            targets=assignment.targets(objects, torch.zeros_like(anchors)),
            usable=torch.ones_like(inside),
            features=torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1),
            rows=rows,
        )
