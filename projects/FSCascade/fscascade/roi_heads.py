"""Cascade R-CNN heads with feature sharing between stages; with sharing off, plain Cascade R-CNN.

Letters: N images, n stages, R regions over all images, K foreground classes, C channels, S pooled
    side, D class feature.
"""

# No postponed annotations here: TorchScript reads the Final ones of the class as objects.
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, build_box_head
from detectron2.structures import Instances
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.modeling import BatchedCascadeROIHeads, check_per_stage
from d2dense.modeling.regions import clip_lists

from .config import check_config
from .predictor import StagePredictor, box_transform
from .sharing import ClassificationHeads, LocalizationHead
from .training import box_losses

__all__ = ["FSCascadeROIHeads", "test_score_modes"]


def test_score_modes(num_stages: int) -> list[str]:
    """Return the values of TEST_SCORES for a cascade of ``num_stages`` stages."""
    stages = [f"stage{k + 1}" for k in range(num_stages)]
    return ["last", *stages, "ensemble_last_rois", "ensemble_own_rois"]


@ROI_HEADS_REGISTRY.register()
class FSCascadeROIHeads(BatchedCascadeROIHeads):
    """Cascade of box heads with shared classification (CFS) and localisation (LFS) features, and
    optional mask branch.

    Each stage pools a feature from the boxes that it receives, classifies it, refines its boxes,
    and hands the clipped and detached boxes on. With ``cfs=False`` and ``loc_head=None`` it
    computes what Detectron2's ``CascadeROIHeads`` does, under the same parameter names.
    Detectron2's mask and keypoint branches are unchanged: trained on the sampled proposals of stage
    1, applied to the final boxes.

    Args:
        num_classes, batch_size_per_image, positive_fraction, proposal_append_gt: as in Detectron2's
            ``ROIHeads``
        box_in_features: names of the pyramid levels that boxes are pooled from
        box_pooler: pools ``(R, C, S, S)``
        box_heads: one fc head per stage, ``(R, C, S, S) -> (R, D)``
        box_predictors: one :class:`StagePredictor` per stage
        iou_thresholds: foreground IoU of each stage
        cfs: share classification features between stages
        loc_head: convolutional localisation features, shared or not; None: the fc feature also
            predicts boxes
        stage_loss_weights: factor of the class and box losses of each stage
        scale_gradients: multiply the gradient at the pooled features by 1 / n (Detectron2 does,
            with all loss weights 1)
        test_scores: whose scores and boxes are the result: ``last`` stage; ``stage<k>``, where the
            cascade stops after stage k; ``ensemble_last_rois``: boxes of the last stage, mean of
            all stages' probabilities on the last stage's regions; ``ensemble_own_rois``: the same
            with each stage's probabilities on its own regions
        mask_*, keypoint_*: as in Detectron2's ``StandardROIHeads``
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
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_heads: list[nn.Module],
        box_predictors: list[nn.Module],
        iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        cfs: bool = True,
        loc_head: LocalizationHead | None = None,
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        scale_gradients: bool = False,
        test_scores: str = "last",
        proposal_append_gt: bool = True,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: list[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
    ):
        check_per_stage(
            len(box_heads),
            box_predictors=box_predictors,
            iou_thresholds=iou_thresholds,
            stage_loss_weights=stage_loss_weights,
            **({} if loc_head is None else {"loc_head": loc_head}),
        )
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_append_gt=proposal_append_gt,
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=ClassificationHeads(box_heads, sharing=cfs),
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
        self.loc_head = loc_head
        self.test_scores = "last"
        self.set_test_scores(test_scores)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        node = cfg.MODEL.FSCASCADE
        arguments["cfs"] = node.CFS
        arguments["stage_loss_weights"] = node.STAGE_LOSS_WEIGHTS
        arguments["scale_gradients"] = node.SCALE_GRADIENTS
        arguments["test_scores"] = node.TEST_SCORES
        return arguments

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        node, side = cfg.MODEL.FSCASCADE, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_config(cfg)
        pooled_shape = cls._pooled_shape(input_shape, in_features, side)
        conv_head = node.LFS or node.CONV_HEAD
        heads = [build_box_head(cfg, pooled_shape) for _ in cascade.IOUS]
        predictors = [
            StagePredictor(
                cfg,
                head.output_shape,
                box2box_transform=box_transform(weights=weights),
                box_input_shape=pooled_shape if conv_head else None,
            )
            for head, weights in zip(heads, cascade.BBOX_REG_WEIGHTS)
        ]
        loc_head = None
        if conv_head:
            loc_head = LocalizationHead(
                channels=pooled_shape.channels,
                num_stages=len(heads),
                sharing=node.LFS,
                mode=node.LFS_MODE,
                relu_after_1x1=node.LFS_RELU_AFTER_1X1,
            )
        return {
            **cls._init_box_pooler(cfg, input_shape),
            "box_heads": heads,
            "box_predictors": predictors,
            "loc_head": loc_head,
            "iou_thresholds": cascade.IOUS,
        }

    def set_test_scores(self, mode: str) -> None:
        """Choose whose scores and boxes are the result, see the class; takes effect from the next
        image on.
        """
        modes = test_score_modes(self.num_cascade_stages)
        if mode not in modes:
            raise UserError(
                f"MODEL.FSCASCADE.TEST_SCORES is {mode!r}; expected one of {', '.join(modes)}"
            )
        self.test_scores = mode

    @torch.jit.unused
    def _region_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = box_losses(self, features, proposals, targets)
        losses.update(self._forward_mask(features, proposals))
        return losses

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
    ) -> list[Instances]:
        """Return the detections of the stage, or the ensemble, that ``test_scores`` names."""
        final = self._final_stage()
        keep_all = self.test_scores == "ensemble_own_rois"
        pooled, own, boxes = self._run_stages(features, proposals, final, keep_all)
        if keep_all:
            class_features = self.box_head(pooled, own)
            probs = self._mean_probs(class_features)
        elif self.test_scores == "ensemble_last_rois":
            class_features = self.box_head.cumulative(pooled[-1], final, own)
            probs = self._mean_probs(class_features)
        else:
            probs = self._probs(self.box_head.at(pooled[-1], final, own), final)
        return self._detections(boxes[-1], probs, proposals)

    @torch.jit.unused
    def detect_all_stages(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
    ) -> dict[str, list[Instances]]:
        """Return the detections of every mode except ``last`` (which is the last ``stage<k>``) from
        one pass.
        """
        final = self.num_cascade_stages - 1
        pooled, own, boxes = self._run_stages(features, proposals, final, True)
        class_features = self.box_head(pooled, own)
        results = {
            f"stage{k + 1}": self._detections(boxes[k], self._probs(feature, k), proposals)
            for k, feature in enumerate(class_features)
        }
        on_last = self.box_head.cumulative(pooled[-1], final, own)
        for name, features_of_stages in (
            ("ensemble_last_rois", on_last),
            ("ensemble_own_rois", class_features),
        ):
            probs = self._mean_probs(features_of_stages)
            results[name] = self._detections(boxes[-1], probs, proposals)
        return results

    def _final_stage(self) -> int:
        if self.test_scores.startswith("stage"):
            return int(self.test_scores[5:]) - 1
        return self.num_cascade_stages - 1

    def _run_stages(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        final: int,
        keep_all: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run stages 0..final; the lists hold every stage if ``keep_all``, else the final one.

        Returns:
            pooled features ``(R, C, S, S)``; fc features ``(R, D)`` (empty list when a conv head
            predicts the boxes); and predicted boxes ``(R, 4)`` before clipping, the regions of all
            images one after another.
        """
        levels = [features[name] for name in self.box_in_features]
        boxes = [p.proposal_boxes.tensor for p in proposals]
        sizes = [b.shape[0] for b in boxes]
        pooled: list[Tensor] = []
        own: list[Tensor] = []
        predicted: list[Tensor] = []
        box_feature = levels[0]
        for k, predictor in enumerate(self.box_predictor):
            if k <= final:
                if k > 0:
                    boxes = clip_lists(predicted[-1].split(sizes), proposals)
                x = self._pool(levels, boxes)
                if not keep_all:
                    pooled, own, predicted = [], [], []
                pooled.append(x)
                if self.loc_head is not None:
                    box_feature = self.loc_head(x, k, box_feature if k > 0 else x)
                else:
                    box_feature = self.box_head.own(x, k)
                    own.append(box_feature)
                predicted.append(predictor.decode(predictor.deltas(box_feature), torch.cat(boxes)))
        return pooled, own, predicted

    def _probs(self, class_feature: Tensor, stage: int) -> Tensor:
        probs = class_feature
        for k, predictor in enumerate(self.box_predictor):
            if k == stage:
                probs = predictor.probs(class_feature)
        return probs

    def _mean_probs(self, class_features: list[Tensor]) -> Tensor:
        total = self._probs(class_features[0], 0)
        for k in range(1, len(class_features)):
            total = total + self._probs(class_features[k], k)
        return total * (1.0 / len(class_features))
