"""The training loop: everything that a run needs, built from an experiment."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2dense import checkpoint
from d2dense.errors import UserError
from d2dense.evaluation import evaluate

from .ema import ModelEMA
from .hooks import PeriodicCheckpoint, PeriodicEvaluation, PeriodicLog
from .metrics import ConsoleWriter, TensorStorage
from .recompute import enable_activation_checkpointing
from .schedule import LRSchedule
from .step import StepResult, TrainStep

if TYPE_CHECKING:
    from .experiment import Experiment

__all__ = ["Trainer", "evaluate_model", "seed_process"]

logger = logging.getLogger(__name__)


def seed_process(seed: int) -> None:
    """Seed Python, numpy and torch, each process differently; -1 draws a seed."""
    seed_all_rng(None if seed < 0 else seed + comm.get_rank())


def evaluate_model(experiment: Experiment, model: nn.Module) -> dict[str, dict]:
    """Evaluate ``model`` on every test set of the experiment.

    Returns:
        Test set -> task -> metric -> value on the main process, ``{}`` on the others.
    """
    names = list(experiment.test_names)
    folder = os.path.join(experiment.settings.output_dir, "inference")
    return evaluate(
        model,
        {name: experiment.build_test_loader(name) for name in names},
        {name: experiment.build_evaluator(name, os.path.join(folder, name)) for name in names},
    )


class Trainer(TrainerBase):
    """Train the model of an experiment as its settings say.

    Detectron2's hooks can be added with ``register_hooks``.

    Args:
        experiment: builds model, loaders, evaluators and optimizer; see
            :class:`d2dense.engine.experiment.Experiment`.
        resume: go on from the last checkpoint in the output folder, where there is one.

    Attributes:
        model: the bare model; ``step.model`` is the one wrapped for several processes.
        completed: optimizer steps taken, over all resumed runs.
        stop_reason: set it (in a hook, on every process alike) to stop after the present step.
        result: what the present step left.
    """

    def __init__(self, experiment: Experiment, *, resume: bool = False):
        super().__init__()
        self.experiment = experiment
        self.settings = settings = experiment.settings
        self.max_iter = settings.max_iter
        self.completed = 0
        self.stop_reason = ""
        self.paused_seconds = 0.0
        self.result: StepResult | None = None
        self.results: dict[str, dict] = {}
        self.folder = checkpoint.CheckpointFolder(
            settings.output_dir, keep=settings.checkpoint_keep
        )
        resume_from = self.folder.last() if resume else None

        seed_process(settings.seed)
        self.model = self._build_model(load=resume_from is None)
        self.optimizer = experiment.build_optimizer(self.model)
        self.schedule = LRSchedule(
            self.optimizer, experiment.build_lr_multiplier(), max_iter=settings.max_iter
        )
        self.step = TrainStep(self._wrap(self.model), self.optimizer, settings=settings)
        self.ema = None
        if settings.ema_enabled:  # after wrapping, which gives all processes the same weights
            self.ema = ModelEMA(self.model, decay=settings.ema_decay, warmup=settings.ema_warmup)
        self.register_hooks(self._build_hooks())
        if resume_from is not None:
            self._resume(resume_from)
        elif resume:
            logger.info("nothing to resume in %s; starting anew", settings.output_dir)

    def train(self) -> dict[str, dict]:
        """Train to the end (or an early stop) and return the last evaluation's results."""
        settings = self.settings
        logger.info(
            "training %s from iteration %d to %d on %s, %d process(es), %s%s",
            type(self.model).__name__,
            self.completed,
            self.max_iter,
            settings.device,
            comm.get_world_size(),
            settings.amp_dtype if settings.amp_enabled else "float32",
            f", {settings.accumulation_steps} batches per step"
            if settings.accumulation_steps > 1
            else "",
        )
        self.model.train()
        self.iter = self.start_iter = self.completed
        # before the clock starts: this may generate or index a data set
        finished = self.completed >= self.max_iter
        loader = None if finished else self.experiment.build_train_loader()
        with TensorStorage(self.start_iter) as self.storage:
            self.before_train()
            if not (finished or self.stop_reason):
                self._loop(_endless(loader))
            self.after_train()
        if self.stop_reason:
            logger.info("stopped after %d iterations: %s", self.completed, self.stop_reason)
        return self.results

    def _loop(self, batches: Iterator[list[Any]]) -> None:
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = iteration
            self.before_step()
            self.schedule.apply(iteration)
            self.result = self.step(batches)
            if self.ema is not None:
                self.ema.update()
            self.completed = iteration + 1
            self.after_step()
            if self.stop_reason:
                return

    def evaluate(self) -> dict[str, dict]:
        """Evaluate the present weights (their average, where the settings say so)."""
        if not self.experiment.test_names:
            return {}
        with self._evaluation_weights():
            _share_buffers(self.model)
            self.results = evaluate_model(self.experiment, self.model)
        return self.results

    def save(self, name: str | None = None, *, tag: bool = True) -> None:
        """Save ``<name>.pth``, or without a name the periodic file of the last iteration."""
        content = self.state_dict()
        if not comm.is_main_process():
            return
        with self.paused_clock():
            if name is None:
                file = self.folder.save_periodic(self.completed - 1, content)
            else:
                file = self.folder.save(name, content, tag=tag)
            logger.info("saved %s", file)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors: the content of a checkpoint.

        ``model`` holds the weights to use (the averages, where they are what is evaluated); then
        ``train_model`` holds those that training goes on from.
        """
        base = super().state_dict()
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "iteration": self.completed - 1,
            "hooks": base.get("hooks", {}),
        }
        if self.ema is not None:
            content["ema"] = self.ema.state_dict()
            if self.settings.ema_eval:
                content["train_model"] = content["model"]
                content["model"] = self.ema.weights
        return content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.model.load_state_dict(state.get("train_model", state["model"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        if state["scaler"] and self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "ema" in state:
                self.ema.load_state_dict(state["ema"])
            else:
                self.ema.reset()
        self.completed = state["iteration"] + 1
        super().load_state_dict({"iteration": self.completed, "hooks": state["hooks"]})

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Keep the time of a ``with`` block out of the reported step time."""
        start, before = time.perf_counter(), self.paused_seconds
        try:
            yield
        finally:
            # blocks may be nested: the outer one has the last word
            self.paused_seconds = before + time.perf_counter() - start

    def _build_model(self, *, load: bool) -> nn.Module:
        settings = self.settings
        model = self.experiment.build_model()
        if load and settings.init_checkpoint:
            checkpoint.load_weights(
                model, settings.init_checkpoint, allow_pickle=settings.allow_pickle
            )
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if settings.activation_checkpointing:
            count = enable_activation_checkpointing(model)
            logger.info("%d modules recompute their activations in backward", count)
        return model

    def _wrap(self, model: nn.Module) -> nn.Module:
        """Compile and distribute as the settings say; the bare model keeps its parameter names."""
        if self.settings.compile:
            model.compile()
        if comm.get_world_size() == 1:
            return model
        on_gpu = torch.device(self.settings.device).type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if on_gpu else None,
            broadcast_buffers=False,
            find_unused_parameters=self.settings.find_unused_parameters,
        )

    def _build_hooks(self) -> list:
        settings = self.settings
        return [
            PeriodicCheckpoint(period=settings.checkpoint_period),
            PeriodicEvaluation(
                period=settings.eval_period,
                metric=settings.best_metric,
                mode=settings.best_mode,
                patience=settings.early_stop_patience,
            ),
            PeriodicLog(period=settings.log_period, writers=self._build_writers()),
        ]

    def _build_writers(self) -> list[EventWriter]:
        if not comm.is_main_process():
            return []
        folder, window = self.settings.output_dir, self.settings.log_period
        os.makedirs(folder, exist_ok=True)
        return [
            ConsoleWriter(max_iter=self.max_iter, window=window),
            JSONWriter(os.path.join(folder, "metrics.json"), window_size=window),
            TensorboardXWriter(folder, window_size=window),
        ]

    def _resume(self, path: os.PathLike) -> None:
        state = checkpoint.read(path)
        try:
            self.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot resume from {path}: it does not fit this config ({_first_line(error)}); "
                "use the config of that run, or load it as initial weights without --resume"
            ) from error
        self.folder.adopt_periodic(until=self.completed - 1)
        logger.info("resumed from %s at iteration %d", path, self.completed)

    def _evaluation_weights(self):
        averaged = self.ema is not None and self.settings.ema_eval
        return self.ema.applied() if averaged else nullcontext()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


def _endless(loader: Iterable) -> Iterator[list[Any]]:
    """Yield batches for ever; a finite loader starts again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("the training loader gives no batch; is the training set empty?")


def _share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers: running statistics differ where norms are local,
    and the main process's are what a checkpoint holds.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
