"""Learning-rate curves that fvcore and Detectron2 lack, and the object that applies a curve."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler

__all__ = ["CosineAfterWarmup", "LRSchedule", "PolyParamScheduler"]

logger = logging.getLogger(__name__)


class PolyParamScheduler(ParamScheduler):
    """``end_factor + (1 - end_factor) * (1 - progress) ** power``."""

    def __init__(self, *, power: float = 0.9, end_factor: float = 0.0):
        self.power = power
        self.end_factor = end_factor

    def __call__(self, where: float) -> float:
        remaining = max(0.0, 1.0 - where)
        return self.end_factor + (1.0 - self.end_factor) * remaining**self.power


class CosineAfterWarmup(ParamScheduler):
    """A line up to 1, then half a cosine over the rest of the run.

    Args:
        warmup_length: of the line, as a share of the run.
        warmup_factor: where the line starts.
        end_factor: where the cosine ends.
    """

    def __init__(
        self, *, warmup_length: float, warmup_factor: float = 0.0, end_factor: float = 0.0
    ):
        self.warmup_length = warmup_length
        self.warmup_factor = warmup_factor
        self.end_factor = end_factor

    def __call__(self, where: float) -> float:
        if where < self.warmup_length:
            done = where / self.warmup_length
            return self.warmup_factor + (1.0 - self.warmup_factor) * done
        done = (where - self.warmup_length) / max(1.0 - self.warmup_length, 1e-12)
        return self.end_factor + (1.0 - self.end_factor) * (1 + math.cos(math.pi * done)) / 2


class LRSchedule:
    """Set each group's learning rate to its initial one times a curve of the training progress.

    The rate is a function of the iteration alone, so resuming needs no state of the curve. The
    initial rates are always those of the present config: changing them and resuming works.

    Args:
        optimizer: with the initial learning rates in its groups.
        multiplier: progress in [0, 1) -> factor.
        max_iter: iterations of the whole training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, *, max_iter: int
    ):
        self.optimizer = optimizer
        self.multiplier = multiplier
        self.max_iter = max_iter
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.iteration = 0

    def apply(self, iteration: int) -> None:
        """Set the learning rates for the step of ``iteration``, counted from 0."""
        self.iteration = iteration
        factor = self.multiplier(iteration / self.max_iter)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * factor

    @property
    def lr(self) -> float:
        """The largest learning rate of any group at present."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "base_lrs": self.base_lrs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note the iteration; saved initial rates that differ are reported, not used."""
        self.iteration = state["iteration"]
        if list(state["base_lrs"]) != self.base_lrs:
            logger.warning(
                "the checkpoint was trained with initial learning rates %s; going on with %s",
                state["base_lrs"],
                self.base_lrs,
            )
