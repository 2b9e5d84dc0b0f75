"""The decision on every step, made by all processes together before the optimizer moves: is every
loss finite, and has anybody been asked to stop?
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from d2dense.errors import UserError
from d2dense.solver.sharded import local_part

__all__ = [
    "GuardedModel",
    "NonFiniteError",
    "StepGuard",
    "Verdict",
    "all_finite",
    "check_loss_scale",
]

logger = logging.getLogger(__name__)

_MAX_IMAGES = 8
# float16 has nothing between zero and 2**-24: scaled by less, even gradients of 1 would vanish
_LEAST_SCALE = 2.0**-24
_KEYS = "TRAIN.NON_FINITE.POLICY skip / train.non_finite.policy=skip"


class NonFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or a weight is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all processes agreed on.

    Attributes:
        finite: the step may be applied.
        stop: some process was asked to stop.
    """

    finite: bool
    stop: bool


class GuardedModel(nn.Module):
    """Calls a model and returns NaN losses where its forward itself finds that it diverged.

    Detectron2's proposal generator and several matchers raise ``FloatingPointError``. In one of
    several processes that would leave the others waiting for gradients; a NaN that depends on every
    parameter takes part in their exchange, and :class:`StepGuard` finds it.

    Args:
        model: takes a batch and returns a dict of losses, or one loss.
        replace_failed: return NaN; otherwise raise :class:`NonFiniteError`, for models whose
            forward exchanges something itself.

    Raises:
        UserError: in a forward that returns anything else.
    """

    def __init__(self, model: nn.Module, *, replace_failed: bool = True):
        super().__init__()
        self.model = model
        self.replace_failed = replace_failed

    def forward(self, batch: list[Any]) -> Mapping[str, torch.Tensor]:
        try:
            losses = self.model(batch)
        except FloatingPointError as error:
            if not self.replace_failed:
                raise NonFiniteError(
                    f"the forward pass failed on process {comm.get_rank()} for {_images(batch)}: "
                    f"{error}"
                ) from error
            logger.warning("the forward pass failed: %s", error)
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            return {"forward_pass": sum(p.float().sum() for p in trainable) * float("nan")}
        return _checked({"loss": losses} if isinstance(losses, torch.Tensor) else losses)


def _checked(losses: Any) -> Mapping[str, torch.Tensor]:
    """Return ``losses`` if they are named numbers in tensors; a :class:`UserError` otherwise."""
    if not (isinstance(losses, Mapping) and losses):
        found = "an empty dict" if isinstance(losses, Mapping) else type(losses).__name__
        raise UserError(f"in training the model returned {found}, expected a dict of losses")
    for name, loss in losses.items():
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            is_tensor = isinstance(loss, torch.Tensor)
            found = f"of shape {tuple(loss.shape)}" if is_tensor else f"a {type(loss).__name__}"
            raise UserError(
                f"the model's loss {name!r} is {found}, expected a tensor with one number"
            )
    return losses


