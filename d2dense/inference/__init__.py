"""Predict on arrays, files, folders and videos; draw the results and write them."""

from .coco_json import CocoResults, to_coco
from .predictor import Predictor
from .saved import annotated, read_outputs
from .selection import best_classes, class_indices, select
from .sources import Source, expand, frames
from .visualize import draw

__all__ = [
    "CocoResults",
    "Predictor",
    "Source",
    "annotated",
    "best_classes",
    "class_indices",
    "draw",
    "expand",
    "frames",
    "read_outputs",
    "select",
    "to_coco",
]
