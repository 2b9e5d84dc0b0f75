"""Values that wait as tensors until they are reported."""

from __future__ import annotations

import torch

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
