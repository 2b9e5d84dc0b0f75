"""Processes that do not find each other say so within a bounded time."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest

from d2dense.engine.cluster import ProcessEnv
from d2dense.engine.meeting import meet
from d2dense.errors import UserError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def arrive(rank, url, seconds=0.5):
    place = ProcessEnv(rank=rank, world_size=2, local_rank=rank, local_size=2, init_method=url)
    return meet(place, timeout=timedelta(seconds=seconds))


@contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.fixture
def listener():
    """The port of a program that lets others connect and never answers."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken(listener):
    with within(2), pytest.raises(UserError, match=rf"at port {listener} .*in use.*--dist-url"):
        arrive(0, f"tcp://127.0.0.1:{listener}")


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_first_machine_that_cannot_be_reached(host):
    with (
        within(10),
        pytest.raises(UserError, match=rf"could not reach tcp://{host}:\d+ within 0.5 s"),
    ):
        arrive(1, f"tcp://{host}:{free_port()}")


def test_the_variables_of_torchrun_lead_to_the_same_words(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with within(10), pytest.raises(UserError, match="process 1 of 2 could not reach"):
        arrive(1, "env://")


def test_somebody_else_listens_there(listener):
    with within(10), pytest.raises(UserError, match="process 1 of 2 did not meet the others"):
        arrive(1, f"tcp://127.0.0.1:{listener}")


def test_a_process_that_never_comes():
    with within(10), pytest.raises(UserError, match=r"process 0 of 2 .*1/2 .*--machine-rank"):
        arrive(0, f"tcp://127.0.0.1:{free_port()}", seconds=1)
