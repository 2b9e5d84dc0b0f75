"""Label maps of several models beside the ground truth.

Letters: H and W the image's size, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from matplotlib.figure import Figure

from d2dense.data.reading import read_image, read_sem_seg
from d2dense.errors import UserError
from d2dense.evaluation.sem_seg import Confusion, class_map, class_scores, mean_of_defined
from d2dense.inference.visualize import class_colour

from .figures import make_folder, save_picture, write_json, write_table

__all__ = ["compare_label_maps"]

_WIDTH = 2.2  # of a picture, in inches
_IGNORED = 255
_NO_CLASS = (0.12, 0.12, 0.12)  # ignored pixels and those without a prediction


def compare_label_maps(
    predictions: Mapping[str, Iterable[Mapping[str, Any]]],
    records: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    output: str | Path,
) -> list[Path]:
    """Draw ``label_maps.png``, a row per image: the image, the ground truth, and what every model
    predicts, with the mean IoU over the image's own classes; ``label_maps.csv`` has those numbers,
    ``summary.json`` their mean.

    Args:
        predictions: by the name above their column, the model's output for each record.
        records: of a dataset with label maps.
        metadata: of that dataset; its ``stuff_classes`` are the K classes.

    Raises:
        UserError: no label maps, or a model for other classes.
    """
    count = len(metadata.get("stuff_classes") or ())
    if not count or any("sem_seg_file_name" not in record for record in records):
        raise UserError(
            f"dataset {metadata.get('name')!r} has no label maps; name one of a sem_seg task"
        )
    columns = ("image", "ground truth", *predictions)
    images = [read_image(dict(record), "BGR") for record in records]
    heights = [_WIDTH * len(image) / image.shape[1] + 0.3 for image in images]
    figure = Figure(figsize=(_WIDTH * len(columns), sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(records), len(columns), squeeze=False)
    palette = _palette(metadata, count)
    rows = []
    streams = {name: iter(each) for name, each in predictions.items()}
    for axes, record, image in zip(grid, records, images):
        truth = read_sem_seg(dict(record), image, _IGNORED).astype(np.int64)
        axes[0].imshow(image[:, :, ::-1])
        axes[1].imshow(palette[np.minimum(truth, count)])
        for place, (name, outputs) in zip(axes[2:], streams.items()):
            labels = next(outputs)["sem_seg"]
            found = class_map(labels, count, no_class=_IGNORED, source=metadata.name)
            score = _mean_iou(truth, found, count)
            place.imshow(palette[found])
            place.set_xlabel(f"mIoU {score:.1f}", fontsize=7)
            rows.append((record["file_name"], name, f"{score:.2f}"))
    for place in grid.flat:
        place.set_xticks([])
        place.set_yticks([])
    for place, title in zip(grid[0], columns):
        place.set_title(title, fontsize=9)
    folder = make_folder(output)
    means = {
        name: float(np.mean([float(score) for _, model, score in rows if model == name]))
        for name in predictions
    }
    return [
        save_picture(folder / "label_maps.png", figure, dpi=110),
        write_table(folder / "label_maps.csv", ("image", "model", "mIoU"), rows),
        write_json(folder / "summary.json", {"images": len(records), "mean_mIoU": means}),
    ]


def _palette(metadata: Metadata, count: int) -> np.ndarray:
    """Return the colours (K + 1, 3), RGB in 0 to 1; the last one is that of no class."""
    colours = [class_colour(metadata, k, "stuff")[::-1] for k in range(count)]
    return np.array([*(np.array(colours) / 255), _NO_CLASS])


def _mean_iou(truth: np.ndarray, found: np.ndarray, count: int) -> float:
    """Return the mean over the classes in ``truth``, in percent; NaN if there is none."""
    matrix = np.zeros((count, count + 1), dtype=np.int64)
    Confusion(truth, found, count).add_to(matrix)
    return 100 * mean_of_defined(class_scores(matrix)[0])
