"""An exported file and the model it came from, evaluated on the same test sets."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig
from tabulate import tabulate

from d2dense.errors import UserError

__all__ = ["evaluate_eager", "largest_difference", "metric_table"]

Results = dict[str, dict[str, dict[str, float]]]


def evaluate_eager(
    cfg: CfgNode | DictConfig,
    *,
    weights: str | os.PathLike | None = None,
    output_dir: str | Path | None = None,
    device: str = "cpu",
) -> Results:
    """Evaluate the model of a config on its test sets, as the config says.

    Args:
        weights: checkpoint; None takes the config's own, see :class:`d2dense.inference.Predictor`.
        output_dir: where evaluators may write predictions.

    Returns:
        what :func:`~d2dense.export.evaluate_exported` does for a file.
    """
    from d2dense.engine.experiment import experiment
    from d2dense.evaluation import evaluate
    from d2dense.inference import Predictor  # needs the data and the projects

    run = experiment(cfg, device=device, training=False)
    folder = None if output_dir is None else str(output_dir)
    results = evaluate(
        Predictor(cfg, weights, device=device).model,
        {name: run.build_test_loader(name) for name in run.test_names},
        {name: run.build_evaluator(name, folder) for name in run.test_names},
    )
    return results or {}  # None of an evaluation that was stopped, which nothing does here


def metric_table(found: Results, expected: Results | None = None) -> str:
    """Return a table of the metrics of whole test sets; with ``expected`` both and the difference.

    Metrics of single classes (``AP-cat``) are left out.
    """
    rows: list[list[Any]] = []
    for name, task, metric, value in _flat(found):
        if "-" in metric:
            continue
        row = [name, task, metric, value]
        if expected is not None:
            other = expected[name][task][metric]
            row += [other, value - other]
        rows.append(row)
    headers = ["test set", "task", "metric", "file"]
    headers += [] if expected is None else ["model", "difference"]
    return tabulate(rows, headers=headers, floatfmt=".3f", tablefmt="github")


def largest_difference(found: Results, expected: Results) -> tuple[float, str]:
    """Return the largest difference of any metric, those of single classes too, and which it is.

    A metric that is NaN in both (a class without objects) is equal; NaN in one is infinitely
    far away.

    Raises:
        UserError: the two have other test sets or metrics.
    """
    a, b = ({entry[:3]: entry[3] for entry in _flat(each)} for each in (found, expected))
    if a.keys() != b.keys():
        only = "/".join(sorted(a.keys() ^ b.keys())[0])
        raise UserError(
            f"the file and the model were not evaluated alike: only one of them has {only}; use "
            "the config that the file was exported from"
        )
    worst, where = 0.0, ""
    for key, value in a.items():
        if math.isnan(value) and math.isnan(b[key]):
            continue
        difference = abs(value - b[key])
        if math.isnan(difference):
            difference = math.inf
        if difference > worst:
            worst, where = difference, "/".join(key)
    return worst, where


def _flat(results: Results) -> list[tuple[str, str, str, float]]:
    return [
        (name, task, metric, value)
        for name, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]
