"""The evaluator of a dataset, by the ``evaluator_type`` in its metadata."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from d2dense.errors import UserError, nearest

__all__ = ["EVALUATORS", "build_evaluator"]

# evaluator_type -> (module, class); imported when asked for, since each needs its own packages.
EVALUATORS = {
    "coco": ("coco", "COCOEvaluator"),
    "coco_panoptic_seg": ("coco", "COCOEvaluator"),
    "lvis": ("lvis", "LVISEvaluator"),
    "cityscapes_instance": ("cityscapes", "CityscapesInstanceEvaluator"),
    "cityscapes_sem_seg": ("cityscapes_sem_seg", "CityscapesSemSegEvaluator"),
    "classification": ("classification", "ClassificationEvaluator"),
    "sem_seg": ("sem_seg", "SemSegEvaluator"),
}


def build_evaluator(
    dataset_name: str,
    *,
    output_dir: str | None = None,
    tasks: Sequence[str] | None = None,
    max_dets: int | None = None,
    boundary_iou: bool = False,
    submission: bool = False,
) -> DatasetEvaluator:
    """Return the evaluator that the metadata of ``dataset_name`` asks for.

    Args:
        output_dir: where predictions are written; None writes nothing.
        tasks: for objects, some of "bbox" and "segm"; by default what model and data have.
        max_dets: detections per image that count by COCO's measure, 100 by default; LVIS's measure
            has its own 300.
        boundary_iou: of label maps: measure it too.
        submission: of label maps: write the predictions as the dataset's own label maps are.

    Raises:
        UserError: no or an unknown ``evaluator_type``, or options that the evaluator does not have.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise UserError(
            f"dataset {dataset_name!r} has evaluator_type {kind!r}, expected one of "
            f"{', '.join(EVALUATORS)}{nearest(str(kind), EVALUATORS)}"
        )
    module, class_name = EVALUATORS[kind]
    evaluator = getattr(importlib.import_module(f"{__package__}.{module}"), class_name)
    options: dict[str, Any] = {"output_dir": output_dir}
    for name, value in {"boundary_iou": boundary_iou, "submission": submission}.items():
        if value and not kind.endswith("sem_seg"):
            raise UserError(
                f"{name} is for label maps; dataset {dataset_name!r} is evaluated as {kind}"
            )
        if value:
            options[name] = value
    if module in ("coco", "lvis"):
        options["tasks"] = tasks
        if max_dets is not None and module == "coco":
            options["max_dets"] = max_dets
    elif tasks is not None:
        raise UserError(f"tasks are for objects; dataset {dataset_name!r} is evaluated as {kind}")
    return evaluator(dataset_name, **options)
