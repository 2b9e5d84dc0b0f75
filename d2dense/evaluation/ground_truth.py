"""Ground truth of a detection dataset, read afresh for every evaluation.

The annotations come from the dataset's ``json_file`` or, without one, from its dicts; nothing is
written to disk or kept between evaluations, so changed annotations are always seen.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

from d2dense.data.annotations import box_fault, crowd_fault, image_size, mask_fault, run_total
from d2dense.data.coco_format import is_image, read_categories, read_json
from d2dense.errors import UserError
from d2dense.evaluation.base import image_key

__all__ = ["GroundTruth", "class_ids", "load_ground_truth", "read_annotations", "require_sizes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of one dataset under ids of our own.

    Ids in files are any integers (with gaps, from 0, even repeated) or texts. Here images count
    from 1 in the order of their ids, classes are the contiguous class + 1, and annotations
    count from 1.
    """

    source: str  # file or dataset, for messages
    image_ids: dict[Hashable, int]  # id in the dataset -> our id
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]] | None  # None: a test set without published annotations
    class_names: list[str]
    class_ids: list[int]  # contiguous class -> category id in the dataset

    @property
    def has_masks(self) -> bool:
        return any(a.get("segmentation") for a in self.annotations or ())

    def coco(self, task: str) -> dict[str, Any]:
        """Return a fresh COCO-layout dict for ``task`` ("bbox" or "segm").

        Raises:
            UserError: masks on images whose size nobody knows.
        """
        if task == "segm":
            require_sizes(self.images, self.source)
        annotations = [dict(a) for a in self.annotations or ()]
        for annotation in annotations:
            if task == "bbox":
                annotation.pop("segmentation", None)
            elif not annotation.get("segmentation"):
                # An object without a mask among objects with masks: nobody can say which mask is
                # right there, so detections inside its box are neither rewarded nor punished.
                x, y, w, h = annotation["bbox"]
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotation["iscrowd"] = 1
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.class_names)]
        return {"images": self.images, "annotations": annotations, "categories": categories}


def require_sizes(images: Iterable[Mapping[str, Any]], source: str | Path) -> None:
    """Raise a UserError unless every image has height and width, which masks are drawn in."""
    for image in images:
        if not (image.get("height") and image.get("width")):
            raise UserError(
                f"image {image.get('file_name', image['id'])!r} of {source} has no height and "
                "width, without which masks cannot be evaluated; add them, or leave 'segm' out of "
                "the tasks"
            )


