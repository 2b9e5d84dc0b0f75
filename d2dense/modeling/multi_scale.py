"""Test-time augmentation of detectors: one image at several sizes, mirrored too.

Letters: C channels, H and W of the image, R detections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2dense.errors import UserError

from .suppression import METHODS, suppress, vote

__all__ = ["MultiScaleDetector"]

_KEYS = "TEST.AUG / train.test_aug"


class MultiScaleDetector(nn.Module):
    """A detector that sees each image at several sizes, and whose detections of all of them become
    one set by soft suppression within classes.

    It works for any model that returns ``instances`` with ``pred_boxes``, ``scores`` and
    ``pred_classes``, perhaps ``pred_masks``, at the size that ``height`` and ``width`` of its input
    say. The versions are made of the given image: give it in its own size, as the test loaders do
    where several sizes are asked for. An image that was shrunk before would be enlarged again
    without its details.

    An image and its mirror image go through the model together, one size after the other, so that a
    result does not depend on the other images of a batch.

    Args:
        model: in evaluation mode when this is called
        min_sizes: of the shorter side, one version for each
        max_size: that no longer side exceeds, at which the shorter one is less
        flip: mirror each version as well
        method, iou, sigma, min_score: see :func:`~d2dense.modeling.suppression.suppress`
        voting_iou: move each box by box voting at this IoU; None: boxes stay
        max_detections: of an image; COCO counts 100 of them, LVIS 300

    Raises:
        UserError: numbers that make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        min_sizes: Sequence[int] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        max_size: int = 4000,
        flip: bool = True,
        method: str = "linear",
        iou: float = 0.5,
        sigma: float = 0.5,
        min_score: float = 1e-3,
        voting_iou: float | None = None,
        max_detections: int = 300,
    ):
        super().__init__()
        self.model = model
        self.min_sizes, self.max_size, self.flip = list(min_sizes), max_size, flip
        self.suppression: dict[str, Any] = {
            "method": method,
            "iou": iou,
            "sigma": sigma,
            "min_score": min_score,
        }
        self.voting_iou, self.max_detections = voting_iou, max_detections
        self._check()

    def _check(self) -> None:
        if not self.min_sizes or min(*self.min_sizes, self.max_size, self.max_detections) < 1:
            raise UserError(
                f"{_KEYS}: min_sizes = {self.min_sizes}, max_size = {self.max_size}, "
                f"max_detections = {self.max_detections}; expected numbers from 1"
            )
        if self.suppression["method"] not in METHODS:
            raise UserError(
                f"{_KEYS}: method = {self.suppression['method']!r}, expected one of "
                f"{', '.join(METHODS)}"
            )
        limits = {name: self.suppression[name] for name in ("iou", "sigma")}
        if self.voting_iou is not None:
            limits["voting_iou"] = self.voting_iou
        for name, value in limits.items():
            if value <= 0 or (name != "sigma" and value > 1):
                raise UserError(f"{_KEYS}: {name} = {value}, expected a number above 0, IoUs to 1")

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return ``[{"instances": Instances}]``, best first.

        Args:
            batched_inputs: per image ``image``, ``(C, H, W)``, and perhaps ``height`` and ``width``
                of the result

        Raises:
            UserError: the model returns no ``instances``.
        """
        return [{"instances": self.detect(each)} for each in batched_inputs]

    def detect(self, image: dict[str, Any]) -> Instances:
        """Return the detections of one image, merged."""
        found = []
        for versions in self._versions(image):
            outputs = self.model(versions)
            if "instances" not in outputs[0]:
                raise UserError(
                    f"{_KEYS} merges boxes, but the model returns {', '.join(outputs[0])}; switch "
                    "it off (segmentation has TEST.SEM_SEG / model.inference)"
                )
            # a mirrored image is the second of the two
            for output, restore in zip(outputs, (_boxes_and_masks, _mirrored)):
                found.append(restore(output["instances"]))
        return self.merge(Instances.cat(found))

    def merge(self, found: Instances) -> Instances:
        """Return the best of the detections of all versions, best first."""
        boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
        remaining = suppress(boxes, scores, classes, **self.suppression)
        best, kept = remaining.topk(min(self.max_detections, len(remaining)))
        kept = kept[best > 0]
        result = found[kept]
        result.scores = remaining[kept]
        if self.voting_iou is not None:
            moved = vote(
                result.pred_boxes.tensor,
                boxes,
                scores,
                classes=result.pred_classes,
                candidate_classes=classes,
                iou=self.voting_iou,
            )
            result.pred_boxes = Boxes(moved)
        return result

    def _versions(self, image: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Yield the image at each size, followed by its mirror image."""
        pixels = image["image"]
        size = {
            "height": image.get("height", pixels.shape[1]),
            "width": image.get("width", pixels.shape[2]),
        }
        for min_size in self.min_sizes:
            scaled = _resized(pixels, min_size, self.max_size)
            views = [scaled, scaled.flip(2)] if self.flip else [scaled]
            yield [{**size, "image": view} for view in views]


def _resized(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Resize ``(C, H, W)`` as the loaders do."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    resize = ResizeShortestEdge(min_size, max_size).get_transform(pixels)
    return torch.from_numpy(resize.apply_image(pixels).copy()).permute(2, 0, 1).contiguous()


def _boxes_and_masks(found: Instances) -> Instances:
    """Return what can be merged of the detections."""
    names = ("pred_boxes", "scores", "pred_classes", "pred_masks")
    return Instances(found.image_size, **{n: found.get(n) for n in names if found.has(n)})


def _mirrored(found: Instances) -> Instances:
    found = _boxes_and_masks(found)
    x0, y0, x1, y1 = found.pred_boxes.tensor.unbind(dim=1)
    width = found.image_size[1]
    found.pred_boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    if found.has("pred_masks"):
        found.pred_masks = found.pred_masks.flip(2)
    return found
