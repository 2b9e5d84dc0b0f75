"""Exponential moving average of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from d2dense.solver.sharded import local_part, share_like

__all__ = ["ModelEMA"]


class ModelEMA:
    """Keep ``average = decay * average + (1 - decay) * weights`` beside a model.

    Floating-point parameters and buffers (running statistics of norms too, so that they fit the
    averaged weights) are averaged; anything else follows the model.

    Args:
        model: the bare model (not wrapped for several processes), already on its device. Where its
            weights are shared out over processes, so are their averages.
        decay: in [0, 1); the share of the old average that each update keeps.
        warmup: start with short averages: decay ``min(decay, (1 + n) / (10 + n))`` at update n,
            n counted from 0.
        time_constant: start with short averages in another way: decay ``decay * (1 - exp(-(1 + n)
            / time_constant))`` at update n (Co-DETR's ViT-L: 2000); 0: not.

    Raises:
        ValueError: numbers out of range, or both kinds of start.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, warmup: bool = False, time_constant: float = 0.0
    ):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), found {decay}")
        if time_constant < 0 or (warmup and time_constant):
            raise ValueError(f"EMA time constant {time_constant}, warmup {warmup}: expected one")
        self.decay = decay
        self.warmup = warmup
        self.time_constant = time_constant
        self.updates = 0
        # the model's own objects: these follow every later optimizer step
        live = dict(model.named_parameters(remove_duplicate=False))
        live.update(model.named_buffers(remove_duplicate=False))
        self._live = {name: live.get(name, kept) for name, kept in model.state_dict().items()}
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._floating = [name for name, each in self._live.items() if each.is_floating_point()]
        self._others = sorted(set(self._live) - set(self._floating))

    @torch.no_grad()
    def update(self) -> None:
        """Average the model's present weights in; call once after each optimizer step."""
        decay = self._present_decay()
        torch._foreach_lerp_(
            [local_part(self._average[name]) for name in self._floating],
            [local_part(self._live[name]) for name in self._floating],
            1.0 - decay,
        )
        for name in self._others:
            self._average[name].copy_(self._live[name])
        self.updates += 1

    def _present_decay(self) -> float:
        if self.warmup:
            return min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.time_constant:
            return self.decay * -math.expm1(-(1 + self.updates) / self.time_constant)
        return self.decay

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged state dict, under the model's names."""
        return dict(self._average)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model for the time of a ``with`` block."""
        backup = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        try:
            self._copy(self._average, self._live)
            yield
        finally:
            self._copy(backup, self._live)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._copy(state["weights"], self._average)

    def reset(self) -> None:
        """Start again from the model's present weights."""
        self.updates = 0
        self._copy(self._live, self._average)

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
        for name, tensor in target.items():
            local_part(tensor).copy_(local_part(share_like(source[name], tensor)))
