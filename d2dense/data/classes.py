"""The classes of datasets: their names, and in how many images each is."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog

from d2dense.errors import UserError

from . import coco_format, datasets

__all__ = ["class_names", "dataset_classes", "image_counts", "known_classes", "short"]


def dataset_classes(names: str | Sequence[str], kind: str = "thing") -> list[str]:
    """Return the class names of datasets, which must all have the same.

    Args:
        names: one or more registered names.
        kind: ``"thing"`` (objects), ``"stuff"`` (semantic segmentation) or ``"image"``
            (classification).

    Raises:
        UserError: an unknown name, a dataset without such classes, or datasets that differ (custom
            ones whose files do not exist are named first: a wrong path is the likelier mistake).
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no dataset is named; set DATASETS.TRAIN / dataloader.train.dataset.names")
    found = {name: _classes(name, kind) for name in names}
    first = names[0]
    for name, classes in found.items():
        if classes != found[first]:
            for custom in filter(datasets.is_custom, names):
                datasets.ensure(custom)
            raise UserError(
                f"datasets {first!r} and {name!r} have different classes ({short(found[first])}; "
                f"{short(classes)}); train and test sets must have the same: "
                f"{_remedy(names, kind)}"
            )
    return found[first]


def class_names(where: str) -> list[str]:
    """Return the names of the object classes of a registered dataset, or of an annotation file in
    COCO's format.

    Raises:
        UserError: neither of both, or a file without categories.
    """
    if os.path.isfile(where):
        return [str(category["name"]) for category in coco_format.read_categories(where)]
    return dataset_classes(where)


def image_counts(names: str | Sequence[str]) -> list[int]:
    """Return in how many images of datasets each class is: as their categories say, or counted.

    In a run of several processes all of them must call this together.

    Raises:
        UserError: as :func:`dataset_classes`, and where images must be counted as
            :func:`d2dense.data.datasets.load`.
    """
    names = [names] if isinstance(names, str) else list(names)
    total = np.zeros(len(dataset_classes(names)), dtype=np.int64)
    for name in names:
        known = MetadataCatalog.get(name).get("class_image_count")
        if known is None:
            _, category = datasets.load_together(name).categories()
            total += np.bincount(category, minlength=len(total))
        else:  # in the order of the ids, as classes are
            total += [each["image_count"] for each in sorted(known, key=lambda each: each["id"])]
    return total.tolist()


def _remedy(names: list[str], kind: str) -> str:
    customs = set(filter(datasets.is_custom, names))
    if len(customs) == 1 and customs != set(names):
        key = {"thing": "json", "stuff": "labels", "image": "images"}[kind]
        return (
            f"{customs.pop()!r} is the only custom set, no other slot was given: set "
            f"datasets.val.{key} / DATASETS.CUSTOM.VAL.{key.upper()}"
        )
    return "change DATASETS.TRAIN and DATASETS.TEST / dataloader.*.dataset.names"


def known_classes(name: str, kind: str) -> list[str] | None:
    """Return the classes that are known without reading annotations; None where none are, or the
    name is not registered.
    """
    if name not in MetadataCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    if metadata.get("learn_classes") is not None:  # known without the dataset's files
        metadata.set(**metadata.learn_classes())
        del metadata.learn_classes
    classes = metadata.get(f"{kind}_classes")
    return None if classes is None else list(classes)


def _classes(name: str, kind: str) -> list[str]:
    classes = known_classes(name, kind)
    if classes is None:
        datasets.ensure(name)  # says which file is missing
        classes = known_classes(name, kind)
    if classes is None:  # Detectron2's own registrations learn their classes by reading
        datasets.learn_classes(name)
        classes = known_classes(name, kind)
    if classes is None:
        what = {
            "thing": "objects (thing_classes)",
            "stuff": "label maps (stuff_classes)",
            "image": "classes of whole images (image_classes; a folder per class)",
        }[kind]
        raise UserError(f"dataset {name!r} has no {what}; this model needs another kind of dataset")
    return classes


def short(classes: Sequence[str]) -> str:
    """Return the number of classes and the first of their names, for a message."""
    shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return f"{len(classes)}: {shown}"
