"""A figure and the numbers behind it: a PNG with a CSV of the same name beside it, and
``summary.json`` with what a reader wants first.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from d2dense.errors import UserError

__all__ = ["make_folder", "save", "save_picture", "write_json", "write_table"]


def make_folder(path: str | Path) -> Path:
    """Create a folder for results, with its parents.

    Raises:
        UserError: it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be created: {error.strerror}") from error
    return folder


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write rows as CSV.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write JSON, with null for NaN, which JSON does not know.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(_without_nan(content), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def save_picture(path: Path, figure: Figure, *, dpi: int = 150) -> Path:
    """Write the figure as it is.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def save(
    path: Path, figure: Figure, header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> list[Path]:
    """Write a figure, with grids and legends added, and the numbers that it shows.

    Args:
        path: of both files; its ending becomes ``.png`` and ``.csv``.
        header, rows: of the CSV file.

    Returns:
        The picture and the table.
    """
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    return [
        save_picture(path.with_suffix(".png"), figure),
        write_table(path.with_suffix(".csv"), header, rows),
    ]
