"""Copy-paste: objects of a second training image are put into the first one, where they were.

The default is CEDNet's: the pixels of enlarged boxes are pasted, an object may come twice, and
objects of the first image that disappear under a paste stay annotated. With ``corrected`` the
annotations say what is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    PolygonMasks,
    pairwise_iou,
    polygons_to_bitmask,
)
from torch import Tensor
from torch.nn import functional as F

from d2dense.errors import UserError

__all__ = ["CopyPaste", "build_copy_paste"]

Sample = dict[str, Any]
Window = tuple[slice, slice]  # rows, columns

# Objects whose box has a side of at most this many pixels are dropped.
_MIN_SIDE = 0.01


class CopyPaste:
    """Joins two mapped samples, with numbers from numpy's global generator."""

    def __init__(
        self,
        *,
        prob: float = 0.5,
        max_iou: float = 0.2,
        max_objects: int = 7,
        margin: int = 15,
        corrected: bool = False,
        min_visible: float = 0.25,
        any_number: bool = False,
        min_pixels: int | None = None,
        max_shift: float = 10.0,
        masks_only: bool = False,
        into_empty: bool = False,
    ):
        """
        Args:
            prob: share of the samples into which objects are pasted.
            max_iou: only objects are pasted whose box overlaps no box of the target by this IoU or
                more; 1 is no limit.
            max_objects: most objects to paste, chosen at random; with replacement unless
                ``corrected``.
            margin: each side of a pasted rectangle lies a random 0 to ``margin`` pixels outside the
                object's box.
            corrected: paste the shape instead of the rectangle where there are masks; choose each
                object once; cut what is covered off the target's boxes and masks. Polygons become
                bit masks.
            min_visible: with ``corrected``, a target object of which a smaller share of its mask
                (or else of its box) stays visible is dropped.
            any_number: how many objects are pasted is random too, from none to all that may be.
            min_pixels: with ``corrected``, another rule than ``min_visible``, that of MMDetection's
                copy-paste: a target object is dropped of which at most so many pixels stay visible,
                if that moves a side of its box by more than ``max_shift`` pixels.
            masks_only: nothing is pasted where one of the two samples has no masks.
            into_empty: images without objects get some too.
        """
        for key, value in (("prob", prob), ("max_iou", max_iou), ("min_visible", min_visible)):
            if not 0 <= value <= 1:
                raise UserError(f"{_key(key)} = {value}, expected a number from 0 to 1")
        numbers = {"max_objects": max_objects, "margin": margin, "min_pixels": min_pixels or 0}
        for key, value in numbers.items():
            if value < 0:
                raise UserError(f"{_key(key)} = {value}, expected a whole number from 0")
        self.prob = prob
        self.max_iou = max_iou
        self.max_objects = max_objects
        self.margin = margin
        self.corrected = corrected
        self.min_visible = min_visible
        self.any_number = any_number
        self.min_pixels = min_pixels
        self.max_shift = max_shift
        self.masks_only = masks_only
        self.into_empty = into_empty

    def is_due(self, target: Sample) -> bool:
        """Draw whether objects are pasted into ``target``; never, if it has none of its own (but
        for ``into_empty``), or no masks where they are needed.
        """
        drawn, instances = bool(np.random.random() < self.prob), target["instances"]
        has_masks = instances.has("gt_masks") or not self.masks_only
        return drawn and has_masks and (len(instances) > 0 or self.into_empty)

    def __call__(self, target: Sample, source: Sample) -> Sample:
        """Return ``target`` with objects of ``source``; neither is changed.

        Args:
            target, source: what a :class:`~d2dense.data.mappers.DetectionMapper` returned, best of
                one size. Objects that do not lie within the target's size are not pasted.
        """
        size = tuple(target["image"].shape[-2:])
        old, new = target["instances"], source["instances"]
        if not len(new) or not (len(old) or self.into_empty):
            return target
        if self.masks_only and not (old.has("gt_masks") and new.has("gt_masks")):
            return target
        new = self._chosen(old, Instances(size, **new.get_fields()))
        if not len(new):
            return target
        if old.has("gt_masks") and (self.corrected or _differ(old.gt_masks, new.gt_masks)):
            old, new = _draw_masks(old), _draw_masks(new)
        covered = self._region(new, tuple(source["image"].shape[-2:]))
        if self.corrected:
            old = _cut(old, covered, self._stays)
        joined = Instances.cat([old, new])
        large = joined.gt_boxes.nonempty(threshold=_MIN_SIDE)
        joined = joined if bool(large.all()) else joined[large]
        if joined.has("gt_masks") and isinstance(joined.gt_masks, _Windows):
            joined.gt_masks = joined.gt_masks.to_bit_masks(size)
        covered = torch.from_numpy(covered)
        result = target | {"instances": joined}
        for key in ("image", "sem_seg"):
            if key in target and key in source:
                result[key] = torch.where(covered, _fit(source[key], size), target[key])
        return result

    def _chosen(self, old: Instances, new: Instances) -> Instances:
        """Return the objects of ``new`` to paste: any of those that overlap ``old`` little."""
        height, width = new.image_size
        boxes = new.gt_boxes
        free = torch.ones(len(boxes), dtype=torch.bool)
        if len(old) and self.max_iou < 1:
            free = pairwise_iou(boxes, old.gt_boxes).amax(dim=1) < self.max_iou
        inside = (boxes.tensor <= boxes.tensor.new_tensor([width, height] * 2)).all(dim=1)
        kept = torch.nonzero(free & inside)[:, 0]
        count = min(len(kept), self.max_objects)
        if self.any_number:
            count = np.random.randint(count + 1)
        order = np.random.choice(np.arange(len(kept)), count, replace=not self.corrected)
        return new[kept[torch.from_numpy(order)]]

    def _stays(self, visible: int, before: int, shift: float) -> bool:
        """Whether an object stays of which so many of the pixels that it had are visible."""
        if self.min_pixels is None:
            return visible >= self.min_visible * before
        return visible > self.min_pixels or shift <= self.max_shift

    def _region(self, new: Instances, source_size: tuple[int, int]) -> np.ndarray:
        """Return (H, W) bool, the pixels that are pasted."""
        covered = np.zeros(new.image_size, dtype=bool)
        if self.corrected and new.has("gt_masks"):
            for window, mask in new.gt_masks:
                covered[window] |= mask
            return covered
        height, width = np.minimum(new.image_size, source_size)
        grow = np.random.randint(self.margin + 1, size=(len(new), 4)) * [-1, -1, 1, 1]
        boxes = new.gt_boxes.tensor.numpy().astype(np.int64) + grow
        # officially the last row and column of an image are never pasted
        for x0, y0, x1, y1 in np.clip(boxes, 0, [width - 1, height - 1] * 2):
            covered[y0:y1, x0:x1] = True
        return covered


