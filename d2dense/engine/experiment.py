"""One adapter per kind of config; both give the trainer, the tools and the tests the same
things.
"""

from __future__ import annotations

import abc
import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from d2dense import config
from d2dense.config import common
from d2dense.data import datasets, loaders
from d2dense.errors import UserError, nearest
from d2dense.evaluation import build_evaluator
from d2dense.solver.optim import param_groups

from .scaling import scale_to_world_size
from .settings import RunSettings

__all__ = ["Experiment", "LazyExperiment", "YamlExperiment", "experiment"]

logger = logging.getLogger(__name__)


def experiment(
    cfg: CfgNode | DictConfig, *, device: str | None = None, training: bool = True
) -> Experiment:
    """Return the adapter for ``cfg``, after registering its datasets and settling its class counts.

    Args:
        cfg: what :func:`d2dense.config.load` returns; a copy is kept, so the caller's stays as it
        is.
        device: replaces the config's device.
        training: whether the training sets are used; without, only the test sets' classes count.

    Raises:
        UserError: datasets, class counts or settings that do not fit together.
    """
    adapter = LazyExperiment if config.kind_of(cfg) == "lazy" else YamlExperiment
    return adapter(cfg, device=device, training=training)


class Experiment(abc.ABC):
    """Everything a run needs, built from one config.

    Attributes:
        cfg: the resolved config (custom datasets in place, class counts as numbers).
        settings: what the trainer reads.
        multi_scale: test loaders give images of their own size, see :meth:`for_tests`.
    """

    def __init__(
        self, cfg: CfgNode | DictConfig, *, device: str | None = None, training: bool = True
    ) -> None:
        self.cfg = copy.deepcopy(cfg)
        self._use_custom_datasets()
        train_names = self.train_names
        if not training:
            self._set_train_names([])
        self.cfg = config.resolve_class_counts(self.cfg)
        self._set_train_names(train_names)
        # evaluations during a training see images at one size, in a small part of the time
        self.multi_scale = not training and config.is_multi_scale(self.cfg)
        self._set_device(None if device is None else config.check_device(device))
        self.settings = self._read_settings()

    def build_model(self) -> nn.Module:
        """Return the model with fresh weights on the run's device, in training mode."""
        return config.build_model(self.cfg, device=self.settings.device)

    def for_tests(self, model: nn.Module) -> nn.Module:
        """Return what is evaluated of ``model``: itself, or it at several sizes."""
        return config.for_tests(self.cfg, model) if self.multi_scale else model

    @property
    @abc.abstractmethod
    def train_names(self) -> list[str]:
        """Names of the training sets."""

    @property
    @abc.abstractmethod
    def test_names(self) -> list[str]:
        """Names of the test sets, each evaluated on its own."""

    @abc.abstractmethod
    def build_train_loader(self, *, seed: int | None = None, start_batch: int = 0):
        """Return the endless training loader; a batch is the process's share of one accumulation
        step.

        Args:
            seed: of the stream of images, where the config does not fix one for the loader itself;
                by default the run's.
            start_batch: batches at the beginning of the stream to leave out.
        """

    @abc.abstractmethod
    def build_test_loader(self, name: str):
        """Return the loader of one test set."""

    @abc.abstractmethod
    def build_evaluator(self, name: str, output_dir: str | None):
        """Return the evaluator of one test set; ``output_dir`` is where it may write
        predictions.
        """

    @abc.abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over ``model``."""

    @abc.abstractmethod
    def build_lr_multiplier(self):
        """Return the fvcore ``ParamScheduler`` of lr factors over the run's fraction [0, 1)."""

    @abc.abstractmethod
    def _use_custom_datasets(self) -> None: ...

    @abc.abstractmethod
    def _set_train_names(self, names: list[str]) -> None: ...

    @abc.abstractmethod
    def _read_settings(self) -> RunSettings: ...

    @abc.abstractmethod
    def _set_device(self, device: str | None) -> None: ...


