"""Label maps by intersection over union.

Letters: K classes, H and W the image's original size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2dense.data import datasets, label_tables
from d2dense.data.reading import read_label_map, to_classes
from d2dense.errors import UserError
from d2dense.evaluation.base import ImageEvaluator, image_key
from d2dense.evaluation.boundary import BoundaryCounts, boundary_iou
from d2dense.evaluation.detections import encode_masks
from d2dense.evaluation.label_files import write_confusion, write_label_map

__all__ = [
    "Confusion",
    "SemSegEvaluator",
    "boundary_metrics",
    "check_size",
    "class_map",
    "class_scores",
    "mean_of_defined",
]

logger = logging.getLogger(__name__)


class Confusion:
    """How many pixels of each class were given each class; only pairs that occur are stored.

    A full matrix of 150 classes is 180 kB per image; an image has a few hundred pairs.

    Args:
        truth: (H, W) classes 0 to K - 1, everything else does not count.
        predicted: (H, W) classes 0 to K - 1, or K where no class was predicted.
        num_classes: K.
    """

    def __init__(self, truth: np.ndarray, predicted: np.ndarray, num_classes: int):
        counted = (truth >= 0) & (truth < num_classes)
        pairs = truth[counted].astype(np.int64) * (num_classes + 1) + predicted[counted]
        counts = np.bincount(pairs)
        self.pairs = np.flatnonzero(counts)
        self.counts = counts[self.pairs]

    def add_to(self, matrix: np.ndarray) -> None:
        """Add to the int64 ``matrix`` (K, K + 1), ground truth by prediction."""
        # Every pair is listed once, so plain indexing adds all of them.
        matrix.reshape(-1)[self.pairs] += self.counts


def class_map(prediction: Any, num_classes: int, *, no_class: int, source: str) -> np.ndarray:
    """Return the predicted classes (H, W), ``num_classes`` where there is none.

    Args:
        prediction: scores (K, H, W), or (H, W) integers in which ``no_class`` means none.
        source: dataset, for messages.

    Raises:
        UserError: another shape or number of classes.
    """
    prediction = torch.as_tensor(prediction)
    found = prediction.shape[0] if prediction.ndim == 3 else num_classes
    is_scores = prediction.ndim == 3 and found == num_classes
    is_labels = prediction.ndim == 2 and not prediction.is_floating_point()
    if not (is_scores or is_labels):
        raise UserError(
            f"the model's semantic output is {prediction.dtype} of shape "
            f"{tuple(prediction.shape)}, but {source!r} has {num_classes} classes: expected scores "
            f"({num_classes}, H, W) or integers (H, W); correct the model's number of classes"
        )
    # The largest score is sought where the scores are: K times less to copy from the device.
    classes = prediction.argmax(dim=0) if is_scores else prediction
    labels = classes.cpu().numpy().astype(np.int64)
    none = labels == no_class if is_labels else np.zeros_like(labels, dtype=bool)
    wrong = labels[((labels < 0) | (labels >= num_classes)) & ~none]
    if wrong.size:
        raise UserError(
            f"the model predicts class {wrong[0]}, but {source!r} has {num_classes} classes (0 to "
            f"{num_classes - 1}); test the model on the dataset that it was trained for"
        )
    labels[none] = num_classes
    return labels


def mean_of_defined(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def class_scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the intersection over union (K,) and the accuracy (K,), NaN for a class without ground
    truth.

    Args:
        matrix: pixels (K, K + 1), ground truth by prediction, the last column without a class.
    """
    right = matrix.diagonal().astype(float)
    truth = matrix.sum(axis=1)
    union = truth + matrix[:, :-1].sum(axis=0) - right
    iou, accuracy = np.full(len(matrix), np.nan), np.full(len(matrix), np.nan)
    present = truth > 0
    iou[present] = right[present] / union[present]
    accuracy[present] = right[present] / truth[present]
    return iou, accuracy


