"""How learning rates follow the batch, and what another number of processes means for a resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from d2dense.errors import UserError

from .settings import RunSettings

__all__ = ["lr_factor", "scale_learning_rates", "scale_to_world_size", "world_change_message"]

logger = logging.getLogger(__name__)

_FOLLOWING = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)


def lr_factor(settings: RunSettings) -> float:
    """Return the factor on the config's learning rates: 1, the ratio of the total batch to the
    reference batch, or its square root.

    Raises:
        UserError: a rule, but a loader whose batch is not known.
    """
    if settings.lr_rule == "none":
        return 1.0
    if settings.total_batch_size < 1:
        raise UserError(
            f"the learning-rate rule {settings.lr_rule!r} needs the batch, and this config's "
            "loader does not say it: set SOLVER.IMS_PER_BATCH / dataloader.train.total_batch_size, "
            "or SOLVER.LR_SCALING.RULE none / train.lr_scaling.rule=none"
        )
    ratio = settings.total_batch_size / settings.reference_batch_size
    return ratio if settings.lr_rule == "linear" else math.sqrt(ratio)


def scale_learning_rates(optimizer: torch.optim.Optimizer, settings: RunSettings) -> None:
    """Multiply every group's learning rate by :func:`lr_factor`; call it before a schedule notes
    the rates.

    The batch is that of a whole optimizer step, so neither the number of processes nor
    accumulation changes the rates by itself.
    """
    factor = lr_factor(settings)
    if settings.lr_rule == "none":
        return
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    logger.info(
        "learning rates times %.6g: rule %s, %d images per step, meant for %d; the largest is %.6g",
        factor,
        settings.lr_rule,
        settings.total_batch_size,
        settings.reference_batch_size,
        max(float(group["lr"]) for group in optimizer.param_groups),
    )


def scale_to_world_size(cfg: CfgNode, world_size: int) -> tuple[CfgNode, str]:
    """Apply Detectron2's ``SOLVER.REFERENCE_WORLD_SIZE``: with other than so many processes the
    batch and the learning rate grow, and the schedule shrinks, in proportion.

    Returns:
        The config to use (``cfg`` itself where nothing changes), and what changed, for the log.

    Raises:
        UserError: a batch that the reference cannot share, or two rules at once.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference == 0:
        return cfg, ""
    if cfg.SOLVER.LR_SCALING.RULE != "none":
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} and SOLVER.LR_SCALING.RULE "
            f"{cfg.SOLVER.LR_SCALING.RULE} would both scale the learning rate; set the first to 0 "
            "or the second to none"
        )
    if reference < 0 or cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be shared by "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} processes; make it a multiple, or set 0"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is cfg:
        return cfg, ""
    for key in ("TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD"):
        if _value(scaled, key) == 0 < _value(cfg, key):  # rounded to "never"
            scaled.merge_from_list([key, 1])
    changes = [
        f"{key} {before} -> {after}"
        for key in _FOLLOWING
        if (before := _value(cfg, key)) != (after := _value(scaled, key))
    ]
    return scaled, (
        f"SOLVER.REFERENCE_WORLD_SIZE {reference}, {world_size} processes: " + ", ".join(changes)
    )


def _value(cfg: CfgNode, key: str) -> Any:
    section, name = key.split(".")
    return cfg[section][name]


def world_change_message(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, rule: str = "none"
) -> str | None:
    """Return what it means to resume a run with another number of processes or another batch.

    Args:
        saved, now: ``world_size``, ``total_batch_size`` (0: not known) and ``accumulation_steps``
            of the run so far and of this one.
        rule: ``lr_rule`` of the settings.

    Returns:
        One line, or None where neither changed.
    """
    same_batch = saved["total_batch_size"] == now["total_batch_size"]
    if same_batch and saved["world_size"] == now["world_size"]:
        return None
    return f"the run used {_describe(saved)} and goes on with {_describe(now)}: " + (
        "learning rates and the order of the images stay; what is drawn or normalised per process "
        "(dropout, local batch norm, groups of one aspect ratio) differs"
        if same_batch
        else _batch_change(saved, now, rule)
    )


def _describe(place: Mapping[str, Any]) -> str:
    world, total = place["world_size"], place["total_batch_size"]
    processes = f"{world} process" + ("es" if world > 1 else "")
    if not total:
        return processes
    each = total // (world * place["accumulation_steps"])
    batches = f" {place['accumulation_steps']} times" if place["accumulation_steps"] > 1 else ""
    return f"{processes} of {each} image{'s' if each != 1 else ''}{batches} ({total} per step)"


def _batch_change(saved: Mapping[str, Any], now: Mapping[str, Any], rule: str) -> str:
    if rule == "none":
        rates = (
            "learning rates stay those of the config (SOLVER.LR_SCALING.RULE / "
            "train.lr_scaling.rule can make them follow the batch)"
        )
    else:
        rates = f"learning rates follow the batch by the rule {rule}"
    return (
        f"{rates}; iterations are counted on, so the rest of the schedule sees "
        f"{now['total_batch_size'] or 'other'} instead of {saved['total_batch_size'] or 'other'} "
        "images per step; the data goes on after the last image used"
    )
