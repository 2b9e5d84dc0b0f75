"""Pictures of what a mapper feeds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

__all__ = ["draw_sample", "write_sample"]


def draw_sample(
    sample: dict[str, Any], metadata: Metadata, *, image_format: str = "BGR", scale: float = 1.0
) -> np.ndarray:
    """Draw boxes with class names, masks and label maps over the mapped image.

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
    canvas = Visualizer(rgb, metadata=metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    if "sem_seg" in sample:
        canvas.draw_sem_seg(sample["sem_seg"], area_threshold=0, alpha=0.5)
    if "instances" in sample:
        instances = sample["instances"]
        names = metadata.get("thing_classes")
        labels = [
            names[c] if names and c < len(names) else str(c) for c in instances.gt_classes.tolist()
        ]
        masks = instances.gt_masks if instances.has("gt_masks") else None
        if masks is not None:
            masks = getattr(masks, "polygons", getattr(masks, "tensor", None))
        canvas.overlay_instances(labels=labels, boxes=instances.gt_boxes, masks=masks)
    return canvas.output.get_image()


def write_sample(
    sample: dict[str, Any],
    metadata: Metadata,
    folder: str | Path,
    index: int,
    *,
    image_format: str = "BGR",
    scale: float = 1.0,
) -> Path:
    """Draw ``sample`` into ``<folder>/<index>_<file name>.jpg`` and return the path."""
    path = Path(folder, f"{index:04d}_{Path(sample['file_name']).stem}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_sample(sample, metadata, image_format=image_format, scale=scale)
    Image.fromarray(drawn).save(path, quality=92)
    return path
