"""What happens around the steps: checkpoints, evaluation, reports."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from d2dense.errors import UserError, nearest
from d2dense.evaluation import flatten

from .metrics import max_memory_mb

__all__ = ["PeriodicCheckpoint", "PeriodicEvaluation", "PeriodicLog"]

logger = logging.getLogger(__name__)


class PeriodicCheckpoint(HookBase):
    """Save every ``period`` iterations, and ``model_final`` at the end."""

    def __init__(self, *, period: int):
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.completed
        if done % self.period == 0:
            self.trainer.save()
        if done == self.trainer.max_iter:
            self.trainer.save("model_final")

    def after_train(self) -> None:
        if self.trainer.stop_reason and self.trainer.completed < self.trainer.max_iter:
            self.trainer.save("model_final")


class PeriodicEvaluation(HookBase):
    """Evaluate every ``period`` iterations and at the end; keep the best weights; stop early.

    It runs after the checkpoint of the same iteration: a crash in an evaluation loses no training,
    and a run that resumes there repeats the evaluation.

    Args:
        period: 0 evaluates at the end only.
        metric: flattened name of the metric that decides, "" for none.
        mode: ``max`` or ``min``: which values of the metric are better.
        patience: evaluations without a new best after which the training stops, 0 for never.
    """

    def __init__(self, *, period: int, metric: str = "", mode: str = "max", patience: int = 0):
        self.period = period
        self.metric = metric
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.last_done = 0
        self.best: dict[str, Any] = {}
        self.without_best = 0

    def before_train(self) -> None:
        if self.trainer.completed > 0 and self._is_due():
            self._evaluate()

    def after_step(self) -> None:
        if self._is_due():
            self._evaluate()

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_done": self.last_done,
            "best": dict(self.best),
            "without_best": self.without_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_done = state["last_done"]
        self.without_best = state["without_best"]
        if state["best"].get("metric") == self.metric:
            self.best = dict(state["best"])

    def _is_due(self) -> bool:
        done = self.trainer.completed
        periodic = self.period > 0 and done % self.period == 0
        return done != self.last_done and (periodic or done == self.trainer.max_iter)

    def _evaluate(self) -> None:
        self.last_done = self.trainer.completed
        with self.trainer.paused_clock():
            results = self.trainer.evaluate()
            # only the main process has results, and it decides for all
            stop = comm.is_main_process() and self._judge(flatten(results))
            if comm.all_gather(stop)[0]:
                self.trainer.stop_reason = (
                    f"no better {self.metric} in {self.without_best} evaluations"
                )

    def _judge(self, results: dict[str, float]) -> bool:
        """Record the results, save a new best, and tell whether to stop."""
        for name, value in results.items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        if not self.metric:
            return False
        if self.metric not in results:
            raise UserError(
                f"the best-checkpoint metric {self.metric!r} is not among the results"
                f"{nearest(self.metric, results)}; found {', '.join(list(results)[:8])}"
            )
        value = results[self.metric]
        best_so_far = self.best["value"] if self.best else -self.sign * math.inf
        if self.sign * value > self.sign * best_so_far:  # never true for NaN
            self.best = {
                "metric": self.metric,
                "value": value,
                "iteration": self.trainer.completed - 1,
            }
            self.without_best = 0
            self.trainer.save("model_best", tag=False)
            logger.info("best %s so far: %.4f, saved as model_best.pth", self.metric, value)
        else:
            self.without_best += 1
        return 0 < self.patience <= self.without_best


class PeriodicLog(HookBase):
    """Collect each step's losses and write them every ``period`` iterations.

    The losses of a step stay on their device; they are read, and averaged over the processes, only
    when a report is due.

    Args:
        period: iterations between two reports.
        writers: called on the main process after the values are in the storage.
    """

    def __init__(self, *, period: int, writers: Sequence[EventWriter]):
        self.period = period
        self.writers = writers
        self.loss_names: set[str] = set()

    def before_train(self) -> None:
        self._restart()

    def after_step(self) -> None:
        trainer = self.trainer
        result = trainer.result
        losses = dict(result.losses, total_loss=sum(result.losses.values()))
        self.loss_names.update(losses)
        for name, value in losses.items():
            trainer.storage.put_scalar(name, value)
        self.steps += 1
        self.images += result.images
        self.data_seconds += result.data_seconds
        if trainer.completed % self.period == 0 or trainer.completed == trainer.max_iter:
            self._report()

    def after_train(self) -> None:
        if self.steps:
            self._report()
        for writer in self.writers:
            writer.close()

    def _restart(self) -> None:
        self.start = time.perf_counter()
        self.paused_before = self.trainer.paused_seconds
        self.steps, self.images, self.data_seconds = 0, 0, 0.0

    def _report(self) -> None:
        trainer, storage = self.trainer, self.trainer.storage
        storage.flush(averaged=sorted(self.loss_names))
        # measured after the flush, which waits for everything the GPU still has to do
        paused = trainer.paused_seconds - self.paused_before
        step_seconds = (time.perf_counter() - self.start - paused) / self.steps
        data_seconds = comm.gather(self.data_seconds / self.steps)
        if comm.is_main_process():
            images = self.images / self.steps * comm.get_world_size()
            values = {
                "lr": trainer.schedule.lr,
                "time": step_seconds,
                "data_time": max(data_seconds),
                "images_per_second": images / step_seconds,
                "eta_seconds": step_seconds * (trainer.max_iter - trainer.completed),
                "max_mem_mb": max_memory_mb(trainer.settings.device),
            }
            for name, value in values.items():
                storage.put_scalar(name, value, smoothing_hint=False)
            for writer in self.writers:
                writer.write()
        self._restart()
