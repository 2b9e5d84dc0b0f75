"""Evaluation of any registered test set: boxes, masks, semantic label maps."""

from .cityscapes import CityscapesInstanceEvaluator
from .cityscapes_sem_seg import CityscapesSemSegEvaluator
from .coco import COCOEvaluator
from .factory import build_evaluator
from .loop import evaluate, flatten, write_results
from .lvis import LVISEvaluator
from .sem_seg import SemSegEvaluator

__all__ = [
    "COCOEvaluator",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "LVISEvaluator",
    "SemSegEvaluator",
    "build_evaluator",
    "evaluate",
    "flatten",
    "write_results",
]
