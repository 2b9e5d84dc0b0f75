"""Classes of whole images by top-1 and top-5 accuracy.

Letters: K classes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2dense.data.classes import dataset_classes
from d2dense.errors import UserError
from d2dense.evaluation.base import ImageEvaluator

__all__ = ["ClassificationEvaluator", "rank_of"]

logger = logging.getLogger(__name__)

_TOP = 5


def rank_of(scores: Tensor, label: int) -> int:
    """Return how many of the classes (K,) come before ``label``: those with a higher score, and of
    equal ones those with a lower number. Scores that are not numbers put it last.
    """
    own = scores[label]
    if torch.isnan(scores).any():
        return len(scores)
    before = (scores > own).sum() + (scores[:label] == own).sum()
    return int(before)


class ClassificationEvaluator(ImageEvaluator):
    """Accuracies in percent: ``top1``, ``top5`` (left out with five classes or fewer, where it says
    nothing) and ``mean_class_top1``, the mean over the classes that have images.

    With an output folder it writes ``classification_predictions.json`` (the five best classes of
    every image) and ``classification_classes.csv`` (images and accuracies by class).

    Args:
        dataset_name: registered dataset with the metadata ``image_classes``, whose images come
            with a ``label``.
        output_dir: folder for predictions; None writes nothing.
    """

    def __init__(self, dataset_name: str, *, output_dir: str | None = None):
        super().__init__(dataset_name, output_dir=output_dir)
        self.class_names = dataset_classes(dataset_name, "image")
        self.has_top5 = len(self.class_names) > _TOP
        if not self.has_top5:
            logger.info("%s has %d classes: no top-5 accuracy", dataset_name, len(self.class_names))

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
        if "label" not in image:
            raise UserError(
                f"image {self.key(image)!r} of {self.dataset_name!r} came without its label; let "
                "the test loader have a ClassificationMapper (INPUT.MAPPER classification)"
            )
        scores = self.output_of(output, "class_scores").detach().float().cpu()
        if scores.shape != (len(self.class_names),):
            raise UserError(
                f"the model scores {tuple(scores.shape)} classes, but {self.dataset_name!r} has "
                f"{len(self.class_names)}; correct the model's number of classes"
            )
        record = {"label": int(image["label"]), "rank": rank_of(scores, int(image["label"]))}
        if self.output_dir is not None:
            best = scores.topk(min(_TOP, len(scores)))
            record["classes"], record["scores"] = best.indices.tolist(), best.values.tolist()
        return record

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        labels = np.array([each["label"] for each in records.values()], dtype=np.int64)
        ranks = np.array([each["rank"] for each in records.values()], dtype=np.int64)
        images = np.bincount(labels, minlength=len(self.class_names))
        right = {
            name: np.bincount(labels, weights=ranks < count, minlength=len(self.class_names))
            for name, count in self._tops().items()
        }
        if self.output_dir is not None:
            self._write_predictions(records)
            self._write_classes(images, right)
        metrics = {name: _share(counts.sum(), len(labels)) for name, counts in right.items()}
        present = images > 0
        metrics["mean_class_top1"] = _share(
            (right["top1"][present] / images[present]).sum(), present.sum()
        )
        return {"classification": metrics}

    def _tops(self) -> dict[str, int]:
        return {"top1": 1, "top5": _TOP} if self.has_top5 else {"top1": 1}

    def _write_predictions(self, records: Mapping[Hashable, Any]) -> None:
        rows = [
            {
                "image_id": key,
                "label": self.class_names[record["label"]],
                "classes": [self.class_names[k] for k in record["classes"]],
                "scores": record["scores"],
            }
            for key, record in sorted(records.items())
        ]
        self.write("classification_predictions.json", json.dumps(rows, indent=0))

    def _write_classes(self, images: np.ndarray, right: Mapping[str, np.ndarray]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "images", *right])
        for k, name in enumerate(self.class_names):
            shares = [f"{_share(int(n[k]), int(images[k])):.2f}" for n in right.values()]
            writer.writerow([name, images[k], *shares])
        self.write("classification_classes.csv", text.getvalue())


def _share(part: float, whole: float) -> float:
    """Return the percentage, NaN of nothing."""
    return 100.0 * float(part) / float(whole) if whole else float("nan")
