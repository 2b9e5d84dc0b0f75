"""Where the processes of a run meet: everybody arrives within a bounded time, or one line says why
not.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from d2dense.errors import UserError

from .cluster import ProcessEnv

__all__ = ["check_url", "meet"]


def check_url(url: str) -> None:
    """Raise :class:`UserError` unless ``url`` names a place: ``tcp://HOST:PORT`` or
    ``file:///PATH``.
    """
    try:
        parts = urlsplit(url)
        good = (parts.scheme == "tcp" and parts.hostname and parts.port) or (
            parts.scheme == "file" and parts.path
        )
    except ValueError:  # a port that is no number, or out of range
        good = False
    if not good:
        raise UserError(
            f"--dist-url {url!r} names no place to meet; expected tcp://HOST:PORT, or "
            "file:///PATH on a file system that all machines share"
        )


def meet(place: ProcessEnv, *, timeout: timedelta) -> dist.Store:
    """Return the store through which this process finds the others, once all have arrived.

    Args:
        timeout: how long to wait for the others.

    Raises:
        UserError: the port is taken, the first machine cannot be reached, or somebody is missing.
    """
    address = _address(place.init_method)
    if address is not None:
        # Asked here first: PyTorch's own answer is a page of C++ frames.
        if place.rank == 0 and not (place.hosted or _is_agents()):
            _check_free(*address)
        else:
            _wait_for(*address, place=place, timeout=timeout)
    found: list[dist.Store] = []
    errors: list[Exception] = []

    def rendezvous() -> None:
        try:
            found.append(_store(place, address, timeout))
        except (dist.DistError, RuntimeError, ValueError, OSError) as error:
            errors.append(error)

    # In a thread, since PyTorch waits for ever where another program listens and never answers.
    thread = threading.Thread(target=rendezvous, daemon=True)
    thread.start()
    thread.join(2 * timeout.total_seconds() + 1)
    if found:
        return found[0]
    reason = str(errors[0]).splitlines()[0] if errors else "something else answers there"
    raise UserError(
        f"process {place.rank} of {place.world_size} did not meet the others at "
        f"{_name(place.init_method)}: {reason}; start all machines with the same --dist-url and "
        "--num-machines, each with its own --machine-rank (or one torchrun or srun for all)"
    )


def _store(place: ProcessEnv, address: tuple[str, int] | None, timeout: timedelta) -> dist.Store:
    if place.hosted and address is not None:
        return dist.TCPStore(*address, place.world_size, is_master=False, timeout=timeout)
    store, *_ = next(
        dist.rendezvous(place.init_method, place.rank, place.world_size, timeout=timeout)
    )
    return store


def _address(init_method: str) -> tuple[str, int] | None:
    """Return host and port, None for a file."""
    if init_method == "env://":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    parts = urlsplit(init_method)
    return None if parts.scheme == "file" else (str(parts.hostname), int(parts.port or 0))


def _name(init_method: str) -> str:
    address = _address(init_method)
    return init_method if address is None else f"tcp://{address[0]}:{address[1]}"


def _is_agents() -> bool:
    """Whether torchrun itself already listens at the meeting point."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at port {port} of {host} ({reason}); choose another one with "
            "--dist-url tcp://HOST:PORT (MASTER_PORT under torchrun and SLURM)"
        ) from None


def _wait_for(host: str, port: int, *, place: ProcessEnv, timeout: timedelta) -> None:
    """Return when something listens at ``host:port``."""
    end = time.monotonic() + timeout.total_seconds()
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, left)).close()
            return
        except (OSError, OverflowError) as error:
            if left <= 0:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"process {place.rank} of {place.world_size} could not reach "
                    f"tcp://{host}:{port} within {timeout.total_seconds():g} s ({reason}); is "
                    "machine 0 started, and does its name and port open from here?"
                ) from None
        time.sleep(min(0.2, max(0.0, left)))