def _custom_names(
    slots: Mapping[str, Mapping], train: list[str], test: list[str]
) -> tuple[list[str], list[str]]:
    """Register custom datasets and return the train and test names to use.

    The slot ``train`` replaces the training sets and the other slots replace the test sets, except
    where the config already names a custom set itself.
    """
    registered = datasets.register_custom(slots)
    if "train" in registered and not any(name in registered.values() for name in train):
        train = [registered["train"]]
    others = [name for slot, name in registered.items() if slot != "train"]
    if others and not any(name in others for name in test):
        test = others
    return train, test


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, (list, tuple, ListConfig)) else [str(value)]


def _parameters(node: DictConfig) -> set[str]:
    """Return the argument names of a lazy node's target."""
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return set()


def _check_batch(total: int, steps: int, key: str) -> int:
    if total % steps:
        raise UserError(
            f"{key} = {total} cannot be split into {steps} accumulation steps; make it a multiple"
        )
    return total // steps


class YamlExperiment(Experiment):
    """A yacs config (Detectron2's yaml)."""

    def __init__(self, cfg: CfgNode, **options: Any) -> None:
        # noted now, logged with the optimizer: a run sets up its log after its experiment
        cfg, self._scaling = scale_to_world_size(cfg, comm.get_world_size())
        super().__init__(cfg, **options)

    @property
    def train_names(self) -> list[str]:
        return list(self.cfg.DATASETS.TRAIN)

    @property
    def test_names(self) -> list[str]:
        return list(self.cfg.DATASETS.TEST)

    def build_train_loader(self, *, seed: int | None = None, start_batch: int = 0):
        cfg, steps = self.cfg.clone(), self.cfg.SOLVER.ACCUMULATION_STEPS
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH = _check_batch(
            cfg.SOLVER.IMS_PER_BATCH, steps, "SOLVER.IMS_PER_BATCH"
        )
        if seed is not None:
            cfg.SEED = seed
        return loaders.train_from_cfg(cfg, start_batch=start_batch)

    def build_test_loader(self, name: str):
        return loaders.test_from_cfg(self.cfg, name, resize=not self.multi_scale)

    def build_evaluator(self, name: str, output_dir: str | None):
        test = self.cfg.TEST.SEM_SEG
        return build_evaluator(
            name,
            output_dir=output_dir,
            boundary_iou=test.BOUNDARY_IOU,
            submission=test.SUBMISSION,
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self._scaling:
            logger.info(self._scaling)
        solver = self.cfg.SOLVER
        groups = param_groups(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            weight_decay_1d=solver.WEIGHT_DECAY_1D,
            weight_decay_heads=solver.WEIGHT_DECAY_HEADS,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            no_decay_names=tuple(solver.NO_DECAY_NAMES),
            lr_multipliers={str(name): float(factor) for name, factor in solver.LR_MULTIPLIERS},
            layer_decay=solver.LAYER_DECAY,
        )
        if solver.OPTIMIZER == "SGD":
            return torch.optim.SGD(
                groups,
                lr=solver.BASE_LR,
                momentum=solver.MOMENTUM,
                nesterov=solver.NESTEROV,
                weight_decay=solver.WEIGHT_DECAY,
            )
        if solver.OPTIMIZER == "AdamW":
            return torch.optim.AdamW(
                groups,
                lr=solver.BASE_LR,
                betas=tuple(solver.BETAS),
                weight_decay=solver.WEIGHT_DECAY,
                fused=True,
            )
        raise UserError(f"SOLVER.OPTIMIZER = {solver.OPTIMIZER!r}, expected SGD or AdamW")

    def build_lr_multiplier(self):
        solver = self.cfg.SOLVER
        name, end = solver.LR_SCHEDULER_NAME, solver.BASE_LR_END / solver.BASE_LR
        warmup = {
            "max_iter": solver.MAX_ITER,
            "warmup_iters": solver.WARMUP_ITERS,
            "warmup_factor": solver.WARMUP_FACTOR,
            "warmup_method": solver.WARMUP_METHOD,
        }
        if name == "WarmupMultiStepLR":
            steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
            node = common.multistep(milestones=steps, gamma=solver.GAMMA, **warmup)
        elif name == "WarmupCosineLR":
            node = common.cosine(end_factor=end, **warmup)
        elif name == "CosineAfterWarmupLR":
            del warmup["warmup_method"]
            node = common.cosine_after_warmup(end_factor=end, **warmup)
        elif name == "WarmupPolyLR":
            node = common.poly(power=solver.POLY_POWER, end_factor=end, **warmup)
        else:
            known = ("WarmupMultiStepLR", "WarmupCosineLR", "CosineAfterWarmupLR", "WarmupPolyLR")
            raise UserError(
                f"SOLVER.LR_SCHEDULER_NAME = {name!r}, expected one of {', '.join(known)}"
                + nearest(name, known)
            )
        return instantiate(node)

    def _use_custom_datasets(self) -> None:
        self.cfg.defrost()
        self.cfg.DATASETS.TRAIN, self.cfg.DATASETS.TEST = map(
            tuple, _custom_names(self.cfg.DATASETS.CUSTOM, self.train_names, self.test_names)
        )

    def _set_train_names(self, names: list[str]) -> None:
        self.cfg.DATASETS.TRAIN = tuple(names)

    def _set_device(self, device: str | None) -> None:
        self.cfg.MODEL.DEVICE = device or config.resolve_device(self.cfg.MODEL.DEVICE)

    def _read_settings(self) -> RunSettings:
        cfg, solver, run, test = self.cfg, self.cfg.SOLVER, self.cfg.TRAIN, self.cfg.TEST
        return RunSettings(
            output_dir=cfg.OUTPUT_DIR,
            max_iter=solver.MAX_ITER,
            init_checkpoint=cfg.MODEL.WEIGHTS,
            seed=cfg.SEED,
            device=cfg.MODEL.DEVICE,
            log_period=run.LOG_PERIOD,
            eval_period=test.EVAL_PERIOD,
            checkpoint_period=solver.CHECKPOINT_PERIOD,
            checkpoint_keep=solver.CHECKPOINT_KEEP,
            amp_enabled=solver.AMP.ENABLED,
            amp_dtype=solver.AMP.DTYPE,
            accumulation_steps=solver.ACCUMULATION_STEPS,
            clip_enabled=solver.CLIP_GRADIENTS.ENABLED,
            clip_type=solver.CLIP_GRADIENTS.CLIP_TYPE,
            clip_value=solver.CLIP_GRADIENTS.CLIP_VALUE,
            clip_norm_type=solver.CLIP_GRADIENTS.NORM_TYPE,
            ema_enabled=solver.EMA.ENABLED,
            ema_decay=solver.EMA.DECAY,
            ema_warmup=solver.EMA.WARMUP,
            ema_time_constant=solver.EMA.TIME_CONSTANT,
            ema_eval=solver.EMA.EVAL,
            channels_last=run.CHANNELS_LAST,
            compile=run.COMPILE,
            find_unused_parameters=run.FIND_UNUSED_PARAMETERS,
            activation_checkpointing=run.ACTIVATION_CHECKPOINTING,
            best_metric=test.BEST_METRIC,
            best_mode=test.BEST_MODE,
            early_stop_patience=test.EARLY_STOP_PATIENCE,
            allow_pickle=run.ALLOW_PICKLE,
            reinit_misshaped=run.REINIT_MISSHAPED,
            init_classes=run.INIT_CLASSES,
            total_batch_size=solver.IMS_PER_BATCH,
            lr_rule=solver.LR_SCALING.RULE,
            reference_batch_size=solver.LR_SCALING.REFERENCE_BATCH,
            non_finite_policy=run.NON_FINITE.POLICY,
            max_skipped_steps=run.NON_FINITE.MAX_SKIPS,
            sharding=run.SHARDING,
        )


class LazyExperiment(Experiment):
    """A lazy config: nodes ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and
    ``train``.
    """

    @property
    def train_names(self) -> list[str]:
        return _names(OmegaConf.select(self.cfg, "dataloader.train.dataset.names"))

    @property
    def test_names(self) -> list[str]:
        return _names(OmegaConf.select(self.cfg, "dataloader.test.dataset.names"))

    def build_train_loader(self, *, seed: int | None = None, start_batch: int = 0):
        node = copy.deepcopy(self._need("dataloader.train"))
        node.total_batch_size = _check_batch(
            node.total_batch_size,
            self.settings.accumulation_steps,
            "dataloader.train.total_batch_size",
        )
        accepted = _parameters(node)
        if "seed" not in node and "seed" in accepted:
            node.seed = self.settings.seed if seed is None else seed
        if "start_batch" in accepted:
            node.start_batch = start_batch
        elif start_batch:
            logger.warning(
                "%s cannot skip batches (no argument start_batch): the data starts from its "
                "beginning",
                node.get("_target_"),
            )
        return instantiate(node)

    def build_test_loader(self, name: str):
        node = self._for_test_set(name).test
        if self.multi_scale:
            node.mapper.augmentations = []
        return instantiate(node)

    def build_evaluator(self, name: str, output_dir: str | None):
        node = OmegaConf.select(self._for_test_set(name), "evaluator")
        if node is None:
            node = LazyCall(build_evaluator)(dataset_name=name)
        node = copy.deepcopy(node)
        OmegaConf.update(node, "output_dir", output_dir, force_add=True)
        return instantiate(node)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        node = copy.deepcopy(self._need("optimizer"))
        node.params.model = model
        return instantiate(node)

    def build_lr_multiplier(self):
        return instantiate(self._need("lr_multiplier"))

    def _need(self, key: str) -> DictConfig:
        node = OmegaConf.select(self.cfg, key)
        if node is None:
            raise UserError(f"the lazy config defines no {key!r}, which this command needs")
        return node

    def _for_test_set(self, name: str) -> DictConfig:
        """Return the ``dataloader`` node with ``name`` as its only test set; interpolations
        follow.
        """
        root = copy.deepcopy(self.cfg)
        root.dataloader.test.dataset.names = name
        return root.dataloader

    def _use_custom_datasets(self) -> None:
        slots = OmegaConf.to_container(
            self.cfg.get("datasets") or OmegaConf.create({}), resolve=True
        )
        if not slots:
            return
        train, test = _custom_names(slots, self.train_names, self.test_names)
        OmegaConf.update(self.cfg, "dataloader.train.dataset.names", train)
        OmegaConf.update(self.cfg, "dataloader.test.dataset.names", test)

    def _set_train_names(self, names: list[str]) -> None:
        if OmegaConf.select(self.cfg, "dataloader.train.dataset") is not None:
            OmegaConf.update(self.cfg, "dataloader.train.dataset.names", names, force_add=True)

    def _set_device(self, device: str | None) -> None:
        # configs written for Detectron2's own lazy launcher leave some run settings out
        self.cfg.train = OmegaConf.merge(common.train(), self.cfg.get("train") or {})
        self.cfg.train.device = device or config.resolve_device(str(self.cfg.train.device))

    def _read_settings(self) -> RunSettings:
        run = self.cfg.train
        return RunSettings(
            output_dir=run.output_dir,
            max_iter=run.max_iter,
            init_checkpoint=run.init_checkpoint or "",
            seed=run.seed,
            device=run.device,
            log_period=run.log_period,
            eval_period=run.eval_period,
            checkpoint_period=run.checkpointer.period,
            checkpoint_keep=run.checkpointer.max_to_keep or 0,
            amp_enabled=run.amp.enabled,
            amp_dtype=run.amp.dtype,
            accumulation_steps=run.accumulation_steps,
            clip_enabled=run.clip_gradients.enabled,
            clip_type=run.clip_gradients.clip_type,
            clip_value=run.clip_gradients.clip_value,
            clip_norm_type=run.clip_gradients.norm_type,
            ema_enabled=run.ema.enabled,
            ema_decay=run.ema.decay,
            ema_warmup=run.ema.warmup,
            ema_time_constant=run.ema.time_constant,
            ema_eval=run.ema.eval,
            channels_last=run.channels_last,
            compile=run.compile,
            find_unused_parameters=run.ddp.find_unused_parameters,
            activation_checkpointing=run.activation_checkpointing,
            best_metric=run.best.metric,
            best_mode=run.best.mode,
            early_stop_patience=run.early_stop_patience,
            allow_pickle=run.allow_pickle,
            reinit_misshaped=run.reinit_misshaped,
            init_classes=run.init_classes,
            total_batch_size=OmegaConf.select(self.cfg, "dataloader.train.total_batch_size") or 0,
            lr_rule=run.lr_scaling.rule,
            reference_batch_size=run.lr_scaling.reference_batch,
            non_finite_policy=run.non_finite.policy,
            max_skipped_steps=run.non_finite.max_skips,
            sharding=run.sharding,
        )
