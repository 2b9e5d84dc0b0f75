"""What the encoder hands to the decoder, and the geometry of padded batches.

Letters: N images, C channels, L levels, S positions of all levels together, H and W size of the
batch, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Memory", "centres", "padding_masks", "valid_ratios"]


class Memory(NamedTuple):
    """Encoded positions of all levels.

    Attributes:
        tokens: ``(N, S, C)``, the levels one after the other, each row by row.
        shapes: (Hl, Wl) per level.
        padding: ``(N, S)``, True where there is no image.
        valid_ratios: ``(N, L, 2)``, the share of the level's width and height that is image.
        positions: ``(N, S, C)``, their encoding, for decoders whose attention compares positions.
    """

    tokens: Tensor
    shapes: list[tuple[int, int]]
    padding: Tensor
    valid_ratios: Tensor
    positions: Tensor | None = None


def padding_masks(
    image_sizes: Tensor, batch_size: tuple[int, int], shapes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return ``(N, Hl, Wl)`` per level, True where there is no image, by the nearest pixel.

    Args:
        image_sizes: ``(N, 2)``, height and width without padding
        batch_size: (H, W)
        shapes: (Hl, Wl) per level
    """
    axes = []
    for axis in (0, 1):
        pixels = torch.arange(batch_size[axis], device=image_sizes.device)
        axes.append((pixels >= image_sizes[:, axis, None]).to(torch.float32)[:, None])
    masks = []
    for height, width in shapes:
        rows = F.interpolate(axes[0], size=(height,), mode="nearest")[:, 0] > 0
        columns = F.interpolate(axes[1], size=(width,), mode="nearest")[:, 0] > 0
        masks.append(rows[:, :, None] | columns[:, None, :])
    return masks


def valid_ratios(padding: Tensor) -> Tensor:
    """Return the shares of width and height that are image, ``(N, 2)``.

    Args:
        padding: ``(N, Hl, Wl)``
    """
    there = (~padding).to(torch.float32)
    return torch.stack([there[:, 0, :].mean(dim=1), there[:, :, 0].mean(dim=1)], dim=-1)


def centres(shapes: Sequence[tuple[int, int]], ratios: Tensor) -> Tensor:
    """Return the centre of every position as x and y relative to each level's size, padding
    included, ``(N, S, L, 2)``.

    Args:
        shapes: (Hl, Wl) per level
        ratios: ``(N, L, 2)``, see :class:`Memory`
    """
    levels = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, dtype=torch.float32, device=ratios.device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=ratios.device) + 0.5
        x = x / (ratios[:, level, 0, None] * width)  # relative to the image, (N, Wl)
        y = y / (ratios[:, level, 1, None] * height)
        grid = (
            x[:, None, :].expand(-1, y.shape[1], -1),
            y[:, :, None].expand(-1, -1, x.shape[1]),
        )
        levels.append(torch.stack(grid, dim=-1).flatten(1, 2))
    return torch.cat(levels, dim=1)[:, :, None] * ratios[:, None]
