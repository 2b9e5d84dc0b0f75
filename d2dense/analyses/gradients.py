"""Input gradient maps (appendix B of the CEDNet paper): how much the loss depends on each pixel.

Not stated in the paper and fixed here: the largest absolute value over the colour channels; loss
code without dropout and stochastic depth and with fixed norm statistics; images resized as in
tests; each image alone; what is padded around it left out; gradients with respect to pixel values
from 0 to 255.

Letters: C colour channels, H and W of the resized image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2dense.engine import random_state
from d2dense.errors import UserError

from .untouched import set_loss_mode, untouched

__all__ = ["InputGradient", "input_gradient"]


@dataclass(frozen=True)
class InputGradient:
    """
    Attributes:
        map: ``(H, W)`` on the CPU, largest ``|dLoss / dPixel|`` over the channels
        loss: sum of all losses
    """

    map: Tensor
    loss: float


def input_gradient(model: nn.Module, sample: Mapping[str, Any], *, seed: int = 0) -> InputGradient:
    """Return the gradient of the total detection loss of one image with respect to its pixels.

    The model and the global random generators stay as they are.

    Args:
        model: any Detectron2 detector that returns a dict of losses in training mode.
        sample: what a training mapper gives: ``image`` ``(C, H, W)`` in 0 .. 255 and ``instances``.
        seed: of what the losses draw. Two-stage detectors sample anchors and regions at random, so
            that their map is that of one draw, the same whenever it is asked for.

    Raises:
        UserError: the model gives no losses, they do not depend on the image, or are not finite.
    """
    device = next(model.parameters()).device
    image = sample["image"].to(device, torch.float32, copy=True).requires_grad_()
    # iteration 1: heads write pictures and counts at multiples of their periods
    with untouched(model), random_state.isolated(), EventStorage(start_iter=1), torch.enable_grad():
        set_loss_mode(model)
        torch.manual_seed(seed)
        losses = model([{**sample, "image": image}])
        if not isinstance(losses, Mapping) or not losses:
            raise UserError(
                f"{type(model).__name__} returns no losses in training mode but "
                f"{type(losses).__name__}; input gradients are for detectors that are trained here"
            )
        total: Any = sum(losses.values())
        gradient = None
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, image, allow_unused=True)
    if gradient is None:
        raise UserError(
            f"the losses of {type(model).__name__} do not depend on the image; its preprocessing "
            "must keep gradients"
        )
    found = InputGradient(gradient.abs().amax(dim=0).cpu(), float(total.detach()))
    if not torch.isfinite(found.map).all():
        name = sample.get("file_name", "an image")
        raise UserError(
            f"the loss of {name} is {found.loss:g} and its gradient is not finite; give weights of "
            "a model that was trained"
        )
    return found
