"""Mask2Former, for lazy configs (:func:`d2dense.config.detr.mask2former`)."""

from .criterion import Mask2FormerCriterion, MaskTargets
from .mask2former import Mask2Former, masked_instances
from .mask_decoder import MaskDecoder, MaskDecoderLayer
from .pixel_decoder import PixelDecoder

__all__ = [
    "Mask2Former",
    "Mask2FormerCriterion",
    "MaskDecoder",
    "MaskDecoderLayer",
    "MaskTargets",
    "PixelDecoder",
    "masked_instances",
]
