"""Average precision in COCO's sense, from detections or from a table of precisions.

Letters: T IoU thresholds, R recall levels, K classes, A object sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from d2dense.evaluation.base import require

__all__ = ["IOU_THRESHOLDS", "coco_precision", "mean_precision", "precision_metrics"]

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def coco_precision(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], *, task: str, max_dets: int
) -> np.ndarray:
    """Return interpolated precisions (T, R, K, A), -1 where there is no ground truth.

    Args:
        ground_truth: dict in COCO's layout; it becomes property of the evaluation.
        detections: dicts with ``image_id``, ``category_id``, ``score``, ``bbox`` (x, y, w, h) and,
            for masks, ``segmentation``, under the ids of ``ground_truth``; may be empty.
        task: "bbox" or "segm".
        max_dets: per image and class, only this many of the highest scores count.
    """
    api = require("faster_coco_eval", "COCO evaluation", "pip install faster-coco-eval")
    found = [{**d, "id": i + 1, "iscrowd": 0} for i, d in enumerate(detections)]
    for detection in found:
        # The size class of a detection is that of its mask where masks are compared.
        if task == "segm":
            detection["area"] = float(mask_util.area(detection["segmentation"]))
        else:
            detection["area"] = detection["bbox"][2] * detection["bbox"][3]
            detection.pop("segmentation", None)
    evaluation = api.COCOeval_faster(
        api.COCO(ground_truth),
        api.COCO({**ground_truth, "annotations": found}),
        iouType=task,
        print_function=lambda *args, **kwargs: None,
    )
    evaluation.params.maxDets = [max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., -1]


def mean_precision(precision: np.ndarray) -> float:
    """Mean of the defined entries in percent; NaN if there is none."""
    defined = precision[precision > -1]
    return float(100 * defined.mean()) if defined.size else float("nan")


def precision_metrics(
    precision: np.ndarray, class_names: Sequence[str], *, per_class: bool
) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl, "AP@0.50" to "AP@0.95" and, per class, "AP-<name>".

    Args:
        precision: (T, R, K, A) as from :func:`coco_precision`, sizes all, small, medium, large.
    """
    metrics = {
        "AP": mean_precision(precision[..., 0]),
        "AP50": mean_precision(precision[0, :, :, 0]),
        "AP75": mean_precision(precision[5, :, :, 0]),
    }
    for size, letter in enumerate("sml", start=1):
        metrics[f"AP{letter}"] = mean_precision(precision[..., size])
    for t, threshold in enumerate(IOU_THRESHOLDS):
        metrics[f"AP@{threshold:.2f}"] = mean_precision(precision[t, :, :, 0])
    if per_class:
        for k, name in enumerate(class_names):
            metrics[f"AP-{name}"] = mean_precision(precision[:, :, k, 0])
    return metrics
