"""Untrained detectors whose work does not depend on their random weights."""

from __future__ import annotations

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn
from torchvision import ops
from torchvision.models.detection import faster_rcnn, retinanet, rpn

__all__ = ["fix_work"]

_SCALE = 0.4  # of a frozen norm: the residual sums of an untrained network explode with 1
_SOFTMAX = (3.0, 0.0)  # logits of the first and the other classes: 0.2 and 0.01 of 80 classes
_SIGMOID = (-1.0, -6.0)  # 0.27 and 0.002


@torch.no_grad()
def fix_work(model: nn.Module) -> None:
    """Give the last layers of detectors weights with which all do the same, in place.

    Boxes stay where their anchors are, so first stages propose as many regions as they may. Every
    region, and every anchor of a one-stage detector, belongs to one class with a score above the
    usual threshold of 0.05: the suppression of duplicates gets as many boxes as it may, and as many
    detections as allowed stay. Scores of regions' first stage remain random. Transformers stay as
    they are: they return the same number anyway. Detectron2's models and torchvision's are treated
    alike.
    """
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, ops.FrozenBatchNorm2d)):
            module.weight.fill_(_SCALE)
        elif isinstance(module, StandardRPNHead):
            _zero(module.anchor_deltas)
        elif isinstance(module, rpn.RPNHead):
            _zero(module.bbox_pred)
        elif isinstance(module, FastRCNNOutputLayers):
            _zero(module.bbox_pred)
            _one_class(module.cls_score, 0, module.cls_score.out_features, _SOFTMAX)
        elif isinstance(module, faster_rcnn.FastRCNNPredictor):
            _zero(module.bbox_pred)  # class 0 is the background
            _one_class(module.cls_score, 1, module.cls_score.out_features, _SOFTMAX)
        elif isinstance(module, RetinaNetHead):
            _zero(module.bbox_pred)
            anchors = module.bbox_pred.out_channels // 4
            _one_class(module.cls_score, 0, module.cls_score.out_channels // anchors, _SIGMOID)
        elif isinstance(module, retinanet.RetinaNetRegressionHead):
            _zero(module.bbox_reg)
        elif isinstance(module, retinanet.RetinaNetClassificationHead):
            _one_class(module.cls_logits, 0, module.num_classes, _SIGMOID)


def _zero(layer: nn.Module) -> None:
    layer.weight.zero_()
    layer.bias.zero_()


def _one_class(layer: nn.Module, chosen: int, classes: int, logits: tuple[float, float]) -> None:
    """Let a layer say the same of everything; its outputs are classes, or anchors times classes."""
    high, low = logits
    layer.weight.zero_()
    bias = layer.bias.view(-1, classes)
    bias.fill_(low)
    bias[:, chosen] = high