def class_ids(metadata: Metadata, categories: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Return {category id in the dataset: contiguous class}.

    The metadata's ``thing_dataset_id_to_contiguous_id`` decides; without it classes are numbered in
    the order of their ids, which is what detectron2's loader does.
    """
    mapping = metadata.get("thing_dataset_id_to_contiguous_id")
    if mapping:
        return dict(mapping)
    return {id_: i for i, id_ in enumerate(sorted(category["id"] for category in categories))}


def load_ground_truth(dataset_name: str) -> GroundTruth:
    """Read the annotations of a registered dataset."""
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    if json_file:
        return _from_json(json_file, metadata)
    return _from_dicts(dataset_name, metadata)


def _number_images(images: list[dict[str, Any]]) -> dict[Hashable, int]:
    # COCO's code goes through images in the order of their ids, and equal scores are ranked in the
    # order in which they are met; keeping that order keeps its results to the last digit.
    return {id_: i + 1 for i, id_ in enumerate(sorted({image["id"] for image in images}))}


def _first_ids(mapping: Mapping[int, int]) -> list[int]:
    """Invert ``mapping``; of categories merged into one class, the lowest id speaks for it."""
    lowest: dict[int, int] = {}
    for id_, contiguous in sorted(mapping.items()):
        lowest.setdefault(contiguous, id_)
    if sorted(lowest) != list(range(len(lowest))):
        raise UserError(
            f"thing_dataset_id_to_contiguous_id maps to {sorted(lowest)}, not to 0 to "
            f"{len(lowest) - 1}; give the classes contiguous numbers"
        )
    return [lowest[contiguous] for contiguous in range(len(lowest))]


def read_annotations(path: str | Path) -> dict[str, Any]:
    """Return the content of an annotation file for evaluation.

    What makes a box without area or outside of its image count is left as it is; what contradicts
    itself, or would have native code read numbers that are none, is an error as in training.

    Raises:
        UserError: naming the entry.
    """
    raw = read_json(path)
    for image in raw["images"]:
        if not is_image(image):
            raise UserError(f"{path}: an image has no 'id': {str(image)[:80]}")
    sizes = {image["id"]: _size(image, path) for image in raw["images"]}
    if len({type(id_) for id_ in sizes}) > 1:
        raise UserError(f"{path}: some image ids are numbers and some are texts")
    read_categories(path)
    if raw.get("annotations") is None:
        raw.pop("annotations", None)
        return raw
    if not isinstance(raw["annotations"], list):
        raise UserError(f"{path}: 'annotations' is {type(raw['annotations']).__name__}, not a list")
    for annotation in raw["annotations"]:
        _check(annotation, sizes, path)
    return raw


def _size(image: dict[str, Any], path: str | Path) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except ValueError as error:
        raise UserError(f"{path}: image {image['id']} {error}; correct it") from None


def _check(annotation: Any, sizes: Mapping[Any, tuple[int, int] | None], path: str | Path) -> None:
    """Refuse an annotation with an error in the sense of :mod:`d2dense.data.annotations`."""
    if not isinstance(annotation, dict) or not isinstance(annotation.get("image_id", []), Hashable):
        raise UserError(
            f"{path}: an annotation is no object with an image_id: {str(annotation)[:80]}"
        )
    if not isinstance(annotation.get("category_id", []), Hashable):
        raise UserError(f"{path}: an annotation has no category_id: {str(annotation)[:80]}")
    size, mask = sizes.get(annotation["image_id"]), annotation.get("segmentation")
    fault = crowd_fault(annotation) or box_fault(annotation.get("bbox"), size)
    if fault is None or fault.level != "error":
        fault = mask_fault(mask, size) if mask else None
    if fault is not None and fault.level != "error":
        annotation["segmentation"] = []  # nothing that could be drawn
        fault = None
    reason = fault.found if fault is not None else _measure_fault(annotation)
    if reason:
        raise UserError(f"{path}: annotation {annotation.get('id')} {reason}; correct or remove it")


def _measure_fault(annotation: dict[str, Any]) -> str:
    """Return what is wrong with the area or the runs of an annotation, empty for nothing."""
    area, mask = annotation.get("area", 0), annotation.get("segmentation")
    if type(area) not in (int, float) or not 0 <= area < 2**63:
        return f"has area {area!r}, expected a number of pixels"
    if mask and isinstance(mask, dict) and isinstance(mask["counts"], str):
        try:
            covered = run_total(mask)
        except ValueError as error:
            return f"has a run-length mask that cannot be decoded: {error}"
        if covered != mask["size"][0] * mask["size"][1]:
            return f"has a run-length mask of {covered} pixels, but its size is {mask['size']}"
    return ""


def _from_json(path: str | Path, metadata: Metadata) -> GroundTruth:
    raw = read_annotations(path)
    mapping = class_ids(metadata, raw["categories"])
    ids = _first_ids(mapping)
    names = {category["id"]: category["name"] for category in raw["categories"]}
    image_ids = _number_images(raw["images"])
    annotations = None
    if "annotations" in raw:
        annotations = []
        for found in raw["annotations"]:
            # Annotations of images or classes that are not evaluated do not count.
            if found["image_id"] not in image_ids or found.get("category_id") not in mapping:
                continue
            kept = {key: found[key] for key in ("bbox", "area", "segmentation") if key in found}
            kept.setdefault("area", kept["bbox"][2] * kept["bbox"][3])
            kept["id"] = len(annotations) + 1
            kept["image_id"] = image_ids[found["image_id"]]
            kept["category_id"] = mapping[found["category_id"]] + 1
            kept["iscrowd"] = int(found.get("iscrowd") or 0)
            annotations.append(kept)
    return GroundTruth(
        source=str(path),
        image_ids=image_ids,
        images=[{**image, "id": image_ids[image["id"]]} for image in raw["images"]],
        annotations=annotations,
        class_names=list(
            metadata.get("thing_classes") or [str(names.get(id_, id_)) for id_ in ids]
        ),
        class_ids=ids,
    )


def _from_dicts(dataset_name: str, metadata: Metadata) -> GroundTruth:
    dicts = DatasetCatalog.get(dataset_name)
    names = metadata.get("thing_classes")
    if not names:
        raise UserError(f"dataset {dataset_name!r} has no thing_classes in its metadata; set them")
    images = [
        {"id": image_key(d), "height": d.get("height"), "width": d.get("width")} for d in dicts
    ]
    image_ids = _number_images(images)
    annotations = []
    for record, image in zip(dicts, images):
        for found in record.get("annotations", ()):
            box = BoxMode.convert(list(found["bbox"]), found["bbox_mode"], BoxMode.XYWH_ABS)
            kept: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_ids[image["id"]],
                "category_id": int(found["category_id"]) + 1,
                "bbox": [float(value) for value in box],
                "area": float(box[2] * box[3]),
                "iscrowd": int(found.get("iscrowd", 0)),
            }
            if found.get("segmentation") is not None and len(found["segmentation"]):
                code = _run_length_code(found["segmentation"], image)
                kept["segmentation"] = code
                kept["area"] = float(mask_util.area(code))
            annotations.append(kept)
    mapping = metadata.get("thing_dataset_id_to_contiguous_id")
    return GroundTruth(
        source=dataset_name,
        image_ids=image_ids,
        images=[{**image, "id": image_ids[image["id"]]} for image in images],
        annotations=annotations,
        class_names=list(names),
        class_ids=_first_ids(mapping) if mapping else list(range(len(names))),
    )


def _run_length_code(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Compress polygons, a run-length code of any kind, or a bitmask (H, W)."""
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        return mask_util.encode(np.asfortranarray(segmentation, dtype=np.uint8))
    if isinstance(segmentation, Mapping):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return dict(segmentation)
    if not image["height"] or not image["width"]:
        raise UserError(
            f"image {image['id']!r} has polygons but no height and width; add them to its dict"
        )
    polygons = [np.asarray(polygon, dtype=float).reshape(-1).tolist() for polygon in segmentation]
    return mask_util.merge(mask_util.frPyObjects(polygons, image["height"], image["width"]))
