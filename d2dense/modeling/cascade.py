"""Cascade R-CNN heads with the choices that papers make differently.

Letters: N images, R regions over all images, K foreground classes, C channels, S pooled side, D
    region feature.
"""

# No postponed annotations here: TorchScript reads the Final ones of the class as objects.
from collections.abc import Sequence, Sized

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    build_box_head,
    build_mask_head,
    select_foreground_proposals,
)
from detectron2.structures import Instances
from torch import Tensor, nn

from d2dense.errors import UserError

from . import regions as batch
from .batched_cascade import BatchedCascadeROIHeads
from .box_regression import box_transform
from .region_predictor import RegionPredictor
from .region_statistics import log_statistics
from .regions import Regions, clip_lists

__all__ = [
    "SCORE_AVERAGES",
    "FlexibleCascadeROIHeads",
    "StageMaskHeads",
    "check_first_iou",
    "check_per_stage",
]

SCORE_AVERAGES = ("probabilities", "logits")


def check_per_stage(num_stages: int, **per_stage: Sized) -> None:
    """Raise a ``UserError`` that names what does not have one entry per stage."""
    for name, values in per_stage.items():
        if len(values) != num_stages:
            raise UserError(
                f"{name} has {len(values)} entries, but the cascade has {num_stages} stages: give "
                "one per stage"
            )


