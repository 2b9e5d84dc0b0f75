"""Predictions that an evaluation, a demo or other software saved, read back: lists in COCO's
results format and maps of classes as run-length masks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from d2dense.errors import UserError

__all__ = ["SavedDetection", "SavedRegion", "read_detections", "read_regions", "read_rows"]


@dataclass(frozen=True)
class SavedDetection:
    """One detection of a file.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the original image
        label: contiguous class
        segmentation: COCO's run-length code or polygons; None where the file has none
    """

    box: tuple[float, float, float, float]
    score: float
    label: int
    segmentation: Any = None


@dataclass(frozen=True)
class SavedRegion:
    """The pixels of one class in one image.

    Attributes:
        label: contiguous class
        mask: ``(H, W)`` bool
    """

    label: int
    mask: np.ndarray


def read_rows(path: str | Path) -> list[Any]:
    """Return the predictions of a file: a list, or an object with such a list as ``annotations``.

    Raises:
        UserError: no such file, or another format.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"predictions {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"predictions {path} are not JSON: {error}") from None
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UserError(f"predictions {path} are no list in COCO's results format")
    return rows


def read_detections(
    path: str | Path, dataset: str, images: Collection[Hashable]
) -> dict[Hashable, list[SavedDetection]]:
    """Read rows of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score`` and, if
    there is one, ``segmentation``; return them by image, in the file's order.

    Args:
        dataset: registered name, whose category ids are used.
        images: all image ids of the dataset.

    Raises:
        UserError: no such file, another format, or an image or category that is not in the
            dataset.
    """
    to_class = _classes_by_id(dataset, "thing")
    known = set(images)
    found: dict[Hashable, list[SavedDetection]] = {}
    for number, row in enumerate(read_rows(path)):
        where = f"{path}: prediction {number}"
        box, score, image, category = _fields(row, where)
        _require_known(image, category, known, to_class, where, dataset)
        corners = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        detection = SavedDetection(
            tuple(corners), score, to_class[category], row.get("segmentation")
        )
        found.setdefault(image, []).append(detection)
    return found


def read_regions(
    path: str | Path, dataset: str, images: Collection[Hashable]
) -> dict[Hashable, list[SavedRegion]]:
    """Read rows of ``image_id`` or ``file_name``, ``category_id`` and ``segmentation`` (run-length
    codes), which semantic evaluation writes; return them by image.

    Args, raises: as :func:`read_detections`.
    """
    to_class = _classes_by_id(dataset, "stuff")
    known = {str(image): image for image in images}
    found: dict[Hashable, list[SavedRegion]] = {}
    for number, row in enumerate(read_rows(path)):
        where = f"{path}: prediction {number}"
        try:
            names = [str(row[key]) for key in ("image_id", "file_name") if key in row]
            first = names[0]
            category, code = row["category_id"], row["segmentation"]
            mask = mask_util.decode(code).astype(bool)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{where} is {str(row)[:80]}, expected image_id or file_name, category_id and a "
                "run-length segmentation"
            ) from None
        image = next((known[name] for name in names if name in known), first)
        _require_known(image, category, set(known.values()), to_class, where, dataset)
        found.setdefault(image, []).append(SavedRegion(to_class[category], mask))
    return found


def _classes_by_id(dataset: str, kind: str) -> Mapping[Hashable, int]:
    metadata = MetadataCatalog.get(dataset)
    mapping = metadata.get(f"{kind}_dataset_id_to_contiguous_id")
    if mapping:
        return mapping
    return {k: k for k in range(len(metadata.get(f"{kind}_classes") or ()))}


def _require_known(image, category, images, categories, where: str, dataset: str) -> None:
    if image not in images:
        raise UserError(f"{where} is of image {image!r}, which is not in {dataset}")
    if category not in categories:
        raise UserError(f"{where} is of category {category!r}, which is not in {dataset}")


def _fields(row: Any, where: str) -> tuple[list[float], float, Hashable, Hashable]:
    try:
        box, score = [float(v) for v in row["bbox"]], float(row["score"])
        image, category = row["image_id"], row["category_id"]
        hash((image, category))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where} is {str(row)[:80]}, expected image_id, category_id, bbox and score"
        ) from None
    if len(box) != 4 or not all(map(math.isfinite, (*box, score))):
        raise UserError(f"{where} has bbox {box} and score {score}, expected finite x, y, w, h")
    return box, score, image, category
