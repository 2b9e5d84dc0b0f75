"""Boxes and masks by COCO's measures."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from d2dense.data.coco_format import read_categories
from d2dense.errors import UserError
from d2dense.evaluation.base import ImageEvaluator
from d2dense.evaluation.detections import check_classes, detections
from d2dense.evaluation.ground_truth import GroundTruth, class_ids, load_ground_truth
from d2dense.evaluation.precision import coco_precision, precision_metrics

__all__ = ["COCOEvaluator", "InstanceEvaluator"]

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")


class InstanceEvaluator(ImageEvaluator):
    """What the COCO and the LVIS evaluator share: collecting predicted instances.

    Args:
        dataset_name: registered dataset, with a ``json_file`` or (COCO only) dicts.
        tasks: of "bbox" and "segm"; None means boxes, and masks where both the model and the
            dataset have them.
        output_dir: folder for the predictions as a COCO results file; None writes nothing.
        max_dets: number of highest-scoring detections that count.
        per_class: also return and log the precision of each class.
        prediction_key: key of the model's output dict that holds the ``Instances``.
        task_suffix: appended to the task names in the results, to tell several evaluators of one
            model apart ("bbox_stage2").
    """

    results_prefix = "coco"

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | None = None,
        max_dets: int = 100,
        per_class: bool = True,
        prediction_key: str = "instances",
        task_suffix: str = "",
    ):
        super().__init__(dataset_name, output_dir=output_dir)
        if tasks is not None and (not tasks or set(tasks) - set(TASKS)):
            raise UserError(f"evaluation tasks are {list(tasks)}; use some of {list(TASKS)}")
        if max_dets < 1:
            raise UserError(f"max_dets is {max_dets}; at least one detection per image must count")
        json_file = self.metadata.get("json_file")
        if json_file and not Path(json_file).is_file():
            # Said now and not after the model has seen all images.
            raise UserError(
                f"annotation file {json_file} of {dataset_name!r} does not exist; correct its path"
            )
        self.tasks = tuple(tasks) if tasks is not None else None
        self.max_dets = max_dets
        self.per_class = per_class
        self.prediction_key = prediction_key
        self.task_suffix = task_suffix

    @cached_property
    def num_classes(self) -> int:
        if self.metadata.get("thing_classes"):
            return len(self.metadata.thing_classes)
        json_file = self.metadata.get("json_file")
        if not json_file:
            return len(load_ground_truth(self.dataset_name).class_names)
        return len(set(class_ids(self.metadata, read_categories(json_file)).values()))

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
        instances = self.output_of(output, self.prediction_key).to("cpu")
        check_classes(instances, num_classes=self.num_classes, dataset_name=self.dataset_name)
        return {"detections": detections(instances), "masks": instances.has("pred_masks")}

    def choose_tasks(self, records: Mapping[Hashable, Any], truth_has_masks: bool) -> list[str]:
        """Return the tasks to evaluate; asking for masks that do not exist is a UserError."""
        predicted = bool(records) and all(record["masks"] for record in records.values())
        if self.tasks is None:
            return ["bbox", "segm"] if predicted and truth_has_masks else ["bbox"]
        if "segm" in self.tasks and records and not predicted:
            raise UserError(
                "evaluation of 'segm' was asked for, but the model predicts no masks; "
                "give it a mask head or leave 'segm' out of the tasks"
            )
        return list(self.tasks)

    def write_predictions(
        self, records: Mapping[Hashable, Any], category_of_class: Sequence[int]
    ) -> None:
        """Write all detections in COCO's results format under the dataset's own ids."""
        results = []
        for image_id, record in records.items():
            for found in record["detections"]:
                kept = {key: value for key, value in found.items() if key != "class"}
                category = int(category_of_class[found["class"]])
                results.append({"image_id": image_id, "category_id": category, **kept})
        # FSCascade and other models with several outputs write one file for each.
        self.write(f"{self.results_prefix}_{self.prediction_key}_results.json", json.dumps(results))


class COCOEvaluator(InstanceEvaluator):
    """AP of boxes and masks over IoU 0.50 to 0.95, equal to pycocotools.

    Every image of the ground truth counts, predicted or not. Values are in percent; NaN means that
    there is no object to find (of that class or size).
    """

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        truth = load_ground_truth(self.dataset_name)
        unknown = [key for key in records if key not in truth.image_ids]
        if unknown:
            raise UserError(
                f"image {unknown[0]!r} was predicted but is not in {truth.source}; the test loader "
                "and the evaluator must use the same dataset"
            )
        self.write_predictions(records, truth.class_ids)
        if truth.annotations is None:
            logger.info("%s has no annotations: predictions only", truth.source)
            return {}
        if len(records) < len(truth.images):
            missing = len(truth.images) - len(records)
            logger.warning("%d of %d images were not predicted", missing, len(truth.images))
        found = [
            {**d, "image_id": truth.image_ids[key], "category_id": d["class"] + 1}
            for key, record in records.items()
            for d in record["detections"]
        ]
        results = {}
        for task in self.choose_tasks(records, truth.has_masks):
            precision = self._precision(truth, found, task)
            results[task + self.task_suffix] = precision_metrics(
                precision, truth.class_names, per_class=self.per_class
            )
        return results

    def _precision(self, truth: GroundTruth, found: list[dict[str, Any]], task: str) -> np.ndarray:
        if task == "segm" and truth.annotations and not truth.has_masks:
            raise UserError(
                f"{truth.source} has boxes but no masks, so 'segm' cannot be evaluated; "
                "leave 'segm' out of the tasks"
            )
        return coco_precision(truth.coco(task), found, task=task, max_dets=self.max_dets)
