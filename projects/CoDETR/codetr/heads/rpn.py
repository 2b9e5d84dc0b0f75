"""The region proposal network of auxiliary heads with two stages.

Letters: N images, C channels, A anchors of all levels together, P proposals per image, Hl and Wl
size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .anchors import CellAnchors, inside_images, octaves
from .assignment import IoUAssigner
from .boxes import BoxCoder, clip
from .dense import average_factor, flatten_levels
from .objects import Objects
from .sampling import Sampler
from .suppression import Suppression

__all__ = ["ProposalNetwork", "Proposals"]


class Proposals(NamedTuple):
    """Regions of each image, best first.

    Attributes:
        boxes: ``(N, P, 4)``, xyxy in pixels, without gradient.
        scores: ``(N, P)``.
        there: ``(N, P)``, False in rows that only fill up.
    """

    boxes: Tensor
    scores: Tensor
    there: Tensor


class ProposalNetwork(nn.Module):
    """Objectness and deltas of nine anchors per cell.

    An object claims the anchors that it overlaps most if the IoU reaches the threshold of
    negatives; anchors outside their image are ignored; deltas are decoded with a limit on both
    sides: three differences from Detectron2's ``RPN``, of which this takes the layers. The anchors
    of a cell are ordered by ratio, then by scale.

    Args:
        channels: C
        strides: of the maps, in pixels
        scales: of the anchors' sides, in strides; None: three of an octave from 4 on
        ratios: height by width
        positive_iou, negative_iou: thresholds
        samples, positive_share, random_sampling: what of the anchors has a loss, see
            :class:`Sampler`
        class_weight, box_weight: of the losses
        train_candidates, test_candidates: per level, by score
        train_proposals, test_proposals: P, what remains after suppression within each level
        nms_threshold: IoU of the suppression
        test_nms_threshold: in tests; None: the same
        by_offset: how it suppresses, see :class:`Suppression`; levels are its classes
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] | None = None,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        samples: int | None = 256,
        positive_share: float = 0.5,
        random_sampling: bool = True,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        train_candidates: int = 4000,
        train_proposals: int = 1000,
        test_candidates: int = 1000,
        test_proposals: int = 1000,
        nms_threshold: float = 0.7,
        test_nms_threshold: float | None = None,
        by_offset: bool = False,
    ):
        super().__init__()
        self.strides = tuple(strides)
        scales = octaves(4.0, 3) if scales is None else scales
        self.anchors = CellAnchors(strides=strides, scales=scales, ratios=ratios)
        self.head = StandardRPNHead(in_channels=channels, num_anchors=self.anchors.per_cell)
        self.assigner = IoUAssigner(
            positive=positive_iou, negative=negative_iou, claim=negative_iou
        )
        self.sampler = Sampler(
            samples=samples, positive_share=positive_share, random=random_sampling
        )
        self.coder = BoxCoder()
        self.class_weight, self.box_weight = class_weight, box_weight
        if test_nms_threshold is None:
            test_nms_threshold = nms_threshold
        train, test = (
            Suppression(iou=iou, by_offset=by_offset) for iou in (nms_threshold, test_nms_threshold)
        )
        self.train_limits = (train_candidates, train_proposals, train)
        self.test_limits = (test_candidates, test_proposals, test)

    def predict(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits ``(N, 9, Hl, Wl)`` and deltas ``(N, 36, Hl, Wl)`` of all levels."""
        return self.head(list(maps))

    def losses(
        self, maps: Sequence[Tensor], objects: Objects
    ) -> tuple[dict[str, Tensor], Proposals]:
        """Return ``loss_rpn_cls`` and ``loss_rpn_bbox``, and the proposals for training.

        Args:
            maps: ``(N, C, Hl, Wl)`` per level
        """
        logits, deltas = self.predict(maps)
        anchors = self.anchors.of(maps)
        inside = inside_images(maps, self.strides, objects.sizes, per_cell=self.anchors.per_cell)
        losses = self._losses(logits, deltas, torch.cat(anchors), inside, objects)
        proposals = self._propose(logits, deltas, anchors, objects.limits, *self.train_limits)
        return losses, proposals

    def propose(self, maps: Sequence[Tensor], limits: Tensor) -> Proposals:
        """Return the proposals for testing.

        Args:
            limits: ``(N, 1, 4)``, width, height, width, height of the images
        """
        logits, deltas = self.predict(maps)
        anchors = self.anchors.of(maps)
        return self._propose(logits, deltas, anchors, limits, *self.test_limits)

    def _losses(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Tensor,
        inside: Tensor,
        objects: Objects,
    ) -> dict[str, Tensor]:
        assignment = self.assigner(anchors, inside, objects)
        positive, negative = self.sampler(assignment.positive, assignment.negative)
        number = average_factor(
            sum(mask.sum(dim=1).clamp(min=1).sum() for mask in (positive, negative))
        )
        target = self.coder.encode(anchors, assignment.targets(objects, anchors))
        distance = (flatten_levels(deltas, 4) - target).abs().sum(dim=-1)
        entropy = F.binary_cross_entropy_with_logits(
            flatten_levels(logits, 1)[..., 0], positive.float(), reduction="none"
        )
        return {
            "loss_rpn_cls": self.class_weight * (entropy * (positive | negative)).sum() / number,
            "loss_rpn_bbox": self.box_weight * (distance * positive).sum() / number,
        }

    @torch.no_grad()
    def _propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        limits: Tensor,
        candidates: int,
        proposals: int,
        suppression: Suppression,
    ) -> Proposals:
        """Choose by score in each level, clip, drop what is empty, suppress, choose again; the
        suppression waits for the device, once per image.
        """
        scores, boxes, levels = [], [], []
        for number, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors)):
            score = flatten_levels([logit], 1)[..., 0].sigmoid()
            score, index = score.topk(min(candidates, score.shape[1]), dim=1)
            delta = flatten_levels([delta], 4)
            delta = delta.gather(1, index[..., None].expand(-1, -1, 4))
            scores.append(score)
            boxes.append(self.coder.decode(anchor[index], delta))
            levels.append(torch.full_like(index, number))
        boxes, scores = clip(torch.cat(boxes, dim=1), limits), torch.cat(scores, dim=1)
        empty = (boxes[..., 2:] <= boxes[..., :2]).any(dim=-1)
        scores = scores.masked_fill(empty, -1.0)  # last, and they suppress nothing
        boxes = boxes.masked_fill(empty[..., None], 0.0)
        levels = torch.cat(levels, dim=1)
        kept = [
            suppression(*each, most=proposals)[0]
            for each in zip(boxes.unbind(), scores.unbind(), levels.unbind())
        ]
        index = pad_sequence(kept, batch_first=True, padding_value=-1)
        chosen = index.clamp(min=0)
        found = scores.gather(1, chosen)
        return Proposals(
            boxes=boxes.gather(1, chosen[..., None].expand(-1, -1, 4)),
            scores=found,
            there=(index >= 0) & (found >= 0),
        )
