"""FSCascade: Cascade R-CNN with feature sharing between stages; importing it registers
``FSCascadeROIHeads``.
"""

from . import backbone  # noqa: F401  registers the small backbone
from .config import add_fscascade_config
from .predictor import StagePredictor, box_transform
from .roi_heads import FSCascadeROIHeads
from .sharing import ClassificationHeads, LocalizationHead

__all__ = [
    "ClassificationHeads",
    "FSCascadeROIHeads",
    "LocalizationHead",
    "StagePredictor",
    "add_fscascade_config",
    "box_transform",
]
