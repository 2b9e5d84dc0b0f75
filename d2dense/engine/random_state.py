"""The global random generators of a process: read, put back, and kept out of an evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

__all__ = ["isolated", "process_state", "resolve_seed", "restore_process", "seed_process"]


def resolve_seed(seed: int) -> int:
    """Return ``seed``, or for a negative one a number that is drawn here and equal everywhere."""
    return comm.shared_random_seed() if seed < 0 else seed


def seed_process(seed: int) -> None:
    """Seed Python, numpy and torch, each process differently."""
    seed_all_rng(seed + comm.get_rank())


def process_state() -> dict[str, Any]:
    """Return the state of this process's generators as plain values and tensors."""
    version, words, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = of_numpy
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_process(state: dict[str, Any]) -> None:
    """Put back what :func:`process_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    if keys.dtype != torch.int64:
        raise ValueError(f"numpy's random state has {keys.dtype} words, expected torch.int64")
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def isolated() -> Iterator[None]:
    """Leave the generators after a ``with`` block as they were before it."""
    state = process_state()
    try:
        yield
    finally:
        restore_process(state)
