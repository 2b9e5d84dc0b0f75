"""Box coders and box losses over many boxes, of which some count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from d2dense.errors import UserError

__all__ = [
    "BOX_LOSSES",
    "box_losses",
    "box_transform",
    "check_box_loss",
    "encode",
    "giou_loss",
    "masked_box_loss",
]

BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")


def box_transform(*, weights: Sequence[float]) -> Box2BoxTransform:
    """Return the box coder with the weights of (dx, dy, dw, dh); TorchScript needs them as a tuple,
    which a lazy config cannot hold.
    """
    return Box2BoxTransform(weights=tuple(float(w) for w in weights))


def check_box_loss(name: str) -> None:
    """Raise a ``UserError`` unless ``name`` is one of ``BOX_LOSSES``."""
    if name not in BOX_LOSSES:
        raise UserError(
            f"box_reg_loss_type (BBOX_REG_LOSS_TYPE) is {name!r}; expected one of "
            f"{', '.join(BOX_LOSSES)}"
        )


def encode(boxes: Tensor, gt_boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the deltas ``(..., 4)`` that move boxes to gt_boxes; Detectron2's own version checks
    the boxes on the host.
    """
    size, gt_size = boxes[..., 2:] - boxes[..., :2], gt_boxes[..., 2:] - gt_boxes[..., :2]
    centre, gt_centre = boxes[..., :2] + 0.5 * size, gt_boxes[..., :2] + 0.5 * gt_size
    shift, scale = gt_centre - centre, gt_size / size
    return torch.stack(
        [
            weights[0] * shift[..., 0] / size[..., 0],
            weights[1] * shift[..., 1] / size[..., 1],
            weights[2] * torch.log(scale[..., 0]),
            weights[3] * torch.log(scale[..., 1]),
        ],
        dim=-1,
    )


def giou_loss(boxes: Tensor, gt_boxes: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return 1 - generalised IoU of each box with the ground truth, ``(...)``; fvcore's own version
    checks the boxes on the host.

    Args:
        boxes, gt_boxes: absolute xyxy, ``(..., 4)``; their leading axes are broadcast
        eps: added to areas that are divided by
    """
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    gt_x1, gt_y1, gt_x2, gt_y2 = gt_boxes.unbind(dim=-1)
    left, top = torch.max(x1, gt_x1), torch.max(y1, gt_y1)
    right, bottom = torch.min(x2, gt_x2), torch.min(y2, gt_y2)
    overlap = (bottom > top) & (right > left)
    both = torch.where(overlap, (right - left) * (bottom - top), torch.zeros_like(x1))
    union = (x2 - x1) * (y2 - y1) + (gt_x2 - gt_x1) * (gt_y2 - gt_y1) - both
    width = torch.max(x2, gt_x2) - torch.min(x1, gt_x1)
    height = torch.max(y2, gt_y2) - torch.min(y1, gt_y1)
    around = width * height
    return 1 - (both / (union + eps) - (around - union) / (around + eps))


def box_losses(
    deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    *,
    transform: Box2BoxTransform,
    loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Return the loss of each box: elements ``(R, 4)`` of ``smooth_l1``, else ``(R,)``.

    Args:
        deltas: predicted, ``(R, 4)``
        boxes: that the deltas move, ``(R, 4)``, absolute xyxy
        gt_boxes: ``(R, 4)``
        loss_type: ``smooth_l1`` between deltas, or ``giou``, ``diou``, ``ciou`` of decoded boxes;
            the last two are Detectron2's functions, which wait for the device
        smooth_l1_beta: where smooth L1 turns into L1; 0 is L1
    """
    if loss_type == "smooth_l1":
        target = encode(boxes, gt_boxes, transform.weights)
        return smooth_l1_loss(deltas, target, beta=smooth_l1_beta, reduction="none")
    decoded = transform.apply_deltas(deltas, boxes)
    if loss_type == "giou":
        return giou_loss(decoded, gt_boxes)
    return {"diou": diou_loss, "ciou": ciou_loss}[loss_type](decoded, gt_boxes, reduction="none")


def masked_box_loss(
    deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, mask: Tensor, **loss_settings
) -> Tensor:
    """Return the sum of the :func:`box_losses` of the rows in ``mask``, in float32.

    All rows are computed and the others left out afterwards, so that nobody waits for their number.

    Args:
        deltas: predicted, ``(N, R, 4)``
        boxes: that the deltas of every image move, ``(R, 4)``
        gt_boxes: ``(N, R, 4)``; any values where not in ``mask``
        mask: ``(N, R)`` bool
        loss_settings: of :func:`box_losses`
    """
    # rows that do not count get a harmless target: infinities times zero would be no number
    gt_boxes = torch.where(mask[..., None], gt_boxes, boxes)
    boxes = boxes.expand_as(gt_boxes)
    flat = [each.reshape(-1, 4) for each in (deltas.float(), boxes, gt_boxes)]
    losses = box_losses(*flat, **loss_settings)
    return (losses.view(mask.numel(), -1) * mask.view(-1, 1)).sum()
