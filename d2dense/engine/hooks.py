"""What happens around the steps: checkpoints, evaluation, reports."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from d2dense.errors import UserError, nearest
from d2dense.evaluation import flatten

from .guard import check_loss_scale
from .metrics import max_memory_mb
from .together import decided_by_main

__all__ = ["PeriodicCheckpoint", "PeriodicEvaluation", "PeriodicLog", "StepRecord"]

logger = logging.getLogger(__name__)


class PeriodicCheckpoint(HookBase):
    """Save every ``period`` iterations, when a signal stops the run, and ``model_final`` at the
    end.
    """

    def __init__(self, *, period: int):
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.completed
        if done % self.period == 0:
            self.trainer.save()
        if done == self.trainer.max_iter:
            self.trainer.save("model_final")

    def after_train(self) -> None:
        trainer = self.trainer
        if trainer.preempted:
            # once more where after_step has just saved: an evaluation may have changed the state
            if trainer.completed:
                trainer.save()
        elif trainer.stop_reason and trainer.completed < trainer.max_iter:
            trainer.save("model_final")


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
        self.goal = f"{mode} {metric}"
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.last_done = 0
        self.best: dict[str, Any] = {}
        self.without_best = 0

    def before_train(self) -> None:
        if self.trainer.completed > 0 and self._is_due():
            self._evaluate()
        elif 0 < self.patience <= self.without_best:
            self._stop()  # a resumed run that had stopped early, with the same patience

    def after_step(self) -> None:
        if self._is_due():
            self._evaluate()

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_done": self.last_done,
            "goal": self.goal,
            "best": dict(self.best),
            "without_best": self.without_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_done = state["last_done"]
        # another goal starts with neither a best value nor evaluations that were no better
        if state["goal"] == self.goal:
            self.best = dict(state["best"])
            self.without_best = state["without_best"]

    def _is_due(self) -> bool:
        done = self.trainer.completed
        periodic = self.period > 0 and done % self.period == 0
        return done != self.last_done and (periodic or done == self.trainer.max_iter)

    def _evaluate(self) -> None:
        trainer = self.trainer
        with trainer.paused_clock():
            results = trainer.evaluate()
            if results is None:  # interrupted, in all processes; it is due again after a resume
                trainer.preempt()
                return
            self.last_done = trainer.completed
            # only the main process has results
            value = decided_by_main(lambda: self._record(flatten(results)))
            if value is not None:
                self._judge(value)

    def _record(self, results: dict[str, float]) -> float | None:
        """Put the results into the storage and return the metric that decides, if any."""
        iteration = self.trainer.completed - 1
        for name, value in results.items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False, cur_iter=iteration)
        if not self.metric:
            return None
        if self.metric not in results:
            raise UserError(
                f"the best-checkpoint metric {self.metric!r} is not among the results"
                f"{nearest(self.metric, results)}; found {', '.join(list(results)[:8])}"
            )
        return results[self.metric]

    def _judge(self, value: float) -> None:
        """Save a new best, or stop when there has been none for long; the same in all processes."""
        best_so_far = self.best["value"] if self.best else -self.sign * math.inf
        if self.sign * value > self.sign * best_so_far:  # never true for NaN
            self.best = {"value": value, "iteration": self.trainer.completed - 1}
            self.without_best = 0
            self.trainer.save("model_best", tag=False)
            logger.info("best %s so far: %.4f, saved as model_best.pth", self.metric, value)
            return
        self.without_best += 1
        if 0 < self.patience <= self.without_best:
            self._stop()

    def _stop(self) -> None:
        self.trainer.stop_reason = f"no better {self.metric} in {self.without_best} evaluations"


class StepRecord(HookBase):
    """Put each step's losses into the storage and count what was done since the last report.

    It comes before the other hooks, so that a checkpoint holds the step that it was saved after.
    The losses stay on their device until a report or a checkpoint is due.

    Args:
        window: iterations over which reports smooth.
    """

    def __init__(self, *, window: int):
        self.window = window
        self.loss_names: set[str] = set()
        self.last_report = -1
        self.recent: dict[str, Any] = {}
        self.steps, self.images, self.data_seconds, self.earlier_seconds = 0, 0, 0.0, 0.0

    def before_train(self) -> None:
        self.trainer.storage.restore(self.recent)
        self._start_clock()

    def after_step(self) -> None:
        trainer, result = self.trainer, self.trainer.result
        if result.applied:
            losses = dict(result.losses, total_loss=sum(result.losses.values()))
            self.loss_names.update(losses)
            for name, value in losses.items():
                trainer.storage.put_scalar(name, value)
        self.steps += 1
        self.images += result.images
        self.data_seconds += result.data_seconds

    def flush(self) -> None:
        """Read the waiting values; all processes call this together."""
        self.trainer.storage.flush(averaged=sorted(self.loss_names))

    def seconds(self) -> float:
        """Return the time since the last report, without pauses."""
        paused = self.trainer.paused_seconds - self.paused_before
        return self.earlier_seconds + time.perf_counter() - self.start - paused

    def reported(self) -> None:
        """Start counting anew."""
        self.last_report = self.trainer.completed - 1
        self.steps, self.images, self.data_seconds, self.earlier_seconds = 0, 0, 0.0, 0.0
        self._start_clock()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next report needs of the steps before it."""
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        self.flush()
        return {
            "loss_names": sorted(self.loss_names),
            "last_report": self.last_report,
            "recent": storage.recent(window=self.window, since=self.last_report),
            "steps": self.steps,
            "images": self.images,
            "data_seconds": self.data_seconds,
            "earlier_seconds": self.seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, set(value) if name == "loss_names" else value)

    def _start_clock(self) -> None:
        self.start = time.perf_counter()
        self.paused_before = self.trainer.paused_seconds


