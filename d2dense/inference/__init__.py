"""Predict on arrays, files, folders and videos; draw the results and write them."""

from .coco_json import CocoResults, to_coco
from .predictor import Predictor
from .selection import class_indices, select
from .sources import Source, expand, frames
from .visualize import draw

__all__ = [
    "CocoResults",
    "Predictor",
    "Source",
    "class_indices",
    "draw",
    "expand",
    "frames",
    "select",
    "to_coco",
]
