"""Run a model over test sets and collect the results."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

__all__ = ["evaluate", "flatten", "write_results"]

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, dict[str, float]]]


def evaluate(
    model: nn.Module,
    loaders: Mapping[str, Iterable],
    evaluators: Mapping[str, DatasetEvaluator],
    *,
    should_stop: Callable[[], bool] | None = None,
) -> Results | None:
    """Evaluate ``model`` on every test set; all processes call this together.

    Args:
        model: takes a loader's batch and returns one output dict per image; put in eval mode here
            and back into its own mode afterwards.
        loaders, evaluators: by name of the test set.
        should_stop: asked between batches; a process in which it is true leaves out the rest, and
            then all of them do.

    Returns:
        Test set -> task -> metric -> value in the main process, ``{}`` in all others; None in all
        of them when it was stopped.
    """
    was_training = model.training
    model.eval()
    results: Results = {}
    try:
        for name, loader in loaders.items():
            found = _run(model, name, loader, evaluators[name], should_stop or _never)
            if found is None:
                logger.info("the evaluation of %s was interrupted", name)
                return None
            if comm.is_main_process():
                results[name] = found
                _log_tables(name, found)
    finally:
        model.train(was_training)
    return results


def _never() -> bool:
    return False


def _run(
    model: nn.Module,
    name: str,
    loader: Iterable,
    evaluator: DatasetEvaluator,
    should_stop: Callable[[], bool],
) -> dict[str, dict[str, float]] | None:
    evaluator.reset()
    images, start = 0, time.perf_counter()
    with torch.inference_mode():
        for batch in loader:
            evaluator.process(batch, model(batch))
            images += len(batch)
            if should_stop():
                break
    seconds = time.perf_counter() - start
    logger.info("%s: %d images, %.3f s per image", name, images, seconds / max(images, 1))
    # the evaluator exchanges results: all processes go there, or none
    if any(comm.all_gather(should_stop())):
        return None
    return evaluator.evaluate() or {}


def _log_tables(name: str, tasks: Mapping[str, Mapping[str, float]]) -> None:
    """Log a task's main metrics in one row, IoU thresholds in another, classes in columns."""
    for task, metrics in tasks.items():
        by_iou = {key: value for key, value in metrics.items() if "@" in key}
        classes = [(key, value) for key, value in metrics.items() if "-" in key]
        main = {k: v for k, v in metrics.items() if k not in by_iou and k not in dict(classes)}
        tables = [_table([main.values()], main)]
        if by_iou:
            tables.append(_table([by_iou.values()], by_iou))
        if classes:
            columns = min(3, len(classes))
            rows = [sum(classes[i : i + columns], ()) for i in range(0, len(classes), columns)]
            tables.append(_table(rows, ["class", "value"] * columns))
        logger.info("%s, %s:\n%s", name, task, "\n\n".join(tables))


def _table(rows: Iterable[Iterable[Any]], headers: Iterable[str]) -> str:
    return tabulate(rows, headers=list(headers), floatfmt=".3f", tablefmt="github")


def flatten(results: Results) -> dict[str, float]:
    """Return ``{"test_set/task/metric": value}``; with one test set its name is left out."""
    return {
        "/".join([task, metric] if len(results) == 1 else [name, task, metric]): value
        for name, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }


def write_results(results: Mapping[str, Any], path: str | Path) -> None:
    """Write results as JSON (NaN as JSON's extension NaN), creating the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
