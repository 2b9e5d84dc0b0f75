"""Parameters that no loss depends on: one line instead of processes that wait for each other."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from d2dense.errors import UserError

__all__ = ["require_gradients"]


def require_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that a backward pass reached every one of the (name, trainable parameter) pairs.

    Processes exchange gradients in the same order. Where one of them has none for some parameter,
    its next exchange meets another one's gradients, so this belongs between the backward pass and
    whatever the processes exchange next. It reads no gradient and waits for no device.

    Raises:
        UserError: some parameters got none; names a few.
    """
    names = [name for name, parameter in parameters if parameter.grad is None]
    if not names:
        return
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise UserError(
        f"no loss of this step depends on {some}; where that is meant, set "
        "TRAIN.FIND_UNUSED_PARAMETERS True / train.ddp.find_unused_parameters=true (slower), or "
        "freeze them"
    )
