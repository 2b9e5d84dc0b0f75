"""Masks at points, where losses are computed (PointRend).

Letters: R masks, P points, H and W size of a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sample", "uncertain_points"]


def sample(masks: Tensor, points: Tensor) -> Tensor:
    """Return bilinear values ``(R, ..., P)``.

    Args:
        masks: ``(R, ..., H, W)``
        points: ``(R, P, 2)``, x and y relative to the size of the masks
    """
    inner = masks.shape[1:-2]
    maps = masks.reshape(masks.shape[0], -1, *masks.shape[-2:])
    values = F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)
    return values[:, :, 0].reshape(masks.shape[0], *inner, points.shape[1])


@torch.no_grad()
def uncertain_points(
    masks: Tensor, *, count: int, oversample: float = 3.0, important: float = 0.75
) -> Tensor:
    """Return points ``(R, count, 2)``: of ``oversample`` times as many random ones those whose
    logits are closest to 0, and for the rest of the share ``important`` random ones.

    Args:
        masks: logits ``(R, H, W)``
    """
    r, chosen = len(masks), int(important * count)
    points = torch.rand(r, int(oversample * count), 2, device=masks.device)
    index = sample(masks, points).abs().topk(chosen, dim=1, largest=False).indices
    points = points.gather(1, index[..., None].expand(-1, -1, 2))
    others = torch.rand(r, count - chosen, 2, device=masks.device)
    return torch.cat([points, others], dim=1)
