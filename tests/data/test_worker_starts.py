"""Workers that hang while they are forked: found, ended and replaced."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import time

import pytest
import torch

from d2dense.data import workers
from d2dense.data.loaders import build_test_loader
from d2dense.errors import UserError

RECORDS = [{"file_name": str(i), "image_id": i} for i in range(8)]


@pytest.fixture
def hang(monkeypatch):
    """Let the first ``n`` workers hang as a fork does: for ever, with SIGTERM held back."""
    forks = mmap.mmap(-1, 1)
    pids: list[int] = []
    fork = os.fork
    monkeypatch.setattr(workers, "START_SECONDS", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)

    def hanging(n: int) -> list[int]:
        def forked() -> int:
            forks[0] += 1
            mine = forks[0]
            pid = fork()
            if pid:
                pids.append(pid)
                return pid
            while mine <= n:
                time.sleep(60)
            return pid

        monkeypatch.setattr(os, "fork", forked)
        return pids

    yield hanging
    limit = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < limit:
        time.sleep(0.01)  # those that were told to end
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # none may be left


def image_ids(**options) -> list[int]:
    loader = build_test_loader(dataset=RECORDS, mapper=dict, **options)
    return [record["image_id"] for batch in loader for record in batch]


def test_a_worker_that_hangs_at_its_start_is_replaced(hang, caplog):
    pids = hang(1)
    assert image_ids(num_workers=2) == list(range(8))
    assert len(pids) == 4  # both were started again
    assert "1 of 2 processes that read data hang at their start" in caplog.text


def test_workers_that_never_start_are_one_line(hang, monkeypatch):
    monkeypatch.setattr(workers, "_START_ATTEMPTS", 2)
    hang(100)
    with pytest.raises(UserError, match=r"do not start within 0 s; use fewer .*NUM_WORKERS"):
        image_ids(num_workers=1)


def test_workers_that_start_cost_no_wait(hang, caplog):
    pids = hang(0)
    assert image_ids(num_workers=2) == list(range(8))
    assert len(pids) == 2
    assert not caplog.text
