"""What to do when memory runs out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.utils import comm

from d2dense.errors import UserError

from .settings import RunSettings

__all__ = ["Lever", "evaluation_levers", "explained_shortage", "training_levers"]

# The CPU's allocator and CUDA's libraries raise plain RuntimeErrors.
_SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE
)
_REQUEST = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A setting that saves memory.

    Attributes:
        what: it does.
        yacs, lazy: overrides of both kinds of config, without a value where the user has to choose.
    """

    what: str
    yacs: str
    lazy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.yacs} / {self.lazy})"


def training_levers(settings: RunSettings) -> list[Lever]:
    """Return what saves memory in training and is not in use yet, what changes least first."""
    processes = comm.get_world_size()
    parts = settings.accumulation_steps
    # 0: the config does not say
    images = settings.total_batch_size // (processes * parts)
    levers = []
    if not settings.amp_enabled:
        levers.append(
            Lever(
                what="16-bit activations",
                yacs="SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16",
                lazy="train.amp.enabled=true train.amp.dtype=bfloat16",
            )
        )
    if not settings.activation_checkpointing:
        levers.append(
            Lever(
                what="activations recomputed in backward",
                yacs="TRAIN.ACTIVATION_CHECKPOINTING True",
                lazy="train.activation_checkpointing=true",
            )
        )
    if images != 1:
        levers.append(
            Lever(
                what="the same batch in more parts",
                yacs=f"SOLVER.ACCUMULATION_STEPS {2 * parts}",
                lazy=f"train.accumulation_steps={2 * parts}",
            )
        )
    if processes > 1 and settings.sharding != "fsdp":
        levers.append(_sharding("fsdp"))
        if settings.sharding == "none":
            levers.append(_sharding("zero1"))
    if images != 1:
        levers.append(
            Lever(
                what="fewer images per batch",
                yacs="SOLVER.IMS_PER_BATCH",
                lazy="dataloader.train.total_batch_size",
            )
        )
    return [*levers, _smaller_images("train")]


def evaluation_levers() -> list[Lever]:
    """Return what saves memory in an evaluation."""
    return [_smaller_images("test")]


def _sharding(mode: str) -> Lever:
    shared = {"zero1": "optimizer state", "fsdp": "weights, gradients and optimizer state"}[mode]
    return Lever(
        what=f"{shared} shared out over the processes",
        yacs=f"TRAIN.SHARDING {mode}",
        lazy=f"train.sharding={mode}",
    )


def _smaller_images(part: str) -> Lever:
    return Lever(
        what="smaller images",
        yacs=f"INPUT.MAX_SIZE_{part.upper()}",
        lazy=f"dataloader.{part}.mapper.augmentations.max_size",
    )


@contextmanager
def explained_shortage(where: str, levers: list[Lever]) -> Iterator[None]:
    """Turn an out-of-memory error of a ``with`` block into one line that names the remedies.

    Raises:
        UserError: the device or the host ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        helps = "; ".join(str(lever) for lever in levers)
        raise UserError(f"out of memory {where}{_request(error)}. What helps: {helps}") from error


def _is_shortage(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        _SHORTAGE.search(str(error))
    )


def _request(error: BaseException) -> str:
    """Return how much was asked for, where the error says it."""
    match = _REQUEST.search(str(error))
    if match is None:
        return ""
    number, unit = match.groups()
    if unit == "bytes":
        number, unit = f"{int(number) / 2**30:.2f}", "GiB"
    return f" (asked for another {number} {unit})"
