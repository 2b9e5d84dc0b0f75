"""Evaluation of any registered test set: boxes, masks, semantic label maps."""

from .coco import COCOEvaluator
from .factory import build_evaluator
from .loop import evaluate, flatten, write_results

__all__ = ["COCOEvaluator", "build_evaluator", "evaluate", "flatten", "write_results"]
