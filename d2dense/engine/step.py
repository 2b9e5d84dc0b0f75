"""One optimizer step: forward and backward over the accumulated batches, clipping, update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from d2dense.errors import UserError
from d2dense.layers import explained_single_values
from d2dense.solver.optim import GradientClipper

from .guard import StepGuard
from .memory import explained_shortage, training_levers
from .parallel import Replicas, build_parallel
from .settings import RunSettings

__all__ = ["StepResult", "TrainStep"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step leaves behind.

    Attributes:
        losses: name -> detached scalar tensor, the mean over the accumulated batches. They stay on
            their device: reading one waits for it. Empty when the step was left out.
        images: images of this process.
        data_seconds: time spent waiting for the loader.
        applied: the step counts. With float16, loss scaling may have left the update out all the
            same; that is not read, since it would wait for the device.
        stop: some process was asked to stop; the same in all processes.
    """

    losses: dict[str, torch.Tensor]
    images: int
    data_seconds: float
    applied: bool = True
    stop: bool = False


class TrainStep:
    """Run optimizer steps; precision, accumulation, clipping and the guard as the settings say.

    Args:
        model: the bare model; takes a batch and returns a dict of losses (or one loss).
        optimizer: over the model's parameters.
        settings: of the run.
        parallel: how the processes share the model; by default what the settings name.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        settings: RunSettings,
        parallel: Replicas | None = None,
    ):
        self.parallel = parallel or build_parallel(settings)
        self.model = self.parallel.wrap(model)
        self.optimizer = optimizer
        self.levers = training_levers(settings)
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
        self.guard = StepGuard(
            model, policy=settings.non_finite_policy, max_skips=settings.max_skipped_steps
        )
        self.clip = None
        if settings.clip_enabled:
            self.clip = GradientClipper(
                clip_type=settings.clip_type,
                clip_value=settings.clip_value,
                norm_type=settings.clip_norm_type,
            )

    def __call__(
        self, batches: Iterator[list[Any]], *, iteration: int = 0, stop: bool = False
    ) -> StepResult:
        """Take ``accumulation_steps`` batches and update the weights once.

        Args:
            iteration: named in messages.
            stop: this process has been asked to stop; the result says whether any has.

        Raises:
            NonFiniteError: in all processes alike; the weights have not moved.
            UserError: out of memory, with the settings that help; a batch norm with one value.
        """
        data_seconds, images, sums = 0.0, 0, {}
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        for index in range(self.accumulation_steps):
            start = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - start
            images += len(batch)
            is_last = index == self.accumulation_steps - 1
            where = f"in iteration {iteration}"
            with explained_shortage(where, self.levers), explained_single_values():
                losses = self._backward(batch, is_last=is_last, stop=stop)
            for name, loss in losses.items():
                sums[name] = sums[name] + loss if name in sums else loss
        self.parallel.check_gradients()
        verdict = self.guard.decide(self._gradients())
        if verdict.finite:
            with explained_shortage(f"in the optimizer at iteration {iteration}", self.levers):
                self._update()
        else:
            self.guard.leave_out(iteration)
            self.optimizer.zero_grad(set_to_none=True)
        losses = {name: total / self.accumulation_steps for name, total in sums.items()}
        return StepResult(
            losses=losses if verdict.finite else {},
            images=images,
            data_seconds=data_seconds,
            applied=verdict.finite,
            stop=verdict.stop,
        )

    def _backward(self, batch: list[Any], *, is_last: bool, stop: bool) -> dict[str, torch.Tensor]:
        """Add the batch's share to the gradients and return its detached losses."""
        # gradients of all but the last batch only add up locally: one exchange per step
        with nullcontext() if is_last else self.parallel.local_only(self.model):
            with torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ):
                losses = self.model(batch)
            self.guard.watch(losses, batch)
            if is_last:
                self.guard.exchange(stop=stop)
            total = sum(losses.values()) / self.accumulation_steps
            self.scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _gradients(self) -> list[torch.Tensor]:
        # with loss scaling, gradients overflow by design: the scaler leaves out such steps itself
        return [] if self.scaler.is_enabled() else list(self.parallel.gradients(self.optimizer))

    def _update(self) -> None:
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.clip(
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
