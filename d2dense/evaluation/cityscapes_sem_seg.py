"""Cityscapes' measure of label maps.

Letters: C evaluated classes (19).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2dense.data import label_tables
from d2dense.evaluation.boundary import BoundaryCounts
from d2dense.evaluation.cityscapes import (
    CATEGORIES,
    CLASSES,
    INSTANCE_CLASSES,
    MEAN_SIZE,
    NO_CLASS,
    TRAIN_ID,
    CityscapesEvaluator,
)
from d2dense.evaluation.label_files import write_confusion, write_label_map
from d2dense.evaluation.sem_seg import (
    Confusion,
    boundary_metrics,
    check_size,
    class_map,
    mean_of_defined,
)

__all__ = ["CityscapesSemSegEvaluator"]


class CityscapesSemSegEvaluator(CityscapesEvaluator):
    """IoU and instance-weighted iIoU of classes and categories, in percent.

    ``IoU``, ``iIoU`` are means over classes, ``IoU_sup``, ``iIoU_sup`` over categories, of those
    that occur; the values of each follow as ``IoU-<class>`` and so on. iIoU exists for classes and
    categories with instances. Images that were not predicted are left out, with a warning. With
    ``boundary_iou`` there are ``bIoU`` and ``bIoU-<class>`` (:mod:`.boundary`).

    An output folder gets ``confusion_matrix.csv`` and ``.png`` and, with ``submission``,
    ``submission/<image>.png`` with label ids, as the benchmark's server takes them.

    Args:
        dataset_name: registered dataset with the metadata ``gt_dir``.
        output_dir: None writes nothing.
        prediction_key: key of the model's output dict with scores (19, H, W) or train ids (H, W).
        boundary_iou, submission: see above.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        prediction_key: str = "sem_seg",
        boundary_iou: bool = False,
        submission: bool = False,
    ):
        super().__init__(dataset_name, output_dir=output_dir)
        self.prediction_key = prediction_key
        self.boundary_iou = boundary_iou
        self.submission = submission

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
        labels, path = self.truth(self.key(image), "labelIds")
        instances, _ = self.truth(self.key(image), "instanceIds")
        predicted = class_map(
            self.output_of(output, self.prediction_key),
            len(CLASSES),
            no_class=NO_CLASS,
            source=self.dataset_name,
        )
        check_size(predicted, labels, path)
        truth = TRAIN_ID[labels]
        record = {
            "confusion": Confusion(truth, predicted, len(CLASSES)),
            "found": _found_instances(instances, predicted),
        }
        if self.boundary_iou:
            record["boundary"] = BoundaryCounts(truth, predicted, len(CLASSES))
        if self.submission and self.output_dir is not None:
            name = f"{Path(image['file_name']).stem}.png"
            values = label_tables.get("cityscapes_label_ids").to_values(predicted)
            write_label_map(self.output_dir / "submission" / name, values)
        return record

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        self.unpredicted(records, "labelIds")
        matrix = np.zeros((len(CLASSES), len(CLASSES) + 1), dtype=np.int64)
        found = [row for record in records.values() for row in record["found"]]
        for record in records.values():
            record["confusion"].add_to(matrix)
        if self.output_dir is not None:
            write_confusion(self.output_dir, matrix, CLASSES)
        members = {name: [k] for k, name in enumerate(CLASSES)}
        groups = {c: [CLASSES.index(n) for n in names] for c, names in CATEGORIES.items()}
        scores = {
            "IoU": {name: _iou(matrix, rows) for name, rows in members.items()},
            "iIoU": {
                name: _instance_iou(matrix, members[name], found, in_category=False)
                for name in INSTANCE_CLASSES
            },
            "IoU_sup": {name: _iou(matrix, rows) for name, rows in groups.items()},
            "iIoU_sup": {
                name: _instance_iou(matrix, groups[name], found, in_category=True)
                for name in ("human", "vehicle")
            },
        }
        metrics = {key: mean_of_defined(np.array([*v.values()])) for key, v in scores.items()}
        for key, values in scores.items():
            metrics |= {f"{key}-{name}": value for name, value in values.items()}
        if self.boundary_iou:
            metrics |= boundary_metrics(records.values(), CLASSES)
        return {"sem_seg": {key: 100 * float(value) for key, value in metrics.items()}}


def _found_instances(ids: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (class, pixels, pixels of the right class, pixels of the right category) of every
    annotated instance of an evaluated class.

    Args:
        ids: (H, W), label id * 1000 + number for an instance.
        predicted: (H, W) classes.
    """
    rows = []
    for instance in np.unique(ids[ids > 1000]):
        k = int(TRAIN_ID[instance // 1000])
        if k == NO_CLASS:
            continue
        inside = predicted[ids == instance]
        right = np.count_nonzero(inside == k)
        category = next(names for names in CATEGORIES.values() if CLASSES[k] in names)
        related = np.count_nonzero(np.isin(inside, [CLASSES.index(name) for name in category]))
        rows.append((k, inside.size, right, related))
    return rows


def _iou(matrix: np.ndarray, members: list[int]) -> float:
    """Intersection over union of the classes ``members`` taken as one; NaN if they do not occur.

    Args:
        matrix: pixels (C, C + 1), ground truth by prediction, the last column without a class.
    """
    right = matrix[np.ix_(members, members)].sum()
    union = matrix[members].sum() + matrix[:, members].sum() - right
    return float(right / union) if union else float("nan")


def _instance_iou(
    matrix: np.ndarray,
    members: list[int],
    found: Iterable[tuple[int, int, int, int]],
    *,
    in_category: bool,
) -> float:
    """Intersection over union in which every annotated instance weighs as one of mean size.

    Args:
        matrix: as in :func:`_iou`.
        members: the class, or the classes of a category.
        found: rows of :func:`_found_instances`.
        in_category: any class of the category is right.
    """
    right = total = 0.0
    for k, pixels, class_pixels, category_pixels in found:
        if k in members:
            weight = MEAN_SIZE[CLASSES[k]] / pixels
            right += weight * (category_pixels if in_category else class_pixels)
            total += weight * pixels
    others = [k for k in range(len(matrix)) if k not in members]
    # Wrong pixels belong to no annotated instance, so they keep their weight of one.
    total += float(matrix[np.ix_(others, members)].sum())
    return right / total if total else float("nan")
