"""Boxes and masks by LVIS's measures: federated ground truth, rare, common and frequent classes."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from d2dense.errors import UserError
from d2dense.evaluation.base import require
from d2dense.evaluation.coco import InstanceEvaluator
from d2dense.evaluation.ground_truth import class_ids, read_annotations, require_sizes
from d2dense.evaluation.precision import mean_precision, precision_metrics

__all__ = ["LVISEvaluator", "lvis_precision"]

logger = logging.getLogger(__name__)


class LVISEvaluator(InstanceEvaluator):
    """AP of boxes and masks with APr, APc and APf, computed by the ``lvis`` package.

    Up to 300 detections of an image count, over all classes. Of the 1 000 and more classes, only
    those with ground truth are listed one by one.

    Args: those of :class:`InstanceEvaluator`.

    Raises:
        UserError: a dataset without ``json_file``, or the package is not installed.
    """

    results_prefix = "lvis"

    def __init__(
        self,
        dataset_name: str,
        *,
        tasks: Sequence[str] | None = None,
        output_dir: str | None = None,
        max_dets: int = 300,
        per_class: bool = True,
        prediction_key: str = "instances",
        task_suffix: str = "",
    ):
        super().__init__(
            dataset_name,
            tasks=tasks,
            output_dir=output_dir,
            max_dets=max_dets,
            per_class=per_class,
            prediction_key=prediction_key,
            task_suffix=task_suffix,
        )
        if not self.metadata.get("json_file"):
            raise UserError(f"dataset {dataset_name!r} has no json_file; LVIS evaluation needs one")
        _lvis()

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        path = self.metadata.json_file
        raw = read_annotations(path)
        mapping = class_ids(self.metadata, raw["categories"])
        category_of_class = {contiguous: id_ for id_, contiguous in mapping.items()}
        known = {image["id"] for image in raw["images"]}
        unknown = [key for key in records if key not in known]
        if unknown:
            raise UserError(
                f"image {unknown[0]!r} was predicted but is not in {path}; the test loader and the "
                "evaluator must use the same dataset"
            )
        self.write_predictions(
            records, [category_of_class[c] for c in range(len(category_of_class))]
        )
        if not raw.get("annotations"):
            logger.info("%s has no annotations: predictions only", path)
            return {}
        found = [
            {**d, "image_id": key, "category_id": category_of_class[d["class"]]}
            for key, record in records.items()
            for d in record["detections"]
        ]
        truth_has_masks = any(a.get("segmentation") for a in raw["annotations"])
        return {
            task + self.task_suffix: self._metrics(raw, found, task)
            for task in self.choose_tasks(records, truth_has_masks)
        }

    def _metrics(
        self, raw: dict[str, Any], found: list[dict[str, Any]], task: str
    ) -> dict[str, float]:
        _require_ids(raw["annotations"], self.metadata.json_file)
        if task == "segm":
            require_sizes(raw["images"], self.metadata.json_file)
            for annotation in raw["annotations"]:
                if not annotation.get("segmentation"):
                    raise UserError(
                        f"annotation {annotation.get('id')} of {self.metadata.json_file} has no "
                        "mask that can be drawn, without which LVIS cannot evaluate 'segm'"
                    )
        precision = lvis_precision(
            self.metadata.json_file, found, task=task, max_dets=self.max_dets
        )
        categories = sorted(raw["categories"], key=lambda category: category["id"])
        names = [str(category["name"]) for category in categories]
        metrics = precision_metrics(precision, names, per_class=False)
        for group in "rcf":
            members = [k for k, c in enumerate(categories) if c.get("frequency") == group]
            metrics[f"AP{group}"] = mean_precision(precision[:, :, members, 0])
        if self.per_class:
            for k, name in enumerate(names):
                value = mean_precision(precision[:, :, k, 0])
                if not np.isnan(value):
                    metrics[f"AP-{name}"] = value
        return metrics


def lvis_precision(
    json_file: str, detections: list[dict[str, Any]], *, task: str, max_dets: int
) -> np.ndarray:
    """Return interpolated precisions (T, R, K, A), -1 where there is no ground truth.

    Args:
        json_file: annotations in LVIS's layout.
        detections: dicts with ``image_id``, ``category_id``, ``score``, ``bbox`` (x, y, w, h) and,
            for masks, ``segmentation``, under the ids of the file; may be empty.
        task: "bbox" or "segm".
        max_dets: this many of an image's highest scores count, over all classes.
    """
    lvis = _lvis()
    truth = lvis.LVIS(str(json_file))
    _complete(truth, json_file)
    results = _results(truth, detections, task=task, max_dets=max_dets)
    evaluation = lvis.LVISEval(truth, results, task)
    evaluation.params.max_dets = max_dets
    evaluation.evaluate()
    return _accumulate(evaluation)


def _lvis():
    return require("lvis", "LVIS evaluation", "pip install --no-deps lvis")


def _require_ids(annotations: list[dict[str, Any]], json_file: str) -> None:
    """Raise a UserError unless annotations have ids of their own: the package keeps them and their
    matches by these, as floats in which 0 means no match.
    """
    seen = set()
    for annotation in annotations:
        id_ = annotation.get("id")
        if type(id_) is not int or not 0 < id_ < 2**53 or id_ in seen:
            raise UserError(
                f"annotation {id_!r} of image {annotation.get('image_id')!r} in {json_file} needs "
                "a positive id that no other one has; number the annotations from 1"
            )
        seen.add(id_)


def _complete(truth: Any, json_file: str) -> None:
    """Fill in lists that small hand-made files lack; a class without frequency is an error."""
    for image in truth.dataset["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            value = image.get(key)
            if value is not None and not isinstance(value, list):
                raise UserError(
                    f"image {image['id']!r} of {json_file} has {key} {value!r}, expected a list of "
                    "category ids"
                )
            image[key] = value or []
    for annotation in truth.dataset["annotations"]:
        _, _, width, height = annotation["bbox"]
        area = annotation.get("area")
        if area is not None and type(area) not in (int, float):
            raise UserError(
                f"annotation {annotation['id']} of {json_file} has area {area!r}, expected a "
                "number of pixels"
            )
        annotation["area"] = width * height if area is None else area
    for category in truth.dataset["categories"]:
        if category.get("frequency") not in ("r", "c", "f"):
            raise UserError(
                f"category {category.get('id')} of {json_file} has no frequency r, c or f; "
                "it is not in LVIS's layout: register the file as a COCO dataset"
            )


def _results(truth: Any, detections: list[dict[str, Any]], *, task: str, max_dets: int) -> Any:
    """Wrap detections as the package's results; it cannot do that for an empty list."""
    field = "bbox" if task == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", field)
    found = [{key: detection[key] for key in keys} for detection in detections]
    if found:
        return _lvis().LVISResults(truth, found, max_dets=max_dets)
    image, category = truth.dataset["images"][0]["id"], truth.dataset["categories"][0]["id"]
    stand_in = {"image_id": image, "category_id": category, "score": 0.0, "bbox": [0, 0, 1, 1]}
    results = _lvis().LVISResults(truth, [stand_in], max_dets=max_dets)
    results.dataset["annotations"] = []
    results._create_index()
    return results


