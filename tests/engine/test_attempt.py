"""Processes of one attempt find each other in a store that earlier attempts have used."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from d2dense.engine.attempt import attempt_store
from d2dense.errors import UserError

SOON = timedelta(seconds=20)


@pytest.fixture
def store():
    """A server with clients, as each process has its own connection."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SOON)
    return lambda: dist.TCPStore(
        "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=SOON
    )


def attempt(store, world_size, ranks=None, timeout=SOON):
    """Let the given ranks arrive at once; return their views by rank."""
    found = {}

    def arrive(rank):
        try:
            found[rank] = attempt_store(store(), rank=rank, world_size=world_size, timeout=timeout)
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=arrive, args=(r,)) for r in ranks or range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_values_of_earlier_attempts_are_not_seen(store):
    for round_number in range(3):
        views = attempt(store, 3)
        assert sorted(views) == [0, 1, 2]
        assert not any(view.check(["address"]) for view in views.values())
        views[1].set("address", f"round {round_number}")
        assert [views[rank].get("address") for rank in (0, 2)] == [
            f"round {round_number}".encode()
        ] * 2


def test_what_a_dead_process_asked_is_no_obstacle(store):
    """It asked, died before it confirmed, and its successor asks again a moment later."""
    store().set("ask/1", "0123")
    results = {}
    first = threading.Thread(target=lambda: results.update(attempt(store, 2, ranks=[0])))
    first.start()
    store().get("answer/0123")  # the dead one has been answered
    results |= attempt(store, 2, ranks=[1])
    first.join(30)
    results[0].set("key", "value")
    assert results[1].get("key") == b"value"


def test_a_missing_process_is_said(store):
    result = attempt(store, 3, ranks=[0], timeout=timedelta(seconds=0.3))[0]
    assert isinstance(result, UserError)
    assert "2 of 3 processes did not arrive" in str(result)


def test_one_process_needs_nobody(store):
    assert attempt(store, 1)[0].add("count", 1) == 1
