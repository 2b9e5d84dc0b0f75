"""From a checkpoint in the output folder back to a run: which file, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils import comm

from d2dense import checkpoint
from d2dense.errors import UserError

from .together import decided_by_main

__all__ = ["check_resumable", "find_checkpoint", "first_line", "with_present_options"]


def find_checkpoint(folder: checkpoint.CheckpointFolder) -> tuple[str | os.PathLike, dict] | None:
    """Return path and content of the checkpoint to resume from, the same in all processes."""
    found = None

    def look() -> str | None:
        nonlocal found
        found = folder.resume()
        return found and str(found[0])

    path = decided_by_main(look)
    if path is None or found is not None:
        return found
    try:
        return path, checkpoint.read(path)
    except UserError as error:
        raise UserError(
            f"process {comm.get_rank()} cannot read the checkpoint that the main process resumes "
            f"from ({error}); all machines need to see the output folder"
        ) from error


def check_resumable(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check that ``state`` is of a run of this program with such an optimizer.

    Raises:
        UserError: it is not; says how to use its weights all the same.
    """
    needed = ("model", "optimizer", "scheduler", "scaler", "iteration", "hooks", "progress")
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(
            f"it lacks {', '.join(missing)}, so another program wrote it; load it as initial "
            "weights instead, with MODEL.WEIGHTS or train.init_checkpoint and without --resume"
        )
    now = type(optimizer).__name__
    before = state.get("optimizer_type", now)
    if before != now:
        raise UserError(
            f"the run was trained with {before}, whose state {now} cannot use; go on with {before} "
            "(SOLVER.OPTIMIZER or optimizer._target_), or load it as initial weights, with "
            "MODEL.WEIGHTS or train.init_checkpoint and without --resume"
        )


def with_present_options(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the saved ``state`` of ``optimizer`` with its present options instead of the saved
    ones, except for the rates, which the schedule sets.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):  # loading it says so
        return dict(state)
    kept = ("params", "lr")
    groups = [
        {**before, **{name: value for name, value in now.items() if name not in kept}}
        for before, now in zip(saved, own)
    ]
    return {**state, "param_groups": groups}


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
