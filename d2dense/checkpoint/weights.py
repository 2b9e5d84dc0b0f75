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

from . import conversion, files
from .rows import KeptRows

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
        misshaped: (name, shape in the file, shape in the model); they keep their values.
        partial: (name, rows that were loaded, rows of the model).
        share: how much of the model's parameters was loaded, from 0 to 1.
    """

    path: str
    used: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    share: float
    partial: tuple[tuple[str, int, int], ...] = ()

    def log(self) -> None:
        """Log one line of counts and one per kind of name, and tensor, that was not used."""
        total = len(self.used) + len(self.missing) + len(self.misshaped) + len(self.partial)
        logger.info(
            "%s: %d of the model's %d tensors loaded, %.1f %% of its parameters",
            self.path,
            len(self.used),
            total,
            100 * self.share,
        )
        for name, found, expected in self.misshaped:
            logger.warning(
                "%s starts afresh: shape %s in the file, %s in the model", name, found, expected
            )
        for name, rows, of in self.partial:
            logger.warning("%s: %d of its %d rows are the file's", name, rows, of)
        if self.missing:
            logger.warning("not in the file: %s", _shortened(self.missing, 20))
        if self.unexpected:
            logger.warning("not in the model: %s", _shortened(self.unexpected, 20))
        if self.share < 0.5:
            logger.warning(
                "ONLY %.1f %% OF THE MODEL'S PARAMETERS come from %s, the rest is untrained; "
                "unless it is a backbone's file, it is of another model",
                100 * self.share,
                self.path,
            )

    def require_complete(self) -> None:
        """Raise a :class:`UserError` unless every tensor of the model was loaded."""
        if self.misshaped:
            raise UserError(
                f"{self._misshaped()}; use the config it was trained with (number of classes, "
                "widths)"
            )
        if self.missing:
            raise UserError(
                f"{self.path} does not fit the model: it lacks {_shortened(self.missing, 3)}; "
                "use the config it was trained with"
            )

    def _misshaped(self) -> str:
        shapes = [
            f"{name} has shape {found} in the file and {expected} in the model"
            for name, found, expected in self.misshaped
        ]
        return f"{self.path} does not fit the model: {_shortened(shapes, 3)}"

    def require_shapes(self) -> None:
        """Raise a :class:`UserError` where a tensor of the file has another shape in the model."""
        if self.misshaped:
            raise UserError(
                f"{self._misshaped()}; make the number of classes and the widths equal, or start "
                "exactly these tensors afresh with TRAIN.REINIT_MISSHAPED True or "
                "train.reinit_misshaped=true"
            )


def _shortened(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load_weights(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    allow_pickle: bool = False,
    reinit_misshaped: bool = True,
    kept_rows: KeptRows | None = None,
) -> LoadReport:
    """Load the weights of a checkpoint or a bare state dict into ``model`` and log a report.

    Args:
        model: the bare model.
        path: local file or address; where a checkpoint holds averaged weights for evaluation, they
            are what is loaded.
        allow_pickle: see :func:`d2dense.checkpoint.read`.
        reinit_misshaped: tensors of another shape (the predictors of another number of classes)
            keep their values in ``model`` and are reported; False makes them an error before
            anything is loaded. To evaluate, :meth:`LoadReport.require_complete` is the check.
        kept_rows: which rows of such tensors are loaded all the same; None: none.

    Raises:
        UserError: missing, damaged or refused file, a tensor of another shape, not a single
            tensor fits, or a recognised file of another model that is of another variant.
    """
    content = files.read(path, allow_pickle=allow_pickle)
    weights: Mapping[str, torch.Tensor] = _tensors(content["model"], str(path))
    own = model.state_dict()
    if not weights:
        raise UserError(f"{path} holds no weights")
    if content.get("matching_heuristics"):
        caffe2 = content.get("__author__") == "Caffe2"
        try:
            weights = align_and_update_state_dicts(own, weights, c2_conversion=caffe2)
        except (ValueError, LookupError, AssertionError) as error:
            raise UserError(
                f"{path}: its names cannot be matched to the model's: {error}"
            ) from error
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights = _as_own(weights, model, str(path))
    for name, value in weights.items():
        if name in own and value.is_complex() and not own[name].is_complex():
            raise UserError(f"{path}: {name} has complex values, expected {own[name].dtype}")

    partial = _partial(weights, own, kept_rows)
    misshaped = tuple(
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape and name not in partial
    )
    skipped = {name for name, _, _ in misshaped} | set(partial)
    used = {name: value for name, value in weights.items() if name in own and name not in skipped}
    report = LoadReport(
        path=str(path),
        used=tuple(used),
        missing=tuple(_relevant(name for name in own if name not in weights)),
        unexpected=tuple(_relevant(name for name in weights if name not in own)),
        misshaped=misshaped,
        share=_share(model, set(used)),
        partial=tuple((name, rows, len(value)) for name, (value, rows) in partial.items()),
    )
    if not reinit_misshaped:
        report.require_shapes()
    if not used:
        raise UserError(
            f"{path} fits nothing in {type(model).__name__}: the file has "
            f"{_shortened(list(weights), 3)}; the model has {_shortened(list(own), 3)}"
        )
    rows = {name: value for name, (value, _) in partial.items()}
    model.load_state_dict(used | rows, strict=False)
    report.log()
    return report


def _partial(
    weights: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    kept_rows: KeptRows | None,
) -> dict[str, tuple[torch.Tensor, int]]:
    """Return what is loaded in part: the model's tensor with the file's rows, and how many."""
    if kept_rows is None:
        return {}
    shapes = {name: value.shape for name, value in weights.items()}
    other = [name for name in weights if name in own and shapes[name] != own[name].shape]
    found = {name: kept_rows(name, weights[name], own[name]) for name in other}
    return {name: each for name, each in found.items() if each is not None}


def _as_own(
    weights: Mapping[str, torch.Tensor], model: nn.Module, path: str
) -> Mapping[str, torch.Tensor]:
    """Return ``weights`` under the model's names where a source of checkpoints recognises the file
    as another model's (a classifier's, say, whose trunk is the model's).
    """
    source = conversion.recognise(model, weights)
    if source is None:
        return weights
    try:
        found = conversion.convert_with_report(weights, source, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    logger.info(
        "%s is of the kind %s: %d tensors are used, %d left behind (%s), and %d of the model start "
        "afresh",
        path,
        source,
        len(found.weights),
        len(found.unused),
        _shortened(found.unused, 2),
        len(found.missing),
    )
    return found.weights


def _share(model: nn.Module, used: set[str]) -> float:
    """Return the loaded share of the parameters; one with several names counts once."""
    sizes, loaded = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sizes[id(parameter)] = parameter.numel()
        if name in used:
            loaded.add(id(parameter))
    total = sum(sizes.values())
    return sum(sizes[each] for each in loaded) / total if total else 1.0


def _relevant(names) -> list[str]:
    return [
        name
        for name in names
        if name.rpartition(".")[2] not in _FROM_CONFIG and "cell_anchors" not in name
    ]


def _tensors(weights: Mapping, path: str) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a weight is named {name!r}, expected a text")
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        if value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{path}: {name} is a tensor without plain values ({value.layout})")
        result[name] = value
    return result
