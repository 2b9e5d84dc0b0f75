"""Curves of runs, drawn from what they logged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2dense.errors import UserError, nearest

__all__ = ["draw", "read_metrics"]

Curves = dict[str, tuple[list[int], list[float]]]


def read_metrics(path: str | Path) -> Curves:
    """Read ``metrics.json`` (or the one in a run's folder).

    Returns:
        Name -> (iterations, values), ascending. Where a resumed run logged an iteration again, its
        later value counts.

    Raises:
        UserError: no such file, or a line that is not JSON (the last one may be cut off).
    """
    path = Path(path)
    path = path / "metrics.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run's output folder or its metrics.json")
    values: dict[str, dict[int, float]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            iteration = row.pop("iteration")
        except (json.JSONDecodeError, KeyError, AttributeError):
            if number == len(lines):
                break  # a run that is being written, or was killed
            raise UserError(f"{path} line {number} is not a row of metrics") from None
        for name, value in row.items():
            values.setdefault(name, {})[iteration] = value
    if not values:
        raise UserError(f"{path} holds no metrics yet")
    return {
        name: ([i for i, _ in sorted(points.items())], [v for _, v in sorted(points.items())])
        for name, points in values.items()
    }


def draw(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    smooth: int = 1,
) -> Path:
    """Draw one panel per metric with one curve per run, and return the path of the picture.

    Args:
        runs: output folders or ``metrics.json`` files.
        output: where to write; the suffix decides the format.
        names: metrics to draw; None takes the losses, the learning rate and the APs.
        smooth: width of a moving average, in logged points.

    Raises:
        UserError: missing files, an unknown metric, or nothing to draw.
    """
    from matplotlib.figure import Figure  # slow to import, and only this function needs it

    if smooth < 1:
        raise UserError(f"--smooth {smooth}: expected 1 or more points")
    curves = {label: read_metrics(run) for label, run in _labels(runs).items()}
    known = sorted({name for each in curves.values() for name in each})
    names = list(names) if names else _default_names(known)
    for name in names:
        if name not in known:
            raise UserError(f"no run logged {name!r}{nearest(name, known)}")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names):
        for label, each in curves.items():
            if name in each:
                iterations, values = each[name]
                marker = "o" if len(iterations) < 20 else None
                panel.plot(iterations, _smoothed(values, smooth), label=label, marker=marker, ms=3)
        panel.set_title(name)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    if len(curves) > 1:
        panels[0].legend()
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a format matplotlib cannot write
        raise UserError(f"cannot write {output}: {error}") from error
    return output


def _labels(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Name each run after its folder, or after its whole path where folders are called the same."""
    paths = [Path(run) for run in runs]
    folders = [path.parent if path.name == "metrics.json" else path for path in paths]
    short = [folder.resolve().name for folder in folders]
    labels = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return dict(zip(labels, paths))


def _default_names(known: Sequence[str]) -> list[str]:
    losses = [name for name in known if "loss" in name and name != "total_loss"]
    scores = [
        name
        for name in known
        if name.rpartition("/")[2] in ("AP", "AP50", "mIoU") or name.endswith("/score")
    ]
    first = [name for name in ("total_loss", "lr") if name in known]
    names = first[:1] + losses + first[1:] + scores
    if not names:
        raise UserError(f"no loss, learning rate or AP was logged; found {', '.join(known)}")
    return names


def _smoothed(values: Sequence[float], width: int) -> np.ndarray:
    """Average each value with up to ``width - 1`` earlier ones."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
