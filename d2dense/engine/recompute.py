"""Activation checkpointing: less memory in training for a second forward of each block."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from detectron2.layers import CNNBlockBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from d2dense.errors import UserError

__all__ = ["blocks", "enable_activation_checkpointing"]

_BLOCK_NAME = re.compile(r"(Block|Bottleneck|EncoderLayer|DecoderLayer)$")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated units of ``model``, which are used through their forward only.

    These are Detectron2's residual blocks, and modules whose class is called ``...Block``,
    ``...Bottleneck``, ``...EncoderLayer`` or ``...DecoderLayer``, as in Detectron2's and timm's
    transformers.
    """
    return _outermost(model, _is_block)


def enable_activation_checkpointing(model: nn.Module) -> int:
    """Let the blocks of ``model`` recompute their activations in backward; return how many do.

    A module with ``set_grad_checkpointing(True)`` does it in its own way, unless it has batch norm:
    the second forward would update the running statistics again. All other :func:`blocks` run
    their forward under ``torch.utils.checkpoint``; there the statistics stay as the first forward
    left them, and random numbers are drawn again as they were.

    Raises:
        UserError: no module of the model can.
    """
    own_way = [each for each in _outermost(model, _has_switch) if _switch_on(each)]
    inside = {part for module in own_way for part in module.modules()}
    others = [each for each in blocks(model) if each not in inside]
    for module in others:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        module.forward = functools.partial(_recomputing, module, module.forward, norms)
    if not own_way and not others:
        raise UserError(
            f"activation checkpointing is on, but no module of {type(model).__name__} supports it; "
            "switch it off (TRAIN.ACTIVATION_CHECKPOINTING or train.activation_checkpointing)"
        )
    return len(own_way) + len(others)


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, CNNBlockBase) or bool(_BLOCK_NAME.search(type(module).__name__))


def _has_switch(module: nn.Module) -> bool:
    return callable(getattr(module, "set_grad_checkpointing", None)) and not any(
        isinstance(part, _BatchNorm) for part in module.modules()
    )


def _switch_on(module: nn.Module) -> bool:
    try:
        module.set_grad_checkpointing(True)
    except AssertionError:  # how timm's models say that they cannot
        return False
    return True


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the wanted modules that are not inside another one, each once."""
    found, seen = [], set()

    def visit(each: nn.Module) -> None:
        if each in seen:
            return
        seen.add(each)
        if wanted(each):
            found.append(each)
            return
        for child in each.children():
            visit(child)

    visit(module)
    return found


def _recomputing(
    module: nn.Module, forward: Callable, norms: Sequence[_BatchNorm], *inputs, **options
):
    if module.training and torch.is_grad_enabled():
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _statistics_kept(norms)),
            **options,
        )
    return forward(*inputs, **options)


@contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch norms compute and save what they do in training, without moving their statistics.

    Their new share is zero, which changes no bit of the old one.
    """
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [norm.momentum for norm in norms], [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before[0]):
            norm.momentum = momentum
        for count, kept in zip(counts, before[1]):
            count.copy_(kept)
