"""A part of a shared store that nobody has written to.

torchrun keeps one store for all restarts of a run, and PyTorch looks up the addresses of the other
processes in it: after a restart it may find those of processes that have died. The count of
restarts cannot tell the attempts apart, since only the machine where the failure was counts one.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from d2dense.errors import UserError

__all__ = ["attempt_store"]

_POLL_SECONDS = 0.02


def attempt_store(
    store: dist.Store, *, rank: int, world_size: int, timeout: timedelta
) -> dist.Store:
    """Return a view of ``store`` that only the living processes of this attempt share.

    The first process draws a prefix. Every other one asks for it under a number of its own, which
    no earlier process can have used, and confirms; the first one answers until all have confirmed.

    Raises:
        UserError: some process is missing after ``timeout``.
    """
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        prefix = uuid.uuid4().hex
        _answer(store, prefix, world_size, end)
    else:
        number = uuid.uuid4().hex
        store.set(f"ask/{rank}", number)
        prefix = store.get(f"answer/{number}").decode()
        store.add(f"confirmed/{prefix}", 1)
    return dist.PrefixStore(prefix, store)


def _answer(store: dist.Store, prefix: str, world_size: int, end: float) -> None:
    answered: set[bytes] = set()
    while store.add(f"confirmed/{prefix}", 0) < world_size - 1:
        for rank in range(1, world_size):
            if store.check([f"ask/{rank}"]):
                number = store.get(f"ask/{rank}")
                if number not in answered:
                    store.set(f"answer/{number.decode()}", prefix)
                    answered.add(number)
        if time.monotonic() > end:
            missing = world_size - 1 - store.add(f"confirmed/{prefix}", 0)
            raise UserError(
                f"{missing} of {world_size} processes did not arrive; is every machine started?"
            )
        time.sleep(_POLL_SECONDS)
