"""Faster R-CNN as an auxiliary head.

Letters: N images, C channels, P proposals, R sampled regions per image, K classes, S pooled side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2dense.modeling.box_regression import giou_loss
from d2dense.modeling.detr.targets import image_size_tensor
from d2dense.modeling.regions import pool_lists

from ..auxiliary import AuxiliaryHead, Candidates, recompute
from .assignment import IoUAssigner
from .boxes import BoxCoder, clip
from .dense import average_factor
from .objects import Objects, pad_objects
from .rpn import ProposalNetwork, Proposals
from .sampling import Sampler
from .suppression import Suppression

__all__ = ["FasterRCNNHead", "SampledRegions"]


class SampledRegions(NamedTuple):
    """Regions that have a loss: positives, then negatives, each in their order.

    Attributes:
        boxes: ``(N, R, 4)``, xyxy in pixels, without gradient.
        labels: ``(N, R)``, K for the background.
        matched: ``(N, R)``, the object's row; 0 where not positive.
        targets: ``(N, R, 4)``, the object's box; zero where not positive.
        positive: ``(N, R)``.
        there: ``(N, R)``, False in rows that only fill up.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    targets: Tensor
    positive: Tensor
    there: Tensor


class FasterRCNNHead(AuxiliaryHead):
    """A region proposal network on all maps, and a box head on regions of the finer ones.

    Args:
        rpn: proposes the regions
        channels: C
        strides: of the maps, in pixels
        num_classes: K
        roi_levels: how many maps, from the finest on, regions are pooled from
        pooled_size: S
        convs, fcs, hidden: the box head's convolutions (with group norm), linear layers and width
        class_agnostic: one box per region, not one per class
        stds: of the box coder
        positive_iou: of regions; below it they are background
        samples, positive_share, random_sampling: what of the regions has a loss, see
            :class:`Sampler`; annotated boxes are among the regions
        class_weight, giou_weight: of the losses
        max_candidates: of the regions that queries are made of
        score_threshold, nms_threshold, max_detections: of :meth:`detect`
        soft_nms, by_offset: how it suppresses, see :class:`Suppression`
    """

    @configurable
    def __init__(
        self,
        *,
        rpn: ProposalNetwork,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_classes: int = 80,
        roi_levels: int = 4,
        pooled_size: int = 7,
        convs: int = 0,
        fcs: int = 2,
        hidden: int = 1024,
        class_agnostic: bool = False,
        stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        positive_iou: float = 0.5,
        samples: int | None = 512,
        positive_share: float = 0.25,
        random_sampling: bool = True,
        class_weight: float = 1.0,
        giou_weight: float = 10.0,
        max_candidates: int = 2000,
        score_threshold: float = 0.0,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms: bool = False,
        by_offset: bool = False,
    ):
        super().__init__()
        self.rpn = rpn
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.roi_levels = roi_levels
        self.pooler = self.make_pooler(pooled_size)
        self.box_head = FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=pooled_size, width=pooled_size),
            conv_dims=[channels] * convs,
            fc_dims=[hidden] * fcs,
            conv_norm="GN",
        )
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.boxes = nn.Linear(hidden, 4 if class_agnostic else 4 * num_classes)
        for layer, std in ((self.classes, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.coder = BoxCoder(stds=stds)
        self.assigner = IoUAssigner(positive=positive_iou, negative=positive_iou)
        self.sampler = Sampler(
            samples=samples, positive_share=positive_share, random=random_sampling
        )
        self.class_weight, self.giou_weight = class_weight, giou_weight
        self.max_candidates = max_candidates
        suppression = Suppression(iou=nms_threshold, soft=soft_nms, by_offset=by_offset)
        self.detection = (score_threshold, suppression, max_detections)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, channels: int, strides: Sequence[int], num_classes: int
    ) -> dict[str, Any]:
        node, rpn = cfg.MODEL.CODETR.RCNN, cfg.MODEL.CODETR.RPN
        return {
            "rpn": ProposalNetwork(
                channels=channels,
                strides=strides,
                samples=rpn.SAMPLES,
                train_candidates=rpn.TRAIN_CANDIDATES,
                train_proposals=rpn.TRAIN_PROPOSALS,
                test_candidates=rpn.TEST_CANDIDATES,
                test_proposals=rpn.TEST_PROPOSALS,
                nms_threshold=rpn.NMS_THRESHOLD,
                test_nms_threshold=rpn.TEST_NMS_THRESHOLD,
            ),
            "channels": channels,
            "strides": strides,
            "num_classes": num_classes,
            "roi_levels": node.LEVELS,
            "convs": node.CONVS,
            "fcs": node.FCS,
            "hidden": node.HIDDEN,
            "class_agnostic": node.CLASS_AGNOSTIC,
            "stds": node.STDS,
            "samples": node.SAMPLES,
            "score_threshold": node.SCORE_THRESHOLD,
            "nms_threshold": node.NMS_THRESHOLD,
            "max_detections": node.MAX_DETECTIONS,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :class:`AuxiliaryHead`; that of the region proposal network too."""
        super().set_grad_checkpointing(enable)
        recompute(self.rpn, "predict", enable)

    def make_pooler(self, size: int) -> ROIPooler:
        """Return what pools regions to ``size`` by ``size``, from a level by their area."""
        return ROIPooler(
            output_size=size,
            scales=[1 / stride for stride in self.strides[: self.roi_levels]],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        )

    def pool(
        self, maps: Sequence[Tensor], boxes: Tensor, pooler: ROIPooler | None = None
    ) -> Tensor:
        """Return the features ``(N R, C, S, S)``, float32, of boxes ``(N, R, 4)``; one wait for the
        device.
        """
        levels = [each.float() for each in maps[: self.roi_levels]]
        return pool_lists(pooler or self.pooler, levels, list(boxes.unbind()))

    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(N R, K + 1)``, background last, and deltas ``(N R, 4 or 4 K)``, float32,
        of pooled features.
        """
        states = self.box_head(pooled)
        return self.classes(states).float(), self.boxes(states).float()

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """See :class:`AuxiliaryHead`; ``loss_rpn_cls``, ``loss_rpn_bbox``, ``loss_cls`` and
        ``loss_bbox``.
        """
        objects = pad_objects(instances, maps[0].device)
        losses, proposals = self.rpn.losses(maps, objects)
        regions = self.sample(proposals, objects)
        pooled = self.pool(maps, regions.boxes)
        logits, deltas = self.predict(pooled)
        losses.update(self.region_losses(self.counting(logits, objects), deltas, regions))
        losses.update(self.further_losses(maps, regions, instances))
        return losses, self._candidates(pooled, regions)

    def further_losses(
        self, maps: Sequence[Tensor], regions: SampledRegions, instances: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses of further branches on the sampled regions; here there are none.

        Args:
            maps: levels ``(N, C, H_l, W_l)``, finest first.
            regions: what :meth:`sample` gave.
            instances: ground truth per image.
        """
        return {}

    @torch.no_grad()
    def sample(self, proposals: Proposals, objects: Objects) -> SampledRegions:
        """Return the regions to train on, annotated boxes first among equals."""
        # far outside the image nothing is pooled, but at a cost that grows with the area
        boxes = torch.cat([clip(objects.boxes, objects.limits), proposals.boxes], dim=1)
        there = torch.cat([objects.there, proposals.there], dim=1)
        found = self.assigner(boxes, there, objects)
        # annotated boxes belong to themselves, whatever else they overlap
        own = objects.there.shape[1]
        number = torch.arange(own, device=boxes.device).expand_as(found.matched[:, :own])
        matched = torch.cat([number, found.matched[:, own:]], dim=1)
        positive = torch.cat([objects.there, found.positive[:, own:]], dim=1)
        negative = torch.cat([torch.zeros_like(objects.there), found.negative[:, own:]], dim=1)
        positive, negative = self.sampler(positive, negative)
        total = boxes.shape[1]
        order = torch.arange(total, device=boxes.device)
        order = order + total * (2 - 2 * positive.long() - negative.long())
        index = order.argsort(dim=1)[:, : self.sampler.samples]
        positive, there = positive.gather(1, index), (positive | negative).gather(1, index)
        matched = matched.gather(1, index) * positive
        targets, classes = objects.of(matched)
        return SampledRegions(
            boxes=boxes.gather(1, index[..., None].expand(-1, -1, 4)) * there[..., None],
            labels=classes.masked_fill(~positive, self.num_classes),
            matched=matched,
            targets=targets * positive[..., None],
            positive=positive,
            there=there,
        )

    def counting(self, logits: Tensor, objects: Objects) -> Tensor:
        """Return logits ``(N R, K + 1)`` in which the classes that do not count have no
        probability; the background always counts.
        """
        counted = self.counted(objects)
        if counted is None:
            return logits
        return logits.masked_fill(~F.pad(counted, (0, 1), value=True), -torch.inf)

    def region_losses(
        self, logits: Tensor, deltas: Tensor, regions: SampledRegions
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_bbox`` of :meth:`predict`'s outputs, divided by the number
        of regions.

        Args:
            logits: ``(N R, K + 1)``
            deltas: ``(N R, 4)``, or ``(N R, 4 K)`` where they are by class
        """
        labels, there = regions.labels.flatten(), regions.there.flatten()
        positive, boxes = regions.positive.flatten(), regions.boxes.flatten(0, 1)
        number = average_factor(there.sum())
        entropy = F.cross_entropy(logits, labels, reduction="none")
        if deltas.shape[1] > 4:
            chosen = labels.masked_fill(~positive, 0)[:, None, None].expand(-1, 1, 4)
            deltas = deltas.view(len(labels), -1, 4).gather(1, chosen)[:, 0]
        targets = torch.where(positive[:, None], regions.targets.flatten(0, 1), boxes)
        overlap = giou_loss(self.coder.decode(boxes, deltas), targets)
        return {
            "loss_cls": self.class_weight * (entropy * there).sum() / number,
            "loss_bbox": self.giou_weight * (overlap * positive).sum() / number,
        }

    def _candidates(self, pooled: Tensor, regions: SampledRegions) -> Candidates:
        """Return the regions, in each image as many as in the one with the fewest."""
        fewest = regions.there.sum(dim=1).amin()
        rank = torch.arange(regions.there.shape[1], device=fewest.device)
        return Candidates(
            boxes=regions.boxes,
            labels=regions.labels,
            targets=regions.targets,
            usable=regions.there & (rank < fewest) & (rank < self.max_candidates),
            features=pooled.mean(dim=(2, 3)).view(*regions.labels.shape, -1),
        )

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`."""
        limits = image_size_tensor(image_sizes, maps[0].device).flip(1).repeat(1, 2)[:, None]
        proposals = self.rpn.propose(maps, limits)
        logits, deltas = self.predict(self.pool(maps, proposals.boxes))
        images, count = proposals.there.shape
        scores = logits.softmax(dim=-1) * proposals.there.flatten()[:, None]
        deltas = deltas.view(images, count, -1, 4)
        boxes = self.coder.decode(proposals.boxes[:, :, None], deltas)
        boxes = clip(boxes, limits[:, None]).flatten(2)
        scores = scores.view(images, count, -1)
        return [best_regions(*each, *self.detection) for each in zip(boxes, scores, image_sizes)]


def best_regions(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    score_threshold: float,
    suppression: Suppression,
    max_detections: int,
    *,
    first: int = 50,
) -> Instances:
    """Return the detections of an image, best first, as Detectron2's inference does.

    Args:
        boxes: ``(P, 4 K or 4)``, xyxy in pixels; they are clipped here
        scores: ``(P, K + 1)``, the background last
        score_threshold: scores are above it
        first: see :class:`Suppression`
    """
    height, width = image_size
    sound = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    region, classes = ((scores[:, :-1] > score_threshold) & sound[:, None]).nonzero().unbind(dim=1)
    boxes = boxes.view(len(boxes), -1, 4)
    boxes = boxes[region, classes if boxes.shape[1] > 1 else 0]
    boxes = clip(boxes, boxes.new_tensor([width, height, width, height]))
    rows, found = suppression(
        boxes, scores[region, classes], classes, most=max_detections, first=first
    )
    instances = Instances(tuple(image_size))
    instances.pred_boxes = Boxes(boxes[rows])
    instances.scores, instances.pred_classes = found, classes[rows]
    return instances
