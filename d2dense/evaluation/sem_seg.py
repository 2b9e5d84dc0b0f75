"""Label maps by intersection over union.

Letters: K classes, H and W the image's original size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from d2dense.data import datasets
from d2dense.data.reading import read_label_map, reduce_zero_label
from d2dense.errors import UserError
from d2dense.evaluation.base import ImageEvaluator, image_key
from d2dense.evaluation.detections import encode_masks

__all__ = ["Confusion", "SemSegEvaluator", "class_map", "class_scores", "mean_of_defined"]

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
        source: data set, for messages.

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
            f"{num_classes - 1}); test the model on the data set that it was trained for"
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
    pixel for which an integer map predicts no class is wrong.

    Args:
        dataset_name: registered data set whose dicts have ``sem_seg_file_name``, with the metadata
            ``stuff_classes`` and, where they are not 255 and False, ``ignore_label`` and
            ``reduce_zero_label`` (the files count classes from 1).
        output_dir: folder for the predictions as COCO's segments; None writes nothing.
        prediction_key: key of the model's output dict with scores (K, H, W) or integers (H, W).
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        prediction_key: str = "sem_seg",
    ):
        super().__init__(dataset_name, output_dir=output_dir)
        self.class_names = list(self.metadata.get("stuff_classes") or ())
        if not self.class_names:
            raise UserError(
                f"data set {dataset_name!r} has no stuff_classes in its metadata; name its classes"
            )
        self.ignore_label = int(self.metadata.get("ignore_label", 255))
        self.reduce_zero_label = bool(self.metadata.get("reduce_zero_label", False))
        self.prediction_key = prediction_key

    @cached_property
    def label_files(self) -> dict[Hashable, str]:
        """Label map of each image."""
        files = {}
        for record in datasets.load(self.dataset_name):
            if "sem_seg_file_name" not in record:
                raise UserError(
                    f"image {image_key(record)!r} of {self.dataset_name!r} has no label map; "
                    "semantic evaluation needs a data set with sem_seg_file_name"
                )
            files[image_key(record)] = record["sem_seg_file_name"]
        return files

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
        key = self.key(image)
        if key not in self.label_files:
            raise UserError(
                f"image {key!r} was predicted but is not in {self.dataset_name!r}; the test loader "
                "and the evaluator must use the same data set"
            )
        truth = self._truth(self.label_files[key])
        predicted = class_map(
            self.output_of(output, self.prediction_key),
            len(self.class_names),
            no_class=self.ignore_label,
            source=self.dataset_name,
        )
        check_size(predicted, truth, self.label_files[key])
        record = {"confusion": Confusion(truth, predicted, len(self.class_names))}
        if self.output_dir is not None:
            record["segments"] = self._segments(predicted, image)
        return record

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        if self.output_dir is not None:
            segments = [segment for record in records.values() for segment in record["segments"]]
            self.write("sem_seg_predictions.json", json.dumps(segments))
        count = len(self.class_names)
        matrix = np.zeros((count, count + 1), dtype=np.int64)
        for record in records.values():
            record["confusion"].add_to(matrix)
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
        return {"sem_seg": {key: 100 * float(value) for key, value in metrics.items()}}

    def _truth(self, path: str) -> np.ndarray:
        """Return the label map (H, W), -1 where there is no class."""
        labels = read_label_map(path).astype(np.int64)
        if self.reduce_zero_label:
            labels = reduce_zero_label(labels, self.ignore_label)
        labels[labels == self.ignore_label] = -1
        if labels.size and labels.max() >= len(self.class_names):
            raise UserError(
                f"label map {path} has class {int(labels.max())}, but {self.dataset_name!r} has "
                f"{len(self.class_names)} classes and ignores {self.ignore_label}; correct the "
                "class list or the ignore label"
            )
        return labels

    def _segments(self, predicted: np.ndarray, image: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One run-length mask per predicted class, under the data set's own class numbers."""
        mapping = self.metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        own_ids = {contiguous: id_ for id_, contiguous in mapping.items()}
        classes = [int(k) for k in np.unique(predicted) if k < len(self.class_names)]
        codes = encode_masks(np.stack([predicted == k for k in classes])) if classes else []
        return [
            {
                "file_name": image.get("file_name", ""),
                "category_id": own_ids.get(k, k),
                "segmentation": code,
            }
            for k, code in zip(classes, codes)
        ]


def check_size(predicted: np.ndarray, truth: np.ndarray, path: str) -> None:
    """Raise a :class:`UserError` if the maps (H, W) differ in size; ``path`` is the truth's."""
    if predicted.shape != truth.shape:
        raise UserError(
            f"the model predicted a map of {predicted.shape[1]}x{predicted.shape[0]} for {path} of "
            f"{truth.shape[1]}x{truth.shape[0]}; it must return maps of the original size"
        )
