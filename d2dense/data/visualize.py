"""Pictures of what a mapper feeds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

__all__ = ["draw_sample", "write_sample"]


def draw_sample(
    sample: dict[str, Any], metadata: Metadata, *, image_format: str = "BGR", scale: float = 1.0
) -> np.ndarray:
    """Draw boxes with class names, masks, label maps and the class of the whole picture over the
    mapped image.

    Args:
        sample: what a mapper returned.
        metadata: gives the class names.
        image_format: the mapper's channel order.
        scale: enlarges the picture.

    Returns:
        RGB uint8 (H, W, 3).
    """
    image = sample["image"].permute(1, 2, 0).numpy()
    rgb = detection_utils.convert_image_to_rgb(image, image_format)
    # the drawing code would pick colours at random where the metadata has none
    names = metadata.get("stuff_classes") or []
    palette = Metadata().set(stuff_classes=names, stuff_colors=_colors(metadata, "stuff"))
    canvas = Visualizer(rgb, metadata=palette, scale=scale, instance_mode=ColorMode.IMAGE)
    if "sem_seg" in sample:
        canvas.draw_sem_seg(sample["sem_seg"], area_threshold=0, alpha=0.5)
    if "label" in sample:
        names = metadata.get("image_class_titles") or metadata.get("image_classes") or []
        label = sample["label"]
        canvas.draw_text(
            names[label] if label < len(names) else str(label),
            (2, 2),
            horizontal_alignment="left",
        )
    if "instances" in sample:
        instances = sample["instances"]
        classes = instances.gt_classes.tolist()
        names, colors = metadata.get("thing_classes") or [], _colors(metadata, "thing")
        labels = [names[c] if c < len(names) else str(c) for c in classes]
        masks = instances.gt_masks if instances.has("gt_masks") else None
        if masks is not None:
            masks = getattr(masks, "polygons", getattr(masks, "tensor", None))
        canvas.overlay_instances(
            labels=labels,
            boxes=instances.gt_boxes,
            masks=masks,
            assigned_colors=[np.array(colors[c % len(colors)]) / 255 for c in classes],
        )
    return canvas.output.get_image()


def _colors(metadata: Metadata, kind: str) -> list[list[int]]:
    """Return RGB colours by class number, one or more."""
    colors = metadata.get(f"{kind}_colors")
    if colors:
        return [list(color) for color in colors]
    palette = colormap(rgb=True, maximum=255).astype(int).tolist()
    count = max(len(metadata.get(f"{kind}_classes") or ()), 1)
    return [palette[index % len(palette)] for index in range(count)]


def write_sample(
    sample: dict[str, Any],
    metadata: Metadata,
    folder: str | Path,
    index: int,
    *,
    image_format: str = "BGR",
    scale: float = 1.0,
) -> Path:
    """Draw ``sample`` into ``<folder>/<index>_<file name>.jpg`` and return the path.

    Args: as in :func:`draw_sample`.
    """
    path = Path(folder, f"{index:04d}_{Path(sample['file_name']).stem}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_sample(sample, metadata, image_format=image_format, scale=scale)
    Image.fromarray(drawn).save(path, quality=92)
    return path
