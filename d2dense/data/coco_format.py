"""Annotation files in COCO's and LVIS's json layout, read into Detectron2's dataset format."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from d2dense.errors import UserError

__all__ = ["load_coco", "load_lvis", "metadata", "read_categories", "read_json"]

Record = dict[str, Any]


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the content of an annotation file.

    Raises:
        UserError: no such file, not json, or without the lists that COCO's layout has.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read annotation file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"annotation file {path} is not valid json: {error}") from None
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"annotation file {path} has no list {key!r}; expected COCO's layout with 'images',"
                " 'annotations' and 'categories'"
            )
    return content


def read_categories(path: str | Path) -> list[dict[str, Any]]:
    """Return the categories of an annotation file, sorted by id.

    The list is looked for in the file's bytes first, since parsing all of COCO's annotations for
    it takes many seconds.

    Raises:
        UserError: as :func:`read_json`, or categories without id and name.
    """
    categories = _scan_categories(path) or read_json(path)["categories"]
    if not all(isinstance(c, dict) and "id" in c and "name" in c for c in categories):
        raise UserError(f"annotation file {path}: every category needs an 'id' and a 'name'")
    ids = [category["id"] for category in categories]
    if len(set(ids)) != len(ids):
        raise UserError(f"annotation file {path}: two categories share an id; make ids unique")
    if not categories:
        raise UserError(f"annotation file {path}: the list 'categories' is empty")
    return sorted(categories, key=lambda category: category["id"])


def _scan_categories(path: str | Path) -> list[dict[str, Any]] | None:
    """Return the list after the file's only ``"categories"`` key; None where that is unclear."""
    key = b'"categories"'
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(key)
            if start < 0 or data.find(key, start + 1) >= 0:
                return None
            rest = data[start + len(key) : start + len(key) + 4_000_000]
    except (OSError, ValueError):
        return None
    text = rest.decode("utf-8", errors="ignore").lstrip(" \t\r\n:")
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that a file's categories give: names, ids, and LVIS's image counts."""
    categories = read_categories(path)
    found = {
        "thing_classes": [str(category["name"]) for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    if all("image_count" in category for category in categories):
        found["class_image_count"] = [
            {"id": c["id"], "image_count": c["image_count"]} for c in categories
        ]
    return found


def load_coco(json_file: str, image_root: str) -> list[Record]:
    """Return the records of a COCO json, in the order of the image ids.

    Category ids become contiguous in the order of the ids. Objects marked ``ignore`` count as
    crowds. Polygons with fewer than three corners are left out.

    Raises:
        UserError: a file that is not COCO's layout, naming the entry.
    """
    return _load(json_file, image_root, is_lvis=False)


def load_lvis(json_file: str, image_root: str) -> list[Record]:
    """Return the records of an LVIS json; as :func:`load_coco`, with LVIS's lists of categories
    that were checked. Images are found by ``file_name``, or by split folder and name as their
    ``coco_url`` ends.
    """
    return _load(json_file, image_root, is_lvis=True)


def _load(json_file: str, image_root: str, *, is_lvis: bool) -> list[Record]:
    content = read_json(json_file)
    contiguous = {c["id"]: index for index, c in enumerate(read_categories(json_file))}
    objects = defaultdict(list)
    for annotation in content.get("annotations") or ():
        objects[annotation.get("image_id")].append(annotation)
    images = sorted(content["images"], key=lambda image: image["id"])
    in_split = is_lvis and images and not _exists(image_root, images[0].get("file_name"))
    records = []
    for image in images:
        record = {
            "file_name": os.path.join(image_root, _file_name(image, in_split, json_file)),
            "image_id": image["id"],
            **{key: image[key] for key in ("height", "width") if image.get(key)},
        }
        if is_lvis:
            for key in ("not_exhaustive_category_ids", "neg_category_ids"):
                record[key] = image.get(key, [])
        record["annotations"] = [
            _object(annotation, contiguous, json_file) for annotation in objects[image["id"]]
        ]
        records.append(record)
    return records


def _exists(root: str, name: str | None) -> bool:
    return bool(name) and os.path.isfile(os.path.join(root, name))


def _file_name(image: dict[str, Any], in_split: bool, json_file: str) -> str:
    if in_split and "coco_url" in image:
        return "/".join(image["coco_url"].split("/")[-2:])
    if not image.get("file_name"):
        raise UserError(f"{json_file}: image {image.get('id')} has no 'file_name'")
    return image["file_name"]


def _object(
    annotation: dict[str, Any], contiguous: dict[int, int], json_file: str
) -> dict[str, Any]:
    where = f"{json_file}: annotation {annotation.get('id')}"
    category = annotation.get("category_id")
    if category not in contiguous:
        raise UserError(
            f"{where} has category_id {category}, which is not among the file's "
            f"{len(contiguous)} categories; correct the id or add the category"
        )
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(v) for v in box):
        raise UserError(f"{where} has bbox {box!r}, expected numbers [x, y, width, height]")
    result = {
        "bbox": list(box),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous[category],
        "iscrowd": int(bool(annotation.get("iscrowd", 0) or annotation.get("ignore", 0))),
    }
    mask = annotation.get("segmentation")
    if mask:  # an empty one is how many tools write "boxes only"
        result["segmentation"] = _mask(mask, where)
    return result


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _mask(mask: Any, where: str) -> list | dict:
    """Return polygons with three corners or more, or a compressed run-length mask."""
    if isinstance(mask, list):
        return [p for p in mask if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    if isinstance(mask, dict) and {"counts", "size"} <= mask.keys():
        return (
            mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
        )
    raise UserError(f"{where} has a segmentation that is neither polygons nor a run-length mask")
