"""Mask2Former; importing it registers it."""

from .criterion import Mask2FormerCriterion, MaskTargets
from .mask2former import Mask2Former
from .mask_decoder import MaskDecoder, MaskDecoderLayer
from .pixel_decoder import PixelDecoder

__all__ = [
    "Mask2Former",
    "Mask2FormerCriterion",
    "MaskDecoder",
    "MaskDecoderLayer",
    "MaskTargets",
    "PixelDecoder",
]
