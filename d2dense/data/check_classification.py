"""Checks of pictures in a folder per class; see :mod:`d2dense.data.check`."""

from __future__ import annotations

import os
from collections import Counter

from detectron2.data import MetadataCatalog

from . import image_folder
from .check import ImageFile, Report, check_images, load_records
from .classes import dataset_classes

__all__ = ["check_class_folders"]


def check_class_folders(name: str, *, decode: bool = True, workers: int = 4) -> Report:
    """Check a registered dataset of the kind ``image_folder``; arguments as in
    :func:`d2dense.data.check.check_images`.
    """
    report = Report(name)
    records = load_records(report)
    if not records:
        return report
    classes = dataset_classes(name, "image")
    labels = Counter(record["label"] for record in records)
    for label, title in enumerate(classes):
        if not labels[label]:
            report.add("warning", "classes without a picture", title)
    _check_strays(report, MetadataCatalog.get(name).image_root)
    check_images(
        report,
        [ImageFile(record["file_name"]) for record in records],
        decode=decode,
        workers=workers,
    )
    report.counts = {"images": len(records), "classes": len(classes)}
    report.header = ("class", "images", "share %")
    report.rows = [
        (title, labels[label], 100 * labels[label] / len(records))
        for label, title in enumerate(classes)
    ]
    return report


def _check_strays(report: Report, root: str) -> None:
    """Note what lies in the folders but is no picture of a class."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_file() and not entry.name.startswith("."):
                report.add("note", "files outside the class folders (left out)", entry.path)
    for name in image_folder.class_folders(root):
        folder = os.path.join(root, name)
        known = set(image_folder.pictures(folder))
        for place, _, files in os.walk(folder, followlinks=True):
            for file in files:
                path = os.path.join(place, file)
                if path not in known and not file.startswith("."):
                    report.add("warning", "files that are no pictures (left out)", path)
