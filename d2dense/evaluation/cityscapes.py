"""What Cityscapes' measures share, and that of instances, in memory and without cityscapesScripts;
that of label maps is in :mod:`.cityscapes_sem_seg`.

Letters: C evaluated classes (19), G annotated and P predicted instances of one class in one image.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2dense.data.cityscapes import STUFF, THINGS
from d2dense.data.reading import read_label_map
from d2dense.errors import UserError, nearest
from d2dense.evaluation.base import ImageEvaluator
from d2dense.evaluation.detections import check_classes
from d2dense.evaluation.sem_seg import check_size, mean_of_defined

__all__ = ["CityscapesEvaluator", "CityscapesInstanceEvaluator"]

logger = logging.getLogger(__name__)

CLASSES = tuple(name for _, name, _ in STUFF)
LABEL_IDS = {name: label for label, name, _ in STUFF}
INSTANCE_CLASSES = tuple(name for _, name, _ in THINGS)
# Evaluated classes by category; the order of the names is that of the results.
CATEGORIES = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
# Mean pixels of an instance in the training set: iIoU weights an instance by mean size / own size.
MEAN_SIZE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
# Label ids 0 to 33 that are not evaluated; detections that cover them are not wrong.
VOID_IDS = tuple(sorted(set(range(34)) - set(LABEL_IDS.values())))
# Annotated instances below this many pixels need not be found.
MIN_PIXELS = 100

# As cityscapesScripts computes them: its 0.6 is a little more, so an IoU of 3 / 5 misses it.
_THRESHOLDS = np.arange(0.5, 1.0, 0.05)
NO_CLASS = 255
TRAIN_ID = np.full(2**16, NO_CLASS, dtype=np.uint8)
TRAIN_ID[[label for label, _, _ in STUFF]] = np.arange(len(STUFF))


class CityscapesEvaluator(ImageEvaluator):
    """Finds the ground truth of an image in the metadata's ``gt_dir``."""

    def __init__(self, dataset_name: str, *, output_dir: str | None = None):
        super().__init__(dataset_name, output_dir=output_dir)
        gt_dir = self.metadata.get("gt_dir")
        if not gt_dir or not Path(gt_dir).is_dir():
            raise UserError(
                f"gt_dir of dataset {dataset_name!r} is {gt_dir!r}, which is not a folder; "
                "give the folder gtFine/<split>"
            )
        self.gt_dir = Path(gt_dir)

    def key(self, image: Mapping[str, Any]) -> str:
        """Return "<city>/<city>_<sequence>_<frame>"."""
        path, ending = Path(image["file_name"]), "_leftImg8bit"
        if not path.stem.endswith(ending):
            raise UserError(
                f"image {path} is not named <city>_<sequence>_<frame>{ending}.png; Cityscapes' "
                "evaluation needs its file names"
            )
        return f"{path.parent.name}/{path.stem.removesuffix(ending)}"

    def truth(self, key: str, kind: str) -> tuple[np.ndarray, str]:
        """Return the map (H, W) of ``kind`` "labelIds" or "instanceIds", and its path."""
        path = str(self.gt_dir / f"{key}_gtFine_{kind}.png")
        return read_label_map(path), path

    def unpredicted(self, records: Mapping[Hashable, Any], kind: str) -> list[str]:
        """Return the images of ``gt_dir`` that have no record, and warn of them."""
        ending = f"_gtFine_{kind}.png"
        every = [
            p.relative_to(self.gt_dir).as_posix().removesuffix(ending)
            for p in sorted(self.gt_dir.glob(f"*/*{ending}"))
        ]
        missing = [key for key in every if key not in records]
        if missing:
            logger.warning("%d of %d images were not predicted", len(missing), len(every))
        return missing


