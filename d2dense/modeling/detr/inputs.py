"""What images a detector takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2dense.errors import UserError

__all__ = ["check_channels", "check_sides", "within"]


def check_channels(images: Sequence[Tensor], channels: int) -> None:
    """Check that there are images, each ``(channels, h, w)``.

    Raises:
        UserError: otherwise.
    """
    if not images:
        raise UserError("a batch without an image; expected at least one")
    for number, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != channels:
            raise UserError(
                f"image {number} of the batch has the shape {tuple(image.shape)}; expected "
                f"({channels}, height, width): for grey or transparent pictures convert them to "
                f"{channels} channels, or change MODEL.PIXEL_MEAN and PIXEL_STD (yaml), "
                "model.pixel_mean and pixel_std (lazy) and the backbone's input"
            )


def check_sides(images: Sequence[Tensor], square: int) -> None:
    """Check that images ``(C, h, w)`` fit into a square of that side; 0: any do.

    Raises:
        UserError: one does not.
    """
    larger = [side for image in images for side in image.shape[1:] if side > square > 0]
    if larger:
        raise UserError(
            f"an image has a side of {max(larger)} pixels, batches one of {square} "
            "(MODEL.DETR.SQUARE / model.square, or the backbone's); resize to less "
            "(INPUT.MAX_SIZE_TEST / max_size of dataloader.test.mapper.augmentations, at several "
            "sizes TEST.AUG.MAX_SIZE / train.test_aug.max_size) or set it to 0"
        )


@torch.jit.script_if_tracing
def within(image: Tensor, square: int) -> Tensor:
    """Return the image ``(C, h, w)``; a trace of it refuses images that do not fit into a square
    of that side, as :func:`check_sides` does, where filling up by a negative number would crop
    them in silence.
    """
    largest = max(image.shape[1], image.shape[2])
    if largest > square:
        raise ValueError(
            f"an image has a side of {largest} pixels, this model takes up to {square}; resize it"
        )
    return image
