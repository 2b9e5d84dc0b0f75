"""Counts what would make the host wait for a GPU, on any device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OpCounter(TorchDispatchMode):
    """Counts operators, and those whose result size or value the host must wait for on a GPU."""

    WAITING = ("aten.nonzero", "aten._local_scalar_dense", "aten.masked_select", "aten.unique")

    def __init__(self):
        super().__init__()
        self.total = self.waiting = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        # a boolean mask as an index is a nonzero in disguise
        masked = str(func).startswith("aten.index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        self.waiting += masked or str(func).startswith(self.WAITING)
        return func(*args, **(kwargs or {}))
