"""Image classification from folders: ``root/<class>/<picture>``, as torchvision's ImageFolder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from d2dense.errors import UserError

from .folders import IMAGE_SUFFIXES

__all__ = ["class_folders", "imagenet_classes", "load_image_folder", "pictures"]

logger = logging.getLogger(__name__)


def class_folders(root: str) -> list[str]:
    """Return the names of the class folders in ``root``, sorted: class k is the k-th of them.
    Hidden folders are none.
    """
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def pictures(folder: str) -> Iterator[str]:
    """Yield the paths of all pictures below ``folder``, sorted within each folder."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(place, name)


def load_image_folder(root: str, *, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return a record for every picture: ``file_name``, ``image_id`` (its path below ``root``) and
    ``label``.

    Args:
        classes: names of the class folders that there must be; None takes those that there are.

    Raises:
        UserError: no class folders, others than ``classes``, or no picture in them.
    """
    found = class_folders(root)
    if not found:
        raise UserError(_without_classes(root))
    if classes is not None and found != sorted(classes):
        raise UserError(_other_classes(root, found, classes))
    records, empty = [], []
    for label, name in enumerate(found if classes is None else classes):
        before = len(records)
        for path in pictures(os.path.join(root, name)):
            image_id = os.path.relpath(path, root)
            records.append({"file_name": path, "image_id": image_id, "label": label})
        if len(records) == before:
            empty.append(name)
    if not records:
        raise UserError(f"no class folder in {root} holds a picture ({', '.join(IMAGE_SUFFIXES)})")
    if empty:
        logger.warning(
            "%d of %d class folders in %s are empty, %s first",
            len(empty),
            len(found),
            root,
            empty[0],
        )
    return records


def imagenet_classes() -> dict[str, list[str]]:
    """Return the metadata of ImageNet-1k: its 1000 folder names in order, and what they mean."""
    from timm.data import ImageNetInfo  # a second of imports that few runs need

    info = ImageNetInfo("imagenet-1k")
    names = info.label_names()
    return {
        "image_classes": names,
        "image_class_titles": [info.label_name_to_description(name) for name in names],
    }


def _without_classes(root: str) -> str:
    count = sum(1 for _ in pictures(root))
    there = f"{count} pictures but no class folder" if count else "no class folder"
    return (
        f"{root} holds {there}; put the pictures of each class into a folder of its own, "
        "<folder>/<class>/<picture>"
    )


def _other_classes(root: str, found: Sequence[str], classes: Sequence[str]) -> str:
    missing = [name for name in classes if name not in set(found)]
    extra = [name for name in found if name not in set(classes)]
    parts = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("without", missing), ("with", extra))
        if names
    ]
    return (
        f"{root} has {len(found)} class folders, expected the dataset's {len(classes)}: it is "
        f"{' and '.join(parts)}; use the full dataset, or describe yours in DATASETS.CUSTOM / "
        "datasets with kind = image_folder"
    )
