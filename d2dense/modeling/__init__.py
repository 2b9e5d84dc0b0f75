"""Modules of models that the projects share; importing it registers them."""

from . import pretraining, timm_pyramids  # noqa: F401  register sources and backbones
from .batched_cascade import BatchedCascadeROIHeads
from .box_regression import (
    BOX_LOSSES,
    box_losses,
    box_transform,
    check_box_loss,
    encode,
    giou_loss,
    masked_box_loss,
)
from .cascade import (
    SCORE_AVERAGES,
    FlexibleCascadeROIHeads,
    StageMaskHeads,
    check_first_iou,
    check_per_stage,
)
from .classification import CLASSIFIER_REGISTRY, ImageClassifier, timm_classifier
from .detr import DeformableDETR
from .late_stride_resnet import LateStrideResNet
from .matcher import LOW_QUALITY_MATCHES, AnchorMatcher
from .multi_scale import MultiScaleDetector
from .region_predictor import RegionPredictor
from .retinanet import LOSS_NORMALIZERS, BatchRetinaNet
from .segmenter import Segmenter
from .semantic_inference import SemanticInference
from .swin import Swin
from .timm_backbone import TimmBackbone
from .upernet import PyramidPooling, UperNetHead
from .vit import EVA02ViT
from .vitdet import ViTDet

__all__ = [
    "BOX_LOSSES",
    "CLASSIFIER_REGISTRY",
    "LOSS_NORMALIZERS",
    "LOW_QUALITY_MATCHES",
    "SCORE_AVERAGES",
    "AnchorMatcher",
    "BatchRetinaNet",
    "BatchedCascadeROIHeads",
    "DeformableDETR",
    "EVA02ViT",
    "FlexibleCascadeROIHeads",
    "ImageClassifier",
    "LateStrideResNet",
    "MultiScaleDetector",
    "PyramidPooling",
    "RegionPredictor",
    "Segmenter",
    "SemanticInference",
    "StageMaskHeads",
    "Swin",
    "TimmBackbone",
    "UperNetHead",
    "ViTDet",
    "box_losses",
    "box_transform",
    "check_box_loss",
    "check_first_iou",
    "check_per_stage",
    "encode",
    "giou_loss",
    "masked_box_loss",
    "timm_classifier",
]
