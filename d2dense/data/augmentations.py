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
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    PadTransform,
    Transform,
    TransformList,
)
from PIL import Image

from d2dense.errors import UserError

from .colors import PhotometricDistortion

__all__ = [
    "DETR_MIN_SIZES",
    "JitterAndCrop",
    "PhotometricDistortion",
    "RandomApply",
    "RandomCropPad",
    "RandomFlip",
    "RandomScale",
    "ResizeShortestEdge",
    "ScaleJitter",
    "default",
    "detr",
    "flips",
    "lsj",
    "semantic",
]

_CROP_MAX_SIZE = 4200  # of the longer side before the crop of the DETR family
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
    return steps + flips(flip)


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
        [_resize(crop_min_sizes, _CROP_MAX_SIZE), T.RandomCrop("absolute_range", tuple(crop_range))]
    )
    return [*flips(flip), RandomApply(crop, prob=0.5), _resize(min_size, max_size)]


def lsj(
    *,
    is_train: bool = True,
    image_size: int = 1024,
    min_scale: float = 0.1,
    max_scale: float = 2.0,
    flip: str = "horizontal",
    pad_value: float | Sequence[float] = 128.0,
    ignore_label: int = 255,
) -> list[T.Augmentation]:
    """Large-scale jitter: random scale, then a crop of fixed size, padded on the right and bottom.

    Flipping first, instead of before the padding, gives the same distribution of samples.

    Args:
        image_size: side of the square result.
        min_scale, max_scale: range of the scale, relative to the image fitted into the square.
        pad_value: value of the padding, of all channels or of each. The model's pixel means become
            zeros there when it normalises, up to the rounding to whole numbers.
        ignore_label: what the padding is in a semantic label map.
    """
    if not is_train:
        return [_fixed_resize(image_size, image_size)]
    jitter = ScaleJitter(image_size=image_size, min_scale=min_scale, max_scale=max_scale)
    crop = RandomCropPad(crop_size=image_size, pad_value=pad_value, ignore_label=ignore_label)
    return [*flips(flip), JitterAndCrop(jitter=jitter, crop=crop)]


