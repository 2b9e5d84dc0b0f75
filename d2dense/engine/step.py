"""One optimizer step: forward and backward over the accumulated batches, clipping, update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2dense.errors import UserError

from .optim import GradientClipper
from .settings import RunSettings

__all__ = ["StepResult", "TrainStep"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step leaves behind.

    Attributes:
        losses: name -> detached scalar tensor, the mean over the accumulated batches. They stay on
            their device: reading one waits for it.
        images: images of this process.
        data_seconds: time spent waiting for the loader.
    """

    losses: dict[str, torch.Tensor]
    images: int
    data_seconds: float


class TrainStep:
    """Run optimizer steps; precision, accumulation and clipping as the settings say.

    Args:
        model: takes a batch and returns a dict of losses (or one loss); possibly wrapped for
            several processes.
        optimizer: over the model's parameters.
        settings: of the run.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, settings: RunSettings
    ):
        self.model = model
        self.optimizer = optimizer
        self.accumulation_steps = settings.accumulation_steps
        self.device_type = torch.device(settings.device).type
        self.amp_dtype = getattr(torch, settings.amp_dtype) if settings.amp_enabled else None
        if self.amp_dtype is torch.float16 and self.device_type == "cpu":
            raise UserError(
                "mixed precision in float16 needs a GPU; on the CPU use bfloat16 "
                "(SOLVER.AMP.DTYPE or train.amp.dtype) or switch it off"
            )
        # Only float16 can underflow; a disabled scaler passes everything through.
        self.scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.amp_dtype is torch.float16
        )
        self.clip = None
        if settings.clip_enabled:
            self.clip = GradientClipper(
                clip_type=settings.clip_type,
                clip_value=settings.clip_value,
                norm_type=settings.clip_norm_type,
            )

    def __call__(self, batches: Iterator[list[Any]]) -> StepResult:
        """Take ``accumulation_steps`` batches and update the weights once."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        images, data_seconds = 0, 0.0
        for index in range(self.accumulation_steps):
            start = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - start
            images += len(batch)
            is_last = index == self.accumulation_steps - 1
            for name, loss in self._backward(batch, synchronise=is_last).items():
                sums[name] = sums[name] + loss if name in sums else loss
        self._update()
        losses = {name: total / self.accumulation_steps for name, total in sums.items()}
        return StepResult(losses=losses, images=images, data_seconds=data_seconds)

    def _backward(self, batch: list[Any], *, synchronise: bool) -> dict[str, torch.Tensor]:
        """Add the batch's share to the gradients and return its detached losses."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        # gradients of all but the last batch only add up locally: one exchange per step
        local = self.model.no_sync() if wrapped and not synchronise else nullcontext()
        with local:
            with torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(batch)
            if isinstance(losses, torch.Tensor):
                losses = {"loss": losses}
            total = sum(losses.values()) / self.accumulation_steps
            self.scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _update(self) -> None:
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.clip(
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
