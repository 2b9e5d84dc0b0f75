"""The training loop: everything that a run needs, built from an experiment."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from d2dense import checkpoint
from d2dense.data.classes import class_names, dataset_classes
from d2dense.errors import UserError
from d2dense.evaluation import evaluate
from d2dense.layers.sync_norm import replace_sync_norms
from d2dense.solver.schedule import LRSchedule
from d2dense.solver.sharded import gathered

from . import random_state
from .ema import ModelEMA
from .guard import NonFiniteError, all_finite
from .hooks import PeriodicCheckpoint, PeriodicEvaluation, PeriodicLog, StepRecord
from .memory import evaluation_levers, explained_shortage, training_levers
from .metrics import TensorStorage, build_writers
from .normalizers import loss_normalizers, set_loss_normalizers
from .parallel import build_parallel
from .progress import Progress
from .recompute import enable_activation_checkpointing
from .resuming import check_resumable, find_checkpoint, first_line, with_present_options
from .saved_state import check_loaded, check_saved
from .scaling import scale_learning_rates, world_change_message
from .signals import Preempted, StopRequest
from .step import StepResult, TrainStep

if TYPE_CHECKING:
    from .experiment import Experiment

__all__ = ["Trainer", "evaluate_model", "load_initial_weights"]

logger = logging.getLogger(__name__)


def evaluate_model(
    experiment: Experiment,
    model: nn.Module,
    *,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, dict] | None:
    """Evaluate ``model`` on every test set of the experiment, leaving the random generators alone.

    Returns:
        Test set -> task -> metric -> value on the main process, ``{}`` on the others; None
        everywhere if ``should_stop`` became true in any process.
    """
    names = list(experiment.test_names)
    folder = os.path.join(experiment.settings.output_dir, "inference")
    with random_state.isolated(), explained_shortage("in the evaluation", evaluation_levers()):
        return evaluate(
            experiment.for_tests(model),
            {name: experiment.build_test_loader(name) for name in names},
            {name: experiment.build_evaluator(name, os.path.join(folder, name)) for name in names},
            should_stop=should_stop,
        )


def load_initial_weights(experiment: Experiment, model: nn.Module) -> checkpoint.LoadReport:
    """Load what the settings say to start from.

    Raises:
        UserError: as :func:`d2dense.checkpoint.load_weights`; classes that are not known.
    """
    settings = experiment.settings
    may_differ = settings.reinit_misshaped or bool(settings.init_classes)
    kept = None
    if settings.init_classes:
        names = dataset_classes(experiment.train_names)
        kept = checkpoint.KeptRows(
            model, file_classes=class_names(settings.init_classes), classes=names
        )
    elif may_differ:
        kept = checkpoint.KeptRows(model)
    return checkpoint.load_weights(
        model,
        settings.init_checkpoint,
        allow_pickle=settings.allow_pickle,
        reinit_misshaped=may_differ,
        kept_rows=kept,
    )


class Trainer(TrainerBase):
    """Train the model of an experiment as its settings say.

    A run that is stopped at any moment and resumed does what it would have done without the stop.
    Detectron2's hooks can be added with :meth:`register_hooks`.

    Args:
        experiment: builds model, loaders, evaluators and optimizer; see
            :class:`d2dense.engine.experiment.Experiment`.
        resume: go on from the last checkpoint in the output folder, where there is one.
        stop_request: what notes stop signals, where it is listening already.

    Attributes:
        model: the bare model; ``step.model`` is what a step calls.
        completed: optimizer steps taken (or left out by the guard), over all resumed runs.
        progress: where the run is in its data.
        resume: whether it was to go on from a checkpoint, found or not.
        stop_reason: set it (in a hook, on every process alike) to stop after the present step.
        stop_request: whether a signal asked this process to stop.
        preempted: the run stops because some process was asked to; the same in all processes.
        result: what the present step left.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        resume: bool = False,
        stop_request: StopRequest | None = None,
    ):
        super().__init__()
        self.experiment = experiment
        self.resume = resume
        self.settings = settings = experiment.settings
        self.max_iter = settings.max_iter
        self.completed = 0
        self.stop_reason = ""
        self.stop_request = StopRequest() if stop_request is None else stop_request
        self.preempted = False
        self.paused_seconds = 0.0
        self.result: StepResult | None = None
        self.results: dict[str, dict] = {}
        self._random: dict[str, Any] | None = None
        self._hook_states: dict[str, Any] = {}
        self.folder = checkpoint.CheckpointFolder(
            settings.output_dir, keep=settings.checkpoint_keep
        )
        found = find_checkpoint(self.folder) if resume else None
        if found is None and comm.is_main_process():
            self.folder.start_anew()

        self.progress = Progress.start(
            settings,
            seed=random_state.resolve_seed(settings.seed),
            world_size=comm.get_world_size(),
        )
        random_state.seed_process(self.progress.seed)
        self.parallel = build_parallel(settings)
        with explained_shortage("while the model was built", training_levers(settings)):
            self._build(load=found is None)
        self.register_hooks(self._build_hooks())
        if found is not None:
            self._resume(*found)
        elif resume:
            logger.info("nothing to resume in %s; starting anew", settings.output_dir)

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """Add hooks; those that a resumed checkpoint has a state of get it back.

        They come after checkpoints and evaluations and before the report of the same iteration. A
        state that is to survive a stop exactly belongs to ``before_step``: what ``after_step`` adds
        is not in the checkpoint of that iteration.
        """
        super().register_hooks(hooks)
        self._hooks.sort(key=lambda hook: isinstance(hook, PeriodicLog))
        for hook in filter(None, hooks):
            state = self._hook_states.pop(type(hook).__qualname__, None)
            if state is not None:
                hook.load_state_dict(state)

    def train(self) -> dict[str, dict]:
        """Train to the end (or an early stop) and return the last evaluation's results.

        Raises:
            Preempted: a signal asked for a stop; everything is saved.
            NonFiniteError: a loss or weight is NaN or infinite; see :mod:`d2dense.engine.guard`.
        """
        settings = self.settings
        logger.info(
            "training %s from iteration %d to %d on %s, %d process(es), %s%s, seed %d",
            type(self.model).__name__,
            self.completed,
            self.max_iter,
            settings.device,
            comm.get_world_size(),
            settings.amp_dtype if settings.amp_enabled else "float32",
            f", {settings.accumulation_steps} batches per step"
            if settings.accumulation_steps > 1
            else "",
            self.progress.seed,
        )
        if self._hook_states:
            logger.warning("no hook takes the saved state of %s", ", ".join(self._hook_states))
        self.model.train()
        self.iter = self.start_iter = self.completed
        storage = TensorStorage(self.start_iter, max_length=max(10_000, 10 * settings.log_period))
        with self.stop_request.listening(), self._same_bits(), storage as self.storage:
            # before the clock starts: this may generate or index a dataset
            finished = self.completed >= self.max_iter
            loader = () if finished else self._build_loader()
            if self._random is not None:
                random_state.restore_process(self._random)
            self.before_train()
            if not (finished or self.stop_reason):
                self._loop(_endless(loader))
            self.after_train()
        if self.stop_reason:
            logger.info("stopped after %d iterations: %s", self.completed, self.stop_reason)
        if self.preempted:
            comm.synchronize()  # nobody leaves before the main process has saved
            raise Preempted(self.stop_reason)
        return self.results

    def _same_bits(self) -> AbstractContextManager:
        """On the CPU, let TorchScript functions (Detectron2's focal loss is one) compute the same
        in their first calls, which it profiles, and in all others. Else a run that resumes differs.
        """
        if torch.device(self.settings.device).type == "cpu":
            return torch.jit.optimized_execution(False)
        return nullcontext()

    def _loop(self, batches: Iterator[list[Any]]) -> None:
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = iteration
            self.before_step()
            self.schedule.apply(iteration)
            self.result = self.step(batches, iteration=iteration, stop=bool(self.stop_request))
            if self.ema is not None and self.result.applied:
                self.ema.update()
            self.completed = iteration + 1
            self.progress = self.progress.after_step()
            if self.result.stop:
                self.preempt()
            self.after_step()
            if self.stop_reason:
                return

    def preempt(self) -> None:
        """Stop after the present step because of a signal; call it in all processes alike."""
        self.preempted = True
        name = self.stop_request.signal or "a signal to another process"
        self.stop_reason = f"{name}; --resume goes on"

    def evaluate(self) -> dict[str, dict] | None:
        """Evaluate the present weights (their average, where the settings say so).

        Returns:
            As :func:`evaluate_model`; None when a signal interrupted it.
        """
        if not self.experiment.test_names:
            return {}
        with self._evaluation_weights(), self.parallel.whole(self.model):
            _share_buffers(self.model)
            results = evaluate_model(
                self.experiment, self.model, should_stop=lambda: bool(self.stop_request)
            )
        if results is not None:
            self.results = results
        return results

    def save(self, name: str | None = None, *, tag: bool = True) -> None:
        """Save ``<name>.pth``, or without a name the periodic file of the last iteration.

        All processes call this together.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written then.
        """
        finite = all_finite(self.parallel.local(self.model.parameters()))
        if not all(comm.all_gather(finite)):
            raise NonFiniteError(
                f"weights are NaN or infinite after iteration {self.completed - 1}, and are not "
                f"saved; the last good checkpoint stays in {self.settings.output_dir}. A gradient "
                "overflowed: lower the learning rate, clip gradients, or set "
                "TRAIN.NON_FINITE.POLICY skip / train.non_finite.policy=skip"
            )
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
        ``train_model`` holds those that training goes on from. All processes call this together;
        it is complete on the main one.
        """
        base = super().state_dict()
        content = {
            "model": self.parallel.model_state(self.model),
            "optimizer": self.parallel.optimizer_state(self.model, self.optimizer),
            "optimizer_type": type(self.optimizer).__name__,
            "scheduler": self.schedule.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "iteration": self.completed - 1,
            "hooks": base.get("hooks", {}),
            "progress": self.progress.state_dict(),
            "skipped_steps": self.step.guard.skipped,
            "random": comm.gather(random_state.process_state()),
            "loss_normalizers": comm.gather(loss_normalizers(self.model)),
        }
        if self.ema is not None:
            content["ema"] = gathered(self.ema.state_dict())
            if self.settings.ema_eval:
                content["train_model"] = content["model"]
                content["model"] = content["ema"]["weights"]
        return content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, at any number of processes.

        Learning rates, weight decay and the like are those of the present config.
        """
        self.parallel.load_model(self.model, state.get("train_model", state["model"]))
        self.parallel.load_optimizer(
            self.model, self.optimizer, with_present_options(state["optimizer"], self.optimizer)
        )
        self.schedule.load_state_dict(state["scheduler"])
        if state["scaler"] and self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if "ema" in state:
                self.ema.load_state_dict(state["ema"])
            else:
                self.ema.reset()
        normalizers, rank = state.get("loss_normalizers", [{}]), comm.get_rank()
        set_loss_normalizers(self.model, normalizers[rank if rank < len(normalizers) else 0])
        self.completed = state["iteration"] + 1
        self.step.guard.skipped = state.get("skipped_steps", 0)
        self._load_progress(state)
        self._hook_states = dict(state["hooks"])
        present = list(self._hooks)
        self._hooks.clear()
        self.register_hooks(present)

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Keep the time of a ``with`` block out of the reported step time."""
        start, before = time.perf_counter(), self.paused_seconds
        try:
            yield
        finally:
            # blocks may be nested: the outer one has the last word
            self.paused_seconds = before + time.perf_counter() - start

    def _build(self, *, load: bool) -> None:
        """Build model, optimizer, schedule, step and average."""
        settings, experiment = self.settings, self.experiment
        self.model = self._build_model(load=load)
        self.optimizer = self.parallel.build_optimizer(self.model, experiment.build_optimizer)
        scale_learning_rates(self.optimizer, settings)
        self.schedule = LRSchedule(
            self.optimizer, experiment.build_lr_multiplier(), max_iter=settings.max_iter
        )
        self.step = TrainStep(self.model, self.optimizer, settings=settings, parallel=self.parallel)
        _share_buffers(self.model)  # wrapping shares the parameters only
        self.ema = None
        if settings.ema_enabled:  # after wrapping, which gives all processes the same weights
            self.ema = ModelEMA(
                self.model,
                decay=settings.ema_decay,
                warmup=settings.ema_warmup,
                time_constant=settings.ema_time_constant,
            )

    def _build_model(self, *, load: bool) -> nn.Module:
        settings = self.settings
        model = self.experiment.build_model()
        if load and settings.init_checkpoint:
            load_initial_weights(self.experiment, model)
        if comm.get_world_size() > 1 and torch.device(settings.device).type != "cuda":
            replace_sync_norms(model)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if settings.activation_checkpointing:
            count = enable_activation_checkpointing(model)
            logger.info("%d modules recompute their activations in backward", count)
        if settings.compile:
            model.compile()
        return self.parallel.prepare(model)

    def _build_loader(self) -> Iterable:
        return self.experiment.build_train_loader(
            seed=self.progress.seed, start_batch=self.progress.start_batch
        )

    def _build_hooks(self) -> list:
        settings = self.settings
        self.record = StepRecord(window=settings.log_period)
        return [
            self.record,
            PeriodicCheckpoint(period=settings.checkpoint_period),
            PeriodicEvaluation(
                period=settings.eval_period,
                metric=settings.best_metric,
                mode=settings.best_mode,
                patience=settings.early_stop_patience,
            ),
            PeriodicLog(
                period=settings.log_period,
                record=self.record,
                build_writers=self._build_writers,
            ),
        ]

    def _build_writers(self) -> list[EventWriter]:
        if not comm.is_main_process():
            return []
        return build_writers(
            self.settings.output_dir,
            max_iter=self.max_iter,
            window=self.settings.log_period,
            # what a killed run reported after its last checkpoint is about to be reported again
            go_on_from=self.record.last_report + 1 if self.resume else None,
        )

    def _resume(self, path: str | os.PathLike, state: dict[str, Any]) -> None:
        try:
            check_resumable(state, self.optimizer)
            check_saved(state, self.model)
            self.load_state_dict(state)
            check_loaded(self.optimizer)
        except UserError as error:
            raise UserError(f"cannot resume from {path}: {error}") from error
        except (
            LookupError,
            ValueError,
            RuntimeError,
            AttributeError,
            TypeError,
            ArithmeticError,
        ) as error:
            raise UserError(
                f"cannot resume from {path}: it does not fit this config ({first_line(error)}); "
                "use the config of that run, or load it as initial weights without --resume"
            ) from error
        if comm.is_main_process():
            self.folder.adopt(Path(path), until=self.completed - 1)
        logger.info("resumed from %s at iteration %d", path, self.completed)

    def _load_progress(self, state: dict[str, Any]) -> None:
        saved, now = state["progress"], self.progress
        message = world_change_message(saved, now.state_dict(), rule=self.settings.lr_rule)
        if message:
            logger.warning(message)
        if 0 <= self.settings.seed != saved["seed"]:
            logger.warning(
                "the run was started with seed %d and goes on with it; seed %d of the config is "
                "not used",
                saved["seed"],
                self.settings.seed,
            )
        self.progress = now.resumed(saved)
        states, rank = state["random"], comm.get_rank()
        if rank < len(states):
            self._random = states[rank]
        else:  # more processes than before: the new ones draw numbers of their own
            random_state.seed_process(self.progress.seed + self.completed)
            self._random = random_state.process_state()

    def _evaluation_weights(self):
        if self.ema is None or not self.settings.ema_eval:
            return nullcontext()
        return self.ema.applied()


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
