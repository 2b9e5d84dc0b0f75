"""Decisions that one process makes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from detectron2.utils import comm

from d2dense.errors import UserError

__all__ = ["decided_by_main"]

T = TypeVar("T")


def decided_by_main(decide: Callable[[], T]) -> T:
    """Return ``decide()``, which the main process calls alone, in all processes.

    All of them call this together. The value travels pickled, so it should be small.

    Raises:
        UserError: in all processes alike, where ``decide`` raised one.
    """
    value, mistake = None, None
    if comm.is_main_process():
        try:
            value = decide()
        except UserError as error:
            mistake = error
    shared = (value, mistake and str(mistake))
    value, text = comm.all_gather(shared)[0]
    if text:
        raise mistake or UserError(text)
    return value
