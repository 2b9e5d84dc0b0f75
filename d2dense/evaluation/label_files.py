"""Files of a semantic evaluation: the confusion matrix for people and for spreadsheets, and label
maps as benchmarks want them.

Letters: K classes, H and W of an image.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["write_confusion", "write_label_map"]

_INCHES_PER_CLASS = 0.16
_MAX_NUMBERED = 25  # with more classes the shares would not be legible


def write_confusion(folder: str | Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Write ``confusion_matrix.csv``, pixels by true class (rows) and predicted class (columns, the
    last one for none), and ``confusion_matrix.png``, the shares of each row.

    Args:
        matrix: (K, K + 1) pixels.
        names: of the K classes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["truth \\ predicted", *names, "(none)"])
        rows.writerows([name, *row] for name, row in zip(names, matrix.tolist()))
    _draw_confusion(folder / "confusion_matrix.png", matrix[:, :-1], matrix.sum(axis=1), names)


def _draw_confusion(
    path: Path, matrix: np.ndarray, totals: np.ndarray, names: Sequence[str]
) -> None:
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(totals, 1)[:, None]
    side = 3 + _INCHES_PER_CLASS * len(names) * (2 if len(names) <= _MAX_NUMBERED else 1)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    ticks: dict[str, Any] = {"labels": list(names), "fontsize": 7}
    axes.set_xticks(range(len(names)), **ticks, rotation=90)
    axes.set_yticks(range(len(names)), **ticks)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if len(names) <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(shares >= 0.005)):
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            axes.text(
                column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=color
            )
    figure.colorbar(picture, ax=axes, label="share of the true class's pixels", shrink=0.6)
    figure.savefig(path, dpi=110)


def write_label_map(path: str | Path, values: np.ndarray) -> None:
    """Write (H, W) uint8 or uint16 as a grey PNG, whole or not at all; two processes may write the
    same one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(values).save(part, format="PNG")
    part.replace(path)
