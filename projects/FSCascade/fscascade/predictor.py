"""Class and box layers of one cascade stage, fed by two different features.

Letters: R regions over all images, K foreground classes, D size of the class feature, C channels, S
side of the pooled map.
"""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.modeling import RegionPredictor, box_transform

__all__ = ["BOX_PREDICTORS", "StagePredictor", "box_transform"]

BOX_PREDICTORS = ("flatten", "avgpool")


class StagePredictor(RegionPredictor):
    """``cls_score`` on the class feature and ``bbox_pred`` on the box feature.

    Without ``box_input_shape`` both layers read the same feature, and the module is Detectron2's
    own output layer with the same parameters. Losses need no host synchronisation.

    Args:
        input_shape: shape of the class feature, ``ShapeSpec(channels=D)``
        box_input_shape: shape of the convolutional box feature, or None when the class feature
            serves both
        box_predictor: ``flatten`` keeps the spatial layout of the box feature; ``avgpool`` averages
            it away
        box2box_transform, num_classes and the rest: as in Detectron2's ``FastRCNNOutputLayers``
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        box_input_shape: ShapeSpec | None = None,
        box_predictor: str = "flatten",
        test_score_thresh: float = 0.05,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = True,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights=None,
        fed_loss_num_classes: int = 50,
    ):
        if box_predictor not in BOX_PREDICTORS:
            expected = ", ".join(BOX_PREDICTORS)
            raise UserError(f"BOX_PREDICTOR is {box_predictor!r}; expected one of {expected}")
        super().__init__(
            input_shape,
            box2box_transform=box2box_transform,
            num_classes=num_classes,
            test_score_thresh=test_score_thresh,
            test_nms_thresh=test_nms_thresh,
            test_topk_per_image=test_topk_per_image,
            cls_agnostic_bbox_reg=cls_agnostic_bbox_reg,
            smooth_l1_beta=smooth_l1_beta,
            box_reg_loss_type=box_reg_loss_type,
            loss_weight=loss_weight,
            use_fed_loss=use_fed_loss,
            use_sigmoid_ce=use_sigmoid_ce,
            get_fed_loss_cls_weights=get_fed_loss_cls_weights,
            fed_loss_num_classes=fed_loss_num_classes,
        )
        self.average = box_input_shape is not None and box_predictor == "avgpool"
        if box_input_shape is not None:
            size = box_input_shape.channels
            if not self.average:
                size *= box_input_shape.height * box_input_shape.width
            outputs = self.bbox_pred.out_features
            self.bbox_pred: nn.Linear = nn.Linear(size, outputs)
            nn.init.normal_(self.bbox_pred.weight, std=0.001)
            nn.init.zeros_(self.bbox_pred.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        arguments["box_predictor"] = cfg.MODEL.FSCASCADE.BOX_PREDICTOR
        return arguments

    def deltas(self, box_feature: Tensor) -> Tensor:
        """Return the box deltas ``(R, 4)`` (``(R, 4 K)`` if class-specific) of a feature ``(R, D)``
        or ``(R, C, S, S)``.
        """
        if self.average:
            box_feature = box_feature.mean(dim=(2, 3))
        return self.bbox_pred(torch.flatten(box_feature, start_dim=1))

    def logits(self, class_feature: Tensor) -> Tensor:
        """Return class logits ``(R, K + 1)``, background last."""
        return self.cls_score(torch.flatten(class_feature, start_dim=1))

    def forward(self, class_feature: Tensor, box_feature: Tensor | None = None):
        """Return logits and deltas; one argument serves both, as in Detectron2."""
        if box_feature is None:
            box_feature = class_feature
        return self.logits(class_feature), self.deltas(box_feature)

    def probs(self, class_feature: Tensor) -> Tensor:
        """Return class probabilities ``(R, K + 1)``."""
        return self.scores(self.logits(class_feature))
