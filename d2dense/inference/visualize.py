"""Draw predictions over a picture, fast enough for videos."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from .selection import best_classes, class_name

__all__ = ["class_colour", "draw"]

Colour = tuple[int, int, int]


def draw(
    image: np.ndarray,
    output: dict[str, Any],
    metadata: Metadata,
    *,
    alpha: float = 0.5,
    labels: bool = True,
) -> np.ndarray:
    """Draw label maps, panoptic segments, instances with masks, boxes, names and scores, and the
    best classes of the whole picture.

    Args:
        image: BGR uint8 (H, W, 3); not changed.
        output: the model's output dict for this picture.
        metadata: class names (and ``thing_colors`` / ``stuff_colors``, RGB, where given).
        alpha: opacity of masks and label maps.
        labels: whether to write names and scores.

    Returns:
        BGR uint8 (H, W, 3).
    """
    canvas = np.ascontiguousarray(image).copy()
    if "panoptic_seg" in output:
        segments, infos = output["panoptic_seg"]
        _draw_panoptic(canvas, segments, infos, metadata, alpha, labels)
    elif "sem_seg" in output:
        _draw_semantic(canvas, output["sem_seg"], metadata, alpha, labels)
    # A panoptic map shows its instances already.
    if "instances" in output and "panoptic_seg" not in output:
        _draw_instances(canvas, output["instances"].to("cpu"), metadata, alpha, labels)
    if "class_scores" in output and labels:
        _write_classes(canvas, output["class_scores"], metadata)
    return canvas


def class_colour(metadata: Metadata, index: int, kind: str = "thing") -> Colour:
    """Return the BGR colour of a class: the dataset's own, or one that differs from its
    neighbours'.
    """
    own = metadata.get(f"{kind}_colors")
    if own and index < len(own):
        red, green, blue = own[index]
        return int(blue), int(green), int(red)
    # Steps of the golden ratio spread any number of hues evenly.
    hue = (index * 0.618034 + (0.0 if kind == "thing" else 0.31)) % 1.0
    value = (1.0, 0.8, 0.9)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if kind == "thing" else 0.55, value)
    return int(255 * blue), int(255 * green), int(255 * red)


def _draw_instances(
    canvas: np.ndarray, instances: Instances, metadata: Metadata, alpha: float, labels: bool
) -> None:
    """Paint the worst-scored first, so that the best are seen whole."""
    scores = instances.scores if instances.has("scores") else torch.zeros(len(instances))
    classes = instances.pred_classes.tolist()
    boxes = instances.pred_boxes.tensor.round().int().tolist()
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    order = torch.argsort(scores, stable=True).tolist()
    for i in order:
        colour = class_colour(metadata, classes[i])
        if masks is not None:
            _paint_mask(canvas, masks[i], colour, alpha, outline=True)
        x0, y0, x1, y1 = boxes[i]
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, _thickness(canvas), cv2.LINE_AA)
    for i in order if labels else ():
        text = class_name(metadata, classes[i], "thing")
        if instances.has("scores"):
            text += f" {100 * float(scores[i]):.0f}%"
        _write(canvas, text, (boxes[i][0], boxes[i][1]), class_colour(metadata, classes[i]))


def _draw_semantic(
    canvas: np.ndarray, scores: torch.Tensor, metadata: Metadata, alpha: float, labels: bool
) -> None:
    """Colour every pixel by its best class of ``scores`` (C, H, W); a map (H, W) is taken as is,
    its negative pixels have no class.
    """
    classes = scores.argmax(dim=0) if scores.ndim == 3 else scores
    classes = classes.cpu().numpy()
    for index in np.unique(classes[classes >= 0]).tolist():
        mask = classes == index
        colour = class_colour(metadata, index, "stuff")
        _paint_mask(canvas, mask, colour, alpha)
        if labels:
            _name_region(canvas, mask, class_name(metadata, index, "stuff"), colour)


def _draw_panoptic(
    canvas: np.ndarray,
    segments: torch.Tensor,
    infos: Sequence[dict[str, Any]] | None,
    metadata: Metadata,
    alpha: float,
    labels: bool,
) -> None:
    ids = segments.cpu().numpy()
    if infos is None:
        infos = _segments_from_ids(ids, metadata)
    for number, info in enumerate(infos):
        mask = ids == info["id"]
        if not mask.any():
            continue
        kind = "thing" if info["isthing"] else "stuff"
        colour = class_colour(metadata, info["category_id"], kind)
        if info["isthing"]:  # neighbours of one class differ a little
            blue, green, red = (max(0, c - 25 * (number % 3)) for c in colour)
            colour = (blue, green, red)
        _paint_mask(canvas, mask, colour, alpha, outline=bool(info["isthing"]))
        if labels:
            _name_region(canvas, mask, class_name(metadata, info["category_id"], kind), colour)


def _segments_from_ids(ids: np.ndarray, metadata: Metadata) -> list[dict[str, Any]]:
    """Read the class out of the segment ids, which then are class * label divisor + instance."""
    divisor = metadata.get("label_divisor") or 1000
    things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
    found = [int(i) for i in np.unique(ids) if i >= 0]
    return [
        {"id": i, "category_id": i // divisor, "isthing": i // divisor in things} for i in found
    ]


def _paint_mask(
    canvas: np.ndarray, mask: np.ndarray, colour: Colour, alpha: float, *, outline: bool = False
) -> None:
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if width == 0:
        return
    part, here = mask[y : y + height, x : x + width], canvas[y : y + height, x : x + width]
    tinted = cv2.addWeighted(here, 1 - alpha, np.full_like(here, colour), alpha, 0)
    cv2.copyTo(tinted, part, here)
    if outline:
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(canvas, contours, -1, colour, 1, cv2.LINE_AA)


def _name_region(canvas: np.ndarray, mask: np.ndarray, text: str, colour: Colour) -> None:
    """Write the name where the region is widest, unless it is too small to hold it."""
    padded = np.pad(np.ascontiguousarray(mask, dtype=np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    _, reach, _, (x, y) = cv2.minMaxLoc(distance)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _font_scale(canvas), 1)
    if reach >= height:
        _write(canvas, text, (x - width // 2, y + height), colour)


def _thickness(canvas: np.ndarray) -> int:
    return max(1, round(max(canvas.shape[:2]) / 500))


def _font_scale(canvas: np.ndarray) -> float:
    return max(0.33, max(canvas.shape[:2]) / 1600)


def _write_classes(canvas: np.ndarray, scores: torch.Tensor, metadata: Metadata) -> None:
    """List the best classes in the upper left corner, as many as there is room for."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    for line, (k, name, score) in enumerate(best_classes(scores, metadata), start=1):
        text = f"{name} {100 * score:.0f}%"
        (_, height), base = cv2.getTextSize(text, font, _font_scale(canvas), 1)
        bottom = line * (height + base + 3)
        if bottom > canvas.shape[0] and line > 1:
            return
        _write(canvas, text, (0, bottom), class_colour(metadata, k))


def _write(canvas: np.ndarray, text: str, corner: tuple[int, int], colour: Colour) -> None:
    """Write on a plate whose lower left corner is ``corner``, moved inside the picture."""
    scale, font = _font_scale(canvas), cv2.FONT_HERSHEY_SIMPLEX
    (width, height), base = cv2.getTextSize(text, font, scale, 1)
    plate_height = height + base + 2
    x = min(max(corner[0], 0), max(canvas.shape[1] - width - 3, 0))
    y = min(max(corner[1], plate_height), canvas.shape[0])
    cv2.rectangle(canvas, (x, y - plate_height), (x + width + 3, y), colour, cv2.FILLED)
    # Dark letters on light plates and the other way round.
    blue, green, red = colour
    is_light = 0.114 * blue + 0.587 * green + 0.299 * red > 130
    ink = (0, 0, 0) if is_light else (255, 255, 255)
    cv2.putText(canvas, text, (x + 2, y - base), font, scale, ink, 1, cv2.LINE_AA)
