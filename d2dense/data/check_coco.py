"""Checks of annotation files in COCO's and LVIS's layout; see :mod:`d2dense.data.check`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from d2dense.errors import UserError

from . import annotations as rules
from . import coco_format
from .check import ImageFile, Report, check_images

__all__ = ["check_json", "summarise_records"]

# COCO's limits between small, medium and large objects, in square pixels.
_SMALL, _LARGE = 32**2, 96**2
# Boxes may stick out by rounding.
_TOLERANCE = 1.0


def check_json(
    json_file: str,
    image_root: str,
    *,
    is_lvis: bool = False,
    masks: bool | None = None,
    name: str = "",
    decode: bool = True,
    workers: int = 4,
) -> Report:
    """Check an annotation file and its pictures.

    Args:
        json_file, image_root: the file and the folder of its pictures.
        is_lvis: LVIS's layout.
        masks: whether masks are to be trained, so that missing ones are errors; None if unknown.
        name: what the report is called.
        decode, workers: see :func:`d2dense.data.check.check_images`.

    Raises:
        UserError: the file cannot be read at all.
    """
    report = Report(name or str(json_file))
    if not os.path.isdir(image_root):
        raise UserError(f"image folder {image_root} does not exist; correct the path")
    content = coco_format.read_json(json_file)
    categories = _check_categories(report, content["categories"])
    images = _check_image_entries(report, content["images"])
    annotations = _entries(report, content.get("annotations") or [])
    _check_annotation_ids(report, annotations, images)
    table = _Table()
    for annotation in annotations:
        image = images.get(annotation.get("image_id"))
        if image is not None:
            _check_annotation(report, annotation, image, categories, table)
    _check_masks(report, annotations, masks)
    _check_empty(report, annotations, images)
    _check_loading(report, json_file, image_root, is_lvis, decode, workers)
    table.fill(report, categories)
    report.counts = {"images": len(content["images"]), **report.counts}
    for label, row in zip(categories.values(), report.rows):
        if not row[1]:
            report.add("note", "classes without an instance", label)
    return report


def _check_categories(report: Report, categories: list[Any]) -> dict[int, str]:
    """Return category id to name; report double ids and names, and gaps between ids."""
    names: dict[int, str] = {}
    for category in categories:
        if not coco_format.is_category(category):
            report.add("error", "categories without id or name", _cut(category))
            continue
        if category["id"] in names:
            report.add("error", "category ids used twice", str(category["id"]))
        names[category["id"]] = str(category["name"])
    for label, count in Counter(names.values()).items():
        if count > 1:
            report.add("warning", "category names used twice", label)
    if not names:
        report.add("error", "the file has no categories")
    elif len({type(id_) for id_ in names}) > 1:
        report.add("error", "category ids of two kinds", "some are numbers and some are texts")
    elif sorted(names) != list(range(1, len(names) + 1)):
        report.add(
            "note",
            "category ids have gaps or do not start at 1 (handled)",
            f"{len(names)} categories with ids from {min(names)} to {max(names)}",
        )
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _check_image_entries(report: Report, images: list[dict]) -> dict[Any, dict]:
    """Return image id to entry; report double ids and file names, and missing entries."""
    if not images:
        report.add("error", "the file lists no images")
    by_id: dict[Any, dict] = {}
    files: Counter[str] = Counter()
    for image in images:
        if not coco_format.is_image(image) or not isinstance(
            image.get("file_name") or image.get("coco_url"), str
        ):
            report.add("error", "images without id or file_name", _cut(image))
            continue
        if image["id"] in by_id:
            report.add("error", "image ids used twice", f"image id {image['id']}")
        try:
            if rules.image_size(image) is None:
                report.add("warning", "images without height or width", f"image id {image['id']}")
        except ValueError as error:
            report.add("error", "images of an impossible size", f"image id {image['id']} {error}")
        by_id[image["id"]] = image
        files[image.get("file_name") or image["coco_url"]] += 1
    for file, count in files.items():
        if count > 1:
            report.add("warning", "image files listed more than once", f"{file}: {count} times")
    return by_id


def _entries(report: Report, annotations: Any) -> list[dict]:
    """Return the annotations that are objects naming an image."""
    if not isinstance(annotations, list):
        report.add("error", "'annotations' is not a list", _cut(annotations))
        return []
    kept = []
    for entry in annotations:
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), Hashable):
            kept.append(entry)
        else:
            report.add("error", "annotations that are no objects with an image_id", _cut(entry))
    return kept


def _cut(value: Any) -> str:
    return str(value)[:80]


def _check_annotation_ids(report: Report, annotations: list[dict], images: dict) -> None:
    ids: Counter[Any] = Counter(
        a["id"] if isinstance(a.get("id"), (int, str)) else None for a in annotations
    )
    for key, count in ids.items():
        if key is None:
            report.add("warning", "annotations without an id", f"{count} annotations")
        elif count > 1:
            report.add("warning", "annotation ids used more than once", f"id {key}: {count} times")
    seen: Counter[tuple] = Counter()
    for annotation in annotations:
        if annotation.get("image_id") not in images:
            report.add(
                "warning",
                "annotations of images that the file does not list (left out)",
                f"annotation {annotation.get('id')}: image_id {annotation.get('image_id')}",
            )
        box, mask = annotation.get("bbox"), annotation.get("segmentation")
        category = str(annotation.get("category_id"))
        seen[annotation.get("image_id"), category, str(box), str(mask)] += 1
    for (image, category, box, _), count in seen.items():
        if count > 1:
            report.add(
                "warning",
                "identical annotations",
                f"image {image}, category {category}, bbox {box}: {count} times",
            )


def _check_annotation(
    report: Report, annotation: dict, image: dict, categories: dict[int, str], table: _Table
) -> None:
    """Report what training finds wrong with an annotation, and what it silently mends."""
    where = f"annotation {annotation.get('id')} of {image.get('file_name', image['id'])}"
    category, size = annotation.get("category_id"), _size(image)
    box: Any = annotation.get("bbox")
    marks = rules.crowd_fault(annotation)
    fault = rules.category_fault(category, categories) or marks or rules.box_fault(box, size)
    if fault is not None:
        report.add(fault.level, fault.title, f"{where} {fault.found}")
        if fault.level == "error":
            return
    elif size is not None:
        _check_overhang(report, box, size, where)
    crowd = bool(annotation.get("iscrowd") or annotation.get("ignore"))
    if crowd:
        report.add("note", "crowds (not trained on, ignored in evaluation)")
    table.add(category, image["id"], box, crowd)
    if annotation.get("segmentation"):
        _check_mask(report, annotation["segmentation"], image, where)


def _size(image: dict) -> tuple[int, int] | None:
    try:
        return rules.image_size(image)
    except ValueError:  # reported once, with the image
        return None


def _check_overhang(report: Report, box: list[float], size: tuple[int, int], where: str) -> None:
    x, y, w, h = box
    height, width = size
    if min(x, y) < -_TOLERANCE or x + w > width + _TOLERANCE or y + h > height + _TOLERANCE:
        report.add(
            "warning",
            "boxes partly outside the image (clipped)",
            f"{where}: {box} in {width}x{height}",
        )


def _check_mask(report: Report, mask: Any, image: dict, where: str) -> None:
    fault = rules.mask_fault(mask, _size(image))
    if fault is not None:
        report.add(fault.level, fault.title, f"{where} {fault.found}")
    elif isinstance(mask, dict):
        _check_run_length(report, mask, image, where)


def _check_run_length(report: Report, mask: dict, image: dict, where: str) -> None:
    """Decode a mask of the right form, which training does when it comes to the image."""
    height, width = mask["size"]
    counts = mask["counts"]
    try:
        code = mask_util.frPyObjects(mask, height, width) if isinstance(counts, list) else mask
        covered = rules.run_total(code)
        if covered != height * width:
            raise ValueError(f"its runs have {covered} pixels, not {height * width}")
        empty = not int(mask_util.area(code))
    except ValueError as error:
        title = "run-length masks that cannot be decoded"
        report.add_bad_sample(title, f"{where}: {error}", str(image.get("file_name", image["id"])))
        return
    if empty:
        report.add("warning", "masks without a pixel (left out)", where)


def _check_masks(report: Report, annotations: list[dict], wanted: bool | None) -> None:
    usable = [a for a in annotations if not a.get("iscrowd", 0)]
    without = [a for a in usable if not a.get("segmentation")]
    if not without or wanted is False:
        return
    if len(without) == len(usable) and not wanted:
        report.add("note", "no masks: for box detectors only")
        return
    for annotation in without:
        report.add(
            "error" if wanted else "warning",
            "objects without a mask (training masks would fail)",
            f"annotation {annotation.get('id')} of image {annotation.get('image_id')}",
        )


def _check_empty(report: Report, annotations: list[dict], images: dict[Any, dict]) -> None:
    filled = {a.get("image_id") for a in annotations if not a.get("iscrowd", 0)}
    for key, image in images.items():
        if key not in filled:
            report.add(
                "note",
                "images without an object (left out of training unless asked for)",
                str(image.get("file_name", key)),
            )
    if images and not filled & images.keys():
        report.add("error", "no image has an object to train on")


def _check_loading(
    report: Report, json_file: str, image_root: str, is_lvis: bool, decode: bool, workers: int
) -> None:
    """Read the file as training does, and the pictures where it says they are."""
    load = coco_format.load_lvis if is_lvis else coco_format.load_coco
    try:
        records = load(json_file, image_root)
    except UserError as error:
        report.add("error", "training stops when it reads the file", str(error))
        return
    images = [
        ImageFile(
            r["file_name"], (r["height"], r["width"]) if {"height", "width"} <= r.keys() else None
        )
        for r in records
    ]
    check_images(report, images, decode=decode, workers=workers)


class _Table:
    """Counts per class: instances, images, sizes, crowds."""

    def __init__(self):
        self.instances: Counter[Any] = Counter()
        self.crowds: Counter[Any] = Counter()
        self.sizes: Counter[tuple[Any, str]] = Counter()
        self.images: set[tuple[Any, Any]] = set()

    def add(self, category: Any, image: Any, box: Iterable[float], crowd: bool) -> None:
        """Count one annotation; ``box`` is xywh."""
        if crowd:
            self.crowds[category] += 1
            return
        _, _, width, height = box
        area = width * height
        size = "small" if area < _SMALL else "medium" if area < _LARGE else "large"
        self.instances[category] += 1
        self.sizes[category, size] += 1
        self.images.add((category, image))

    def fill(self, report: Report, categories: dict[Any, str]) -> None:
        """Write totals and one row per class into ``report``."""
        sizes = ("small", "medium", "large")
        total = {size: sum(self.sizes[key, size] for key in categories) for size in sizes}
        report.counts |= {
            "objects": sum(self.instances.values()),
            **{f"{size} boxes": count for size, count in total.items()},
            "crowds": sum(self.crowds.values()),
        }
        images = Counter(category for category, _ in self.images)
        report.header = ("class", "instances", "images", *sizes, "crowds")
        report.rows = [
            (
                name,
                self.instances[key],
                images[key],
                *(self.sizes[key, size] for size in sizes),
                self.crowds[key],
            )
            for key, name in categories.items()
        ]


def summarise_records(report: Report, records: Sequence[dict], classes: list[str]) -> None:
    """Fill the class table of ``report`` from records in Detectron2's format."""
    table = _Table()
    for index, record in enumerate(records):
        objects = record.get("annotations", ())
        for annotation in objects:
            box = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            crowd = bool(annotation.get("iscrowd", 0))
            table.add(annotation["category_id"], index, box, crowd)
        if not any(not a.get("iscrowd", 0) for a in objects):
            report.add(
                "note",
                "images without an object (left out of training unless asked for)",
                record["file_name"],
            )
    report.counts = {"images": len(records)}
    table.fill(report, dict(enumerate(classes)))