class SemSegEvaluator(ImageEvaluator):
    """mIoU and accuracies of label maps over all pixels with a class.

    The results, in percent, agree with detectron2's evaluator: ``mIoU`` and ``mACC`` are means over
    the classes that occur in the ground truth of the evaluated images, other classes are NaN and
    count only through the pixels that they take from others; ``fwIoU`` weights classes by their
    pixels; ``pACC`` is the share of right pixels; ``IoU-<class>`` and ``ACC-<class>`` follow. A
    pixel for which an integer map predicts no class is wrong. With ``boundary_iou`` there are
    ``bIoU``, a mean over the same classes, and ``bIoU-<class>`` (:mod:`.boundary`).

    An output folder gets ``confusion_matrix.csv`` and ``.png``, the predictions as COCO's segments
    in ``sem_seg_predictions.json`` and, with ``submission``, ``submission/<image>.png`` with the
    values that the dataset's own label maps have.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``, with the metadata
            ``stuff_classes`` and, where they are not 255, False and empty, ``ignore_label``,
            ``reduce_zero_label`` (the files count classes from 1) and ``label_table`` (what their
            values mean, see :mod:`d2dense.data.label_tables`).
        output_dir: None writes nothing.
        prediction_key: key of the model's output dict with scores (K, H, W) or integers (H, W).
        boundary_iou, submission: see above.

    Raises:
        UserError: a dataset without classes, or with as many as its label table has not.
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
        self.class_names = list(self.metadata.get("stuff_classes") or ())
        if not self.class_names:
            raise UserError(
                f"dataset {dataset_name!r} has no stuff_classes in its metadata; name its classes"
            )
        self.ignore_label = int(self.metadata.get("ignore_label", 255))
        self.reduce_zero_label = bool(self.metadata.get("reduce_zero_label", False))
        self.label_table = str(self.metadata.get("label_table", ""))
        if self.label_table:
            self._check_table(label_tables.get(self.label_table))
        self.prediction_key = prediction_key
        self.boundary_iou = boundary_iou
        self.submission = submission

    def _check_table(self, table: label_tables.LabelTable) -> None:
        if table.num_classes != len(self.class_names):
            raise UserError(
                f"dataset {self.dataset_name!r} has {len(self.class_names)} class names, but its "
                f"label table {table.name!r} has {table.num_classes} classes; correct one of them"
            )

    @cached_property
    def label_files(self) -> dict[Hashable, str]:
        """Label map of each image."""
        files = {}
        for record in datasets.load(self.dataset_name):
            if "sem_seg_file_name" not in record:
                raise UserError(
                    f"image {image_key(record)!r} of {self.dataset_name!r} has no label map; "
                    "semantic evaluation needs a dataset with sem_seg_file_name"
                )
            files[image_key(record)] = record["sem_seg_file_name"]
        return files

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
        key = self.key(image)
        if key not in self.label_files:
            raise UserError(
                f"image {key!r} was predicted but is not in {self.dataset_name!r}; the test loader "
                "and the evaluator must use the same dataset"
            )
        truth = self._truth(self.label_files[key])
        predicted = class_map(
            self.output_of(output, self.prediction_key),
            len(self.class_names),
            no_class=self.ignore_label,
            source=self.dataset_name,
        )
        check_size(predicted, truth, self.label_files[key])
        record: dict[str, Any] = {"confusion": Confusion(truth, predicted, len(self.class_names))}
        if self.boundary_iou:
            record["boundary"] = BoundaryCounts(truth, predicted, len(self.class_names))
        if self.output_dir is not None:
            record["segments"] = self._segments(predicted, image)
            if self.submission:
                path = self.output_dir / "submission" / f"{_file_stem(image)}.png"
                write_label_map(path, self._own_values(predicted))
        return record

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        if self.output_dir is not None:
            segments = [segment for record in records.values() for segment in record["segments"]]
            self.write("sem_seg_predictions.json", json.dumps(segments))
        count = len(self.class_names)
        matrix = np.zeros((count, count + 1), dtype=np.int64)
        for record in records.values():
            record["confusion"].add_to(matrix)
        if self.output_dir is not None:
            write_confusion(self.output_dir, matrix, self.class_names)
        iou, accuracy = class_scores(matrix)
        pixels = matrix.sum(axis=1)
        total = pixels.sum()
        weighted = np.nansum(iou * pixels) / total if total else np.nan
        metrics = {
            "mIoU": mean_of_defined(iou),
            "fwIoU": weighted,
            "mACC": mean_of_defined(accuracy),
            "pACC": matrix.trace() / total if total else np.nan,
        }
        metrics |= {f"IoU-{name}": value for name, value in zip(self.class_names, iou)}
        metrics |= {f"ACC-{name}": value for name, value in zip(self.class_names, accuracy)}
        if self.boundary_iou:
            metrics |= boundary_metrics(records.values(), self.class_names)
        return {"sem_seg": {key: 100 * float(value) for key, value in metrics.items()}}

    def _truth(self, path: str) -> np.ndarray:
        """Return the label map (H, W), -1 where there is no class."""
        labels = read_label_map(path)
        labels = to_classes(
            labels,
            path,
            ignore_label=self.ignore_label,
            reduces_zero=self.reduce_zero_label,
            label_table=self.label_table,
        ).astype(np.int64)
        labels[labels == self.ignore_label] = -1
        if labels.size and labels.max() >= len(self.class_names):
            raise UserError(
                f"label map {path} has class {int(labels.max())}, but {self.dataset_name!r} has "
                f"{len(self.class_names)} classes and ignores {self.ignore_label}; correct the "
                "class list or the ignore label"
            )
        return labels

    def _own_values(self, predicted: np.ndarray) -> np.ndarray:
        """Return what the dataset's own label maps would have for predicted classes (H, W)."""
        if self.label_table:
            return label_tables.get(self.label_table).to_values(predicted)
        count = len(self.class_names)
        none = 0 if self.reduce_zero_label else self.ignore_label
        values = np.where(predicted < count, predicted + self.reduce_zero_label, none)
        return values.astype(np.uint8 if max(count, none) <= 255 else np.uint16)

    def _segments(self, predicted: np.ndarray, image: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One run-length mask per predicted class, under the dataset's own class numbers; images
        are numbers where their names are, as in COCO.
        """
        key = str(image_key(image))
        mapping = self.metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        own_ids = {contiguous: id_ for id_, contiguous in mapping.items()}
        classes = [int(k) for k in np.unique(predicted) if k < len(self.class_names)]
        codes = encode_masks(np.stack([predicted == k for k in classes])) if classes else []
        return [
            {
                "image_id": int(key) if key.isdigit() else key,
                "file_name": image.get("file_name", ""),
                "category_id": own_ids.get(k, k),
                "segmentation": code,
            }
            for k, code in zip(classes, codes)
        ]


def boundary_metrics(
    records: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, float]:
    """Return ``bIoU`` and ``bIoU-<class>`` of the ``boundary`` of image records."""
    empty = np.zeros((3, len(names)), dtype=np.int64)
    scores = boundary_iou(sum((record["boundary"].counts for record in records), empty))
    metrics = {"bIoU": mean_of_defined(scores)}
    return metrics | {f"bIoU-{name}": value for name, value in zip(names, scores)}


def _file_stem(image: Mapping[str, Any]) -> str:
    """Return the image's path below its dataset's folder, without ending, as far as it is
    known.
    """
    key = image.get("image_id")
    if isinstance(key, str) and not Path(key).is_absolute():
        return key
    return Path(image["file_name"]).stem


def check_size(predicted: np.ndarray, truth: np.ndarray, path: str) -> None:
    """Raise a :class:`UserError` if the maps (H, W) differ in size; ``path`` is the truth's."""
    if predicted.shape != truth.shape:
        raise UserError(
            f"the model predicted a map of {predicted.shape[1]}x{predicted.shape[0]} for {path} of "
            f"{truth.shape[1]}x{truth.shape[0]}; it must return maps of the original size"
        )