@dataclass(frozen=True)
class _Overlaps:
    """Annotated and predicted instances of one class in one image."""

    ids: np.ndarray  # (G,), below 1000 for a group without borders between its members
    sizes: np.ndarray  # (G,) pixels
    scores: np.ndarray  # (P,)
    pixels: np.ndarray  # (P,)
    void: np.ndarray  # (P,) pixels on what is not evaluated
    shared: np.ndarray  # (P, G) pixels


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """AP of masks over IoU 0.50 to 0.95 by Cityscapes' definition, in percent.

    ``AP`` and ``AP50`` are means over the classes with ground truth; ``AP-<class>`` and
    ``AP50-<class>`` follow, NaN without ground truth. Images that were not predicted count, as
    images in which nothing was found.

    Args:
        dataset_name: registered dataset with the metadata ``gt_dir`` and ``thing_classes``, whose
            names are Cityscapes'.
        output_dir: unused; nothing is written.
        prediction_key: key of the model's output dict with ``Instances`` that have ``pred_masks``
            (R, H, W), ``pred_classes`` and ``scores``.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        prediction_key: str = "instances",
    ):
        super().__init__(dataset_name, output_dir=output_dir)
        self.class_names = list(self.metadata.get("thing_classes") or INSTANCE_CLASSES)
        for name in self.class_names:
            if name not in INSTANCE_CLASSES:
                raise UserError(
                    f"class {name!r} of {dataset_name!r} is not one of Cityscapes' "
                    f"{', '.join(INSTANCE_CLASSES)}{nearest(name, INSTANCE_CLASSES)}"
                )
        self.prediction_key = prediction_key

    def record(self, image: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, _Overlaps]:
        instances = self.output_of(output, self.prediction_key).to("cpu")
        if not instances.has("pred_masks"):
            raise UserError(
                f"the model predicts no masks, which {self.dataset_name!r} is evaluated by; "
                "give it a mask head"
            )
        check_classes(instances, num_classes=len(self.class_names), dataset_name=self.dataset_name)
        ids, path = self.truth(self.key(image), "instanceIds")
        found = []
        for k, score, mask in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), instances.pred_masks
        ):
            mask = mask.numpy() != 0
            check_size(mask, ids, path)
            covered = np.bincount(ids[mask], minlength=1)
            # An empty mask says nothing, right or wrong.
            if covered.any():
                found.append((self.class_names[k], score, covered))
        return _overlaps(ids, found)

    def summarize(self, records: Mapping[Hashable, Any]) -> dict[str, dict[str, float]]:
        images = list(records.values())
        for key in self.unpredicted(records, "instanceIds"):
            images.append(_overlaps(self.truth(key, "instanceIds")[0], []))
        table = np.array(
            [
                [_average_precision([i[name] for i in images], t) for t in _THRESHOLDS.tolist()]
                for name in INSTANCE_CLASSES
            ]
        )
        metrics = {"AP": mean_of_defined(table), "AP50": mean_of_defined(table[:, 0])}
        metrics |= {f"AP-{n}": float(row.mean()) for n, row in zip(INSTANCE_CLASSES, table)}
        metrics |= {f"AP50-{n}": float(row[0]) for n, row in zip(INSTANCE_CLASSES, table)}
        return {"segm": {key: 100 * value for key, value in metrics.items()}}


def _overlaps(ids: np.ndarray, found: list[tuple[str, float, np.ndarray]]) -> dict[str, _Overlaps]:
    """Return the overlaps of each class.

    Args:
        ids: (H, W), label id * 1000 + number for an instance, label id for a group.
        found: class, score and pixels on each of ``ids`` (by id; ids beyond the end have none).
    """
    counts = np.bincount(ids.reshape(-1), minlength=max(VOID_IDS) + 1)
    present = np.flatnonzero(counts)
    result = {}
    for name in INSTANCE_CLASSES:
        label = LABEL_IDS[name]
        own = present[np.where(present < 1000, present, present // 1000) == label]
        of_class = [(score, covered) for n, score, covered in found if n == name]
        shape = (len(of_class), len(own))
        padded = [np.pad(c, (0, len(counts) - len(c))) for _, c in of_class]
        result[name] = _Overlaps(
            ids=own,
            sizes=counts[own],
            scores=np.array([score for score, _ in of_class], dtype=float),
            pixels=np.array([c.sum() for c in padded], dtype=np.int64),
            void=np.array([c[list(VOID_IDS)].sum() for c in padded], dtype=np.int64),
            shared=np.array([c[own] for c in padded], dtype=np.int64).reshape(shape),
        )
    return result


def _average_precision(images: Iterable[_Overlaps], threshold: float) -> float:
    """Area below the precision-recall curve of one class; NaN without ground truth."""
    right, wrong, objects = [], [], 0
    for image in images:
        hits, misses = _judge(image, threshold)
        right.append(hits)
        wrong.append(misses)
        objects += np.count_nonzero(_must_be_found(image))
    if not objects:
        return float("nan")
    scores = np.concatenate(right + wrong)
    is_right = np.arange(len(scores)) < sum(map(len, right))
    order = np.argsort(-scores, kind="stable")
    # Equal scores make one point of the curve: it is read after the last of them.
    last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]
    hits = np.cumsum(is_right[order])[last]
    precision = np.append(1.0, hits / (np.flatnonzero(last) + 1))
    recall = np.append(0.0, hits / objects)
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2))


def _must_be_found(image: _Overlaps) -> np.ndarray:
    return (image.ids >= 1000) & (image.sizes >= MIN_PIXELS)


def _judge(image: _Overlaps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the right and of the wrong predictions; others do not count."""
    union = image.pixels[:, None] + image.sizes[None] - image.shared
    over = image.shared / union > threshold
    # Annotated instances are disjoint: above one half a prediction can match only one of them.
    hits = over[:, _must_be_found(image)]
    ranked = np.where(hits, image.scores[:, None], -np.inf)
    matched = hits.any(axis=0)
    best = ranked.argmax(axis=0)[matched] if len(ranked) else np.zeros(0, dtype=int)
    is_right = np.zeros(len(image.scores), dtype=bool)
    is_right[best] = True
    # A prediction that matches nothing is forgiven if it mostly lies on void, on groups or on tiny
    # instances; a group that is tiny counts twice, as in cityscapesScripts.
    forgiving = (image.ids < 1000).astype(np.int64) + (image.sizes < MIN_PIXELS)
    forgiven = image.void + image.shared @ forgiving
    is_wrong = ~over.any(axis=1) & (forgiven / image.pixels <= threshold)
    is_wrong |= hits.any(axis=1) & ~is_right
    return image.scores[is_right], image.scores[is_wrong]