def _accumulate(evaluation: Any) -> np.ndarray:
    """Rank the matched detections of all images, class by class and size by size.

    The package's own method ends in ``np.float``, which numpy removed in 1.24.
    """
    params = evaluation.params
    images = len(params.img_ids)
    shape = (len(params.iou_thrs), len(params.rec_thrs), len(params.cat_ids), len(params.area_rng))
    precision = -np.ones(shape)
    # Per class, per size, per image, in this order.
    matched = iter(evaluation.eval_imgs)
    for k in range(shape[2]):
        for a in range(shape[3]):
            rows = [row for row in (next(matched) for _ in range(images)) if row is not None]
            objects = sum(int(np.count_nonzero(np.asarray(row["gt_ignore"]) == 0)) for row in rows)
            if objects:
                precision[:, :, k, a] = _interpolated(rows, objects, params.rec_thrs)
    return precision


def _interpolated(rows: list[dict[str, Any]], objects: int, levels: np.ndarray) -> np.ndarray:
    """Precision (T, R) at recall ``levels``: the highest at this recall or a larger one."""
    scores = np.concatenate([row["dt_scores"] for row in rows])
    order = np.argsort(-scores, kind="mergesort")
    hit = np.concatenate([row["dt_matches"] for row in rows], axis=1)[:, order] > 0
    counted = ~np.concatenate([row["dt_ignore"] for row in rows], axis=1)[:, order].astype(bool)
    right = np.cumsum(hit & counted, axis=1, dtype=float)
    wrong = np.cumsum(~hit & counted, axis=1, dtype=float)
    precision = right / (right + wrong + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    table = np.zeros((len(best), len(levels)))
    for t, recall in enumerate(right / objects):
        reached = np.searchsorted(np.asarray(recall), levels, side="left")
        inside = reached < len(recall)
        table[t, inside] = best[t, reached[inside]]
    return table
