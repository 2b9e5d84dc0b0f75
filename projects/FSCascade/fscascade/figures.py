"""The paper's figures, from the files that :func:`fscascade.stage_evaluation.evaluate_stages`
writes.

Each figure is a PNG with a CSV of the plotted numbers beside it.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from d2dense.analyses.figures import make_folder, save, write_json
from d2dense.errors import UserError

__all__ = ["IOUS", "Run", "ap_by_iou", "ap_differences", "confidence", "draw"]

IOUS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
BINS = tuple(round(0.5 + 0.05 * k, 2) for k in range(6))  # edges in IoU of the confidence figure
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """Evaluation of one model by stage.

    Attributes:
        name: in the legend
        ap: per-IoU AP in percent, by stage: ``{"stage1": (10 values), ...}``
        scores: ``(D, 2)`` IoU and score of the last stage's detections
    """

    name: str
    ap: Mapping[str, np.ndarray]
    scores: np.ndarray

    @classmethod
    def read(cls, folder: str | Path, *, name: str = "", task: str = "bbox") -> Run:
        """Read the output folder of an evaluation by stage."""
        folder = Path(folder)
        try:
            results = json.loads((folder / "results.json").read_text())
            with (folder / "confidence.csv").open() as file:
                rows = [(float(row["iou"]), float(row["score"])) for row in csv.DictReader(file)]
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} does not exist; run evaluate_stages.py with --output {folder}"
            ) from None
        for stage, tasks in results.items():
            if task not in tasks:
                raise UserError(f"{folder}/results.json has no {task!r} for {stage}")
        ap = {
            stage: np.array([tasks[task][f"AP@{iou:.2f}"] for iou in IOUS], dtype=float)
            for stage, tasks in results.items()
        }
        return cls(name or folder.name, ap, np.array(rows).reshape(-1, 2))

    @property
    def num_stages(self) -> int:
        return sum(stage.startswith("stage") for stage in self.ap)

    @property
    def last(self) -> np.ndarray:
        """Per-IoU AP of the last stage."""
        return self.ap[f"stage{self.num_stages}"]


def ap_differences(runs: Sequence[Run], baseline: Run | None = None) -> dict[str, np.ndarray]:
    """Return the curves of Figs. 1 and 3: AP of the last stage minus that of the stage before, and
    minus that of the baseline (Faster R-CNN), for every IoU.
    """
    curves = {}
    for run in runs:
        n = run.num_stages
        if n > 1:
            curves[f"{run.name}: stage {n} - stage {n - 1}"] = run.last - run.ap[f"stage{n - 1}"]
        if baseline is not None:
            curves[f"{run.name}: stage {n} - {baseline.name}"] = run.last - baseline.last
    return curves


def ap_by_iou(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Return the curves of Fig. 4: AP of the last two stages at IoU 0.50 to 0.75."""
    return {
        f"{run.name}: stage {k}": run.ap[f"stage{k}"][:6]
        for run in runs
        for k in range(max(run.num_stages - 1, 1), run.num_stages + 1)
    }


def confidence(run: Run) -> list[tuple[float, float, int, float]]:
    """Return (IoU from, IoU to, detections, mean score) of each bin of Fig. 5, NaN if empty."""
    rows = []
    for low, high in itertools.pairwise(BINS):
        inside = (run.scores[:, 0] >= low) & (run.scores[:, 0] < high)
        scores = run.scores[inside, 1]
        rows.append((low, high, len(scores), float(scores.mean()) if len(scores) else float("nan")))
    return rows


def draw(runs: Sequence[Run], output_dir: str | Path, *, baseline: Run | None = None) -> list[Path]:
    """Draw all figures and write their numbers, and ``summary.json`` with each stage's mean AP.

    Args:
        runs: cascades that are compared.
        output_dir: folder, made if missing.
        baseline: what their last stages are measured against, of Figs. 1 and 3 Faster R-CNN.

    Returns:
        All written files.
    """
    folder = make_folder(output_dir)
    files = []
    differences = ap_differences(runs, baseline)
    if differences:
        files += _curves(folder / "ap_differences", differences, "AP difference", zero_line=True)
    files += _curves(folder / "ap_by_iou", ap_by_iou(runs), "AP")
    files += _confidence(folder / "confidence", runs)
    shown = [*runs, baseline] if baseline is not None else runs
    mean = {run.name: {stage: float(v.mean()) for stage, v in run.ap.items()} for run in shown}
    return [*files, write_json(folder / "summary.json", {"AP": mean})]


def _curves(
    path: Path, curves: Mapping[str, np.ndarray], label: str, *, zero_line: bool = False
) -> list[Path]:
    axes = Figure(figsize=(6, 4.5)).add_subplot()
    if zero_line:
        axes.axhline(0.0, color="grey", linewidth=0.8)
    models = list(dict.fromkeys(name.split(":")[0] for name in curves))
    for name, values in curves.items():
        style = _LINE_STYLES[models.index(name.split(":")[0]) % len(_LINE_STYLES)]
        axes.plot(IOUS[: len(values)], values, style, marker="o", markersize=3, label=name)
    axes.set(xlabel="IoU threshold", ylabel=f"{label} (%)")
    count = max(len(values) for values in curves.values())
    rows = [
        [f"{iou:.2f}", *(f"{c[k]:.4f}" for c in curves.values())]
        for k, iou in enumerate(IOUS[:count])
    ]
    return save(path, axes.figure, ["iou", *curves], rows)


def _confidence(path: Path, runs: Sequence[Run]) -> list[Path]:
    axes = Figure(figsize=(6, 4.5)).add_subplot()
    rows = []
    for run in runs:
        shown = run.scores[(run.scores[:, 0] >= BINS[0]) & (run.scores[:, 0] <= BINS[-1])]
        dots = axes.scatter(shown[:, 0], shown[:, 1], s=3, alpha=0.25, linewidths=0)
        bins = confidence(run)
        colour = dots.get_facecolor()[0][:3]
        centres = [(low + high) / 2 for low, high, _, _ in bins]
        axes.plot(centres, [mean for *_, mean in bins], "o-", color=colour, label=run.name)
        rows += [
            [run.name, f"{low:.2f}", f"{high:.2f}", count, f"{mean:.4f}"]
            for low, high, count, mean in bins
        ]
    axes.set(xlabel="IoU with the ground truth", ylabel="score (line: mean per bin)", ylim=(0, 1))
    return save(path, axes.figure, ["model", "iou_from", "iou_to", "detections", "score"], rows)
