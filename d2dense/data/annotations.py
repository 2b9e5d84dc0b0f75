"""What is wrong with one annotation of a COCO or LVIS json, and what happens then.

An *error* is an entry that contradicts itself or the rest of the file, so that nobody can say what
was meant: reading the file ends with one line that names it. A *warning* is an entry that teaches
nothing but is harmless: it is left out, and one line per file says how many were.

=======================================================  =======================================
the entry has                                            what happens
=======================================================  =======================================
a category or image size that does not exist             error
a box that is not four finite numbers                    error
a mask of unknown form, with NaN, or not of the image    error
a box without area or wholly outside the image           left out
polygons with fewer than three corners                   the box stays, with an empty mask
an image that the file does not list                     left out
=======================================================  =======================================

:mod:`d2dense.data.check_coco` reports by the same functions. Evaluation reads the file itself, as
pycocotools does: there a box without area counts as an object that no detection finds.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n
from PIL import Image

from d2dense.errors import UserError

__all__ = [
    "AnnotationReader",
    "Fault",
    "box_fault",
    "category_fault",
    "crowd_fault",
    "image_size",
    "mask_fault",
    "run_total",
]

logger = logging.getLogger(__name__)

# No picture has a side of this many pixels, and no object an edge as far from it: drawing masks
# takes memory for each pixel of an outline.
_FAR = 1_000_000
_POLYGONS = "[[x1, y1, x2, y2, x3, y3, ...], ...]"


@dataclass(frozen=True)
class Fault:
    """What is wrong with an entry.

    Attributes:
        level: ``error`` or ``warning``.
        title: the kind of fault, for lists.
        found: what the entry has and what was expected, to follow "annotation 7".
    """

    level: str
    title: str
    found: str


def category_fault(category: Any, known: Container[Any]) -> Fault | None:
    """Look at a category id; ``known`` holds those of the file."""
    try:
        if category in known:
            return None
    except TypeError:  # a list cannot be looked up
        pass
    return Fault(
        "error",
        "category ids that the file does not list",
        f"has category_id {category!r}, which is not among the file's categories",
    )


def crowd_fault(annotation: dict[str, Any]) -> Fault | None:
    """Look at the marks of a crowd, of which a text such as "0" would count as set."""
    for key in ("iscrowd", "ignore"):
        value = annotation.get(key)
        if value is not None and value not in (0, 1):
            return Fault("error", f"{key} that is not 0 or 1", f"has {key} {value!r}, not 0 or 1")
    return None


def box_fault(box: Any, size: tuple[float, float] | None) -> Fault | None:
    """Look at a box, which should be [x, y, width, height] in pixels.

    Args:
        size: (height, width) of the image; None where the file does not tell.
    """
    total = _total(box) if isinstance(box, list) and len(box) == 4 else None
    if total is None or not math.isfinite(total) or _is_far(box):
        return Fault(
            "error",
            "boxes that are not four numbers" if total is None else "boxes with NaN or infinity",
            f"has bbox {_short(box)}, expected four finite numbers [x, y, width, height]",
        )
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return Fault("warning", "boxes without area (left out)", f"has bbox {box}")
    if size is not None and (x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0):
        return Fault(
            "warning",
            "boxes wholly outside the image (left out)",
            f"has bbox {box} in an image of {size[1]}x{size[0]}",
        )
    return None


def mask_fault(mask: Any, size: tuple[float, float] | None) -> Fault | None:
    """Look at a ``segmentation`` that is not empty; arguments as in :func:`box_fault`."""
    if isinstance(mask, list):
        return _polygon_fault(mask)
    if isinstance(mask, dict) and {"counts", "size"} <= mask.keys():
        return _run_length_fault(mask, size)
    return _unknown_form(mask)


def _polygon_fault(polygons: list[Any]) -> Fault | None:
    totals = [_total(polygon) if isinstance(polygon, list) else None for polygon in polygons]
    numbers = [total for total in totals if total is not None]
    if len(numbers) < len(totals):
        return _unknown_form(polygons)
    if len(polygons) > 2 and all(len(polygon) == 2 for polygon in polygons):
        return _unknown_form(polygons)
    if not math.isfinite(sum(numbers)) or any(map(_is_far, polygons)):
        return Fault(
            "error",
            "segmentations with NaN or infinity",
            "has a segmentation with NaN, infinity or numbers beyond any picture, expected "
            f"{_POLYGONS}",
        )
    if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
        return Fault(
            "warning",
            "polygons with fewer than three corners (left out)",
            f"has segmentation {_short(polygons)}",
        )
    return None


def _run_length_fault(mask: dict[str, Any], size: tuple[float, float] | None) -> Fault | None:
    own, counts = mask["size"], mask["counts"]
    if not isinstance(own, list) or len(own) != 2 or not all(type(n) is int for n in own):
        return _unknown_form(mask)
    if min(own) < 1 or not _is_possible(*own):
        return Fault(
            "error",
            "run-length masks of an impossible size",
            f"has a run-length mask of {own[1]}x{own[0]} (width x height)",
        )
    if size is not None and list(size) != own:
        return Fault(
            "error",
            "run-length masks of another size than the image",
            f"has a run-length mask of {own[1]}x{own[0]} in an image of {size[1]}x{size[0]}",
        )
    if isinstance(counts, list):
        fits = all(type(n) is int and n >= 0 for n in counts) and sum(counts) == own[0] * own[1]
    else:  # decoding takes long; the mapper does it
        fits = isinstance(counts, str) and bool(counts)
    if fits:
        return None
    return Fault(
        "error",
        "run-length masks that cannot be decoded",
        f"has a run-length mask whose counts do not add up to its size {own[1]}x{own[0]}",
    )


def _unknown_form(mask: Any) -> Fault:
    return Fault(
        "error",
        "segmentations of an unknown form",
        "has a segmentation that is neither polygons nor a run-length mask, expected "
        f'{_POLYGONS} or {{"size": [height, width], "counts": ...}}: {_short(mask)}',
    )


def run_total(mask: dict[str, Any]) -> int:
    """Return how many pixels the runs of a compressed run-length mask cover.

    pycocotools leaves the pixels behind the last run as they were in memory, so a mask is right
    only where this is its whole size.

    Raises:
        ValueError: the text is not a run-length code.
    """
    counts = mask["counts"]
    text = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    code = text.astype(np.int64) - 48
    if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        raise ValueError("its counts are not a run-length code")
    # groups of five bits, the lowest first; the sixth bit says that more follow
    last = np.flatnonzero(code & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    place = np.arange(len(code)) - np.repeat(first, last - first + 1)
    if place.max() > 7:
        raise ValueError("its counts are not a run-length code")
    runs = np.add.reduceat((code & 31) << (5 * place), first)
    runs -= np.where(code[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    # from the fourth on, each is written as the difference to the last but one
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError("its counts are not a run-length code")
    return int(runs.sum())


def image_size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of an image's entry, None where it does not tell both.

    Raises:
        ValueError: they are not positive whole numbers, or those of no picture that can be read.
    """
    sizes: tuple[Any, Any] = image.get("height"), image.get("width")
    for value in sizes:
        if value and (not isinstance(value, (int, float)) or value < 1 or value != value // 1):
            raise ValueError(
                f"has height {sizes[0]!r} and width {sizes[1]!r}, expected numbers of pixels"
            )
    if not all(sizes):
        return None
    if not _is_possible(*sizes):
        raise ValueError(f"has height {sizes[0]!r} and width {sizes[1]!r}, more than can be read")
    return int(sizes[0]), int(sizes[1])


def _is_possible(height: float, width: float) -> bool:
    """Whether a picture of this size can be read: not what PIL takes for an attack."""
    most = Image.MAX_IMAGE_PIXELS
    return max(height, width) <= _FAR and (most is None or height * width <= 2 * most)


def _is_far(values: list[float]) -> bool:
    return bool(values) and (max(values) > _FAR or min(values) < -_FAR)


def _total(values: list[Any]) -> float | None:
    """Return the sum, which is finite only if all are; None where one is not a number."""
    try:
        return math.fsum(values)
    except ValueError:  # infinity minus infinity
        return math.nan
    except (TypeError, OverflowError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class AnnotationReader:
    """Turns the annotations of one file into Detectron2's objects; see the module for the policy.

    Args:
        json_file: the file, for messages.
        contiguous: category id in the file -> class number.
    """

    def __init__(self, json_file: str, contiguous: dict[Any, int]):
        self.json_file = json_file
        self.contiguous = contiguous
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def read(
        self, annotation: dict[str, Any], image: dict[str, Any], size: tuple[int, int] | None
    ) -> dict[str, Any] | None:
        """Return the object, or None where it is left out.

        Args:
            size: (height, width) of the image, None where the file does not tell.

        Raises:
            UserError: an error in the sense of this module.
        """
        category = annotation.get("category_id")
        box: Any = annotation.get("bbox")  # looked at by box_fault
        fault = (
            category_fault(category, self.contiguous)
            or crowd_fault(annotation)
            or box_fault(box, size)
        )
        if fault is not None:
            self.note(fault, annotation, image)
            return None
        result = {
            "bbox": list(box),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": self.contiguous[category],
            "iscrowd": int(bool(annotation.get("iscrowd") or annotation.get("ignore"))),
        }
        mask = annotation.get("segmentation")
        if mask:  # an empty one is how many tools write "boxes only"
            fault = mask_fault(mask, size)
            if fault is not None:
                self.note(fault, annotation, image)
            result["segmentation"] = _usable(mask)
        return result

    def note(self, fault: Fault, annotation: dict[str, Any], image: dict[str, Any]) -> None:
        """Count a warning; raise a :class:`UserError` for an error. The message names the
        ``annotation`` and the ``image`` by their COCO records.
        """
        where = f"(image {image.get('id')}, {image.get('file_name', 'no file_name')})"
        found = f"annotation {annotation.get('id')} {fault.found} {where}"
        if fault.level == "error":
            raise UserError(
                f"{self.json_file}: {found}; correct or remove it "
                "(tools/check_dataset.py lists every such entry)"
            )
        self.left_out[fault.title] += 1
        self.first.setdefault(fault.title, found)

    def note_unlisted(self, annotations: list[dict[str, Any]]) -> None:
        """Count annotations of an image that the file does not list."""
        title = "annotations of images that the file does not list (left out)"
        self.left_out[title] += len(annotations)
        one = annotations[0]
        found = f"annotation {one.get('id')} has image_id {one.get('image_id')}"
        self.first.setdefault(title, found)

    def warn(self) -> None:
        """Log one line about everything that was left out; the same line only once per process."""
        if self.left_out:
            kinds = (
                f"{count} {title}, the first: {self.first[title]}"
                for title, count in self.left_out.items()
            )
            # the file is read again for every evaluation
            log_first_n(logging.WARNING, f"{self.json_file}: {'; '.join(kinds)}", key="message")


def _usable(mask: Any) -> list | dict:
    """Return polygons with three corners or more, or a compressed run-length mask."""
    if isinstance(mask, list):
        return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if isinstance(mask["counts"], list):
        return mask_util.frPyObjects(mask, *mask["size"])
    return mask
