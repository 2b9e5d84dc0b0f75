"""Gradients for the same parameters in all processes, for those that reduce them together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.distributed.tensor import DTensor

from d2dense.errors import UserError

__all__ = ["AgreedGradients"]


class AgreedGradients(nn.Module):
    """Call a model under FSDP, and let all processes have gradients for the same parameters.

    FSDP reduces the gradients of a group of parameters in one piece. Where the losses of one
    process leave out a parameter that others use (a head without any sample), the pieces would
    differ in length, and the processes would wait for ever or add up what does not belong together.
    Such a parameter gets a gradient of zero here, if it is outside the blocks; a block has to be
    used by all processes or by none.

    Args:
        guarded: returns a dict of losses; the module under FSDP is inside.

    Attributes:
        exchanging: the backward after this forward reduces gradients, also those kept back from
            earlier ones.
    """

    def __init__(self, guarded: nn.Module):
        super().__init__()
        self.guarded = guarded
        self.exchanging = True
        self._reached: set[torch.Tensor] = set()

    def forward(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        losses = self.guarded(batch)
        self._reached |= _leaves(losses.values())
        if not self.exchanging:
            return losses
        reached, self._reached = self._reached, set()
        # after a forward, what is outside the blocks is whole and the blocks are shared out again
        outside = [
            each
            for each in self.guarded.parameters()
            if each.requires_grad and not isinstance(each, DTensor)
        ]
        mine = [each in reached for each in outside]
        answers = comm.all_gather((mine, len(reached) - sum(mine)))
        _check_blocks([in_blocks for _, in_blocks in answers])
        missing = [
            each
            for each, is_mine, flags in zip(outside, mine, zip(*(flags for flags, _ in answers)))
            if any(flags) and not is_mine
        ]
        if missing:
            name = next(iter(losses))
            # an empty sum: exactly zero, and so is its gradient
            losses = {
                **losses,
                name: losses[name] + sum(each.flatten()[:0].sum() for each in missing),
            }
        return losses


def _check_blocks(counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise UserError(
            "sharding fsdp needs losses that use the same blocks of the model in all processes; "
            f"they reach {', '.join(map(str, counts))} parameters of blocks. Use TRAIN.SHARDING "
            "zero1 or train.sharding=zero1"
        )


def _leaves(outputs: Iterable[torch.Tensor]) -> set[torch.Tensor]:
    """Return the parameters that the backward pass from ``outputs`` reaches."""
    waiting = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
