"""Predicted instances as one COCO-format file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data.catalog import Metadata

from d2dense.evaluation.detections import detections

from .selection import best_classes, class_name, class_names

__all__ = ["CocoResults", "to_coco"]


class CocoResults:
    """Predictions in the form of a COCO annotation file, each annotation with a score.

    ``pycocotools`` opens it, and its ``annotations`` alone are a COCO results list. Category ids
    are the dataset's own where the metadata tells them, else 1 + the class index. Masks are kept
    as run-length codes, so that a long video fits into memory.
    """

    def __init__(self, metadata: Metadata):
        to_dataset = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        self._category_ids = {index: category for category, index in to_dataset.items()}
        self._metadata = metadata
        self._classes = set(range(len(class_names(metadata, "thing"))))
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, file_name: str, height: int, width: int, output: dict[str, Any]) -> None:
        """Add a picture with the model's output for it (without ``instances``: no annotation). The
        best classes of a whole picture are kept beside its name, as ``classes``.

        Args:
            height, width: of the picture in pixels, which boxes and masks of ``output`` refer to.
        """
        image_id = len(self.images) + 1
        self.images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        if "class_scores" in output:
            self.images[-1]["classes"] = [
                {"class": k, "name": name, "score": score}
                for k, name, score in best_classes(output["class_scores"], self._metadata)
            ]
        if "instances" not in output:
            return
        for found in detections(output["instances"].to("cpu")):
            self._classes.add(found["class"])
            annotation = {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": self._category_id(found["class"]),
                "bbox": [round(value, 3) for value in found["bbox"]],
                "area": _area(found),
                "iscrowd": 0,
                "score": found["score"],
            }
            if "segmentation" in found:
                annotation["segmentation"] = found["segmentation"]
            self.annotations.append(annotation)

    def content(self) -> dict[str, Any]:
        """Return ``images``, ``annotations`` and ``categories``."""
        categories = [
            {"id": self._category_id(index), "name": class_name(self._metadata, index, "thing")}
            for index in sorted(self._classes)
        ]
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }

    def write(self, path: str | Path) -> None:
        """Write the content to ``path``, creating its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content()))

    def _category_id(self, index: int) -> int:
        return self._category_ids.get(index, index + 1)


def to_coco(results: Iterable[dict[str, Any]], metadata: Metadata) -> dict[str, Any]:
    """Return predictions as the content of a COCO file, see :class:`CocoResults`.

    Args:
        results: one dict per picture: ``file_name``, ``height``, ``width`` and ``output``.
        metadata: class names.
    """
    collected = CocoResults(metadata)
    for result in results:
        collected.add(**result)
    return collected.content()


def _area(found: dict[str, Any]) -> float:
    """Pixels of the mask, or of the box where there is no mask."""
    if "segmentation" in found:
        return float(mask_util.area(found["segmentation"]))
    return round(found["bbox"][2] * found["bbox"][3], 3)
