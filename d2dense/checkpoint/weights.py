"""Weights into a model, with a report of what was used and what was not."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from d2dense.errors import UserError

from . import files

__all__ = ["LoadReport", "load_weights"]

logger = logging.getLogger(__name__)

# Values that come from the config; older files carry them as if they were weights.
_FROM_CONFIG = ("pixel_mean", "pixel_std", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        path: the file.
        used: names that were loaded.
        missing: names of the model that the file lacks; they keep their values.
        unexpected: names in the file that the model lacks.
        misshaped: (name, shape in the file, shape in the model); skipped.
    """

    path: str
    used: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def log(self) -> None:
        """Log one line of counts and one line per kind of name that was not used."""
        total = len(self.used) + len(self.missing) + len(self.misshaped)
        logger.info("%s: %d of the model's %d tensors loaded", self.path, len(self.used), total)
        for name, found, expected in self.misshaped:
            logger.warning("skipped %s: shape %s, the model has %s", name, found, expected)
        if self.missing:
            logger.warning("not in the file: %s", _shortened(self.missing, 20))
        if self.unexpected:
            logger.warning("not in the model: %s", _shortened(self.unexpected, 20))

    def require_complete(self) -> None:
        """Raise a :class:`UserError` unless every tensor of the model was loaded."""
        if self.misshaped:
            name, found, expected = self.misshaped[0]
            more = f" ({len(self.misshaped)} such tensors)" if len(self.misshaped) > 1 else ""
            raise UserError(
                f"{self.path} does not fit the model: {name} has shape {found} in the file and "
                f"{expected} in the model{more}; use the config it was trained with (number of "
                "classes, widths)"
            )
        if self.missing:
            raise UserError(
                f"{self.path} does not fit the model: it lacks {_shortened(self.missing, 3)}; "
                "use the config it was trained with"
            )


def _shortened(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load_weights(
    model: nn.Module, path: str | os.PathLike, *, allow_pickle: bool = False
) -> LoadReport:
    """Load the weights of a checkpoint or a bare state dict into ``model`` and log a report.

    Tensors whose shape differs are reported and skipped, so that a model with another number of
    classes can be fine-tuned; :meth:`LoadReport.require_complete` makes that an error.

    Args:
        model: the bare model.
        path: local file or address; where a checkpoint holds averaged weights for evaluation, they
            are what is loaded.
        allow_pickle: see :func:`d2dense.checkpoint.read`.

    Raises:
        UserError: missing, damaged or refused file, or not a single tensor fits.
    """
    content = files.read(path, allow_pickle=allow_pickle)
    weights = _tensors(content["model"], str(path))
    own = model.state_dict()
    if content.get("matching_heuristics"):
        caffe2 = content.get("__author__") == "Caffe2"
        weights = align_and_update_state_dicts(own, weights, c2_conversion=caffe2)
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}

    misshaped = tuple(
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    )
    skipped = {name for name, _, _ in misshaped}
    used = {name: value for name, value in weights.items() if name in own and name not in skipped}
    if not used:
        raise UserError(
            f"{path} fits nothing in {type(model).__name__}: the file has "
            f"{_shortened(list(weights), 3)}; the model has {_shortened(list(own), 3)}"
        )
    model.load_state_dict(used, strict=False)
    report = LoadReport(
        path=str(path),
        used=tuple(used),
        missing=tuple(_relevant(name for name in own if name not in weights)),
        unexpected=tuple(_relevant(name for name in weights if name not in own)),
        misshaped=misshaped,
    )
    report.log()
    return report


def _relevant(names) -> list[str]:
    return [
        name
        for name in names
        if name.rpartition(".")[2] not in _FROM_CONFIG and "cell_anchors" not in name
    ]


def _tensors(weights: Mapping, path: str) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        result[name] = value
    return result