class StepGuard:
    """Collects the losses of a step and decides whether it counts.

    On a GPU the decision costs no idle time: the flags travel to the host while the backward pass
    of the last batch is still running there, and are read when it has been queued.

    Args:
        model: its buffers (running statistics) are put back when a step is left out.
        policy: ``raise`` or ``skip``; ``skip`` looks at the gradients as well.
        max_skips: more steps than this left out end the run.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, model: nn.Module, *, policy: str = "raise", max_skips: int = 20):
        self.policy = policy
        self.max_skips = max_skips
        self.skipped = 0
        self._watched: list[tuple[dict[str, torch.Tensor], Sequence[Any]]] = []
        self._flags: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers()) if policy == "skip" else []
        self._before = [buffer.clone() for buffer in self._buffers]

    def begin(self) -> None:
        """Start a step."""
        self._watched.clear()
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def watch(self, losses: Mapping[str, torch.Tensor], batch: Sequence[Any]) -> None:
        """Note the losses of one batch; call it between its forward and its backward pass."""
        losses = {name: loss.detach() for name, loss in losses.items()}
        self._watched.append((losses, batch))

    @torch.no_grad()
    def exchange(self, *, stop: bool) -> None:
        """Start telling the other processes; call it before the last backward pass of the step.

        Args:
            stop: this process has been asked to stop.
        """
        losses = [loss for each, _ in self._watched for loss in each.values()]
        # a constant (no object, no loss) may be on the CPU while the others are on a GPU
        device = next((loss.device for loss in losses if not loss.is_cpu), losses[0].device)
        numbers = torch.stack([loss.float().reshape(()).to(device) for loss in losses])
        bad = ~torch.isfinite(numbers).all()
        flags = torch.stack([bad.float(), torch.full_like(bad, stop, dtype=torch.float32)])
        if comm.get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self._event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._flags = flags

    def decide(self, gradients: Iterable[torch.Tensor] = ()) -> Verdict:
        """Return what all processes agreed on; call it after the backward pass.

        Args:
            gradients: this process's (local parts of) gradients, looked at with policy ``skip``.
        """
        if self._event is not None:
            self._event.synchronize()
        assert self._flags is not None, "no losses were given since the last decision"
        bad, stop = self._flags.tolist()
        if not bad and self.policy == "skip":
            bad = not _agreed_finite(gradients)
        return Verdict(finite=not bad, stop=bool(stop))

    def leave_out(self, iteration: int) -> None:
        """Handle a step that is not finite: all processes call it together.

        Raises:
            NonFiniteError: with policy ``raise``, or above the cap.
        """
        found = "; ".join(part for part in comm.all_gather(self._describe()) if part)
        found = found or "a gradient is not finite although the losses are"
        message = f"iteration {iteration}: {found}"
        if self.policy == "raise":
            raise NonFiniteError(
                f"{message}; {self._state_of_weights()}. Lower the learning rate, "
                f"clip gradients, use bfloat16 instead of float16, or leave such steps out with "
                f"{_KEYS}"
            )
        self.skipped += 1
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if self.skipped > self.max_skips:
            raise NonFiniteError(
                f"{message}; {self.skipped} steps were not finite, more than "
                f"TRAIN.NON_FINITE.MAX_SKIPS / train.non_finite.max_skips = {self.max_skips}"
            )
        logger.warning("%s; step left out (%d of %d)", message, self.skipped, self.max_skips)

    def _state_of_weights(self) -> str:
        finite = all_finite(map(local_part, self._parameters))
        if all(comm.all_gather(finite)):
            return "the weights are those of the step before"
        return (
            "the weights are not finite any more, since a gradient of an earlier step was not; the "
            "last checkpoint is good"
        )

    def _describe(self) -> str:
        """Name this process's losses that are not finite, and the images they came from."""
        parts = []
        for losses, batch in self._watched:
            bad = {name: float(v) for name, v in losses.items() if not torch.isfinite(v).all()}
            if bad:
                values = ", ".join(f"{name} is {value}" for name, value in bad.items())
                parts.append(f"{values} on process {comm.get_rank()} for {_images(batch)}")
        return "; ".join(parts)


def check_loss_scale(scaler: torch.amp.GradScaler, iteration: int) -> None:
    """Check that float16's loss scaling has not fallen for ever; waits for the device.

    It halves its scale at every step whose gradients are not finite, and leaves that step out
    without a word: a model that diverged would go on like this to the end of the run.

    Raises:
        NonFiniteError: in all processes alike, since they have the same gradients.
    """
    if scaler.is_enabled() and scaler.get_scale() < _LEAST_SCALE:
        raise NonFiniteError(
            f"iteration {iteration}: the loss scale of float16 has fallen to "
            f"{scaler.get_scale():.3g}, so no recent step had finite gradients; lower the learning "
            "rate, clip gradients, or use bfloat16 (SOLVER.AMP.DTYPE / train.amp.dtype)"
        )


def _images(batch: Sequence[Any]) -> str:
    names = [
        str(each.get("file_name", f"image {each.get('image_id', '?')}"))
        for each in batch
        if isinstance(each, Mapping)
    ]
    more = f" and {len(names) - _MAX_IMAGES} more" if len(names) > _MAX_IMAGES else ""
    return ", ".join(names[:_MAX_IMAGES]) + more or "images without names"


def _agreed_finite(tensors: Iterable[torch.Tensor]) -> bool:
    bad = [not all_finite(tensors)]
    return not any(comm.all_gather(bad[0]))


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Tell whether all floating-point ``tensors`` are finite; waits for their device."""
    floating = [each for each in tensors if each.is_floating_point() and each.numel()]
    if not floating:
        return True
    norms = torch._foreach_norm(floating, float("inf"))
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())
