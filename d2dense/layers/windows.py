"""Maps cut into windows, and put together again.

Letters: N images, H and W height and width of a map, C channels, B windows of all images together.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .deformable_sampling import is_recorded

__all__ = ["join_windows", "missing", "padded_to_multiple", "split_windows"]


def padded_to_multiple(x: Tensor, side: int) -> Tensor:
    """Fill up ``(N, H, W, C)`` with zeros at the right and the bottom to multiples of ``side``."""
    h, w = x.shape[1], x.shape[2]
    if not is_recorded() and h % side == 0 and w % side == 0:
        return x  # filling up by nothing copies
    return F.pad(x, (0, 0, 0, missing(w, side), 0, missing(h, side)))


def missing(size: int, multiple: int) -> int:
    """Return what ``size`` lacks of the next multiple. In torch.export's sums it cancels with the
    size itself, and what is left is divisible; a remainder would stay as it is.
    """
    return (size + multiple - 1) // multiple * multiple - size


def split_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Return the windows of ``(N, H, W, C)`` as ``(B, height * width, C)``, those of an image in
    reading order; ``height`` and ``width`` divide H and W.
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // height, height, w // width, width, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, c)


def join_windows(windows: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    """Return the map ``(N, h, w, C)`` that :func:`split_windows` cut into ``windows``.

    Args:
        windows: ``(B, height * width, C)``
        height, width: of a window
        h, w: of the map
    """
    c = windows.shape[-1]
    x = windows.reshape(-1, h // height, w // width, height, width, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
