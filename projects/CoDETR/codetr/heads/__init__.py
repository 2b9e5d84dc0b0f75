"""Auxiliary heads, one per module."""

from .atss import ATSSHead
from .faster_rcnn import FasterRCNNHead
from .fcos import FCOSHead
from .gfl import GFLHead
from .mask_rcnn import MaskRCNNHead
from .paa import PAAHead
from .retinanet import RetinaNetHead

__all__ = [
    "HEADS",
    "ATSSHead",
    "FCOSHead",
    "FasterRCNNHead",
    "GFLHead",
    "MaskRCNNHead",
    "PAAHead",
    "RetinaNetHead",
]

# MODEL.CODETR.AUXILIARY_HEADS -> class, made as HEADS[name](cfg, channels, strides, num_classes)
HEADS = {
    "faster_rcnn": FasterRCNNHead,
    "atss": ATSSHead,
    "fcos": FCOSHead,
    "gfl": GFLHead,
    "mask_rcnn": MaskRCNNHead,
    "paa": PAAHead,
    "retinanet": RetinaNetHead,
}