def _key(name: str) -> str:
    return f"INPUT.COPY_PASTE.{name.upper()} / dataloader.train.copy_paste.{name}"


def _fit(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut or fill up (..., H, W) on the right and bottom to ``size``."""
    height, width = plane.shape[-2:]
    if (height, width) == size:
        return plane
    return F.pad(plane, (0, size[1] - width, 0, size[0] - height))


class _Windows:
    """Masks of objects, each as (the slices of the image that hold it, bool array of their size):
    a small part of the memory that whole masks take, for as long as objects are selected and
    joined.
    """

    def __init__(self, parts: Iterable[tuple[Window, np.ndarray]]):
        self.parts = list(parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Window, np.ndarray]]:
        return iter(self.parts)

    def __getitem__(self, keep: Tensor) -> _Windows:
        return _Windows([part for part, kept in zip(self.parts, keep.tolist()) if kept])

    @staticmethod
    def cat(windows: Sequence[_Windows]) -> _Windows:
        return _Windows([part for each in windows for part in each])

    def to_bit_masks(self, size: tuple[int, int]) -> BitMasks:
        bits = np.zeros((len(self), *size), dtype=bool)
        for plane, (window, mask) in zip(bits, self.parts):
            plane[window] = mask
        return BitMasks(torch.from_numpy(bits))


def _differ(first: PolygonMasks | BitMasks, second: PolygonMasks | BitMasks) -> bool:
    return type(first) is not type(second) or (
        isinstance(first, BitMasks) and first.tensor.shape[1:] != second.tensor.shape[1:]
    )


def _draw_masks(instances: Instances) -> Instances:
    """Return ``instances`` with :class:`_Windows` as masks."""
    masks, size = instances.gt_masks, instances.image_size
    if isinstance(masks, PolygonMasks):
        parts = [_draw(polygons, size) for polygons in masks]
    else:
        whole = slice(0, size[0]), slice(0, size[1])
        parts = [(whole, plane) for plane in _fit(masks.tensor, size).numpy()]
    return Instances(size, **instances.get_fields() | {"gt_masks": _Windows(parts)})


def _draw(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[Window, np.ndarray]:
    """Draw the polygons [x0, y0, x1, ...] of an object within the pixels that they reach."""
    corners, (height, width) = np.concatenate(polygons).reshape(-1, 2), size
    low = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, [width - 1, height - 1])
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int), low + 1, [width, height])
    moved = [(polygon.reshape(-1, 2) - low).reshape(-1) for polygon in polygons]
    columns, rows = map(slice, low.tolist(), high.tolist())
    return (rows, columns), polygons_to_bitmask(moved, *(high - low).tolist()[::-1])


def _cut(
    instances: Instances, covered: np.ndarray, stays: Callable[[int, int, float], bool]
) -> Instances:
    """Return what is visible of ``instances`` where the pixels ``covered`` (H, W) hide them.

    Args:
        stays: says of an object of which something is visible whether it stays, from its visible
            pixels, those before, and by how much a side of its box moves
    """
    boxes = instances.gt_boxes.tensor.clone()
    shapes = instances.gt_masks if instances.has("gt_masks") else _Windows(map(_filled, boxes))
    keep, cut = torch.ones(len(boxes), dtype=torch.bool), []
    for index, (window, shape) in enumerate(shapes):
        visible = shape & ~covered[window]
        before, after = np.count_nonzero(shape), np.count_nonzero(visible)
        if after < before:
            keep[index] = after > 0
            if after > 0:
                box = _tighter(boxes[index], window, visible)
                keep[index] = stays(after, before, float((box - boxes[index]).abs().max()))
                boxes[index] = box
        cut.append((window, visible))
    fields = instances.get_fields() | {"gt_boxes": Boxes(boxes)}
    if instances.has("gt_masks"):
        fields["gt_masks"] = _Windows(cut)
    return Instances(instances.image_size, **fields)[keep]


def _filled(box: Tensor) -> tuple[Window, np.ndarray]:
    """Return all pixels that a box touches."""
    (x0, y0), (x1, y1) = box[:2].floor().int().tolist(), box[2:].ceil().int().tolist()
    return (slice(y0, y1), slice(x0, x1)), np.ones((y1 - y0, x1 - x0), dtype=bool)


def _tighter(box: Tensor, window: Window, visible: np.ndarray) -> Tensor:
    """Return the part of ``box`` around the pixels ``visible`` of ``window``."""
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    top, left = window[0].start, window[1].start
    low = box.new_tensor([left + columns[0], top + rows[0]])
    high = box.new_tensor([left + columns[-1] + 1, top + rows[-1] + 1])
    return torch.cat([torch.maximum(box[:2], low), torch.minimum(box[2:], high)])


def build_copy_paste(cfg: CfgNode) -> CopyPaste | None:
    """Build what ``INPUT.COPY_PASTE`` asks for; None where it is off."""
    node = cfg.INPUT.COPY_PASTE
    if not node.ENABLED:
        return None
    return CopyPaste(
        prob=node.PROB,
        max_iou=node.MAX_IOU,
        max_objects=node.MAX_OBJECTS,
        margin=node.MARGIN,
        corrected=node.CORRECTED,
        min_visible=node.MIN_VISIBLE,
        any_number=node.ANY_NUMBER,
        min_pixels=node.MIN_PIXELS,
        max_shift=node.MAX_SHIFT,
        masks_only=node.MASKS_ONLY,
        into_empty=node.INTO_EMPTY,
    )