def check_first_iou(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if the yacs keys disagree on the foreground IoU of stage 1."""
    sampling, first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0], cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0]
    if first != sampling:
        raise UserError(
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS[0] is {sampling}, but the first of "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {first}: make them equal"
        )


class StageMaskHeads(nn.ModuleList):
    """One mask head per stage; detections get the mean of their mask probabilities."""

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Add ``pred_masks``, ``(R_n, 1, M, M)``, to the detections of each image.

        Args:
            x: features pooled from the detections, ``(R, C, S, S)``
            instances: with ``pred_classes``
        """
        sums: list[Tensor] = []
        num_heads = 0
        for head in self:
            instances = head(x, instances)
            masks = [each.pred_masks for each in instances]
            sums = [a + b for a, b in zip(sums, masks)] if num_heads > 0 else masks
            num_heads += 1
        for each, total in zip(instances, sums):
            each.pred_masks = total * (1.0 / num_heads)
        return instances


@ROI_HEADS_REGISTRY.register()
class FlexibleCascadeROIHeads(BatchedCascadeROIHeads):
    """Cascade of box heads, optionally with class-specific regression and a mask head per stage.

    With the defaults and class-agnostic predictors it computes what Detectron2's
    ``CascadeROIHeads`` does, bit for bit and under the same parameter names, without waiting for
    the device per image. Each stage pools features from the boxes that it receives, classifies them
    and hands its refined, clipped and detached boxes on. Where regression is class-specific, these
    are the boxes of the foreground class with the largest logit; in training, of the ground-truth
    class for foreground regions. Boxes of the last stage are the result.

    Args:
        num_classes, batch_size_per_image, positive_fraction, proposal_append_gt: as in Detectron2's
            ``ROIHeads``
        box_in_features: names of the pyramid levels that boxes are pooled from
        box_pooler: pools ``(R, C, S, S)``
        box_heads: one per stage, ``(R, C, S, S) -> (R, D)``
        box_predictors: one :class:`RegionPredictor` per stage
        iou_thresholds: foreground IoU of each stage
        stage_loss_weights: factor of the losses of each stage, its mask head's among them
        scale_gradients: multiply the gradient at the pooled features of the box heads by 1 / number
            of stages
        score_average: what the stages' scores are averaged as: ``probabilities``, or ``logits``
            as in MMDetection
        mask_head: one mask head, trained on the regions of stage 1, or :class:`StageMaskHeads`,
            each trained on the regions of its stage
        mask_*, keypoint_*: otherwise as in Detectron2's ``StandardROIHeads``
    """

    mask_on: torch.jit.Final[bool]  # constants, so that scripting drops the branches that are off
    keypoint_on: torch.jit.Final[bool]

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[RegionPredictor],
        iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        stage_loss_weights: Sequence[float] = (1.0, 1.0, 1.0),
        scale_gradients: bool = True,
        score_average: str = "probabilities",
        proposal_append_gt: bool = True,
        mask_in_features: Sequence[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: Sequence[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
    ):
        check_per_stage(
            len(box_heads),
            box_predictors=box_predictors,
            iou_thresholds=iou_thresholds,
            stage_loss_weights=stage_loss_weights,
            **({"mask_head": mask_head} if isinstance(mask_head, StageMaskHeads) else {}),
        )
        if score_average not in SCORE_AVERAGES:
            raise UserError(
                f"score_average (MODEL.ROI_BOX_CASCADE_HEAD.SCORE_AVERAGE) is {score_average!r}; "
                f"expected one of {', '.join(SCORE_AVERAGES)}"
            )
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_append_gt=proposal_append_gt,
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictors=box_predictors,
            iou_thresholds=iou_thresholds,
            stage_loss_weights=stage_loss_weights,
            scale_gradients=scale_gradients,
            mask_in_features=mask_in_features,
            mask_pooler=mask_pooler,
            mask_head=mask_head,
            keypoint_in_features=keypoint_in_features,
            keypoint_pooler=keypoint_pooler,
            keypoint_head=keypoint_head,
        )
        self.score_average = score_average

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        arguments["stage_loss_weights"] = cascade.STAGE_LOSS_WEIGHTS
        arguments["scale_gradients"] = cascade.SCALE_GRADIENTS
        arguments["score_average"] = cascade.SCORE_AVERAGE
        return arguments

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        cascade, box_head = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_BOX_HEAD
        check_first_iou(cfg)
        check_per_stage(
            len(cascade.IOUS),
            **{
                "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": cascade.BBOX_REG_WEIGHTS,
                "MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS": cascade.STAGE_LOSS_WEIGHTS,
            },
        )
        shape = cls._pooled_shape(
            input_shape, cfg.MODEL.ROI_HEADS.IN_FEATURES, box_head.POOLER_RESOLUTION
        )
        heads = [build_box_head(cfg, shape) for _ in cascade.IOUS]
        predictors = [  # after all heads, as lazy configs draw initial weights
            RegionPredictor(
                cfg, head.output_shape, box2box_transform=box_transform(weights=weights)
            )
            for head, weights in zip(heads, cascade.BBOX_REG_WEIGHTS)
        ]
        return {
            **cls._init_box_pooler(cfg, input_shape),
            "box_heads": heads,
            "box_predictors": predictors,
            "iou_thresholds": cascade.IOUS,
        }

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        arguments = super()._init_mask_head(cfg, input_shape)
        if arguments and cfg.MODEL.ROI_MASK_HEAD.PER_STAGE:
            side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
            shape = cls._pooled_shape(input_shape, arguments["mask_in_features"], side)
            others = [build_mask_head(cfg, shape) for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[1:]]
            arguments["mask_head"] = StageMaskHeads([arguments["mask_head"], *others])
        return arguments

    # ------------------------------------------------ inference

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
    ) -> list[Instances]:
        """Return the boxes of the last stage with the mean scores of all stages."""
        levels = [features[name] for name in self.box_in_features]
        boxes = [p.proposal_boxes.tensor for p in proposals]
        sizes = [b.shape[0] for b in boxes]
        last = len(self.box_head) - 1
        scores = levels[0]
        decoded = levels[0]
        for k, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            if k > 0:
                boxes = clip_lists(decoded.split(sizes), proposals)
            logits, deltas = predictor(head(self._pool(levels, boxes)))
            if k < last:
                deltas = predictor.deltas_of(deltas, logits[:, :-1].argmax(dim=1))
            decoded = predictor.decode(deltas, torch.cat(boxes))
            stage_scores = logits if self.score_average == "logits" else predictor.scores(logits)
            scores = stage_scores if k == 0 else scores + stage_scores
        scores = scores * (1.0 / len(self.box_head))
        if self.score_average == "logits":
            scores = self.box_predictor[-1].scores(scores)
        return self._detections(decoded, scores, proposals)

    # ------------------------------------------------ training

    @torch.jit.unused
    def _region_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses, stages = self._box_losses(features, proposals, targets)
        if isinstance(getattr(self, "mask_head", None), StageMaskHeads):
            losses.update(self._mask_losses(features, proposals, targets, stages))
        else:
            losses.update(self._forward_mask(features, proposals))
        return losses

    @torch.jit.unused
    def _box_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[dict[str, Tensor], list[Regions]]:
        """Return ``loss_cls_stage<k>`` and ``loss_box_reg_stage<k>``, weighted, and the regions of
        every stage.
        """
        levels = [features[name] for name in self.box_in_features]
        ground_truth = batch.batch_ground_truth(targets)
        settings = {"pooler": self.box_pooler, "num_classes": self.num_classes}
        losses, outputs, stages = {}, [], []
        for k, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            if k == 0:
                regions, _ = batch.sampled_regions(proposals, **settings)
            else:
                boxes = self._refine(self.box_predictor[k - 1], *outputs[-1], stages[-1])
                regions, _ = batch.refined_regions(
                    boxes,
                    stages[-1],
                    ground_truth,
                    image_sizes=[p.image_size for p in proposals],
                    iou_threshold=self.iou_thresholds[k],
                    **settings,
                )
            x = batch.pool_regions(self.box_pooler, levels, regions)
            if self.scale_gradients and x.requires_grad:
                x.register_hook(lambda grad: grad * (1.0 / self.num_cascade_stages))
            logits, deltas = predictor(head(x))
            for name, loss in predictor.region_losses(logits, deltas, regions).items():
                losses[f"{name}_stage{k}"] = loss * self.stage_loss_weights[k]
            outputs.append((logits, deltas))
            stages.append(regions)
        log_statistics([logits for logits, _ in outputs], stages)
        return losses, stages

    @torch.no_grad()
    def _refine(
        self, predictor: RegionPredictor, logits: Tensor, deltas: Tensor, regions: Regions
    ) -> Tensor:
        """Return the boxes ``(R, 4)`` for the next stage, of these regions."""
        is_background = regions.classes == self.num_classes
        classes = torch.where(is_background, logits[:, :-1].argmax(dim=1), regions.classes)
        return predictor.decode(predictor.deltas_of(deltas, classes), regions.boxes)

    @torch.jit.unused
    def _mask_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances],
        stages: list[Regions],
    ) -> dict[str, Tensor]:
        """Return ``loss_mask_stage<k>``, weighted, of each stage's head on its own regions."""
        levels = [features[name] for name in self.mask_in_features]
        losses = {}
        for k, (head, regions) in enumerate(zip(self.mask_head, stages)):
            if k == 0:
                found, _ = select_foreground_proposals(proposals, self.num_classes)
            else:
                found = batch.foreground_instances(regions, targets)
            x = self.mask_pooler(levels, [each.proposal_boxes for each in found])
            loss = head(x, found)["loss_mask"]
            losses[f"loss_mask_stage{k}"] = loss * self.stage_loss_weights[k]
        return losses
