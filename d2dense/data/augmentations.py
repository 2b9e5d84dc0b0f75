"""Augmentation recipes as functions that return lists of Detectron2 augmentations, for both kinds
of config.

Every recipe has ``is_train``; in evaluation it only resizes, to the largest of several sizes. Sizes
are in pixels. Recipes are plain lists, so a config may add, drop or reorder steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, PadTransform, Transform, TransformList

from d2dense.errors import UserError

__all__ = [
    "DETR_MIN_SIZES",
    "PhotometricDistortion",
    "RandomCropPad",
    "ScaleJitter",
    "default",
    "detr",
    "lsj",
    "semantic",
]

DETR_MIN_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def default(
    *,
    is_train: bool,
    min_size: int | Sequence[int] = (800,),
    max_size: int = 1333,
    sample_style: str = "choice",
    flip: str = "horizontal",
    crop_type: str | None = None,
    crop_size: Sequence[float] = (0.9, 0.9),
) -> list[T.Augmentation]:
    """Resize the shorter side, then flip: Detectron2's standard recipe.

    Args:
        is_train: False leaves out everything random.
        min_size: shorter sides to choose from, or (least, most) with ``sample_style="range"``; 0
            keeps the size.
        max_size: upper limit of the longer side.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``.
        crop_type: a crop before the resize, one of :class:`detectron2.data.transforms.RandomCrop`'s
            types.
        crop_size: the crop's size (height, width) in the meaning of ``crop_type``.
    """
    if not is_train:
        return [_fixed_resize(min_size, max_size)]
    steps = [_resize(min_size, max_size, sample_style)]
    if crop_type is not None:
        steps.insert(0, T.RandomCrop(crop_type, list(crop_size)))
    return steps + _flips(flip)


def detr(
    *,
    is_train: bool = True,
    min_size: int | Sequence[int] = DETR_MIN_SIZES,
    max_size: int = 1333,
    crop_min_sizes: Sequence[int] = (400, 500, 600),
    crop_range: Sequence[int] = (384, 600),
    flip: str = "horizontal",
) -> list[T.Augmentation]:
    """Multi-scale resize, preceded half of the time by a resize and a random crop: the recipe of
    the DETR family.

    Args:
        min_size, max_size: as in :func:`default`, for the final resize.
        crop_min_sizes: shorter sides to choose from before the crop.
        crop_range: least and most pixels of the crop's sides.
    """
    if not is_train:
        return [_fixed_resize(min_size, max_size)]
    crop = T.AugmentationList(
        [_resize(crop_min_sizes, None), T.RandomCrop("absolute_range", tuple(crop_range))]
    )
    return [*_flips(flip), T.RandomApply(crop, prob=0.5), _resize(min_size, max_size)]


def lsj(
    *,
    is_train: bool = True,
    image_size: int = 1024,
    min_scale: float = 0.1,
    max_scale: float = 2.0,
    flip: str = "horizontal",
    pad_value: float = 128.0,
    ignore_label: int = 255,
) -> list[T.Augmentation]:
    """Large-scale jitter: random scale, then a crop of fixed size, padded on the right and bottom.

    Args:
        image_size: side of the square result.
        min_scale, max_scale: range of the scale, relative to the image fitted into the square.
        pad_value: grey value of the padding.
        ignore_label: what the padding is in a semantic label map.
    """
    if not is_train:
        return [_fixed_resize(image_size, image_size)]
    return [
        *_flips(flip),
        ScaleJitter(image_size=image_size, min_scale=min_scale, max_scale=max_scale),
        RandomCropPad(crop_size=image_size, pad_value=pad_value, ignore_label=ignore_label),
    ]


def semantic(
    *,
    is_train: bool = True,
    min_size: int | Sequence[int] = (512,),
    max_size: int = 2048,
    sample_style: str = "choice",
    crop_size: Sequence[int] | None = (512, 512),
    single_category_max_area: float = 1.0,
    ignore_label: int = 255,
    color_distortion: bool = True,
    flip: str = "horizontal",
    image_format: str = "BGR",
) -> list[T.Augmentation]:
    """Resize, crop, distort colours, flip: the usual recipe of semantic segmentation.

    Args:
        min_size, max_size, sample_style: as in :func:`default`.
        crop_size: (height, width) in pixels, smaller where the image is; None for no crop.
        single_category_max_area: largest share that one class may have in the crop (ten attempts);
            1.0 is off.
        ignore_label: this label may exceed that share.
        image_format: channel order that the mapper reads, for the colours.
    """
    if not is_train:
        return [_fixed_resize(min_size, max_size)]
    steps = [_resize(min_size, max_size, sample_style)]
    if crop_size is not None:
        if min(crop_size) < 1:
            raise UserError(
                f"INPUT.CROP.SIZE / crop_size = {list(crop_size)}: the semantic recipe needs pixels"
            )
        size = tuple(int(side) for side in crop_size)
        steps.append(
            T.RandomCrop_CategoryAreaConstraint(
                "absolute", size, single_category_max_area, ignore_label
            )
        )
    if color_distortion:
        steps.append(PhotometricDistortion(image_format=image_format))
    return steps + _flips(flip)


def _resize(
    min_size: int | Sequence[int], max_size: int | None, sample_style: str = "choice"
) -> T.Augmentation:
    sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
    if sample_style == "range" and len(sizes) == 1:
        sizes = sizes * 2
    limit = {} if max_size is None else {"max_size": max_size}
    return T.ResizeShortestEdge(sizes, sample_style=sample_style, **limit)


def _fixed_resize(min_size: int | Sequence[int], max_size: int) -> T.Augmentation:
    """Resize for evaluation: of several sizes the largest."""
    return _resize(min_size if isinstance(min_size, int) else max(min_size), max_size)


def _flips(flip: str) -> list[T.Augmentation]:
    if flip not in ("horizontal", "vertical", "none"):
        raise UserError(f"flip = {flip!r}, expected 'horizontal', 'vertical' or 'none'")
    if flip == "none":
        return []
    return [T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]


class ScaleJitter(T.Augmentation):
    """Resize so that the image fits into a square of ``image_size`` times a random scale, aspect
    ratio kept.
    """

    def __init__(self, *, image_size: int, min_scale: float, max_scale: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        side = self.image_size * np.random.uniform(self.min_scale, self.max_scale)
        ratio = side / max(height, width)
        new_height, new_width = (max(1, round(ratio * length)) for length in (height, width))
        return T.ResizeTransform(height, width, new_height, new_width)


class RandomCropPad(T.Augmentation):
    """Cut a random square of ``crop_size`` out of the image; a smaller image is padded on the right
    and bottom.
    """

    def __init__(self, *, crop_size: int, pad_value: float = 128.0, ignore_label: int = 255):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = min(height, self.crop_size), min(width, self.crop_size)
        y0 = np.random.randint(height - crop_height + 1)
        x0 = np.random.randint(width - crop_width + 1)
        crop = CropTransform(x0, y0, crop_width, crop_height, width, height)
        pad = PadTransform(
            0,
            0,
            self.crop_size - crop_width,
            self.crop_size - crop_height,
            crop_width,
            crop_height,
            self.pad_value,
            self.ignore_label,
        )
        return TransformList([crop, pad])


class PhotometricDistortion(T.Augmentation):
    """Random brightness, contrast, saturation and hue as in SSD, each applied half of the time.

    Args:
        brightness: largest shift of the grey value.
        contrast: range of the factor on all channels, before or after the colour changes.
        saturation: range of the factor on the saturation.
        hue: largest shift of the hue in degrees.
        image_format: ``"BGR"`` or ``"RGB"``.
    """

    def __init__(
        self,
        *,
        brightness: float = 32.0,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 36.0,
        image_format: str = "BGR",
    ):
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise UserError(
                f"photometric distortion needs INPUT.FORMAT BGR or RGB, got {image_format!r}"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        # One draw per parameter whether it is used or not: the stream of random numbers has a fixed
        # length.
        use = np.random.uniform(size=4) < 0.5
        brightness = np.random.uniform(-self.brightness, self.brightness)
        contrast = np.random.uniform(*self.contrast)
        saturation = np.random.uniform(*self.saturation)
        hue = np.random.uniform(-self.hue, self.hue)
        return _ColorTransform(
            brightness=brightness if use[0] else 0.0,
            contrast=contrast if use[1] else 1.0,
            saturation=saturation if use[2] else 1.0,
            hue=hue if use[3] else 0.0,
            contrast_last=bool(np.random.randint(2)),
            is_rgb=self.image_format == "RGB",
        )


class _ColorTransform(Transform):
    """The distortion with its numbers drawn; geometry stays."""

    def __init__(
        self,
        *,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        contrast_last: bool,
        is_rgb: bool,
    ):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Return the distorted image; (H, W, 3) uint8 in and out."""
        first = 1.0 if self.contrast_last else self.contrast
        image = _scale_shift(image, first, self.brightness * first)
        if self.saturation != 1.0 or self.hue != 0.0:
            to_hsv, back = (
                (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
                if self.is_rgb
                else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
            )
            hsv = cv2.cvtColor(np.ascontiguousarray(image), to_hsv)
            hsv[..., 1] = _scale_shift(hsv[..., 1], self.saturation, 0.0)
            # uint8 hue counts steps of two degrees
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(self.hue / 2)) % 180
            image = cv2.cvtColor(hsv, back)
        return _scale_shift(image, self.contrast, 0.0) if self.contrast_last else image

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


def _scale_shift(values: np.ndarray, scale: float, shift: float) -> np.ndarray:
    if scale == 1.0 and shift == 0.0:
        return values
    return np.clip(values.astype(np.float32) * scale + shift, 0, 255).astype(np.uint8)
