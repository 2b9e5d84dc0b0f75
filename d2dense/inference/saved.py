"""What files and annotations hold, in the form of a model's output, so that the same code draws it.

Letters: H and W size of the picture, N objects.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Boxes, Instances

from d2dense.data.reading import read_sem_seg
from d2dense.errors import UserError
from d2dense.evaluation.saved_results import (
    SavedDetection,
    SavedRegion,
    read_detections,
    read_regions,
    read_rows,
)

__all__ = ["NO_CLASS", "annotated", "read_outputs"]

NO_CLASS = -1  # of pixels without annotation or prediction

Size = tuple[int, int]


def read_outputs(
    path: str | Path, dataset: str, sizes: Mapping[Hashable, Size]
) -> dict[Hashable, dict[str, Any]]:
    """Read the predictions of a file as output dicts by image: ``instances`` where the file has
    scores and boxes, else ``sem_seg`` as classes ``(H, W)``.

    Args:
        dataset: registered name, whose category ids are used.
        sizes: (height, width) of every image of the dataset, by id.

    Raises:
        UserError: no such file, another format, or what is not in the dataset.
    """
    if any(isinstance(row, Mapping) and "score" not in row for row in read_rows(path)[:1]):
        regions = read_regions(path, dataset, set(sizes))
        return {image: _label_map(rows, sizes[image]) for image, rows in regions.items()}
    found = read_detections(path, dataset, set(sizes))
    return {image: _instances(rows, sizes[image]) for image, rows in found.items()}


def annotated(
    record: Mapping[str, Any], image: np.ndarray, *, ignore_label: int = 255
) -> dict[str, Any]:
    """Return the annotations of a dataset's record as a model's output, without scores.

    Args:
        image: ``(H, W, 3)``, the record's picture.
        ignore_label: of pixels without annotation in label maps.

    Raises:
        UserError: a record without objects and label map.
    """
    size = image.shape[:2]
    if "sem_seg_file_name" in record:
        labels = torch.tensor(read_sem_seg(dict(record), image, ignore_label).astype(np.int64))
        return {"sem_seg": labels.masked_fill(labels == ignore_label, NO_CLASS)}
    if "annotations" not in record:
        raise UserError("the dataset has neither objects nor label maps, which could be drawn")
    annotations = copy.deepcopy(list(record["annotations"]))
    has_masks = bool(annotations) and all("segmentation" in each for each in annotations)
    if not has_masks:
        for each in annotations:
            each.pop("segmentation", None)
    truth = annotations_to_instances(annotations, size, mask_format="bitmask")
    objects = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    if has_masks:
        objects.pred_masks = truth.gt_masks.tensor
    return {"instances": objects}


def _instances(rows: Sequence[SavedDetection], size: Size) -> dict[str, Any]:
    found = Instances(
        size,
        pred_boxes=Boxes(torch.tensor([row.box for row in rows])),
        scores=torch.tensor([row.score for row in rows]),
        pred_classes=torch.tensor([row.label for row in rows]),
    )
    codes = [row.segmentation for row in rows]
    if all(codes):
        found.pred_masks = torch.as_tensor(np.stack([_mask(code, size) for code in codes]))
    return {"instances": found}


def _mask(code: Any, size: Size) -> np.ndarray:
    """Decode a run-length code, compressed or not, or polygons."""
    height, width = size
    if isinstance(code, list):
        code = mask_util.merge(mask_util.frPyObjects(code, height, width))
    elif isinstance(code["counts"], list):
        code = mask_util.frPyObjects(code, *code["size"])
    return mask_util.decode(code).astype(bool)


def _label_map(rows: Collection[SavedRegion], size: Size) -> dict[str, Any]:
    labels = np.full(size, NO_CLASS, dtype=np.int64)
    for row in rows:
        if row.mask.shape != size:
            found = " x ".join(map(str, row.mask.shape))
            raise UserError(f"a saved mask is {found}, its image {size[0]} x {size[1]}")
        labels[row.mask] = row.label
    return {"sem_seg": torch.as_tensor(labels)}
