"""Fresh nodes for lazy configs: run settings, loaders, optimizers and schedules with the usual
defaults.

Every call returns a new node, so a config may change it freely::

    train = common.train(max_iter=90_000)
    dataloader = common.detection_loader(train="coco_2017_train", test="coco_2017_val")
    optimizer = common.sgd(lr=0.02)
    lr_multiplier = common.multistep(milestones=[60_000, 80_000], max_iter=90_000)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf

from d2dense.data import augmentations, classification, loaders, mappers
from d2dense.evaluation import build_evaluator
from d2dense.solver.optim import param_groups
from d2dense.solver.schedule import CosineAfterWarmup, PolyParamScheduler

__all__ = [
    "adamw",
    "classification_loader",
    "cosine",
    "cosine_after_warmup",
    "detection_loader",
    "multistep",
    "poly",
    "semantic_loader",
    "sgd",
    "train",
]


def train(**changes) -> DictConfig:
    """Return the run settings (``train`` node); ``changes`` are merged in.

    The keys of Detectron2's lazy ``train`` node keep their names and meaning; the yacs counterparts
    are in :mod:`d2dense.config.defaults`, and :class:`d2dense.engine.settings.RunSettings` is what
    both become.
    """
    node = OmegaConf.create(
        {
            "output_dir": "./output",
            "init_checkpoint": "",
            "max_iter": 90_000,
            "seed": -1,  # -1: a new one every run
            "device": "cuda",  # the CPU where there is no GPU
            "amp": {"enabled": False, "dtype": "float16"},
            "accumulation_steps": 1,  # batches of total_batch_size / accumulation_steps per step
            "clip_gradients": {  # clip_type: value | norm (each parameter) | full_model
                "enabled": False,
                "clip_type": "value",
                "clip_value": 1.0,
                "norm_type": 2.0,
            },
            "ema": {
                "enabled": False,
                "decay": 0.9998,
                "warmup": False,
                "time_constant": 0.0,  # of another warm-up, in steps
                "eval": True,
            },
            "ddp": {"find_unused_parameters": False},
            "checkpointer": {"period": 5000, "max_to_keep": 0},  # 0 keeps all
            "eval_period": 0,
            "log_period": 20,
            "test_aug": {  # several sizes in --eval-only and predictions, modeling/multi_scale.py
                "enabled": False,
                "min_sizes": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200],
                "max_size": 4000,
                "flip": True,
                "method": "linear",  # or "gaussian"
                "iou": 0.5,
                "sigma": 0.5,
                "min_score": 1e-3,
                "voting_iou": None,
                "max_detections": 300,
            },
            "best": {"metric": "", "mode": "max"},
            "early_stop_patience": 0,
            "channels_last": False,
            "compile": False,
            "activation_checkpointing": False,
            "sharding": "none",  # or "zero1" (optimizer state) | "fsdp" (weights too)
            "non_finite": {"policy": "raise", "max_skips": 20},  # policy: raise | skip
            "lr_scaling": {"rule": "none", "reference_batch": 16},  # rule: none | linear | sqrt
            "reinit_misshaped": False,  # True: initial weights of another shape are left out
            "init_classes": "",  # the same, but classes are loaded by name: a dataset or a json
            "allow_pickle": False,
            "class_count": "check",  # or "auto": every model.*.num_classes from the data
        },
        flags={"allow_objects": True},
    )
    return OmegaConf.merge(node, changes)


def _loader(
    *, mapper, train, test, train_augmentations, test_augmentations, batch_size, workers, **kw
):
    loading = {"aspect_ratio_grouping": kw.pop("aspect_ratio_grouping")}
    if "copy_paste" in kw:
        loading["copy_paste"] = kw.pop("copy_paste")
    train_only = kw.pop("train_only", {})
    return OmegaConf.create(
        {
            "train": L(loaders.build_train_loader)(
                dataset=L(loaders.get_dataset_dicts)(
                    names=train, filter_empty=kw.pop("filter_empty")
                ),
                mapper=L(mapper)(
                    is_train=True, augmentations=train_augmentations, **train_only, **kw
                ),
                total_batch_size=batch_size,
                num_workers=workers,
                max_bad_share=0.1,
                **loading,
            ),
            "test": L(loaders.build_test_loader)(
                dataset=L(loaders.get_dataset_dicts)(names=test, filter_empty=False),
                mapper=L(mapper)(is_train=False, augmentations=test_augmentations, **kw),
                batch_size=1,
                num_workers=workers,
            ),
            "evaluator": L(build_evaluator)(dataset_name="${..test.dataset.names}"),
        },
        flags={"allow_objects": True},
    )


def detection_loader(
    *,
    train: str | Sequence[str] = "coco_2017_train",
    test: str | Sequence[str] = "coco_2017_val",
    train_augmentations: DictConfig | None = None,
    test_augmentations: DictConfig | None = None,
    masks: bool = False,
    mask_format: str = "polygon",
    recompute_boxes: bool = False,
    min_box_side: float = 1e-5,
    reject_emptied: bool = False,
    copy_paste: DictConfig | None = None,
    batch_size: int = 16,
    workers: int = 4,
    image_format: str = "BGR",
    filter_empty: bool = True,
) -> DictConfig:
    """Return a ``dataloader`` node for boxes (and masks): ``train``, ``test`` and ``evaluator``.

    Args:
        train, test: a dataset name or several; each test set is evaluated on its own.
        train_augmentations, test_augmentations: lazy nodes of :mod:`d2dense.data.augmentations`.
        masks, mask_format, recompute_boxes, min_box_side, reject_emptied: see
            :class:`~d2dense.data.mappers.DetectionMapper`.
        copy_paste: a lazy node of :class:`~d2dense.data.copy_paste.CopyPaste`.
        batch_size: images per step over all processes and accumulation steps.
    """
    return _loader(
        mapper=mappers.DetectionMapper,
        train=train,
        test=test,
        train_augmentations=train_augmentations or L(augmentations.default)(is_train=True),
        test_augmentations=test_augmentations or L(augmentations.default)(is_train=False),
        batch_size=batch_size,
        workers=workers,
        image_format=image_format,
        filter_empty=filter_empty,
        aspect_ratio_grouping=True,
        copy_paste=copy_paste,
        train_only={
            "use_instance_mask": masks,
            "instance_mask_format": mask_format,
            "recompute_boxes": recompute_boxes,
            "min_box_side": min_box_side,
            "reject_emptied": reject_emptied,
        },
    )


def semantic_loader(
    *,
    train: str | Sequence[str],
    test: str | Sequence[str],
    train_augmentations: DictConfig,
    test_augmentations: DictConfig,
    ignore_label: int = 255,
    batch_size: int = 16,
    workers: int = 4,
    image_format: str = "BGR",
) -> DictConfig:
    """Return a ``dataloader`` node for semantic label maps; arguments as in
    :func:`detection_loader`.
    """
    node = _loader(
        mapper=mappers.SemanticMapper,
        train=train,
        test=test,
        train_augmentations=train_augmentations,
        test_augmentations=test_augmentations,
        batch_size=batch_size,
        workers=workers,
        image_format=image_format,
        filter_empty=False,
        aspect_ratio_grouping=False,
        ignore_label=ignore_label,
    )
    node.evaluator.update(boundary_iou=False, submission=False)
    return node


def classification_loader(
    *,
    train: str | Sequence[str] = "imagenet_1k_train",
    test: str | Sequence[str] = "imagenet_1k_val",
    train_augmentations: DictConfig | None = None,
    test_augmentations: DictConfig | None = None,
    batch_size: int = 1024,
    test_batch_size: int = 64,
    workers: int = 8,
    image_format: str = "RGB",
) -> DictConfig:
    """Return a ``dataloader`` node for classes of whole images.

    Args:
        train_augmentations, test_augmentations: lazy nodes of
            :func:`d2dense.data.classification.imagenet`.
        test_batch_size: images per batch and process in evaluation.
    """
    node = _loader(
        mapper=classification.ClassificationMapper,
        train=train,
        test=test,
        train_augmentations=train_augmentations or L(classification.imagenet)(is_train=True),
        test_augmentations=test_augmentations or L(classification.imagenet)(is_train=False),
        batch_size=batch_size,
        workers=workers,
        image_format=image_format,
        filter_empty=False,
        aspect_ratio_grouping=False,
    )
    node.test.batch_size = test_batch_size
    return node


def sgd(
    *, lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 1e-4, nesterov: bool = False
) -> DictConfig:
    """Return an SGD node; norm layers are not decayed. Its ``params.model`` is set by the
    launcher.

    Args:
        lr: at the height of the schedule, for the recipe's batch size.
        momentum, weight_decay, nesterov: as in ``torch.optim.SGD``.
    """
    return L(torch.optim.SGD)(
        params=L(param_groups)(
            base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=0.0
        ),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )


def adamw(
    *,
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.05,
    weight_decay_1d: float | None = None,
    weight_decay_heads: float | None = None,
    layer_decay: float = 1.0,
) -> DictConfig:
    """Return an AdamW node; norm layers are not decayed. Its ``params.model`` is set by the
    launcher.

    Args:
        weight_decay_1d, weight_decay_heads, layer_decay: see
            :func:`d2dense.solver.optim.param_groups`.
    """
    return L(torch.optim.AdamW)(
        params=L(param_groups)(
            base_lr="${..lr}",
            weight_decay="${..weight_decay}",
            weight_decay_norm=0.0,
            weight_decay_1d=weight_decay_1d,
            weight_decay_heads=weight_decay_heads,
            layer_decay=layer_decay,
        ),
        lr=lr,
        betas=list(betas),
        weight_decay=weight_decay,
        fused=True,
    )


def _warmed_up(scheduler, max_iter, warmup_iters, warmup_factor, warmup_method) -> DictConfig:
    return L(WarmupParamScheduler)(
        scheduler=scheduler,
        warmup_factor=warmup_factor,
        warmup_length=min(warmup_iters / max_iter, 1.0),
        warmup_method=warmup_method,
    )


def multistep(
    *,
    milestones: Sequence[int],
    max_iter: int,
    gamma: float = 0.1,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> DictConfig:
    """Return a schedule that multiplies the lr by ``gamma`` at every milestone.

    Args:
        milestones: in iterations.
        max_iter: length of the run.
        warmup_iters: at the beginning, during which the lr rises; 0: none.
        warmup_factor: of the lr where it begins.
        warmup_method: ``linear``, or ``constant`` until it ends.
    """
    scheduler = L(MultiStepParamScheduler)(
        values=[gamma**k for k in range(len(milestones) + 1)],
        milestones=list(milestones),
        num_updates=max_iter,
    )
    return _warmed_up(scheduler, max_iter, warmup_iters, warmup_factor, warmup_method)


def cosine(
    *,
    max_iter: int,
    end_factor: float = 0.0,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> DictConfig:
    """Return a half-cosine over the run from 1 down to ``end_factor``.

    Args:
        max_iter, warmup_iters, warmup_factor, warmup_method: see :func:`multistep`.
    """
    scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=end_factor)
    return _warmed_up(scheduler, max_iter, warmup_iters, warmup_factor, warmup_method)


def cosine_after_warmup(
    *,
    max_iter: int,
    end_factor: float = 0.0,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.0,
) -> DictConfig:
    """Return a linear rise to 1 over ``warmup_iters``, then a half-cosine over the rest: the cosine
    of image classifiers. (That of :func:`cosine` begins with the warm-up, as Detectron2's.)

    Args:
        max_iter: length of the run.
        end_factor: where the cosine ends.
        warmup_factor: where the rise begins.
    """
    return L(CosineAfterWarmup)(
        warmup_length=min(warmup_iters / max_iter, 1.0),
        warmup_factor=warmup_factor,
        end_factor=end_factor,
    )


def poly(
    *,
    max_iter: int,
    power: float = 0.9,
    end_factor: float = 0.0,
    warmup_iters: int = 0,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> DictConfig:
    """Return ``(1 - t / max_iter) ** power`` down to ``end_factor``.

    Args:
        max_iter, warmup_iters, warmup_factor, warmup_method: see :func:`multistep`.
    """
    scheduler = L(PolyParamScheduler)(power=power, end_factor=end_factor)
    return _warmed_up(scheduler, max_iter, warmup_iters, warmup_factor, warmup_method)
