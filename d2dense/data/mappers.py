"""From a dataset record to what a model is fed: read, augment, pack.

A record is a dict in Detectron2's dataset format. The result holds ``image`` (C, H, W) uint8 and,
in training, ``instances`` with ``gt_boxes`` (N, 4) xyxy, ``gt_classes`` (N,) and ``gt_masks``, or
``sem_seg`` (H, W) int64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    PolygonMasks,
    polygons_to_bitmask,
)

from d2dense.errors import UserError, nearest

from . import augmentations as recipes
from . import semantic_augmentations
from .annotations import run_total
from .geometry import clip_boxes, clip_polygon, polygon_area, transform_mask, transform_polygons
from .reading import RejectedSample, SampleError, read_image, read_sem_seg

__all__ = ["DetectionMapper", "SemanticMapper", "from_cfg", "known_format", "to_tensor"]

logger = logging.getLogger(__name__)

_FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Return (H, W, C) as (C, H, W), several times faster than by copying a transposed view."""
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    cv2.split(np.ascontiguousarray(image), list(planes))
    return torch.from_numpy(planes)


def known_format(image_format: str) -> str:
    """Return the channel order ``image_format`` if there is such a one."""
    if image_format not in _FORMATS:
        raise UserError(
            f"INPUT.FORMAT / image_format = {image_format!r}, expected one of {', '.join(_FORMATS)}"
        )
    return image_format


class DetectionMapper:
    """Feeds detectors: boxes and, where asked for, instance masks; a label map comes along if the
    record has one.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        use_instance_mask: bool = False,
        instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
        min_box_side: float = 1e-5,
        reject_emptied: bool = False,
        ignore_label: int = 255,
    ):
        """
        Args:
            is_train: False gives the image alone.
            augmentations: steps, usually from :mod:`d2dense.data.augmentations`.
            image_format: channel order, see :func:`detectron2.data.detection_utils.read_image`.
            use_instance_mask: whether ``gt_masks`` is wanted.
            instance_mask_format: ``"polygon"`` or ``"bitmask"``. Images that hold a run-length mask
                get bit masks in either case, since such a mask has no polygon.
            recompute_boxes: draw boxes around the augmented masks instead of transforming the
                annotated boxes; after a crop they are tighter.
            min_box_side: objects whose box has a side of at most this many pixels after the
                augmentations are dropped.
            reject_emptied: raise a :class:`~d2dense.data.reading.RejectedSample` where that drops
                all objects that are in view, so that another image is taken. An image without any
                object in view is kept.
            ignore_label: what "no class" is in ``sem_seg``.
        """
        if instance_mask_format not in ("polygon", "bitmask"):
            raise UserError(
                f"INPUT.MASK_FORMAT / instance_mask_format = {instance_mask_format!r}, "
                "expected 'polygon' or 'bitmask'"
            )
        if recompute_boxes and not use_instance_mask:
            raise UserError(
                "recomputed boxes need masks: set MODEL.MASK_ON / use_instance_mask as well"
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = known_format(image_format)
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        self.min_box_side = min_box_side
        self.reject_emptied = reject_emptied
        self.ignore_label = ignore_label

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the mapped copy of ``record``.

        Raises:
            SampleError: naming the file.
        """
        record = dict(record)
        image = read_image(record, self.image_format)
        annotations = [a for a in record.pop("annotations", ()) if not a.get("iscrowd", 0)]
        height, width = image.shape[:2]
        boxes = clip_boxes(_xyxy(annotations), height, width)
        sem_seg = None
        if self.is_train and "sem_seg_file_name" in record:
            sem_seg = read_sem_seg(record, image, self.ignore_label)
        inputs = T.AugInput(image, boxes=boxes if self.is_train else None, sem_seg=sem_seg)
        transforms = self.augmentations(inputs)
        record["image"] = to_tensor(inputs.image)
        if not self.is_train:
            return record
        if inputs.sem_seg is not None:
            record["sem_seg"] = torch.from_numpy(inputs.sem_seg.astype(np.int64))
        size = inputs.image.shape[:2]
        masks = None
        if self.use_instance_mask:
            masks = self._masks(annotations, transforms, (height, width), size, record["file_name"])
        boxes = clip_boxes(inputs.boxes.reshape(-1, 4), *size)
        record["instances"] = self._pack(annotations, boxes, masks, size)
        in_view = (boxes[:, 2:] > boxes[:, :2]).all(axis=1).any()
        if self.reject_emptied and in_view and not len(record["instances"]):
            raise RejectedSample(
                f"after augmentation no object of {record['file_name']} has sides of more than "
                f"{self.min_box_side} pixels; lower INPUT.MIN_BOX_SIDE / "
                "dataloader.train.mapper.min_box_side, or change the augmentations",
                record["file_name"],
            )
        return record

    def _masks(
        self,
        annotations: list[dict],
        transforms: T.TransformList,
        old_size: tuple[int, int],
        new_size: tuple[int, int],
        file_name: str,
    ) -> PolygonMasks | BitMasks:
        """Return the transformed masks of ``annotations``, in order; those cut away are empty."""
        missing = sum("segmentation" not in annotation for annotation in annotations)
        if missing:
            raise SampleError(
                f"{missing} of {len(annotations)} objects in {file_name} have boxes but no masks; "
                "set MODEL.MASK_ON False / use_instance_mask=False, or use a dataset with masks",
                file_name,
            )
        shapes = [a["segmentation"] for a in annotations]
        moved = [_move(shape, transforms, old_size, file_name) for shape in shapes]
        if self.instance_mask_format == "polygon" and all(isinstance(s, list) for s in moved):
            return PolygonMasks([[p.reshape(-1) for p in polygons] for polygons in moved])
        bits = np.zeros((len(moved), *new_size), dtype=bool)
        for index, shape in enumerate(moved):
            if isinstance(shape, list):
                flat = [polygon.reshape(-1) for polygon in shape]
                bits[index] = polygons_to_bitmask(flat, *new_size)
            else:
                bits[index] = shape
        return BitMasks(torch.from_numpy(bits))

    def _pack(
        self,
        annotations: list[dict],
        boxes: np.ndarray,
        masks: PolygonMasks | BitMasks | None,
        size: tuple[int, int],
    ) -> Instances:
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
        instances.gt_classes = torch.tensor(
            [int(a["category_id"]) for a in annotations], dtype=torch.int64
        )
        keep = instances.gt_boxes.nonempty(threshold=self.min_box_side)
        if masks is not None:
            keep &= masks.nonempty()
            instances.gt_masks = masks
        instances = _select(instances, keep)
        if self.recompute_boxes and len(instances):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            instances.gt_boxes.clip(size)  # cut polygons end on the border up to rounding
            keep = instances.gt_boxes.nonempty(threshold=self.min_box_side)
            instances = _select(instances, keep)
        return instances


