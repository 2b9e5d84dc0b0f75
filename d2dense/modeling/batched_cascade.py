"""What cascades that work on the regions of the whole batch have in common, trained or scripted.

Letters: N images, R regions over all images, K foreground classes, C channels, S pooled side.
"""

# No postponed annotations here: TorchScript reads the Final ones of the class as objects.
from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .regions import pool_lists

__all__ = ["BatchedCascadeROIHeads"]


class BatchedCascadeROIHeads(StandardROIHeads):
    """Base of cascades: a subclass has ``_forward_box`` (inference) and ``_region_losses``, and to
    be scripted ``mask_on`` and ``keypoint_on`` as Final attributes: TorchScript reads the
    annotations of one class only.

    Args:
        num_classes, batch_size_per_image, positive_fraction, proposal_append_gt: as in Detectron2's
            ``ROIHeads``
        box_in_features: names of the pyramid levels that boxes are pooled from
        box_pooler: pools ``(R, C, S, S)``
        box_head: the box heads of all stages
        box_predictors: one per stage
        iou_thresholds: foreground IoU of each stage
        stage_loss_weights: factor of the losses of each stage
        scale_gradients: multiply the gradient at the pooled features by 1 / number of stages
        mask_*, keypoint_*: as in Detectron2's ``StandardROIHeads``
    """

    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_append_gt: bool,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictors: Sequence[nn.Module],
        iou_thresholds: Sequence[float],
        stage_loss_weights: Sequence[float],
        scale_gradients: bool,
        mask_in_features: Sequence[str] | None,
        mask_pooler: ROIPooler | None,
        mask_head: nn.Module | None,
        keypoint_in_features: Sequence[str] | None,
        keypoint_pooler: ROIPooler | None,
        keypoint_head: nn.Module | None,
    ):
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=Matcher([iou_thresholds[0]], [0, 1], allow_low_quality_matches=False),
            proposal_append_gt=proposal_append_gt,
            box_in_features=list(box_in_features),
            box_pooler=box_pooler,
            box_head=box_head,
            box_predictor=nn.ModuleList(box_predictors),
            mask_in_features=_listed(mask_in_features),
            mask_pooler=mask_pooler,
            mask_head=mask_head,
            keypoint_in_features=_listed(keypoint_in_features),
            keypoint_pooler=keypoint_pooler,
            keypoint_head=keypoint_head,
        )
        self.num_cascade_stages = len(box_predictors)
        self.iou_thresholds = tuple(iou_thresholds)
        self.stage_loss_weights = tuple(stage_loss_weights)
        self.scale_gradients = scale_gradients

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        del arguments["proposal_matcher"], arguments["train_on_pred_boxes"]
        return arguments

    @classmethod
    def _init_box_pooler(cls, cfg, input_shape):
        in_features, box_head = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD
        return {
            "box_in_features": in_features,
            "box_pooler": ROIPooler(
                output_size=box_head.POOLER_RESOLUTION,
                scales=tuple(1.0 / input_shape[name].stride for name in in_features),
                sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
                pooler_type=box_head.POOLER_TYPE,
            ),
        }

    @staticmethod
    def _pooled_shape(input_shape, in_features: Sequence[str], side: int) -> ShapeSpec:
        """Return the shape of what is pooled from maps of one width to ``side`` x ``side``."""
        channels = input_shape[in_features[0]].channels
        return ShapeSpec(channels=channels, height=side, width=side)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As Detectron2's ``ROIHeads.forward``: in training (proposals, losses), else (detections,
        {}).

        Args:
            features: ``(N, C, Hi, Wi)`` by name
            proposals: per image, with ``proposal_boxes`` and ``objectness_logits``
            targets: in training the ground truth per image
        """
        if self.training:
            return self._forward_train(features, proposals, targets)
        detections = self._forward_box(features, proposals)
        return self.forward_with_given_boxes(features, detections), {}

    @torch.jit.unused
    def _forward_train(self, features, proposals, targets):
        if not targets:
            raise ValueError("training needs ground truth: the batch has no 'instances'")
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._region_losses(features, proposals, targets)
        losses.update(self._forward_keypoint(features, proposals))
        return proposals, losses

    @torch.jit.unused
    def _region_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the weighted losses of boxes and masks, given the sampled proposals of stage 1."""
        raise NotImplementedError

    def _pool(self, levels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        if torch.jit.is_scripting():
            return self.box_pooler(levels, [Boxes(b) for b in boxes])
        if torch.jit.is_tracing():
            return self.box_pooler(levels, [Boxes(b) for b in boxes])
        return pool_lists(self.box_pooler, levels, boxes)

    def _detections(
        self, boxes: Tensor, probs: Tensor, proposals: list[Instances]
    ) -> list[Instances]:
        """Return what stays of boxes ``(R, 4)`` or ``(R, K * 4)`` and probabilities ``(R, K + 1)``,
        image after image, by the limits of the last stage's predictor.
        """
        sizes = [p.proposal_boxes.tensor.shape[0] for p in proposals]
        predictor = self.box_predictor[-1]
        detections, _ = fast_rcnn_inference(
            boxes.split(sizes),
            probs.split(sizes),
            [p.image_size for p in proposals],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return detections


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)