class PeriodicLog(HookBase):
    """Report the recorded losses and speeds every ``period`` iterations.

    Args:
        period: iterations between two reports.
        record: collects what is reported.
        build_writers: returns what is called on the main process after the values are in the
            storage; called when the training starts.
    """

    def __init__(
        self, *, period: int, record: StepRecord, build_writers: Callable[[], Sequence[EventWriter]]
    ):
        self.period = period
        self.record = record
        self.build_writers = build_writers
        self.writers: Sequence[EventWriter] = ()

    def before_train(self) -> None:
        self.writers = self.build_writers()
        # the run was stopped after its checkpoint and before the report of the same iteration
        if self.record.steps and self._is_due() and not self.trainer.preempted:
            self._report()

    def after_step(self) -> None:
        # a preempted run reports its last steps when it goes on, as if it had not been stopped
        if self._is_due() and not self.trainer.preempted:
            self._report()

    def after_train(self) -> None:
        if self.record.steps and not self.trainer.preempted:
            self._report()
        for writer in self.writers:
            writer.close()

    def _is_due(self) -> bool:
        done = self.trainer.completed
        return done % self.period == 0 or done == self.trainer.max_iter

    def _report(self) -> None:
        trainer, storage, record = self.trainer, self.trainer.storage, self.record
        record.flush()
        check_loss_scale(trainer.step.scaler, trainer.completed - 1)
        # measured after the flush, which waits for everything the GPU still has to do
        step_seconds = max(record.seconds(), 1e-9) / record.steps
        data_seconds = comm.gather(record.data_seconds / record.steps)
        if comm.is_main_process():
            images = record.images / record.steps * comm.get_world_size()
            values = {
                "lr": trainer.schedule.lr,
                "time": step_seconds,
                "data_time": max(data_seconds),
                "images_per_second": images / step_seconds,
                "eta_seconds": step_seconds * (trainer.max_iter - trainer.completed),
                "max_mem_mb": max_memory_mb(trainer.settings.device),
            }
            for name, value in values.items():
                storage.put_scalar(
                    name, value, smoothing_hint=False, cur_iter=trainer.completed - 1
                )
            for writer in self.writers:
                writer.write()
        record.reported()