def _select(instances: Instances, keep: torch.Tensor) -> Instances:
    return instances if bool(keep.all()) else instances[keep]


def _xyxy(annotations: list[dict]) -> np.ndarray:
    """Return the boxes of ``annotations`` as (N, 4) xyxy float64."""
    rows = [list(a["bbox"]) for a in annotations]
    modes = {a["bbox_mode"] for a in annotations}
    if len(modes) == 1 and all(len(row) == 4 for row in rows):  # as float32, like Detectron2
        return BoxMode.convert(torch.tensor(rows), modes.pop(), BoxMode.XYXY_ABS).double().numpy()
    rows = [BoxMode.convert(r, a["bbox_mode"], BoxMode.XYXY_ABS) for r, a in zip(rows, annotations)]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _move(
    shape: list | dict | np.ndarray,
    transforms: T.TransformList,
    size: tuple[int, int],
    file_name: str,
) -> list[np.ndarray] | np.ndarray:
    """Transform one object's mask: polygons stay polygons (P, 2), anything else becomes a (H, W)
    bool array.
    """
    if isinstance(shape, list):
        polygons = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in shape]
        inside = [piece for p in polygons for piece in clip_polygon(p, *size)]
        return [p for p in transform_polygons(transforms, inside) if polygon_area(p) > 0]
    own = tuple(shape["size"] if isinstance(shape, dict) else np.shape(shape))
    if own != size:  # before decoding, which takes memory for any size that a file claims
        raise SampleError(
            f"a mask of {file_name} is {own[1]}x{own[0]}, but the image is {size[1]}x{size[0]}",
            file_name,
        )
    mask = _decode(shape, file_name) if isinstance(shape, dict) else np.asarray(shape, np.uint8)
    return transform_mask(transforms, mask).astype(bool)


def _decode(code: dict[str, Any], file_name: str) -> np.ndarray:
    """Return a compressed run-length mask as (H, W) uint8."""
    height, width = code["size"]
    try:
        covered = run_total(code)
    except ValueError as error:
        raise SampleError(f"a mask of {file_name} cannot be decoded: {error}", file_name) from None
    if covered != height * width:
        raise SampleError(
            f"a mask of {file_name} has runs of {covered} pixels, but is {width}x{height}; correct "
            "or remove it",
            file_name,
        )
    return mask_util.decode(code)


