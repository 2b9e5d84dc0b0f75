"""A picture of one image per model: what it should find, what it found, and what it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .figures import save_picture
from .quality import Detections, Objects, Qualities

__all__ = ["View", "draw"]

_WIDTH = 4.0  # inches per model
_LETTERS = 0.04  # height of a label in that of the picture
_TRUTH, _FOUND = "red", "blue"


@dataclass(frozen=True)
class View:
    """What is drawn of one model.

    Attributes:
        title: above the picture
        found: its detections and which of them the objects take; those are drawn with (IoU,
            confidence), and the image score in the corner
        gradient: ``(H', W')`` input gradient map, of any size, drawn below
    """

    title: str
    found: tuple[Detections, Qualities] | None = None
    gradient: np.ndarray | None = None


def draw(
    path: Path, image: np.ndarray, objects: Objects, views: Sequence[View], *, dpi: int = 100
) -> Path:
    """Draw the objects in red, detections in blue, and gradient maps as the square root of
    ``g / max(g)``.

    Args:
        image: RGB ``(H, W, 3)``
        objects: its annotations
    """
    height, width = image.shape[:2]
    rows = 1 + any(view.gradient is not None for view in views)
    size = (_WIDTH * len(views), rows * _WIDTH * height / width + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, len(views), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for (top, *below), view in zip(panels.T, views):
        top.imshow(image)
        top.set_title(view.title, fontsize=9)
        for box in objects.boxes:
            _add_box(top, box, _TRUTH)
        if view.found is not None:
            _add_found(top, *view.found)
        if view.gradient is not None:
            largest = view.gradient.max()
            shown = np.sqrt(view.gradient / largest) if largest > 0 else view.gradient
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            below[0].imshow(shown, cmap="inferno", vmin=0, vmax=1, extent=extent)
    return save_picture(path, figure, dpi=dpi)


def _add_box(axes: Axes, box: np.ndarray, colour: str) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1.2))


def _add_found(axes: Axes, found: Detections, qualities: Qualities) -> None:
    for index, iou, score in zip(qualities.detection, qualities.iou, qualities.score):
        if index < 0:
            continue
        box = found.boxes[index]
        _add_box(axes, box, _FOUND)
        corner = (max(box[0], 0), max(box[1], 0))
        at_top = corner[1] < _LETTERS * axes.get_ylim()[0]
        text = f"({iou:.2f}, {score:.2f})"
        _write(axes, corner, text, _FOUND, size=6, va="top" if at_top else "bottom")
    _write(axes, (0, 0), f"{qualities.image_score:.3f}", "black", size=9, va="top")


def _write(axes: Axes, at: tuple[float, float], text: str, colour: str, *, size: int, va="bottom"):
    plate = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.8}
    axes.text(*at, text, color="white", fontsize=size, va=va, ha="left", bbox=plate, clip_on=True)