def semantic(
    *,
    is_train: bool = True,
    min_size: int | Sequence[int] = (512,),
    max_size: int = 2048,
    sample_style: str = "choice",
    scale_range: Sequence[float] | None = None,
    scale_step: float | None = None,
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
        scale_range, scale_step: with a range, the sizes are multiplied by a random factor, see
            :class:`RandomScale`.
        crop_size: (height, width) in pixels, smaller where the image is; None for no crop.
        single_category_max_area: largest share that one class may have in the crop (ten attempts);
            1.0 is off.
        ignore_label: this label may exceed that share.
        image_format: channel order that the mapper reads, for the colours.
    """
    if not is_train:
        return [_fixed_resize(min_size, max_size)]
    steps = [_resize(min_size, max_size, sample_style)]
    if scale_range:
        steps = [_random_scale(min_size, max_size, scale_range, scale_step)]
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
    return steps + flips(flip)


def _resize(
    min_size: int | Sequence[int], max_size: int, sample_style: str = "choice"
) -> T.Augmentation:
    sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
    if sample_style == "range" and len(sizes) == 1:
        sizes = sizes * 2
    return ResizeShortestEdge(sizes, max_size=max_size, sample_style=sample_style)


def _random_scale(
    min_size: int | Sequence[int],
    max_size: int,
    scale_range: Sequence[float],
    scale_step: float | None,
) -> RandomScale:
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    if len(sizes) != 1:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN / min_size = {sizes}: a random scale multiplies one size; give "
            "one, or leave out INPUT.SCALE_RANGE / scale_range"
        )
    return RandomScale(
        min_size=sizes[0], max_size=max_size, scale_range=scale_range, scale_step=scale_step
    )


def _fixed_resize(min_size: int | Sequence[int], max_size: int) -> T.Augmentation:
    """Resize for evaluation: of several sizes the largest."""
    return _resize(min_size if isinstance(min_size, int) else max(min_size), max_size)


def flips(flip: str) -> list[T.Augmentation]:
    """Return the random flip of that name: ``"horizontal"``, ``"vertical"`` or ``"none"``."""
    if flip not in ("horizontal", "vertical", "none"):
        raise UserError(f"flip = {flip!r}, expected 'horizontal', 'vertical' or 'none'")
    if flip == "none":
        return []
    return [RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's resize to the same pixels, several times faster after a crop or a flip."""

    def get_transform(self, image: np.ndarray) -> Transform:
        found = super().get_transform(image)
        if not isinstance(found, T.ResizeTransform):
            return found
        return _Resize(found.h, found.w, found.new_h, found.new_w, found.interp)


class _Resize(T.ResizeTransform):
    def apply_image(self, image: np.ndarray, interp: int | None = None) -> np.ndarray:
        # PIL takes a view, such as a crop, pixel by pixel
        return super().apply_image(np.ascontiguousarray(image), interp)


class RandomFlip(T.RandomFlip):
    """Detectron2's flip. Its horizontal one is a view of the image, which takes numpy many times
    longer to copy in a later step than the copy that is made here.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        transform = super().get_transform(image)
        return _HFlip(transform.width) if isinstance(transform, HFlipTransform) else transform


class _HFlip(HFlipTransform):
    def apply_image(self, image: np.ndarray) -> np.ndarray:
        if image.dtype not in (np.uint8, np.float32):  # OpenCV knows few other types
            return super().apply_image(image)
        return cv2.flip(np.ascontiguousarray(image), 1).reshape(image.shape)


class RandomApply(T.RandomApply):
    """Detectron2's, with a text that says what it applies."""

    def __repr__(self) -> str:
        return f"RandomApply[{self.aug}, prob={self.prob}]"

    __str__ = __repr__


class ScaleJitter(T.Augmentation):
    """Resize so that the longer side becomes the whole part of ``image_size`` times a random scale,
    aspect ratio kept.

    Args:
        image_size: in pixels.
        min_scale, max_scale: between which the scale is drawn.
    """

    def __init__(self, *, image_size: int, min_scale: float, max_scale: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        side = int(self.image_size * np.random.uniform(self.min_scale, self.max_scale))
        ratio = side / max(height, width)
        new_height, new_width = (max(1, round(ratio * length)) for length in (height, width))
        return _Resize(height, width, new_height, new_width)


class RandomScale(T.Augmentation):
    """Resize, aspect ratio kept, into a random multiple of a frame.

    Args:
        min_size, max_size: of the frame: the sides of the result, divided by the multiple, are at
            most this, and one of them equals it. A ``min_size`` of 0 takes the image's own sides.
        scale_range: (least, most) multiple, all equally likely.
        scale_step: only the least multiple plus steps of this are drawn; None: any.

    Raises:
        UserError: a range or a step that makes no sense.
    """

    def __init__(
        self,
        *,
        min_size: int,
        max_size: int,
        scale_range: Sequence[float],
        scale_step: float | None = None,
    ):
        super().__init__()
        is_range = len(scale_range) == 2 and 0 < scale_range[0] <= scale_range[1]
        if not is_range or (scale_step is not None and scale_step <= 0):
            raise UserError(
                f"INPUT.SCALE_RANGE / scale_range = {list(scale_range)}, INPUT.SCALE_STEP / "
                f"scale_step = {scale_step}: expected the least and the most scale, above 0, and "
                "a distance between scales above 0, if any"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        least, most = self.scale_range
        if self.scale_step:
            count = int((most - least) / self.scale_step + 1e-6) + 1
            scale = least + self.scale_step * np.random.randint(count)
        else:
            scale = np.random.uniform(least, most)
        ratio = scale
        if self.min_size:
            short, long = int(self.min_size * scale), int(self.max_size * scale)
            ratio = min(short / min(height, width), long / max(height, width))
        new_height, new_width = (max(1, int(ratio * side + 0.5)) for side in (height, width))
        return _Resize(height, width, new_height, new_width)


class RandomCropPad(T.Augmentation):
    """Cut a random part of ``crop_size`` out of the image; a smaller image is padded on the right
    and bottom.

    Args:
        crop_size: a side, or height and width, in pixels.
        pad_value: of the image, one or one per channel, 0 to 255.
        ignore_label: what label maps are padded with.

    Raises:
        UserError: a size that is no whole number of pixels.
    """

    def __init__(
        self,
        *,
        crop_size: int | Sequence[int],
        pad_value: float | Sequence[float] = 128.0,
        ignore_label: int = 255,
    ):
        super().__init__()
        sides = [crop_size] * 2 if isinstance(crop_size, int) else list(crop_size)
        if len(sides) != 2 or any(int(side) != side or side < 1 for side in sides):
            raise UserError(
                f"crop_size = {crop_size} (INPUT.CROP.SIZE, INPUT.LSJ.IMAGE_SIZE), expected height "
                "and width in pixels"
            )
        self._init(locals())
        self.sides = [int(side) for side in sides]

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = min(height, self.sides[0]), min(width, self.sides[1])
        y0 = np.random.randint(height - crop_height + 1)
        x0 = np.random.randint(width - crop_width + 1)
        crop = CropTransform(x0, y0, crop_width, crop_height, width, height)
        pad = _Pad(
            0,
            0,
            self.sides[1] - crop_width,
            self.sides[0] - crop_height,
            crop_width,
            crop_height,
            self.pad_value,
            self.ignore_label,
        )
        return TransformList([crop, pad])


class JitterAndCrop(T.Augmentation):
    """A scale jitter followed by a crop, for which only those pixels are made that stay: of images
    that are enlarged twofold a quarter.
    """

    def __init__(self, *, jitter: ScaleJitter, crop: RandomCropPad):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        resize = self.jitter.get_transform(image)
        # the crop looks at nothing but the size
        scaled = np.broadcast_to(np.uint8(0), (resize.new_h, resize.new_w))
        return _ResizeCropPad([resize, *self.crop.get_transform(scaled).transforms])


class _ResizeCropPad(TransformList):
    """Three transforms in turn, except for the image, whose resize stops at the crop's borders."""

    def _apply(self, x: np.ndarray, meth: str) -> np.ndarray:
        resize, crop, pad = self.transforms
        whole = (crop.h, crop.w) == (resize.new_h, resize.new_w)
        if meth != "apply_image" or whole or x.dtype != np.uint8:
            return super()._apply(x, meth)
        across, down = resize.w / resize.new_w, resize.h / resize.new_h
        left, top = crop.x0 * across, crop.y0 * down
        right, bottom = left + crop.w * across, top + crop.h * down
        box = (left, top, min(right, resize.w), min(bottom, resize.h))
        picture = Image.fromarray(np.ascontiguousarray(x).squeeze(axis=_single_channel(x)))
        part = np.asarray(picture.resize((crop.w, crop.h), resize.interp, box=box))
        return pad.apply_image(part.reshape(crop.h, crop.w, *x.shape[2:]))


def _single_channel(image: np.ndarray) -> tuple[int, ...]:
    """Return the axes that PIL does not want: the channels, where there is one."""
    return (2,) if image.ndim == 3 and image.shape[2] == 1 else ()


class _Pad(PadTransform):
    """Pads with a value for each channel, and faster than numpy does."""

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        channels = image.shape[2] if image.ndim == 3 else 1
        try:
            value = np.broadcast_to(self.pad_value, channels).tolist()
        except ValueError:
            raise UserError(
                "INPUT.LSJ.PAD_VALUE or INPUT.PADDED_CROPS.PAD_VALUE / pad_value is "
                f"{self.pad_value}: an image has {channels} channels; give one value, or one for "
                "each"
            ) from None
        borders = (self.y0, self.y1, self.x0, self.x1)
        padded = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=value)
        return padded.reshape(*padded.shape[:2], *image.shape[2:])
