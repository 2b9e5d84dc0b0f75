"""Tensors that the processes of a run share out: this process's part, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils import comm
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gathered", "local_part", "share_like"]


@torch.no_grad()
def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of ``tensor``, in the same memory and without a gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def gathered(tree: Any) -> Any:
    """Return ``tree`` (dicts, lists, anything) with every shared tensor put together on the CPU.

    All processes call it together. It is complete on the main one; the others have None in place
    of shared tensors.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if comm.is_main_process() else None
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value) for value in tree)
    return tree


@torch.no_grad()
def share_like(whole: Any, like: Any) -> Any:
    """Return this process's share of ``whole`` where ``like`` is shared out and has its shape, and
    ``whole`` itself otherwise. No process waits for another.
    """
    if not (isinstance(like, DTensor) and isinstance(whole, torch.Tensor)):
        return whole
    if isinstance(whole, DTensor) or whole.shape != like.shape:
        return whole
    # every process has the whole, so nothing needs to be sent
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
