"""Activation checkpointing: less memory in training for a second forward of each block."""

from __future__ import annotations

import functools

import torch
from detectron2.layers import CNNBlockBase
from torch import nn
from torch.utils.checkpoint import checkpoint

from d2dense.errors import UserError

__all__ = ["enable_activation_checkpointing"]


def enable_activation_checkpointing(model: nn.Module) -> int:
    """Let the blocks of ``model`` recompute their activations in backward; return how many do.

    Modules take part through ``set_grad_checkpointing(True)``. Detectron2's residual blocks, which
    have no such method, are wrapped, except those with batch statistics: a second forward would
    update these twice.

    Raises:
        UserError: no module of the model can.
    """
    count = 0
    for module in list(model.modules()):
        if callable(getattr(module, "set_grad_checkpointing", None)):
            module.set_grad_checkpointing(True)
            count += 1
        elif isinstance(module, CNNBlockBase) and not _has_batch_statistics(module):
            module.forward = functools.partial(_recomputing, module, module.forward)
            count += 1
    if not count:
        raise UserError(
            f"activation checkpointing is on, but no module of {type(model).__name__} supports it; "
            "switch it off (TRAIN.ACTIVATION_CHECKPOINTING or train.activation_checkpointing)"
        )
    return count


def _has_batch_statistics(module: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())


def _recomputing(module: nn.Module, forward, *inputs):
    if module.training and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)
