"""Optimizer groups, gradient clipping and learning-rate schedules."""

from .optim import CLIP_TYPES, GradientClipper, is_norm, param_groups
from .schedule import CosineAfterWarmup, LRSchedule, PolyParamScheduler

__all__ = [
    "CLIP_TYPES",
    "CosineAfterWarmup",
    "GradientClipper",
    "LRSchedule",
    "PolyParamScheduler",
    "is_norm",
    "param_groups",
]
