"""What must be right before the first step, since a run should not find it out after days."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from d2dense.data import datasets
from d2dense.errors import UserError

if TYPE_CHECKING:
    from .experiment import Experiment

__all__ = ["check_before_training", "check_test_sets"]

logger = logging.getLogger(__name__)

_SAMPLES = 8
# weights, their average, and two moments of the optimizer: what a checkpoint holds at most
_COPIES = 5


def check_before_training(experiment: Experiment, model: nn.Module) -> None:
    """Check what only shows later in a run: test sets, disk space, parameters that train.

    Class counts, training files and weights have been checked by whoever read them.

    Raises:
        UserError: a test set that could not be evaluated, a best-checkpoint metric that none can
            have, or a model without trainable parameters.
    """
    check_test_sets(experiment)
    _check_metric(experiment.settings.best_metric, experiment.test_names)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no trainable parameter; unfreeze some of it")
    _check_space(Path(experiment.settings.output_dir), model)


def check_test_sets(experiment: Experiment) -> None:
    """Check that every test set can be read and that its pictures are where it says.

    A few pictures of each set are looked for, first and last ones among them.

    Raises:
        UserError: missing files, unreadable annotations, or no evaluator for such a set.
    """
    for name in experiment.test_names:
        records = datasets.load_together(name)
        experiment.build_evaluator(name, None)
        missing = [path for path in _sample_files(records) if not os.path.isfile(path)]
        if missing:
            raise UserError(
                f"test set {name!r}: {missing[0]} does not exist ({len(missing)} of "
                f"{min(_SAMPLES, len(records))} pictures looked for are missing); correct the "
                "image folder, DATASETS.CUSTOM.<SLOT>.IMAGES / datasets.<slot>.images"
            )


def _check_metric(metric: str, names: Sequence[str]) -> None:
    """Check what of ``metric`` is known before an evaluation: whether it begins with the name of a
    test set, as it must where there are several.
    """
    if not metric:
        return
    where = f"the best-checkpoint metric {metric!r} (TEST.BEST_METRIC / train.best.metric)"
    if not names:
        raise UserError(
            f"{where} needs a test set; set DATASETS.TEST or dataloader.test.dataset.names"
        )
    if len(names) > 1 and not any(metric.startswith(f"{name}/") for name in names):
        raise UserError(
            f"{where} does not say of which test set; begin it with one of "
            f"{', '.join(f'{name}/' for name in names)}"
        )
    name = f"{names[0]}/"
    if len(names) == 1 and metric.startswith(name) and "/" in metric.removeprefix(name):
        raise UserError(f"{where} names the only test set; leave out {name!r}")


def _sample_files(records: Sequence[dict[str, Any]]) -> list[str]:
    step = max(1, len(records) // _SAMPLES)
    indices = list(range(0, len(records), step))[: _SAMPLES - 1] + [len(records) - 1]
    files = (records[index].get("file_name", "") for index in dict.fromkeys(indices))
    return [path for path in islice(files, _SAMPLES) if path and "://" not in path]


def _check_space(folder: Path, model: nn.Module) -> None:
    """Warn when the next checkpoint may not fit on the disk."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < _COPIES * size:
        logger.warning(
            "%s has %.1f GB free, and a checkpoint of this model takes up to %.1f GB; "
            "SOLVER.CHECKPOINT_KEEP / train.checkpointer.max_to_keep limits how many stay",
            folder,
            free / 1e9,
            _COPIES * size / 1e9,
        )