class SemanticMapper:
    """Feeds semantic segmentation: an image and a label map."""

    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        ignore_label: int = 255,
    ):
        """
        Args:
            is_train: False gives the image alone.
            augmentations: steps, usually :func:`d2dense.data.augmentations.semantic`.
            image_format: channel order.
            ignore_label: what "no class" is in ``sem_seg``; the dataset's own ignore label is
                turned into it.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = known_format(image_format)
        self.ignore_label = ignore_label

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the mapped copy of ``record``.

        Raises:
            SampleError: naming the file.
        """
        record = dict(record)
        image = read_image(record, self.image_format)
        sem_seg = None
        if self.is_train:
            if "sem_seg_file_name" not in record:
                raise SampleError(
                    f"image {record['file_name']} has no label map; this mapper needs a "
                    "semantic dataset",
                    record["file_name"],
                )
            sem_seg = read_sem_seg(record, image, self.ignore_label)
        inputs = T.AugInput(image, sem_seg=sem_seg)
        self.augmentations(inputs)
        record["image"] = to_tensor(inputs.image)
        record.pop("annotations", None)
        if sem_seg is not None:
            record["sem_seg"] = torch.from_numpy(inputs.sem_seg.astype(np.int64))
        return record


def from_cfg(
    cfg: CfgNode, is_train: bool, *, resize: bool = True
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build the mapper that ``INPUT.MAPPER`` names.

    Args:
        resize: False leaves images for tests in their own size.

    Raises:
        UserError: an unknown recipe, or keypoints or proposals from files, which it does not read.
    """
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise UserError(f"MODEL.{key} is set, but the mappers read boxes, masks and label maps")
    name, ignore_label = cfg.INPUT.MAPPER, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if name == "classification":
        from . import classification  # it builds on this module

        return classification.from_cfg(cfg, is_train)
    if name not in _RECIPES:
        known = sorted([*_RECIPES, "classification"])
        raise UserError(f"INPUT.MAPPER = {name!r}, expected {known}{nearest(name, known)}")
    if is_train:
        steps = _RECIPES[name](cfg)
    elif not resize:
        steps = []
    else:
        steps = recipes.default(
            is_train=False, min_size=cfg.INPUT.MIN_SIZE_TEST, max_size=cfg.INPUT.MAX_SIZE_TEST
        )
    if name in _SEMANTIC:
        return SemanticMapper(
            is_train=is_train,
            augmentations=steps,
            image_format=cfg.INPUT.FORMAT,
            ignore_label=ignore_label,
        )
    return DetectionMapper(
        is_train=is_train,
        augmentations=steps,
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
        recompute_boxes=is_train and _recompute_boxes(cfg),
        min_box_side=cfg.INPUT.MIN_BOX_SIDE,
        reject_emptied=cfg.INPUT.REJECT_EMPTIED,
        ignore_label=ignore_label,
    )


def _recompute_boxes(cfg: CfgNode) -> bool:
    # Detectron2 recomputes them from masks wherever its own crop is on
    crops = cfg.INPUT.MAPPER == "default" and cfg.INPUT.CROP.ENABLED
    return cfg.INPUT.RECOMPUTE_BOXES or (crops and cfg.MODEL.MASK_ON)


def _resize_keys(cfg: CfgNode) -> dict[str, Any]:
    return {
        "is_train": True,
        "min_size": cfg.INPUT.MIN_SIZE_TRAIN,
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "flip": cfg.INPUT.RANDOM_FLIP,
    }


def _default_steps(cfg: CfgNode) -> list[T.Augmentation]:
    return recipes.default(
        **_resize_keys(cfg),
        sample_style=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        crop_type=cfg.INPUT.CROP.TYPE if cfg.INPUT.CROP.ENABLED else None,
        crop_size=cfg.INPUT.CROP.SIZE,
    )


def _detr_steps(cfg: CfgNode) -> list[T.Augmentation]:
    return recipes.detr(
        **_resize_keys(cfg),
        crop_min_sizes=cfg.INPUT.DETR.CROP_MIN_SIZES,
        crop_range=cfg.INPUT.DETR.CROP_RANGE,
    )


def _lsj_steps(cfg: CfgNode) -> list[T.Augmentation]:
    return recipes.lsj(
        image_size=cfg.INPUT.LSJ.IMAGE_SIZE,
        min_scale=cfg.INPUT.LSJ.MIN_SCALE,
        max_scale=cfg.INPUT.LSJ.MAX_SCALE,
        flip=cfg.INPUT.RANDOM_FLIP,
        pad_value=cfg.INPUT.LSJ.PAD_VALUE,
        ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )


def _semantic_steps(cfg: CfgNode) -> list[T.Augmentation]:
    return recipes.semantic(
        **_resize_keys(cfg),
        sample_style=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        scale_range=cfg.INPUT.SCALE_RANGE or None,
        scale_step=cfg.INPUT.SCALE_STEP or None,
        crop_size=cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else None,
        single_category_max_area=cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA,
        ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        color_distortion=cfg.INPUT.COLOR_DISTORTION,
        image_format=cfg.INPUT.FORMAT,
    )


_RECIPES = {
    "default": _default_steps,
    "detr": _detr_steps,
    "lsj": _lsj_steps,
    "padded_crops": semantic_augmentations.steps_from_cfg,
    "semantic": _semantic_steps,
}
_SEMANTIC = ("padded_crops", "semantic")
