"""Predicted instances as plain records that any COCO-style evaluation reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import Instances

from d2dense.errors import UserError

__all__ = ["check_classes", "detections", "encode_masks"]


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Compress masks (N, H, W), True inside, to N COCO run-length codes with text counts."""
    if not len(masks):
        return []
    codes = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]


def check_classes(instances: Instances, *, num_classes: int, dataset_name: str) -> None:
    """Raise a :class:`UserError` if a predicted class is not one of ``num_classes``."""
    classes = instances.pred_classes
    if not len(classes):
        return
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"the model predicts class {high if high >= num_classes else low}, but the dataset "
            f"{dataset_name!r} has {num_classes} classes (0 to {num_classes - 1}); set the model's "
            f"number of classes to {num_classes} or test on the dataset that it was trained for"
        )


def detections(instances: Instances) -> list[dict[str, Any]]:
    """Return one dict per instance: ``class`` (contiguous), ``score``, ``bbox`` (absolute x, y, w,
    h) and, where the model predicts masks, ``segmentation``.

    Args:
        instances: R predictions of one image on the CPU with ``pred_boxes`` (R, 4) absolute xyxy,
            ``scores`` (R,), ``pred_classes`` (R,) and maybe boolean ``pred_masks`` (R, H, W) at the
            image's original size.
    """
    boxes = instances.pred_boxes.tensor.double().numpy().copy()
    boxes[:, 2:] -= boxes[:, :2]
    records = [
        {"class": label, "score": score, "bbox": box}
        for label, score, box in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), boxes.tolist()
        )
    ]
    if instances.has("pred_masks"):
        for record, code in zip(records, encode_masks(instances.pred_masks.numpy())):
            record["segmentation"] = code
    return records
