"""Normalisation layers by name, and layer norm over the channels of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

__all__ = ["NORMS", "LayerNorm2d", "build_norm", "explained_single_values", "set_norms"]

NORMS = ("LN", "BN", "SyncBN", "FrozenBN", "GN")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels at every pixel of ``(N, C, H, W)``, by PyTorch's fused kernel.

    Images in ``channels_last`` memory are neither copied nor moved.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        pixels = input.permute(0, 2, 3, 1)
        pixels = F.layer_norm(pixels, self.normalized_shape, self.weight, self.bias, self.eps)
        return pixels.permute(0, 3, 1, 2)


def build_norm(name: str, channels: int) -> nn.Module:
    """Return the norm layer ``name`` for ``(N, channels, H, W)``: one of :data:`NORMS`.

    ``LN`` is :class:`LayerNorm2d` with eps 1e-6; all others are Detectron2's.

    Raises:
        UserError: an unknown name.
    """
    if name not in NORMS:
        raise UserError(
            f"unknown norm {name!r}, expected one of {', '.join(NORMS)}{nearest(name, NORMS)}"
        )
    return LayerNorm2d(channels) if name == "LN" else get_norm(name, channels)


@contextmanager
def explained_single_values() -> Iterator[None]:
    """Turn PyTorch's refusal to train a batch norm on one value per channel into a line that says
    what to change.

    One image per process is enough for it wherever a map has a single pixel, as under UperNet's
    pooling.

    Raises:
        UserError: a batch norm got one value per channel.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a batch norm in training got one value per channel, which has no variance: give every "
            "process two images or more (SOLVER.IMS_PER_BATCH or "
            "dataloader.train.total_batch_size), larger images, or the norm GN, LN or FrozenBN"
        ) from error


def set_norms(
    module: nn.Module, *, eps: float | None = None, momentum: float | None = None
) -> nn.Module:
    """Change eps of every norm inside ``module`` and momentum of its batch norms, in place.

    Args:
        eps, momentum: None leaves them; a batch norm's momentum is the share of the new batch in
            the running statistics.

    Returns:
        ``module``.
    """
    for each in module.modules():
        is_batch_norm = isinstance(each, nn.modules.batchnorm._BatchNorm)
        if eps is not None and (is_batch_norm or isinstance(each, (nn.LayerNorm, nn.GroupNorm))):
            each.eps = eps
        if momentum is not None and is_batch_norm:
            each.momentum = momentum
    return module
