"""Values that wait as tensors until they are reported."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils import comm

from d2dense.engine.metrics import TensorStorage


class Watched(torch.Tensor):
    """A tensor that counts how often its value is read."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "__float__", "tolist", "cpu"):
            cls.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_are_read_once_per_flush_and_keep_their_iterations():
    Watched.reads = 0
    with TensorStorage(10) as storage:
        for iteration in range(10, 15):
            storage.iter = iteration
            storage.put_scalar("loss", torch.tensor(float(iteration)).as_subclass(Watched))
            with storage.name_scope("head"):
                storage.put_scalar("fg", torch.tensor(2 * iteration).as_subclass(Watched))
            storage.put_scalar("plain", iteration, smoothing_hint=False)
        assert Watched.reads == 0
        assert "loss" not in storage.latest()
        storage.flush(averaged=["loss"])
    assert Watched.reads == 1
    assert storage.history("loss").values() == [(float(i), i) for i in range(10, 15)]
    assert storage.history("head/fg").values() == [(2.0 * i, i) for i in range(10, 15)]
    assert storage.latest()["plain"] == (14.0, 14)
    storage.flush()
    assert len(storage.history("loss").values()) == 5


def test_what_changes_in_place_is_reported_as_it_was():
    with TensorStorage() as storage:
        counter = torch.zeros(())
        for iteration in range(3):
            storage.iter = iteration
            storage.put_scalar("count", counter.add_(1))
        storage.flush()
    assert [value for value, _ in storage.history("count").values()] == [1, 2, 3]


def test_long_runs_keep_the_latest_values_only():
    with TensorStorage(max_length=50) as storage:
        for iteration in range(1000):
            storage.iter = iteration
            storage.put_scalar("plain", iteration)
            storage.put_scalar("tensor", torch.tensor(float(iteration)))
            if iteration % 20 == 19:
                storage.flush()
    for name in ("plain", "tensor"):
        assert storage.history(name).values() == [(float(i), i) for i in range(950, 1000)]
    assert storage.latest_with_smoothing_hint(20)["tensor"] == (989.5, 999)


def test_a_resumed_run_may_smooth_otherwise():
    with TensorStorage(2) as storage:
        storage.put_scalar("loss", 3.0)
        storage.put_scalar("rate", 1.0, smoothing_hint=False)
        recent = storage.recent(window=20, since=0)
    with TensorStorage(3) as storage:
        storage.restore(recent)
        assert storage.smoothing_hints() == {"loss": True, "rate": False}
        storage.put_scalar("loss", torch.tensor(5.0), smoothing_hint=False)
        storage.put_scalar("rate", 2.0)
        storage.flush()
        assert storage.smoothing_hints() == {"loss": False, "rate": True}
        assert storage.latest_with_smoothing_hint() == {"loss": (5.0, 3), "rate": (1.5, 3)}
        with pytest.raises(AssertionError, match="different smoothing_hint"):
            storage.put_scalar("rate", 2.0, smoothing_hint=False)


def test_processes_without_writers_keep_no_pictures(monkeypatch):
    """Models with a VIS_PERIOD draw in every process."""
    picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for is_main, kept in ((True, 1), (False, 0)):
        monkeypatch.setattr(comm, "is_main_process", lambda is_main=is_main: is_main)
        with TensorStorage() as storage:
            storage.put_image("proposals", picture)
            storage.put_histogram("scores", torch.arange(3.0))
            storage.flush()
        assert len(storage._vis_data) == len(storage._histograms) == kept
