"""RetinaNet whose losses are divided by the positives of the batch, without host synchronisation.

Letters: N images, R anchors over all levels, K classes, A anchors per position, Hi and Wi size of
level i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from d2dense.errors import UserError

from .box_regression import check_box_loss, masked_box_loss
from .matcher import AnchorMatcher

__all__ = ["LOSS_NORMALIZERS", "BatchRetinaNet"]

LOSS_NORMALIZERS = ("positives", "running_average")
_LOG_PERIOD = 20  # iterations between two readings of the number of positives from the device


@META_ARCH_REGISTRY.register()
class BatchRetinaNet(RetinaNet):
    """Detectron2's ``RetinaNet`` with a choice of what its losses are divided by.

    With ``loss_normalizer="running_average"`` the losses are Detectron2's. Inference, parameter
    names and initialisation are Detectron2's always.

    Args:
        backbone: its feature maps are the levels, finest first
        head: ``[(N, C, Hi, Wi)] -> [(N, A K, Hi, Wi)], [(N, A 4, Hi, Wi)]``
        anchor_generator: anchors of the levels
        box2box_transform: box coder; losses are on its raw deltas
        anchor_matcher: labels anchors, see :class:`AnchorMatcher`
        num_classes: K
        head_in_features: names of the levels; None: all of the backbone's
        focal_loss_alpha, focal_loss_gamma: of the focal loss
        smooth_l1_beta, box_reg_loss_type: of the box loss; beta 0 is L1
        loss_normalizer: ``positives`` of the batch of this process, at least 1 (MMDetection's rule,
            which also adds 1 for each image without any); or ``running_average`` of that number
            over the steps, as in Detectron2
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: of
            inference; candidates are per level
        vis_period: draw predictions in training every so many steps; 0: never
        pixel_mean, pixel_std: per channel, in the order of ``input_format``
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Callable[[Tensor], tuple[Tensor, Tensor]],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        head_in_features: Sequence[str] | None = None,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_normalizer: str = "positives",
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        if loss_normalizer not in LOSS_NORMALIZERS:
            raise UserError(
                f"loss_normalizer (MODEL.RETINANET.LOSS_NORMALIZER) is {loss_normalizer!r}; "
                f"expected one of {', '.join(LOSS_NORMALIZERS)}"
            )
        check_box_loss(box_reg_loss_type)
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=None if head_in_features is None else list(head_in_features),
            anchor_generator=anchor_generator,
            box2box_transform=box2box_transform,
            anchor_matcher=anchor_matcher,
            num_classes=num_classes,
            focal_loss_alpha=focal_loss_alpha,
            focal_loss_gamma=focal_loss_gamma,
            smooth_l1_beta=smooth_l1_beta,
            box_reg_loss_type=box_reg_loss_type,
            test_score_thresh=test_score_thresh,
            test_topk_candidates=test_topk_candidates,
            test_nms_thresh=test_nms_thresh,
            max_detections_per_image=max_detections_per_image,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            vis_period=vis_period,
            input_format=input_format,
        )
        # "loss_normalizer" is the name of Detectron2's running number, which checkpoints keep
        self.running_average = loss_normalizer == "running_average"

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        node = cfg.MODEL.RETINANET
        arguments["anchor_matcher"] = AnchorMatcher(
            thresholds=node.IOU_THRESHOLDS,
            labels=node.IOU_LABELS,
            low_quality_matches=node.LOW_QUALITY_MATCHES,
        )
        arguments["loss_normalizer"] = node.LOSS_NORMALIZER
        return arguments

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_box_reg``.

        Args:
            anchors: one ``Boxes`` per level
            pred_logits: per level ``(N, Hi Wi A, K)``
            gt_labels: per image ``(R,)`` in ``[-1, K]``; -1 is ignored, K background
            pred_anchor_deltas: per level ``(N, Hi Wi A, 4)``
            gt_boxes: per image ``(R, 4)``, meaningful where foreground
        """
        labels = torch.stack(gt_labels)  # (N, R)
        foreground = (labels >= 0) & (labels < self.num_classes)
        num_positives = foreground.sum()
        _log_positives(num_positives, len(gt_labels))
        normalizer = self._normalizer(num_positives)
        loss_cls = self._class_loss(torch.cat(pred_logits, dim=1), labels)
        loss_box = masked_box_loss(
            torch.cat(pred_anchor_deltas, dim=1),
            Boxes.cat(anchors).tensor,
            torch.stack(gt_boxes),
            foreground,
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return {
            "loss_cls": loss_cls / normalizer.to(loss_cls),
            "loss_box_reg": loss_box / normalizer.to(loss_box),
        }

    def _normalizer(self, num_positives: Tensor) -> Tensor:
        number = num_positives.clamp(min=1)
        if self.running_average:  # double, the precision of Detectron2's Python number
            number = self._ema_update("loss_normalizer", number.double(), 100)
        return number

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the focal losses of logits ``(N, R, K)`` with labels ``(N, R)``."""
        classes = torch.arange(self.num_classes, device=labels.device)
        target = (labels[..., None] == classes).to(logits.dtype)
        loss = sigmoid_focal_loss(
            logits, target, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return (loss.sum(dim=-1) * (labels >= 0)).sum()

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return per image the labels ``(R,)`` and matched boxes ``(R, 4)`` of all anchors, as
        :meth:`losses` takes them.
        """
        every = Boxes.cat(anchors)
        labels, boxes = [], []
        for target in gt_instances:
            matches, kinds = self.anchor_matcher(pairwise_iou(target.gt_boxes, every))
            if len(target) == 0:
                labels.append(torch.full_like(matches, self.num_classes))
                boxes.append(torch.zeros_like(every.tensor))
                continue
            classes = target.gt_classes[matches]
            classes = classes.masked_fill(kinds == 0, self.num_classes)
            labels.append(classes.masked_fill(kinds == -1, -1))
            boxes.append(target.gt_boxes.tensor[matches])
        return labels, boxes


def _log_positives(num_positives: Tensor, num_images: int) -> None:
    if not has_event_storage():
        return
    storage = get_event_storage()
    if storage.iter % _LOG_PERIOD == 0:
        storage.put_scalar("num_pos_anchors", num_positives.item() / num_images)
