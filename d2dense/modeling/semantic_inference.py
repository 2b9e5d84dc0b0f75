"""How a segmentation network goes over an image in evaluation: at once or in windows, at one scale
or at several.

Letters: N images of one size, K classes, H and W of the image, H0 and W0 of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

__all__ = ["SemanticInference", "scaled_side", "window_starts"]

# Normalised images (N, 3, H, W) to scores (N, K, H, W).
Network = Callable[[Tensor], Tensor]

_AVERAGES = ("probabilities", "logits")
_KEYS = "TEST.SEM_SEG / model.inference"


class SemanticInference(nn.Module):
    """Scores of images of one size, from one pass of a network or from the mean of several.

    Windows start every ``stride`` pixels; the last of a row or column is moved back to end at the
    border. Where they overlap, a pixel gets the mean of their scores. An image that is smaller than
    a window is seen whole in that direction.

    Several scales: the image is resized to each of ``ratios`` of its size, once as it is and once
    mirrored, and goes through the network as a single scale does (windows keep their size). Scores
    are resized to the result's size, mirrored back and averaged with equal weights.

    Args:
        window: its (height, width) in pixels; None: the whole image at once.
        stride: steps (down, across) between windows; by default two thirds of the window.
        max_windows: how many windows go through the network at once; fewer need less memory.
        multi_scale: whether ``ratios`` and ``flip`` are used.
        ratios: of the scaled images' sides to those of the given image.
        flip: whether each scale is seen mirrored as well.
        average: over scales, ``"probabilities"`` (after a softmax) or ``"logits"``.
        keep_odd: the scaled side of an odd side is odd too, see :func:`scaled_side`.
        align_corners: how images and scores are resized; see
            :func:`torch.nn.functional.interpolate`.
        pad_to: (height, width) that images are at least filled up to, on the right and bottom,
            before anything else; what is predicted there is cut off.
        pad_step: sides are filled up to 1 more than a multiple of this; 0: they are not.
        pad_value: what they are filled up with, a grey value before normalisation; None: zeros
            after it.

    Raises:
        UserError: numbers that make no sense.
    """

    def __init__(
        self,
        *,
        window: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        max_windows: int = 4,
        multi_scale: bool = False,
        ratios: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        flip: bool = True,
        average: str = "probabilities",
        keep_odd: bool = False,
        align_corners: bool = False,
        pad_to: Sequence[int] | None = None,
        pad_step: int = 0,
        pad_value: float | None = None,
    ):
        super().__init__()
        self.window = None if window is None else _sides("window", window)
        if stride is None and self.window is not None:
            stride = [max(1, side * 2 // 3) for side in self.window]
        self.stride = None if stride is None else _sides("stride", stride)
        self.max_windows = max_windows
        self.multi_scale = multi_scale
        self.ratios = [float(ratio) for ratio in ratios]
        self.flip = flip
        self.average = average
        self.keep_odd = keep_odd
        self.align_corners = align_corners
        self.pad_to = [1, 1] if pad_to is None else _sides("pad_to", pad_to)
        self.pad_step = pad_step
        self.pad_value = pad_value
        self._check()

    def _check(self) -> None:
        if self.window is None:
            if self.stride is not None:
                raise UserError(f"{_KEYS}: stride = {self.stride}, but there is no window; set it")
        elif self.stride and any(step > side for step, side in zip(self.stride, self.window)):
            raise UserError(
                f"{_KEYS}: stride = {self.stride} steps over pixels between windows of "
                f"{self.window}; make it at most the window"
            )
        if self.pad_step < 0:
            raise UserError(f"{_KEYS}: pad_step = {self.pad_step}, expected at least 0")
        if self.max_windows < 1:
            raise UserError(f"{_KEYS}: max_windows = {self.max_windows}, expected at least 1")
        if not self.ratios or min(self.ratios) <= 0:
            raise UserError(f"{_KEYS}: ratios = {self.ratios}, expected positive numbers")
        if self.average not in _AVERAGES:
            raise UserError(
                f"{_KEYS}: average = {self.average!r}, expected one of {', '.join(_AVERAGES)}"
                f"{nearest(self.average, _AVERAGES)}"
            )

    @torch.jit.unused
    def forward(
        self,
        network: Network,
        images: Tensor,
        size: tuple[int, int],
        fill: Tensor | None = None,
    ) -> Tensor:
        """Return scores ``(N, K, H0, W0)``, float32: averaged probabilities for several scales with
        this ``average``, else logits.

        Args:
            network: called with images of any size.
            images: ``(N, 3, H, W)``, normalised.
            size: (H0, W0) of the result.
            fill: ``(3, 1, 1)``, the normalised ``pad_value``; None: zeros.
        """
        height, width = images.shape[2:]
        images = self._filled(images, fill)
        if images.shape[2:] == (height, width):
            return self._scores(network, images, size)
        scores = self._scores(network, images, tuple(images.shape[2:]))
        return self._resized(scores[:, :, :height, :width], size)

    def _filled(self, images: Tensor, fill: Tensor | None) -> Tensor:
        sides = [max(pair) for pair in zip(images.shape[2:], self.pad_to)]
        if self.pad_step:
            sides = [side + (1 - side) % self.pad_step for side in sides]
        height, width = images.shape[2:]
        if sides == [height, width]:
            return images
        filled = images.new_zeros(*images.shape[:2], *sides)
        if fill is not None:
            filled += fill
        filled[:, :, :height, :width] = images
        return filled

    def _scores(self, network: Network, images: Tensor, size: tuple[int, int]) -> Tensor:
        if not self.multi_scale:
            return self._resized(self._single(network, images), size)
        total: Any = None
        for scaled, is_flipped in self._views(images):
            scores = self._resized(self._single(network, scaled), size)
            if self.average == "probabilities":
                scores = scores.softmax(1)
            total = torch.zeros_like(scores) if total is None else total
            total += scores.flip(3) if is_flipped else scores
        return total.div_(len(self.ratios) * (1 + self.flip))

    def _views(self, images: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield the scaled images and whether they are mirrored."""
        for ratio in self.ratios:
            height, width = (scaled_side(s, ratio, self.keep_odd) for s in images.shape[2:])
            # smoothed where it shrinks, as images are in training
            scaled = self._resized(images, (height, width), antialias=True)
            yield scaled, False
            if self.flip:
                yield scaled.flip(3), True

    def _single(self, network: Network, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            return network(images).float()
        sides, window = images.shape[2:], [min(w, s) for w, s in zip(self.window, images.shape[2:])]
        starts = [window_starts(*each) for each in zip(sides, window, self.stride)]
        places = [
            (slice(y, y + window[0]), slice(x, x + window[1]))
            for y, x in itertools.product(*starts)
        ]
        if len(places) == 1:
            return network(images).float()
        return self._mean_of_windows(network, images, places)

    def _mean_of_windows(
        self, network: Network, images: Tensor, places: Sequence[tuple[slice, slice]]
    ) -> Tensor:
        total: Any = None
        count = images.new_zeros(images.shape[2:], dtype=torch.float32)
        at_once = max(1, self.max_windows // len(images))
        for first in range(0, len(places), at_once):
            part = places[first : first + at_once]
            scores = network(torch.cat([images[:, :, y, x] for y, x in part]))
            if total is None:
                total = scores.new_zeros(
                    len(images), scores.shape[1], *images.shape[2:], dtype=torch.float32
                )
            for (y, x), each in zip(part, scores.split(len(images))):
                total[:, :, y, x] += each
                count[y, x] += 1
        return total.div_(count)

    def _resized(self, x: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
        if tuple(x.shape[2:]) == tuple(size):
            return x
        return F.interpolate(
            x, size=size, mode="bilinear", align_corners=self.align_corners, antialias=antialias
        )

    def extra_repr(self) -> str:
        parts = ["whole image"]
        if self.window is not None:
            parts = [f"window={self.window}", f"stride={self.stride}"]
        if self.multi_scale:
            parts += [f"ratios={self.ratios}", f"flip={self.flip}", f"average={self.average}"]
        if self.pad_to != [1, 1]:
            parts.append(f"pad_to={self.pad_to}")
        if self.pad_step:
            parts.append(f"pad_step={self.pad_step}")
        return ", ".join(parts)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side, the last one moved back to end at ``length``.

    Args:
        window: at most ``length``.
    """
    count = max(-(-(length - window) // stride), 0) + 1
    return [min(k * stride, length - window) for k in range(count)]


def scaled_side(side: int, ratio: float, keep_odd: bool) -> int:
    """Return the length of a scaled side, at least one pixel: rounded half up; with ``keep_odd``
    the whole part, and one more where an odd side would become even, for networks that want
    2^k n + 1 pixels.
    """
    if not keep_odd:
        return max(1, int(side * ratio + 0.5))
    scaled = max(1, int(side * ratio))
    return scaled + (side % 2 == 1 and scaled % 2 == 0)


def _sides(name: str, value: Sequence[int]) -> list[int]:
    sides = list(value)
    if len(sides) != 2 or any(int(side) != side or side < 1 for side in sides):
        raise UserError(f"{_KEYS}: {name} = {sides}, expected height and width in pixels")
    return [int(side) for side in sides]
