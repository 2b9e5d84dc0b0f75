"""Detection quality score (appendix B of the CEDNet paper) and ranking of images by it.

Every object takes the detection that overlaps it most: ``q = IoU * score``, 0 if none overlaps. An
image's score is the mean of q over its objects. Not stated in the paper and fixed here: only
detections of the object's class count (an option lets all count), crowds are no objects, and of
detections with the same IoU the most confident one is taken.

Letters: D detections, G objects of an image. Boxes are xyxy in pixels of the original image.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from torch import nn
from torchvision.ops import box_iou

from d2dense.errors import UserError
from d2dense.evaluation import saved_results
from d2dense.evaluation.base import image_key

__all__ = [
    "Comparison",
    "Detections",
    "Objects",
    "Qualities",
    "compare",
    "detect",
    "object_qualities",
    "read_predictions",
]


@dataclass(frozen=True)
class Objects:
    """Annotated objects of an image: ``boxes`` (G, 4) and ``classes`` (G,)."""

    boxes: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Objects:
        """Return the objects of a dataset record, without crowds."""
        kept = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
        classes = np.array([a["category_id"] for a in kept], dtype=np.int64)
        return cls(_boxes(boxes), classes)


@dataclass(frozen=True)
class Detections:
    """Detections of an image: ``boxes`` (D, 4), ``scores`` (D,) and ``classes`` (D,)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    @classmethod
    def none(cls) -> Detections:
        return cls(_boxes([]), np.zeros(0), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Qualities:
    """What each object of an image got.

    Attributes:
        detection: ``(G,)`` index of the detection, -1 for none
        iou: ``(G,)``, 0 for none
        score: ``(G,)`` confidence, 0 for none
    """

    detection: np.ndarray
    iou: np.ndarray
    score: np.ndarray

    @property
    def image_score(self) -> float:
        """Mean of ``IoU * score``; NaN without objects."""
        q = self.iou * self.score
        return float(q.mean()) if len(q) else math.nan


def object_qualities(objects: Objects, found: Detections, *, any_class: bool = False) -> Qualities:
    """Give every object the detection that overlaps it most.

    Args:
        any_class: also detections of other classes than the object's count.
    """
    if not len(objects.boxes) or not len(found.boxes):
        nothing = np.zeros(len(objects.boxes))
        return Qualities(np.full(len(objects.boxes), -1), nothing, nothing)
    order = np.argsort(-found.scores, kind="stable")  # the first of equal IoUs is then the best
    iou = box_iou(torch.from_numpy(objects.boxes), torch.from_numpy(found.boxes[order])).numpy()
    iou = np.nan_to_num(iou)  # two boxes without area
    if not any_class:
        iou = np.where(objects.classes[:, None] == found.classes[order], iou, 0.0)
    chosen = iou.argmax(axis=1)
    best = iou.max(axis=1)
    overlaps = best > 0
    detection = np.where(overlaps, order[chosen], -1)
    return Qualities(detection, best, np.where(overlaps, found.scores[order[chosen]], 0.0))


@dataclass(frozen=True)
class Comparison:
    """Scores of one image by a model and a baseline.

    Attributes:
        record: the image in the dataset
        objects: how many it has
        model, baseline: image scores
        rank: from 1 on, by difference
    """

    record: Mapping[str, Any]
    objects: int
    model: float
    baseline: float
    rank: int

    @property
    def difference(self) -> float:
        return self.model - self.baseline


def compare(
    records: Iterable[Mapping[str, Any]],
    model: Mapping[Hashable, Detections],
    baseline: Mapping[Hashable, Detections],
    *,
    any_class: bool = False,
) -> list[Comparison]:
    """Score every image by both and sort by how much the model is better; equal differences stay in
    the order of ``records``. Images without objects are left out.

    Args:
        model, baseline: detections by image, as :func:`detect` and :func:`read_predictions`
            return; an image that is not there has none.
    """
    rows: list[tuple[Mapping[str, Any], int, float, float]] = []
    for record in records:
        objects = Objects.of(record)
        if not len(objects.boxes):
            continue
        key = image_key(record)
        ours, theirs = (
            object_qualities(
                objects, found.get(key, Detections.none()), any_class=any_class
            ).image_score
            for found in (model, baseline)
        )
        rows.append((record, len(objects.boxes), ours, theirs))
    rows.sort(key=lambda row: round(row[3] - row[2], 9))  # equal ones differ by rounding errors
    return [Comparison(*row, rank=k) for k, row in enumerate(rows, start=1)]


@torch.no_grad()
def detect(
    model: nn.Module, batches: Iterable[Sequence[Mapping[str, Any]]]
) -> dict[Hashable, Detections]:
    """Run a model in eval mode over a test loader."""
    found = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            for image, output in zip(batch, model(batch)):
                if "instances" not in output:
                    raise UserError(
                        f"{type(model).__name__} predicts {', '.join(output)}; the quality score "
                        "is for detectors, which predict instances"
                    )
                instances = output["instances"].to("cpu")
                found[image_key(image)] = Detections(
                    boxes=instances.pred_boxes.tensor.double().numpy(),
                    scores=instances.scores.double().numpy(),
                    classes=instances.pred_classes.numpy(),
                )
    finally:
        model.train(was_training)
    return found


def read_predictions(
    path: str | Path, dataset: str, image_ids: Iterable[Hashable]
) -> dict[Hashable, Detections]:
    """Read predictions in COCO's results format: a list of ``image_id``, ``category_id``, ``bbox``
    (x, y, width, height) and ``score``, or an object with such a list as ``annotations``.

    Args:
        dataset: registered name, whose category ids are used.
        image_ids: all ids of the dataset.

    Raises:
        UserError: no such file, another format, or an image or category that is not in the
            dataset.
    """
    saved = saved_results.read_detections(path, dataset, set(image_ids))
    return {
        image: Detections(
            boxes=_boxes([each.box for each in rows]),
            scores=np.array([each.score for each in rows], dtype=np.float64),
            classes=np.array([each.label for each in rows], dtype=np.int64),
        )
        for image, rows in saved.items()
    }


def _boxes(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, 4)
