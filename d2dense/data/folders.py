"""Semantic segmentation from two folders: pictures, and label maps with class numbers."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from d2dense.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "class_names", "ignore_label", "load_semantic_folder", "pair_files"]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def class_names(classes: str | Path | tuple[str, ...], where: str) -> list[str]:
    """Return class names given as a tuple, a json file (a list, or an object with ``classes``) or a
    text file with one name per line.

    Raises:
        UserError: no such file, not of that form, or no names.
    """
    if isinstance(classes, tuple):
        return list(classes)
    path = Path(classes).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where}: cannot read class list {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{where}: class list {path} is not text in UTF-8") from None
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: class list {path} is not valid json: {error}") from None
        names = names.get("classes") if isinstance(names, dict) else names
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{where}: class list {path} holds no list of names")
    return names


def ignore_label(classes: str | Path | tuple[str, ...], where: str) -> int:
    """Return the ``ignore_label`` that a json class file states beside its ``classes``, else 255.

    Raises:
        UserError: it is no number. A file that cannot be read is :func:`class_names`'s to report.
    """
    if isinstance(classes, tuple) or Path(classes).suffix != ".json":
        return 255
    try:
        content = json.loads(Path(classes).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return 255
    label = content.get("ignore_label", 255) if isinstance(content, dict) else 255
    if not isinstance(label, int) or isinstance(label, bool) or abs(label) >= 2**31:
        raise UserError(f"{where}: ignore_label in {classes} is {label!r}, expected a whole number")
    return label


def pair_files(
    images: str,
    labels: str,
    *,
    image_suffix: str = "",
    label_suffix: str = ".png",
    split: str = "",
) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Match pictures and label maps by their path below the folders, endings aside.

    Args:
        split: a text file with the paths that belong to the dataset, one per line and without
            endings; empty: all do.

    Returns:
        Pairs (picture, label map) sorted by path; pictures without a label map; label maps without
        a picture.

    Raises:
        UserError: the list cannot be read, or names what is in neither folder.
    """
    found = _files(images, (image_suffix,) if image_suffix else IMAGE_SUFFIXES)
    maps = _files(labels, (label_suffix,))
    if split:
        names = _listed(split)
        absent = sorted(names - found.keys() - maps.keys())
        if absent:
            raise UserError(
                f"{split} lists {absent[0]} ({len(absent)} of {len(names)} such names), but there "
                f"is no such picture in {images} and no such label map in {labels}"
            )
        found = {stem: path for stem, path in found.items() if stem in names}
        maps = {stem: path for stem, path in maps.items() if stem in names}
    pairs = [(found[stem], maps[stem]) for stem in sorted(found.keys() & maps.keys())]
    return (
        pairs,
        [found[stem] for stem in sorted(found.keys() - maps.keys())],
        [maps[stem] for stem in sorted(maps.keys() - found.keys())],
    )


def _listed(path: str) -> set[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"cannot read the list of images {path}: {reason}") from None
    return {line.strip() for line in lines if line.strip()}


def _files(root: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Map each file's path below ``root``, ending removed, to its full path."""
    result = {}
    for folder, _, names in os.walk(root):
        for name in names:
            suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
            if suffix is not None:
                path = os.path.join(folder, name)
                result[os.path.relpath(path, root)[: -len(suffix)]] = path
    return result


def load_semantic_folder(
    images: str,
    labels: str,
    *,
    image_suffix: str = "",
    label_suffix: str = ".png",
    ignore_label: int = 255,
    num_classes: int | None = None,
    reduce_zero_label: bool = False,
    label_table: str = "",
    split: str = "",
) -> list[dict[str, Any]]:
    """Return the records of two folders; pictures without a label map are left out with a warning.

    Args:
        num_classes: with it, a label map that holds another class is a bad sample.
        reduce_zero_label: the label maps count classes from 1, and 0 is no class.
        label_table: what their values mean otherwise, see :mod:`d2dense.data.label_tables`.
        split: see :func:`pair_files`.

    Raises:
        UserError: a list that does not fit, or no picture has a label map.
    """
    pairs, without_label, _ = pair_files(
        images, labels, image_suffix=image_suffix, label_suffix=label_suffix, split=split
    )
    if not pairs:
        raise UserError(
            f"no picture in {images} has a label map of the same name ending in {label_suffix!r} "
            f"in {labels} ({len(without_label)} pictures found); check the folders and the suffixes"
        )
    if without_label:
        logger.warning(
            "%d of %d pictures in %s have no label map in %s and are left out",
            len(without_label),
            len(without_label) + len(pairs),
            images,
            labels,
        )
    return [
        {
            "file_name": image,
            "sem_seg_file_name": label,
            "image_id": os.path.splitext(os.path.relpath(image, images))[0],
            "sem_seg_ignore_label": ignore_label,
            **({} if num_classes is None else {"sem_seg_classes": num_classes}),
            **({"sem_seg_reduce_zero_label": True} if reduce_zero_label else {}),
            **({"sem_seg_label_table": label_table} if label_table else {}),
        }
        for image, label in pairs
    ]
